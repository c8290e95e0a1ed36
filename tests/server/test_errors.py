"""One table: every error of ours has its answer, in OpenAI's shape, and none tells what only the operator may know."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pronk.engine import errors
from pronk.engine.errors import PronkError
from pronk.engine.request import Output
from pronk.server.errors import (
    ANSWERS,
    INTERNAL,
    APIError,
    QueueFullError,
    answer_of,
    body_of,
    error_body,
    headers_of,
)
from pronk.server.metrics import REJECTIONS

from .conftest import Connect
from .fakes import FakeEngine, outputs


def subclasses(kind: type[PronkError]) -> set[type[PronkError]]:
    return {kind}.union(*(subclasses(sub) for sub in kind.__subclasses__()))


KINDS = sorted(subclasses(PronkError) - {APIError}, key=lambda kind: kind.__name__)
PRIVATE = "/home/llama/models/secret\nTraceback (most recent call last):"
ABOUT_THE_OPERATOR = (errors.EngineStartError, errors.CheckpointError, errors.ConfigError)


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_has_an_answer(kind: type[PronkError]) -> None:
    error = kind("a sentence")
    answer = answer_of(error)
    assert answer.reason in (*REJECTIONS, "")
    body = json.loads(body_of(error))
    assert list(body) == ["error"]
    assert sorted(body["error"]) == ["code", "message", "param", "type"]
    assert isinstance(body["error"]["code"], str)
    assert isinstance(body["error"]["type"], str)
    assert body["error"]["message"]
    # A client's fault is the only thing that is not ours.
    assert (answer.status < 500) == isinstance(error, errors.RequestError | QueueFullError)
    assert (answer.type == "server_error") == (answer.status >= 500)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if issubclass(kind, ABOUT_THE_OPERATOR)])
def test_what_is_the_operators_is_not_told(kind: type[PronkError]) -> None:
    told = body_of(kind(PRIVATE)).decode()
    assert "llama" not in told
    assert "Traceback" not in told
    assert "log" in told


def test_the_most_special_class_wins() -> None:
    class NewError(errors.ContextLengthError):
        pass

    assert answer_of(NewError("x", "messages")) is ANSWERS[errors.ContextLengthError]


@pytest.mark.parametrize(
    ("answer", "headers"),
    [
        (ANSWERS[QueueFullError], {"retry-after": "5", "x-should-retry": "true"}),
        (ANSWERS[errors.EngineDrainingError], {"retry-after": "5", "x-should-retry": "true"}),
        (ANSWERS[errors.NonFiniteLogitsError], {"x-should-retry": "false"}),
        (INTERNAL, {"x-should-retry": "false"}),
        (ANSWERS[errors.ContextLengthError], {}),
    ],
)
def test_clients_are_told_whether_to_come_again(answer: Any, headers: dict[str, str]) -> None:
    assert headers_of(answer) == headers


def test_an_error_body_escapes_what_it_quotes() -> None:
    body = json.loads(error_body('"\n\u2028\x00', INTERNAL))
    assert body["error"]["message"] == '"\n\u2028\x00'


async def failing(connect: Connect, output: Output, *, first: bool, stream: bool) -> Any:
    script = [output] if first else [*outputs([97, 98, 99])[:2], output]
    return await connect(FakeEngine(lambda request: script)).chat(stream=stream)


CASES = [
    ("InvalidParameterError", 400, "invalid_value", "invalid_request_error"),
    ("ContextLengthError", 400, "context_length_exceeded", "invalid_request_error"),
    ("NonFiniteLogitsError", 500, "nonfinite_logits", "server_error"),
    ("SomethingElse", 500, "request_failed", "server_error"),
    ("Exception", 500, "request_failed", "server_error"),
    (None, 500, "request_failed", "server_error"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("kind", "status", "code", "type_"), CASES)
async def test_the_engine_says_by_name_what_a_request_failed_of(
    connect: Connect, kind: str | None, status: int, code: str, type_: str, stream: bool
) -> None:
    output = Output(request_id="", finish_reason="error", error="it cannot be", error_kind=kind)
    reply = await failing(connect, output, first=True, stream=stream)
    assert reply.status == status
    assert (reply.error["code"], reply.error["type"]) == (code, type_)
    assert "it cannot be" in reply.error["message"]


@pytest.mark.parametrize(("kind", "status", "code", "type_"), CASES)
async def test_after_the_first_byte_an_error_is_an_event_and_the_end(
    connect: Connect, kind: str | None, status: int, code: str, type_: str
) -> None:
    output = Output(request_id="", finish_reason="error", error="it cannot be", error_kind=kind)
    reply = await failing(connect, output, first=False, stream=True)
    assert reply.status == 200
    *_, last = reply.events
    assert (last["error"]["code"], last["error"]["type"]) == (code, type_)
    assert sorted(last["error"]) == ["code", "message", "param", "type"]


async def test_a_whole_answer_that_fails_late_is_an_http_error(connect: Connect) -> None:
    output = Output(request_id="", finish_reason="error", error="it cannot be", error_kind="NonFiniteLogitsError")
    reply = await failing(connect, output, first=False, stream=False)
    assert (reply.status, reply.error["code"]) == (500, "nonfinite_logits")
    assert reply.headers["x-should-retry"] == "false"


async def test_health_tells_no_path_either(connect: Connect) -> None:
    client = connect(ready=False)
    client.service.fail(errors.CheckpointNotFoundError(PRIVATE))
    reply = await client.call("GET", "/health")
    assert reply.status == 503
    assert "llama" not in reply.body.decode()


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "PATCH"])
@pytest.mark.parametrize(
    "path", ["/", "/v1", "/v1/chat/completions/", "/v1//models", "/docs", "/../etc/passwd", "/%00"]
)
async def test_paths_that_do_not_exist(connect: Connect, method: str, path: str) -> None:
    reply = await connect().call(method, path)
    assert (reply.status, reply.error["code"]) in ((404, "unknown_url"), (405, "method_not_allowed"))
    assert reply.headers["x-request-id"]
