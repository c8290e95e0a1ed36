"""What holds for any weights, over HTTP: a tiny random model, and OpenAI's own client.

Several answers are single requests, batches change nothing, forced answers are what they are forced to be, and log
probabilities agree wherever they are told.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import math
from typing import Any

import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .serving import CONTEXT, Server, client_of

MESSAGES = [{"role": "user", "content": "Do llamas pronk? " * 5}]
BEGIN = 256


def told(choice: Any) -> tuple[Any, ...]:
    """All that one choice says."""
    entries = [] if choice.logprobs is None else [entry.model_dump() for entry in choice.logprobs.content or ()]
    return choice.message.content, choice.finish_reason, entries, choice.model_extra.get("token_ids")


async def chat(client: openai.AsyncOpenAI, **fields: Any) -> Any:
    """What the client has no parameter for goes into extra_body."""
    create = client.chat.completions.create
    known = inspect.signature(create).parameters
    asked = {"model": "tiny", "messages": MESSAGES, "max_tokens": 12}
    asked |= {name: value for name, value in fields.items() if name in known}
    return await create(**asked, extra_body={name: value for name, value in fields.items() if name not in known})


@pytest.mark.parametrize("temperature", [0, 1.2])
async def test_choices_are_single_requests(server: Server, temperature: float) -> None:
    fields = {"temperature": temperature, "logprobs": True, "top_logprobs": 3, "return_token_ids": True}
    async with client_of(server) as client:
        together = await chat(client, n=5, seed=40, **fields)
        alone = await asyncio.gather(*(chat(client, seed=40 + index, **fields) for index in range(5)))
    assert [told(choice) for choice in together.choices] == [told(single.choices[0]) for single in alone]
    assert together.usage.prompt_tokens == alone[0].usage.prompt_tokens
    assert together.usage.completion_tokens == sum(single.usage.completion_tokens for single in alone)
    assert len({json.dumps(told(choice)) for choice in together.choices}) == (1 if temperature == 0 else 5)


async def test_a_stream_of_choices_is_the_whole_answer(server: Server) -> None:
    fields: dict[str, Any] = {"n": 3, "seed": 2, "temperature": 1.2, "logprobs": True, "top_logprobs": 2}
    async with client_of(server) as client:
        whole = await chat(client, **fields)
        stream = await chat(client, **fields, stream=True, stream_options={"include_usage": True})
        texts, entries, reasons = [""] * 3, [[] for _ in range(3)], [None] * 3
        async for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                entries[choice.index] += (choice.logprobs and choice.logprobs.content) or []
                reasons[choice.index] = choice.finish_reason
            usage = chunk.usage
    assert texts == [choice.message.content for choice in whole.choices]
    assert entries == [choice.logprobs.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    # How much of the prompt was cached is the schedule's, and nothing else differs.
    assert usage.completion_tokens == whole.usage.completion_tokens


async def test_forced_tokens_are_the_answer(server: Server) -> None:
    word = "pronk!"
    async with client_of(server) as client:
        for place in range(len(word)):
            forced = await chat(client, logit_bias={str(word.encode()[place]): 100}, max_tokens=3, temperature=1)
            assert forced.choices[0].message.content == word[place] * 3
        allowed = await chat(client, allowed_token_ids=[*b"ab"], max_tokens=40, temperature=1.5, seed=1)
        text = allowed.choices[0].message.content
        assert len(text) == 40
        assert set(text) == {"a", "b"}
        without = await chat(client, allowed_token_ids=[*b"ab"], bad_words=["ab", "bb"], max_tokens=40, seed=1)
        assert "ab" not in without.choices[0].message.content
        assert "bb" not in without.choices[0].message.content
        banned = await chat(
            client, logit_bias={str(byte): -100 for byte in range(1, 256)}, max_tokens=3, ignore_eos=True
        )
        assert set(banned.choices[0].message.content) <= {"\0"}


async def test_log_probabilities_are_a_distribution(server: Server) -> None:
    async with client_of(server) as client:
        answer = (await chat(client, temperature=0, logprobs=True, top_logprobs=20)).choices[0]
        for entry in answer.logprobs.content:
            values = [top.logprob for top in entry.top_logprobs]
            assert values == sorted(values, reverse=True)
            assert sum(map(math.exp, values)) <= 1 + 1e-5
            assert entry.logprob == values[0]  # greedy: to the last bit


async def test_scores_of_a_prompt_are_those_of_its_making(server: Server) -> None:
    """What greedy generation tells of its tokens is what scoring the same text tells."""
    async with client_of(server) as client:
        prompt = [BEGIN, *b"Pronk means"]
        made = await client.completions.create(
            model="tiny", prompt=prompt, max_tokens=8, temperature=0, logprobs=1,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )  # fmt: skip
        ids = made.choices[0].model_extra["token_ids"]
        for max_tokens in (0, 1):
            scored = await client.completions.create(
                model="tiny",
                prompt=[[*prompt, *ids], prompt],
                max_tokens=max_tokens,
                echo=True,
                logprobs=1,
                temperature=0,
            )
            logprobs = scored.choices[0].logprobs
            assert logprobs.token_logprobs[0] is None
            scores = logprobs.token_logprobs[len(prompt) : len(prompt) + 8]
            assert scores == made.choices[0].logprobs.token_logprobs
            assert len(logprobs.token_logprobs) == len(prompt) + 8 + max_tokens
            assert scored.usage.completion_tokens == 2 * max_tokens
            # The test of lm-eval for a greedy continuation.
            continuation = zip(
                logprobs.token_logprobs[len(prompt) :], logprobs.top_logprobs[len(prompt) :], strict=True
            )
            assert all(value == max(top.values()) for value, top in continuation)
            alone = scored.choices[1].logprobs.token_logprobs[1 : len(prompt)]
            assert logprobs.token_logprobs[1 : len(prompt)] == alone


async def test_prompt_logprobs_of_a_chat(server: Server) -> None:
    async with client_of(server) as client:
        plain = await chat(client, seed=1, return_token_ids=True)
        scored = await chat(client, seed=1, prompt_logprobs=2, return_token_ids=True)
        ids = scored.model_extra["prompt_token_ids"]
        assert told(plain.choices[0]) == told(scored.choices[0])
        entries = scored.model_extra["prompt_logprobs"]
        assert len(entries) == len(ids) == scored.usage.prompt_tokens
        assert entries[0] is None
        same = await client.completions.create(model="tiny", prompt=ids, max_tokens=0, echo=True, logprobs=2)
        assert [entry[str(token)]["logprob"] for token, entry in zip(ids[1:], entries[1:], strict=True)] == (
            same.choices[0].logprobs.token_logprobs[1:]
        )


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_stop_texts_over_every_boundary(server: Server, data: st.DataObject) -> None:
    """A stop text that begins and ends inside any tokens ends the answer right before it, streamed or not."""

    async def run() -> None:
        async with client_of(server) as client:
            fields: dict[str, Any] = {"seed": data.draw(st.integers(0, 3)), "temperature": 1.2, "max_tokens": 24}
            free = (await chat(client, **fields, ignore_eos=True)).choices[0].message.content
            start = data.draw(st.integers(0, len(free) - 1))
            stop = free[start : start + data.draw(st.integers(1, 4))]
            expected = free[: free.index(stop)]
            cut = (await chat(client, **fields, ignore_eos=True, stop=[stop])).choices[0]
            assert (cut.message.content, cut.finish_reason) == (expected, "stop")
            kept = await chat(client, **fields, ignore_eos=True, stop=[stop], include_stop_str_in_output=True)
            assert kept.choices[0].message.content == expected + stop
            stream = await chat(client, **fields, ignore_eos=True, stop=[stop], stream=True)
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            assert text == expected

    asyncio.run(run())


async def test_a_batch_is_its_prompts_alone(server: Server) -> None:
    prompts = ["a", "llama " * 30, "pronks\n", ""]
    fields: dict[str, Any] = {"model": "tiny", "max_tokens": 10, "seed": 9, "logprobs": 2, "n": 2}
    async with client_of(server) as client:
        batch = await client.completions.create(prompt=prompts, **fields)
        alone = [await client.completions.create(prompt=prompt, **fields) for prompt in prompts]
        best = await client.completions.create(prompt=prompts[1], **{**fields, "n": 1, "best_of": 4})
        four = await client.completions.create(prompt=prompts[1], **{**fields, "n": 4})
    assert [(choice.text, choice.logprobs) for choice in batch.choices] == [
        (choice.text, choice.logprobs) for single in alone for choice in single.choices
    ]
    assert [choice.index for choice in batch.choices] == list(range(8))

    def mean(choice: Any) -> float:
        return float(sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs))

    assert best.choices[0].text == max(four.choices, key=mean).text


async def test_truncated_prompts_are_their_ends(server: Server) -> None:
    async with client_of(server) as client:
        ids = [BEGIN, *(b"pronk " * 40)]
        kept = await client.completions.create(
            model="tiny", prompt=ids, seed=1, logprobs=1, extra_body={"truncate_prompt_tokens": 33}
        )
        cut = await client.completions.create(model="tiny", prompt=ids[-33:], seed=1, logprobs=1)
        assert kept.choices == cut.choices
        assert kept.usage.prompt_tokens == 33
        fits = await chat(
            client, messages=[{"role": "user", "content": "x" * 3 * CONTEXT}], truncate_prompt_tokens=-1, max_tokens=10
        )
        assert fits.usage.prompt_tokens == CONTEXT - 10


async def test_a_continued_message_goes_on(server: Server) -> None:
    """An answer in two halves is the answer in one, when the second half continues the first."""
    async with client_of(server) as client:
        whole = await chat(client, temperature=0, max_tokens=12, allowed_token_ids=[*b"abcdef"])
        text = whole.choices[0].message.content
        assert len(text) == 12
        messages = [*MESSAGES, {"role": "assistant", "content": text[:5]}]
        rest = await chat(
            client,
            messages=messages,
            temperature=0,
            max_tokens=7,
            allowed_token_ids=[*b"abcdef"],
            continue_final_message=True,
        )
        assert text[:5] + rest.choices[0].message.content == text


async def test_beams_are_no_worse_than_greed(server: Server) -> None:
    def total(choice: Any) -> float:
        return float(sum(entry.logprob for entry in choice.logprobs.content))

    async with client_of(server) as client:
        fields: dict[str, Any] = {"temperature": 0, "max_tokens": 6, "logprobs": True}
        greedy = (await chat(client, **fields)).choices[0]
        beams = (await chat(client, **fields, n=4, use_beam_search=True, length_penalty=0.0)).choices
        scores = [total(beam) for beam in beams]
        assert scores == sorted(scores, reverse=True)
        assert scores[0] >= total(greedy) - 1e-4
        assert len({beam.message.content for beam in beams}) == 4


async def test_timings_sum_up_to_the_wall(server: Server) -> None:
    async with client_of(server) as client:
        for n in (1, 3):
            answer = await chat(client, n=n, timings=True, cache_salt=f"new {n}")
            timings = answer.model_extra["timings"]
            parts = timings["server"], timings["queue"], timings["prefill"], timings["decode"]
            assert all(part >= 0 for part in parts)
            assert sum(parts) == pytest.approx(timings["total"])
            assert timings["prompt_tokens_computed"] == answer.usage.prompt_tokens
            assert timings["prompt_tokens_cached"] == 0
            assert timings["steps"] >= max(1, answer.usage.completion_tokens // n - 1)


async def test_salts_keep_prompts_apart(server: Server) -> None:
    async with client_of(server) as client:
        cached = []
        for salt in ("one", "one", "two"):
            usage = (await chat(client, cache_salt=salt, messages=[{"role": "user", "content": "salt " * 20}])).usage
            cached.append(usage.prompt_tokens_details.cached_tokens)
    assert cached[0] == cached[2] == 0 < cached[1]
