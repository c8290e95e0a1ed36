"""The architecture in plain torch: Llama 3.2, with grouped-query attention and llama3 rope scaling.

It exists to be trained. Modules carry the names of a Hugging Face checkpoint, so `state_dict()` is already the file to
save. It knows no KV cache and no sampling: serving is the engine's work.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """The sizes of a model. The defaults are cria's: 5.24 million parameters."""

    vocab_size: int = 2048
    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_factor: float = 32.0
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_length: int = 8192
    max_position_embeddings: int = 131072

    def huggingface_config(self, first_special: int) -> dict[str, Any]:
        """The `config.json` of this shape, where `first_special` is the id of `<|begin_of_text|>`."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": self.rope_factor,
                "low_freq_factor": self.rope_low_freq_factor,
                "high_freq_factor": self.rope_high_freq_factor,
                "original_max_position_embeddings": self.rope_original_length,
            },
            "max_position_embeddings": self.max_position_embeddings,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "mlp_bias": False,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "bos_token_id": first_special,
            "eos_token_id": [first_special + 1, first_special + 8, first_special + 9],
            "torch_dtype": "bfloat16",
        }


def rope_frequencies(shape: Shape) -> Tensor:
    """Inverse frequencies after llama3 scaling, float32 [head_dim / 2].

    Waves shorter than original/high are kept, waves longer than original/low are slowed by the factor, and those in
    between are blended (the rule published with Llama 3.1).
    """
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    frequencies = 1.0 / shape.rope_theta**exponents
    turns = shape.rope_original_length * frequencies / (2 * math.pi)
    low, high = shape.rope_low_freq_factor, shape.rope_high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return kept * frequencies + (1.0 - kept) * frequencies / shape.rope_factor


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + head_dim / 2) by its position's angle: states [batch, heads, length, head_dim]."""
    first, second = states.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, states: Tensor) -> Tensor:
        return F.rms_norm(states, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            shape.num_attention_heads,
            shape.num_key_value_heads,
            shape.head_dim,
        )
        self.q_proj = nn.Linear(shape.hidden_size, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, shape.hidden_size, bias=False)

    def forward(self, states: Tensor, cos: Tensor, sin: Tensor, future: Tensor) -> Tensor:
        batch, length, _ = states.shape
        query = self.q_proj(states).view(batch, length, self.heads, self.head_dim).transpose(1, 2)
        key = self.k_proj(states).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        value = self.v_proj(states).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        group = self.heads // self.kv_heads
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
        # Written out: for short rows on a CPU the fused operation's backward pass is the slower one.
        scores = query @ key.transpose(2, 3) * self.head_dim**-0.5 + future
        mixed = scores.float().softmax(dim=-1).to(value.dtype) @ value
        output: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))
        return output


class MLP(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        output: Tensor = self.down_proj(F.silu(self.gate_proj(states)) * self.up_proj(states))
        return output


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = MLP(shape)

    def forward(self, states: Tensor, cos: Tensor, sin: Tensor, future: Tensor) -> Tensor:
        states = states + self.self_attn(self.input_layernorm(states), cos, sin, future)
        return states + self.mlp(self.post_attention_layernorm(states))  # type: ignore[no-any-return]


class Body(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)


class Llama(nn.Module):
    """Token ids [batch, length] in, logits [batch, length, vocab_size] out. The head is the embedding, transposed."""

    frequencies: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.model = Body(shape)
        self.register_buffer("frequencies", rope_frequencies(shape), persistent=False)
        residual_scale = (2 * shape.num_hidden_layers) ** -0.5
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                shrink = residual_scale if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
                nn.init.normal_(weight, std=0.02 * shrink)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], dtype=torch.float32)
        angles = positions[:, None] * self.frequencies
        states = self.model.embed_tokens(tokens)
        cos, sin = angles.cos().to(states.dtype), angles.sin().to(states.dtype)
        future = torch.full((len(positions), len(positions)), -math.inf, dtype=states.dtype).triu(1)
        for layer in self.model.layers:
            states = layer(states, cos, sin, future)
        return F.linear(self.model.norm(states), self.model.embed_tokens.weight)
