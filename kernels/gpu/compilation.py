"""One specialisation of a kernel, as a run uses it: what `aot` compiles ahead of time and holds to its budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Types = Mapping[str, str]
"""Parameter -> its type, as Triton spells it: "*bf16", "*fp8e4nv", "*i64", "i32", "fp32"."""


@dataclass(frozen=True)
class Compilation:
    """Each kernel module has a list of these, COMPILATIONS: what the 1B, the 3B and the 8B run, and no more."""

    name: str
    """Unlike any other of all modules: "decode-1b-p16-bf16"."""
    kernel: Any
    """The `@triton.jit` function."""
    signature: Types
    """Every parameter that is no constexpr. Pointers count as divisible by 16, as torch's allocations are."""
    constants: Mapping[str, Any]
    """Every constexpr."""
    num_warps: int = 4
    num_stages: int = 3
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further options of the launch. enable_fp_fusion always: whether the compiler may fuse a product with a sum, which
    Triton decides otherwise from version to version, changes bits."""
    divisible: tuple[str, ...] = ()
    """Integers of the signature that are multiples of 16 at run time: strides and widths."""
    targets: tuple[int, ...] = (80, 90, 100)
    """Compute capabilities that have it: float8 conversions begin with 89."""
    expects_wide_loads: bool = True
    """Whether it must read memory 16 bytes at a time."""
    expects_tensor_cores: bool = False
    """Whether it must multiply on tensor cores."""
    allowed_spills: int = 0
    """Bytes of registers that may go to memory, with the reason in a comment where it is not 0."""
