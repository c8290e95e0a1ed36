"""GET /v1/models and GET /v1/models/{id}: what can be asked for."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from pronk.server.errors import UNKNOWN_MODEL, APIError
from pronk.server.service import ServedModel, Service
from pronk.server.streaming import to_json

router = APIRouter()


def unknown_model(name: str, service: Service) -> APIError:
    """-> the 404 for a model that is not served. To be raised."""
    served = " or ".join(service.names)
    return APIError(f"The model '{name[:200]}' is not served here: ask for {served}.", UNKNOWN_MODEL, "model")


@router.get("/v1/models", summary="List models")
async def list_models(request: Request) -> Response:
    """Every name that the model is served under."""
    service: Service = request.app.state.service
    model = service.require()
    entries = [_describe(name, service, model) for name in service.names]
    return Response(to_json({"object": "list", "data": entries}), media_type="application/json")


# A Hub id has a slash in it, which clients send as it is or as %2F: both arrive as one path.
@router.get("/v1/models/{model_id:path}", summary="Describe a model", responses={"4XX": {"description": "Unknown"}})
async def describe_model(request: Request, model_id: str) -> Response:
    """One of the names of the list."""
    service: Service = request.app.state.service
    model = service.require()
    if model_id not in service.names:
        raise unknown_model(model_id, service)
    return Response(to_json(_describe(model_id, service, model)), media_type="application/json")


def _describe(name: str, service: Service, model: ServedModel) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": model.created,
        "owned_by": "pronk",
        "root": service.names[0],
        "parent": None,
        "max_model_len": model.engine.info.max_model_len,
    }
