"""Texts and chats to tokens and back: /tokenize, /detokenize, /tokenizer_info; and prompts of requests: render."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from pronk.engine.client import check_prompt
from pronk.engine.request import SamplingParams
from pronk.server.answering import read_request
from pronk.server.errors import INVALID_VALUE, APIError
from pronk.server.protocol.chat import ChatCompletionRequest
from pronk.server.protocol.common import parse, read_object, schema_of, validate
from pronk.server.protocol.completions import CompletionRequest
from pronk.server.protocol.tokenize import DetokenizeRequest, TokenizeChatRequest, TokenizeTextRequest
from pronk.server.record import RequestRecord
from pronk.server.routes.chat import Read as ChatRead
from pronk.server.routes.chat import read_chat
from pronk.server.routes.completions import Read as CompletionRead
from pronk.server.routes.completions import read_completion
from pronk.server.routes.models import unknown_model
from pronk.server.service import ServedModel, Service
from pronk.server.streaming import to_json

router = APIRouter()
REFUSALS: dict[int | str, dict[str, Any]] = {"4XX": {"description": "OpenAI's error object"}}


def _body(*schemas: dict[str, Any]) -> dict[str, Any]:
    schema = schemas[0]
    if len(schemas) > 1:
        definitions = {name: part for one in schemas for name, part in one.pop("$defs", {}).items()}
        schema = {"anyOf": list(schemas), "$defs": definitions}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


@router.post(
    "/tokenize",
    summary="Tokens of a text or a chat",
    responses=REFUSALS,
    openapi_extra=_body(schema_of(TokenizeTextRequest), schema_of(TokenizeChatRequest)),
)
async def tokenize(request: HTTPRequest) -> Response:
    """The token ids that the model would read."""
    service: Service = request.app.state.service
    model = service.require()
    return await read_request(request, lambda body: _tokenize(body, service, model))


def _tokenize(body: bytes, service: Service, model: ServedModel) -> Response:
    data = read_object(body)
    is_chat = data.get("messages") is not None
    asked = validate(TokenizeChatRequest, data) if is_chat else validate(TokenizeTextRequest, data)
    _require_served(asked.model, service)
    if isinstance(asked, TokenizeChatRequest):
        messages, options = asked.render_args(asked.tool_calls())
        tokens = model.render(messages, **options)
    else:
        tokens = model.tokenizer.encode(asked.prompt)
    if asked.add_special_tokens:
        tokens = [model.tokenizer.bos_id, *tokens]
    return _json(
        {
            "count": len(tokens),
            "max_model_len": model.engine.info.max_model_len,
            "tokens": tokens,
            "token_strs": [_text_of(model, token) for token in tokens] if asked.return_token_strs else None,
        }
    )


@router.post(
    "/detokenize", summary="Text of tokens", responses=REFUSALS, openapi_extra=_body(schema_of(DetokenizeRequest))
)
async def detokenize(request: HTTPRequest) -> Response:
    """Special tokens are told by their spelling; bytes that are no text are told as U+FFFD."""
    service: Service = request.app.state.service
    model = service.require()
    return await read_request(request, lambda body: _detokenize(body, service, model))


def _detokenize(body: bytes, service: Service, model: ServedModel) -> Response:
    asked = parse(DetokenizeRequest, body)
    _require_served(asked.model, service)
    size = model.engine.info.vocab_size
    if not all(0 <= token < size for token in asked.tokens):
        raise APIError(f"tokens holds ids outside 0..{size - 1}.", INVALID_VALUE, "tokens")
    return _json({"prompt": model.tokenizer.decode(asked.tokens, skip_special_tokens=False)})


@router.get("/tokenizer_info", summary="The tokenizer")
async def tokenizer_info(request: HTTPRequest) -> Response:
    """What clients that count tokens ask: the spellings of special tokens, and sizes."""
    service: Service = request.app.state.service
    model = service.require()
    ends = [_text_of(model, token) for token in model.engine.info.eos_token_ids]
    return _json(
        {
            "tokenizer_class": "Tokenizer",
            "vocab_size": model.tokenizer.vocab_size,
            "model_max_length": model.engine.info.max_model_len,
            "bos_token": _text_of(model, model.tokenizer.bos_id),
            "eos_token": ends[0] if ends else None,
            "pad_token": None,
            "eos_tokens": ends,
        }
    )


@router.post(
    "/v1/chat/completions/render",
    summary="The prompt of a chat completion",
    responses=REFUSALS,
    openapi_extra=_body(schema_of(ChatCompletionRequest)),
)
async def render_chat(request: HTTPRequest) -> Response:
    """What the model would read for this very request, and how much of it is cached now; nothing is generated."""
    service: Service = request.app.state.service
    record: RequestRecord = request.state.record
    model = service.require()

    def read(body: bytes) -> tuple[ChatRead, dict[str, Any]]:
        understood = read_chat(body, service, model, record)
        return understood, _rendered(model, understood.prompt)

    understood, told = await read_request(request, read)
    salt = understood.asked.salt(request.state.cache_salt)
    cached = await _num_cached(model, understood.prompt, understood.params, salt)
    return _json({**told, "num_cached_tokens": cached})


@router.post(
    "/v1/completions/render",
    summary="The prompts of a completion",
    responses=REFUSALS,
    openapi_extra=_body(schema_of(CompletionRequest)),
)
async def render_completion(request: HTTPRequest) -> Response:
    """What the model would read for this very request, and how much of it is cached now: one entry a prompt; nothing
    is generated."""
    service: Service = request.app.state.service
    record: RequestRecord = request.state.record
    model = service.require()

    def read(body: bytes) -> tuple[CompletionRead, list[dict[str, Any]]]:
        understood = read_completion(body, service, model, record)
        return understood, [_rendered(model, prompt) for prompt in understood.prompts]

    understood, told = await read_request(request, read)
    salt = understood.asked.salt(request.state.cache_salt)
    asking = (_num_cached(model, prompt, understood.params, salt) for prompt in understood.prompts)
    cached = await asyncio.gather(*asking)
    return _json([{**one, "num_cached_tokens": number} for one, number in zip(told, cached, strict=True)])


def _rendered(model: ServedModel, prompt: list[int]) -> dict[str, Any]:
    """Raises InvalidParameterError for token ids that the model does not have."""
    check_prompt(prompt, model.engine.info)
    return {
        "count": len(prompt),
        "max_model_len": model.engine.info.max_model_len,
        "token_ids": prompt,
        "text": model.tokenizer.decode(prompt, skip_special_tokens=False),
    }


async def _num_cached(model: ServedModel, prompt: list[int], params: SamplingParams, salt: str) -> int:
    """salt: under which the prompt is cached. Raises EngineDeadError."""
    # A prompt that is to be scored is computed whole.
    return 0 if params.prompt_logprobs is not None else await model.engine.num_cached(prompt, salt)


def _require_served(name: str | None, service: Service) -> None:
    if name is not None and name not in service.names:
        raise unknown_model(name, service)


def _text_of(model: ServedModel, token: int) -> str:
    return model.vocabulary.token_bytes(token).decode(errors="replace")


def _json(body: Any) -> Response:
    return Response(to_json(body), media_type="application/json")
