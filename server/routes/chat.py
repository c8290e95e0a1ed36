"""POST /v1/chat/completions: a request's way from JSON to the engine and back."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from pronk.engine.request import SamplingParams
from pronk.server.answering import GenerationResponse, check_grammar, read_request
from pronk.server.beam import BeamSearch
from pronk.server.chat.chunks import ChunkWriter, Wanted, completion_body
from pronk.server.generation import Generation, Prompt
from pronk.server.openapi import STREAMS
from pronk.server.protocol.chat import ChatCompletionRequest, Constraint
from pronk.server.protocol.common import parse, schema_of
from pronk.server.protocol.sampling import choices, first
from pronk.server.record import RequestRecord
from pronk.server.routes.models import unknown_model
from pronk.server.service import ServedModel, Service
from pronk.server.shapes import Head

router = APIRouter()


@dataclass(frozen=True)
class Read:
    """A request that was read: what it asks, and what the engine is told."""

    asked: ChatCompletionRequest
    constraint: Constraint
    params: SamplingParams
    """Of the first choice."""
    prompt: list[int]


@router.post(
    "/v1/chat/completions",
    summary="Create a chat completion",
    responses=STREAMS,
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
    read = await read_request(request, lambda body: read_chat(body, service, model, record))
    await _check_constraint(model, read)
    # Whatever has changed meanwhile: nothing is handed to an engine that drains or is gone.
    model = service.admit(read.asked.num_choices)
    generation = _generation(read, request, model, record)
    return _answer(read, generation, model, record)


async def _check_constraint(model: ServedModel, read: Read) -> None:
    """Raises InvalidParameterError that names the field: that of the form, if it is to blame, else that of tools."""
    constraint = read.constraint
    await check_grammar(model, constraint.form, read.asked.grammar_field)
    if constraint.grammar is not constraint.form:
        await check_grammar(
            model, constraint.grammar, read.asked.tools_field, read.asked.parameters_of(constraint.tools)
        )


def _generation(read: Read, request: HTTPRequest, model: ServedModel, record: RequestRecord) -> Generation | BeamSearch:
    asked = read.asked
    request_id = f"chatcmpl-{uuid.uuid4().hex}"
    salt, priority = asked.salt(request.state.cache_salt), asked.engine_priority
    if asked.use_beam_search:
        return BeamSearch(
            [read.prompt],
            read.params,
            width=asked.num_choices,
            length_penalty=first(asked.length_penalty, 1.0),
            request_id=request_id,
            model=model,
            record=record,
            cache_salt=salt,
            priority=priority,
        )
    return Generation(
        [Prompt(read.prompt, choices(read.params, asked.num_choices, request.app.state.config.engine.seed))],
        request_id=request_id,
        model=model,
        record=record,
        cache_salt=salt,
        priority=priority,
        tools=read.constraint.tools,
        form=read.constraint.form,
    )


def _answer(read: Read, generation: Generation | BeamSearch, model: ServedModel, record: RequestRecord) -> Response:
    asked, tools = read.asked, read.constraint.tools
    head = Head(generation.request_id, int(time.time()), asked.model)
    wanted = Wanted(
        logprobs=bool(asked.logprobs),
        prompt_logprobs=asked.prompt_logprobs is not None,
        token_ids=asked.return_token_ids,
        timings=asked.timings,
        usage=asked.include_usage,
        continuous_usage=asked.continuous_usage,
        function_call=tools is not None and tools.legacy,
    )
    vocabulary, prompt = model.vocabulary, read.prompt
    writer = ChunkWriter(head, wanted, vocabulary, record, prompt=prompt, num_choices=generation.num_completions)

    async def whole() -> dict[str, Any]:
        return completion_body(head, wanted, vocabulary, record, await generation.collect(), prompt=prompt)

    return GenerationResponse(
        generation,
        whole=whole,
        writer=writer if asked.stream else None,
        names={"max_tokens": asked.length_field, "prompt": "messages", "structured_outputs": asked.grammar_field},
    )


def read_chat(body: bytes, service: Service, model: ServedModel, record: RequestRecord) -> Read:
    """JSON -> the checked request, and what the engine is told. Raises APIError and InvalidParameterError."""
    asked = parse(ChatCompletionRequest, body)
    if asked.model not in service.names:
        raise unknown_model(asked.model, service)
    constraint = asked.constraint()
    params = asked.sampling_params(model.defaults, model.tokenizer, grammar=constraint.grammar)
    start = time.perf_counter()
    messages, options = asked.render_args(constraint.tools)
    prompt = asked.truncate(model.render(messages, **options), model.engine.info.max_model_len)
    record.render_seconds = time.perf_counter() - start
    return Read(asked, constraint, params, prompt)
