"""A model's packed weights, kept from one start to the next: laid out as a CPU reads them fastest, rounded if they are.

A start that finds them maps them: it reads no checkpoint, rounds nothing, and asks for no memory but what the system
has for files. They are written while the engine has nothing else to do. Knows a model's parts and their names; how they
lie in a file is `weights.kept`'s.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from pronk.engine.model import llama
from pronk.engine.weights import kept
from pronk.engine.weights.kept import Kept
from pronk.kernels.cpu import CpuKernels
from pronk.kernels.interface import Weight
from pronk.kernels.jit.compiler import cache_folder, host

OFF = "off"
"""Instead of a folder."""
SMALLEST = 64 << 20
"""Bytes from which on weights are kept without being asked: fewer are packed in no time."""
SPARE = 0.03
"""Share of the disk that stays free."""
HERE = Path(__file__)
SOURCES = [HERE, *sorted(HERE.parent.glob("model/*.py")), *sorted(HERE.parent.glob("weights/*.py"))]
CHECKPOINT_FILES = (".json", ".safetensors", ".pth")
NORM = "norm "
"""Before the name of a tensor that is a norm's, not one of a weight's."""

log = logging.getLogger("pronk.engine")


def shelf_for(
    folder: str | None, checkpoint: Path, kernels: CpuKernels, *, variant: str, num_bytes: int
) -> Shelf | None:
    """folder: where the user wants packed weights, or OFF, or None for beside compiled code. num_bytes: of the
    checkpoint. variant: see `Shelf`. -> None where they are not to be kept."""
    if folder is not None:
        return None if folder == OFF else Shelf(Path(folder), checkpoint, kernels, variant)
    beside = cache_folder()
    return None if beside is None or num_bytes < SMALLEST else Shelf(beside / "weights", checkpoint, kernels, variant)


class Shelf:
    """The place of one model's weights, or of a rank's share of them."""

    def __init__(self, folder: Path, checkpoint: Path, kernels: CpuKernels, variant: str) -> None:
        """folder: of all that is kept. checkpoint: the model's. variant: what else decides what the weights are: dtype,
        format, rank. Raises OSError where the checkpoint cannot be looked at."""
        self._kernels = kernels
        # Machines of several kinds may share a folder.
        place = hashlib.sha256(f"{checkpoint.resolve()}\0{variant}\0{host()[0]}".encode()).hexdigest()[:16]
        self.path = folder / f"{checkpoint.resolve().name}-{place}.safetensors"
        digest = hashlib.sha256(kernels.layout.encode())
        for file in sorted(checkpoint.iterdir()):
            if file.suffix in CHECKPOINT_FILES:
                status = file.stat()
                digest.update(f"{file.name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        for source in SOURCES:
            digest.update(source.read_bytes())
        self._key = digest.hexdigest()

    def find(self, report: Callable[[int, int], None]) -> llama.Parts | None:
        """-> what an earlier start kept of the checkpoint as it is now, packed by the code as it is now. report: is
        called with bytes done, and all."""
        found = kept.read(self.path, self._key, report)
        if found is None:
            return None
        facts: dict[str, dict[str, Any]] = json.loads(found.notes)
        norms: dict[str, Tensor] = {}
        tensors: dict[str, dict[str, Any]] = {name: {} for name in facts}
        for name, tensor in found.tensors.items():
            if name.startswith(NORM):
                norms[name.removeprefix(NORM)] = tensor
            else:
                weight, _, part = name.rpartition(".")
                tensors[weight][part] = tensor
        weights = {name: self._kernels.put_together(tensors[name] | facts[name]) for name in facts}
        weights.setdefault("head", weights["embedding"])
        return llama.Parts(norms, weights)

    def keep(self, parts: llama.Parts) -> Iterator[None]:
        """Each step writes a little. It ends when all is kept, or cannot be, which is logged: it costs the time of
        packing at every start, and nothing else."""
        own = {name: weight for name, weight in parts.weights.items() if not _is_tied_head(name, parts.weights)}
        tensors = {NORM + name: tensor for name, tensor in parts.norms.items()}
        facts: dict[str, dict[str, str | int]] = {}
        for name, weight in own.items():
            found, facts[name] = self._kernels.take_apart(weight)
            tensors |= {f"{name}.{part}": tensor for part, tensor in found.items()}
        size = sum(tensor.nbytes for tensor in tensors.values())
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            disk = shutil.disk_usage(self.path.parent)
            if disk.free < size + SPARE * disk.total:
                log.warning("packed weights are not kept: %s has no %d bytes to spare", self.path.parent, size)
                return
            yield from kept.write(self.path, Kept(self._key, json.dumps(facts), tensors))
        except OSError as error:
            log.warning("packed weights are not kept in %s: %s", self.path, error)


def _is_tied_head(name: str, weights: dict[str, Weight]) -> bool:
    return name == "head" and weights[name] is weights["embedding"]
