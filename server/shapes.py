"""The parts of answers that endpoints share: usage, timings, log probabilities of a prompt.

Knows OpenAI's and vLLM's shapes of them; no endpoint.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pronk.engine.request import MAX_LOGPROBS, TokenLogprobs
from pronk.engine.tokenizer import Vocabulary
from pronk.server.record import RequestRecord


@dataclass(frozen=True)
class Head:
    """What all chunks of an answer, and the whole answer, have in common."""

    id: str
    created: int
    """Seconds since 1970."""
    model: str


def describe_prompt_logprobs(
    vocabulary: Vocabulary, prompt: Sequence[int], logprobs: Sequence[TokenLogprobs], *, top: int = MAX_LOGPROBS
) -> list[dict[str, Any] | None]:
    """logprobs: of all tokens of the prompt but the first. -> vLLM's form: for each token of the prompt, token ids to
    log probabilities, its own first, then the `top` most likely; None for the first, which nothing is before. rank: 1
    for the most likely; None where it is not among those that were asked for."""
    told: list[dict[str, Any] | None] = [None]
    for token, scored in zip(prompt[1:], logprobs, strict=True):
        ranks = {one: place for place, one in enumerate(scored.top_ids, start=1)}
        tops = dict(list(zip(scored.top_ids, scored.top_logprobs, strict=True))[:top])
        told.append(
            {
                str(one): {
                    "logprob": finite(logprob),
                    "rank": ranks.get(one),
                    "decoded_token": vocabulary.token_bytes(one).decode(errors="replace"),
                }
                for one, logprob in {token: scored.logprob, **tops}.items()
            }
        )
    return told


def finite(logprob: float) -> float:
    """JSON has no infinity; -9999 is how OpenAI's reference writes a token that cannot be."""
    return max(logprob, -9999.0)


def usage_object(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    """-> OpenAI's."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def usage_of(record: RequestRecord) -> dict[str, Any]:
    """-> OpenAI's usage object. A prompt counts once, however many answers it got."""
    return usage_object(record.prompt_tokens, record.completion_tokens, record.cached_tokens)


def timings_of(record: RequestRecord) -> dict[str, Any] | None:
    """-> where the time went until now, in seconds; None before the engine has said so.

    server: reading the request, making tokens of it and text of the answer, and the ways between; the four parts sum up
    to the total. Of several choices, queue, prefill and decode are those of the one that ended last.
    """
    timing = record.timing
    if timing is None:
        return None
    total = time.perf_counter() - record.arrived
    inside = timing.queue + timing.prefill + timing.decode
    return {
        "total": total,
        "server": total - inside,
        "queue": timing.queue,
        "prefill": timing.prefill,
        "decode": timing.decode,
        "prompt_tokens_computed": record.prompt_tokens - record.cached_tokens,
        "prompt_tokens_cached": record.cached_tokens,
        "tokens_computed": timing.computed_tokens,
        "steps": timing.steps,
        "preemptions": timing.preemptions,
    }
