"""Hugging Face's layout: `config.json` and one or many `.safetensors` files.

It knows where the tensors of these files are and which of them are stray; what a Llama must hold is `names`'s to say.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pronk.engine.errors import CheckpointFormatError, CheckpointNotFoundError, TensorError
from pronk.engine.model.config import LlamaConfig
from pronk.engine.weights.cut import Cut, Cuts, part_of, whole
from pronk.engine.weights.json_object import JsonObject
from pronk.engine.weights.names import (
    EMBEDDING,
    HEAD,
    StoredTensor,
    check_complete,
    expected_tensors,
    other_dtype,
    stored_bytes,
)

INDEX = "model.safetensors.index.json"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

# Old exports store this buffer; it follows from the config.
ROTARY_BUFFER = re.compile(r"(model|model\.layers\.\d+\.self_attn)\.rotary_emb\.inv_freq")


@dataclass(frozen=True)
class HuggingFaceCheckpoint:
    """A verified checkpoint; see `checkpoint.Checkpoint`. stored: where each tensor of the model is, by its name."""

    folder: Path
    config: LlamaConfig
    stored: Mapping[str, StoredTensor]

    @classmethod
    def open(cls, folder: Path) -> HuggingFaceCheckpoint:
        """Reads the config and every file's header, and no tensor.

        Raises CheckpointError: a file missing or damaged, a tensor missing, unexpected, twice there, of another shape
        or dtype.
        """
        config = LlamaConfig.from_huggingface(folder)
        index = read_index(folder)
        files = (
            sorted(set(index.values())) if index is not None else sorted(p.name for p in folder.glob("*.safetensors"))
        )
        if not files:
            raise CheckpointNotFoundError(f"{folder} holds no .safetensors file")
        stored = read_headers([folder / file for file in files], skip_head=config.tie_word_embeddings)
        if index is not None:
            check_index(folder, index, stored, skip_head=config.tie_word_embeddings)
        check_complete(folder, expected_tensors(config), stored)
        embedding = str(stored[EMBEDDING].dtype).removeprefix("torch.")
        return cls(folder, LlamaConfig.from_huggingface(folder, unnamed_dtype=embedding), stored)

    def num_bytes(self, cut: Cuts = whole) -> int:
        return stored_bytes(self.stored, cut)

    def tensors(self, cut: Cuts = whole) -> Iterator[tuple[str, Tensor]]:
        """File by file, in the order of the forward pass. Rows stay mapped, columns are copied.

        A file is mapped anew for each tensor (0.2 ms): what was read of it would stay in memory as long as its map.
        """
        names = list(expected_tensors(self.config))
        for file in sorted({tensor.file for tensor in self.stored.values()}):
            for name in names:
                if self.stored[name].file == file:
                    yield name, _read(file, name, cut(name))


def read_index(folder: Path) -> dict[str, str] | None:
    """Tensor name -> file name, or None when the folder has no index.

    Raises CheckpointFormatError when the index is damaged, or names a file that is not in the folder.
    """
    path = folder / INDEX
    if not path.is_file():
        return None
    weight_map = JsonObject.read(path).child("weight_map")
    if weight_map is None:
        raise CheckpointFormatError(f"{path}: weight_map is missing")
    index = {name: weight_map.text(name, default="") for name in weight_map.values}
    strangers = sorted(
        {file for file in index.values() if Path(file).name != file or not file.endswith(".safetensors")}
    )
    if strangers:
        raise CheckpointFormatError(
            f"{path}: weight_map names {strangers[0]!r}, which is no .safetensors file beside it"
        )
    missing = sorted({file for file in index.values() if not (folder / file).is_file()})
    if missing:
        raise CheckpointFormatError(f"{path} names files that are not there: {', '.join(missing)}; download them")
    return index


def read_headers(files: list[Path], *, skip_head: bool) -> dict[str, StoredTensor]:
    """Where each tensor is, stray ones left out.

    Raises CheckpointFormatError for a damaged file or another dtype, TensorError for a tensor that is in two files.
    """
    stored: dict[str, StoredTensor] = {}
    for file in files:
        with _open(file) as content:
            for name in content.keys():  # noqa: SIM118  (safe_open is no mapping)
                if is_stray(name, skip_head=skip_head):
                    continue
                if name in stored:
                    raise TensorError(
                        f"{file}: tensor {name} is in {stored[name].file.name} too: remove one of the files"
                    )
                header = content.get_slice(name)
                if header.get_dtype() not in DTYPES:
                    raise other_dtype(file, name, header.get_dtype())
                stored[name] = StoredTensor(name, file, tuple(header.get_shape()), DTYPES[header.get_dtype()])
    return stored


def is_stray(name: str, *, skip_head: bool) -> bool:
    """Tensors that may lie in the files and are not loaded: the rotary buffer, and the copy of the embedding that many
    exports of a tied model store as its head.
    """
    return bool(ROTARY_BUFFER.fullmatch(name)) or (skip_head and name == HEAD)


def check_index(folder: Path, index: Mapping[str, str], stored: Mapping[str, StoredTensor], *, skip_head: bool) -> None:
    """Raises TensorError unless the index and the files say the same of every tensor that is loaded."""
    for name, file in index.items():
        if is_stray(name, skip_head=skip_head):
            continue
        if name not in stored or stored[name].file.name != file:
            raise TensorError(f"{folder / file} does not hold tensor {name}, which {INDEX} places there")
    for name, tensor in stored.items():
        if name not in index:
            raise TensorError(f"{tensor.file}: tensor {name} is not named by {INDEX}: one of the two files is outdated")


def _open(file: Path) -> Any:
    """A context manager over the mapped file, its header checked against its size."""
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise CheckpointFormatError(f"{file} is damaged or cut short ({error}): download it again") from error
    except OSError as error:
        raise CheckpointNotFoundError(f"{file} cannot be read: {error}") from error


def _read(file: Path, name: str, cut: Cut | None) -> Tensor:
    try:
        with _open(file) as content:
            tensor: Tensor = content.get_tensor(name)  # a view of the map, which it keeps
    except SafetensorError as error:
        raise CheckpointFormatError(f"{file} is damaged at tensor {name} ({error}): download it again") from error
    return part_of(tensor, cut).contiguous()
