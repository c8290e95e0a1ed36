"""GET /metrics, for Prometheus."""

from __future__ import annotations

from fastapi import APIRouter
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

router = APIRouter()


@router.get("/metrics", summary="Metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Counters, gauges and histograms in Prometheus' text format."""
    return Response(request.app.state.metrics.expose(), headers={"content-type": CONTENT_TYPE_PLAIN_0_0_4})
