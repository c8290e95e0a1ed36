"""Every field of a chat completion: what the engine is told because of it, and what the client is."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pronk.engine.request import Grammar, Output, Request, SamplingParams, Timing
from pronk.server.protocol.sampling import choices

from .conftest import Connect
from .fakes import BYTES, BYTES_TOKENIZER, CONTEXT, END_OF_TURN, FakeEngine, Reply, outputs

USER = {"role": "user", "content": "stressed"}


def text_of(request: Request) -> str:
    return BYTES_TOKENIZER.decode(request.prompt, skip_special_tokens=False)


def says(*texts: str) -> FakeEngine:
    """Choice i says the i-th text."""

    def script(request: Request) -> list[Output]:
        name, _, index = request.request_id.rpartition("-")
        text = texts[int(index)] if len(texts) > 1 and name.startswith("chatcmpl") else texts[0]
        return outputs([*text.encode(), END_OF_TURN], logprobs=request.params.logprobs)

    return FakeEngine(script)


def folded(reply: Reply) -> list[dict[str, Any]]:
    """What a client makes of a stream: for each choice a message, and its finish reason."""
    *chunks, done = reply.events
    assert done == "[DONE]"
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for told in chunk["choices"]:
            choice = choices.setdefault(told["index"], {"content": "", "calls": [], "token_ids": [], "finish": None})
            assert choice["finish"] is None
            choice["content"] += told["delta"].get("content") or ""
            choice["token_ids"] += told.get("token_ids") or []
            choice["finish"] = told["finish_reason"]
            for call in told["delta"].get("tool_calls", ()):
                if "id" in call:
                    assert call["index"] == len(choice["calls"])
                    assert call["type"] == "function"
                    choice["calls"].append({"id": call["id"], "name": call["function"]["name"], "arguments": ""})
                choice["calls"][call["index"]]["arguments"] += call["function"]["arguments"]
            legacy = told["delta"].get("function_call")
            if legacy:
                choice.setdefault("function_call", {"name": "", "arguments": ""})
                for name, value in legacy.items():
                    choice["function_call"][name] += value
    return [choices[index] for index in sorted(choices)]


# n and seed


async def test_choices_have_seeds_of_their_own_and_one_prompt(connect: Connect) -> None:
    client = connect(says("one", "two", "three"))
    reply = await client.chat(n=3, seed=7)
    told = [(choice["index"], choice["message"]["content"]) for choice in reply.json["choices"]]
    assert told == [(0, "one"), (1, "two"), (2, "three")]
    by_name = sorted(client.engine.requests, key=lambda request: request.request_id)
    assert [request.params.seed for request in by_name] == [7, 8, 9]
    assert len({tuple(request.prompt) for request in by_name}) == 1
    assert reply.json["usage"]["prompt_tokens"] == len(by_name[0].prompt)
    assert reply.json["usage"]["completion_tokens"] == len("onetwothree") + 3


async def test_without_a_seed_the_engine_chooses_for_each(connect: Connect) -> None:
    client = connect()
    await client.chat(n=2)
    assert [request.params.seed for request in client.engine.requests] == [None, None]


def test_seeds_count_up_from_the_servers_own() -> None:
    assert [params.seed for params in choices(SamplingParams(), 3, 5)] == [None, 6, 7]
    assert [params.seed for params in choices(SamplingParams(seed=2**63 - 1), 2, 5)] == [2**63 - 1, -(2**63)]


async def test_a_stream_of_several_choices(connect: Connect) -> None:
    client = connect(says("one", "two"))
    reply = await client.chat(n=2, stream=True, stream_options={"include_usage": True})
    roles = [chunk["choices"][0] for chunk in reply.events[:2]]
    assert [(role["index"], role["delta"]["role"]) for role in roles] == [(0, "assistant"), (1, "assistant")]
    assert [(choice["content"], choice["finish"]) for choice in folded(reply)] == [("one", "stop"), ("two", "stop")]
    usage = reply.events[-2]["usage"]
    assert usage["prompt_tokens"] == len(client.engine.requests[0].prompt)
    assert usage["completion_tokens"] == len("onetwo") + 2


# What the text must be


SCHEMA = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "integer"}}}
FORMATS: list[tuple[dict[str, Any], Grammar | None]] = [
    ({}, None),
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": {"type": "json_object"}}, Grammar("json", '{"type":"object"}')),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
        Grammar("json", json.dumps(SCHEMA)),
    ),
    ({"structured_outputs": {"json": SCHEMA}}, Grammar("json", json.dumps(SCHEMA))),
    ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, Grammar("json", json.dumps(SCHEMA))),
    ({"structured_outputs": {"json_object": True}}, Grammar("json", '{"type":"object"}')),
    ({"structured_outputs": {"regex": "[ab]+"}}, Grammar("regex", "[ab]+")),
    ({"structured_outputs": {"choice": ["yes", "né"]}}, Grammar("choice", '["yes", "n\\u00e9"]')),
    ({"structured_outputs": {"grammar": 'start: "a"'}}, Grammar("lark", 'start: "a"')),
    ({"structured_outputs": {"grammar": 'root ::= "a"'}}, Grammar("gbnf", 'root ::= "a"')),
]


@pytest.mark.parametrize(("fields", "grammar"), FORMATS, ids=[json.dumps(fields)[:50] for fields, _ in FORMATS])
async def test_formats_are_grammars(connect: Connect, fields: dict[str, Any], grammar: Grammar | None) -> None:
    client = connect()
    assert (await client.chat(**fields)).status == 200
    assert client.engine.requests[0].params.grammar == grammar


# Tools


WEATHER = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
CALL = '{"name": "weather", "parameters": {"b": "Ä", "a": 1}}'


async def test_tools_are_shown_and_calls_are_told(connect: Connect) -> None:
    client = connect(says(CALL))
    for stream in (False, True):
        reply = await client.chat(tools=[WEATHER], stream=stream)
        if stream:
            (choice,) = folded(reply)
            (call,) = choice["calls"]
            assert (choice["content"], choice["finish"]) == ("", "tool_calls")
            name, arguments = call["name"], call["arguments"]
        else:
            choice = reply.json["choices"][0]
            assert choice["finish_reason"] == "tool_calls"
            assert choice["message"]["content"] is None
            (call,) = choice["message"]["tool_calls"]
            assert call["type"] == "function"
            name, arguments = call["function"]["name"], call["function"]["arguments"]
        assert call["id"].startswith("call_")
        assert (name, arguments) == ("weather", '{"b": "Ä", "a": 1}')
        assert '"name": "weather"' in text_of(client.engine.requests[-1])


async def test_without_tools_the_same_text_is_content(connect: Connect) -> None:
    for fields in ({}, {"tools": []}, {"tools": [WEATHER], "tool_choice": "none"}):
        reply = await connect(says(CALL)).chat(**fields)
        assert reply.json["choices"][0]["message"] == {"role": "assistant", "content": CALL, "refusal": None}
        assert reply.json["choices"][0]["finish_reason"] == "stop"


async def test_each_choice_has_calls_of_its_own(connect: Connect) -> None:
    client = connect(says(CALL, "no call", CALL))
    reply = await client.chat(tools=[WEATHER], n=3)
    first, second, third = reply.json["choices"]
    assert [choice["finish_reason"] for choice in (first, second, third)] == ["tool_calls", "stop", "tool_calls"]
    assert "tool_calls" not in second["message"]
    assert first["message"]["tool_calls"][0]["id"] != third["message"]["tool_calls"][0]["id"]
    streamed = folded(await client.chat(tools=[WEATHER], n=3, stream=True))
    assert [len(choice["calls"]) for choice in streamed] == [1, 0, 1]


async def test_a_required_call_is_a_grammar(connect: Connect) -> None:
    client = connect(says(CALL))
    await client.chat(tools=[WEATHER], tool_choice="required")
    await client.chat(tools=[WEATHER], tool_choice={"type": "function", "function": {"name": "weather"}})
    await client.chat(tools=[WEATHER])
    kinds = [request.params.grammar and request.params.grammar.kind for request in client.engine.requests]
    assert kinds == ["lark", "lark", None]


async def test_functions_are_answered_in_their_own_words(connect: Connect) -> None:
    client = connect(says(CALL))
    wanted = {"name": "weather", "arguments": '{"b": "Ä", "a": 1}'}
    whole = (await client.chat(functions=[WEATHER["function"]])).json["choices"][0]
    assert whole["finish_reason"] == "function_call"
    assert whole["message"]["function_call"] == wanted
    assert "tool_calls" not in whole["message"]
    (streamed,) = folded(await client.chat(functions=[WEATHER["function"]], stream=True))
    assert (streamed["finish"], streamed["function_call"]) == ("function_call", wanted)


async def test_a_history_of_functions_is_one_of_tools(connect: Connect) -> None:
    client = connect()
    call = {"name": "weather", "arguments": '{"b": "x"}'}
    modern = [
        USER,
        {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": call}]},
        {"role": "tool", "tool_call_id": "1", "content": "sunny"},
    ]
    older = [
        USER,
        {"role": "assistant", "content": None, "function_call": call},
        {"role": "function", "name": "weather", "content": "sunny"},
    ]
    assert (await client.chat(messages=modern)).status == 200
    assert (await client.chat(messages=older)).status == 200
    first, second = client.engine.requests
    assert first.prompt == second.prompt
    assert "sunny" in text_of(first)


async def test_a_refusal_in_the_history_is_its_text(connect: Connect) -> None:
    client = connect()
    for said in ({"content": "No."}, {"content": None, "refusal": "No."}, {"content": "", "refusal": "No."}):
        await client.chat(messages=[USER, {"role": "assistant", **said}, USER])
    first, *others = (request.prompt for request in client.engine.requests)
    assert "No." in text_of(client.engine.requests[0])
    assert all(prompt == first for prompt in others)


async def test_logprobs_come_with_calls(connect: Connect) -> None:
    client = connect(says("Hm. " + CALL))
    whole = (await client.chat(tools=[WEATHER], logprobs=True)).json
    entries = whole["choices"][0]["logprobs"]["content"]
    assert len(entries) == whole["usage"]["completion_tokens"]
    streamed = (await client.chat(tools=[WEATHER], logprobs=True, stream=True)).events[:-1]
    told = [chunk["choices"][0]["logprobs"] for chunk in streamed]
    assert [entry for logprobs in told if logprobs for entry in logprobs["content"]] == entries


# The prompt


async def test_continue_final_message(connect: Connect) -> None:
    client = connect()
    messages = [USER, {"role": "assistant", "content": "Well"}]
    await client.chat(messages=messages, continue_final_message=True)
    await client.chat(messages=messages, continue_final_message=True, add_generation_prompt=False)
    await client.chat(messages=messages, add_generation_prompt=False)
    await client.chat(messages=messages)
    continued, again, ended, usual = (text_of(request) for request in client.engine.requests)
    assert continued == again
    assert continued.endswith("\n\nWell")
    assert ended == continued + "<|eot_id|>"
    assert usual == ended + "<|start_header_id|>assistant<|end_header_id|>\n\n"


async def test_chat_template_kwargs(connect: Connect) -> None:
    client = connect()
    await client.chat(chat_template_kwargs={"date_string": "1 Jan 1970 <|eot_id|>"})
    prompt = client.engine.requests[0].prompt
    assert "Today Date: 1 Jan 1970 <|eot_id|>\n" in text_of(client.engine.requests[0])
    assert prompt.count(END_OF_TURN) == 2
    await client.chat(tools=[WEATHER], chat_template_kwargs={"tools_in_user_message": False})
    system = text_of(client.engine.requests[1]).split("<|eot_id|>")[0]
    assert '"weather"' in system


@pytest.mark.parametrize(
    ("keep", "max_tokens", "left"),
    [(5, None, 5), (10**9, None, None), (-1, None, CONTEXT - 1), (-1, 100, CONTEXT - 100)],
)
async def test_truncate_prompt_tokens(connect: Connect, keep: int, max_tokens: int | None, left: int | None) -> None:
    client = connect()
    content = "x" * (CONTEXT if left else 10)
    fields = {"messages": [{"role": "user", "content": content}], "truncate_prompt_tokens": keep}
    reply = await client.chat(**fields, max_tokens=max_tokens)
    assert reply.status == 200
    prompt = client.engine.requests[0].prompt
    assert left is None or len(prompt) == left
    assert prompt[-3:] == [BYTES.special_tokens["<|end_header_id|>"], 10, 10]
    assert reply.json["usage"]["prompt_tokens"] == len(prompt)


# Which tokens


async def test_words_become_tokens(connect: Connect) -> None:
    client = connect()
    await client.chat(bad_words=["no", " é", "no"], allowed_token_ids=[97, 98])
    params = client.engine.requests[0].params
    assert params.bad_words == (tuple(b"no"), tuple(b" no"), tuple("é".encode()), tuple(" é".encode()))
    assert params.allowed_token_ids == (97, 98)


# Who else is there


async def test_salts_divide_one_keys_cache(connect: Connect) -> None:
    client = connect(api_keys=("one", "two"))
    salts: list[str] = []
    for key, fields in (
        ("one", {}),
        ("one", {"cache_salt": "a"}),
        ("one", {"cache_salt": "b"}),
        ("two", {"cache_salt": "a"}),
    ):
        body = {"model": "tiny", "messages": [USER], **fields}
        reply = await client.call(
            "POST", "/v1/chat/completions", json.dumps(body).encode(), headers={"Authorization": f"Bearer {key}"}
        )
        assert reply.status == 200
        salts.append(client.engine.requests[-1].cache_salt)
    assert len(set(salts)) == 4
    await client.call(
        "POST", "/v1/chat/completions", json.dumps({"model": "tiny", "messages": [USER], "cache_salt": "a"}).encode(),
        headers={"Authorization": "Bearer one"},
    )  # fmt: skip
    assert client.engine.requests[-1].cache_salt == salts[1]


async def test_priority(connect: Connect) -> None:
    client = connect()
    for fields in ({}, {"priority": -3}, {"service_tier": "flex"}, {"service_tier": "flex", "priority": -3}):
        await client.chat(**fields)
    assert [request.priority for request in client.engine.requests] == [0, -3, 1, -3]


# What is told


async def test_prompt_logprobs(connect: Connect) -> None:
    client = connect()
    body = (await client.chat(prompt_logprobs=2, n=2)).json
    first, second = client.engine.requests
    assert (first.params.prompt_logprobs, second.params.prompt_logprobs) == (2, None)
    prompt, told = first.prompt, body["prompt_logprobs"]
    assert len(told) == len(prompt)
    assert told[0] is None
    for token, entry in zip(prompt[1:], told[1:], strict=True):
        assert next(iter(entry)) == str(token)
        assert entry[str(token)]["logprob"] == 0
        assert {key: value["logprob"] for key, value in entry.items() if key != str(token)} == {
            str((token + 1) % 512): -0.125
        }
        assert entry[str(token)]["rank"] == 1
        assert entry[str(token)]["decoded_token"] == BYTES.token_bytes(token).decode(errors="replace")
    assert "prompt_logprobs" not in (await client.chat()).json


async def test_prompt_logprobs_without_others_have_no_rank(connect: Connect) -> None:
    told = (await connect().chat(prompt_logprobs=0)).json["prompt_logprobs"]
    assert all(len(entry) == 1 and next(iter(entry.values()))["rank"] is None for entry in told[1:])


async def test_token_ids(connect: Connect) -> None:
    client = connect(says("é"))
    body = (await client.chat(return_token_ids=True, n=2)).json
    assert body["prompt_token_ids"] == client.engine.requests[0].prompt
    assert [choice["token_ids"] for choice in body["choices"]] == [[*"é".encode(), END_OF_TURN]] * 2
    reply = await client.chat(return_token_ids=True, stream=True)
    assert reply.events[0]["prompt_token_ids"] == client.engine.requests[-1].prompt
    assert all("prompt_token_ids" not in chunk for chunk in reply.events[1:-1])
    assert folded(reply)[0]["token_ids"] == [*"é".encode(), END_OF_TURN]


async def test_usage_in_every_chunk(connect: Connect) -> None:
    reply = await connect(says("abc")).chat(
        stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True}
    )
    counts = [chunk["usage"]["completion_tokens"] for chunk in reply.events[:-1]]
    assert counts[0] == 0
    assert counts == sorted(counts)
    assert counts[-1] == 4
    assert len({chunk["usage"]["prompt_tokens"] for chunk in reply.events[:-1]}) == 1


def timed(request: Request) -> list[Output]:
    first, last = outputs([97, END_OF_TURN])
    return [
        Output(request_id="", token_ids=first.token_ids, num_cached_tokens=16),
        Output(request_id="", token_ids=last.token_ids, finish_reason="stop", timing=Timing(0.5, 0.25, 2.0, 7, 1, 99)),
    ]


async def test_timings_add_up(connect: Connect) -> None:
    client = connect(FakeEngine(timed))
    whole = (await client.chat(timings=True)).json["timings"]
    streamed = (await client.chat(timings=True, stream=True)).events[-2]
    assert streamed["choices"] == []
    for timings in (whole, streamed["timings"]):
        assert timings["server"] + timings["queue"] + timings["prefill"] + timings["decode"] == pytest.approx(
            timings["total"]
        )
        assert (timings["queue"], timings["prefill"], timings["decode"]) == (0.5, 0.25, 2.0)
        assert (timings["steps"], timings["preemptions"], timings["tokens_computed"]) == (7, 1, 99)
        prompt = len(client.engine.requests[0].prompt)
        assert (timings["prompt_tokens_computed"], timings["prompt_tokens_cached"]) == (prompt - 16, 16)
    assert "timings" not in (await client.chat()).json


async def test_timings_of_several_choices(connect: Connect) -> None:
    timings = (await connect(FakeEngine(timed)).chat(timings=True, n=2)).json["timings"]
    # The second waited in the first one's queue and for its prefill.
    assert (timings["queue"], timings["prefill"], timings["decode"]) == (1.0, 0.5, 2.0)
    assert (timings["steps"], timings["preemptions"], timings["tokens_computed"]) == (14, 2, 198)


async def test_choices_that_wait_for_others_of_the_same_request_are_queued_meanwhile(connect: Connect) -> None:
    timings = (await connect(FakeEngine(timed, max_num_seqs=1)).chat(timings=True, n=4)).json["timings"]
    assert 1.0 < timings["queue"] < 1.0 + timings["total"]
    assert (timings["prefill"], timings["decode"]) == (0.5, 2.0)
