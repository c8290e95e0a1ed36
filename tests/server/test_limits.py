"""How many may wait: who comes after is told so at once, and when to come again."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from pronk.engine.errors import ConfigError
from pronk.server.config import ServerConfig

from .conftest import Connect


async def waiting(client: Any, count: int, **fields: Any) -> list[asyncio.Task[Any]]:
    """Requests that the engine has, and does not begin."""
    client.engine.gate.clear()
    tasks = [asyncio.create_task(client.chat(**fields)) for _ in range(count)]
    await client.engine.until(lambda: len(client.engine.running) >= count)
    return tasks


@pytest.mark.parametrize("stream", [False, True])
async def test_one_too_many_is_a_429(connect: Connect, stream: bool) -> None:
    client = connect(max_waiting=3)
    tasks = await waiting(client, 3)
    reply = await client.chat(stream=stream)
    assert reply.status == 429
    assert reply.error["code"] == "rate_limit_exceeded"
    assert "Rate limit" in reply.error["message"]  # what LiteLLM looks for
    assert reply.headers["retry-after"] == "5"
    assert reply.headers["x-should-retry"] == "true"
    assert len(client.engine.requests) == 3
    client.engine.gate.set()
    assert [reply.status for reply in await asyncio.gather(*tasks)] == [200] * 3
    assert (await client.chat()).status == 200


async def test_what_runs_does_not_wait(connect: Connect) -> None:
    client = connect(max_waiting=1)
    client.engine.hold_after = 2
    first = asyncio.create_task(client.chat())
    await client.engine.until(lambda: client.engine.stats.num_running == 1)
    second = asyncio.create_task(client.chat())
    await client.engine.until(lambda: len(client.engine.running) == 2)
    assert (await client.chat()).status == 429
    client.engine.hold_after = None
    client.engine.gate.set()
    assert {(await first).status, (await second).status} == {200}


async def test_a_wrong_request_is_told_its_own_fault(connect: Connect) -> None:
    client = connect(max_waiting=1)
    tasks = await waiting(client, 1)
    assert (await client.chat(temperature=9)).status == 400
    assert (await client.chat(model="nope")).status == 404
    client.engine.gate.set()
    await asyncio.gather(*tasks)


async def test_each_answer_counts_but_one_request_is_never_too_many_alone(connect: Connect) -> None:
    client = connect(max_waiting=4)
    assert (await client.chat(n=8)).status == 200
    tasks = await waiting(client, 1)
    assert (await client.chat(n=4)).status == 429
    client.engine.gate.set()
    await asyncio.gather(*tasks)
    assert (await client.chat(n=4)).status == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", b'{"model": "tiny", "prompt": "x"}'),
        ("/v1/responses", b'{"model": "tiny", "input": "x"}'),
        ("/v1/responses", b'{"model": "tiny", "input": "x", "background": true}'),
    ],
)
async def test_every_way_to_ask_is_limited(connect: Connect, path: str, body: bytes) -> None:
    client = connect(max_waiting=1)
    tasks = await waiting(client, 1)
    reply = await client.call("POST", path, body)
    assert (reply.status, reply.error["code"]) == (429, "rate_limit_exceeded")
    client.engine.gate.set()
    await asyncio.gather(*tasks)
    assert (await client.call("POST", path, body)).status == 200


async def test_what_asks_no_engine_is_not_limited(connect: Connect) -> None:
    client = connect(max_waiting=1)
    tasks = await waiting(client, 1)
    assert (await client.call("GET", "/v1/models")).status == 200
    assert (await client.call("POST", "/tokenize", b'{"prompt": "x"}')).status == 200
    client.engine.gate.set()
    await asyncio.gather(*tasks)


async def test_refusals_are_counted_by_their_reason(connect: Connect) -> None:
    client = connect(max_waiting=1)
    tasks = await waiting(client, 1)
    await asyncio.gather(*(client.chat() for _ in range(3)))
    text = (await client.call("GET", "/metrics")).body.decode()
    assert 'pronk_request_rejections_total{model="tiny",reason="queue_full"} 3.0' in text
    client.engine.gate.set()
    await asyncio.gather(*tasks)


@pytest.mark.parametrize(
    ("flag", "values"),
    [
        ("max_waiting", {"max_waiting": 0}),
        ("keep_alive", {"keep_alive": -1.0}),
        ("keep_alive", {"keep_alive": float("nan")}),
        ("stream_timeout", {"stream_timeout": 0.5}),
    ],
)
def test_limits_that_cannot_be_kept_are_refused_at_start(flag: str, values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="--" + flag.replace("_", "-")):
        ServerConfig(**values)
