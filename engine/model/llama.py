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
class Llama:
    """A loaded model. Make one with `load`."""

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
    """tensors: all that the model has, by Hugging Face's names, in any order, each once, and cut as `split` says;
    complete and of the right shape (the checkpoint sees to that). Each is copied and packed as it comes, so what a rank
    has is in memory once. num_positions: how far the rotary table reaches. weight_format: of the linear layers; an int4
    model's head is int8, since errors in it are errors in the answer.
    """
    config = split.model
    head_format: WeightFormat = "int8" if weight_format == "int4" else weight_format
    singles: dict[str, Tensor] = {}
    ends: dict[str, Weight] = {}
    weights: dict[tuple[int, str], Weight] = {}
    parts: dict[tuple[int, str], dict[int, Tensor]] = {}
    # Nothing here keeps a tensor once it is packed: what was read of its file would stay in memory.
    for name, tensor in tensors:
        layer, _, rest = name.removeprefix("model.layers.").partition(".")
        place = _PLACES.get(rest.removesuffix(".weight"))
        if name in (EMBEDDING, HEAD):
            ends |= _pack_end(
                kernels,
                name,
                _padded(tensor.to(device, dtype), split.vocab_per_rank),
                head_format,
                is_tied=config.tie_word_embeddings,
            )
            continue
        if place is None:
            singles[name] = tensor.to(device, dtype, copy=True)
            continue
        product, index = place
        waiting = parts.setdefault((int(layer), product), {})
        waiting[index] = tensor
        if len(waiting) == _PARTS[product]:
            del parts[int(layer), product]
            weights[int(layer), product] = kernels.pack(
                [waiting.pop(i).to(device, dtype) for i in range(_PARTS[product])], weight_format
            )
    return Llama(
        split=split,
        kernels=kernels,
        tp=tp,
        embedding=Embedding(kernels, tp, split, ends[EMBEDDING]),
        layers=[
            Layer(
                input_norm=singles[f"model.layers.{i}.input_layernorm.weight"],
                qkv=weights[i, "qkv"],
                o=weights[i, "o"],
                post_attention_norm=singles[f"model.layers.{i}.post_attention_layernorm.weight"],
                gate_up=weights[i, "gate_up"],
                down=weights[i, "down"],
            )
            for i in range(config.num_hidden_layers)
        ],
        norm=singles["model.norm.weight"],
        head=Head(kernels, tp, split, ends[HEAD]),
        cos_sin=cos_sin_table(config, num_positions).to(device),
    )


def _pack_end(
    kernels: Kernels, name: str, table: Sequence[Tensor], head_format: WeightFormat, *, is_tied: bool
) -> dict[str, Weight]:
    """name: EMBEDDING or HEAD; table: its rows, in parts. -> the weights that are made of it, by their names: a tied
    head is made of the embedding, and is the embedding where it is not rounded."""
    if name == HEAD:
        return {HEAD: kernels.pack(table, head_format)}
    embedding = kernels.pack(table)
    if not is_tied:
        return {EMBEDDING: embedding}
    return {EMBEDDING: embedding, HEAD: embedding if head_format == "plain" else kernels.pack(table, head_format)}


def _padded(rows: Tensor, count: int) -> list[Tensor]:
    """rows [n, H], n up to count -> [count, H] in parts, zeros after them."""
    return [rows] if len(rows) == count else [rows, rows.new_zeros(count - len(rows), rows.shape[1])]
