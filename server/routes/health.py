"""GET /health: whether a request sent now would be answered; and what else monitors ask: /ping, /version, /load.

/health and /ping need no key.
"""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

import pronk
from pronk.server.errors import RETRY_AFTER_SECONDS, message_of
from pronk.server.service import Phase, Service

router = APIRouter()

_STATUS = {
    "type": "object",
    "required": ["status"],
    "properties": {"status": {"type": "string"}, "reason": {"type": "string"}},
}
READINESS: dict[int | str, dict[str, Any]] = {
    503: {"description": "Not now", "content": {"application/json": {"schema": _STATUS}}}
}


@router.post("/ping", summary="Readiness, as /health", responses=READINESS)
@router.get("/ping", summary="Readiness, as /health", responses=READINESS)
@router.head("/health", include_in_schema=False)
@router.get("/health", summary="Readiness", responses=READINESS)
async def health(request: Request) -> Response:
    """200 when a token can be made; 503 while the model loads, while the server drains, and while the engine is
    gone, until it is up again."""
    service: Service = request.app.state.service
    phase = service.phase
    body = {"status": phase.value}
    if service.failure is not None:
        body["reason"] = message_of(service.failure)
    if phase is Phase.READY:
        return Response(msgspec.json.encode(body), 200, media_type="application/json")
    headers = {"retry-after": str(RETRY_AFTER_SECONDS)}
    return Response(msgspec.json.encode(body), 503, headers, "application/json")


@router.get("/version", summary="Version")
async def version() -> Response:
    """Of Pronk."""
    return _json({"version": pronk.__version__})


@router.get("/load", summary="Load")
async def load(request: Request) -> Response:
    """How many requests the engine has, how many of them wait, and the share of the KV cache that is in use."""
    service: Service = request.app.state.service
    stats = service.require().engine.stats
    return _json(
        {
            "server_load": stats.num_running + stats.num_waiting,
            "running": stats.num_running,
            "waiting": stats.num_waiting,
            "kv_cache_usage": stats.blocks_used / stats.blocks_total if stats.blocks_total else 0.0,
        }
    )


def _json(body: dict[str, Any]) -> Response:
    return Response(msgspec.json.encode(body), media_type="application/json")
