"""CORS: off unless asked for; what a browser needs to let a page read an answer, an error's too; preflights."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from pronk.engine.errors import ConfigError
from pronk.server.config import ServerConfig

from .conftest import Connect
from .fakes import Reply

PAGE = "http://localhost:3000"
# What the official JavaScript client sends from a page.
ASKED = "authorization,content-type,x-stainless-arch,x-stainless-lang,x-stainless-os,x-stainless-retry-count"


async def preflight(client: Any, origin: str = PAGE, **headers: str) -> Reply:
    asked = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": ASKED,
        **{name.replace("_", "-"): value for name, value in headers.items()},
    }
    return await client.call("OPTIONS", "/v1/chat/completions", headers=asked)


def allowed_for(reply: Reply) -> str | None:
    return reply.headers.get("access-control-allow-origin")


async def test_it_is_off_by_default(connect: Connect) -> None:
    client = connect()
    reply = await client.call("GET", "/health", headers={"Origin": PAGE})
    assert not any(name.startswith("access-control") for name in reply.headers)
    assert (await preflight(client)).status == 405


async def test_a_preflight_is_answered_before_keys_are_looked_at(connect: Connect) -> None:
    reply = await preflight(connect(api_keys=("secret",), allowed_origins=(PAGE,)))
    assert reply.status == 204
    assert reply.body == b""
    assert allowed_for(reply) == PAGE
    assert "POST" in reply.headers["access-control-allow-methods"]
    # By name: a browser does not take * for authorization.
    assert set(ASKED.split(",")) <= set(reply.headers["access-control-allow-headers"].split(","))
    assert int(reply.headers["access-control-max-age"]) > 0
    assert reply.headers["x-request-id"]


@pytest.mark.parametrize("asked", ["authorization\r\nx-evil: 1", "a b", "x" * 5000, ""])
async def test_a_preflight_with_odd_header_names_gets_the_usual_ones(connect: Connect, asked: str) -> None:
    client = connect(allowed_origins=(PAGE,))
    reply = await preflight(client, Access_Control_Request_Headers=asked)
    assert reply.headers["access-control-allow-headers"] == "authorization, content-type"


async def test_a_page_of_the_internet_may_ask_a_server_of_this_network_only_when_allowed(connect: Connect) -> None:
    client = connect(allowed_origins=(PAGE,))
    private = "access-control-allow-private-network"
    assert private not in (await preflight(client)).headers
    assert (await preflight(client, Access_Control_Request_Private_Network="true")).headers[private] == "true"
    other = await preflight(client, origin="https://evil.example", Access_Control_Request_Private_Network="true")
    assert allowed_for(other) is None


async def test_an_options_that_is_no_preflight_goes_on(connect: Connect) -> None:
    client = connect(allowed_origins=("*",))
    assert (await client.call("OPTIONS", "/v1/models", headers={"Origin": PAGE})).status == 405
    assert (await client.call("OPTIONS", "/v1/models")).status == 405


@pytest.mark.parametrize("origin", [PAGE, "HTTP://LOCALHOST:3000"])
async def test_answers_and_errors_can_be_read(connect: Connect, origin: str) -> None:
    client = connect(allowed_origins=(PAGE, "https://app.example"))
    for path, status in (("/health", 200), ("/v1/models", 200), ("/nope", 404), ("/v1/models/gpt", 404)):
        reply = await client.call("GET", path, headers={"Origin": origin})
        assert reply.status == status
        assert allowed_for(reply) == origin
        assert "x-request-id" in reply.headers["access-control-expose-headers"]
        assert reply.headers["vary"] == "Origin"


async def test_a_refused_key_can_be_read(connect: Connect) -> None:
    client = connect(api_keys=("secret",), allowed_origins=(PAGE,))
    reply = await client.call("GET", "/v1/models", headers={"Origin": PAGE})
    assert reply.status == 401
    assert allowed_for(reply) == PAGE


async def test_a_stream_can_be_read(connect: Connect) -> None:
    client = connect(allowed_origins=(PAGE,))
    body = b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "stream": true}'
    reply = await client.call("POST", "/v1/chat/completions", body, headers={"Origin": PAGE})
    assert reply.status == 200
    assert allowed_for(reply) == PAGE
    assert reply.events[-1] == "[DONE]"


@pytest.mark.parametrize("origin", ["http://localhost:3001", "http://localhost", "null", PAGE + ".evil.example"])
async def test_other_pages_cannot(connect: Connect, origin: str) -> None:
    client = connect(allowed_origins=(PAGE,))
    reply = await client.call("GET", "/health", headers={"Origin": origin})
    assert allowed_for(reply) is None
    assert reply.headers["vary"] == "Origin"
    assert allowed_for(await preflight(client, origin=origin)) is None
    assert allowed_for(await client.call("GET", "/health")) is None


async def test_every_page(connect: Connect) -> None:
    client = connect(allowed_origins=("*",))
    reply = await client.call("GET", "/health", headers={"Origin": "https://anything.example"})
    assert allowed_for(reply) == "*"
    assert "vary" not in reply.headers
    assert "access-control-allow-credentials" not in reply.headers


@pytest.mark.parametrize(
    "origin", ["localhost:3000", "http://localhost:3000/", "http://", "https://a b", "**", "http://x/y", ""]
)
def test_what_is_no_origin_is_refused_at_start(origin: str) -> None:
    with pytest.raises(ConfigError, match="--allowed-origins"):
        ServerConfig(allowed_origins=(origin,))


@pytest.mark.parametrize(
    "origin", ["*", "null", "http://[::1]:8080", "chrome-extension://abcdef", "https://example.com"]
)
def test_what_is_one_is_taken(origin: str) -> None:
    assert ServerConfig(allowed_origins=(origin,)).allowed_origins == (origin,)


async def test_a_preflight_is_counted_and_has_no_path_of_the_clients(connect: Connect) -> None:
    client = connect(allowed_origins=(PAGE,))
    await asyncio.gather(*(preflight(client) for _ in range(3)))
    text = (await client.call("GET", "/metrics")).body.decode()
    assert 'pronk_http_requests_total{code="204",method="OPTIONS",model="tiny",route="other"} 3.0' in text
