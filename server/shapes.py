"""The parts of answers that endpoints share: usage, timings, log probabilities of a prompt, and what is around the
choices in the chunks of a stream.

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
from pronk.server.streaming import DONE, to_json


@dataclass(frozen=True)
class Head:
    """What all chunks of an answer, and the whole answer, have in common."""

    id: str
    created: int
    """Seconds since 1970."""
    model: str


@dataclass(frozen=True)
class Extras:
    """What a request wants told beside its choices."""

    token_ids: bool = False
    timings: bool = False
    usage: bool = False
    """In a stream: a last chunk with the usage."""
    continuous_usage: bool = False
    """In a stream: the usage so far in every chunk."""


class Frame:
    """What is around the choice in each event of one stream, and its last events. What stays the same in all of them is
    encoded once."""

    def __init__(self, head: Head, kind: str, wanted: Extras, record: RequestRecord) -> None:
        """kind: the `object` that the events are."""
        fields = {"id": head.id, "object": kind, "created": head.created, "model": head.model}
        self._head = b"data: " + to_json(fields)[:-1]
        self._wanted = wanted
        self._record = record
        self.plain_close = b"}]" + (b',"usage":null}' if wanted.usage else b"}") + b"\n\n"
        """What is after a choice's last field, where no usage is told so far."""

    def open(self, index: int, field: str) -> bytes:
        """-> what is before the value of a choice's first field. index: the choice's; field: that field's name."""
        return b'%b,"choices":[{"index":%d,"%b":' % (self._head, index, field.encode())

    def close(self, told_tokens: int) -> bytes:
        """told_tokens: those of all choices until now. -> what is after a choice's last field."""
        if not self._wanted.continuous_usage:
            return self.plain_close
        record = self._record
        usage = usage_object(record.prompt_tokens, told_tokens, record.cached_tokens)
        return b'}],"usage":' + to_json(usage) + b"}\n\n"

    def end(self) -> bytes:
        """The usage and the timings, when the request asked for them, and [DONE]."""
        wanted = self._wanted
        if not (wanted.usage or wanted.timings):
            return DONE
        last = self._head + b',"choices":[]'
        if wanted.usage:
            last += b',"usage":' + to_json(usage_of(self._record))
        if wanted.timings:
            last += b',"timings":' + to_json(timings_of(self._record))
        return last + b"}\n\n" + DONE


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
