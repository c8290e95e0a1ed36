"""What a body may hold: every fault is a 400 that names its field, in OpenAI's shape, and the server goes on."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pronk.engine.errors import PronkError
from pronk.engine.model.config import GenerationDefaults
from pronk.server.errors import answer_of
from pronk.server.protocol.chat import WITHOUT_EFFECT, ChatCompletionRequest
from pronk.server.protocol.common import parse

from .conftest import Connect
from .fakes import BYTES_TOKENIZER

USER = {"role": "user", "content": "x"}
PNG = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}

TOOLS = [{"type": "function", "function": {"name": "f"}}]
BROKEN_CALL = {"id": "1", "function": {"name": "f", "arguments": "{"}}
STRICT = {"type": "object", "properties": {}, "required": [], "additionalProperties": False}


def schema_format(**fields: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}, **fields}}}


FAULTS: list[tuple[dict[str, Any], str, str]] = [
    ({"temperature": "1"}, "temperature", "invalid_type"),
    ({"temperature": True}, "temperature", "invalid_type"),
    ({"temperature": [1]}, "temperature", "invalid_type"),
    ({"temperature": 2.1}, "temperature", "invalid_value"),
    ({"temperature": -0.1}, "temperature", "invalid_value"),
    ({"temperature": 10**400}, "temperature", "invalid_type"),
    ({"top_p": 1.5}, "top_p", "invalid_value"),
    ({"top_k": -2}, "top_k", "invalid_value"),
    ({"top_k": 10**30}, "top_k", "invalid_value"),
    ({"min_p": 2}, "min_p", "invalid_value"),
    ({"presence_penalty": 3}, "presence_penalty", "invalid_value"),
    ({"frequency_penalty": -3}, "frequency_penalty", "invalid_value"),
    ({"repetition_penalty": 0}, "repetition_penalty", "invalid_value"),
    ({"max_tokens": 0}, "max_tokens", "invalid_value"),
    ({"max_tokens": 1.0}, "max_tokens", "invalid_type"),
    ({"max_tokens": "5"}, "max_tokens", "invalid_type"),
    ({"max_completion_tokens": 0}, "max_completion_tokens", "invalid_value"),
    ({"max_tokens": 10**30}, "max_tokens", "context_length_exceeded"),
    ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "invalid_value"),
    ({"min_tokens": -1}, "min_tokens", "invalid_value"),
    ({"min_tokens": 3, "max_tokens": 2}, "min_tokens", "invalid_value"),
    ({"n": 129}, "n", "invalid_value"),
    ({"n": 0}, "n", "invalid_value"),
    ({"n": "1"}, "n", "invalid_type"),
    ({"stop": ""}, "stop", "invalid_value"),
    ({"stop": ["a"] * 17}, "stop", "invalid_value"),
    ({"stop": 1}, "stop", "invalid_type"),
    ({"stop": ["a", 1]}, "stop[1]", "invalid_type"),
    ({"stop": {}}, "stop", "invalid_type"),
    ({"stop": "a" * 4097}, "stop", "invalid_value"),
    ({"stop_token_ids": [-1]}, "stop_token_ids", "invalid_value"),
    ({"stop_token_ids": [512]}, "stop_token_ids", "invalid_value"),
    ({"stop_token_ids": [1, "a"]}, "stop_token_ids[1]", "invalid_type"),
    ({"seed": 2**63}, "seed", "invalid_value"),
    ({"seed": 1.5}, "seed", "invalid_type"),
    ({"logit_bias": {"a": 1}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"-1": 1}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"²": 1}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"512": 1}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"1": 101}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"1": "x"}}, "logit_bias.1", "invalid_type"),
    ({"logit_bias": {str(n): "x" for n in range(1025)}}, "logit_bias", "invalid_value"),
    ({"logprobs": 5}, "logprobs", "invalid_type"),
    ({"top_logprobs": 1}, "top_logprobs", "invalid_value"),
    ({"top_logprobs": 21, "logprobs": True}, "top_logprobs", "invalid_value"),
    ({"stream": "true"}, "stream", "invalid_type"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
    ({"stream": True, "stream_options": {"chunks": 1}}, "stream_options.chunks", "unknown_parameter"),
    (
        {"stream": True, "stream_options": {"include_obfuscation": True}},
        "stream_options.include_obfuscation",
        "unsupported_parameter",
    ),
    ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type", "unsupported_parameter"),
    ({"tools": TOOLS, "functions": [{"name": "f"}]}, "functions", "invalid_value"),
    ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice.function.name",
     "invalid_value"),
    ({"functions": [{"name": "f f"}]}, "functions[0].name", "invalid_value"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing_required_parameter"),
    (schema_format(schema=None), "response_format.json_schema.schema", "missing_required_parameter"),
    (schema_format(name=None), "response_format.json_schema.name", "missing_required_parameter"),
    (schema_format(name="a b"), "response_format.json_schema.name", "invalid_value"),
    (schema_format(name="a" * 65), "response_format.json_schema.name", "invalid_value"),
    (schema_format(schema=[]), "response_format.json_schema.schema", "invalid_type"),
    (schema_format(strict="yes"), "response_format.json_schema.strict", "invalid_type"),
    (schema_format(strictly=True), "response_format.json_schema.strictly", "unknown_parameter"),
    (schema_format(strict=True), "response_format.json_schema.schema", "invalid_value"),
    (schema_format(schema={"const": "impossible"}), "response_format.json_schema.schema", "invalid_value"),
    ({"structured_outputs": {}}, "structured_outputs", "invalid_value"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "invalid_value"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "invalid_value"),
    ({"structured_outputs": {"choice": [1]}}, "structured_outputs.choice[0]", "invalid_type"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "invalid_value"),
    ({"structured_outputs": {"json": "1"}}, "structured_outputs.json", "invalid_value"),
    ({"structured_outputs": {"json": 1}}, "structured_outputs.json", "invalid_type"),
    ({"structured_outputs": {"regex": "impossible"}}, "structured_outputs", "invalid_value"),
    ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag", "unknown_parameter"),
    ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs",
     "invalid_value"),
    (
        {"tools": TOOLS, "structured_outputs": {"regex": "impossible"}},
        "structured_outputs",
        "invalid_value",
    ),
    (
        {"tools": [{"type": "function", "function": {"name": "impossible", "strict": True, "parameters": STRICT}}]},
        "tools",
        "invalid_value",
    ),
    ({"functions": [{"name": "impossible", "strict": True, "parameters": STRICT}]}, "functions", "invalid_value"),
    ({"prompt_logprobs": 21}, "prompt_logprobs", "invalid_value"),
    ({"prompt_logprobs": -1}, "prompt_logprobs", "invalid_value"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "invalid_value"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "invalid_value"),
    ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens", "invalid_value"),
    ({"allowed_token_ids": []}, "allowed_token_ids", "invalid_value"),
    ({"allowed_token_ids": [512]}, "allowed_token_ids", "invalid_value"),
    ({"bad_words": [""]}, "bad_words[0]", "invalid_value"),
    ({"bad_words": ["a", " "]}, "bad_words[1]", "invalid_value"),
    ({"bad_words": ["a"] * 513}, "bad_words", "invalid_value"),
    ({"cache_salt": ""}, "cache_salt", "invalid_value"),
    ({"cache_salt": "s" * 1025}, "cache_salt", "invalid_value"),
    ({"priority": 2**31}, "priority", "invalid_value"),
    ({"priority": "high"}, "priority", "invalid_type"),
    ({"service_tier": "gold"}, "service_tier", "invalid_value"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message", "invalid_value"),
    ({"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs.enable_thinking", "unknown_parameter"),
    ({"chat_template_kwargs": {"date_string": 1}}, "chat_template_kwargs.date_string", "invalid_type"),
    ({"length_penalty": 1.0}, "length_penalty", "invalid_value"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_value"),
    ({"modalities": ["audio"]}, "modalities", "unsupported_parameter"),
    ({"verbosity": "low"}, "verbosity", "unsupported_parameter"),
    ({"guided_json": {}}, "guided_json", "unsupported_parameter"),
    ({"chat_template": "{{ messages }}"}, "chat_template", "unknown_parameter"),
    ({"web_search_options": {}}, "web_search_options", "unsupported_parameter"),
    ({"audio": {"voice": "x", "format": "wav"}}, "audio", "unsupported_parameter"),
    ({"moderation": {"model": "x"}}, "moderation", "unsupported_parameter"),
    ({"messages": []}, "messages", "invalid_value"),
    ({"messages": None}, "messages", "missing_required_parameter"),
    ({"messages": "x"}, "messages", "invalid_type"),
    ({"messages": [USER] * 2049}, "messages", "invalid_value"),
    ({"messages": [USER, 1]}, "messages[1]", "invalid_type"),
    ({"messages": [{"content": "x"}]}, "messages[0].role", "missing_required_parameter"),
    ({"messages": [{"role": "critic", "content": "x"}]}, "messages[0].role", "invalid_value"),
    ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].name", "missing_required_parameter"),
    ({"messages": [{"role": "function", "content": "x", "name": "f"}]}, "messages[0].role", "invalid_value"),
    ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages[0].role", "invalid_value"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "missing_required_parameter"),
    ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content", "invalid_type"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "invalid_value"),
    ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]", "invalid_type"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text",
     "missing_required_parameter"),
    ({"messages": [{"role": "user", "content": [{"type": ["text"], "text": "a"}]}]}, "messages[0].content[0].type",
     "invalid_value"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "size": 1}]}]},
     "messages[0].content[0].size", "unknown_parameter"),
    ({"messages": [{"role": "assistant", "content": [{"type": "refusal", "refusal": "a", "size": 1}]}]},
     "messages[0].content[0].size", "unknown_parameter"),
    ({"messages": [USER, {"role": "user", "content": [{"type": "text", "text": "a"}, PNG]}]},
     "messages[1].content[1]", "unsupported_parameter"),
    ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "messages[0].content[0].type", "invalid_value"),
    ({"messages": [{"role": "user", "content": [{"type": "refusal", "refusal": "no"}]}]}, "messages[0].content[0]",
     "invalid_value"),
    ({"messages": [{**USER, "cache_control": {}}]}, "messages[0].cache_control", "unknown_parameter"),
    ({"messages": [{"role": "assistant", "content": "x", "audio": {"id": "a"}}]}, "messages[0].audio",
     "unknown_parameter"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f"}}]}]},
     "messages[0].tool_calls[0].function.arguments", "missing_required_parameter"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", "missing_required_parameter"),
    ({"model": None}, "model", "missing_required_parameter"),
    ({"model": 1}, "model", "invalid_type"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param", "code"), FAULTS, ids=[json.dumps(fault[0])[:60] for fault in FAULTS])
async def test_a_fault_is_a_400_that_names_its_field(
    connect: Connect, fields: dict[str, Any], param: str, code: str
) -> None:
    client = connect()
    reply = await client.chat(**fields)
    assert (reply.status, reply.error["param"], reply.error["code"]) == (400, param, code)
    assert reply.error["type"] == "invalid_request_error"
    assert reply.error["message"]
    assert client.engine.requests == []


async def test_a_wrong_model_is_a_404(connect: Connect) -> None:
    reply = await connect().chat(model="gpt-4o")
    assert (reply.status, reply.error["code"], reply.error["param"]) == (404, "model_not_found", "model")
    assert "tiny" in reply.error["message"]


ACCEPTED: list[dict[str, Any]] = [
    {name: None for name in ChatCompletionRequest.model_fields if name not in ("messages", "model")},
    {"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "n": 1, "modalities": ["text"]},
    {"functions": [], "function_call": "none", "verbosity": "medium", "parallel_tool_calls": True},
    {"service_tier": "auto"},
    {
        "user": "u", "safety_identifier": "s", "metadata": {"a": "b"}, "store": True,
        "prompt_cache_key": "k", "prompt_cache_retention": "24h", "prompt_cache_options": {"mode": "implicit"},
        "prediction": {"type": "content", "content": "x"}, "reasoning_effort": "low",
    },
    {"max_tokens": 3, "max_completion_tokens": 3},
    {"logprobs": False, "top_logprobs": 0},
    {"temperature": 1, "top_p": 0, "top_k": -1},
    {"temperature": 1e-300},
    {"logit_bias": {}},
    {"stop": ["a"] * 16},
    {"stop": "\n"},
    {"messages": [{"role": "system", "content": "a"}, USER, {"role": "system", "content": "b"}, USER]},
    {"messages": [USER, {"role": "assistant", "content": None}, USER]},
    {"messages": [USER, {"role": "assistant", "tool_calls": [BROKEN_CALL]}]},
    {"messages": [USER, {"role": "assistant", "content": "a", "reasoning_content": None, "name": "bot"}, USER]},
    {"messages": [{"role": "user", "content": "nul \u0000, bell \u0007, \U0001f999"}]},
    {"messages": [{"role": "user", "content": ""}]},
]  # fmt: skip


@pytest.mark.parametrize("fields", ACCEPTED, ids=[json.dumps(fields)[:60] for fields in ACCEPTED])
async def test_what_is_accepted(connect: Connect, fields: dict[str, Any]) -> None:
    assert (await connect().chat(**fields)).status == 200


async def test_fields_without_effect_have_none(connect: Connect) -> None:
    """Each one is documented with its reason, and the engine is told the same with and without it."""
    client = connect()
    with_all = next(fields for fields in ACCEPTED if fields.get("store"))
    assert set(with_all) | {"name"} == set(WITHOUT_EFFECT)
    await client.chat(seed=1)
    await client.chat(seed=1, **with_all)
    first, second = client.engine.requests
    assert (first.prompt, first.params) == (second.prompt, second.params)


BAD_JSON = {
    "nothing": b"",
    "cut": b'{"model": "tiny"',
    "a list": b"[]",
    "null": b"null",
    "a number": b"1",
    "NaN": b'{"model": "tiny", "temperature": NaN}',
    "infinity": b'{"model": "tiny", "temperature": -Infinity}',
    "a huge exponent": b'{"model": "tiny", "temperature": 1e999}',
    "a huge integer": b'{"model": "tiny", "seed": 1' + b"0" * 5000 + b"}",
    "no UTF-8": b'{"model": "\xff"}',
    "UTF-16": '{"model": "tiny"}'.encode("utf-16"),
    "a lone surrogate": b'{"model": "\\ud800"}',
    "an encoded surrogate": b'{"model": "\xed\xa0\x80"}',
    "deep lists": b'{"messages": ' + b"[" * 200_000,
    "deep objects": b'{"a":' * 200_000,
    "something after it": b'{"model": "tiny"} x',
    "single quotes": b"{'model': 'tiny'}",
}


@pytest.mark.parametrize("body", BAD_JSON.values(), ids=BAD_JSON.keys())
async def test_bad_json_is_a_400_and_the_server_goes_on(connect: Connect, body: bytes) -> None:
    client = connect()
    reply = await client.call("POST", "/v1/chat/completions", body)
    assert (reply.status, reply.error["code"]) == (400, "invalid_json")
    assert (await client.chat()).status == 200


TOLD = {
    b"": "it is empty",
    b" \n": "it is empty",
    b'{"model": "tiny"': "truncated",
    b'{"model": "ab\xff"}': "byte 13 cannot be read",
    b'{"model": "\\ud83d"}': "surrogate pair (byte 11)",
    b'{"model": "\\ud83d\\u0041"}': "surrogate pair (byte 11)",
    b'{"model": "a\\ude00"}': "surrogate pair (byte 12)",
    b'{"model": "\\ud83d\\ude00"': "truncated",
}


@pytest.mark.parametrize(("body", "sentence"), TOLD.items())
async def test_what_is_wrong_with_the_json_is_told(connect: Connect, body: bytes, sentence: str) -> None:
    reply = await connect().call("POST", "/v1/chat/completions", body)
    assert sentence in reply.error["message"]


async def test_an_error_is_short_whatever_it_tells_back(connect: Connect) -> None:
    long = "x" * 100_000
    for fields in ({long: 1}, {"model": long}, {"messages": [{**USER, long: 1}]}):
        reply = await connect().chat(**fields)
        assert reply.status in (400, 404)
        assert len(reply.body) < 1500


async def test_any_content_type_is_read_as_json(connect: Connect) -> None:
    body = json.dumps({"model": "tiny", "messages": [USER]}).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "nonsense", "multipart/form-data; boundary=x"):
        reply = await connect().call("POST", "/v1/chat/completions", body, headers={"Content-Type": kind})
        assert reply.status == 200


async def test_the_last_of_two_equal_keys_counts(connect: Connect) -> None:
    client = connect()
    body = b'{"model": "x", "model": "tiny", "messages": [{"role": "user", "content": "x"}]}'
    assert (await client.call("POST", "/v1/chat/completions", body)).status == 200


async def test_bodies_that_are_too_long(connect: Connect) -> None:
    client = connect(max_body_bytes=1000)
    fitting = json.dumps({"model": "tiny", "messages": [USER]}).encode()
    fitting += b" " * (1000 - len(fitting))
    assert (await client.call("POST", "/v1/chat/completions", [fitting[:10], fitting[10:]])).status == 200
    for body in ([fitting + b" "], [fitting, b" "], [b"x" * 400] * 5):
        reply = await client.call("POST", "/v1/chat/completions", body)
        assert (reply.status, reply.error["code"]) == (413, "body_too_large")


async def test_routes_and_methods_that_do_not_exist(connect: Connect) -> None:
    client = connect()
    for path in ("/", "/v1", "/v1/chat", "/v1/chat/completions/", "/docs", "/\u0000", "/v1/../health", "//health"):
        reply = await client.call("GET", path)
        assert reply.status == 404, path
        assert reply.error["code"] == "unknown_url"
    for method in ("GET", "PUT", "DELETE", "OPTIONS"):
        reply = await client.call(method, "/v1/chat/completions")
        assert (reply.status, reply.error["code"]) == (405, "method_not_allowed")
        assert reply.headers["allow"] == "POST"


async def test_the_description_can_be_read(connect: Connect) -> None:
    document = (await connect().call("GET", "/openapi.json")).json
    schema = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(schema["properties"]) == set(ChatCompletionRequest.model_fields)
    assert all("description" in field for field in schema["properties"].values())
    text = json.dumps(document)
    assert "422" not in text
    assert "$defs" not in text
    references = re.findall(r'"#/components/schemas/(\w+)"', text)
    assert references
    assert set(references) <= set(document["components"]["schemas"])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from(sorted(ChatCompletionRequest.model_fields))
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from(["user", "assistant", "tool", "system", "x"]) | JSON,
            "content": JSON,
            "tool_calls": JSON,
            "name": JSON,
        },
    ),
    max_size=3,
)


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(FIELDS, JSON, max_size=5), MESSAGES | JSON)
def test_any_json_is_accepted_or_refused_by_name(fields: dict[str, Any], messages: Any) -> None:
    body = json.dumps({"model": "tiny", "messages": messages, **fields}).encode("utf-8", "surrogatepass")
    fault = fault_in(body)
    if fault is not None:
        assert answer_of(fault).status == 400
        assert str(fault)
        assert fault.param or answer_of(fault).code == "invalid_json"  # type: ignore[attr-defined]


def fault_in(body: bytes) -> PronkError | None:
    try:
        asked = parse(ChatCompletionRequest, body)
        asked.sampling_params(GenerationDefaults(), BYTES_TOKENIZER, grammar=asked.constraint().grammar)
    except PronkError as error:
        return error
    return None
