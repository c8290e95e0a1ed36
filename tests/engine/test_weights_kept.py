"""Kept tensors come back to the bit, from a file that safetensors reads too; what is not whole is not there."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from pronk.engine.weights import kept
from pronk.engine.weights.kept import Kept

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.int32]


def settled() -> None:
    for thread in threading.enumerate():
        if thread.name == "settle":
            thread.join()


def silent(done: int, total: int) -> None:
    del done, total


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randint(-100, 100, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def written(path: Path, tensors: dict[str, Tensor], key: str = "key") -> None:
    for _ in kept.write(path, Kept(key, "notes", tensors)):
        assert kept.read(path, key, silent) is None  # not before it is whole
    settled()


SHAPES = st.lists(st.integers(0, 40), min_size=1, max_size=3).map(tuple)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(SHAPES, st.sampled_from(DTYPES)), max_size=8))
def test_tensors_come_back(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[tuple[tuple[int, ...], torch.dtype]]
) -> None:
    path = tmp_path_factory.mktemp("kept") / "model.safetensors"
    tensors = {f"t{number}": random_tensor(*each, seed=number) for number, each in enumerate(drawn)}
    written(path, tensors)
    found = kept.read(path, "key", silent)
    assert found is not None
    assert found.notes == "notes"
    assert sorted(found.tensors) == sorted(tensors)
    with safe_open(path, framework="pt") as theirs:
        for name, tensor in tensors.items():
            for each in (found.tensors[name], theirs.get_tensor(name)):
                assert each.dtype == tensor.dtype
                assert torch.equal(each, tensor)


def test_no_large_tensor_starts_between_two_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "PIECE", 3000)  # and what is written in pieces is what is written at once
    shapes = {"a": (3,), "b": (64, 9), "c": (5, 5), "d": (128, 2)}
    tensors = {name: random_tensor(shape, torch.int8, seed=1) for name, shape in shapes.items()}
    written(tmp_path / "model", tensors)
    found = kept.read(tmp_path / "model", "key", silent)
    assert found is not None
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in tensors.items())
    assert [found.tensors[name].data_ptr() % kept.LINE for name in "bd"] == [0, 0]


def test_what_was_made_of_something_else_is_not_read(tmp_path: Path) -> None:
    written(tmp_path / "model", {"a": torch.ones(4)}, key="other")
    assert kept.read(tmp_path / "model", "key", silent) is None
    assert kept.read(tmp_path / "nothing", "key", silent) is None
    assert kept.read(tmp_path, "key", silent) is None


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_damaged_file_is_not_there_or_is_whole(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("kept") / "model"
    written(path, {"a": torch.ones(40), "b": torch.ones(3, dtype=torch.int8)})
    content = bytearray(path.read_bytes())
    header = 8 + content.index(b"}}", 8)
    if data.draw(st.booleans(), label="cut"):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
        path.write_bytes(content)
        assert kept.read(path, "key", silent) is None
        return
    content[data.draw(st.integers(0, header), label="place")] = data.draw(st.integers(0, 255), label="byte")
    path.write_bytes(content)
    found = kept.read(path, "key", silent)  # names and notes may be others; nothing may be outside the file
    if found is not None:
        assert sum(tensor.nbytes for tensor in found.tensors.values()) == 163


def test_pages_are_found_before_the_model_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "STRETCH", 2 * mmap.PAGESIZE)
    written(tmp_path / "model", {"a": torch.ones(3 * mmap.PAGESIZE, dtype=torch.int8)})
    size = (tmp_path / "model").stat().st_size
    seen: list[tuple[int, int]] = []
    assert kept.read(tmp_path / "model", "key", lambda done, total: seen.append((done, total))) is not None
    assert seen == [(0, size), (2 * mmap.PAGESIZE, size), (size, size)]


def test_who_stops_in_between_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "PIECE", 4096)
    content = Kept("key", "", {"a": torch.ones(10000)})
    writing = kept.write(tmp_path / "model", content)
    next(writing)
    assert len(list(tmp_path.iterdir())) == 1
    writing.close()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    rests = [tmp_path / "a[b].abc.part", tmp_path / "a[b].of-another-start.unsettled"]
    others = [tmp_path / "b.abc.part", tmp_path / "a[b]-c.def.part"]
    for each in (*rests, *others):
        each.write_bytes(b"half of a model")
    written(tmp_path / "a[b].safetensors", {"a": torch.ones(4)})
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "a[b].safetensors", *others])


def test_who_has_the_file_mapped_keeps_what_it_has(tmp_path: Path) -> None:
    path = tmp_path / "model"
    written(path, {"a": torch.ones(4)})
    found = kept.read(path, "key", silent)
    written(path, {"a": torch.zeros(4)}, key="newer")
    assert found is not None
    assert found.tensors["a"].tolist() == [1.0] * 4


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[threading.Event]:
    """Has what it was given once the event is set. -> the event. The machine's start is called "one"."""
    arrived = threading.Event()
    sync = os.fsync

    def wait(descriptor: int) -> None:
        arrived.wait()
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", wait)
    monkeypatch.setattr(kept, "BOOT_ID", tmp_path / "boot_id")
    kept.BOOT_ID.write_text("one\n")
    yield arrived
    arrived.set()
    settled()


def test_nobody_waits_for_the_disk(tmp_path: Path, slow_disk: threading.Event) -> None:
    path = tmp_path / "model.safetensors"
    for _ in kept.write(path, Kept("key", "", {"a": torch.ones(4)})):
        pass
    assert not path.exists()
    assert kept.read(path, "key", silent) is not None
    slow_disk.set()
    settled()
    assert path.exists()
    assert sorted(tmp_path.iterdir()) == sorted([path, kept.BOOT_ID])
    assert kept.read(path, "key", silent) is not None


def test_what_the_disk_may_not_have_had_at_a_power_cut_is_not_read(tmp_path: Path, slow_disk: threading.Event) -> None:
    path = tmp_path / "model.safetensors"
    for _ in kept.write(path, Kept("key", "", {"a": torch.ones(4)})):
        pass
    kept.BOOT_ID.write_text("two\n")
    assert kept.read(path, "key", silent) is None


def test_a_later_process_settles_what_an_earlier_one_did_not(tmp_path: Path, slow_disk: threading.Event) -> None:
    slow_disk.set()
    path = tmp_path / "model.safetensors"
    written(path, {"a": torch.ones(4)})
    path.rename(tmp_path / "model.one.unsettled")  # as if the process had ended before
    assert kept.read(path, "key", silent) is not None
    settled()
    assert path.exists()


def test_where_starts_have_no_names_the_disk_comes_first(
    tmp_path: Path, slow_disk: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_disk.set()
    monkeypatch.setattr(kept, "BOOT_ID", tmp_path / "nothing")
    written(tmp_path / "model", {"a": torch.ones(4)})
    assert kept.read(tmp_path / "model", "key", silent) is not None
