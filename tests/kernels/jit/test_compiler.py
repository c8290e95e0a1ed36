"""What is compiled is kept, and found again only by the same source on the same machine; a bad file is no file."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
from llvmlite import ir

from pronk.kernels.jit import compiler
from pronk.kernels.jit.compiler import Library, cache_folder, load
from pronk.kernels.jit.emit import I64, Function


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(compiler.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


class Writer:
    """Writes a function that adds a number, and counts how often."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.times = 0

    def __call__(self) -> ir.Module:
        self.times += 1
        module = ir.Module("adder")
        with Function(module, "add", ["place"]) as f:
            place = f.argument("place")
            f.store(f.load(place, I64) + self.number, place)
        return module


def called(library: Library) -> int:
    place = ctypes.c_int64(10)
    ctypes.CFUNCTYPE(None, ctypes.c_int64)(library.address("add"))(ctypes.addressof(place))
    return place.value


def test_the_second_time_nothing_is_compiled(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "source.py"
    source.write_text("one")
    write = Writer(1)
    for _ in range(3):
        assert called(load("adder", [source], "", write)) == 11
    assert write.times == 1
    assert [path.suffix for path in folder.iterdir()] == [".o"]


def test_another_source_or_parameter_is_another_library(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "source.py"
    source.write_text("one")
    assert called(load("adder", [source], "", Writer(1))) == 11
    assert called(load("adder", [source], "x", Writer(2))) == 12
    source.write_text("two")
    assert called(load("adder", [source], "", Writer(3))) == 13
    assert len(list(folder.iterdir())) == 3


@pytest.mark.parametrize("damage", [b"", b"x" * 31, b"x" * 5000])
def test_a_damaged_file_is_made_anew(folder: Path, damage: bytes) -> None:
    load("adder", [], "", Writer(1))
    (path,) = folder.iterdir()
    path.write_bytes(damage)
    write = Writer(1)
    assert called(load("adder", [], "", write)) == 11
    assert write.times == 1
    assert called(load("adder", [], "", write)) == 11
    assert write.times == 1


def test_a_folder_that_cannot_be_written_to_costs_time_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv(compiler.CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    write = Writer(1)
    assert called(load("adder", [], "", write)) == called(load("adder", [], "", write)) == 11
    assert write.times == 2


def test_a_function_that_is_not_there(folder: Path) -> None:
    with pytest.raises(KeyError, match="subtract"):
        load("adder", [], "", Writer(1)).address("subtract")


def test_where_it_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(compiler.CACHE_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/pronk")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/llama")
    assert cache_folder() == Path("/home/llama/.cache/pronk")

    def homeless() -> Path:
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "home", homeless)
    assert cache_folder() is None
    assert called(load("adder", [], "", Writer(1))) == 11
