"""What a request asks of the engine, and what it gets back: token ids and numbers, never text or JSON.

Knows no scheduling and no tensor. Everything here crosses the wire between the server's process and the engine's.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from pronk.engine.errors import InvalidParameterError

MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_STOP = 16
MAX_STOP_LENGTH = 4096
"""In characters. As much of an answer may have to be held back."""
MAX_ALLOWED = 1 << 17
MAX_BAD_WORDS = 1024

FinishReason = Literal["stop", "length", "abort", "error"]


GrammarKind = Literal["json", "regex", "choice", "lark", "gbnf"]


class Grammar(msgspec.Struct, frozen=True):
    """What a completion's text must be, from its first token to its end."""

    kind: GrammarKind
    """json: `text` is a JSON schema; choice: a JSON list of strings; lark, gbnf: a grammar in that notation."""
    text: str


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the next token is chosen and when a completion ends. Validated: an instance holds values that can run.

    The order in which they act on a row of logits: logit_bias, repetition_penalty, presence_penalty and
    frequency_penalty, then what is forbidden (grammar, allowed_token_ids, bad_words, min_tokens), then temperature,
    then top_k, top_p and min_p on what is left.
    """

    temperature: float = 1.0
    """0 chooses the most likely token; otherwise logits are divided by it."""
    top_p: float = 1.0
    """Keep the most likely tokens until their probability before the next one exceeds this."""
    top_k: int = 0
    """Keep this many of the most likely tokens; 0 keeps all."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the most likely one's probability."""
    seed: int | None = None
    """With it the same request always gets the same tokens; without, `--seed` stands in, or a random one."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of each token that the completion already holds."""
    frequency_penalty: float = 0.0
    """Subtracted as often as the completion holds the token."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt or completion (CTRL, Keskar et al. 2019)."""
    logit_bias: dict[int, float] = {}
    """Added to the logits of these token ids."""
    stop: tuple[str, ...] = ()
    """Texts that end the completion; they are not part of the answer."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the completion, beside the model's own."""
    ignore_eos: bool = False
    """Go on after the model's own stop tokens."""
    include_stop_str_in_output: bool = False
    """Keep the stop text that matched in the answer."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text in which stop texts are looked for."""
    max_tokens: int | None = None
    """Length of the completion at most; None is as much as the context holds."""
    min_tokens: int = 0
    """Stop tokens cannot be chosen, and stop texts do not count, before the completion holds this many tokens."""
    logprobs: int | None = None
    """None: no logprobs; N: the chosen token's and those of the N most likely."""
    prompt_logprobs: int | None = None
    """The same for each token of the prompt but the first, given what is before it. The prompt is computed whole."""
    allowed_token_ids: tuple[int, ...] = ()
    """Not empty: only these tokens can be sampled."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Sequences of tokens that the completion does not come to hold: their last token cannot follow the others."""
    grammar: Grammar | None = None
    """What the completion's text must be; it ends where the text is complete and nothing can follow."""

    def __post_init__(self) -> None:
        _in_range("temperature", self.temperature, 0, 2)
        _in_range("top_p", self.top_p, 0, 1)
        _in_range("min_p", self.min_p, 0, 1)
        _in_range("presence_penalty", self.presence_penalty, -2, 2)
        _in_range("frequency_penalty", self.frequency_penalty, -2, 2)
        _in_range("top_k", self.top_k, 0, 2**31 - 1)
        if not (math.isfinite(self.repetition_penalty) and 0 < self.repetition_penalty <= 100):
            raise InvalidParameterError("repetition_penalty must be more than 0 and at most 100", "repetition_penalty")
        if self.seed is not None:
            _in_range("seed", self.seed, -(2**63), 2**63 - 1)
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise InvalidParameterError(f"logit_bias may name at most {MAX_LOGIT_BIAS} tokens", "logit_bias")
        for token, bias in self.logit_bias.items():
            if token < 0:
                raise InvalidParameterError(f"logit_bias names token {token}, which does not exist", "logit_bias")
            _in_range("logit_bias", bias, -100, 100)
        if len(self.stop) > MAX_STOP:
            raise InvalidParameterError(f"stop may hold at most {MAX_STOP} texts", "stop")
        if any(not text for text in self.stop):
            raise InvalidParameterError("stop must not hold an empty text", "stop")
        if any(len(text) > MAX_STOP_LENGTH for text in self.stop):
            raise InvalidParameterError(f"a text in stop may have at most {MAX_STOP_LENGTH} characters", "stop")
        if self.max_tokens is not None and self.max_tokens < 0:
            raise InvalidParameterError("max_tokens must not be negative", "max_tokens")
        _in_range("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidParameterError("min_tokens must not be more than max_tokens", "min_tokens")
        for name, wanted in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if wanted is not None:
                _in_range(name, wanted, 0, MAX_LOGPROBS)
        if len(self.allowed_token_ids) > MAX_ALLOWED:
            raise InvalidParameterError(f"allowed_token_ids may name at most {MAX_ALLOWED} tokens", "allowed_token_ids")
        if len(self.bad_words) > MAX_BAD_WORDS or any(not 0 < len(word) <= MAX_BAD_WORDS for word in self.bad_words):
            raise InvalidParameterError(
                f"bad_words may name at most {MAX_BAD_WORDS} sequences of 1 to {MAX_BAD_WORDS} tokens", "bad_words"
            )


def _in_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # also false for NaN
        raise InvalidParameterError(f"{name} must be between {low} and {high}, but is {value}", name)


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One completion to make."""

    request_id: str
    prompt: list[int]
    params: SamplingParams
    cache_salt: str = ""
    """Prompts share cached blocks only under the same salt: one tenant cannot see another's by timing."""
    priority: int = 0
    """Requests wait in this order, lower ones first; among equals, in order of arrival."""


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Natural logarithms of probabilities at one position, before temperature and filters."""

    logprob: float
    """The chosen token's."""
    top_ids: list[int]
    """The most likely tokens, most likely first; empty when none were asked for."""
    top_logprobs: list[float]


class Timing(msgspec.Struct, frozen=True, array_like=True):
    """Where a finished request's time went, in seconds of the engine's clock: their sum is its time in the engine."""

    queue: float
    """From arrival until its first token was scheduled."""
    prefill: float
    """From then until its first token was sampled."""
    decode: float
    """From then until the end."""
    steps: int = 0
    """Steps in which it was computed."""
    preemptions: int = 0
    """How often it lost its place and was computed again."""
    computed_tokens: int = 0
    """Tokens computed for it in all steps, those of preemptions again."""


class Output(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one step added to one request."""

    request_id: str
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] | None = None
    """As many as token_ids, when asked for."""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """The stop text or the stop token id that matched; None for the model's own end."""
    error: str | None = None
    """What went wrong, with finish_reason "error"."""
    error_kind: str | None = None
    """The name of the class in errors.py that says it, with finish_reason "error"."""
    num_cached_tokens: int = 0
    """Prompt tokens found in the prefix cache; sent with the first token and at the end."""
    timing: Timing | None = None
    """Sent at the end."""
    prompt_logprobs: list[TokenLogprobs] | None = None
    """When asked for: those of the next tokens of the prompt, in order, over as many outputs as it takes; all of them
    come before or with the first token."""
