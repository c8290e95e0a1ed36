"""Where a benchmark of the GPU kernels runs: on a GPU, or, to see that every line of it works, on a CPU.

Knows how to time and to capture; not what.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

Run = Callable[[], object]


class Device(Protocol):
    """A place to run."""

    name: str
    where: torch.device
    is_dry: bool
    """Nothing is measured: sizes are tiny, and times mean nothing."""

    def seconds(self, calls: Sequence[Run]) -> float:
        """The median time of one call. calls: alike, each on data of its own, so that caches find nothing."""

    def graph(self, run: Run) -> Run:
        """-> what launches `run` again, captured where there are graphs."""

    def synchronize(self) -> None: ...


class Cuda:
    """A GPU. Calls are captured in a graph one after the other and replayed, so that no launch by the host is timed."""

    is_dry = False

    def __init__(self) -> None:
        self.where = torch.device("cuda")
        properties = torch.cuda.get_device_properties(self.where)
        self.name = f"{properties.name}, {properties.multi_processor_count} SMs"
        self.l2_bytes = int(getattr(properties, "L2_cache_size", 64 << 20))

    def graph(self, run: Run) -> Run:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            run()
        return captured.replay

    def seconds(self, calls: Sequence[Run]) -> float:
        def all_of_them() -> None:
            for call in calls:
                call()

        replay = self.graph(all_of_them)
        replay()
        self.synchronize()
        once = self._timed(replay)
        # Long enough to be measured well, short enough for hundreds of rows.
        repeats = min(50, max(5, math.ceil(0.02 / max(once, 1e-6))))
        return statistics.median(self._timed(replay) for _ in range(repeats)) / len(calls)

    def _timed(self, run: Run) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000

    def synchronize(self) -> None:
        torch.cuda.synchronize()


class Dry:
    """A CPU, with Triton's interpreter: everything runs once."""

    is_dry = True
    name = "no GPU: a dry run, whose times mean nothing"
    l2_bytes = 1 << 10

    def __init__(self) -> None:
        self.where = torch.device("cpu")

    def graph(self, run: Run) -> Run:
        return run

    def seconds(self, calls: Sequence[Run]) -> float:
        begin = time.perf_counter()
        for call in calls[:1]:
            call()
        return time.perf_counter() - begin

    def synchronize(self) -> None:
        return


def copies_for(device: Any, nbytes: int, most: int = 64) -> int:
    """How many times data of this size is to be there, so that going through all of them leaves nothing in the L2
    cache for the next turn."""
    if device.is_dry:
        return 1
    return max(1, min(most, math.ceil(4 * device.l2_bytes / max(nbytes, 1))))
