"""Tensors in, tensors out. Knows nothing of requests. `for_device` is the only dispatch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pronk.kernels.interface import Kernels


def for_device(device: str, *, vendor_products: bool = False, num_threads: int | None = None) -> Kernels:
    """device: "cpu" or "cuda". vendor_products: see `gpu.vendor`, which says what that breaks. num_threads: of a CPU;
    None: as many as `cpu.cores` finds.

    Raises ValueError for a device that there is no set for, or that the set does not run on; ImportError where Triton
    is missing.
    """
    if device == "cpu" and not vendor_products:
        from pronk.kernels.cpu import CpuKernels
        from pronk.kernels.cpu.cores import default_threads

        return CpuKernels(num_threads or default_threads())
    if device == "cuda":
        from pronk.kernels import gpu
        from pronk.kernels.gpu import vendor

        gpu.check_device()
        return vendor if vendor_products else gpu
    if device == "cpu":
        raise ValueError("the CPU kernels have no vendor's products: they are for --device cuda")
    raise ValueError(f"no kernels for the device {device!r}: choose cpu or cuda")
