"""Tokens and texts without generating: tokenize, detokenize, render; and what monitors ask: ping, version, load."""

from __future__ import annotations

import json
from typing import Any

import pytest

import pronk

from .conftest import Connect
from .fakes import BYTES_TOKENIZER, CONTEXT, END_OF_TURN, Client, Reply

BEGIN = BYTES_TOKENIZER.bos_id
USER = {"role": "user", "content": "zebra"}
TOOL = {"type": "function", "function": {"name": "weather"}}


async def post(client: Client, path: str, **body: Any) -> Reply:
    return await client.call("POST", path, json.dumps(body).encode())


async def test_a_text(connect: Connect) -> None:
    client = connect()
    assert (await post(client, "/tokenize", prompt="é<|eot_id|>")).json == {
        "count": 13,
        "max_model_len": CONTEXT,
        "tokens": [BEGIN, *"é<|eot_id|>".encode()],
        "token_strs": None,
    }
    bare = await post(client, "/tokenize", model="tiny", prompt="ab", add_special_tokens=False, return_token_strs=True)
    assert (bare.json["tokens"], bare.json["token_strs"]) == ([97, 98], ["a", "b"])


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tools": [TOOL]},
        {"tools": [TOOL], "tool_choice": "none"},
        {"continue_final_message": True},
        {"add_generation_prompt": False},
        {"chat_template_kwargs": {"date_string": "1 Jan 1970"}},
    ],
    ids=str,
)
async def test_a_chat_is_the_prompt_that_the_engine_gets(connect: Connect, fields: dict[str, Any]) -> None:
    client = connect()
    messages = [USER, {"role": "assistant", "content": "Yes"}]
    assert (await client.chat(messages=messages, **fields)).status == 200
    prompt = client.engine.requests[0].prompt
    tokenized = (await post(client, "/tokenize", messages=messages, **fields)).json
    assert tokenized["tokens"] == prompt
    assert tokenized["count"] == len(prompt)
    rendered = (await post(client, "/v1/chat/completions/render", model="tiny", messages=messages, **fields)).json
    assert rendered["token_ids"] == prompt
    assert rendered["text"] == BYTES_TOKENIZER.decode(prompt, skip_special_tokens=False)
    assert (rendered["count"], rendered["max_model_len"]) == (len(prompt), CONTEXT)
    assert len(client.engine.requests) == 1


async def test_a_prompt_tells_how_much_of_it_is_cached(connect: Connect) -> None:
    client = connect(api_keys=("mine", "other"))
    chat = {"model": "tiny", "messages": [USER]}

    async def ask(path: str, key: str = "mine", **body: Any) -> Any:
        headers = {"Authorization": f"Bearer {key}"}
        return (await client.call("POST", path, json.dumps(body).encode(), headers=headers)).json

    async def cached(key: str = "mine", **fields: Any) -> int:
        told: int = (await ask("/v1/chat/completions/render", key, **chat, **fields))["num_cached_tokens"]
        return told

    assert await cached() == 0
    await ask("/v1/chat/completions", **chat)
    prompt = client.engine.requests[0].prompt
    assert await cached() == (len(prompt) - 1) // 16 * 16 > 0
    assert await cached("other") == 0
    assert await cached(cache_salt="one of my own") == 0
    assert await cached(prompt_logprobs=1) == 0, "a prompt that is to be scored is computed whole"
    prompts = [prompt[:20], prompt[1:], [*prompt, 1, 2, 3]]
    told = await ask("/v1/completions/render", model="tiny", prompt=prompts)
    assert [one["num_cached_tokens"] for one in told] == [16, 0, len(prompt) // 16 * 16]
    assert len(client.engine.requests) == 1
    client.engine.die()
    assert (await ask("/v1/chat/completions/render", **chat))["error"]["code"] == "engine_down"


async def test_one_more_begin_of_text(connect: Connect) -> None:
    client = connect()
    usual = (await post(client, "/tokenize", messages=[USER])).json["tokens"]
    assert (await post(client, "/tokenize", messages=[USER], add_special_tokens=True)).json["tokens"] == [BEGIN, *usual]


async def test_the_way_back(connect: Connect) -> None:
    client = connect()
    for tokens, text in (
        ([], ""),
        ([BEGIN, *"né".encode(), END_OF_TURN], "<|begin_of_text|>né<|eot_id|>"),
        ([0xC3], "\ufffd"),
    ):
        assert (await post(client, "/detokenize", tokens=tokens)).json == {"prompt": text}


async def test_the_tokenizer(connect: Connect) -> None:
    told = (await connect().call("GET", "/tokenizer_info")).json
    assert (told["bos_token"], told["eos_token"], told["eos_tokens"]) == (
        "<|begin_of_text|>",
        "<|eot_id|>",
        ["<|eot_id|>"],
    )
    assert (told["vocab_size"], told["model_max_length"]) == (512, CONTEXT)


async def test_prompts_of_completions(connect: Connect) -> None:
    client = connect()
    reply = await post(client, "/v1/completions/render", model="tiny", prompt=["ab", "c"], truncate_prompt_tokens=2)
    assert [(entry["token_ids"], entry["text"]) for entry in reply.json] == [
        ([97, 98], "ab"),
        ([BEGIN, 99], "<|begin_of_text|>c"),
    ]
    assert not client.engine.requests


FAULTS: list[tuple[str, dict[str, Any], int, str | None]] = [
    ("/tokenize", {}, 400, "prompt"),
    ("/tokenize", {"prompt": 1}, 400, "prompt"),
    ("/tokenize", {"prompt": "a", "messages": [USER]}, 400, "prompt"),
    ("/tokenize", {"messages": []}, 400, "messages"),
    ("/tokenize", {"prompt": "a", "model": "gpt-4o"}, 404, "model"),
    ("/tokenize", {"messages": [USER], "temperature": 1}, 400, "temperature"),
    ("/tokenize", {"messages": [USER], "add_generation_prompt": True, "continue_final_message": True}, 400,
     "continue_final_message"),
    ("/detokenize", {}, 400, "tokens"),
    ("/detokenize", {"tokens": [1, "a"]}, 400, "tokens[1]"),
    ("/detokenize", {"tokens": [-1]}, 400, "tokens"),
    ("/detokenize", {"tokens": [512]}, 400, "tokens"),
    ("/detokenize", {"tokens": [10**30]}, 400, "tokens"),
    ("/v1/chat/completions/render", {"messages": [USER]}, 400, "model"),
    ("/v1/completions/render", {"model": "tiny", "prompt": []}, 400, "prompt"),
    ("/v1/completions/render", {"model": "tiny", "allowed_token_ids": [-1]}, 400, "allowed_token_ids"),
    ("/v1/completions/render", {"model": "tiny", "stop_token_ids": [1, -1]}, 400, "stop_token_ids"),
    ("/v1/completions/render", {"model": "tiny", "prompt": [512]}, 400, "prompt"),
    ("/v1/completions/render", {"model": "tiny", "prompt": [[1], [-1]]}, 400, "prompt"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "status", "param"), FAULTS, ids=[f"{f[0]} {f[1]}"[:60] for f in FAULTS])
async def test_faults(connect: Connect, path: str, body: dict[str, Any], status: int, param: str | None) -> None:
    reply = await post(connect(), path, **body)
    assert (reply.status, reply.error["param"]) == (status, param)


async def test_what_monitors_ask(connect: Connect) -> None:
    client = connect(api_keys=("secret",))
    for method in ("GET", "POST"):
        assert (await client.call(method, "/ping")).json == {"status": "ready"}
    for path in ("/version", "/load", "/tokenize"):
        assert (await client.call("GET" if path != "/tokenize" else "POST", path)).status == 401
    key = {"Authorization": "Bearer secret"}
    assert (await client.call("GET", "/version", headers=key)).json == {"version": pronk.__version__}
    assert (await client.call("GET", "/load", headers=key)).json == {
        "server_load": 0, "running": 0, "waiting": 0, "kv_cache_usage": 0.0,
    }  # fmt: skip
    client.engine.die()
    assert (await client.call("GET", "/ping")).status == 503
