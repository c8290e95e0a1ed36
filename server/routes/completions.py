"""POST /v1/completions: a request's way from JSON to the engine and back."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from pronk.engine.request import SamplingParams
from pronk.server.answering import GenerationResponse, check_grammar, read_request
from pronk.server.beam import BeamSearch
from pronk.server.completing import CompletionWriter, Wanted, completion_body
from pronk.server.generation import Generation, Prompt
from pronk.server.openapi import STREAMS
from pronk.server.protocol.common import parse, schema_of
from pronk.server.protocol.completions import CompletionRequest
from pronk.server.protocol.sampling import choices, first
from pronk.server.record import RequestRecord
from pronk.server.routes.models import unknown_model
from pronk.server.service import ServedModel, Service
from pronk.server.shapes import Head

router = APIRouter()


@dataclass(frozen=True)
class Read:
    """A request that was read: what it asks, and what the engine is told."""

    asked: CompletionRequest
    params: SamplingParams
    """Of the first completion of each prompt."""
    prompts: list[list[int]]


@router.post(
    "/v1/completions",
    summary="Create a completion",
    responses=STREAMS,
    openapi_extra={
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema_of(CompletionRequest)}}}
    },
)
async def create_completion(request: HTTPRequest) -> Response:
    """OpenAI's older completions: a prompt goes on, streamed or whole; or it is only scored."""
    service: Service = request.app.state.service
    record: RequestRecord = request.state.record
    model = service.require()
    read = await read_request(request, lambda body: read_completion(body, service, model, record))
    asked = read.asked
    await check_grammar(model, read.params.grammar, asked.grammar_field)
    # Whatever has changed meanwhile: nothing is handed to an engine that drains or is gone.
    model = service.admit(len(read.prompts) * asked.num_made)
    generation = _generation(read, request, model, record)
    head = Head(generation.request_id, int(time.time()), asked.model)
    wanted = Wanted(
        n=asked.num_choices,
        made=asked.num_made,
        echo=asked.echo,
        logprobs=asked.logprobs,
        prompt_logprobs=asked.prompt_logprobs,
        token_ids=asked.return_token_ids,
        timings=asked.timings,
        usage=asked.include_usage,
        continuous_usage=asked.continuous_usage,
        skip_special_tokens=asked.skip_special_tokens,
    )

    async def whole() -> dict[str, Any]:
        return completion_body(head, wanted, model.vocabulary, record, await generation.collect(), read.prompts)

    return GenerationResponse(
        generation,
        whole=whole,
        writer=CompletionWriter(head, wanted, model.vocabulary, record, read.prompts) if asked.stream else None,
        names={"messages": "prompt", "structured_outputs": asked.grammar_field},
    )


def _generation(read: Read, request: HTTPRequest, model: ServedModel, record: RequestRecord) -> Generation | BeamSearch:
    asked = read.asked
    request_id = f"cmpl-{uuid.uuid4().hex}"
    salt, priority = asked.salt(request.state.cache_salt), asked.priority or 0
    if asked.use_beam_search:
        return BeamSearch(
            read.prompts,
            read.params,
            width=asked.num_choices,
            length_penalty=first(asked.length_penalty, 1.0),
            request_id=request_id,
            model=model,
            record=record,
            cache_salt=salt,
            priority=priority,
        )
    seed = request.app.state.config.engine.seed
    return Generation(
        [Prompt(prompt, choices(read.params, asked.num_made, seed)) for prompt in read.prompts],
        request_id=request_id,
        model=model,
        record=record,
        cache_salt=salt,
        priority=priority,
    )


def read_completion(body: bytes, service: Service, model: ServedModel, record: RequestRecord) -> Read:
    """JSON -> the checked request, and what the engine is told. Raises APIError and InvalidParameterError."""
    asked = parse(CompletionRequest, body)
    if asked.model not in service.names:
        raise unknown_model(asked.model, service)
    params = asked.sampling_params(model.defaults, model.tokenizer, grammar=asked.text_grammar())
    params = msgspec.structs.replace(params, prompt_logprobs=asked.num_prompt_logprobs)
    start = time.perf_counter()
    prompts = [asked.truncate(ids, model.engine.info.max_model_len) for ids in asked.prompts(model.tokenizer)]
    record.render_seconds = time.perf_counter() - start
    return Read(asked, params, prompts)
