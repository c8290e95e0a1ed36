"""POST /v1/chat/completions: a request's way from JSON to the engine and back."""

from __future__ import annotations

import time
import uuid

from fastapi import APIRouter
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from pronk.server.answering import GenerationResponse, read_request
from pronk.server.chat.chunks import ChunkWriter, Head, Wanted, completion_body
from pronk.server.generation import Generation, Prompt
from pronk.server.protocol.chat import ChatCompletionRequest
from pronk.server.protocol.common import parse, schema_of
from pronk.server.record import RequestRecord
from pronk.server.routes.models import unknown_model
from pronk.server.service import ServedModel, Service

router = APIRouter()


@router.post(
    "/v1/chat/completions",
    summary="Create a chat completion",
    responses={"4XX": {"description": "OpenAI's error object"}},
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": schema_of(ChatCompletionRequest)}},
        }
    },
)
async def create_chat_completion(request: HTTPRequest) -> Response:
    """OpenAI's chat completions, streamed or whole."""
    service: Service = request.app.state.service
    record: RequestRecord = request.state.record
    model = service.require()
    asked, prompt = await read_request(request, lambda body: _read(body, service, model, record))
    # Whatever has changed meanwhile: nothing is handed to an engine that drains or is gone.
    model = service.require()
    generation = Generation(
        [prompt],
        request_id=f"chatcmpl-{uuid.uuid4().hex}",
        model=model,
        record=record,
        cache_salt=request.state.cache_salt,
    )
    head = Head(generation.request_id, int(time.time()), asked.model)
    wanted = Wanted(logprobs=bool(asked.logprobs), usage=asked.include_usage)
    writer = ChunkWriter(head, wanted, model.vocabulary, record, num_choices=generation.num_completions)
    return GenerationResponse(
        generation,
        body=lambda answers: completion_body(head, wanted, model.vocabulary, record, answers),
        writer=writer if asked.stream else None,
        names={"max_tokens": asked.length_field, "prompt": "messages"},
    )


def _read(
    body: bytes, service: Service, model: ServedModel, record: RequestRecord
) -> tuple[ChatCompletionRequest, Prompt]:
    """JSON -> the checked request, and what the engine is told: the prompt's token ids and parameters."""
    asked = parse(ChatCompletionRequest, body)
    if asked.model not in service.names:
        raise unknown_model(asked.model, service)
    params = asked.sampling_params(model.defaults)
    start = time.perf_counter()
    prompt = model.render([message.model_dump(exclude_none=True) for message in asked.messages])
    record.render_seconds = time.perf_counter() - start
    return asked, Prompt(prompt, [params])
