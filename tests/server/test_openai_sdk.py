"""OpenAI's own client, sync and async, streaming and not, over a real socket: what it reads, and what it raises."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pydantic
import pytest

from .conftest import Start
from .fakes import END_OF_TURN, outputs
from .running import Running

MESSAGES: Any = [{"role": "user", "content": "stressed"}]


async def test_whole(sdk: openai.AsyncOpenAI) -> None:
    completion = await sdk.chat.completions.create(model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=1)
    choice = completion.choices[0]
    assert (choice.message.content, choice.message.role, choice.finish_reason) == ("desserts", "assistant", "stop")
    assert choice.message.tool_calls is None
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert [entry.token for entry in choice.logprobs.content[:3]] == ["d", "e", "s"]
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 9
    assert completion.usage.prompt_tokens_details is not None
    assert completion._request_id is not None
    # Everything that the client's own types know is where they expect it.
    type(completion).model_validate(json.loads(completion.model_dump_json()), strict=True)


async def test_stream(sdk: openai.AsyncOpenAI) -> None:
    stream = await sdk.chat.completions.create(
        model="tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True}, max_completion_tokens=4
    )
    chunks = [chunk async for chunk in stream]
    for chunk in chunks:
        type(chunk).model_validate(json.loads(chunk.model_dump_json()), strict=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "dess"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 4


async def test_the_stream_helper(sdk: openai.AsyncOpenAI) -> None:
    async with sdk.chat.completions.stream(model="tiny", messages=MESSAGES) as stream:
        async for _ in stream:
            continue
        completion = await stream.get_final_completion()
    assert completion.choices[0].message.content == "desserts"


async def test_the_sync_client(running: Running) -> None:
    def ask() -> tuple[str | None, str]:
        url = f"http://127.0.0.1:{running.port}/v1"
        with openai.OpenAI(base_url=url, api_key="any", max_retries=0, timeout=20) as client:
            whole = client.chat.completions.create(model="tiny", messages=MESSAGES)
            stream = client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
            return whole.choices[0].message.content, "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    assert await asyncio.to_thread(ask) == ("desserts", "desserts")


CALL = '{"name": "weather", "parameters": {"city": "Lima", "days": 2}}'
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}


def say(running: Running, text: str) -> None:
    running.engine.script = lambda request: outputs([*text.encode(), END_OF_TURN], logprobs=request.params.logprobs)


async def test_tools(running: Running, sdk: openai.AsyncOpenAI) -> None:
    """The whole loop: a call, its result, an answer; and the same call from a stream."""
    say(running, CALL)
    first = await sdk.chat.completions.create(model="tiny", messages=MESSAGES, tools=[TOOL], tool_choice="required")
    message = first.choices[0].message
    assert (message.content, first.choices[0].finish_reason) == (None, "tool_calls")
    assert message.tool_calls is not None
    (call,) = message.tool_calls
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Lima", "days": 2})
    type(first).model_validate(json.loads(first.model_dump_json()), strict=True)

    say(running, "Sunny.")
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "sun"}
    history = [*MESSAGES, message.model_dump(), result]
    second = await sdk.chat.completions.create(model="tiny", messages=history, tools=[TOOL])
    assert (second.choices[0].message.content, second.choices[0].message.tool_calls) == ("Sunny.", None)

    say(running, CALL)
    async with sdk.chat.completions.stream(model="tiny", messages=MESSAGES, tools=[TOOL]) as stream:
        events = [event async for event in stream]
        final = await stream.get_final_completion()
    assert final.choices[0].finish_reason == "tool_calls"
    assert final.choices[0].message.tool_calls is not None
    (streamed,) = final.choices[0].message.tool_calls
    assert streamed.function.parsed_arguments == {"city": "Lima", "days": 2}
    done = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    assert [(event.name, event.index) for event in done] == [("weather", 0)]


class City(pydantic.BaseModel):
    name: str
    people: int


async def test_parsed_answers(running: Running, sdk: openai.AsyncOpenAI) -> None:
    say(running, '{"name": "Lima", "people": 10}')
    parsed = await sdk.chat.completions.parse(model="tiny", messages=MESSAGES, response_format=City)
    assert parsed.choices[0].message.parsed == City(name="Lima", people=10)
    grammar = running.engine.requests[0].params.grammar
    assert grammar is not None
    assert grammar.kind == "json"
    assert list(json.loads(grammar.text)["properties"]) == ["name", "people"]
    async with sdk.chat.completions.stream(model="tiny", messages=MESSAGES, response_format=City) as stream:
        final = await stream.get_final_completion()
    assert final.choices[0].message.parsed == City(name="Lima", people=10)


async def test_several_choices(sdk: openai.AsyncOpenAI) -> None:
    whole = await sdk.chat.completions.create(model="tiny", messages=MESSAGES, n=3)
    assert [(choice.index, choice.message.content) for choice in whole.choices] == [(n, "desserts") for n in range(3)]
    async with sdk.chat.completions.stream(model="tiny", messages=MESSAGES, n=3) as stream:
        final = await stream.get_final_completion()
    assert [(choice.index, choice.message.content) for choice in final.choices] == [(n, "desserts") for n in range(3)]


async def test_completions(sdk: openai.AsyncOpenAI) -> None:
    bare: Any = {"model": "tiny", "max_tokens": 50, "extra_body": {"add_special_tokens": False}}
    whole = await sdk.completions.create(prompt=["ab", "cd"], logprobs=1, **bare)
    assert [(choice.index, choice.text) for choice in whole.choices] == [(0, "ba"), (1, "dc")]
    assert all(choice.logprobs is not None and choice.logprobs.tokens for choice in whole.choices)
    type(whole).model_validate(json.loads(whole.model_dump_json()), strict=True)
    stream = await sdk.completions.create(prompt="ab", stream=True, stream_options={"include_usage": True}, **bare)
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == "ba"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None


async def test_models(sdk: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in sdk.models.list()] == ["tiny", "meta/tiny"]
    for name in ("tiny", "meta/tiny"):
        model = await sdk.models.retrieve(name)
        assert (model.id, model.object) == (name, "model")
    with pytest.raises(openai.NotFoundError) as caught:
        await sdk.models.retrieve("gpt-4o")
    assert caught.value.code == "model_not_found"


async def test_many_streams_at_once_do_not_mix(sdk: openai.AsyncOpenAI) -> None:
    async def ask(number: int) -> str:
        stream = await sdk.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": f"request {number}"}], stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    answers = await asyncio.gather(*(ask(number) for number in range(32)))
    assert answers == [f"request {number}"[::-1] for number in range(32)]


async def test_mistakes_are_the_clients_own_errors(sdk: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await sdk.chat.completions.create(model="tiny", messages=MESSAGES, temperature=3)
    assert (caught.value.param, caught.value.code, caught.value.type) == (
        "temperature",
        "invalid_value",
        "invalid_request_error",
    )
    with pytest.raises(openai.NotFoundError):
        await sdk.chat.completions.create(model="gpt-4o", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError, match="maximum context length is 4096 tokens") as caught:
        await sdk.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=100_000, stream=True)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="guided_json"):
        await sdk.chat.completions.create(model="tiny", messages=MESSAGES, extra_body={"guided_json": {}})
    with pytest.raises(openai.NotFoundError):
        await sdk.embeddings.create(model="tiny", input="x")


async def test_a_wrong_key(start: Start) -> None:
    running = start(api_keys=("right",))
    await running.until_ready()
    for key, works in (("wrong", False), ("right", True)):
        async with openai.AsyncOpenAI(
            base_url=f"http://127.0.0.1:{running.port}/v1", api_key=key, max_retries=0, timeout=20
        ) as client:
            if works:
                await client.chat.completions.create(model="tiny", messages=MESSAGES)
                continue
            with pytest.raises(openai.AuthenticationError) as caught:
                await client.chat.completions.create(model="tiny", messages=MESSAGES)
            assert caught.value.code == "invalid_api_key"


async def test_leaving_a_stream_aborts_it(running: Running, sdk: openai.AsyncOpenAI) -> None:
    running.engine.hold_after = 1  # the rest of the answer never comes: only an abort can end it
    stream = await sdk.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
    await anext(aiter(stream))
    assert len(running.engine.running) == 1
    await stream.close()
    await running.engine.until(lambda: not running.engine.running)
    assert len(running.engine.aborted) == 1


async def test_leaving_a_whole_answer_aborts_it(running: Running, sdk: openai.AsyncOpenAI) -> None:
    running.engine.gate.clear()
    call = asyncio.create_task(sdk.chat.completions.create(model="tiny", messages=MESSAGES))
    await running.engine.until(lambda: bool(running.engine.running))
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    await running.engine.until(lambda: not running.engine.running)
    assert len(running.engine.aborted) == 1


async def test_a_dying_engine_is_an_error_in_the_stream(running: Running, sdk: openai.AsyncOpenAI) -> None:
    running.engine.hold_after = 1
    stream = await sdk.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
    chunks = aiter(stream)
    for _ in range(2):
        await anext(chunks)
    running.engine.die()
    with pytest.raises(openai.APIError, match="killed by signal 9"):
        await anext(chunks)
    with pytest.raises(openai.InternalServerError) as caught:
        await sdk.chat.completions.create(model="tiny", messages=MESSAGES)
    assert caught.value.status_code == 503


async def test_unicode_comes_through(running: Running, sdk: openai.AsyncOpenAI) -> None:
    text = "naïve \u2028 \x85 \U0001f999 \x00 \ufffd"
    running.engine.script = lambda request: outputs([*text.encode(), END_OF_TURN])
    stream = await sdk.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == text
