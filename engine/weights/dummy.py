"""Random weights in the shape of a model, for benchmarks only: no answer of such a model means anything.

It reads the config and no weights. Each tensor is a block of normal numbers repeated until it is full, which is fast
and leaves the numbers' spread as in a real model.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pronk.engine.model.config import LlamaConfig
from pronk.engine.weights.cut import Cut, Cuts, shape_of, whole
from pronk.engine.weights.names import Shape, expected_tensors

STANDARD_DEVIATION = 0.02  # the family's initializer_range

# A prime, so that no two rows of a tensor are the same until the block has been shifted through all its places.
BLOCK = 1_048_583


@dataclass(frozen=True)
class DummyCheckpoint:
    """See `checkpoint.Checkpoint`. The same seed gives the same weights, whatever order they are made in."""

    folder: Path
    config: LlamaConfig
    seed: int

    @classmethod
    def open(cls, folder: Path, seed: int) -> DummyCheckpoint:
        """Raises CheckpointError when the folder holds no config that is served."""
        return cls(folder, LlamaConfig.from_folder(folder), seed)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.config.dtype)
        return dtype

    def num_bytes(self, cut: Cuts = whole) -> int:
        shapes = expected_tensors(self.config).items()
        return sum(math.prod(shape_of(shape, cut(name))) for name, shape in shapes) * self.dtype.itemsize

    def tensors(self, cut: Cuts = whole) -> Iterator[tuple[str, Tensor]]:
        for name, shape in expected_tensors(self.config).items():
            yield name, self._part(name, shape, cut(name))

    def _part(self, name: str, shape: Shape, cut: Cut | None) -> Tensor:
        """Made whole, so that its numbers are the same however the model is split, and given up but for the part."""
        tensor = self._make(name, shape)
        return tensor if cut is None else cut.of(tensor).clone(memory_format=torch.contiguous_format)

    def _make(self, name: str, shape: Shape) -> Tensor:
        if "norm" in name:
            return torch.ones(shape, dtype=self.dtype)
        tensor = torch.empty(shape, dtype=self.dtype)
        flat = tensor.view(-1)
        generator = torch.Generator().manual_seed(tensor_seed(self.seed, name))
        block = torch.randn(min(BLOCK, flat.numel()), generator=generator).mul_(STANDARD_DEVIATION).to(self.dtype)
        whole = flat.numel() // block.numel() * block.numel()
        flat[:whole].view(-1, block.numel()).copy_(block)
        flat[whole:] = block[: flat.numel() - whole]
        return tensor


def tensor_seed(seed: int, name: str) -> int:
    """A seed of its own for every tensor: 63 bits of a hash of both."""
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
