"""The tensors that a Llama consists of: canonical names, shapes, and the check that a checkpoint holds just these.

Canonical names are those of Hugging Face's files. It knows nothing of how files spell or divide them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from pronk.engine.errors import CheckpointFormatError, TensorError
from pronk.engine.model.config import LlamaConfig
from pronk.engine.weights.cut import Cut, Cuts, shape_of

Shape = tuple[int, ...]

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
SERVED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as its file holds it. name: as the file spells it. shape: of the whole tensor, all shards together."""

    name: str
    file: Path
    shape: Shape
    dtype: torch.dtype

    def num_bytes(self, cut: Cut | None) -> int:
        return math.prod(shape_of(self.shape, cut)) * self.dtype.itemsize


def expected_tensors(config: LlamaConfig) -> dict[str, Shape]:
    """Every tensor of the model and its shape, in the order of the forward pass; linear weights are [out, in].

    A tied head is no tensor of its own.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    layer = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    tensors: dict[str, Shape] = {EMBEDDING: (config.vocab_size, hidden)}
    for number in range(config.num_hidden_layers):
        tensors.update({f"model.layers.{number}.{name}.weight": shape for name, shape in layer.items()})
    tensors["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        tensors[HEAD] = (config.vocab_size, hidden)
    return tensors


def check_complete(folder: Path, expected: Mapping[str, Shape], stored: Mapping[str, StoredTensor]) -> None:
    """Raises TensorError unless `stored`, by canonical name, is what is expected."""
    for name, tensor in stored.items():
        if name not in expected:
            raise unexpected(tensor.file, tensor.name)
    missing = [name for name in expected if name not in stored]
    if missing:
        more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise TensorError(
            f"{folder}: no file holds tensor {missing[0]}, expected with shape {list(expected[missing[0]])}{more}: "
            "a file may not have been downloaded, or the config is another model's"
        )
    for name, tensor in stored.items():
        if tensor.shape != expected[name]:
            raise wrong_shape(tensor, expected[name])


def stored_bytes(stored: Mapping[str, StoredTensor], cut: Cuts) -> int:
    """Bytes of the parts that are wanted of all tensors. stored: by canonical name."""
    return sum(tensor.num_bytes(cut(name)) for name, tensor in stored.items())


def unexpected(file: Path, name: str) -> TensorError:
    return TensorError(f"{file}: tensor {name} is no part of the model that the config describes")


def wrong_shape(tensor: StoredTensor, expected: Shape) -> TensorError:
    return TensorError(
        f"{tensor.file}: tensor {tensor.name} has shape {list(tensor.shape)}, expected {list(expected)} by the config"
    )


def other_dtype(file: Path, name: str, dtype: str) -> CheckpointFormatError:
    return CheckpointFormatError(
        f"{file}: tensor {name} is {dtype}: BF16, F16 and F32 weights are served, quantised ones are not yet"
    )
