"""`bench/gpu.py` runs on a machine that none of us has at hand, and not often: here every line of it runs, tiny."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[3] / "bench" / "gpu.py"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to run it in earnest")
def test_the_benchmark_runs_through(compiling: dict[str, str], tmp_path: Path) -> None:
    """In a process of its own, as it is started by hand."""
    command = [sys.executable, str(BENCH), "--dry-run", "--out", str(tmp_path)]
    run = subprocess.run(command, env=compiling, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    (table,) = tmp_path.glob("*.md")
    held = re.search(r"^(\d+) of (\d+) checks hold", table.read_text(), re.MULTILINE)
    assert held is not None
    assert int(held[1]) == int(held[2]) > 40
    for group in ("step", "sampler", "decode attention", "prefill attention", "product", "step with torch's products"):
        assert f"| {group}: " in table.read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(compiling: dict[str, str]) -> None:
    run = subprocess.run([sys.executable, str(BENCH)], env=compiling, capture_output=True, text=True, timeout=120)
    assert run.returncode == 2
    assert "--dry-run" in run.stderr
