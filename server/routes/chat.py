"""POST /v1/chat/completions: a request's way from JSON to the engine and back."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator
from functools import partial
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pronk.engine.errors import RequestError
from pronk.engine.request import Request, SamplingParams
from pronk.server.body import read_body
from pronk.server.protocol.chat import ChatCompletionRequest
from pronk.server.protocol.common import parse, schema_of
from pronk.server.record import RequestRecord
from pronk.server.routes.models import unknown_model
from pronk.server.service import ServedModel, Service
from pronk.server.streaming import (
    Answer,
    Assembler,
    ChunkWriter,
    Delta,
    collect,
    deltas,
    sse,
    to_json,
    unless_disconnected,
    usage_of,
)

router = APIRouter()

# Shorter bodies are read on the spot, within a few milliseconds; a longer one would hold up other streams.
INLINE_BYTES = 16_384


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
    body = await read_body(request.receive, request.app.state.config.max_body_bytes)
    read = partial(_read, body, service, model, record)
    asked, params, prompt = read() if len(body) <= INLINE_BYTES else await asyncio.to_thread(read)
    # Whatever has changed meanwhile: nothing is handed to an engine that drains or is gone.
    model = service.require()
    completion = Request(
        request_id=f"chatcmpl-{uuid.uuid4().hex}", prompt=prompt, params=params, cache_salt=request.state.cache_salt
    )
    return ChatCompletion(asked, completion, model, record)


def _read(
    body: bytes, service: Service, model: ServedModel, record: RequestRecord
) -> tuple[ChatCompletionRequest, SamplingParams, list[int]]:
    """JSON -> the checked request, and what the engine is told: parameters and the prompt's token ids."""
    asked = parse(ChatCompletionRequest, body)
    if asked.model not in service.names:
        raise unknown_model(asked.model, service)
    params = asked.sampling_params(model.defaults)
    start = time.perf_counter()
    prompt = model.render([message.model_dump(exclude_none=True) for message in asked.messages])
    record.render_seconds = time.perf_counter() - start
    record.prompt_tokens = len(prompt)
    return asked, params, prompt


class ChatCompletion(Response):
    """The response: asks the engine when it is sent, so that leaving the client's connection ends the asking."""

    def __init__(
        self, asked: ChatCompletionRequest, completion: Request, model: ServedModel, record: RequestRecord
    ) -> None:
        super().__init__()
        self._asked = asked
        self._completion = completion
        self._model = model
        self._record = record
        self._created = int(time.time())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if self._asked.stream:
                await unless_disconnected(receive, self._stream(send))
            else:
                await self._whole(scope, receive, send)
        except RequestError as error:
            error.param = self._client_name_of(error.param)
            raise

    async def _stream(self, send: Send) -> None:
        writer = ChunkWriter(
            completion_id=self._completion.request_id,
            created=self._created,
            model=self._asked.model,
            logprobs=bool(self._asked.logprobs),
            usage=self._asked.include_usage,
        )
        await sse(self._deltas(), writer, self._record, send, include_usage=self._asked.include_usage)

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = await unless_disconnected(receive, collect(self._deltas()))
        await Response(to_json(self._body(answer)), media_type="application/json")(scope, receive, send)

    def _deltas(self) -> AsyncGenerator[Delta, None]:
        params: SamplingParams = self._completion.params
        assembler = Assembler(self._model.vocabulary, params, self._model.eos_token_ids)
        return deltas(self._model.engine.generate(self._completion), assembler, self._record)

    def _body(self, answer: Answer) -> dict[str, Any]:
        logprobs = {"content": answer.logprobs, "refusal": None} if self._asked.logprobs else None
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": logprobs,
            "finish_reason": answer.finish_reason,
        }
        return {
            "id": self._completion.request_id,
            "object": "chat.completion",
            "created": self._created,
            "model": self._asked.model,
            "choices": [choice],
            "usage": usage_of(self._record),
        }

    def _client_name_of(self, param: str | None) -> str | None:
        """The engine's name of a field -> the name that this request used for it."""
        return {"max_tokens": self._asked.length_field, "prompt": "messages"}.get(param or "", param)
