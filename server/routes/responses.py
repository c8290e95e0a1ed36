"""The Responses API: POST /v1/responses, and what can be done with a response afterwards."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import APIRouter
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from pronk.engine.errors import PronkError
from pronk.engine.request import Grammar, SamplingParams
from pronk.server.answering import INLINE_BYTES, GenerationResponse, apart, check_grammar, read_request
from pronk.server.chat.tools import ToolCalls
from pronk.server.errors import INTERNAL_MESSAGE, INVALID_VALUE, APIError
from pronk.server.generation import Generation, Prompt
from pronk.server.openapi import STREAMS
from pronk.server.protocol.common import parse, refuse, schema_of
from pronk.server.protocol.responses import PromptFields, ResponseRequest
from pronk.server.record import RequestRecord
from pronk.server.responses import events
from pronk.server.responses.items import ItemDict, input_items, messages_of, new_id, references
from pronk.server.responses.store import ResponseStore, Stored
from pronk.server.routes.models import unknown_model
from pronk.server.service import ServedModel, Service
from pronk.server.streaming import to_json

logger = logging.getLogger(__name__)
router = APIRouter()

NAMES = {"max_tokens": "max_output_tokens", "prompt": "input", "messages": "input", "structured_outputs": "text.format"}
"""The engine's names of fields -> those of this API."""
MAX_PAGE = 100


@dataclass(frozen=True)
class Found:
    """What the store holds of what a request speaks of."""

    before: list[ItemDict]
    """The conversation that it goes on with."""
    referred: dict[str, ItemDict]
    """Items that its input names, by their ids."""
    is_long: bool
    """Whether to read it may take long."""


@dataclass(frozen=True)
class Read:
    """What was asked, and what follows from it."""

    input: list[ItemDict]
    before: list[ItemDict]
    """The conversation that it goes on with."""
    tools: ToolCalls | None
    form: Grammar | None
    """Of an answer that calls nothing."""
    grammar: Grammar | None
    """Of any answer."""
    prompt: list[int]


async def _check_constraint(model: ServedModel, read: Read) -> None:
    """Raises InvalidParameterError that names the field: that of the form, if it is to blame, else that of tools."""
    await check_grammar(model, read.form, NAMES["structured_outputs"])
    if read.tools is not None and read.grammar is not read.form:
        bound = [(f"tools[{place}].parameters", grammar) for place, grammar in read.tools.bound_arguments()]
        await check_grammar(model, read.grammar, "tools", bound)


Asked = TypeVar("Asked", bound=PromptFields)


def _body(kind: type[PromptFields]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema_of(kind)}}}}


REFUSALS: dict[int | str, dict[str, Any]] = {"4XX": {"description": "OpenAI's error object"}}


@router.post(
    "/v1/responses",
    summary="Create a response",
    responses=STREAMS,
    openapi_extra=_body(ResponseRequest),
)
async def create_response(request: HTTPRequest) -> Response:
    """OpenAI's responses: streamed, whole, or made in the background."""
    service: Service = request.app.state.service
    record: RequestRecord = request.state.record
    model = service.require()
    asked, read = await _read(ResponseRequest, request, model)
    params = asked.sampling_params(model.defaults, read.grammar)
    await _check_constraint(model, read)
    model = service.admit()
    if asked.background:  # its own record: this HTTP request ends before the work does
        record = RequestRecord(request_id=record.request_id)
    response_id = new_id("resp")
    generation = Generation(
        [Prompt(read.prompt, [params])],
        request_id=response_id,
        model=model,
        record=record,
        cache_salt=request.state.cache_salt,
        tools=read.tools,
        form=read.form,
    )
    body = _new_body(response_id, asked, params)
    output = events.Output(model.vocabulary, logprobs=asked.wants_logprobs)
    store: ResponseStore = request.app.state.responses
    owner: str = request.state.cache_salt
    stored = Stored(body, read.input, read.before)

    def keep() -> None:
        if asked.is_stored:
            store.put(owner, stored)

    if asked.background:
        keep()
        stored.task = asyncio.create_task(_work(generation, stored, output, keep), name=response_id)
        return _json(body)

    async def whole() -> dict[str, Any]:
        await events.make(generation, body, output)
        keep()
        return body

    writer = events.ResponseWriter(body, output, record, keep) if asked.stream else None
    return GenerationResponse(generation, whole=whole, writer=writer, names=NAMES)


async def _work(generation: Generation, stored: Stored, output: events.Output, keep: Callable[[], None]) -> None:
    """Make a response in the background."""
    body = stored.body
    body["status"] = "in_progress"
    try:
        await events.make(generation, body, output)
        keep()
    except asyncio.CancelledError:
        body["status"] = "cancelled"
        return
    except PronkError as error:
        events.fail(body, str(error))
        keep()
    except Exception:
        logger.exception("%s: the response failed with an error of the server's own", body["id"])
        events.fail(body, INTERNAL_MESSAGE)
        keep()
    finally:
        stored.task = None


@router.post(
    "/v1/responses/input_tokens",
    summary="Count the tokens of a response's prompt",
    responses=REFUSALS,
    openapi_extra=_body(PromptFields),
)
async def count_input_tokens(request: HTTPRequest) -> Response:
    """How many tokens the prompt would have; nothing is generated."""
    service: Service = request.app.state.service
    model = service.require()
    _, counted = await _read(PromptFields, request, model)
    return _json({"object": "response.input_tokens", "input_tokens": len(counted.prompt)})


@router.get("/v1/responses/{response_id}", summary="Get a stored response", responses=REFUSALS)
async def get_response(request: HTTPRequest, response_id: str) -> Response:
    """As it was told; one that is being made in the background, as far as it is."""
    if request.query_params.get("stream", "false").lower() != "false":
        raise refuse("stream", "A stored response cannot be streamed again: leave stream out.")
    return _json(_stored(request, response_id).body)


@router.delete("/v1/responses/{response_id}", summary="Delete a stored response", responses=REFUSALS)
async def delete_response(request: HTTPRequest, response_id: str) -> Response:
    """It cannot be had again; if it is being made, that ends."""
    store: ResponseStore = request.app.state.responses
    store.delete(request.state.cache_salt, response_id)
    return _json({"id": response_id, "object": "response", "deleted": True})


@router.post("/v1/responses/{response_id}/cancel", summary="Cancel a background response", responses=REFUSALS)
async def cancel_response(request: HTTPRequest, response_id: str) -> Response:
    """End its making. One that has ended stays as it is."""
    stored = _stored(request, response_id)
    if not stored.body["background"]:
        raise APIError("Only a response that is made in the background can be cancelled.", INVALID_VALUE, "response_id")
    task = stored.task
    if task is not None:
        task.cancel()
        await asyncio.wait([task])
        if stored.body["status"] in ("queued", "in_progress"):  # it was cancelled before its first step
            stored.body["status"] = "cancelled"
    return _json(stored.body)


PAGING = [
    {
        "name": "after",
        "in": "query",
        "schema": {"type": "string"},
        "description": "The id of the item before the page.",
    },
    {"name": "limit", "in": "query", "schema": {"type": "integer", "minimum": 1, "maximum": MAX_PAGE, "default": 20}},
    {"name": "order", "in": "query", "schema": {"type": "string", "enum": ["asc", "desc"], "default": "desc"}},
]


@router.get(
    "/v1/responses/{response_id}/input_items",
    summary="List a response's input",
    responses=REFUSALS,
    openapi_extra={"parameters": PAGING},
)
async def list_input_items(request: HTTPRequest, response_id: str) -> Response:
    """The items of its request and of the conversation before it, newest first unless order says asc."""
    stored = _stored(request, response_id)
    query = request.query_params
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise APIError("order must be asc or desc.", INVALID_VALUE, "order")
    limit = query.get("limit", "20")
    if not (limit.isascii() and limit.isdigit() and len(limit) < 4 and 1 <= int(limit) <= MAX_PAGE):
        raise APIError(f"limit must be a number from 1 to {MAX_PAGE}.", INVALID_VALUE, "limit")
    items = [*stored.before, *stored.input]
    if order == "desc":
        items.reverse()
    return _json(_page(items, after=query.get("after"), limit=int(limit)))


def _page(items: list[ItemDict], *, after: str | None, limit: int) -> dict[str, Any]:
    start = 0
    if after is not None:
        ids = [item.get("id") for item in items]
        if after not in ids:
            raise APIError("after names no item of this list.", INVALID_VALUE, "after")
        start = ids.index(after) + 1
    page = items[start : start + limit]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0].get("id") if page else None,
        "last_id": page[-1].get("id") if page else None,
        "has_more": start + limit < len(items),
    }


def _stored(request: HTTPRequest, response_id: str) -> Stored:
    store: ResponseStore = request.app.state.responses
    return store.get(request.state.cache_salt, response_id)


async def _read(kind: type[Asked], request: HTTPRequest, model: ServedModel) -> tuple[Asked, Read]:
    """-> the checked request, and what follows from it. Raises APIError and InvalidParameterError."""
    service: Service = request.app.state.service
    record: RequestRecord = request.state.record

    def check(body: bytes) -> tuple[Asked, ToolCalls | None, Grammar | None, bool]:
        asked = parse(kind, body)
        if asked.model not in service.names:
            raise unknown_model(asked.model, service)
        return asked, asked.tool_calls(), asked.text_grammar(), len(body) > INLINE_BYTES

    asked, tools, form, is_long = await read_request(request, check)
    # Here and not in a thread: the store changes on the event loop.
    found = _find(asked, request.app.state.responses, request.state.cache_salt)

    def understand() -> Read:
        given = input_items(asked.input, found.referred)
        start = time.perf_counter()
        prompt = _prompt(asked, messages_of([*found.before, *given]), tools, model)
        record.render_seconds = time.perf_counter() - start
        grammar = form if tools is None else tools.grammar(form)
        return Read(given, found.before, tools, form, grammar, prompt)

    return asked, await apart(understand, is_long=is_long or found.is_long)


def _find(asked: PromptFields, store: ResponseStore, owner: str) -> Found:
    """Raises APIError (404) that names the field."""
    name = asked.previous_response_id
    previous = None if name is None else store.get(owner, name, "previous_response_id")
    before = [] if previous is None else previous.conversation
    referred = store.find_items(owner, references(asked.input))
    return Found(before, referred, bool(referred) or (previous is not None and previous.size > INLINE_BYTES))


def _prompt(
    asked: PromptFields, messages: Sequence[Mapping[str, Any]], tools: ToolCalls | None, model: ServedModel
) -> list[int]:
    """messages: of the conversation, without the instructions. -> the prompt's token ids. Raises APIError
    and InvalidParameterError."""
    if not messages:
        raise APIError("There is nothing to answer: send input, or previous_response_id.", INVALID_VALUE, "input")
    instructions = [] if asked.instructions is None else [{"role": "system", "content": asked.instructions}]

    def render(first: int) -> list[int]:
        shown = [*instructions, *messages[first:]]
        return model.render(shown, **({} if tools is None else tools.render_args(shown)))

    prompt = render(0)
    longest = asked.longest_prompt(model.engine.info.max_model_len)
    if longest is not None and len(prompt) > longest:
        prompt = render(_oldest_kept(messages, lambda first: len(render(first)) <= longest))
    return prompt


def _oldest_kept(messages: Sequence[Mapping[str, Any]], fits: Callable[[int], bool]) -> int:
    """-> the first message to keep, so that the prompt fits; never one that answers a call which is left out."""
    starts = [place for place, message in enumerate(messages) if message["role"] != "tool"]
    low, high = 0, len(starts) - 1
    while low < high:
        middle = (low + high) // 2
        if fits(starts[middle]):
            high = middle
        else:
            low = middle + 1
    return starts[low] if starts else 0


def _new_body(response_id: str, asked: ResponseRequest, params: SamplingParams) -> dict[str, Any]:
    """The response before its first token, with every field that OpenAI's has."""
    text = {} if asked.text is None else asked.text.model_dump(by_alias=True, exclude_none=True)
    choice = asked.tool_choice
    return {
        "id": response_id,
        "object": "response",
        "created_at": int(time.time()),
        "status": "queued" if asked.background else "in_progress",
        "background": asked.background,
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "instructions": asked.instructions,
        "max_output_tokens": asked.max_output_tokens,
        "max_tool_calls": asked.max_tool_calls,
        "metadata": asked.metadata or {},
        "model": asked.model,
        "output": [],
        "parallel_tool_calls": asked.parallel_tool_calls is not False,
        "previous_response_id": asked.previous_response_id,
        "prompt_cache_key": asked.prompt_cache_key,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": asked.safety_identifier,
        "service_tier": "default",
        "store": asked.is_stored,
        "temperature": params.temperature,
        "text": {"format": {"type": "text"}, **text},
        "tool_choice": "auto" if choice is None else choice if isinstance(choice, str) else choice.model_dump(),
        "tools": [_described(tool.model_dump(exclude_none=True)) for tool in asked.tools or ()],
        "top_logprobs": asked.top_logprobs or 0,
        "top_p": params.top_p,
        "truncation": asked.truncation or "disabled",
        "usage": None,
        "user": asked.user,
    }


def _described(tool: dict[str, Any]) -> dict[str, Any]:
    return {"description": None, "parameters": None, "strict": False, **tool}


def _json(body: Any) -> Response:
    return Response(to_json(body), media_type="application/json")
