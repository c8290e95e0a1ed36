"""Every specialisation of every kernel, compiled for each of its targets and held to the recorded budget. No GPU.

All in one process of its own, since in this one kernels may be interpreted; Triton's cache is pytest's, so that the
next run compiles only what has changed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from typing import Any

import pytest

from pronk.kernels.gpu import aot
from pronk.kernels.gpu.compilation import Compilation

COMPILATIONS = aot.compilations()
CASES = [pytest.param(item, target, id=f"{item.name}-sm_{target}") for item in COMPILATIONS for target in item.targets]


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest, compiling: dict[str, str]) -> dict[str, Any]:
    """What `python -m pronk.kernels.gpu.aot --json` says."""
    cache = request.config.cache.mkdir("triton")
    run = subprocess.run(
        [sys.executable, "-m", "pronk.kernels.gpu.aot", "--json"],
        env=compiling | {"TRITON_CACHE_DIR": str(cache)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=1800,
    )
    result: dict[str, Any] = json.loads(run.stdout)
    return result


@pytest.mark.parametrize(("item", "target"), CASES)
def test_a_compilation_keeps_its_budget(compiled: dict[str, Any], item: Compilation, target: int) -> None:
    """With a version of Triton that no budget is recorded for, registers and shared memory go unjudged."""
    own = f"{item.name} for sm_{target} "
    assert not [failure for failure in compiled["failures"] if failure.startswith(own)]
    rows = [row for row in compiled["measurements"] if (row["name"], row["target"]) == (item.name, target)]
    assert len(rows) == 1
    budget = aot.load_budget().get(compiled["triton"])
    assert aot.faults(item, aot.Measurement(**rows[0]), budget) == []


def test_a_budget_holds_what_there_is() -> None:
    """Nothing that is gone, in no version of Triton, and the version that runs on the reference GPU is among them."""
    names = {(item.name, target) for item in COMPILATIONS for target in item.targets}
    budgets = aot.load_budget()
    assert "3.6.0" in budgets
    for version, budget in budgets.items():
        assert budget.keys() <= names, f"of Triton {version}: python -m pronk.kernels.gpu.aot --record"


def test_every_kernel_is_compiled() -> None:
    """What is launched, by its decorator and its name, is in some COMPILATIONS."""
    compiled = {item.kernel for item in COMPILATIONS}
    for module in {sys.modules[kernel.__module__] for kernel in compiled}:
        for name, member in vars(module).items():
            if name.endswith("_kernel") and getattr(member, "__module__", None) == module.__name__:
                assert member in compiled, f"{module.__name__}.{name}"


@pytest.mark.parametrize("item", COMPILATIONS, ids=lambda item: item.name)
def test_fusion_is_not_left_to_triton(item: Compilation) -> None:
    """Versions of Triton differ in what they do unasked, and bits with them."""
    assert "enable_fp_fusion" in item.options


GOOD = aot.Measurement("some", 90, 100, 1000, 0, 3, 5, 0)
ITEM = Compilation("some", kernel=None, signature={}, constants={}, expects_tensor_cores=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"registers": 111}, "needs 111 registers, 100 are recorded"),
        ({"shared_bytes": 1101}, "needs 1101 shared bytes"),
        ({"shared_bytes": 2**18}, "at most 232448"),
        ({"spilled_bytes": 8, "local_instructions": 2}, "spills 8 bytes"),
        ({"wide_loads": 0}, "no 16-byte load"),
        ({"tensor_core_instructions": 0}, "no tensor cores"),
        ({"target": 80}, "not in the budget"),
    ],
)
def test_a_broken_budget_is_named(changes: dict[str, int], message: str) -> None:
    recorded = replace(GOOD, shared_bytes=2**18) if changes.get("shared_bytes") == 2**18 else GOOD
    budget = {("some", 90): asdict(recorded)}
    assert aot.faults(ITEM, GOOD, budget) == []
    assert aot.faults(ITEM, replace(GOOD, registers=110, shared_bytes=1100), budget) == []
    found = aot.faults(ITEM, replace(GOOD, **changes), budget)
    assert len(found) == 1
    assert message in found[0]
