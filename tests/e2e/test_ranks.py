"""A server whose model two ranks share: all that it can be asked, asked by many at once, is what each gets alone;
greedy answers are those of one rank; and an operator sees the ranks."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from .serving import SECONDS, Server, client_of, until

TWO_RANKS = ("--tensor-parallel-size", "2", "--dtype", "float32")
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "woolly": {"type": "boolean"}},
    "required": ["name", "woolly"],
    "additionalProperties": False,
}
FORM = {"type": "json_schema", "json_schema": {"name": "llama", "schema": SCHEMA, "strict": True}}
TOOL = {"type": "function", "function": {"name": "feed", "parameters": SCHEMA, "strict": True}}
KINDS: list[dict[str, Any]] = [
    {"temperature": 0, "logprobs": True, "top_logprobs": 3},
    {"temperature": 1.3, "top_p": 0.8, "logprobs": True},
    {"temperature": 1.5, "top_k": 7, "min_p": 0.01, "presence_penalty": 0.7, "frequency_penalty": 0.3},
    {"temperature": 1, "n": 3, "repetition_penalty": 1.2, "logprobs": True, "top_logprobs": 2},
    {"temperature": 1.5, "response_format": FORM, "max_tokens": 60},
    {"temperature": 1.5, "tools": [TOOL], "tool_choice": "required", "max_tokens": 100},
    {"temperature": 0, "logit_bias": {"65": 30, "66": 29.5}, "bad_words": ["AA"]},
    {"temperature": 0.9, "top_p": 0.9, "prompt_logprobs": 1, "return_token_ids": True},
]


@pytest.fixture(scope="module")
def two(model: Path) -> Iterator[Server]:
    running = Server(model, *TWO_RANKS)
    yield running
    running.end()


@pytest.fixture(scope="module")
def one(model: Path) -> Iterator[Server]:
    running = Server(model, "--dtype", "float32")
    yield running
    running.end()


async def ask(client: openai.AsyncOpenAI, number: int, **changes: Any) -> Any:
    """Requests of every kind, which differ in length, seed and where their prompts part. -> all that choices say."""
    create = client.chat.completions.create
    fields: dict[str, Any] = {
        "model": "tiny",
        "messages": [
            {"role": "system", "content": "You are a llama." * (number % 3)},
            {"role": "user", "content": f"{number} pronks. " * (1 + number % 7)},
        ],
        "max_tokens": 5 + number % 11,
        "seed": number,
        **KINDS[number % len(KINDS)],
        **changes,
    }
    known = inspect.signature(create).parameters
    extra = {name: fields.pop(name) for name in list(fields) if name not in known}
    if number // len(KINDS) % 2 == 0:
        whole = await create(**fields, extra_body=extra)
        return [choice.model_dump() for choice in whole.choices], whole.usage.completion_tokens
    extra.pop("prompt_logprobs", None)  # a stream does not tell them
    stream = await create(**fields, extra_body=extra, stream=True)
    told: list[tuple[str, Any]] = []
    async for chunk in stream:
        for choice in chunk.choices:
            said = choice.model_dump(exclude_none=True)
            told += [(f"{choice.index} {name}", value) for name, value in said.items() if name != "index"]
    return joined(told)


def joined(told: list[tuple[str, Any]]) -> dict[str, str]:
    """What a stream said, wherever it was cut into events."""
    whole: dict[str, str] = {}
    for name, value in told:
        if name.endswith("delta"):
            calls = [call["function"].get("arguments", "") for call in value.get("tool_calls", ())]
            piece = value.get("content", "") + "".join(calls)
        elif name.endswith("logprobs"):
            piece = "".join(json.dumps(entry) for entry in value.get("content", ()))
        elif name.endswith("token_ids"):
            piece = "".join(f"{token} " for token in value)
        else:
            piece = json.dumps(value)
        whole[name] = whole.get(name, "") + piece
    return whole


async def leave(client: openai.AsyncOpenAI, number: int) -> None:
    """Ask for much, and go when the first of it has come."""
    stream = await client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": f"{number}"}], max_tokens=1000, stream=True,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    await anext(aiter(stream))
    await stream.close()


async def test_everything_asked_by_32_at_once_is_what_each_gets_alone(two: Server) -> None:
    """To the last bit; while others come and go; the second time the prefix cache is warm."""
    async with client_of(two) as client:
        alone = [await ask(client, number) for number in range(32)]
        together, _ = await asyncio.gather(
            asyncio.gather(*(ask(client, number) for number in range(32))),
            asyncio.gather(*(leave(client, number) for number in range(6))),
        )
    for number, (one, other) in enumerate(zip(alone, together, strict=True)):
        assert without_ids(one) == without_ids(other), number
    assert len({json.dumps(without_ids(answer)) for answer in alone}) == 32
    until(lambda: two.metric("pronk_kv_pages", state="used") == 0)
    assert two.metric("pronk_requests_total", outcome="client_abort") == 6
    assert two.metric("pronk_requests_total", outcome="error") == 0
    assert two.metric("pronk_engine_restarts_total") == 0


def without_ids(answer: Any) -> Any:
    """Calls of tools have random ids."""
    if isinstance(answer, dict):
        return {name: without_ids(value) for name, value in answer.items() if name != "id"}
    return [without_ids(each) for each in answer] if isinstance(answer, (list, tuple)) else answer


async def test_what_was_promised_holds(two: Server) -> None:
    async with client_of(two) as client:
        choices, _ = await ask(client, 4)
        assert list(json.loads(choices[0]["message"]["content"])) == ["name", "woolly"]
        choices, _ = await ask(client, 5)
        assert choices[0]["finish_reason"] == "tool_calls"
        choices, _ = await ask(client, 3)
        assert len({choice["message"]["content"] for choice in choices}) == 3
        choices, _ = await ask(client, 6)
        assert "A" in choices[0]["message"]["content"]
        assert "AA" not in choices[0]["message"]["content"]


async def test_greedy_answers_are_those_of_one_rank(one: Server, two: Server) -> None:
    fields = {"temperature": 0, "n": 1, "max_tokens": 24, "logprobs": None, "top_logprobs": None}
    kinds = [number for number in range(16) if number % len(KINDS) not in (4, 5)]  # those free to say anything
    async with client_of(one) as first, client_of(two) as second:
        alone, shared = await asyncio.gather(
            *(
                asyncio.gather(*(ask(client, number, **fields, prompt_logprobs=None) for number in kinds))
                for client in (first, second)
            )
        )
    assert shared == alone
    assert len({json.dumps(answer) for answer in alone}) == len(kinds)


def test_an_operator_sees_the_ranks(one: Server, two: Server) -> None:
    assert len(two.ranks) == 2
    assert [two.metric("pronk_rank_up", rank=rank) for rank in "01"] == [1, 1]
    assert two.metric("pronk_collectives_total", operation="all_reduce") > two.metric("pronk_engine_steps_total") > 0
    assert two.metric("pronk_collectives_total", operation="all_gather") > 0
    assert 0 < two.metric("pronk_collective_seconds_total") < two.metric("pronk_engine_step_duration_seconds_sum")
    assert one.metric("pronk_collectives_total", operation="all_reduce") == 0
    assert one.metric("pronk_collective_seconds_total") == 0
    (row,) = [line for line in two.table.splitlines() if "rank" in line]
    assert "ranks 0-1" in row
    assert "32.0 MiB of KV cache" in row
    assert "64.0 MiB" in two.table
    assert "rank" not in one.table


def test_a_size_that_does_not_divide_is_one_sentence_before_anything_is_loaded() -> None:
    command = [sys.executable, "-m", "pronk.server.cli", "serve", "--port", "0", "--tensor-parallel-size", "3"]
    # Variables that mean nothing to it would be warned of.
    bare = {name: value for name, value in os.environ.items() if not name.startswith("PRONK_")}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False, env=bare)
    assert ended.returncode == 2  # as for every flag that cannot be met
    *before, last = ended.stderr.strip().splitlines()
    assert last.startswith("pronk: --tensor-parallel-size 3: the model's 4 query heads cannot be dealt out evenly")
    assert before == ["starting ..."]
