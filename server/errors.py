"""Errors -> OpenAI's error bodies and status codes: one table for what the engine raises, one class for what HTTP adds.

Knows no route and no field. Every body that says no has this shape, also when the path, the method or the key is wrong:
`{"error": {"message", "type", "param", "code"}}`.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from pronk.engine.errors import (
    CheckpointError,
    ConfigError,
    ContextLengthError,
    EngineDeadError,
    EngineDrainingError,
    EngineStartError,
    InvalidParameterError,
    NonFiniteLogitsError,
    PronkError,
    RequestError,
)

INVALID_REQUEST = "invalid_request_error"
SERVER_ERROR = "server_error"
RETRY_AFTER_SECONDS = 5
MAX_MESSAGE, MAX_PARAM = 1000, 200
"""In characters."""
INTERNAL_MESSAGE = "The server met an error of its own; its log has the details."


@dataclass(frozen=True)
class Answer:
    """How one kind of error is told to a client.

    when: what has happened, for the reference page.
    reason: the `reason` label in `request_rejections_total`; empty: the error is not a refusal but a failure.
    retry_after: seconds after which trying again makes sense; None: it does not.
    message: told instead of the error's own, which is for the operator: it may hold a path or a traceback.
    """

    status: int
    type: str
    code: str | None
    when: str
    reason: str = "invalid"
    retry_after: int | None = None
    message: str | None = None


class APIError(PronkError):
    """A request that is refused before the engine sees it, for a reason that only HTTP or OpenAI's protocol knows."""

    def __init__(self, message: str, answer: Answer, param: str | None = None) -> None:
        super().__init__(message)
        self.answer = answer
        self.param = param


class QueueFullError(PronkError):
    """As many requests wait as may."""


class NotReadyError(PronkError):
    """The model is still loading."""


class RequestFailedError(PronkError):
    """The engine gave up this one request."""


BAD_JSON = Answer(400, INVALID_REQUEST, "invalid_json", "The body is not JSON in UTF-8, or not a JSON object.")
INVALID_TYPE = Answer(
    400, INVALID_REQUEST, "invalid_type", "A value is of the wrong type: strings are no numbers here."
)
INVALID_VALUE = Answer(
    400, INVALID_REQUEST, "invalid_value", "A value is out of range, contradicts another, or cannot be enforced."
)
MISSING = Answer(400, INVALID_REQUEST, "missing_required_parameter", "A field that must be there is not, or is null.")
UNKNOWN_PARAMETER = Answer(
    400, INVALID_REQUEST, "unknown_parameter", "A field has no meaning here, and ignoring it could change the answer."
)
UNSUPPORTED = Answer(
    400, INVALID_REQUEST, "unsupported_parameter", "What a field asks for is known, and not done by this server."
)
WRONG_KEY = Answer(401, INVALID_REQUEST, "invalid_api_key", "No API key, or one that is not accepted.", reason="auth")
UNKNOWN_MODEL = Answer(404, INVALID_REQUEST, "model_not_found", "The model is not served here.")
UNKNOWN_RESPONSE = Answer(
    404, INVALID_REQUEST, "response_not_found", "No such stored response, or not one of this key, or not any more."
)
UNKNOWN_ROUTE = Answer(404, INVALID_REQUEST, "unknown_url", "There is no such path.")
WRONG_METHOD = Answer(405, INVALID_REQUEST, "method_not_allowed", "The path is there, but not for this method.")
BODY_TIMEOUT = Answer(408, INVALID_REQUEST, "body_timeout", "The body did not arrive within a minute.")
BODY_TOO_LARGE = Answer(
    413, INVALID_REQUEST, "body_too_large", "The body is longer than 8 MiB.", reason="body_too_large"
)
NOT_HTTP = Answer(400, INVALID_REQUEST, "invalid_http", "What was sent is not HTTP/1.1.")
HEAD_TIMEOUT = Answer(408, INVALID_REQUEST, "head_timeout", "The request line and headers did not arrive in a minute.")
HEAD_TOO_LONG = Answer(431, INVALID_REQUEST, "head_too_long", "Request line and headers are longer than 64 KiB.")
OTHER_REFUSAL = Answer(400, INVALID_REQUEST, None, "What the HTTP framework refuses by itself.")
INTERNAL = Answer(
    500, SERVER_ERROR, "internal_error", "A fault of the server's own; its log has the details.", reason=""
)
_DID_NOT_START = Answer(
    503,
    SERVER_ERROR,
    "engine_down",
    "The engine did not start.",
    reason="engine_down",
    message="The engine did not start; the server's log says why.",
)

# The most special class wins: a class that is not listed is answered as its nearest listed base.
ANSWERS: dict[type[PronkError], Answer] = {
    PronkError: INTERNAL,
    RequestError: INVALID_VALUE,
    InvalidParameterError: INVALID_VALUE,
    ContextLengthError: Answer(
        400,
        INVALID_REQUEST,
        "context_length_exceeded",
        "The prompt, or it and the answer that was asked for, are longer than the model's context.",
        reason="context_length",
    ),
    QueueFullError: Answer(
        429,
        "rate_limit_error",
        "rate_limit_exceeded",
        "As many requests wait as may (`--max-waiting`).",
        reason="queue_full",
        retry_after=RETRY_AFTER_SECONDS,
    ),
    NonFiniteLogitsError: Answer(
        500, SERVER_ERROR, "nonfinite_logits", "The model produced NaN or infinity for this request.", reason=""
    ),
    RequestFailedError: Answer(500, SERVER_ERROR, "request_failed", "The engine gave up this one request.", reason=""),
    NotReadyError: Answer(
        503,
        SERVER_ERROR,
        "loading",
        "The model is still loading.",
        reason="loading",
        retry_after=RETRY_AFTER_SECONDS,
    ),
    EngineDrainingError: Answer(
        503,
        SERVER_ERROR,
        "draining",
        "The server is shutting down: it finishes what runs.",
        reason="draining",
        retry_after=RETRY_AFTER_SECONDS,
    ),
    EngineDeadError: Answer(
        503,
        SERVER_ERROR,
        "engine_down",
        "The engine is gone: it died or hung, and is being started again.",
        reason="engine_down",
        retry_after=RETRY_AFTER_SECONDS,
    ),
    EngineStartError: _DID_NOT_START,
    CheckpointError: _DID_NOT_START,
    ConfigError: _DID_NOT_START,
}


def answer_of(error: PronkError) -> Answer:
    """How to tell `error`."""
    if isinstance(error, APIError):
        return error.answer
    return next(ANSWERS[kind] for kind in type(error).__mro__ if kind in ANSWERS)


def message_of(error: PronkError) -> str:
    """-> the sentence that a client reads. Only what was raised on purpose is shown: it may name a field."""
    return answer_of(error).message or str(error)


def error_body(message: str, answer: Answer, param: str | None = None) -> bytes:
    """-> OpenAI's error object as JSON."""
    error = {
        "message": _cut(message, MAX_MESSAGE),
        "type": answer.type,
        "param": None if param is None else _cut(param, MAX_PARAM),
        "code": answer.code,
    }
    return msgspec.json.encode({"error": error})


def _cut(text: str, longest: int) -> str:
    """Names and values of the client's are told back to it, however long they are."""
    return text if len(text) <= longest else f"{text[:longest]}..."


def body_of(error: PronkError) -> bytes:
    """-> what a client reads about `error`."""
    return error_body(message_of(error), answer_of(error), getattr(error, "param", None))


def headers_of(answer: Answer) -> dict[str, str]:
    """-> the headers that come with `answer`, beside the content type.

    OpenAI's clients obey x-should-retry: without it they send a request three times to get the same 500 three times.
    """
    headers = {}
    if answer.retry_after is not None:
        headers["retry-after"] = str(answer.retry_after)
        headers["x-should-retry"] = "true"
    elif answer.status >= 500:
        headers["x-should-retry"] = "false"
    if answer.status == 401:
        headers["www-authenticate"] = "Bearer"
    return headers
