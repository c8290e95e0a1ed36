"""How many threads: of processors, control groups and files as they are found on other machines."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pronk.kernels.cpu import cores


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight logical processors on four cores; no control group."""
    monkeypatch.setattr(cores, "SYSTEM", tmp_path / "sys")
    monkeypatch.setattr(cores, "PROCESS", tmp_path / "proc")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    for number in range(8):
        write(tmp_path / f"sys/devices/system/cpu/cpu{number}/topology/physical_package_id", "0\n")
        write(tmp_path / f"sys/devices/system/cpu/cpu{number}/topology/core_id", f"{number % 4}\n")
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_two_threads_of_a_core_are_one(machine: Path) -> None:
    assert cores.usable_cores() == 4
    assert cores.default_threads() == 3


def test_only_processors_that_the_process_may_run_on(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 4, 1}, raising=False)
    assert cores.usable_cores() == cores.default_threads() == 2


def test_a_machine_that_does_not_say(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "SYSTEM", machine / "nothing")
    assert cores.usable_cores() == 8


@pytest.mark.parametrize(
    ("quota", "found"),
    [("max 100000", 4), ("250000 100000", 2), ("50000 100000", 1), ("900000 100000", 4), ("nonsense", 4)],
)
def test_the_quota_of_a_container(machine: Path, quota: str, found: int) -> None:
    write(machine / "proc/cgroup", "0::/\n")
    write(machine / "sys/fs/cgroup/cpu.max", quota)
    assert cores.usable_cores() == found


def test_the_least_quota_on_the_way_to_the_root(machine: Path) -> None:
    write(machine / "proc/cgroup", "0::/slice/service\n")
    write(machine / "sys/fs/cgroup/slice/service/cpu.max", "300000 100000")
    write(machine / "sys/fs/cgroup/slice/cpu.max", "200000 100000")
    assert cores.usable_cores() == 2


@pytest.mark.parametrize(("quota", "found"), [(-1, 4), (150000, 1), (300000, 3)])
def test_control_groups_of_the_first_version(machine: Path, quota: int, found: int) -> None:
    write(machine / "proc/cgroup", "12:memory:/docker/a\n4:cpu,cpuacct:/docker/a\n")
    write(machine / "sys/fs/cgroup/cpu/cpu.cfs_quota_us", f"{quota}\n")
    write(machine / "sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n")
    assert cores.usable_cores() == found


def test_this_machine_has_a_core() -> None:
    assert 1 <= cores.default_threads() <= (os.cpu_count() or 1)
