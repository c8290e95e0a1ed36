"""Loading takes the weights once: no copy of the model beside them, neither for a moment nor for good.

Each case loads in a process of its own, whose memory nothing else has used.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from pronk.engine import footprint
from pronk.engine.weights.dummy import DummyCheckpoint

MIB = 1 << 20
SHAPE = {
    "hidden_size": 1024,
    "head_dim": 64,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "intermediate_size": 4096,
    "num_hidden_layers": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "dtype": "bfloat16",
}
"""310 MB in bfloat16; a fifth of that is the embedding, which is also the head."""
EMBEDDING = 32000 * 1024 * 2
SLACK = 24 * MIB
"""Compiled kernels, parts of libraries that had not been used, and what the heap keeps of small things. Two of it are
less than an embedding."""

LOAD = """
import json, re, sys
from pathlib import Path
import torch
from pronk.engine import footprint
from pronk.engine.config import CacheConfig, EngineConfig
from pronk.engine.runner import load_runner

def status(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

folder, quantization, kept = sys.argv[1:]
config = EngineConfig(
    model=folder, device="cpu", cpu_threads=2, quantization=quantization, weights_cache=kept,
    cache=CacheConfig(memory="64MiB"),
)
before = status("VmRSS")
runner = load_runner(config, Path(folder), lambda done, total: None)
peak, weights = status("VmHWM"), runner.model.nbytes
runtime = footprint.runtime_bytes(weights)
with torch.inference_mode():
    for layer in runner.cache.layers:
        layer.keys.fill_(1)
        layer.values.fill_(1)
total = weights + runner.cache.nbytes + runtime
while kept != "off" and runner.prepare():
    pass
print(json.dumps(dict(before=before, peak=peak, weights=weights, total=total, filled=status("VmRSS"),
                      mapped=kept != "off" and runner.keeping is None)))
"""

needs_status = pytest.mark.skipif(not footprint.STATUS.exists(), reason="asks Linux how much memory is resident")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Any) -> Path:
    folder = tmp_path_factory.mktemp("large")
    (folder / "config.json").write_text(json.dumps(tiny_llama("1b", **SHAPE)))
    save_file(dict(DummyCheckpoint.open(folder, seed=1).tensors()), folder / "model.safetensors")
    return folder


def loaded(checkpoint: Path, quantization: str, kept: str) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(checkpoint), quantization, kept], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, int] = json.loads(done.stdout)
    return found


@needs_status
@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_weights_are_in_memory_once(checkpoint: Path, quantization: str) -> None:
    # Twice: the first may have to compile kernels, and the compiler stays in its memory.
    for _ in range(2):
        found = loaded(checkpoint, quantization, "off")
    file = (checkpoint / "model.safetensors").stat().st_size
    assert found["weights"] < (1.1 if quantization == "none" else 0.8) * file
    # While it loads there is, beside what has been laid out, one tensor of the file.
    assert found["peak"] - found["before"] < found["weights"] + EMBEDDING + SLACK
    assert found["filled"] - found["before"] < found["weights"] + 64 * MIB + 2 * SLACK
    assert found["total"] == pytest.approx(found["filled"], rel=0.05)


@needs_status
def test_mapped_weights_count_as_weights(checkpoint: Path, tmp_path: Path) -> None:
    """All of them from the start, though they have not been read."""
    loaded(checkpoint, "int8", str(tmp_path))
    found = loaded(checkpoint, "int8", str(tmp_path))
    assert found["mapped"]
    assert found["peak"] - found["before"] < found["weights"] + SLACK
    assert found["total"] == pytest.approx(found["filled"], rel=0.05)


@needs_status
def test_what_is_resident_beside_the_weights() -> None:
    everything = footprint.runtime_bytes(0)
    assert everything is not None
    assert everything > 50 * MIB
    less = footprint.runtime_bytes(20 * MIB)
    assert less is not None
    assert abs(everything - less - 20 * MIB) < MIB
    assert footprint.runtime_bytes(1 << 60) == 0


def test_a_system_that_does_not_tell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(footprint, "STATUS", tmp_path / "status")
    assert footprint.runtime_bytes(0) is None
    (tmp_path / "status").write_text("Name:\tpython\nVmRSS:\t  1000 kB\n")
    assert footprint.runtime_bytes(0) is None
    (tmp_path / "status").write_text("VmRSS:\t 1000 kB\nRssAnon:\t  600 kB\nRssFile:\t 100 kB\nRssShmem:\t 300 kB\n")
    assert footprint.runtime_bytes(200 * 1024) == 500 * 1024
