"""A checkpoint: a model's config and its tensors, whatever files they come from.

It knows which layouts there are and how to tell them apart; each layout has its own file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from torch import Tensor

from pronk.engine.errors import CheckpointNotFoundError, ConfigError
from pronk.engine.model.config import LlamaConfig
from pronk.engine.weights.cut import Cuts, whole
from pronk.engine.weights.dummy import DummyCheckpoint
from pronk.engine.weights.huggingface import HuggingFaceCheckpoint
from pronk.engine.weights.meta import MetaCheckpoint
from pronk.engine.weights.names import expected_tensors

__all__ = ["Checkpoint", "expected_tensors", "open_checkpoint"]


class Checkpoint(Protocol):
    """A checkpoint that was found complete when it was opened: `tensors` gives just what `expected_tensors` lists."""

    @property
    def folder(self) -> Path: ...

    @property
    def config(self) -> LlamaConfig: ...

    def num_bytes(self, cut: Cuts = whole) -> int:
        """Bytes of what `tensors` gives."""
        ...

    def tensors(self, cut: Cuts = whole) -> Iterator[tuple[str, Tensor]]:
        """Each tensor once, by its canonical name, Q and K in Hugging Face's row order, in the checkpoint's own dtype.

        cut: which part of each is wanted; heads of Q, K and V are not cut in two. Of the rest of the files nothing is
        copied. A tensor may be a read-only view of a mapped file: copy it, do not write to it. One is held at a time.
        Raises CheckpointFormatError or TensorError when a file turns out to be damaged, ValueError for a part that
        the tensor does not have.
        """
        ...


def open_checkpoint(folder: Path, load_format: str = "auto", *, seed: int = 0) -> Checkpoint:
    """Opens and verifies the checkpoint in `folder`, without reading its tensors.

    load_format: "safetensors" (Hugging Face's layout), "pth" (Meta's), "auto" (whichever is there, the first if both),
    or "dummy" (random weights from `seed`, in the shape that the folder's config gives).
    Raises CheckpointError when it cannot be served, ConfigError for another load_format.
    """
    if not folder.is_dir():
        raise CheckpointNotFoundError(f"{folder} is no folder: give the folder that holds the checkpoint")
    if load_format == "dummy":
        return DummyCheckpoint.open(folder, seed)
    if load_format == "safetensors":
        return HuggingFaceCheckpoint.open(folder)
    if load_format == "pth":
        return MetaCheckpoint.open(folder)
    if load_format != "auto":
        raise ConfigError(f"load format {load_format!r} is unknown: use auto, safetensors, pth or dummy")
    if any(folder.glob("*.safetensors")) or any(folder.glob("*.safetensors.index.json")):
        return HuggingFaceCheckpoint.open(folder)
    if any(folder.glob("consolidated*.pth")):
        return MetaCheckpoint.open(folder)
    raise CheckpointNotFoundError(f"{folder} holds no weights that can be read{_hint(folder)}")


def _hint(folder: Path) -> str:
    """What to do instead, by what the folder does hold."""
    if any((folder / "original").glob("consolidated*.pth")):
        return f": Meta's files are in {folder / 'original'}, give that folder"
    if any(folder.glob("*.gguf")):
        return ": GGUF files are not served yet, use the safetensors release"
    if any(folder.glob("pytorch_model*.bin")):
        return ": convert pytorch_model.bin to safetensors first"
    return ": expected .safetensors files, or Meta's consolidated.*.pth"
