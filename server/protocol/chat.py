"""The body of POST /v1/chat/completions: OpenAI's fields, vLLM's sampling extensions, and nothing that is ignored.

Knows JSON and the engine's SamplingParams; no tokens, no template. A field that would change the answer and is not
served is a 400 that names it; the fields of WITHOUT_EFFECT are accepted, each for the reason written beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag

from pronk.engine.errors import InvalidParameterError
from pronk.engine.model.config import GenerationDefaults
from pronk.engine.request import MAX_LOGIT_BIAS, MAX_LOGPROBS, SamplingParams
from pronk.server.errors import INVALID_VALUE, APIError
from pronk.server.protocol.common import Body, StreamOptions, refuse

MAX_ITEMS = 2048
NOT_YET = "is not supported yet"

WITHOUT_EFFECT: Mapping[str, str] = {
    "user": "names an end user for the operator's records; the model does not see it",
    "safety_identifier": "as user",
    "metadata": "labels a stored completion; completions are not stored",
    "store": "completions are not stored; OpenAI's own answer is the same either way",
    "service_tier": "chooses a queue at OpenAI; here is one",
    "prompt_cache_key": "steers OpenAI's cache; ours finds common beginnings itself",
    "prompt_cache_retention": "as prompt_cache_key",
    "parallel_tool_calls": "speaks of tool calls; without tools there are none",
    "prediction": "only makes OpenAI's decoding faster",
    "reasoning_effort": "speaks of hidden reasoning; these models have none",
    "name": "in a message: Llama's format has no place for a participant's name",
}


class TextPart(Body):
    type: Literal["text"]
    text: str


class RefusalPart(Body):
    type: Literal["refusal"]
    refusal: str


class OtherPart(Body):
    """An image, a sound or a file: known to OpenAI's API, and refused by `ChatCompletionRequest.check`."""

    model_config = ConfigDict(extra="allow")
    type: Literal["image_url", "input_audio", "file"]


def _kind_of_part(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("image_url", "input_audio", "file"):
        return "other"
    return "refusal" if kind == "refusal" else "text"


def _kind_of_content(content: Any) -> str:
    return "parts" if isinstance(content, list) else "string"


Part = Annotated[
    Annotated[TextPart, Tag("text")] | Annotated[RefusalPart, Tag("refusal")] | Annotated[OtherPart, Tag("other")],
    Discriminator(_kind_of_part),
]
# fail_fast: of a million faults in one list, one is told, and only one is looked for.
# max_length: many more than anybody writes, and few enough to be looked at while other streams wait.
Strings = Annotated[list[str], Field(fail_fast=True)]
Parts = Annotated[list[Part], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)]
Content = Annotated[
    Annotated[str, Tag("string")] | Annotated[Parts, Tag("parts")],
    Discriminator(_kind_of_content),
]


def _few_biases(value: Any) -> Any:
    # Looked at before each of a million entries is.
    if isinstance(value, dict) and len(value) > MAX_LOGIT_BIAS:
        raise InvalidParameterError(f"logit_bias may name at most {MAX_LOGIT_BIAS} tokens", "logit_bias")
    return value


Bias = Annotated[dict[str, float], BeforeValidator(_few_biases)]


class FunctionCall(Body):
    name: str
    arguments: str = Field(description="A JSON object, as text.")


class ToolCall(Body):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class SystemMessage(Body):
    role: Literal["system"]
    content: Content
    name: str | None = None


class DeveloperMessage(Body):
    role: Literal["developer"]
    content: Content
    name: str | None = None


class UserMessage(Body):
    role: Literal["user"]
    content: Content
    name: str | None = None


class AssistantMessage(Body):
    """An earlier answer, as clients send it back: the empty companions of `content` are accepted, empty only."""

    role: Literal["assistant"]
    content: Content | None = None
    refusal: str | None = None
    tool_calls: list[ToolCall] | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    name: str | None = None


class ToolMessage(Body):
    role: Literal["tool"]
    content: Content
    tool_call_id: str


Message = Annotated[
    SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]


class ResponseFormat(Body):
    model_config = ConfigDict(extra="allow")
    type: Literal["text", "json_object", "json_schema"]


class ChatCompletionRequest(Body):
    messages: list[Message] = Field(
        min_length=1, max_length=MAX_ITEMS, fail_fast=True, description="The conversation so far."
    )
    model: str = Field(description="One of the names that GET /v1/models lists.")
    stream: bool = Field(False, description="Send the answer as server-sent events while it is made.")
    stream_options: StreamOptions | None = Field(None, description="Only with stream.")

    temperature: float | None = Field(None, description="0 to 2; 0 chooses the most likely token.")
    top_p: float | None = Field(None, description="0 to 1: the share of probability that tokens are drawn from.")
    max_tokens: int | None = Field(None, ge=1, description="As max_completion_tokens; OpenAI's older name.")
    max_completion_tokens: int | None = Field(
        None, ge=1, description="Length of the answer at most. Default: as much as the context holds."
    )
    n: int | None = Field(None, description="Only 1 is supported yet.")
    stop: str | Strings | None = Field(None, description="Up to 16 texts that end the answer; not part of it.")
    seed: int | None = Field(None, description="The same request with the same seed gets the same answer.")
    presence_penalty: float | None = Field(None, description="-2 to 2.")
    frequency_penalty: float | None = Field(None, description="-2 to 2.")
    logit_bias: Bias | None = Field(None, description="Token id, as text, to a bias from -100 to 100.")
    logprobs: bool | None = Field(None, description="Tell the log probability of every token of the answer.")
    top_logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="How many of the most likely tokens to tell as well."
    )

    top_k: int | None = Field(None, description="Draw from this many tokens; 0 or -1: all.")
    min_p: float | None = Field(None, description="0 to 1: drop tokens below this share of the likeliest one.")
    repetition_penalty: float | None = Field(None, description="More than 0; 1 changes nothing.")
    min_tokens: int | None = Field(None, description="No end before the answer has this many tokens.")
    ignore_eos: bool = Field(False, description="Go on after the model's own end.")
    stop_token_ids: list[int] | None = Field(None, fail_fast=True, description="Further tokens that end the answer.")
    include_stop_str_in_output: bool = Field(False, description="Keep the stop text in the answer.")
    skip_special_tokens: bool = Field(True, description="Leave special tokens out of the answer's text.")

    response_format: ResponseFormat | None = Field(None, description='Only {"type": "text"} is supported yet.')
    tools: list[Any] | None = Field(None, description="Not supported yet; an empty list is accepted.")
    tool_choice: str | dict[str, Any] | None = Field(None, description='Only "none" or "auto" without tools yet.')
    functions: list[Any] | None = Field(None, description="OpenAI's older name for tools; not supported.")
    function_call: str | dict[str, Any] | None = Field(None, description="OpenAI's older name for tool_choice.")
    modalities: list[str] | None = Field(None, description='Only ["text"].')
    verbosity: str | None = Field(None, description='Only "medium", which changes nothing.')

    user: str | None = None
    safety_identifier: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    parallel_tool_calls: bool | None = None
    prediction: dict[str, Any] | None = None
    reasoning_effort: str | None = None

    def check(self) -> None:
        self._check_unsupported()
        self._check_combinations()
        for index, message in enumerate(self.messages):
            _check_parts(message, f"messages[{index}]")

    def _check_unsupported(self) -> None:
        if self.n not in (None, 1):
            raise refuse("n", f"n={self.n} {NOT_YET}: ask for one answer at a time.")
        if self.tools:
            raise refuse("tools", f"Calling tools {NOT_YET}: leave tools out.")
        if self.functions:
            raise refuse("functions", f"Calling functions {NOT_YET}: leave functions out.")
        for name, value in (("tool_choice", self.tool_choice), ("function_call", self.function_call)):
            if value not in (None, "none", "auto"):
                raise refuse(name, f"{name} other than none or auto {NOT_YET}: leave it out.")
        if self.response_format is not None and self.response_format.type != "text":
            raise refuse("response_format", f"response_format of type {self.response_format.type} {NOT_YET}: use text.")
        if self.modalities not in (None, ["text"]):
            raise refuse("modalities", 'This model answers in text only: modalities must be ["text"].')
        if self.stream_options is not None and self.stream_options.include_obfuscation:
            raise refuse("stream_options.include_obfuscation", f"Padding chunks {NOT_YET}: set it to false.")
        if self.verbosity not in (None, "medium"):
            raise refuse("verbosity", "This model cannot be told how much to say by verbosity: leave it out.")

    def _check_combinations(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise APIError("stream_options is only allowed together with stream.", INVALID_VALUE, "stream_options")
        if self.top_logprobs is not None and not self.logprobs:
            raise APIError("top_logprobs is only allowed with logprobs set to true.", INVALID_VALUE, "top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise APIError(
                "max_tokens and max_completion_tokens say different things: send one of them.",
                INVALID_VALUE,
                "max_tokens",
            )

    @property
    def length_field(self) -> str:
        """The name under which the client gave the length of the answer."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling_params(self, defaults: GenerationDefaults) -> SamplingParams:
        """defaults: the checkpoint's own, for what the request leaves open; what both leave open is OpenAI's default.

        Raises InvalidParameterError, which names the field.
        """
        return SamplingParams(
            temperature=_first(self.temperature, 0.0 if defaults.do_sample is False else defaults.temperature, 1.0),
            top_p=_first(self.top_p, defaults.top_p, 1.0),
            top_k=0 if self.top_k == -1 else _first(self.top_k, defaults.top_k, 0),
            min_p=_first(self.min_p, 0.0),
            seed=self.seed,
            presence_penalty=_first(self.presence_penalty, 0.0),
            frequency_penalty=_first(self.frequency_penalty, 0.0),
            repetition_penalty=_first(self.repetition_penalty, 1.0),
            logit_bias=_token_ids(self.logit_bias or {}),
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=self.ignore_eos,
            include_stop_str_in_output=self.include_stop_str_in_output,
            skip_special_tokens=self.skip_special_tokens,
            max_tokens=_first(self.max_completion_tokens, self.max_tokens),
            min_tokens=_first(self.min_tokens, 0),
            logprobs=_first(self.top_logprobs, 0) if self.logprobs else None,
        )


def _first(*values: Any) -> Any:
    """The first that is not None."""
    return next((value for value in values if value is not None), None)


def _token_ids(bias: dict[str, float]) -> dict[int, float]:
    for key in bias:
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise APIError("The keys of logit_bias must be token ids, written as digits.", INVALID_VALUE, "logit_bias")
    return {int(key): value for key, value in bias.items()}


def _check_parts(message: Any, where: str) -> None:
    if not isinstance(message.content, list):
        return
    for index, part in enumerate(message.content):
        place = f"{where}.content[{index}]"
        if isinstance(part, OtherPart):
            raise refuse(place, f"This model reads text only: a part of type {part.type} cannot be used.")
        if isinstance(part, RefusalPart) and message.role != "assistant":
            raise APIError(f"A refusal can only be part of an assistant's message, at {place}.", INVALID_VALUE, place)
