"""Which devices and formats the GPU kernels run on, and the errors for all others."""

from __future__ import annotations

import subprocess

import torch
import triton

from pronk.kernels import interpreter

OLDEST_CAPABILITY = (8, 0)
"""Ampere: the first with bfloat16 on tensor cores and loads that pass by the registers."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check_device() -> None:
    """Raises ValueError unless torch's current device can run the kernels. In the interpreter any can."""
    if interpreter.installed():
        return
    if not torch.cuda.is_available() or torch.version.hip is not None:
        raise ValueError("the GPU kernels need an NVIDIA GPU that torch sees: check its driver, or choose --device cpu")
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) < OLDEST_CAPABILITY:
        raise ValueError(
            f"{torch.cuda.get_device_name()} has compute capability {major}.{minor}, and the GPU kernels need "
            f"{OLDEST_CAPABILITY[0]}.{OLDEST_CAPABILITY[1]} (Ampere) or newer: choose --device cpu"
        )
    try:
        start_driver()
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        raise ValueError(
            f"Triton cannot reach the GPU ({error}): for that it compiles a few lines of C, with a C compiler and "
            "Python's headers (on Debian and Ubuntu: apt install gcc libc6-dev python3-dev), or choose --device cpu"
        ) from error


def start_driver() -> None:
    """Have Triton compile and load what it launches kernels with: else the first request would find it missing."""
    triton.runtime.driver.active.get_current_device()


def check_dtype(dtype: torch.dtype) -> None:
    """Raises ValueError for activations that the kernels do not take."""
    if dtype not in DTYPES:
        names = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
        raise ValueError(f"the GPU kernels have no {str(dtype).removeprefix('torch.')}: choose --dtype {names}")


def describe(dtype: torch.dtype) -> str:
    """See `Kernels.describe`. Raises ValueError for a dtype that the kernels do not take."""
    check_dtype(dtype)
    if interpreter.installed():
        where = "interpreted on the CPU"
    else:
        major, minor = torch.cuda.get_device_capability()
        where = f"{torch.cuda.get_device_name()}, sm_{major}{minor}"
    return f"Triton {triton.__version__}, {where}, {str(dtype).removeprefix('torch.')}"
