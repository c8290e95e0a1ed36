"""The GPU set: kernels in Triton, for NVIDIA GPUs from compute capability 8.0 on.

How promise 1 is kept: no kernel's order of additions depends on how many rows it is given, or on where a row stands
among them; each module says how. Without a GPU the same kernels run in `pronk.kernels.interpreter`, on CPU tensors.
"""

from __future__ import annotations
