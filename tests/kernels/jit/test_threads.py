"""Every item is done once, whoever does it and however often; and the team goes home when it is told to."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llvmlite import ir

from pronk.kernels.jit import threads
from pronk.kernels.jit.compiler import Library, load
from pronk.kernels.jit.emit import I64, Function
from pronk.kernels.jit.threads import Team, Work


def write() -> ir.Module:
    """Counts each item."""
    module = ir.Module("count")
    with Function(module, "count", ["arguments", "first", "last"]) as f:
        counts = f.load(f.argument("arguments"), I64)
        with f.loop(f.argument("first"), f.argument("last")) as item:
            f.store(f.load(counts + item * 8, I64) + 1, counts + item * 8)
    return module


@pytest.fixture(scope="module")
def library() -> Library:
    return load("count", [], "", write)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 5), st.lists(st.tuples(st.integers(0, 2000), st.sampled_from([1.0, 500.0, 1e6])), max_size=30))
def test_each_item_is_done_once(library: Library, num_threads: int, rounds: list[tuple[int, float]]) -> None:
    team = Team(num_threads)
    try:
        for num_items, cost in rounds:
            counts = np.zeros(num_items + 1, np.int64)
            team.run(library.address("count"), [counts.ctypes.data], Work(num_items, cost))
            assert (counts[:num_items] == 1).all()
            assert counts[num_items] == 0
    finally:
        team.close()


def test_a_thousand_rounds_with_members_asleep_and_awake(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """Members that sleep at once are woken each time."""
    for looks in (0, threads.LOOKS):
        monkeypatch.setattr(threads, "LOOKS", looks)
        team = Team(3)
        counts = np.zeros(50, np.int64)
        for _ in range(1000):
            team.run(library.address("count"), [counts.ctypes.data], Work(50, 1e6))
        team.close()
        assert (counts == 1000).all()


def test_a_team_that_was_closed_is_its_caller_alone(library: Library) -> None:
    """Work that it would share out is done all the same, and nobody is waited for who has gone."""
    team = Team(4)
    team.close()
    counts = np.zeros(10, np.int64)
    team.run(library.address("count"), [counts.ctypes.data], Work(10, 1e6))
    assert (counts == 1).all()
