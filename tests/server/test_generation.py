"""Several completions of one request: one stream of deltas, in which none waits for another and none is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import pairwise as pairs
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pronk.engine.errors import NonFiniteLogitsError
from pronk.engine.request import Output, Request, SamplingParams, TokenLogprobs
from pronk.server.chat.tools import Choice, Function, ToolCalls
from pronk.server.errors import RequestFailedError
from pronk.server.generation import Answer, Assembler, Delta, Generation, Joint, Pending, Prompt
from pronk.server.record import RequestRecord

from .fakes import BYTES, END_OF_TURN, FakeEngine, outputs, served


def several(engine: FakeEngine, prompts: Sequence[Sequence[int]], n: int, **fields: Any) -> Generation:
    """n completions of each prompt, with the seeds 0, 1, ..."""
    params = [SamplingParams(seed=seed) for seed in range(n)]
    return Generation(
        [Prompt(list(prompt), params) for prompt in prompts],
        request_id="r",
        model=served(engine),
        record=fields.pop("record", RequestRecord("r")),
        **fields,
    )


def by_seed(request: Request) -> list[Output]:
    """An answer that tells prompt and seed; longer for lower seeds, so that later completions end first."""
    seed = request.params.seed or 0
    text = bytes(request.prompt) + str(seed).encode() * (4 - seed)
    return outputs([*text, END_OF_TURN])


async def test_each_completion_is_that_of_its_prompt_and_seed() -> None:
    answers = await several(FakeEngine(by_seed), [b"a", b"b"], 3).collect()
    assert [answer.text for answer in answers] == ["a0000", "a111", "a22", "b0000", "b111", "b22"]


END_OF_MESSAGE = BYTES.special_tokens["<|eom_id|>"]
FEED = ToolCalls((Function("feed"),))


@pytest.mark.parametrize(
    ("fields", "tools", "stops"),
    [
        ({}, FEED, (END_OF_MESSAGE,)),
        ({"stop_token_ids": (7,)}, FEED, (7, END_OF_MESSAGE)),
        ({"ignore_eos": True, "max_tokens": 9}, FEED, ()),
        ({}, None, ()),
        ({}, ToolCalls((Function("feed"),), Choice("none")), ()),
    ],
)
async def test_where_calls_can_be_made_the_end_of_a_message_ends_the_answer(
    fields: dict[str, Any], tools: ToolCalls | None, stops: tuple[int, ...]
) -> None:
    call = b'{"name": "feed", "parameters": {}}'
    engine = FakeEngine(lambda request: outputs([*call, END_OF_MESSAGE]))
    prompt = Prompt([1], [SamplingParams(**fields)])
    generation = Generation([prompt], request_id="r", model=served(engine), record=RequestRecord("r"), tools=tools)
    answer = (await generation.collect())[0]
    assert engine.requests[0].params.stop_token_ids == stops
    if tools is FEED and stops:
        assert (answer.text, answer.finish_reason) == ("", "tool_calls")


async def test_a_token_that_ends_a_turn_anyway_is_not_named_again() -> None:
    engine = FakeEngine(eos_token_ids=(END_OF_TURN, END_OF_MESSAGE))
    prompt = Prompt([1], [SamplingParams()])
    await Generation([prompt], request_id="r", model=served(engine), record=RequestRecord("r"), tools=FEED).collect()
    assert engine.requests[0].params.stop_token_ids == ()


async def test_the_others_begin_when_the_first_has_computed_the_prompt() -> None:
    engine = FakeEngine(by_seed)
    await several(engine, [b"a", b"b"], 3, cache_salt="s", priority=7).collect()
    names = [request.request_id for request in engine.requests]
    assert names[:2] == ["r-0", "r-3"]
    assert sorted(names) == [f"r-{index}" for index in range(6)]
    assert {(request.cache_salt, request.priority) for request in engine.requests} == {("s", 7)}


@pytest.mark.parametrize(("prompts", "n"), [(1, 30), (30, 1), (6, 5)])
async def test_no_more_are_handed_over_than_the_engine_runs_at_a_time(prompts: int, n: int) -> None:
    engine = FakeEngine(max_num_seqs=4)
    most = 0

    def script(request: Request) -> list[Output]:
        nonlocal most
        most = max(most, engine.num_requests)
        return outputs([*request.prompt, END_OF_TURN])

    engine.script = script
    answers = await several(engine, [bytes([97 + place]) for place in range(prompts)], n).collect()
    assert [answer.text for answer in answers] == [chr(97 + place) for place in range(prompts) for _ in range(n)]
    assert most == 4


async def test_who_leaves_leaves_nothing_waiting_for_its_turn() -> None:
    engine = FakeEngine(by_seed, max_num_seqs=1)
    engine.hold_after = 1
    parts = several(engine, [b"a", b"b"], 2).deltas()
    await anext(parts)
    await parts.aclose()
    assert len(engine.requests) == len(engine.aborted) == 1
    assert not engine.running


async def test_none_of_the_others_begins_before() -> None:
    engine = FakeEngine(by_seed)
    engine.gate.clear()
    parts = several(engine, [b"a"], 3).deltas()
    first = asyncio.create_task(anext(parts))
    await engine.until(lambda: len(engine.requests) == 1)
    for _ in range(20):
        await asyncio.sleep(0)
    assert len(engine.requests) == 1
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    await parts.aclose()
    assert engine.aborted == ["r-0"]


async def test_a_prompts_scores_come_before_all_of_its_completions() -> None:
    """Also when the text of the one that brings them is not certain for a long time."""

    def script(request: Request) -> list[Output]:
        if request.request_id == "r-0":
            first, *rest = outputs([*"\U0001f999".encode(), END_OF_TURN])
            scores = [TokenLogprobs(-1.0, [], [])]
            return [Output(request_id="", token_ids=first.token_ids, prompt_logprobs=scores), *rest]
        return outputs([120, END_OF_TURN])

    told = [delta async for delta in several(FakeEngine(script), [b"ab"], 3).deltas()]
    assert told[0].prompt_logprobs == [TokenLogprobs(-1.0, [], [])]
    assert [delta.prompt_logprobs for delta in told[1:]] == [None] * (len(told) - 1)
    assert (told[0].index, told[0].text) == (0, "")


async def test_one_failure_ends_all() -> None:
    def script(request: Request) -> list[Output]:
        if request.params.seed == 1:
            return [Output(request_id="", finish_reason="error", error="broken", error_kind="NonFiniteLogitsError")]
        return outputs([97] * 5000)

    engine = FakeEngine(script)
    record = RequestRecord("r")
    with pytest.raises(NonFiniteLogitsError, match="broken"):
        await several(engine, [b"a"], 3, record=record).collect()
    assert not engine.running
    assert set(engine.aborted) <= {"r-0", "r-2"}
    assert record.outcome == "error"


async def test_an_error_without_a_known_kind_is_a_failure() -> None:
    for kind in (None, "SystemExit", "PronkErrors"):
        failed = Output(request_id="", finish_reason="error", error="broken", error_kind=kind)
        with pytest.raises(RequestFailedError, match="broken"):
            await several(FakeEngine(lambda request, failed=failed: [failed]), [b"a"], 1).collect()  # type: ignore[misc]


@pytest.mark.parametrize(("finishes", "outcome"), [(("stop", "stop"), "stop"), (("length", "stop"), "length")])
async def test_the_record_sums_up(finishes: tuple[str, str], outcome: str) -> None:
    def script(request: Request) -> list[Output]:
        ids = outputs([97, 98], finish=finishes[request.params.seed or 0])
        return [Output(request_id="", token_ids=[96], num_cached_tokens=16 * (request.params.seed or 0) + 1), *ids]

    record = RequestRecord("r")
    await several(FakeEngine(script), [b"abc", b"de"], 2, record=record).collect()
    assert (record.prompt_tokens, record.completion_tokens, record.outcome) == (5, 12, outcome)
    # The prompts count once: what later completions find of them is no saving that anyone is told of.
    assert record.cached_tokens == 2


PARTS = st.lists(st.tuples(st.integers(0, 2), st.text("ab", min_size=1, max_size=3), st.booleans()), max_size=20)


@settings(max_examples=100, deadline=None)
@given(PARTS)
def test_deltas_that_wait_are_joined(parts: list[tuple[int, str, bool]]) -> None:
    """Whenever the reader looks, each writer's text arrives whole and in order, in no more deltas than writers."""

    async def run() -> None:
        pending = Pending(3)
        read = ["", "", ""]
        for index, text, look in parts:
            pending.put(Delta(index, [text], token_ids=[len(text)]))
            while look and pending._waiting:
                delta = await anext(pending)
                read[delta.index] += delta.text
        for _ in range(3):
            pending.end()
        rest = [delta async for delta in pending]
        assert len(rest) == len({delta.index for delta in rest})
        for delta in rest:
            read[delta.index] += delta.text
        assert read == ["".join(text for place, text, _ in parts if place == index) for index in range(3)]

    asyncio.run(run())


async def test_an_error_comes_after_what_was_said_before() -> None:
    pending = Pending(2)
    pending.put(Delta(0, ["a"]))
    pending.fail(RequestFailedError("first"))
    pending.fail(RequestFailedError("second"))
    assert (await anext(pending)).text == "a"
    with pytest.raises(RequestFailedError, match="first"):
        await anext(pending)


CALL = 'I look. {"name": "f", "parameters": {"a": [1, "é"]}}'


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, len(CALL.encode())), max_size=8), st.integers(0, 30))
def test_joining_deltas_does_not_change_an_answer(cuts: list[int], joined: int) -> None:
    tokens = [*CALL.encode(), END_OF_TURN]
    edges = [0, *sorted(cuts), len(tokens)]
    assembler = Assembler(BYTES, SamplingParams(), frozenset({END_OF_TURN}), tools=ToolCalls((Function("f"),)))
    deltas = []
    for place, (start, end) in enumerate(pairs(edges)):
        finish = "stop" if place == len(edges) - 2 else None
        delta = assembler.feed(Output(request_id="", token_ids=tokens[start:end], finish_reason=finish))  # type: ignore[arg-type]
        deltas += [delta] if delta is not None else []
    answer = fold(deltas)
    assert (answer.text, [(call.name, call.arguments) for call in answer.calls]) == (
        "I look. ",
        [("f", '{"a": [1, "é"]}')],
    )
    assert answer.finish_reason == "tool_calls"
    assert answer.token_ids == tokens
    for _ in range(min(joined, len(deltas) - 1)):
        place = joined % (len(deltas) - 1)
        joint = Joint(0)
        joint.add(deltas[place])
        joint.add(deltas[place + 1])
        deltas[place : place + 2] = [joint.delta()]
    assert fold(deltas) == answer
    assert all(
        not isinstance(one, str) or not isinstance(two, str) for delta in deltas for one, two in pairs(delta.parts)
    )


def fold(deltas: Sequence[Delta]) -> Answer:
    answer = Answer()
    for delta in deltas:
        answer.add(delta)
    return answer
