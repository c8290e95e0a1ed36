"""Keys: every route is closed without one but /health, in whatever way the header is written."""

from __future__ import annotations

from typing import Any

import pytest

from pronk.server.auth import OPEN_PATHS, Keys
from pronk.server.errors import APIError

from .conftest import Connect


def routes_of(app: Any) -> list[tuple[str, str]]:
    """(method, path) of every operation that the application describes, and of its description."""
    paths = app.openapi()["paths"]
    described = [(method.upper(), path) for path, operations in paths.items() for method in operations]
    return [*described, ("GET", "/openapi.json")]


async def test_every_route_needs_a_key_but_health(connect: Connect) -> None:
    client = connect(api_keys=("secret",))
    routes = routes_of(client.app)
    assert len(routes) >= 6
    for method, path in routes:
        reply = await client.call(method, path.replace("{model_id}", "tiny"))
        if path in OPEN_PATHS:
            assert reply.status == 200
        else:
            assert (reply.status, reply.error["code"]) == (401, "invalid_api_key"), path
            assert reply.headers["www-authenticate"] == "Bearer"
        with_key = await client.call(
            method, path.replace("{model_id}", "tiny"), headers={"Authorization": "Bearer secret"}
        )
        assert with_key.status in (200, 400, 404), path


@pytest.mark.parametrize("path", ["/nope", "/v1/chat/completions", "/health/", "/health/../metrics", "//health"])
async def test_what_does_not_exist_is_closed_too(connect: Connect, path: str) -> None:
    assert (await connect(api_keys=("secret",)).call("GET", path)).status == 401


async def test_a_host_header_cannot_open_a_path(connect: Connect) -> None:
    client = connect(api_keys=("secret",))
    reply = await client.call("GET", "/metrics", headers={"Host": "x/health?", "X-Forwarded-Path": "/health"})
    assert reply.status == 401


GOOD = ["Bearer one", "bearer one", "BEARER   one ", "Bearer two", "Bearer schlüssel"]
BAD = ["", "Bearer", "Bearer ", "one", "Basic one", "Bearer One", "Bearer one two", "Bearer one,two", "Bearer \xff"]
KEYS = Keys(["one", " two ", "schlüssel"])


@pytest.mark.parametrize("header", GOOD)
def test_good_headers(header: str) -> None:
    assert KEYS.salt_for([(b"authorization", header.encode())])


@pytest.mark.parametrize("header", BAD)
def test_bad_headers(header: str) -> None:
    with pytest.raises(APIError) as caught:
        KEYS.salt_for([(b"authorization", header.encode("latin-1"))])
    assert caught.value.answer.status == 401


def test_two_headers_are_one_too_many() -> None:
    with pytest.raises(APIError):
        KEYS.salt_for([(b"authorization", b"Bearer one"), (b"authorization", b"Bearer one")])


def test_salts_tell_keys_apart_and_not_what_they_are() -> None:
    one, two = (KEYS.salt_for([(b"authorization", b"Bearer " + key)]) for key in (b"one", b"two"))
    assert one != two
    assert Keys(["two", "one"]).salt_for([(b"authorization", b"Bearer one")]) == one
    assert Keys([]).salt_for([]) == ""
