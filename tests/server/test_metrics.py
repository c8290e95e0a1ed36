"""/metrics: readable by Prometheus' own parser, and exact after known requests."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pronk.engine.request import Output, Timing
from pronk.engine.wire import EngineStats, Step
from pronk.server.metrics import INTER_TOKEN_LATENCY, REJECTIONS, TIME_TO_FIRST_TOKEN, BucketCounts, TokenClock

from .conftest import Connect
from .fakes import END_OF_TURN, Client, FakeEngine, outputs

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def read(text: str) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def scrape(client: Client) -> Samples:
    reply = await client.call("GET", "/metrics")
    assert reply.status == 200
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    return read(reply.body.decode())


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[f"pronk_{name}", frozenset({"model": "tiny", **labels}.items())]


async def test_counts_are_exact_after_known_requests(connect: Connect) -> None:
    timing = Timing(0.25, 0.5, 1.0)

    def script(request: object) -> list[Output]:
        first, *rest, last = outputs([97, 98, 99, END_OF_TURN])
        return [first, *rest, Output(request_id="", token_ids=last.token_ids, finish_reason="stop", timing=timing)]

    client = connect(FakeEngine(script))
    whole = (await client.chat()).json["usage"]
    for _ in range(2):
        await client.chat(stream=True)
    await client.chat(temperature=9)
    await client.chat(model="nope")
    await client.chat(max_tokens=10**6)
    await client.call("POST", "/v1/nowhere")
    client.engine.script = lambda request: outputs([97, 98], finish="length")
    await client.chat()

    samples = await scrape(client)
    assert value(samples, "requests_total", outcome="stop") == 3
    assert value(samples, "requests_total", outcome="length") == 1
    assert value(samples, "requests_total", outcome="error") == 0
    assert value(samples, "request_rejections_total", reason="invalid") == 3
    assert value(samples, "request_rejections_total", reason="context_length") == 1
    chat = {"route": "/v1/chat/completions", "method": "POST"}
    assert value(samples, "http_requests_total", code="200", **chat) == 4
    assert value(samples, "http_requests_total", code="400", **chat) == 2
    assert value(samples, "http_requests_total", code="404", **chat) == 1
    assert value(samples, "http_requests_total", code="404", route="other", method="POST") == 1
    assert value(samples, "request_prompt_tokens_sum") == 4 * whole["prompt_tokens"]
    assert value(samples, "request_generated_tokens_sum") == 3 * 4 + 2 == value(samples, "generated_tokens_total")
    assert value(samples, "time_to_first_token_seconds_count") == 4
    assert value(samples, "time_per_output_token_seconds_count") == 4
    assert value(samples, "request_duration_seconds_count", outcome="stop") == 3
    assert value(samples, "queue_duration_seconds_sum") == 0.75
    assert value(samples, "prefill_duration_seconds_sum") == 1.5
    assert value(samples, "decode_duration_seconds_sum") == 3
    # Every token but each request's first one has a gap before it.
    assert value(samples, "inter_token_latency_seconds_count") == 14 - 4
    assert value(samples, "engine_step_duration_seconds_count") == 14 == value(samples, "engine_steps_total")
    assert value(samples, "engine_batch_size_sum") == 14
    assert value(samples, "tokenize_duration_seconds_count") == 5


async def test_aborts_and_failures_are_told_apart(connect: Connect) -> None:
    client = connect(FakeEngine(lambda request: [Output(request_id="", finish_reason="error", error="bad")]))
    await client.chat()
    client.engine.script = lambda request: outputs([97] * 3)
    client.engine.gate.clear()
    leave = asyncio.Event()
    body = b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}]}'
    call = asyncio.create_task(client.call("POST", "/v1/chat/completions", body, leave=leave))
    await client.engine.until(lambda: bool(client.engine.running))
    leave.set()
    await call
    samples = await scrape(client)
    assert value(samples, "requests_total", outcome="error") == 1
    assert value(samples, "requests_total", outcome="client_abort") == 1
    assert value(samples, "http_requests_total", code="499", route="/v1/chat/completions", method="POST") == 1


async def test_gauges_are_read_when_they_are_scraped(connect: Connect) -> None:
    client = connect()
    client.engine.stats = EngineStats(
        num_running=3, num_waiting=2, blocks_used=30, blocks_cached=20, blocks_total=100, prompt_tokens_computed=7,
        prompt_tokens_cached=5, preemptions=1, prefix_query_tokens=12, prefix_hit_tokens=5, prefix_evicted_blocks=4,
        nonfinite_logits=6, all_reduces=9, all_gathers=8, collective_seconds=0.5,
    )  # fmt: skip
    samples = await scrape(client)
    assert value(samples, "requests_running") == 3
    assert value(samples, "requests_waiting") == 2
    assert [value(samples, "kv_pages", state=state) for state in ("used", "cached", "free")] == [30, 20, 50]
    assert value(samples, "kv_cache_usage_ratio") == 0.3
    assert value(samples, "prompt_tokens_total", source="computed") == 7
    assert value(samples, "prompt_tokens_total", source="cached") == 5
    assert value(samples, "preemptions_total") == 1
    assert value(samples, "prefix_cache_query_tokens_total") == 12
    assert value(samples, "prefix_cache_hit_tokens_total") == 5
    assert value(samples, "prefix_cache_evicted_pages_total") == 4
    assert value(samples, "nonfinite_logits_total") == 6
    assert value(samples, "collectives_total", operation="all_reduce") == 9
    assert value(samples, "collectives_total", operation="all_gather") == 8
    assert value(samples, "collective_seconds_total") == 0.5
    memory = [
        value(samples, "device_memory_bytes", device="cpu", kind=kind) for kind in ("weights", "kv_cache", "runtime")
    ]
    assert memory == [2 << 30, 1 << 30, 256 << 20]


async def test_phases(connect: Connect) -> None:
    def phase(samples: Samples) -> list[float]:
        return [value(samples, name) for name in ("ready", "draining", "engine_up")]

    def ranks(samples: Samples) -> list[float]:
        return [value(samples, "rank_up", rank=str(rank)) for rank in range(2)]

    client = connect(ready=False)
    assert phase(await scrape(client)) == [0, 0, 0]
    assert (await client.chat()).status == 503
    assert value(await scrape(client), "request_rejections_total", reason="loading") == 1

    client = connect()
    assert phase(await scrape(client)) == [1, 0, 1]
    client.service.drain()
    assert (await client.chat()).status == 503
    samples = await scrape(client)
    assert phase(samples) == [0, 1, 1]
    assert value(samples, "request_rejections_total", reason="draining") == 1

    client = connect()
    client.engine.num_ranks = 2
    assert ranks(await scrape(client)) == [1, 1]
    client.engine.die()
    samples = await scrape(client)
    assert phase(samples) == [0, 0, 0]
    assert ranks(samples) == [0, 0]
    assert value(samples, "engine_restarts_total") == 0
    client.engine.come_back()
    samples = await scrape(client)
    assert phase(samples) == [1, 0, 1]
    assert ranks(samples) == [1, 1]
    assert value(samples, "engine_restarts_total") == 1


async def test_requests_of_an_engine_that_died_have_no_tokens_in_the_next_one(connect: Connect) -> None:
    client = connect(FakeEngine(lambda request: outputs([97, 98])))
    client.engine.hold_after = 1
    call = asyncio.create_task(client.chat())
    await client.engine.until(lambda: client.engine.stats.steps == 1)
    request = client.engine.requests[0]
    client.engine.die()
    assert (await call).status == 503
    client.engine.come_back()
    client.engine.hold_after = None
    await client.chat()
    before = await scrape(client)
    client.engine._step(made(request.request_id))
    after = await scrape(client)
    name = "inter_token_latency_seconds_count"
    assert value(after, name) == value(before, name) == 1


async def test_labels_cannot_be_made_up_by_clients(connect: Connect) -> None:
    client = connect()
    before = len(await scrape(client))
    for number in range(30):
        await client.call(f"METHOD{number}", f"/path{number}", headers={"x-request-id": f"id{number}"})
        await client.call("GET", f"/v1/models/model{number}")
    text = (await client.call("GET", "/metrics")).body.decode()
    # Two series of counters and one histogram more for a made-up path, one counter for an unknown model.
    assert len(read(text)) < before + 3 * 25
    assert "METHOD3" not in text
    assert "path3" not in text
    assert "model3" not in text


async def test_names_are_as_prometheus_wants_them(connect: Connect) -> None:
    client = connect()
    await client.chat()
    text = (await client.call("GET", "/metrics")).body.decode()
    families = list(text_string_to_metric_families(text))
    assert len(families) > 30
    for family in families:
        assert family.documentation
        assert family.name.startswith(("pronk_", "process_"))
        assert ":" not in family.name
        assert family.type in ("counter", "gauge", "histogram")
        assert not (family.type != "counter" and family.name.endswith(("_total", "_count", "_sum")))
        assert all("model" in sample.labels for sample in family.samples if family.name.startswith("pronk_"))
    assert "_created" not in text
    reasons = {dict(labels).get("reason") for name, labels in read(text) if name.endswith("rejections_total")}
    assert reasons == set(REJECTIONS)


def gaps_of(steps: Iterable[tuple[float, list[Output]]]) -> BucketCounts:
    gaps = BucketCounts("gaps", "Gaps.", INTER_TOKEN_LATENCY, {"model": "m"})
    clock = TokenClock(gaps)
    for now, made in steps:
        clock.tick(Step(made, EngineStats()), now)
    return gaps


def made(request_id: str, tokens: int = 1, finish: str | None = None) -> Output:
    return Output(request_id=request_id, token_ids=[1] * tokens, finish_reason=finish)  # type: ignore[arg-type]


def test_gaps_between_tokens() -> None:
    gaps = gaps_of(
        [
            (10.0, [made("a")]),
            (10.5, [made("a"), made("b")]),
            (11.5, [made("a", 2), made("b")]),  # two tokens of a in one second: half a second each
            (13.5, [made("a", 1, "stop"), made("b", 0)]),
            (20.0, [made("a"), made("b", 1, "length")]),  # a is another request by now
        ]
    )
    (family,) = gaps.collect()
    samples = {sample.name + str(sample.labels.get("le", "")): sample.value for sample in family.samples}
    assert samples["gaps_count"] == 6
    assert samples["gaps_sum"] == pytest.approx(0.5 + 2 * 0.5 + 1 + 2 + 8.5)
    assert samples["gaps_bucket0.4"] == 0
    assert samples["gaps_bucket0.5"] == 3
    assert samples["gaps_bucket1.0"] == 4
    assert samples["gaps_bucket2.5"] == 5
    assert samples["gaps_bucket10.0"] == samples["gaps_bucket+Inf"] == 6


def test_ended_requests_are_forgotten() -> None:
    gaps = BucketCounts("gaps", "Gaps.", INTER_TOKEN_LATENCY, {"model": "m"})
    clock = TokenClock(gaps)
    for number in range(1000):
        clock.tick(Step([made(f"r{number}")], EngineStats()), number)
        clock.tick(Step([made(f"r{number}", 0, "abort")], EngineStats()), number)
    assert len(vars(clock)["_last"]) == 0


def test_buckets_rise() -> None:
    for buckets in (TIME_TO_FIRST_TOKEN, INTER_TOKEN_LATENCY):
        assert list(buckets) == sorted(set(buckets))
