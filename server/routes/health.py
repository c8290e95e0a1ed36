"""GET /health: whether a request sent now would be answered. The one route that needs no key."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from pronk.server.errors import RETRY_AFTER_SECONDS
from pronk.server.service import Phase, Service

router = APIRouter()


@router.head("/health", include_in_schema=False)
@router.get("/health", summary="Readiness")
async def health(request: Request) -> Response:
    """200 when a token can be made; 503 while the model loads, while the server drains, and when the engine is gone."""
    service: Service = request.app.state.service
    phase = service.phase
    body = {"status": phase.value}
    if service.failure is not None:
        body["reason"] = str(service.failure)
    if phase is Phase.READY:
        return Response(msgspec.json.encode(body), 200, media_type="application/json")
    headers = {"retry-after": str(RETRY_AFTER_SECONDS)}
    return Response(msgspec.json.encode(body), 503, headers, "application/json")
