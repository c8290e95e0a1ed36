"""Meta's layout: `params.json` and `consolidated.NN.pth`, one file for each rank the model was cut for.

It knows how those files spell, order and cut the tensors, and gives them back whole, or in parts that need not be the
files', by Hugging Face's names and row order. A `.pth` is a pickle: it is read by torch's weights-only loader, which
makes tensors and plain containers only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pronk.engine.errors import CheckpointFormatError, CheckpointNotFoundError, TensorError
from pronk.engine.model.config import LlamaConfig, refuse_other_meta_models
from pronk.engine.weights.cut import Cut, Cuts, part_of, whole
from pronk.engine.weights.json_object import JsonObject
from pronk.engine.weights.names import (
    EMBEDDING,
    HEAD,
    SERVED_DTYPES,
    Shape,
    StoredTensor,
    check_complete,
    expected_tensors,
    other_dtype,
    stored_bytes,
    unexpected,
    wrong_shape,
)

META_NAMES = {EMBEDDING: "tok_embeddings.weight", "model.norm.weight": "norm.weight", HEAD: "output.weight"}
META_LAYER_NAMES = {
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}
ROTATED = ("q_proj.weight", "k_proj.weight")
HEADS = (*ROTATED, "v_proj.weight")
LAYER_TENSOR = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")
ROTARY_BUFFER = "rope.freqs"


@dataclass(frozen=True)
class Shard:
    """One file's tensors, mapped, by Meta's names."""

    file: Path
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class MetaCheckpoint:
    """A verified checkpoint; see `checkpoint.Checkpoint`. stored: the tensors of the model by canonical name."""

    folder: Path
    config: LlamaConfig
    stored: Mapping[str, StoredTensor]
    shards: tuple[Shard, ...]

    @classmethod
    def open(cls, folder: Path) -> MetaCheckpoint:
        """Maps every file; of the tensors it reads only embedding and head, to see whether they are the same. That is a
        few rows, but for files that hold the same numbers in two places: there it is all of both.

        Raises CheckpointError: a file missing, damaged or not weights-only, a tensor missing, unexpected, or of another
        shape or dtype.
        """
        refuse_other_meta_models(JsonObject.read(folder / "params.json"))
        shards = tuple(load_shard(file) for file in shard_files(folder))
        check_same_names(shards)
        embedding = pieces(shards, META_NAMES[EMBEDDING])
        config = LlamaConfig.from_meta(
            folder,
            embedding_rows=sum(piece.shape[0] for piece in embedding if piece.dim()),
            tie_word_embeddings=is_tied(shards),
            dtype=str(embedding[0].dtype).removeprefix("torch."),
        )
        expected = expected_tensors(config)
        stored = describe(shards, config)
        check_complete(folder, expected, stored)
        return cls(folder, config, stored, shards)

    def num_bytes(self, cut: Cuts = whole) -> int:
        return stored_bytes(self.stored, cut)

    def tensors(self, cut: Cuts = whole) -> Iterator[tuple[str, Tensor]]:
        """In the order of the forward pass. Rows that need no merging and no reordering stay mapped.

        Of key/value heads that are repeated it reads every copy.
        """
        for name in expected_tensors(self.config):
            yield name, self._read(name, cut(name))

    def _read(self, name: str, cut: Cut | None) -> Tensor:
        stored, head_dim = self.stored[name], self.config.head_dim
        parts = pieces(self.shards, meta_name(name))
        axis = cut_axis(name)
        if axis is None:
            return part_of(parts[0], cut).contiguous()
        if cut is not None:
            check_cut(stored, cut, head_dim if name.endswith(HEADS) else 1)
        copies = sum(part.shape[axis] for part in parts) // stored.shape[axis]
        tensor = merge(parts, axis, None if cut is None else repeated(cut, copies))
        if copies > 1:
            tensor = drop_repeated_heads(stored, tensor, copies, head_dim)
        if name.endswith(ROTATED):
            tensor = split_halves(tensor, head_dim)
        return tensor.contiguous()


def meta_name(name: str) -> str:
    """Canonical name -> Meta's."""
    if name in META_NAMES:
        return META_NAMES[name]
    match = LAYER_TENSOR.fullmatch(name)
    if match is None:
        raise ValueError(f"{name} is no tensor of a Llama")
    return f"layers.{match[1]}.{META_LAYER_NAMES[match[2]]}.weight"


def cut_axis(name: str) -> int | None:
    """The dimension along which shards cut a tensor; None for norms, of which every shard holds all.

    Llama 3 and later; Llama 1 and 2 cut the embedding along dimension 1, and are refused for its shape.
    """
    if "norm" in name:
        return None
    return 1 if ".o_proj." in name or ".down_proj." in name else 0


def split_halves(weight: Tensor, head_dim: int) -> Tensor:
    """Row order of Q and K, Meta's to Hugging Face's: [heads * head_dim, in] -> the same shape.

    Meta's rotary pairs are neighbours, rows 2j and 2j + 1 of a head; Hugging Face's are rows j and j + head_dim / 2.
    """
    pairs = weight.view(len(weight) // head_dim, head_dim // 2, 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape)


def check_cut(stored: StoredTensor, cut: Cut, head_rows: int) -> None:
    """Raises ValueError when the part reaches out of the tensor, or cuts a head's `head_rows` rows in two."""
    cut.shape(stored.shape)
    if cut.axis == 0 and (cut.start % head_rows or cut.stop % head_rows):
        raise ValueError(f"{cut} of {stored.name} cuts a head of {head_rows} rows in two")


def repeated(cut: Cut, copies: int) -> Cut:
    """Where a part of whole heads lies in a tensor that holds each head `copies` times, one after the other."""
    return Cut(0, cut.start * copies, cut.stop * copies) if cut.axis == 0 else cut


def merge(parts: list[Tensor], axis: int, cut: Cut | None) -> Tensor:
    """A tensor, or a part of it, of the shards' parts, which lie one after the other along `axis`.

    What lies in one shard alone is a view of it.
    """
    if cut is not None:
        parts = overlaps(parts, axis, cut)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=axis)


def overlaps(parts: list[Tensor], axis: int, cut: Cut) -> list[Tensor]:
    """What each shard holds of the part that is wanted; shards that hold nothing of it are left out, but for one."""
    if cut.axis != axis:
        return [cut.of(part) for part in parts]
    found, place = [], 0
    for part in parts:
        start, stop = max(cut.start - place, 0), min(cut.stop - place, part.shape[axis])
        if start < stop:
            found.append(part.narrow(axis, start, stop - start))
        place += part.shape[axis]
    return found or [parts[0].narrow(axis, 0, 0)]


def drop_repeated_heads(stored: StoredTensor, tensor: Tensor, copies: int, head_dim: int) -> Tensor:
    """K and V of a model cut for more ranks than it has key/value heads: every rank holds a whole one, repeated.

    [heads * copies * head_dim, in] -> [heads * head_dim, in]; the heads may be some of the tensor's.
    Raises TensorError when the copies of a head are not the same.
    """
    heads = tensor.reshape(len(tensor) // (copies * head_dim), copies, head_dim, tensor.shape[1])
    first, others = heads[:, :1], heads[:, 1:]
    if not torch.equal(others, first.expand_as(others)):
        number = stored.shape[0] // head_dim
        raise TensorError(f"{stored.file}: tensor {stored.name} repeats its {number} key/value heads with other values")
    return heads[:, 0].flatten(0, 1)


def shard_files(folder: Path) -> list[Path]:
    """`consolidated.00.pth` and on, or the one `consolidated.pth`. Raises CheckpointError when one is missing."""
    numbered = {
        int(match[1]): path
        for path in folder.glob("consolidated.*.pth")
        if (match := re.fullmatch(r"consolidated\.(\d+)\.pth", path.name))
    }
    if numbered:
        gaps = [number for number in range(max(numbered)) if number not in numbered]
        if gaps:
            raise CheckpointFormatError(f"{folder} lacks consolidated.{gaps[0]:02d}.pth: download it")
        return [numbered[number] for number in sorted(numbered)]
    single = folder / "consolidated.pth"
    if not single.is_file():
        raise CheckpointNotFoundError(f"{folder} holds no consolidated.*.pth file")
    return [single]


def load_shard(file: Path) -> Shard:
    """Maps the file. Raises CheckpointFormatError when it is damaged, or holds anything but named tensors."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointFormatError(
            f"{file} cannot be read as weights only: it is damaged, or asks to run code, which Pronk never does "
            f"({_first_line(error)})"
        ) from error
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]
    if not isinstance(content, dict):
        raise CheckpointFormatError(f"{file} holds a {type(content).__name__}: expected named tensors")
    return Shard(
        file, {name: _checked(file, name, tensor) for name, tensor in content.items() if name != ROTARY_BUFFER}
    )


def check_same_names(shards: tuple[Shard, ...]) -> None:
    """Raises TensorError when a tensor is in one shard and not in another."""
    for shard in shards:
        for other in shards:
            for name in other.tensors:
                if name not in shard.tensors:
                    raise TensorError(f"{shard.file}: tensor {name} is missing, {other.file.name} has its part of it")


def pieces(shards: tuple[Shard, ...], name: str) -> list[Tensor]:
    """A tensor's parts, by rank. Raises TensorError where it is missing."""
    for shard in shards:
        if name not in shard.tensors:
            raise TensorError(f"{shard.file}: tensor {name} is missing")
    return [shard.tensors[name] for shard in shards]


def is_tied(shards: tuple[Shard, ...]) -> bool:
    """Whether the head is the embedding: Meta's files of a tied model leave it out or store the same values again."""
    head = META_NAMES[HEAD]
    if any(head not in shard.tensors for shard in shards):
        return True
    return all(_same(shard.tensors[head], shard.tensors.get(META_NAMES[EMBEDDING])) for shard in shards)


def describe(shards: tuple[Shard, ...], config: LlamaConfig) -> dict[str, StoredTensor]:
    """Every tensor of the files, whole, by canonical name; those that Meta's layout does not know by their own."""
    canonical = {meta_name(name): name for name in (*expected_tensors(config), HEAD)}
    stored: dict[str, StoredTensor] = {}
    for name in shards[0].tensors:
        if name not in canonical:
            raise unexpected(shards[0].file, name)
        if canonical[name] == HEAD and config.tie_word_embeddings:
            continue
        stored[canonical[name]] = _describe_one(shards, name, canonical[name], config)
    return stored


def _describe_one(shards: tuple[Shard, ...], name: str, canonical: str, config: LlamaConfig) -> StoredTensor:
    parts = pieces(shards, name)
    axis = cut_axis(canonical)
    expected = expected_tensors(config)[canonical]
    for shard, part in zip(shards, parts, strict=True):
        shape, dtype = tuple(part.shape), part.dtype
        if dtype != parts[0].dtype:
            raise TensorError(
                f"{shard.file}: tensor {name} is {dtype}, in {shards[0].file.name} it is {parts[0].dtype}"
            )
        fixed = [size for dimension, size in enumerate(shape) if dimension != axis]
        if len(shape) != len(expected) or fixed != [s for dimension, s in enumerate(expected) if dimension != axis]:
            raise wrong_shape(StoredTensor(name, shard.file, shape, dtype), expected)
    shape = tuple(parts[0].shape)
    if axis is not None:
        total = sum(part.shape[axis] for part in parts)
        shape = _without_repeats(canonical, (*shape[:axis], total, *shape[axis + 1 :]), expected, len(shards), config)
    return StoredTensor(name, shards[0].file, shape, parts[0].dtype)


def _without_repeats(name: str, shape: Shape, expected: Shape, shards: int, config: LlamaConfig) -> Shape:
    """The shape of K or V once the heads repeated for ranks beyond their number are dropped."""
    copies, rest = divmod(shards, config.num_key_value_heads)
    repeated = (".k_proj." in name or ".v_proj." in name) and copies > 1 and not rest
    return expected if repeated and shape == (copies * expected[0], *expected[1:]) else shape


def _checked(file: Path, name: object, tensor: object) -> Tensor:
    # A subclass, a sparse or a quantised tensor could pass for a plain one and read other numbers.
    if not isinstance(name, str) or type(tensor) is not Tensor or tensor.layout != torch.strided:
        raise CheckpointFormatError(f"{file}: {name!r} is a {type(tensor).__name__}: expected a plain tensor")
    if tensor.dtype not in SERVED_DTYPES:
        raise other_dtype(file, name, str(tensor.dtype).removeprefix("torch."))
    return tensor


def _same(head: Tensor, embedding: Tensor | None) -> bool:
    """Reads nothing where both are one storage, and compares a few rows before all of them: an untied head differs at
    once, and both may be a gigabyte.
    """
    if embedding is None or head.dim() != 2 or head.shape != embedding.shape or head.dtype != embedding.dtype:
        return False
    if head.data_ptr() == embedding.data_ptr() and head.stride() == embedding.stride():
        return True
    return torch.equal(head[:8], embedding[:8]) and torch.equal(head, embedding)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
