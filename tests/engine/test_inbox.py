"""An inbox: whenever its reader looks, nothing is lost, repeated or out of order, and little is kept."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pronk.engine.inbox import Inbox
from pronk.engine.request import Output, Timing, TokenLogprobs


def scored(tokens: Sequence[int]) -> list[TokenLogprobs]:
    return [TokenLogprobs(-float(token), [], []) for token in tokens]


def output(tokens: Sequence[int] = (), *, logprobs: bool = False, prompt: Sequence[int] | None = None) -> Output:
    return Output(
        request_id="r",
        token_ids=list(tokens),
        logprobs=scored(tokens) if logprobs and tokens else None,
        prompt_logprobs=None if prompt is None else scored(prompt),
    )


LAST = Output(
    request_id="r", token_ids=[99], logprobs=scored([99]), finish_reason="stop", stop_reason="x",
    timing=Timing(1.0, 2.0, 3.0),
)  # fmt: skip


@given(
    before=st.lists(st.lists(st.integers(0, 9), max_size=2), max_size=3),
    pieces=st.lists(st.tuples(st.lists(st.integers(0, 98), max_size=3), st.booleans()), max_size=12),
)
def test_the_fold_is_the_same_whenever_it_is_read(
    before: list[list[int]], pieces: list[tuple[list[int], bool]]
) -> None:
    """before: scores of the prompt; pieces: tokens of each output, and whether the reader looks after it."""

    async def read() -> list[Output]:
        inbox, seen = Inbox(), []
        for prompt in before:
            inbox.put(output(prompt=prompt))
        for tokens, looks in pieces:
            inbox.put(output(tokens, logprobs=True))
            if looks:
                seen.append(await inbox.get())
        inbox.put(LAST)
        seen.append(await inbox.get())
        return seen

    seen = asyncio.run(read())
    tokens = [token for piece, _ in pieces for token in piece] + [99]
    assert [token for one in seen for token in one.token_ids] == tokens
    assert [entry for one in seen for entry in one.logprobs or ()] == scored(tokens)
    assert [entry for one in seen for entry in one.prompt_logprobs or ()] == scored([t for p in before for t in p])
    assert all(len(one.logprobs or ()) == len(one.token_ids) for one in seen)
    assert [one.finish_reason for one in seen] == [None] * (len(seen) - 1) + ["stop"]
    assert (seen[-1].stop_reason, seen[-1].timing) == ("x", LAST.timing)


async def test_outputs_of_others_are_not_changed() -> None:
    """The engine's message is read by others too, after the inbox took it."""
    inbox = Inbox()
    made = [output([1], logprobs=True), output([2], logprobs=True), output([3], logprobs=True)]
    for one in made:
        inbox.put(one)
    assert (await inbox.get()).token_ids == [1, 2, 3]
    assert [one.token_ids for one in made] == [[1], [2], [3]]
    assert [len(one.logprobs or ()) for one in made] == [1, 1, 1]


async def test_scores_that_come_late_are_not_taken_from_their_owner() -> None:
    inbox = Inbox()
    made = [output(), output([2], logprobs=True), output([3], logprobs=True)]
    for one in made:
        inbox.put(one)
    assert (await inbox.get()).logprobs == scored([2, 3])
    assert made[1].logprobs == scored([2])


@pytest.mark.parametrize("tokens", [[], [1]])
async def test_an_error_comes_after_what_was_made(tokens: list[int]) -> None:
    inbox = Inbox()
    inbox.put(output(tokens))
    inbox.put(Output(request_id="r", finish_reason="error", error="gone"))
    assert (await inbox.get()).token_ids == tokens
    assert (await inbox.get()).error == "gone"


async def test_what_has_ended_stays_so_when_the_engine_dies_before_it_is_read() -> None:
    inbox = Inbox()
    inbox.put(LAST)
    inbox.put(Output(request_id="r", finish_reason="error", error="gone"))
    inbox.put(output([7]))
    assert await inbox.get() == LAST


async def test_a_reader_that_waits_is_woken_and_one_that_left_is_not() -> None:
    inbox = Inbox()
    waiting = asyncio.create_task(inbox.get())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    inbox.put(output([1]))
    assert (await inbox.get()).token_ids == [1]
    waiting = asyncio.create_task(inbox.get())
    await asyncio.sleep(0)
    inbox.put(output([2]))
    inbox.put(output([3]))
    assert (await waiting).token_ids == [2, 3]


async def test_a_token_that_waits_costs_little() -> None:
    inbox = Inbox()
    for _ in range(100_000):
        inbox.put(output([1]))
    joined = await inbox.get()
    assert len(joined.token_ids) == 100_000
    assert sys.getsizeof(joined.token_ids) < 16 * 100_000
