"""Beam search against an exhaustive search, over an engine whose scores are a function of what it has read."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pronk.engine.request import Output, Request, SamplingParams, Timing, TokenLogprobs
from pronk.server.beam import BeamSearch
from pronk.server.errors import RequestFailedError
from pronk.server.record import RequestRecord

from .conftest import Connect
from .fakes import END_OF_TURN, Client, FakeEngine, served

LETTERS = (*b"ab", END_OF_TURN)
PROMPT = [1, 2, 3]


def distribution(seed: int, tokens: Sequence[int]) -> dict[int, float]:
    """Log probabilities of what may follow."""
    noise = random.Random(f"{seed} {list(tokens)}")
    weights = [noise.random() + 0.01 for _ in LETTERS]
    return {token: math.log(weight / sum(weights)) for token, weight in zip(LETTERS, weights, strict=True)}


def engine_of(seed: int) -> FakeEngine:
    def script(request: Request) -> list[Output]:
        assert request.params.max_tokens == 1
        ranked = sorted(distribution(seed, request.prompt).items(), key=lambda item: -item[1])
        ranked = ranked[: request.params.logprobs]
        logprobs = TokenLogprobs(ranked[0][1], [token for token, _ in ranked], [value for _, value in ranked])
        timing = Timing(0.5, 1.0 + len(request.prompt), 0.25, 1, 0, len(request.prompt))
        return [
            Output(request_id="", token_ids=[ranked[0][0]], logprobs=[logprobs], finish_reason="length", timing=timing)
        ]

    return FakeEngine(script)


def search(engine: FakeEngine, **fields: Any) -> BeamSearch:
    settings: dict[str, Any] = {"width": 2, "length_penalty": 1.0, "record": RequestRecord("r"), **fields}
    params = settings.pop("params", SamplingParams(max_tokens=settings.pop("max_tokens", 3), logprobs=1))
    prompts = settings.pop("prompts", [PROMPT])
    return BeamSearch(prompts, params, request_id="r", model=served(engine), **settings)


def every_answer(seed: int, max_tokens: int) -> dict[tuple[int, ...], float]:
    """All that there are, with the log probability of each."""
    answers: dict[tuple[int, ...], float] = {}
    for length in range(1, max_tokens + 1):
        for tokens in itertools.product(LETTERS, repeat=length):
            whole = tokens[-1] == END_OF_TURN or length == max_tokens
            if whole and END_OF_TURN not in tokens[:-1]:
                answers[tokens] = sum(
                    distribution(seed, [*PROMPT, *tokens[:place]])[token] for place, token in enumerate(tokens)
                )
    return answers


def ranked(answers: Mapping[tuple[int, ...], float], penalty: float) -> list[tuple[int, ...]]:
    return sorted(answers, key=lambda tokens: -answers[tokens] / len(tokens) ** penalty)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), penalty=st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0]), width=st.integers(8, 10))
def test_a_search_that_drops_nothing_finds_the_best(seed: int, penalty: float, width: int) -> None:
    """Four tokens of two letters make at most eight beams: with so many, beam search is exhaustive search."""
    engine = engine_of(seed)
    found = asyncio.run(search(engine, width=width, length_penalty=penalty, max_tokens=4).collect())
    answers = every_answer(seed, 4)
    assert [tuple(answer.token_ids) for answer in found] == ranked(answers, penalty)[:width]
    for answer in found:
        assert sum(scored.logprobs.logprob for scored in answer.logprobs) == pytest.approx(
            answers[tuple(answer.token_ids)]
        )
        ended = answer.token_ids[-1] == END_OF_TURN
        assert answer.finish_reason == ("stop" if ended else "length")
        assert answer.text.encode() == bytes(answer.token_ids[:-1] if ended else answer.token_ids)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_one_beam_is_the_greedy_answer(seed: int) -> None:
    (answer,) = asyncio.run(search(engine_of(seed), width=1, max_tokens=6, length_penalty=0.0).collect())
    greedy: list[int] = []
    while len(greedy) < 6 and END_OF_TURN not in greedy:
        scores = distribution(seed, [*PROMPT, *greedy])
        greedy.append(max(scores, key=lambda token: scores[token]))
    # Of one beam, an end that was second best on the way may win in the end: its score does not fall any more.
    total = sum(distribution(seed, [*PROMPT, *greedy[:place]])[token] for place, token in enumerate(greedy))
    assert sum(scored.logprobs.logprob for scored in answer.logprobs) >= total - 1e-9


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), penalty=st.sampled_from([0.0, 1.0]))
def test_ending_early_changes_nothing(seed: int, penalty: float) -> None:
    """A search that is cut where nothing can win any more finds what one finds that goes on."""

    class Patient(BeamSearch):
        def _is_decided(self, running: Any, done: Any) -> bool:
            return False

    def run(kind: type[BeamSearch]) -> tuple[list[list[int]], int]:
        engine = engine_of(seed)
        found = kind(
            [PROMPT], SamplingParams(max_tokens=8), width=2, length_penalty=penalty, request_id="r",
            model=served(engine), record=RequestRecord("r"),
        )  # fmt: skip
        return [answer.token_ids for answer in asyncio.run(found.collect())], len(engine.requests)

    early, questions = run(BeamSearch)
    late, more = run(Patient)
    assert early == late
    assert questions <= more


async def test_what_it_leaves_in_the_record() -> None:
    record = RequestRecord("r")
    answers = await search(engine_of(1), record=record, prompts=[PROMPT, [4, 5]], max_tokens=2).collect()
    assert len(answers) == 4
    assert record.prompt_tokens == 5
    assert record.completion_tokens == sum(len(answer.token_ids) for answer in answers)
    assert record.outcome in ("stop", "length")
    # The longer prompt took two steps of one and two questions, the shorter one as many.
    assert record.timing == Timing(1.0, 4.0 + 5.0, 0.5, 6, 0, 3 + 4 + 4 + 2 + 3 + 3)


async def test_without_a_limit_it_ends_all_the_same() -> None:
    engine = engine_of(2)
    found = await search(engine, params=SamplingParams(), length_penalty=1.0).collect()
    assert [answer.finish_reason for answer in found] == ["stop", "stop"]
    assert len(engine.requests) < 100


async def test_a_failure_ends_all() -> None:
    def script(request: Request) -> list[Output]:
        if len(request.prompt) == len(PROMPT):
            return engine_of(1).script(request)
        return [Output(request_id="", finish_reason="error", error="broken")]

    engine = FakeEngine(script)
    record = RequestRecord("r")
    with pytest.raises(RequestFailedError, match="broken"):
        await search(engine, record=record).collect()
    assert not engine.running
    assert record.outcome == "error"


async def ask(client: Client, path: str, **fields: Any) -> Any:
    body = {"model": "tiny", "use_beam_search": True, "max_tokens": 4, **fields}
    return await client.call("POST", path, json.dumps(body).encode())


async def test_over_http(connect: Connect) -> None:
    client = connect(engine_of(3))
    reply = await ask(client, "/v1/chat/completions", messages=[{"role": "user", "content": "x"}], n=3, temperature=0)
    assert reply.status == 200
    assert [choice["index"] for choice in reply.json["choices"]] == [0, 1, 2]
    texts = [choice["message"]["content"] for choice in reply.json["choices"]]
    assert len(set(texts)) == 3
    reply = await ask(client, "/v1/completions", prompt=[PROMPT, [4]], n=2, logprobs=1)
    best = ranked(every_answer(3, 4), 1.0)[0]
    choices = reply.json["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    assert choices[0]["text"].encode() == bytes(token for token in best if token < 256)
    assert len(choices[0]["logprobs"]["tokens"]) == len(best)


FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"stream": True}, "stream"),
    ({"temperature": 0.5}, "temperature"),
    ({"n": 11}, "n"),
    ({"seed": 1}, "seed"),
    ({"stop": "x"}, "stop"),
    ({"structured_outputs": {"regex": "a"}}, "structured_outputs"),
    ({"length_penalty": 11}, "length_penalty"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "use_beam_search"),
    ({"max_tokens": 5000}, "max_tokens"),
]


@pytest.mark.parametrize(("fields", "param"), FAULTS, ids=[param for _, param in FAULTS])
async def test_what_beams_cannot_do(connect: Connect, fields: dict[str, Any], param: str) -> None:
    client = connect(engine_of(1))
    reply = await ask(client, "/v1/chat/completions", messages=[{"role": "user", "content": "x"}], **fields)
    assert (reply.status, reply.error["param"]) == (400, param)
    assert not client.engine.requests
