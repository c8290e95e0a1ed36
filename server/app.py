"""create_app: the routes, what surrounds them, and the answers to paths and methods that do not exist.

Knows which routes there are; what they do stands in `routes`. The application answers from the first second: what
needs the model says 503 until `service` is ready.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

import pronk
from pronk.server.auth import OPEN_PATHS, Auth, Keys
from pronk.server.config import ServerConfig
from pronk.server.cors import Cors
from pronk.server.envelope import Envelope
from pronk.server.errors import OTHER_REFUSAL, UNKNOWN_ROUTE, WRONG_METHOD, APIError, body_of
from pronk.server.metrics import Metrics
from pronk.server.openapi import complete
from pronk.server.responses.store import ResponseStore
from pronk.server.routes import chat, completions, health, metrics, models, responses, tokenize
from pronk.server.service import Service

STORED_RESPONSES_BYTES = 64 << 20
STORED_RESPONSES_SECONDS = 3600.0


class _Application(FastAPI):
    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            self.openapi_schema = complete(super().openapi(), open_paths=OPEN_PATHS)
        return self.openapi_schema


def create_app(service: Service, config: ServerConfig, *, registry: CollectorRegistry | None = None) -> FastAPI:
    """registry: where the metrics are registered; a new one by default. -> the ASGI application."""
    app = _Application(
        title="Pronk",
        version=pronk.__version__,
        description="OpenAI's API for the Llama 3.2 family.",
        # Their pages load scripts from elsewhere; the description itself stays at /openapi.json.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.service = service
    app.state.config = config
    app.state.metrics = Metrics(registry or CollectorRegistry(), service)
    app.state.responses = ResponseStore(
        max_responses=config.max_stored_responses,
        max_bytes=STORED_RESPONSES_BYTES,
        max_age_seconds=STORED_RESPONSES_SECONDS,
    )
    for module in (chat, completions, responses, tokenize, models, health, metrics):
        app.include_router(module.router)
    app.add_exception_handler(HTTPException, _refuse)
    # The last one added is the outermost.
    app.add_middleware(Auth, keys=Keys(config.api_keys))
    app.add_middleware(Envelope, ended=app.state.metrics.ended, cors=Cors(config.allowed_origins))
    return app


async def _refuse(request: Request, error: Exception) -> Response:
    """The framework's own refusals, in OpenAI's shape."""
    if not isinstance(error, HTTPException):
        raise error
    if error.status_code == 404:
        told = APIError(f"There is no {request.method} {request.url.path} here.", UNKNOWN_ROUTE)
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        told = APIError(f"{request.url.path} takes {allowed}, not {request.method}.", WRONG_METHOD)
    else:
        told = APIError(str(error.detail), dataclasses.replace(OTHER_REFUSAL, status=error.status_code))
    request.scope["state"]["record"].rejection = told.answer.reason
    return Response(body_of(told), told.answer.status, dict(error.headers or {}), "application/json")
