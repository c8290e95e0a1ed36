"""The bodies that completions are answered with: `text_completion` objects and events, and the choice of the best.

Both are made of the same deltas. Knows tokens as bytes of the vocabulary, and the request's wishes as plain values; no
HTTP.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pronk.engine.request import TokenLogprobs
from pronk.engine.tokenizer import Vocabulary
from pronk.server.generation import Answer, Delta, Scored
from pronk.server.record import RequestRecord
from pronk.server.shapes import Extras, Frame, Head, describe_prompt_logprobs, finite, timings_of, usage_of
from pronk.server.streaming import error_event, to_json


@dataclass(frozen=True)
class Wanted(Extras):
    """What a request wants told, and how."""

    n: int = 1
    """Completions of each prompt that are told."""
    made: int = 1
    """Completions of each prompt that are made."""
    echo: bool = False
    logprobs: int | None = None
    """None: none; N: those of the N most likely tokens beside the chosen one's."""
    prompt_logprobs: int | None = None
    """In vLLM's form; only of whole answers."""
    skip_special_tokens: bool = True


class LogprobsWriter:
    """Log probabilities of one choice's tokens in the completions' form. Counts where in its text each token begins."""

    def __init__(self, vocabulary: Vocabulary, wanted: Wanted) -> None:
        self._vocabulary = vocabulary
        self._top = wanted.logprobs or 0
        self._skip_special_tokens = wanted.skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._offset = 0

    def write(self, tokens: Sequence[tuple[int, TokenLogprobs | None]]) -> dict[str, Any]:
        """tokens: the next ones, with their log probabilities; None for a token that nothing is before."""
        told: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, scored in tokens:
            told["tokens"].append(self._name(token))
            told["token_logprobs"].append(None if scored is None else finite(scored.logprob))
            told["top_logprobs"].append(None if scored is None else self._tops(token, scored))
            told["text_offset"].append(self._offset)
            self._offset += len(self._decoder.decode(self._visible(token)))
        return told

    def _tops(self, token: int, scored: TokenLogprobs) -> dict[str, float]:
        """The most likely tokens, and the chosen one where it is not among them."""
        ranked = list(zip(scored.top_ids, scored.top_logprobs, strict=True))[: self._top]
        tops = {self._name(top): finite(logprob) for top, logprob in ranked}
        return {**tops, self._name(token): finite(scored.logprob)}

    def _name(self, token: int) -> str:
        """The token's text. Where it is only part of a character, its bytes, as OpenAI writes them: `bytes:\\xe2`."""
        raw = self._vocabulary.token_bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def _visible(self, token: int) -> bytes:
        if self._skip_special_tokens and self._vocabulary.is_special(token):
            return b""
        return self._vocabulary.token_bytes(token)


def text_of(vocabulary: Vocabulary, tokens: Sequence[int], wanted: Wanted) -> str:
    """-> a prompt's text, as echo tells it."""
    skip = wanted.skip_special_tokens
    shown = (token for token in tokens if not (skip and vocabulary.is_special(token)))
    return b"".join(map(vocabulary.token_bytes, shown)).decode(errors="replace")


def _prompt_scores(prompt: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> list[tuple[int, TokenLogprobs | None]]:
    return list(zip(prompt, (None, *logprobs), strict=True))


class CompletionWriter:
    """An EventWriter: bytes of `text_completion` events."""

    def __init__(
        self,
        head: Head,
        wanted: Wanted,
        vocabulary: Vocabulary,
        record: RequestRecord,
        prompts: Sequence[Sequence[int]],
    ) -> None:
        """prompts: token ids of each."""
        self._wanted = wanted
        self._vocabulary = vocabulary
        self._prompts = prompts
        count = len(prompts) * wanted.n
        self._told_tokens = 0
        self._begun = [False] * count
        self._prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
        self._logprobs = [LogprobsWriter(vocabulary, wanted) for _ in range(count)]
        self._frame = Frame(head, "text_completion", wanted, record)
        self._opens = [self._frame.open(index, "text") for index in range(count)]
        self._text_close = b',"logprobs":null,"finish_reason":null' + self._frame.plain_close
        # Most chunks are text and nothing else.
        self._plain = wanted.logprobs is None and not (wanted.token_ids or wanted.continuous_usage)

    def start(self) -> bytes:
        return b""

    def delta(self, delta: Delta) -> bytes:
        """-> one event for the echo, one for text and logprobs, and one for the end: each when there is one."""
        if delta.prompt_logprobs is not None:
            self._prompt_logprobs[delta.index // self._wanted.n] = delta.prompt_logprobs
        self._told_tokens += len(delta.token_ids)
        events = b""
        if not self._begun[delta.index]:
            self._begun[delta.index] = True
            events += self._begin(delta.index)
        text = delta.text
        if self._plain and text:
            events += self._opens[delta.index] + to_json(text) + self._text_close
        elif text or (delta.logprobs and not self._plain) or (self._wanted.token_ids and delta.token_ids):
            scored = self._write(delta.index, delta.logprobs)
            events += self._chunk(delta.index, text, logprobs=scored, token_ids=delta.token_ids)
        if delta.finish_reason is not None:
            events += self._chunk(delta.index, "", finish_reason=delta.finish_reason)
        return events

    def end(self) -> bytes:
        """See `Frame.end`."""
        return self._frame.end()

    def fail(self, body: bytes) -> bytes:
        return error_event(body)

    def _begin(self, index: int) -> bytes:
        """The prompt, as far as it is wanted."""
        place = index // self._wanted.n
        prompt = self._prompts[place]
        prompt_ids = prompt if self._wanted.token_ids else None
        if not self._wanted.echo:
            return b"" if prompt_ids is None else self._chunk(index, "", prompt_token_ids=prompt_ids)
        scored = None
        if self._wanted.logprobs is not None:
            scored = self._logprobs[index].write(_prompt_scores(prompt, self._prompt_logprobs.get(place, ())))
        text = text_of(self._vocabulary, prompt, self._wanted)
        return self._chunk(index, text, logprobs=scored, prompt_token_ids=prompt_ids)

    def _write(self, index: int, logprobs: Sequence[Scored]) -> dict[str, Any] | None:
        if self._wanted.logprobs is None or not logprobs:
            return None
        return self._logprobs[index].write(logprobs)

    def _chunk(
        self,
        index: int,
        text: str,
        *,
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
        token_ids: Sequence[int] = (),
        prompt_token_ids: Sequence[int] | None = None,
    ) -> bytes:
        event = b'%b%b,"logprobs":%b,"finish_reason":%b' % (
            self._opens[index],
            to_json(text),
            to_json(logprobs),
            to_json(finish_reason),
        )
        if prompt_token_ids is not None:
            event += b',"prompt_token_ids":' + to_json(prompt_token_ids)
        if self._wanted.token_ids:
            event += b',"token_ids":' + to_json(token_ids)
        return event + self._frame.close(self._told_tokens)


@dataclass
class _Group:
    """One prompt with its completions, the best first where there are more than are told."""

    prompt: Sequence[int]
    prompt_logprobs: list[TokenLogprobs] | None
    answers: list[Answer] = field(default_factory=list)


def completion_body(
    head: Head,
    wanted: Wanted,
    vocabulary: Vocabulary,
    record: RequestRecord,
    answers: Sequence[Answer],
    prompts: Sequence[Sequence[int]],
) -> dict[str, Any]:
    """prompts: token ids of each; answers: `made` of the first, then of the second. -> a `text_completion`."""
    choices = []
    for place, prompt in enumerate(prompts):
        made = answers[place * wanted.made : (place + 1) * wanted.made]
        group = _Group(prompt, made[0].prompt_logprobs, best(made, wanted.n))
        choices += [
            _choice(place * wanted.n + index, answer, group, wanted, vocabulary)
            for index, answer in enumerate(group.answers)
        ]
    body = {
        "id": head.id,
        "object": "text_completion",
        "created": head.created,
        "model": head.model,
        "choices": choices,
        "usage": usage_of(record),
    }
    return {**body, "timings": timings_of(record)} if wanted.timings else body


def best(answers: Sequence[Answer], n: int) -> list[Answer]:
    """-> the n of the highest log probability per token, in that order; all, as they are, where there are no more."""
    if len(answers) <= n:
        return list(answers)
    return sorted(answers, key=_mean_logprob, reverse=True)[:n]


def _mean_logprob(answer: Answer) -> float:
    return sum(scored.logprobs.logprob for scored in answer.logprobs) / max(1, len(answer.logprobs))


def _choice(index: int, answer: Answer, group: _Group, wanted: Wanted, vocabulary: Vocabulary) -> dict[str, Any]:
    echoed = text_of(vocabulary, group.prompt, wanted) if wanted.echo else ""
    logprobs = None
    if wanted.logprobs is not None:
        before = _prompt_scores(group.prompt, group.prompt_logprobs or ()) if wanted.echo else []
        logprobs = LogprobsWriter(vocabulary, wanted).write([*before, *answer.logprobs])
    choice = {
        "index": index,
        "text": echoed + answer.text,
        "logprobs": logprobs,
        "finish_reason": answer.finish_reason,
    }
    if wanted.token_ids:
        choice |= {"prompt_token_ids": group.prompt, "token_ids": answer.token_ids}
    if wanted.prompt_logprobs is not None:
        choice["prompt_logprobs"] = describe_prompt_logprobs(
            vocabulary, group.prompt, group.prompt_logprobs or (), top=wanted.prompt_logprobs
        )
    return choice
