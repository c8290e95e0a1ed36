"""A model mapped from what an earlier start has kept is the model that was packed, and only of the same checkpoint."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from pronk.engine import shelf
from pronk.engine.config import EngineConfig, replace
from pronk.engine.core import EngineCore
from pronk.engine.request import Request, SamplingParams
from pronk.engine.runner import ModelRunner, load_runner
from pronk.engine.shelf import shelf_for
from pronk.engine.tokenizer import load_vocabulary
from pronk.kernels.cpu import CpuKernels

SMALL = {"hidden_size": 64, "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_llama: Any, write_checkpoint: Any) -> Path:
    return write_checkpoint(tmp_path / "small", tiny_llama("1b", **SMALL), dtype="bfloat16")


def load(checkpoint: Path, folder: str | None, **changes: Any) -> ModelRunner:
    config = EngineConfig(model=str(checkpoint), device="cpu", cpu_threads=1, weights_cache=folder, max_model_len=256)
    return load_runner(replace(config, memory="1MiB", **changes), checkpoint, lambda done, total: None)


def keep(runner: ModelRunner) -> Path:
    """-> the file, once nothing is left to prepare."""
    while runner.prepare():
        pass
    for thread in threading.enumerate():
        if thread.name == "settle":
            thread.join()
    assert runner.shelf is not None
    return runner.shelf.path


def is_mapped(runner: ModelRunner) -> bool:
    return runner.shelf is not None and runner.keeping is None


def answer(checkpoint: Path, runner: ModelRunner) -> tuple[list[int], list[float]]:
    """Tokens and their log probabilities."""
    core = EngineCore(EngineConfig(), runner, load_vocabulary(checkpoint))
    params = SamplingParams(max_tokens=8, temperature=0.0, logprobs=1, ignore_eos=True)
    core.add(Request(request_id="a", prompt=list(range(40)), params=params))
    outputs = [output for _ in range(8) for output in core.step()]
    return (
        [token for output in outputs for token in output.token_ids],
        [each.logprob for output in outputs for each in output.logprobs or ()],
    )


@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("like", ["1b", "8b"], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_next_start_maps_what_this_one_has_packed(
    tmp_path: Path, tiny_llama: Any, write_checkpoint: Any, like: str, dtype: str, quantization: str
) -> None:
    checkpoint = write_checkpoint(tmp_path / "small", tiny_llama(like, **SMALL), dtype=dtype)
    folder = str(tmp_path / "a" / "folder")
    first = load(checkpoint, folder, quantization=quantization)
    assert not is_mapped(first)
    assert keep(first).is_file()
    second = load(checkpoint, folder, quantization=quantization)
    assert is_mapped(second)
    assert second.model.nbytes == first.model.nbytes
    tokens, logprobs = answer(checkpoint, second)
    assert len(tokens) == len(logprobs) == 8
    assert (tokens, logprobs) == answer(checkpoint, first)
    assert (tokens, logprobs) == answer(checkpoint, load(checkpoint, "off", quantization=quantization))


def test_each_way_to_pack_has_its_place(checkpoint: Path, tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [{}, {"quantization": "int8"}, {"dtype": "float32"}]
    paths = {keep(load(checkpoint, str(tmp_path / "kept"), **each)) for each in changes}
    assert len(paths) == 3
    assert sorted(paths) == sorted((tmp_path / "kept").iterdir())
    assert all(path.name.startswith("small-") for path in paths)
    assert all(is_mapped(load(checkpoint, str(tmp_path / "kept"), **each)) for each in changes)


def rewritten(checkpoint: Path) -> None:
    """Other weights, of the same names and shapes."""
    file = checkpoint / "model.safetensors"
    tensors = {name: tensor * 2 for name, tensor in load_file(file).items()}
    save_file(tensors, file)


def touched(checkpoint: Path) -> None:
    os.utime(checkpoint / "config.json", ns=(1, 1))


@pytest.mark.parametrize("change", [rewritten, touched])
def test_another_checkpoint_in_the_same_folder_is_packed_anew(
    checkpoint: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    path = keep(load(checkpoint, str(tmp_path / "kept")))
    change(checkpoint)
    runner = load(checkpoint, str(tmp_path / "kept"))
    assert not is_mapped(runner)
    assert answer(checkpoint, runner) == answer(checkpoint, load(checkpoint, "off"))
    assert keep(runner) == path  # in the place of the old one
    assert list((tmp_path / "kept").iterdir()) == [path]
    assert is_mapped(load(checkpoint, str(tmp_path / "kept")))


def test_other_code_packs_anew(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(load(checkpoint, str(tmp_path / "kept")))
    source = tmp_path / "source.py"
    source.write_text("another way to lay weights out")
    monkeypatch.setattr(shelf, "SOURCES", [*shelf.SOURCES, source])
    assert not is_mapped(load(checkpoint, str(tmp_path / "kept")))
    monkeypatch.undo()
    assert is_mapped(load(checkpoint, str(tmp_path / "kept")))
    monkeypatch.setattr(CpuKernels, "layout", "of another machine")
    assert not is_mapped(load(checkpoint, str(tmp_path / "kept")))


def test_a_damaged_file_is_packed_anew(checkpoint: Path, tmp_path: Path) -> None:
    path = keep(load(checkpoint, str(tmp_path / "kept")))
    path.write_bytes(path.read_bytes()[:-1])
    assert not is_mapped(load(checkpoint, str(tmp_path / "kept")))


def test_a_disk_without_room_costs_nothing_but_time(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usage = shutil.disk_usage(tmp_path)
    usage = usage._replace(free=int(shelf.SPARE * usage.total))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    runner = load(checkpoint, str(tmp_path / "kept"))
    assert not keep(runner).exists()
    assert "to spare" in caplog.text
    assert answer(checkpoint, runner)[0]


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    runner = load(checkpoint, str(tmp_path / "file"))
    keep(runner)
    assert "packed weights are not kept" in caplog.text
    assert answer(checkpoint, runner)[0]


def test_small_models_are_not_kept_unasked(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRONK_CACHE", str(tmp_path / "cache"))
    kernels = CpuKernels(1)
    places = {
        size: shelf_for(None, checkpoint, kernels, variant="", num_bytes=size)
        for size in (shelf.SMALLEST - 1, shelf.SMALLEST)
    }
    assert places[shelf.SMALLEST - 1] is None
    found = places[shelf.SMALLEST]
    assert found is not None
    assert found.path.parent == tmp_path / "cache" / "weights"
    assert load(checkpoint, None).shelf is None
    assert load(checkpoint, "off").shelf is None
    assert load(checkpoint, str(tmp_path / "kept"), load_format="dummy").shelf is None
