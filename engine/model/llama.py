"""Llama, as the papers have it (Touvron et al. 2023; Grattafiori et al. 2024), over a set of kernels.

Pre-norm blocks: x += attention(norm(x)), then x += mlp(norm(x)); grouped-query attention with rotary positions; SwiGLU;
RMSNorm. Where several ranks share the model (`split`), each has some heads and some of the MLP's width, and the ranks'
outputs are added where attention and MLP close. Knows tensors and a paged cache; nothing of sequences or requests.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pronk.engine.model.config import LlamaConfig
from pronk.engine.model.rope import cos_sin_table
from pronk.engine.model.split import Split
from pronk.engine.model.vocabulary import Embedding, Head
from pronk.engine.parallel import ALONE, Collectives
from pronk.engine.weights.names import EMBEDDING, HEAD
from pronk.kernels.interface import Kernels, Weight, WeightFormat

# For names only: the model runs where nothing but torch and its kernels are installed.
if TYPE_CHECKING:
    from pronk.engine.batch import Batch
    from pronk.engine.cache.memory import KVCache


@dataclass(frozen=True)
class Layer:
    """One block's weights. Queries, keys and values come from one product, and so do gate and up."""

    input_norm: Tensor
    qkv: Weight
    o: Weight
    post_attention_norm: Tensor
    gate_up: Weight
    down: Weight


@dataclass(frozen=True)
class Parts:
    """What a model is assembled from, as the kernels have laid it out; made by `pack`."""

    norms: dict[str, Tensor]
    """By Hugging Face's names."""
    weights: dict[str, Weight]
    """ "embedding", "head", and by layer "0.qkv", "0.o", "0.gate_up", "0.down". The head of a tied model that is not
    rounded is the embedding."""


@dataclass(frozen=True)
class Llama:
    """A loaded model. Make one with `load`, or with `pack` and `assemble`."""

    split: Split
    kernels: Kernels
    tp: Collectives
    embedding: Embedding
    layers: list[Layer]
    norm: Tensor
    head: Head
    cos_sin: Tensor

    @property
    def config(self) -> LlamaConfig:
        """Of the whole model."""
        return self.split.model

    def forward(self, token_ids: Tensor, batch: Batch, cache: KVCache) -> Tensor:
        """token_ids int64 [T]: those of the batch, the pending ones filled in. Writes their keys and values into the
        cache. -> the last layer's output after the final norm, [T, H]."""
        kernels, tp, eps = self.kernels, self.tp, self.config.rms_norm_eps
        num_heads = self.split.config.num_attention_heads
        plan = kernels.plan_attention(batch.queries, num_heads=num_heads, cache=cache.layers[0])
        residual = self.embedding(token_ids)
        normed = kernels.rms_norm(residual, self.layers[0].input_norm, eps)
        # The norm that opens a block is taken where the one before ends, together with its addition.
        next_norms = [layer.input_norm for layer in self.layers[1:]] + [self.norm]
        for layer, next_norm, kv in zip(self.layers, next_norms, cache.layers, strict=True):
            q = kernels.linear_rope_and_cache(normed, layer.qkv, batch.positions, self.cos_sin, batch.slots, kv)
            attended = tp.all_reduce(kernels.linear(kernels.attention(q, kv, plan).flatten(1), layer.o))
            normed, residual = kernels.add_rms_norm(attended, residual, layer.post_attention_norm, eps)
            mlp = tp.all_reduce(kernels.linear(kernels.linear_silu_mul(normed, layer.gate_up), layer.down))
            normed, residual = kernels.add_rms_norm(mlp, residual, next_norm, eps)
        return normed

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [R, H], rows of `forward`'s -> [R, V], or this rank's columns of it; see `Head.logits`."""
        return self.head.logits(hidden)

    @property
    def nbytes(self) -> int:
        """Memory of all weights on this rank, a head that shares the embedding's counted once."""
        tensors, weights = [self.norm, self.cos_sin], [self.head.weight]
        if self.embedding.table is not self.head.weight:
            weights.append(self.embedding.table)
        for layer in self.layers:
            tensors += [layer.input_norm, layer.post_attention_norm]
            weights += [layer.qkv, layer.o, layer.gate_up, layer.down]
        return sum(tensor.nbytes for tensor in tensors) + sum(weight.nbytes for weight in weights)


# Which products are one: the part of a name between "model.layers.N." and ".weight" -> (product, place in it).
_PLACES = {
    "self_attn.q_proj": ("qkv", 0),
    "self_attn.k_proj": ("qkv", 1),
    "self_attn.v_proj": ("qkv", 2),
    "self_attn.o_proj": ("o", 0),
    "mlp.gate_proj": ("gate_up", 0),
    "mlp.up_proj": ("gate_up", 1),
    "mlp.down_proj": ("down", 0),
}
_PARTS = {"qkv": 3, "o": 1, "gate_up": 2, "down": 1}


def load(
    split: Split,
    kernels: Kernels,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    dtype: torch.dtype,
    device: torch.device,
    num_positions: int,
    weight_format: WeightFormat = "plain",
    tp: Collectives = ALONE,
) -> Llama:
    """`pack` and `assemble`."""
    parts = pack(split, kernels, tensors, dtype=dtype, device=device, weight_format=weight_format)
    return assemble(split, kernels, parts, device=device, num_positions=num_positions, tp=tp)


def pack(
    split: Split,
    kernels: Kernels,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    dtype: torch.dtype,
    device: torch.device,
    weight_format: WeightFormat = "plain",
) -> Parts:
    """tensors: all that the model has, by Hugging Face's names, in any order, each once, and cut as `split` says;
    complete and of the right shape (the checkpoint sees to that). Each is copied and packed as it comes, so what a rank
    has is in memory once. weight_format: of the linear layers; an int4 model's head is int8, since errors in it are
    errors in the answer.
    """
    config = split.model
    head_format: WeightFormat = "int8" if weight_format == "int4" else weight_format
    norms: dict[str, Tensor] = {}
    weights: dict[str, Weight] = {}
    waiting: dict[str, dict[int, Tensor]] = {}
    # Nothing here keeps a tensor once it is packed: what was read of its file would stay in memory.
    for name, tensor in tensors:
        layer, _, rest = name.removeprefix("model.layers.").partition(".")
        place = _PLACES.get(rest.removesuffix(".weight"))
        if name in (EMBEDDING, HEAD):
            weights |= _pack_end(
                kernels,
                name,
                _padded(tensor.to(device, dtype), split.vocab_per_rank),
                head_format,
                is_tied=config.tie_word_embeddings,
            )
            continue
        if place is None:
            norms[name] = tensor.to(device, dtype, copy=True)
            continue
        product, index = place
        found = waiting.setdefault(f"{layer}.{product}", {})
        found[index] = tensor
        if len(found) == _PARTS[product]:
            del waiting[f"{layer}.{product}"]
            weights[f"{layer}.{product}"] = kernels.pack(
                [found.pop(i).to(device, dtype) for i in range(_PARTS[product])], weight_format
            )
    return Parts(norms, weights)


def assemble(
    split: Split,
    kernels: Kernels,
    parts: Parts,
    *,
    device: torch.device,
    num_positions: int,
    tp: Collectives = ALONE,
) -> Llama:
    """parts: all that the model has, packed by this set. num_positions: how far the rotary table reaches."""
    norms, weights = parts.norms, parts.weights
    return Llama(
        split=split,
        kernels=kernels,
        tp=tp,
        embedding=Embedding(kernels, tp, split, weights["embedding"]),
        layers=[
            Layer(
                input_norm=norms[f"model.layers.{i}.input_layernorm.weight"],
                qkv=weights[f"{i}.qkv"],
                o=weights[f"{i}.o"],
                post_attention_norm=norms[f"model.layers.{i}.post_attention_layernorm.weight"],
                gate_up=weights[f"{i}.gate_up"],
                down=weights[f"{i}.down"],
            )
            for i in range(split.model.num_hidden_layers)
        ],
        norm=norms["model.norm.weight"],
        head=Head(kernels, tp, split, weights["head"]),
        cos_sin=cos_sin_table(split.model, num_positions).to(device),
    )


def _pack_end(
    kernels: Kernels, name: str, table: Sequence[Tensor], head_format: WeightFormat, *, is_tied: bool
) -> dict[str, Weight]:
    """name: EMBEDDING or HEAD; table: its rows, in parts. -> the weights that are made of it, by their names: a tied
    head is made of the embedding, and is the embedding where it is not rounded."""
    if name == HEAD:
        return {"head": kernels.pack(table, head_format)}
    embedding = kernels.pack(table)
    if not is_tied:
        return {"embedding": embedding}
    head = embedding if head_format == "plain" else kernels.pack(table, head_format)
    return {"embedding": embedding, "head": head}


def _padded(rows: Tensor, count: int) -> list[Tensor]:
    """rows [n, H], n up to count -> [count, H] in parts, zeros after them."""
    return [rows] if len(rows) == count else [rows, rows.new_zeros(count - len(rows), rows.shape[1])]
