"""Tensors in, tensors out. Knows nothing of requests. `for_device` is the only dispatch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pronk.kernels.interface import Kernels


def for_device(device: str) -> Kernels:
    """device: "cpu" or "cuda". Raises ValueError for anything else.

    On a GPU the plain definitions run for now: right, and slow. The Triton set takes this place.
    """
    if device == "cpu":
        from pronk.kernels import cpu

        return cpu
    if device == "cuda":
        from pronk.kernels import reference

        return reference
    raise ValueError(f"no kernels for the device {device!r}: choose cpu or cuda")
