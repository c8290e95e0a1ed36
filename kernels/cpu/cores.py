"""How many threads this process may well use: its physical cores, as far as the system gives it their time."""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path

SYSTEM = Path("/sys")
PROCESS = Path("/proc/self")


def default_threads() -> int:
    """The cores, but for one that is left to the process that serves HTTP where there are more than two."""
    cores = usable_cores()
    return cores - 1 if cores > 2 else cores


def usable_cores() -> int:
    """Physical cores that this process may run on, and no more than its control groups' share of time."""
    logical = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    return max(1, int(min(_physical(logical), _share_of_time())))


def _physical(logical: set[int]) -> int:
    """Two threads of a core have its units to share, and read memory no faster than one."""
    found = set()
    for number in logical:
        topology = SYSTEM / "devices" / "system" / "cpu" / f"cpu{number}" / "topology"
        try:
            package, core = ((topology / name).read_text() for name in ("physical_package_id", "core_id"))
        except OSError:
            return len(logical)
        found.add((package, core))
    return len(found)


def _share_of_time() -> float:
    """In cores: the least of the control groups that the process is in (cpu.max of version 2, cpu.cfs_quota_us of
    version 1). Infinite where there is no limit."""
    shares = [math.inf]
    for folder in _control_groups():
        with contextlib.suppress(OSError, ValueError):
            quota, period = (folder / "cpu.max").read_text().split()
            shares.append(int(quota) / int(period))
        with contextlib.suppress(OSError, ValueError):
            old_quota = int((folder / "cpu.cfs_quota_us").read_text())
            if old_quota > 0:
                shares.append(old_quota / int((folder / "cpu.cfs_period_us").read_text()))
    return min(shares)


def _control_groups() -> list[Path]:
    """From the process's own to the root; in a container its own is the root."""
    try:
        lines = (PROCESS / "cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = SYSTEM / "fs" / "cgroup" / ("cpu" if controllers else "")
        own = Path(path.lstrip("/"))
        found += [root / parent for parent in (own, *own.parents)]
    return found
