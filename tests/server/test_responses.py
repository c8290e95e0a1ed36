"""The Responses API over a fake engine: OpenAI's own client reads it, its types accept every event, and what a stream
tells folds to what a whole answer says."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import openai
import pytest
from openai.types import responses as types
from pydantic import BaseModel, TypeAdapter

from pronk.engine.request import Output, Request
from pronk.server.chat.template import ChatTemplate
from pronk.server.errors import APIError
from pronk.server.responses.store import ResponseStore, Stored

from .conftest import Connect
from .fakes import BYTES_TOKENIZER, END_OF_TURN, Client, FakeEngine, Reply, outputs
from .running import Running

EVENT: TypeAdapter[Any] = TypeAdapter(types.ResponseStreamEvent)
WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "Tells the weather.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": False,
}
PART = {"type": "input_text", "text": "stres"}
CALL = '{"name": "weather", "parameters": {"city": "Lima"}}'


def saying(text: str) -> FakeEngine:
    return FakeEngine(lambda request: outputs([*text.encode(), END_OF_TURN], logprobs=request.params.logprobs))


async def post(client: Client, path: str = "/v1/responses", key: str = "", **fields: Any) -> Reply:
    body = json.dumps({"model": "tiny", "input": "stressed", **fields}).encode()
    return await client.call("POST", path, body, headers={"authorization": f"Bearer {key}"} if key else {})


def events_of(reply: Reply) -> list[dict[str, Any]]:
    """A stream's events, each named as its type, numbered from 0, and accepted by OpenAI's types."""
    events = []
    for block in reply.body.decode().removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        EVENT.validate_python(event)
        events.append(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


async def test_whole(sdk: openai.AsyncOpenAI) -> None:
    response = await sdk.responses.create(model="tiny", input="stressed", metadata={"a": "b"})
    assert response.output_text == "desserts"
    assert (response.status, response.object, response.metadata) == ("completed", "response", {"a": "b"})
    assert response.usage is not None
    assert response.usage.output_tokens == 9
    assert response.usage.total_tokens == response.usage.input_tokens + 9
    types.Response.model_validate(json.loads(response.model_dump_json()), strict=True)
    assert (await sdk.responses.retrieve(response.id)).output == response.output


async def test_the_clients_stream_helper(sdk: openai.AsyncOpenAI) -> None:
    async with sdk.responses.stream(model="tiny", input="stressed") as stream:
        text = [event.delta async for event in stream if event.type == "response.output_text.delta"]
        final = await stream.get_final_response()
    assert "".join(text) == final.output_text == "desserts"
    assert final.status == "completed"


async def test_the_clients_parse_helper(sdk: openai.AsyncOpenAI, running: Running) -> None:
    class City(BaseModel):
        name: str

    running.engine.script = lambda request: outputs([*b'{"name": "Lima"}', END_OF_TURN])
    parsed = await sdk.responses.parse(model="tiny", input="stressed", text_format=City)
    assert parsed.output_parsed == City(name="Lima")
    grammar = running.engine.requests[-1].params.grammar
    assert grammar is not None
    assert json.loads(grammar.text)["properties"]["name"]["type"] == "string"


async def test_a_loop_of_tools(sdk: openai.AsyncOpenAI, running: Running) -> None:
    def script(request: Request) -> list[Output]:
        asked = b"Lima" in b"".join(BYTES_TOKENIZER.vocabulary.token_bytes(token) for token in request.prompt)
        return outputs([*(b"It rains." if asked else CALL.encode()), END_OF_TURN])

    running.engine.script = script
    first = await sdk.responses.create(model="tiny", input="stressed", tools=[WEATHER])  # type: ignore[list-item]
    call = first.output[0]
    assert isinstance(call, types.ResponseFunctionToolCall)
    assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "Lima"})
    second = await sdk.responses.create(
        model="tiny",
        previous_response_id=first.id,
        input=[{"type": "function_call_output", "call_id": call.call_id, "output": "rain"}],
        tools=[WEATHER],  # type: ignore[list-item]
    )
    assert second.output_text == "It rains."
    items = await sdk.responses.input_items.list(second.id, order="asc")
    assert [item.type for item in items.data] == ["message", "function_call", "function_call_output"]


async def test_the_events_of_a_text(connect: Connect) -> None:
    reply = await post(connect(saying("hi")), stream=True)
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = events_of(reply)
    assert [event["type"].removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert events[0]["response"]["status"] == "in_progress"
    assert events[0]["response"]["output"] == []
    assert events[2]["item"]["content"] == []
    assert events[-1]["response"]["output"][0] == events[-2]["item"]
    assert events[-2]["item"]["content"][0]["text"] == "hi"


async def test_the_events_of_a_call(connect: Connect) -> None:
    events = events_of(await post(connect(saying(CALL)), stream=True, tools=[WEATHER]))
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds[:3] == ["created", "in_progress", "output_item.added"]
    assert kinds[-3:] == ["function_call_arguments.done", "output_item.done", "completed"]
    assert set(kinds[3:-3]) == {"function_call_arguments.delta"}
    deltas = "".join(event["delta"] for event in events[3:-3])
    assert deltas == events[-3]["arguments"] == events[-2]["item"]["arguments"]
    assert json.loads(deltas) == {"city": "Lima"}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"max_output_tokens": 3},
        {"tools": [WEATHER]},
        {"include": ["message.output_text.logprobs"], "top_logprobs": 2},
        {"tools": [WEATHER], "include": ["message.output_text.logprobs"], "max_output_tokens": 30},
    ],
    ids=str,
)
@pytest.mark.parametrize("text", ["", "plain text", f"See: {CALL}", CALL, CALL + CALL, "ünïcödé 🦙"])
async def test_a_stream_folds_to_the_whole(connect: Connect, fields: dict[str, Any], text: str) -> None:
    def script(request: Request) -> list[Output]:
        tokens = [*text.encode(), END_OF_TURN]
        limit = request.params.max_tokens or len(tokens)
        finish = "stop" if limit >= len(tokens) else "length"
        return outputs(tokens[:limit], finish=finish, logprobs=request.params.logprobs)

    whole = (await post(connect(FakeEngine(script)), **fields)).json
    events = events_of(await post(connect(FakeEngine(script)), stream=True, **fields))
    told = events[-1]["response"]
    assert events[-1]["type"] == f"response.{whole['status']}"
    for body in (whole, told):
        types.Response.model_validate(body)
        for item in body["output"]:
            item.pop("id")
            item.pop("call_id", None)
        for name in ("id", "created_at", "completed_at"):
            body.pop(name)
    assert told == whole
    deltas = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    texts = [item["content"][0]["text"] for item in whole["output"] if item["type"] == "message"]
    assert deltas == "".join(texts)


async def test_what_is_cut_off_is_incomplete(connect: Connect) -> None:
    body = (await post(connect(), max_output_tokens=3)).json
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert body["output"][0]["status"] == "incomplete"


async def test_logprobs(connect: Connect) -> None:
    body = (await post(connect(), include=["message.output_text.logprobs"], top_logprobs=2)).json
    entries = body["output"][0]["content"][0]["logprobs"]
    assert [entry["token"] for entry in entries[:8]] == list("desserts")
    assert all(len(entry["top_logprobs"]) == 2 and isinstance(entry["bytes"], list) for entry in entries)
    assert (await post(connect())).json["output"][0]["content"][0]["logprobs"] == []


async def test_a_conversation_goes_on_without_the_first_instructions(connect: Connect) -> None:
    client = connect()
    first = (await post(client, instructions="Speak backwards.")).json
    await post(client, previous_response_id=first["id"], input="again", instructions="Speak on.")
    prompt = BYTES_TOKENIZER.decode(client.engine.requests[-1].prompt, skip_special_tokens=True)
    assert "Speak on." in prompt
    assert "backwards" not in prompt
    assert prompt.index("stressed") < prompt.index("desserts") < prompt.index("again")


@pytest.mark.parametrize(
    "given",
    [
        "stressed",
        [{"role": "user", "content": "stressed"}],
        [{"type": "message", "role": "user", "content": [PART, {"type": "input_text", "text": "sed"}]}],
        [{"type": "reasoning", "id": "rs_1", "summary": []}, {"role": "user", "content": "stressed"}],
    ],
    ids=["text", "easy", "parts", "reasoning"],
)
async def test_forms_of_input(connect: Connect, given: Any) -> None:
    body = (await post(connect(), input=given)).json
    assert body["output"][0]["content"][0]["text"] == "desserts"


async def test_an_answer_comes_back_as_items_or_by_reference(connect: Connect) -> None:
    client = connect()
    first = (await post(client)).json
    for item in (first["output"][0], {"type": "item_reference", "id": first["output"][0]["id"]}):
        reply = await post(client, input=[item, {"role": "user", "content": "more"}])
        assert reply.status == 200
        assert "desserts" in BYTES_TOKENIZER.decode(client.engine.requests[-1].prompt, skip_special_tokens=True)


WRONG: list[tuple[dict[str, Any], int, str]] = [
    ({"model": "other"}, 404, "model"),
    ({"input": []}, 400, "input"),
    ({"input": None}, 400, "input"),
    ({"input": 5}, 400, "input"),
    ({"input": [{"role": "robot", "content": "a"}]}, 400, "input[0].role"),
    ({"input": [{"type": "web_search_call", "id": "a"}]}, 400, "input[0].type"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, 400, "input[0].content[0]"),
    ({"input": [{"role": "user", "content": [{"type": "refusal", "refusal": "x"}]}]}, 400, "input[0].content[0]"),
    (
        {"input": [{"role": "assistant", "content": [{"type": "refusal", "refusal": "x", "odd": 1}]}]},
        400,
        "input[0].content[0].odd",
    ),
    ({"input": [{"type": "item_reference", "id": "msg_0"}]}, 404, "input[0].id"),
    ({"input": [{"type": "reasoning", "id": ["rs_0"]}]}, 400, "input[0].id"),
    ({"previous_response_id": "resp_0"}, 404, "previous_response_id"),
    ({"conversation": "conv_0"}, 400, "conversation"),
    ({"prompt": {"id": "p"}}, 400, "prompt"),
    ({"tools": [{"type": "web_search"}]}, 400, "tools[0].type"),
    ({"tools": [WEATHER, WEATHER]}, 400, "tools[1].name"),
    ({"tools": [{**WEATHER, "name": "a b"}]}, 400, "tools[0].name"),
    ({"tools": [{**WEATHER, "strict": True}]}, 400, "tools[0].parameters"),
    ({"tool_choice": "required"}, 400, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "other"}}, 400, "tool_choice.name"),
    ({"tools": [WEATHER], "tool_choice": {"type": "web_search"}}, 400, "tool_choice.type"),
    ({"max_output_tokens": 0}, 400, "max_output_tokens"),
    ({"max_output_tokens": 10**6}, 400, "max_output_tokens"),
    ({"temperature": 3}, 400, "temperature"),
    ({"top_logprobs": 2}, 400, "top_logprobs"),
    ({"include": ["everything"]}, 400, "include[0]"),
    ({"background": True, "stream": True}, 400, "background"),
    ({"background": True, "store": False, "stream": False}, 400, "store"),
    ({"stream_options": {"include_obfuscation": False}, "stream": False}, 400, "stream_options"),
    ({"metadata": {str(n): "" for n in range(17)}}, 400, "metadata"),
    ({"metadata": {"a": "b" * 513}}, 400, "metadata"),
    ({"text": {"format": {"type": "json_schema", "name": "a b", "schema": {}}}}, 400, "text.format.name"),
    ({"text": {"format": {"type": "json_schema", "name": "a", "schema": {"const": "impossible"}}}}, 400, "text.format"),
    ({"n": 2}, 400, "n"),
]


@pytest.mark.parametrize(
    ("fields", "status", "param"), WRONG, ids=[f"{param}-{n}" for n, (_, _, param) in enumerate(WRONG)]
)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_is_refused(connect: Connect, fields: dict[str, Any], status: int, param: str, stream: bool) -> None:
    reply = await post(connect(), **{"stream": stream, **fields})
    assert (reply.status, reply.error["param"]) == (status, param)


async def test_the_context_is_full_unless_the_oldest_may_go(connect: Connect) -> None:
    long = [
        {"role": "user", "content": "a" * 3000},
        {"role": "user", "content": "b" * 3000},
        {"role": "user", "content": "stressed"},
    ]
    reply = await post(connect(), input=long)
    assert (reply.status, reply.error["code"], reply.error["param"]) == (400, "context_length_exceeded", "input")
    client = connect()
    reply = await post(client, input=long, truncation="auto", instructions="Keep this.")
    assert reply.json["output"][0]["content"][0]["text"] == "desserts"
    prompt = BYTES_TOKENIZER.decode(client.engine.requests[-1].prompt, skip_special_tokens=True)
    assert "Keep this." in prompt
    assert "aaa" not in prompt
    assert "bbb" in prompt


async def test_an_engine_that_dies_fails_the_response(connect: Connect) -> None:
    engine = FakeEngine()
    client = connect(engine)
    seen: list[bytes] = []

    def watch(part: bytes) -> None:
        seen.append(part)
        if len(seen) == 3:
            engine.die()

    reply = await client.call(
        "POST", "/v1/responses", b'{"model": "tiny", "input": "stressed", "stream": true}', on_part=watch
    )
    events = events_of(reply)
    assert [event["type"].removeprefix("response.") for event in events[-4:]] == [
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "failed",
    ]
    failed = events[-1]["response"]
    assert (failed["status"], failed["error"]["code"]) == ("failed", "server_error")
    assert failed["output"][0]["status"] == "incomplete"


async def test_background(connect: Connect) -> None:
    engine = FakeEngine()
    engine.gate.clear()
    client = connect(engine)
    begun = (await post(client, background=True)).json
    assert (begun["status"], begun["output"]) == ("queued", [])
    path = f"/v1/responses/{begun['id']}"
    await engine.until(lambda: bool(engine.requests))
    assert (await client.call("GET", path)).json["status"] == "in_progress"
    engine.gate.set()
    await engine.until(lambda: not engine.running)
    owned = client.app.state.responses.get("", begun["id"])
    if owned.task is not None:
        await asyncio.wait([owned.task])
    body = (await client.call("GET", path)).json
    assert body["status"] == "completed"
    assert body["output"][0]["content"][0]["text"] == "desserts"
    assert (await client.call("POST", path + "/cancel")).json["status"] == "completed"


async def test_a_background_response_can_be_cancelled(connect: Connect) -> None:
    engine = FakeEngine()
    engine.gate.clear()
    client = connect(engine)
    begun = (await post(client, background=True)).json
    path = f"/v1/responses/{begun['id']}"
    await engine.until(lambda: bool(engine.requests))
    assert (await client.call("POST", path + "/cancel")).json["status"] == "cancelled"
    assert engine.aborted == [begun["id"]]
    assert (await client.call("GET", path)).json["status"] == "cancelled"


async def test_only_background_responses_can_be_cancelled(connect: Connect) -> None:
    client = connect()
    made = (await post(client)).json
    reply = await client.call("POST", f"/v1/responses/{made['id']}/cancel")
    assert (reply.status, reply.error["param"]) == (400, "response_id")


async def test_a_response_belongs_to_its_key(connect: Connect) -> None:
    client = connect(api_keys=("one", "two"))
    made = (await post(client, key="one")).json
    path = f"/v1/responses/{made['id']}"
    assert (await client.call("GET", path, headers={"authorization": "Bearer one"})).json == made
    for method in ("GET", "DELETE"):
        reply = await client.call(method, path, headers={"authorization": "Bearer two"})
        assert (reply.status, reply.error["code"]) == (404, "response_not_found")
    assert (await post(client, key="two", previous_response_id=made["id"])).status == 404
    deleted = await client.call("DELETE", path, headers={"authorization": "Bearer one"})
    assert deleted.json == {"id": made["id"], "object": "response", "deleted": True}
    assert (await client.call("GET", path, headers={"authorization": "Bearer one"})).status == 404


async def test_the_store_is_left_to_the_event_loop_which_makes_no_long_prompt(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: set[int] = set()
    rendered: list[bool] = []
    loop = threading.get_ident()

    class Watched(ResponseStore):
        def __getattribute__(self, name: str) -> Any:
            looked.add(threading.get_ident())
            return super().__getattribute__(name)

    render = ChatTemplate.render

    def watched_render(*args: Any, **options: Any) -> list[int]:
        rendered.append(threading.get_ident() == loop)
        return render(*args, **options)

    monkeypatch.setattr(ChatTemplate, "render", watched_render)
    client = connect(FakeEngine(max_model_len=1_000_000))
    client.app.state.responses = Watched(max_responses=10, max_bytes=10**6, max_age_seconds=60)
    short = (await post(client)).json
    long = (await post(client, input="a" * 20_000, max_output_tokens=1)).json
    assert rendered == [True, False]
    for fields in (
        {"previous_response_id": short["id"], "input": "more"},
        {"previous_response_id": long["id"], "input": "more"},
        {"input": [{"type": "item_reference", "id": long["output"][0]["id"]}]},
        {"user": "u" * 20_000, "previous_response_id": short["id"]},
    ):
        assert (await post(client, **fields, max_output_tokens=1)).status == 200
    assert rendered[2:] == [True, False, False, False]
    assert looked == {loop}


async def test_what_is_not_to_be_stored_is_not(connect: Connect) -> None:
    client = connect()
    made = (await post(client, store=False)).json
    assert (await client.call("GET", f"/v1/responses/{made['id']}")).status == 404
    none = connect(max_stored_responses=0)
    made = (await post(none)).json
    assert (await none.call("GET", f"/v1/responses/{made['id']}")).status == 404


async def test_input_tokens_are_those_of_the_prompt(connect: Connect) -> None:
    client = connect()
    counted = (await post(client, "/v1/responses/input_tokens", tools=[WEATHER], instructions="Do.")).json
    await post(client, tools=[WEATHER], instructions="Do.")
    assert counted == {"object": "response.input_tokens", "input_tokens": len(client.engine.requests[-1].prompt)}


class TestStore:
    """Bounded in number, bytes and age."""

    def stored(self, name: str, text: str = "") -> Stored:
        return Stored({"id": name, "output": [{"id": f"item of {name}", "text": text}]}, [], [])

    def test_number(self) -> None:
        store = ResponseStore(max_responses=2, max_bytes=10**6, max_age_seconds=60)
        for name in "abc":
            store.put("owner", self.stored(name))
        assert len(store) == 2
        with pytest.raises(Exception, match="no response"):
            store.get("owner", "a")
        assert store.get("owner", "c").body["id"] == "c"

    def test_bytes(self) -> None:
        store = ResponseStore(max_responses=100, max_bytes=1000, max_age_seconds=60)
        for name in "abcdef":
            store.put("owner", self.stored(name, "x" * 300))
            assert store.num_bytes <= 1000
        store.put("owner", self.stored("huge", "x" * 2000))
        assert (len(store), store.num_bytes) == (0, 0)

    def test_age(self) -> None:
        now = 0.0
        store = ResponseStore(max_responses=100, max_bytes=10**6, max_age_seconds=60, clock=lambda: now)
        store.put("owner", self.stored("old"))
        now = 59.0
        store.put("owner", self.stored("new"))
        wanted = {"item of old": "input[3].id"}
        assert store.find_items("owner", wanted)["item of old"]["id"] == "item of old"
        now = 61.0
        with pytest.raises(APIError, match="no item") as refused:
            store.find_items("owner", wanted)
        assert refused.value.param == "input[3].id"
        assert store.get("owner", "new").body["id"] == "new"

    def test_the_same_id_is_kept_once(self) -> None:
        store = ResponseStore(max_responses=2, max_bytes=10**6, max_age_seconds=60)
        for text in ("", "longer"):
            store.put("owner", self.stored("a", text))
        assert len(store) == 1
        assert store.get("owner", "a").body["output"][0]["text"] == "longer"
