"""A stream and a whole answer are folds of the same deltas: for every way of cutting them, they say the same."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pronk.engine.detokenizer import Detokenizer
from pronk.engine.errors import EngineDeadError
from pronk.engine.request import Output, SamplingParams
from pronk.server.chat.chunks import ChunkWriter, Wanted
from pronk.server.generation import Answer, Assembler, Generation, Prompt, Scored
from pronk.server.record import RequestRecord
from pronk.server.sending import EventStream
from pronk.server.shapes import Head
from pronk.server.streaming import ClientDisconnectedError, sse, to_json, unless_disconnected

from .fakes import BYTES, END_OF_TURN, FakeEngine, fake_logprobs, served

EOS = frozenset({END_OF_TURN})
HEAD = Head("c", 1, "m")
TOKENS = st.lists(
    st.sampled_from([*"aaabcé€\U0001f999\u2028".encode(), 0xFF, 300, END_OF_TURN - 1]) | st.integers(0, 511),
    max_size=24,
)
STOPS = st.lists(st.text("abcé€", min_size=1, max_size=3), max_size=2).map(tuple)


def cut(tokens: Sequence[int], cuts: Sequence[int], *, finish: str, stop_reason: Any, top: int | None) -> list[Output]:
    """One output for each piece of tokens; the last one finishes."""
    edges = [0, *sorted(place % (len(tokens) + 1) for place in cuts), len(tokens)]
    pieces = [list(tokens[start:end]) for start, end in itertools.pairwise(edges)]
    return [
        Output(
            request_id="r",
            token_ids=piece,
            logprobs=None if top is None else [fake_logprobs(token, top) for token in piece],
            finish_reason=finish if place == len(pieces) - 1 else None,  # type: ignore[arg-type]
            stop_reason=stop_reason if place == len(pieces) - 1 else None,
        )
        for place, piece in enumerate(pieces)
    ]


def engine_ends(tokens: Sequence[int], params: SamplingParams) -> tuple[list[int], str, str | None]:
    """Where the engine, which looks token by token, ends the completion -> its tokens, and why."""
    detokenizer = Detokenizer(
        BYTES, stop=params.stop, skip_special_tokens=params.skip_special_tokens, min_tokens=params.min_tokens
    )
    for place, token in enumerate(tokens):
        detokenizer.feed([token])
        if token in EOS and not params.ignore_eos:
            return list(tokens[: place + 1]), "stop", None
        if detokenizer.stopped is not None:
            return list(tokens[: place + 1]), "stop", detokenizer.stopped
    return list(tokens), "length", None


def generation(outputs: Sequence[Output], params: SamplingParams, record: RequestRecord | None = None) -> Generation:
    """One completion that is these outputs."""
    return Generation(
        [Prompt([1], [params])],
        request_id="r",
        model=served(FakeEngine(lambda request: outputs)),
        record=record or RequestRecord("r"),
    )


async def whole_of(outputs: Sequence[Output], params: SamplingParams) -> Answer:
    (answer,) = await generation(outputs, params).collect()
    return answer


async def streamed(outputs: Sequence[Output], params: SamplingParams) -> tuple[str, list[Any], str]:
    """What a client makes of the events."""
    sent: list[bytes] = []

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))

    record = RequestRecord("r")
    writer = ChunkWriter(HEAD, Wanted(logprobs=params.logprobs is not None), BYTES, record)
    await sse(generation(outputs, params, record).deltas(), writer, EventStream(send, send), name="r")
    lines = b"".join(sent).decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    choices = [msgspec.json.decode(line[6:])["choices"][0] for line in lines[:-2]]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1]["delta"] == {}
    return (
        "".join(choice["delta"].get("content", "") for choice in choices),
        [entry["logprob"] for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]],
        choices[-1]["finish_reason"],
    )


@settings(max_examples=300, deadline=None)
@given(
    tokens=TOKENS,
    cuts=st.lists(st.integers(0, 30), max_size=6),
    stop=STOPS,
    include=st.booleans(),
    skip=st.booleans(),
    top=st.sampled_from([None, 0, 2]),
)
def test_a_stream_and_a_whole_answer_say_the_same(
    tokens: list[int], cuts: list[int], stop: tuple[str, ...], include: bool, skip: bool, top: int | None
) -> None:
    params = SamplingParams(stop=stop, include_stop_str_in_output=include, skip_special_tokens=skip, logprobs=top)
    kept, finish, stop_reason = engine_ends(tokens, params)
    outputs = cut(kept, cuts, finish=finish, stop_reason=stop_reason, top=top)
    at_once = cut(kept, [], finish=finish, stop_reason=stop_reason, top=top)

    async def all_ways() -> tuple[Answer, tuple[str, list[Any], str], Answer]:
        return await whole_of(outputs, params), await streamed(outputs, params), await whole_of(at_once, params)

    whole, stream, uncut = asyncio.run(all_ways())
    assert whole == uncut
    assert stream == (whole.text, [scored.logprobs.logprob for scored in whole.logprobs], whole.finish_reason)
    # Every token's logprobs once, in order, and nothing but them.
    assert whole.logprobs == ([] if top is None else [Scored(token, fake_logprobs(token, top)) for token in kept])
    assert whole.token_ids == kept


@given(text=st.text(max_size=20), cuts=st.lists(st.integers(0, 60), max_size=8))
@settings(max_examples=200, deadline=None)
def test_logprobs_come_with_the_text_they_complete(text: str, cuts: list[int]) -> None:
    """At each delta, the entries told so far are those of the tokens whose text has been told: no fewer, no more."""
    tokens = [*text.encode(), END_OF_TURN]
    before_the_end = [place % len(tokens) for place in cuts]
    outputs = cut(tokens, before_the_end, finish="stop", stop_reason=None, top=0)
    assembler = Assembler(BYTES, SamplingParams(stop=("\x00\x01\x02",), logprobs=0), EOS)
    shown, told = "", 0
    for output in outputs:
        delta = assembler.feed(output)
        if delta is None:
            continue
        shown += delta.text
        told += len(delta.logprobs)
        if delta.finish_reason is None:
            assert told == len(shown.encode())
    assert (shown, told) == (text, len(tokens))


def test_a_stop_text_that_is_not_completed_is_shown_at_the_end() -> None:
    assembler = Assembler(BYTES, SamplingParams(stop=("END",)), EOS)
    told = [assembler.feed(output) for output in cut(b"xEN", [1, 2], finish="length", stop_reason=None, top=None)]
    assert [delta and delta.text for delta in told] == ["x", None, "EN"]


@pytest.mark.parametrize(("include", "text"), [(False, "ab"), (True, "abc")])
def test_a_token_that_ended_the_answer_is_no_part_of_it(include: bool, text: str) -> None:
    params = SamplingParams(stop_token_ids=(ord("c"),), include_stop_str_in_output=include)
    (output,) = cut(b"abc", [], finish="stop", stop_reason=ord("c"), top=None)
    delta = Assembler(BYTES, params, EOS).feed(output)
    assert delta is not None
    assert delta.text == text


def test_special_tokens_are_shown_when_asked_for_but_not_the_end() -> None:
    params = SamplingParams(skip_special_tokens=False)
    tokens = [BYTES.special_tokens["<|python_tag|>"], ord("a"), END_OF_TURN]
    (output,) = cut(tokens, [], finish="stop", stop_reason=None, top=None)
    delta = Assembler(BYTES, params, EOS).feed(output)
    assert delta is not None
    assert delta.text == "<|python_tag|>a"


async def test_the_record_counts() -> None:
    record = RequestRecord("r")
    outputs = cut(b"abc", [1], finish="length", stop_reason=None, top=None)
    await generation(outputs, SamplingParams(), record).collect()
    assert (record.outcome, record.completion_tokens) == ("length", 3)
    assert record.time_to_first_token is not None
    assert record.time_per_output_token is not None


async def test_an_iterator_that_ends_without_a_reason_is_an_error() -> None:
    record = RequestRecord("r")
    with pytest.raises(Exception, match="without a reason"):
        await generation([Output(request_id="r", token_ids=[97])], SamplingParams(), record).collect()
    assert record.outcome == "error"


async def test_closing_deltas_early_aborts() -> None:
    engine = FakeEngine(lambda request: [Output(request_id="", token_ids=[97])] * 9)
    record = RequestRecord("r")
    running = Generation([Prompt([1], [SamplingParams()])], request_id="r", model=served(engine), record=record)
    parts = running.deltas()
    await anext(parts)
    await parts.aclose()
    assert engine.aborted == ["r"]
    assert record.outcome == "client_abort"


async def test_an_error_before_the_first_delta_sends_nothing() -> None:
    engine = FakeEngine()
    engine.error = EngineDeadError("gone")

    async def send(message: Any) -> None:
        raise AssertionError("nothing may be sent")

    record = RequestRecord("r")
    running = Generation([Prompt([1], [SamplingParams()])], request_id="r", model=served(engine), record=record)
    with pytest.raises(EngineDeadError):
        await sse(running.deltas(), ChunkWriter(HEAD, Wanted(), BYTES, record), EventStream(send, send), name="r")


async def test_work_is_cancelled_and_has_ended_when_the_client_leaves() -> None:
    ended = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append(True)

    messages = [{"type": "http.request", "body": b""}, {"type": "http.disconnect"}]

    async def receive() -> Any:
        await asyncio.sleep(0)
        return messages.pop(0)

    with pytest.raises(ClientDisconnectedError):
        await unless_disconnected(receive, work())
    assert ended == [True]


async def test_work_is_cancelled_when_the_server_cancels() -> None:
    ended = asyncio.Event()
    started = asyncio.Event()

    async def work() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async def receive() -> Any:
        await asyncio.Event().wait()

    task = asyncio.create_task(unless_disconnected(receive, work()))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()


@given(st.text())
def test_json_has_no_line_ends_in_it_and_loses_nothing(text: str) -> None:
    encoded = to_json({"t": text})
    assert len(encoded.decode().splitlines()) == 1
    assert msgspec.json.decode(encoded) == {"t": text}
