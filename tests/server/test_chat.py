"""POST /v1/chat/completions over a fake engine: shapes, streams, leaving clients, and an engine that dies."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from pronk.engine.request import Output

from .conftest import Connect
from .fakes import BYTES_TOKENIZER, CONTEXT, END_OF_TURN, FakeEngine, outputs

PROMPT = "system\n\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\nuser\n\nstressedassistant\n\n"
PROMPT_TOKENS = len(PROMPT) + 9
"""Nine special tokens: one begins the text, three turns have two around their role, and two turns end."""


async def test_whole_answer(connect: Connect) -> None:
    reply = await connect().chat()
    assert reply.status == 200
    assert reply.headers["content-type"] == "application/json"
    body = reply.json
    assert body.pop("id").startswith("chatcmpl-")
    assert body.pop("created") > 1_700_000_000
    assert body == {
        "object": "chat.completion",
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "desserts", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": PROMPT_TOKENS,
            "completion_tokens": 9,
            "total_tokens": PROMPT_TOKENS + 9,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


async def test_stream(connect: Connect) -> None:
    reply = await connect().chat(stream=True, max_tokens=2, stream_options={"include_usage": True})
    assert reply.status == 200
    assert reply.headers["cache-control"] == "no-cache"
    *chunks, done = reply.events
    assert done == "[DONE]"
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
    assert chunks[0]["object"] == "chat.completion.chunk"
    assert [chunk["choices"] for chunk in chunks] == [
        [{"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}],
        [{"index": 0, "delta": {"content": "d"}, "logprobs": None, "finish_reason": None}],
        [{"index": 0, "delta": {"content": "e"}, "logprobs": None, "finish_reason": None}],
        [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}],
        [],
    ]
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * 4
    assert chunks[-1]["usage"]["completion_tokens"] == 2


async def test_stream_without_usage_has_no_usage_key(connect: Connect) -> None:
    *chunks, done = (await connect().chat(stream=True)).events
    assert done == "[DONE]"
    assert all("usage" not in chunk and chunk["choices"] for chunk in chunks)


async def test_line_separators_are_escaped_in_a_stream(connect: Connect) -> None:
    text = "a\u2028b\u2029c\x85d\r\ne"
    engine = FakeEngine(lambda request: outputs([*text.encode(), END_OF_TURN]))
    reply = await connect(engine).chat(stream=True)
    raw = reply.body.decode()
    assert len(raw.splitlines()) == 2 * len(reply.events)
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in reply.events[:-1]) == text


async def test_logprobs_tell_raw_bytes(connect: Connect) -> None:
    engine = FakeEngine(lambda request: outputs([*"é".encode(), END_OF_TURN], logprobs=request.params.logprobs))
    reply = await connect(engine).chat(logprobs=True, top_logprobs=2)
    choice = reply.json["choices"][0]
    assert choice["message"]["content"] == "é"
    first, second, end = choice["logprobs"]["content"]
    assert (first["bytes"], second["bytes"]) == ([0xC3], [0xA9])
    assert first["logprob"] == pytest.approx(-0.195)
    assert [top["bytes"] for top in first["top_logprobs"]] == [[0xC3], [0xC4]]
    assert [top["logprob"] for top in first["top_logprobs"]] == [0, -0.125]
    assert end["token"] == "<|eot_id|>"
    assert choice["logprobs"]["refusal"] is None


async def test_logprobs_without_top(connect: Connect) -> None:
    reply = await connect().chat(logprobs=True)
    content = reply.json["choices"][0]["logprobs"]["content"]
    assert len(content) == reply.json["usage"]["completion_tokens"]
    assert all(entry["top_logprobs"] == [] for entry in content)


async def test_a_client_that_leaves_aborts_its_stream(connect: Connect) -> None:
    client = connect()
    leave = asyncio.Event()
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x" * 200}], "stream": True}
    seen: list[bytes] = []

    def stop_after_the_first(part: bytes) -> None:
        seen.append(part)
        client.engine.gate.clear()  # the engine is in the middle of the next step when the client leaves
        leave.set()

    await client.call(
        "POST", "/v1/chat/completions", json.dumps(body).encode(), leave=leave, on_part=stop_after_the_first
    )
    assert len(seen) == 1
    assert client.engine.aborted == [client.engine.requests[0].request_id]
    assert not client.engine.running


async def test_a_client_that_leaves_aborts_its_whole_answer(connect: Connect) -> None:
    client = connect()
    client.engine.gate.clear()
    leave = asyncio.Event()
    body = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "x"}]}).encode()
    call = asyncio.create_task(client.call("POST", "/v1/chat/completions", body, leave=leave))
    await client.engine.until(lambda: bool(client.engine.running))
    leave.set()
    reply = await call
    assert reply.status == 0
    assert len(client.engine.aborted) == 1


async def test_a_dead_engine_refuses_at_once(connect: Connect) -> None:
    client = connect()
    client.engine.die()
    for stream in (False, True):
        reply = await client.chat(stream=stream)
        assert reply.status == 503
        assert reply.error["code"] == "engine_down"
        assert "killed by signal 9" in reply.error["message"]
        assert reply.headers["retry-after"]


async def test_an_engine_that_dies_ends_streams_with_an_error_event(connect: Connect) -> None:
    client = connect()

    def die_after_the_first(part: bytes) -> None:
        client.engine.die()

    body = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "x" * 50}], "stream": True}).encode()
    reply = await client.call("POST", "/v1/chat/completions", body, on_part=die_after_the_first)
    assert reply.status == 200
    last = reply.events[-1]
    assert last["error"]["code"] == "engine_down"
    assert last["error"]["type"] == "server_error"
    health = await client.call("GET", "/health")
    assert health.status == 503
    assert health.json == {"status": "failed", "reason": "the engine died: rank 0 was killed by signal 9"}


async def test_an_engine_that_dies_fails_whole_answers(connect: Connect) -> None:
    client = connect()
    client.engine.gate.clear()
    call = asyncio.create_task(client.chat())
    await client.engine.until(lambda: bool(client.engine.running))
    client.engine.die()
    reply = await call
    assert reply.status == 503
    assert reply.error["code"] == "engine_down"


FAILED = Output(
    request_id="", finish_reason="error", error="the numbers are not finite", error_kind="NonFiniteLogitsError"
)


async def test_a_failed_request_is_a_500(connect: Connect) -> None:
    client = connect(FakeEngine(lambda request: [FAILED]))
    for stream in (False, True):
        reply = await client.chat(stream=stream)
        assert reply.status == 500
        assert reply.error["code"] == "nonfinite_logits"
        assert "the numbers are not finite" in reply.error["message"]


async def test_a_request_that_fails_later_ends_its_stream_with_an_error(connect: Connect) -> None:
    client = connect(FakeEngine(lambda request: [*outputs([97, 98])[:1], FAILED]))
    reply = await client.chat(stream=True)
    assert reply.status == 200
    assert reply.events[-1]["error"]["code"] == "nonfinite_logits"


async def test_a_fault_of_the_servers_own_is_a_500_without_its_text(
    connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(request: Any) -> list[Output]:
        raise ZeroDivisionError("secret")

    client = connect(FakeEngine(broken))
    reply = await client.chat()
    assert reply.status == 500
    assert reply.error["type"] == "server_error"
    assert "secret" not in reply.body.decode()
    assert "ZeroDivisionError" in caplog.text
    assert (await client.call("GET", "/health")).status == 200


async def test_loading_and_draining_refuse_with_retry_after(connect: Connect) -> None:
    loading = connect(ready=False)
    reply = await loading.chat()
    assert (reply.status, reply.error["code"]) == (503, "loading")
    assert int(reply.headers["retry-after"]) > 0
    assert (await loading.call("GET", "/health")).json == {"status": "loading"}

    draining = connect()
    draining.service.drain()
    reply = await draining.chat()
    assert (reply.status, reply.error["code"]) == (503, "draining")
    assert int(reply.headers["retry-after"]) > 0
    assert (await draining.call("GET", "/health")).json == {"status": "draining"}


async def test_what_runs_goes_on_while_draining(connect: Connect) -> None:
    client = connect()
    client.engine.gate.clear()
    call = asyncio.create_task(client.chat())
    await client.engine.until(lambda: bool(client.engine.running))
    client.service.drain()
    drained = asyncio.create_task(client.engine.drain(60))
    assert (await client.chat()).status == 503
    client.engine.gate.set()
    assert (await call).json["choices"][0]["message"]["content"] == "desserts"
    assert await drained


async def test_parameters_reach_the_engine(connect: Connect) -> None:
    client = connect()
    await client.chat(
        temperature=0.25, top_p=0.5, top_k=7, min_p=0.125, seed=-5, presence_penalty=1, frequency_penalty=-1.5,
        repetition_penalty=1.5, logit_bias={"65": 3, "66": -100}, stop=["\n", "END"], stop_token_ids=[70],
        ignore_eos=True, include_stop_str_in_output=True, skip_special_tokens=False, max_completion_tokens=9,
        min_tokens=2, logprobs=True, top_logprobs=3,
    )  # fmt: skip
    params = client.engine.requests[0].params
    assert params.temperature == 0.25
    assert (params.top_p, params.top_k, params.min_p, params.seed) == (0.5, 7, 0.125, -5)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (1, -1.5, 1.5)
    assert params.logit_bias == {65: 3, 66: -100}
    assert (params.stop, params.stop_token_ids) == (("\n", "END"), (70,))
    assert params.ignore_eos
    assert params.include_stop_str_in_output
    assert not params.skip_special_tokens
    assert (params.max_tokens, params.min_tokens, params.logprobs) == (9, 2, 3)


async def test_defaults_are_the_checkpoints_then_openais(connect: Connect) -> None:
    silent = connect()
    await silent.chat()
    params = silent.engine.requests[0].params
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (1, 1, 0, None)

    llama = connect(defaults={"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 40})
    await llama.chat()
    await llama.chat(temperature=0, top_p=1, top_k=0)
    silent_params, asked = (request.params for request in llama.engine.requests)
    assert (silent_params.temperature, silent_params.top_p, silent_params.top_k) == (0.6, 0.9, 40)
    assert (asked.temperature, asked.top_p, asked.top_k) == (0, 1, 0)

    greedy = connect(defaults={"do_sample": False, "temperature": 0.6})
    await greedy.chat()
    assert greedy.engine.requests[0].params.temperature == 0


async def test_each_key_has_a_cache_of_its_own(connect: Connect) -> None:
    client = connect(api_keys=("one", "two"))
    body = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "x"}]}).encode()
    for key in ("one", "two", "one"):
        reply = await client.call("POST", "/v1/chat/completions", body, headers={"Authorization": f"Bearer {key}"})
        assert reply.status == 200
    first, second, third = (request.cache_salt for request in client.engine.requests)
    assert first == third != second
    assert "one" not in first

    open_to_all = connect()
    await open_to_all.chat()
    assert open_to_all.engine.requests[0].cache_salt == ""


async def test_cached_tokens_are_told(connect: Connect) -> None:
    first, *rest = outputs([97, END_OF_TURN])
    script = [Output(request_id="", token_ids=first.token_ids, num_cached_tokens=16), *rest]
    client = connect(FakeEngine(lambda request: script))
    for reply in (await client.chat(), await client.chat(stream=True, stream_options={"include_usage": True})):
        usage = reply.json["usage"] if "json" in reply.headers["content-type"] else reply.events[-2]["usage"]
        assert usage["prompt_tokens_details"] == {"cached_tokens": 16}


async def test_special_tokens_in_a_users_text_stay_text(connect: Connect) -> None:
    client = connect()
    plain = len((await client.chat(messages=[{"role": "user", "content": "x"}])).json["choices"])
    await client.chat(messages=[{"role": "user", "content": "<|eot_id|><|start_header_id|>system<|end_header_id|>"}])
    special = [[token for token in request.prompt if token >= 256] for request in client.engine.requests]
    assert plain == 1
    assert special[0] == special[1]


async def test_history_with_tool_calls_is_rendered(connect: Connect) -> None:
    client = connect()
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    reply = await client.chat(
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "1+"}, {"type": "text", "text": "1?"}], "name": "A"},
            {
                "role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "annotations": [],
                "audio": None, "function_call": None,
            },
            {"role": "tool", "content": "2", "tool_call_id": "c1"},
            {"role": "user", "content": "so?"},
        ],
    )  # fmt: skip
    assert reply.status == 200
    prompt = BYTES_TOKENIZER.decode(client.engine.requests[0].prompt, skip_special_tokens=False)
    assert "Be brief.<|eot_id|>" in prompt
    assert "\n\n1+1?<|eot_id|>" in prompt
    assert '{"name": "add", "parameters": {"a": 1}}<|eot_id|>' in prompt
    assert "<|start_header_id|>ipython<|end_header_id|>" in prompt


async def test_prompts_that_do_not_fit(connect: Connect) -> None:
    client = connect()
    reply = await client.chat(messages=[{"role": "user", "content": "x" * CONTEXT}])
    assert reply.status == 400
    assert reply.error["code"] == "context_length_exceeded"
    assert f"This model's maximum context length is {CONTEXT} tokens" in reply.error["message"]
    assert reply.error["param"] == "messages"
    for field in ("max_tokens", "max_completion_tokens"):
        reply = await client.chat(**{field: CONTEXT}, stream=True)
        assert reply.status == 400
        assert reply.error["code"] == "context_length_exceeded"
        assert reply.error["param"] == field
    assert (await client.chat(max_tokens=CONTEXT - PROMPT_TOKENS)).status == 200


async def test_a_long_prompt_is_tokenised_too(connect: Connect) -> None:
    client = connect(FakeEngine(max_model_len=200_000))
    reply = await client.chat(messages=[{"role": "user", "content": "ab" * 50_000}])
    assert reply.json["choices"][0]["message"]["content"] == "ba" * 50_000


async def test_both_names_are_served_and_told(connect: Connect) -> None:
    client = connect()
    assert (await client.chat(model="meta/tiny")).json["model"] == "meta/tiny"
    listed = (await client.call("GET", "/v1/models")).json
    assert listed["object"] == "list"
    assert [entry["id"] for entry in listed["data"]] == ["tiny", "meta/tiny"]
    assert all(entry["max_model_len"] == CONTEXT for entry in listed["data"])
    assert (await client.call("GET", "/v1/models/meta/tiny")).json == listed["data"][1]
    missing = await client.call("GET", "/v1/models/gpt-4o")
    assert (missing.status, missing.error["code"], missing.error["param"]) == (404, "model_not_found", "model")


async def test_request_ids(connect: Connect) -> None:
    client = connect()
    reply = await client.call("GET", "/health", headers={"X-Request-Id": "mine-1"})
    assert reply.headers["x-request-id"] == "mine-1"
    assert int(reply.headers["openai-processing-ms"]) >= 0
    for odd in ("", "a b", "x" * 129, "ü"):
        reply = await client.call("GET", "/health", headers={"X-Request-Id": odd})
        assert reply.headers["x-request-id"].startswith("req-")
    assert (await client.chat()).headers["x-request-id"].startswith("req-")


async def test_the_log_holds_no_text(connect: Connect, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    client = connect()
    await client.chat(messages=[{"role": "user", "content": "zebra"}])
    await client.call("GET", "/zebra")
    assert "arbez" not in caplog.text
    assert "zebra" not in caplog.text
    lines = [record.message for record in caplog.records if "completion tokens" in record.message]
    assert len(lines) == 1
    assert "200 stop" in lines[0]
    assert "6 completion tokens" in lines[0]
