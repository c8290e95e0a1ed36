"""Messages between the two processes: what is sent arrives, however the stream is cut; what is no message does not."""

from __future__ import annotations

import math
import struct
from typing import get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pronk.engine import wire
from pronk.engine.config import CacheConfig, EngineConfig, SchedulerConfig
from pronk.engine.request import MAX_LOGPROBS, FinishReason, Output, Request, SamplingParams, Timing, TokenLogprobs

int64 = st.integers(-(2**63), 2**63 - 1)
count = st.integers(0, 2**63 - 1)
token = st.integers(0, 2**32)
seconds = st.floats(0, 1e9)
text = st.text(max_size=20)
maybe = st.none

caches = st.builds(
    CacheConfig,
    block_size=st.sampled_from([16, 32, 64, 128, 256]),
    memory=maybe() | st.sampled_from(["4GiB", "1000000"]),
    enable_prefix_caching=st.booleans(),
)
schedulers = st.builds(
    SchedulerConfig,
    max_num_seqs=st.integers(1, 10_000),
    max_num_batched_tokens=maybe() | st.integers(1, 100_000),
)
configs = st.builds(
    EngineConfig,
    model=text,
    load_format=st.sampled_from(["auto", "safetensors", "pth", "dummy"]),
    dtype=st.sampled_from(["auto", "bfloat16", "float16", "float32"]),
    device=st.sampled_from(["auto", "cpu", "cuda"]),
    max_model_len=maybe() | st.integers(1, 2**20),
    seed=maybe() | int64,
    cache=caches,
    scheduler=schedulers,
)
params = st.builds(
    SamplingParams,
    temperature=st.floats(0, 2),
    top_p=st.floats(0, 1),
    top_k=st.integers(0, 2**31 - 1),
    min_p=st.floats(0, 1),
    seed=maybe() | int64,
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    repetition_penalty=st.floats(0, 100, exclude_min=True),
    logit_bias=st.dictionaries(token, st.floats(-100, 100), max_size=5),
    stop=st.lists(st.text(min_size=1, max_size=9), max_size=4).map(tuple),
    stop_token_ids=st.lists(token, max_size=4).map(tuple),
    ignore_eos=st.booleans(),
    include_stop_str_in_output=st.booleans(),
    skip_special_tokens=st.booleans(),
    max_tokens=maybe() | st.integers(1000, 2**40),
    min_tokens=st.integers(0, 1000),
    logprobs=maybe() | st.integers(0, MAX_LOGPROBS),
)
requests = st.builds(Request, request_id=text, prompt=st.lists(token, max_size=30), params=params, cache_salt=text)
logprob = st.floats(max_value=0)  # -inf too
token_logprobs = st.builds(
    TokenLogprobs, logprob=logprob, top_ids=st.lists(token, max_size=3), top_logprobs=st.lists(logprob, max_size=3)
)
outputs = st.builds(
    Output,
    request_id=text,
    token_ids=st.lists(token, max_size=3),
    logprobs=maybe() | st.lists(token_logprobs, max_size=3),
    finish_reason=maybe() | st.sampled_from(get_args(FinishReason)),
    stop_reason=maybe() | text | token,
    error=maybe() | text,
    num_cached_tokens=count,
    timing=maybe() | st.builds(Timing, queue=seconds, prefill=seconds, decode=seconds),
)
stats = st.builds(
    wire.EngineStats,
    **{field.name: seconds if field.type is float else count for field in msgspec.structs.fields(wire.EngineStats)},
)
shares = st.builds(wire.RankShare, **dict.fromkeys(wire.RankShare.__struct_fields__, count))
FIELDS = {
    int: count,
    int | None: maybe() | count,
    str: text,
    str | None: maybe() | text,
    bool: st.booleans(),
    float: seconds,
    list[int]: st.lists(token, max_size=3),
    list[wire.RankShare]: st.lists(shares, max_size=3),
}
infos = st.builds(
    wire.EngineInfo, **{field.name: FIELDS[field.type] for field in msgspec.structs.fields(wire.EngineInfo)}
)

TO_ENGINE = {
    wire.Start: st.builds(wire.Start, config=configs),
    wire.Add: st.builds(wire.Add, request=requests),
    wire.Abort: st.builds(wire.Abort, request_ids=st.lists(text, max_size=4)),
    wire.CountCached: st.builds(wire.CountCached, query=count, prompt=st.lists(token, max_size=4), cache_salt=text),
    wire.Shutdown: st.builds(wire.Shutdown, st.booleans()),
}
FROM_ENGINE = {
    wire.Progress: st.builds(wire.Progress, phase=text, done=count, total=count, unit=text),
    wire.EngineInfo: infos,
    wire.Step: st.builds(wire.Step, outputs=st.lists(outputs, max_size=3), stats=stats),
    wire.CachedCount: st.builds(wire.CachedCount, query=count, num_tokens=count),
    wire.Failed: st.builds(wire.Failed, kind=text, message=text, traceback=text),
}
EACH = [
    *((wire.ToEngine, kind, messages) for kind, messages in TO_ENGINE.items()),
    *((wire.FromEngine, kind, messages) for kind, messages in FROM_ENGINE.items()),
]


def test_every_message_is_tried() -> None:
    assert set(TO_ENGINE) == set(get_args(wire.ToEngine))
    assert set(FROM_ENGINE) == set(get_args(wire.FromEngine))


@pytest.mark.parametrize(("direction", "kind", "messages"), EACH, ids=[kind.__name__ for _, kind, _ in EACH])
def test_round_trip(direction: object, kind: type, messages: st.SearchStrategy[object]) -> None:
    @settings(deadline=None, max_examples=40)
    @given(messages)
    def check(message: object) -> None:
        frame = wire.encode(message)  # type: ignore[arg-type]
        assert struct.unpack("<I", frame[:4]) == (len(frame) - 4,)
        arrived = wire.Frames(direction).feed(frame)
        assert arrived == [message]
        assert type(arrived[0]) is kind

    check()


@settings(deadline=None, max_examples=100)
@given(st.lists(st.one_of(*FROM_ENGINE.values()), max_size=5), st.data())
def test_a_stream_may_be_cut_anywhere(messages: list[object], data: st.DataObject) -> None:
    """Into any pieces, in the middle of a length too; each message arrives with the piece that ends it."""
    frames = [wire.encode(message) for message in messages]  # type: ignore[arg-type]
    stream = b"".join(frames)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    ends = [sum(map(len, frames[: index + 1])) for index in range(len(frames))]
    reader = wire.Frames(wire.FromEngine)
    arrived: list[object] = []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        arrived += reader.feed(stream[start:end])
        assert len(arrived) == sum(message_end <= end for message_end in ends)
    assert arrived == messages


def test_byte_by_byte() -> None:
    messages = [wire.Progress("weights", 1, 2), wire.Failed("ConfigError", "no", ""), wire.Progress("weights")]
    reader = wire.Frames(wire.FromEngine)
    stream = b"".join(map(wire.encode, messages))
    assert [message for byte in stream for message in reader.feed(bytes([byte]))] == messages
    assert reader.feed(b"") == []


def test_a_reader_keeps_nothing_of_what_it_gave() -> None:
    """Else a stream of days would grow without end."""
    reader = wire.Frames(wire.FromEngine)
    frame = wire.encode(wire.Progress("weights"))
    reader.feed(frame * 1000 + frame[:3])
    assert len(reader._buffer) == 3


def framed(body: object) -> bytes:
    encoded = msgspec.msgpack.encode(body)
    return struct.pack("<I", len(encoded)) + encoded


@pytest.mark.parametrize(
    "body",
    [
        {"type": "eval", "code": "1"},
        {"type": "ready"},
        {"type": "progress", "phase": 3},
        {"type": "progress"},
        {"phase": "no tag"},
        {"type": "step", "outputs": [{"request_id": "a", "finish_reason": "tired"}], "stats": []},
        ["progress"],
        "progress",
        None,
        7,
    ],
    ids=str,
)
def test_what_is_no_message_is_refused(body: object) -> None:
    with pytest.raises(msgspec.ValidationError):
        wire.Frames(wire.FromEngine).feed(framed(body))


def test_a_message_of_the_other_direction_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError, match="shutdown"):
        wire.Frames(wire.FromEngine).feed(wire.encode(wire.Shutdown()))
    with pytest.raises(msgspec.ValidationError, match="failed"):
        wire.Frames(wire.ToEngine).feed(wire.encode(wire.Failed("A", "b")))


def test_what_is_no_msgpack_is_refused() -> None:
    with pytest.raises(msgspec.DecodeError):
        wire.Frames(wire.FromEngine).feed(struct.pack("<I", 3) + b"\xc1\xc1\xc1")
    with pytest.raises(msgspec.DecodeError):
        wire.Frames(wire.FromEngine).feed(struct.pack("<I", 0))


def test_tags_are_pinned() -> None:
    """Both ends are one version, but a dump of the socket should stay readable."""
    tags = {kind.__struct_config__.tag for kind in (*TO_ENGINE, *FROM_ENGINE)}
    assert tags == {
        *("start", "add", "abort", "count_cached", "shutdown"),
        *("progress", "ready", "step", "cached_count", "failed"),
    }


def test_numbers_that_are_not_finite_arrive() -> None:
    """A logprob may be minus infinity; a NaN must not turn into something else on the way."""
    output = Output(request_id="a", token_ids=[1], logprobs=[TokenLogprobs(-math.inf, [2], [math.nan])])
    (step,) = wire.Frames(wire.FromEngine).feed(wire.encode(wire.Step([output], wire.EngineStats())))
    assert isinstance(step, wire.Step)
    (arrived,) = step.outputs[0].logprobs or []
    assert arrived.logprob == -math.inf
    assert math.isnan(arrived.top_logprobs[0])
