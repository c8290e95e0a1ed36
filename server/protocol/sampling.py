"""The fields that chat completions and completions have in common: how tokens are chosen, when an answer ends, and what
is told beside its text. From them the engine's SamplingParams of each choice.

Knows the tokenizer, as some fields speak of words where the engine speaks of tokens; no prompt and no answer.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Any

import msgspec
from pydantic import BeforeValidator, Field

from pronk.engine.errors import InvalidParameterError
from pronk.engine.model.config import GenerationDefaults
from pronk.engine.request import (
    MAX_BAD_WORDS,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_STOP,
    MAX_STOP_LENGTH,
    Grammar,
    SamplingParams,
)
from pronk.engine.tokenizer import Tokenizer
from pronk.server.errors import INVALID_VALUE, APIError
from pronk.server.protocol.common import Body, Share, StreamOptions, Temperature, refuse, told
from pronk.server.protocol.formats import ResponseFormat, StructuredOutputs, format_grammar, structured_grammar

MAX_CHOICES = 128
MAX_SALT = 1024

MAX_BEAMS = MAX_LOGPROBS // 2
"""Each beam of a search asks for twice as many tokens as there are beams."""
NOT_WITH_BEAMS = (
    "stop", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "logit_bias", "allowed_token_ids", "bad_words", "response_format", "structured_outputs", "prompt_logprobs",
    "min_tokens",
)  # fmt: skip

# fail_fast: of a million faults in one list, one is told, and only one is looked for.
Strings = Annotated[list[str], Field(fail_fast=True)]
TokenIds = Annotated[list[int], Field(fail_fast=True)]


def _few_biases(value: Any) -> Any:
    # Looked at before each of a million entries is.
    if isinstance(value, dict) and len(value) > MAX_LOGIT_BIAS:
        raise InvalidParameterError(f"logit_bias may name at most {MAX_LOGIT_BIAS} tokens", "logit_bias")
    return value


Bias = Annotated[
    dict[str, float],
    BeforeValidator(_few_biases),
    told(
        "object",
        maxProperties=MAX_LOGIT_BIAS,
        propertyNames={"pattern": "^[0-9]{1,9}$"},
        additionalProperties={"type": "number", "minimum": -100, "maximum": 100},
    ),
]
Penalty = Annotated[float, told("number", minimum=-2, maximum=2)]
Seed = Annotated[int, told("integer", format="int64")]
_STOP_RULES = {"minLength": 1, "maxLength": MAX_STOP_LENGTH}
StopText = Annotated[str, told("string", **_STOP_RULES)]
StopTexts = Annotated[Strings, told("array", items={"type": "string", **_STOP_RULES}, maxItems=MAX_STOP)]
StopTokenIds = Annotated[TokenIds, told("array", items={"type": "integer", "minimum": 0})]
SomeTokenIds = Annotated[TokenIds, told("array", items={"type": "integer", "minimum": 0}, minItems=1)]


class SamplingFields(Body):
    """Base of the bodies of the two endpoints."""

    model: str = Field(description="One of the names that GET /v1/models lists.")
    stream: bool = Field(False, description="Send the answer as server-sent events while it is made.")
    stream_options: StreamOptions | None = Field(None, description="Only with stream.")
    max_tokens: int | None = Field(None, ge=0, description="Length of an answer at most.")

    temperature: Temperature | None = Field(None, description="0 to 2; 0 chooses the most likely token.")
    top_p: Share | None = Field(None, description="0 to 1: the share of probability that tokens are drawn from.")
    n: int | None = Field(
        None,
        ge=1,
        le=MAX_CHOICES,
        description="How many answers to make. Choice i is that of a single request with a seed higher by i.",
    )
    stop: StopText | StopTexts | None = Field(None, description="Up to 16 texts that end the answer; not part of it.")
    seed: Seed | None = Field(None, description="The same request with the same seed gets the same answer.")
    presence_penalty: Penalty | None = Field(None, description="-2 to 2.")
    frequency_penalty: Penalty | None = Field(None, description="-2 to 2.")
    logit_bias: Bias | None = Field(None, description="Token id, as text, to a bias from -100 to 100.")

    top_k: Annotated[int, told("integer", format="int32", minimum=-1)] | None = Field(
        None, description="Draw from this many tokens; 0 or -1: all."
    )
    min_p: Share | None = Field(None, description="0 to 1: drop tokens below this share of the likeliest one.")
    repetition_penalty: Annotated[float, told("number", exclusiveMinimum=0, maximum=100)] | None = Field(
        None, description="More than 0; 1 changes nothing."
    )
    min_tokens: Annotated[int, told("integer", format="int32", minimum=0)] | None = Field(
        None, description="No end before the answer has this many tokens."
    )
    ignore_eos: bool = Field(False, description="Go on after the model's own end.")
    stop_token_ids: StopTokenIds | None = Field(None, description="Further tokens that end the answer.")
    include_stop_str_in_output: bool = Field(False, description="Keep the stop text in the answer.")
    skip_special_tokens: bool = Field(True, description="Leave special tokens out of the answer's text.")
    allowed_token_ids: SomeTokenIds | None = Field(None, description="Choose among these tokens only.")
    bad_words: Strings | None = Field(
        None,
        description="Texts that the answer is kept from: their usual tokens, with and without a space before them, "
        "never follow each other.",
    )
    use_beam_search: bool = Field(
        False, description="Search for the n likeliest answers, in beams as many as n; temperature must be 0."
    )
    length_penalty: float | None = Field(
        None,
        description="Of beam search: a beam's score is its log probability, divided by its number of tokens to this "
        "power. Default 1.",
    )

    response_format: ResponseFormat | None = Field(None, description="What form the answer's text must have.")
    structured_outputs: StructuredOutputs | None = Field(None, description="As response_format, with more forms.")

    prompt_logprobs: Annotated[int, told("integer", minimum=0, maximum=MAX_LOGPROBS)] | None = Field(
        None, description="0 to 20: tell the log probability of each token of the prompt, and of so many others."
    )
    truncate_prompt_tokens: Annotated[int, told("integer", minimum=-1, **{"not": {"const": 0}})] | None = Field(
        None, description="Keep only so many of the prompt's last tokens; -1: as many as fit."
    )
    return_token_ids: bool = Field(False, description="Tell the ids of the tokens of prompt and answer.")
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_SALT)] | None = Field(
        None, description="Share the prefix cache only with requests of the same key and the same salt."
    )
    priority: Annotated[int, told("integer", format="int32")] | None = Field(
        None, description="Requests with lower numbers run first. Default 0."
    )
    timings: bool = Field(False, description="Tell where the time went; the parts sum up to the whole.")

    def check(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise APIError("stream_options is only allowed together with stream.", INVALID_VALUE, "stream_options")
        if self.stream_options is not None and self.stream_options.include_obfuscation:
            sentence = "Padding chunks is not supported: set it to false."
            raise refuse("stream_options.include_obfuscation", sentence)
        if self.prompt_logprobs is not None and self.stream:
            sentence = "prompt_logprobs cannot be told in a stream: leave one of them out."
            raise APIError(sentence, INVALID_VALUE, "prompt_logprobs")
        truncate = self.truncate_prompt_tokens
        if truncate is not None and (truncate < -1 or truncate == 0):
            raise APIError("truncate_prompt_tokens must be at least 1, or -1.", INVALID_VALUE, "truncate_prompt_tokens")
        for name in ("stop_token_ids", "allowed_token_ids"):
            if min(getattr(self, name) or (0,)) < 0:
                raise APIError(f"{name} must not be negative.", INVALID_VALUE, name)
        if self.allowed_token_ids == []:
            raise APIError("allowed_token_ids must allow at least one token.", INVALID_VALUE, "allowed_token_ids")
        if self.priority is not None and not -(2**31) <= self.priority < 2**31:
            raise APIError("priority must fit in 32 bits.", INVALID_VALUE, "priority")
        self._check_beams()

    def _check_beams(self) -> None:
        if not self.use_beam_search:
            if self.length_penalty is not None:
                sentence = "length_penalty speaks of beam search: set use_beam_search."
                raise APIError(sentence, INVALID_VALUE, "length_penalty")
            return
        if self.temperature not in (None, 0):
            raise APIError("temperature must be 0 with use_beam_search.", INVALID_VALUE, "temperature")
        if self.stream:
            raise refuse("stream", "A beam search has nothing to tell before its end: leave stream out.")
        if self.num_choices > MAX_BEAMS:
            raise refuse("n", f"A beam search may be at most {MAX_BEAMS} beams wide.")
        if self.length_penalty is not None and not -10 <= self.length_penalty <= 10:
            raise APIError("length_penalty must be between -10 and 10.", INVALID_VALUE, "length_penalty")
        for name in NOT_WITH_BEAMS:
            if getattr(self, name) is not None:
                raise refuse(name, f"{name} cannot be used together with use_beam_search.")

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.continuous_usage_stats

    @property
    def length(self) -> int | None:
        """Of an answer at most, in tokens; None: as much as the context holds."""
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """As SamplingParams.logprobs."""
        return None

    @property
    def grammar_field(self) -> str:
        """The field that a grammar which cannot be enforced is due to."""
        return "response_format.json_schema.schema" if self.structured_outputs is None else "structured_outputs"

    def text_grammar(self) -> Grammar | None:
        """What the text of an answer must be. Raises APIError that names the field."""
        wanted = format_grammar(self.response_format)
        structured = structured_grammar(self.structured_outputs)
        if wanted is not None and structured is not None:
            raise APIError(
                "response_format and structured_outputs both say what the answer must be: send one of them.",
                INVALID_VALUE,
                "structured_outputs",
            )
        return wanted or structured

    def sampling_params(
        self, defaults: GenerationDefaults, tokenizer: Tokenizer, *, grammar: Grammar | None = None
    ) -> SamplingParams:
        """Those of the first choice.

        defaults: the checkpoint's own, for what the request leaves open; what both leave open is OpenAI's default.
        Raises InvalidParameterError and APIError, which name the field.
        """
        return SamplingParams(
            temperature=first(self.temperature, 0.0 if defaults.do_sample is False else defaults.temperature, 1.0),
            top_p=first(self.top_p, defaults.top_p, 1.0),
            top_k=0 if self.top_k == -1 else first(self.top_k, defaults.top_k, 0),
            min_p=first(self.min_p, 0.0),
            seed=self.seed,
            presence_penalty=first(self.presence_penalty, 0.0),
            frequency_penalty=first(self.frequency_penalty, 0.0),
            repetition_penalty=first(self.repetition_penalty, 1.0),
            logit_bias=_token_ids(self.logit_bias or {}),
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=self.ignore_eos,
            include_stop_str_in_output=self.include_stop_str_in_output,
            skip_special_tokens=self.skip_special_tokens,
            max_tokens=self.length,
            min_tokens=first(self.min_tokens, 0),
            logprobs=self.num_logprobs,
            prompt_logprobs=self.prompt_logprobs,
            allowed_token_ids=tuple(self.allowed_token_ids or ()),
            bad_words=_bad_words(self.bad_words or (), tokenizer),
            grammar=grammar,
        )

    def truncate(self, prompt: list[int], max_model_len: int) -> list[int]:
        """-> the prompt's end, as long as the request allows."""
        keep = self.truncate_prompt_tokens
        if keep is None:
            return prompt
        if keep == -1:
            keep = max(1, max_model_len - (1 if self.length is None else self.length))
        return prompt[-keep:]

    def salt(self, key_salt: str) -> str:
        """key_salt: of the client's key. -> under which the request's prompt is cached."""
        if self.cache_salt is None:
            return key_salt
        return hashlib.sha256(b"pronk request salt\0" + f"{key_salt}\0{self.cache_salt}".encode()).hexdigest()


def choices(params: SamplingParams, n: int, default_seed: int | None) -> list[SamplingParams]:
    """The parameters of the first choice -> of all n: each has a seed higher by one than the one before it, if any.

    default_seed: what the engine takes for a request that names none. The prompt is scored for the first one only.
    """
    seed = params.seed if params.seed is not None else default_seed
    others = [
        msgspec.structs.replace(params, seed=None if seed is None else _wrapped(seed + index), prompt_logprobs=None)
        for index in range(1, n)
    ]
    return [params, *others]


def _wrapped(seed: int) -> int:
    """Into 64 bits, with the sign."""
    return (seed + 2**63) % 2**64 - 2**63


def first(*values: Any) -> Any:
    """The first that is not None."""
    return next((value for value in values if value is not None), None)


def _token_ids(bias: dict[str, float]) -> dict[int, float]:
    for key in bias:
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise APIError("The keys of logit_bias must be token ids, written as digits.", INVALID_VALUE, "logit_bias")
    return {int(key): value for key, value in bias.items()}


def _bad_words(words: list[str] | tuple[()], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Each word as tokens, as it stands at a text's beginning, and as it stands after a space."""
    if len(words) > MAX_BAD_WORDS // 2:
        raise APIError(f"bad_words may name at most {MAX_BAD_WORDS // 2} texts.", INVALID_VALUE, "bad_words")
    sequences: dict[tuple[int, ...], None] = {}
    for place, word in enumerate(words):
        bare = word.lstrip(" ")
        if not bare:
            raise APIError(f"'bad_words[{place}]' must not be empty.", INVALID_VALUE, f"bad_words[{place}]")
        for text in (bare, f" {bare}"):
            sequences[tuple(tokenizer.encode(text))] = None
    return tuple(sequences)
