"""The body of POST /v1/responses: OpenAI's fields, of which none that would change the answer is ignored.

Types and checks; what the input's items mean as messages is `server.responses.items`' to say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag

from pronk.engine.model.config import GenerationDefaults
from pronk.engine.request import MAX_LOGPROBS, Grammar, SamplingParams
from pronk.server.chat.tools import Choice, Function, Mode, ToolCalls
from pronk.server.errors import INVALID_VALUE, APIError
from pronk.server.protocol.common import Body, Share, Temperature, refuse
from pronk.server.protocol.formats import ANY_OBJECT, JSONObjectFormat, JSONSchema, TextFormat, json_schema_grammar
from pronk.server.protocol.messages import MAX_ITEMS
from pronk.server.protocol.sampling import first
from pronk.server.protocol.tools import (
    MAX_TOOLS,
    FunctionDefinition,
    OtherChoice,
    OtherTool,
    allowed_choice,
    functions_only,
    kind_of_choice,
    kind_of_tool,
    named_choice,
    offered_functions,
    plain_choice,
    refuse_choice_of_nothing,
)

WITHOUT_EFFECT: Mapping[str, str] = {
    "user": "names an end user for the operator's records; the model does not see it",
    "safety_identifier": "as user",
    "prompt_cache_key": "steers OpenAI's cache; ours finds common beginnings itself",
    "prompt_cache_options": "as prompt_cache_key",
    "prompt_cache_retention": "as prompt_cache_key",
    "service_tier": "chooses a queue at OpenAI; here is one",
    "reasoning": "speaks of hidden reasoning; these models have none",
    "max_tool_calls": "bounds OpenAI's built-in tools, of which there are none here",
}
REFUSED: Mapping[str, str] = {
    "conversation": "Conversations are not kept here: use previous_response_id, or send the messages.",
    "prompt": "Prompt templates are not kept here: send the text as input.",
    "moderation": "Nothing is moderated here: leave moderation out.",
    "context_management": "Nothing is compacted here: leave context_management out.",
}
LOGPROBS = "message.output_text.logprobs"
INCLUDABLE = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]
MAX_METADATA, MAX_METADATA_KEY, MAX_METADATA_VALUE = 16, 64, 512


class InputText(Body):
    type: Literal["input_text"]
    text: str = Field(description="Parts are joined without anything between them.")
    prompt_cache_breakpoint: dict[str, Any] | None = Field(None, description="Accepted; the cache needs no marks.")


class OutputText(Body):
    """A part of an earlier answer, as it was told."""

    type: Literal["output_text"]
    text: str = Field(description="What the model said.")
    annotations: list[Any] | None = Field(None, description="Accepted and not shown to the model.")
    logprobs: list[Any] | None = Field(None, description="Accepted and not shown to the model.")


class RefusalText(Body):
    type: Literal["refusal"]
    refusal: str = Field(description="As text; only in an assistant's message.")


class OtherInput(Body):
    """An image, a sound or a file: refused by `check`."""

    model_config = ConfigDict(extra="allow")
    type: str = Field(description="Refused: this model reads text.")


def _kind_of_part(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else getattr(part, "type", None)
    if not isinstance(kind, str):
        return "input_text"
    if kind == "refusal":
        return "refusal_part"  # as no field is called: it is told in an error's place
    return kind if kind in ("input_text", "output_text") else "other"


InputPart = Annotated[
    Annotated[InputText, Tag("input_text")]
    | Annotated[OutputText, Tag("output_text")]
    | Annotated[RefusalText, Tag("refusal_part")]
    | Annotated[OtherInput, Tag("other")],
    Discriminator(_kind_of_part),
]
InputParts = Annotated[list[InputPart], Field(max_length=MAX_ITEMS, fail_fast=True)]


def _kind_of_content(content: Any) -> str:
    return "parts" if isinstance(content, list) else "string"


InputContent = Annotated[
    Annotated[str, Tag("string")] | Annotated[InputParts, Tag("parts")], Discriminator(_kind_of_content)
]
Status = Literal["in_progress", "completed", "incomplete"]
STATUS = "Accepted, as it was told."


class InputMessage(Body):
    """A message, in the easy form or as it was told."""

    type: Literal["message"] = Field("message", description="May be left out.")
    role: Literal["user", "assistant", "system", "developer"] = Field(description="developer is the same as system.")
    content: InputContent = Field(description="A text, or a list of parts.")
    id: str | None = Field(None, description="Of an earlier answer's message.")
    status: Status | None = Field(None, description=STATUS)
    phase: Literal["commentary", "final_answer"] | None = Field(None, description="Accepted and not shown.")


class FunctionCallItem(Body):
    """A call that the model made."""

    type: Literal["function_call"]
    call_id: str = Field(description="By which the output names this call.")
    name: str = Field(description="Of the function.")
    arguments: str = Field(description="A JSON object, as text.")
    id: str | None = Field(None, description="Of the item.")
    status: Status | None = Field(None, description=STATUS)


class FunctionCallOutput(Body):
    """What a call gave."""

    type: Literal["function_call_output"]
    call_id: str = Field(description="Of the call.")
    output: InputContent = Field(description="A text, or a list of text parts.")
    id: str | None = Field(None, description="Of the item.")
    status: Status | None = Field(None, description=STATUS)


class ReasoningItem(Body):
    """Another model's reasoning: accepted, and not shown to this one."""

    model_config = ConfigDict(extra="allow")
    type: Literal["reasoning"]
    id: str | None = Field(None, description="Of the item.")


class ItemReference(Body):
    """An item of an earlier answer, by its id."""

    type: Literal["item_reference"] | None = Field(None, description="May be left out where there is only an id.")
    id: str = Field(description="Of an item in a stored response.")


class OtherItem(Body):
    """An item of OpenAI's own tools: refused by `check`."""

    model_config = ConfigDict(extra="allow")
    type: str = Field(description="Refused: there is no such tool here.")


_ITEMS = ("message", "function_call", "function_call_output", "reasoning", "item_reference")


def _kind_of_item(item: Any) -> str:
    given = item if isinstance(item, dict) else vars(item) if isinstance(item, Body) else {}
    kind = given.get("type")
    if kind is None:
        return "item_reference" if "id" in given and "role" not in given else "message"
    return kind if kind in _ITEMS else "other" if isinstance(kind, str) else "message"


Item = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[FunctionCallOutput, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")]
    | Annotated[ItemReference, Tag("item_reference")]
    | Annotated[OtherItem, Tag("other")],
    Discriminator(_kind_of_item),
]
Items = Annotated[list[Item], Field(max_length=MAX_ITEMS, fail_fast=True)]
Input = Annotated[Annotated[str, Tag("string")] | Annotated[Items, Tag("parts")], Discriminator(_kind_of_content)]


class FlatFunction(FunctionDefinition):
    """A function that the model may call."""

    type: Literal["function"] = Field(description="The only kind of tool.")


FlatTool = Annotated[
    Annotated[FlatFunction, Tag("function_tool")] | Annotated[OtherTool, Tag("other_tool")], Discriminator(kind_of_tool)
]


class FlatName(Body):
    """Call this function, once."""

    type: Literal["function"]
    name: str = Field(description="Of one of the tools.")


class FlatAllowed(Body):
    """Call only these functions; with mode required at least one of them."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"] = Field(description="Whether a call must be made.")
    tools: list[FlatName] = Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True, description="By name.")


FlatChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("mode_choice")]
    | Annotated[FlatName, Tag("named_choice")]
    | Annotated[FlatAllowed, Tag("allowed_choice")]
    | Annotated[OtherChoice, Tag("other_choice")],
    Discriminator(kind_of_choice),
]


class FlatSchema(JSONSchema):
    type: Literal["json_schema"] = Field(description="JSON that a schema describes.")


class TextConfig(Body):
    format: Annotated[TextFormat | JSONObjectFormat | FlatSchema, Field(discriminator="type")] | None = Field(
        None, description="What form the answer's text must have."
    )
    verbosity: Literal["low", "medium", "high"] | None = Field(
        None, description="Accepted without effect: these models were not taught it."
    )


class StreamConfig(Body):
    include_obfuscation: bool = Field(False, description="Only false: events are not padded.")


class PromptFields(Body):
    """What a response's prompt is made of: the body of POST /v1/responses/input_tokens, and a part of the other."""

    model: str = Field(description="One of the names that GET /v1/models lists.")
    input: Input = Field("", description="A text of the user's, or a list of items.")
    instructions: str | None = Field(None, description="What the model is told first, as a system message.")
    previous_response_id: str | None = Field(
        None, description="Go on after this stored response; its instructions are not taken over."
    )
    tools: Annotated[list[FlatTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = Field(
        None, description="Functions that the model may call."
    )
    tool_choice: FlatChoice | None = Field(
        None, description="none, auto (the default), required, a function by name, or allowed_tools."
    )
    parallel_tool_calls: bool | None = Field(None, description="False: one call at most. Default true.")
    text: TextConfig | None = Field(None, description="The form of the answer.")
    truncation: Literal["auto", "disabled"] | None = Field(
        None, description="auto: leave out the oldest messages until the prompt fits. Default disabled: an error."
    )
    reasoning: dict[str, Any] | None = Field(None, description=f"Without effect: {WITHOUT_EFFECT['reasoning']}.")
    conversation: Any = Field(None, description="Refused: conversations are not kept here.")

    def check(self) -> None:
        for name, sentence in REFUSED.items():
            if getattr(self, name, None) is not None:
                raise refuse(name, sentence)
        if isinstance(self.input, str):
            return
        for index, item in enumerate(self.input):
            _check_item(item, f"input[{index}]")

    def longest_prompt(self, max_model_len: int) -> int | None:
        """-> tokens that the prompt may have before its oldest messages are left out; None: any number."""
        return None

    def tool_calls(self) -> ToolCalls | None:
        """What the model may call; None: no tools are offered. Raises APIError that names the field."""
        if not self.tools:
            refuse_choice_of_nothing("tool_choice", self.tool_choice, "tools")
            return None
        offered = offered_functions(functions_only(self.tools), lambda place: f"tools[{place}]")
        choice = _choice(self.tool_choice, offered)
        return ToolCalls(offered, choice, parallel=self.parallel_tool_calls is not False)

    def text_grammar(self) -> Grammar | None:
        """What the text of the answer must be. Raises APIError that names the field."""
        match self.text.format if self.text is not None else None:
            case JSONObjectFormat():
                return ANY_OBJECT
            case FlatSchema() as described:
                return json_schema_grammar(described, "text.format")
        return None


class ResponseRequest(PromptFields):
    stream: bool = Field(False, description="Send the answer as server-sent events while it is made.")
    stream_options: StreamConfig | None = Field(None, description="Only with stream.")
    max_output_tokens: int | None = Field(
        None, ge=1, description="Length of the answer at most. Default: as much as the context holds."
    )
    temperature: Temperature | None = Field(None, description="0 to 2; 0 chooses the most likely token.")
    top_p: Share | None = Field(None, description="0 to 1: the share of probability that tokens are drawn from.")
    top_logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="How many of the most likely tokens to tell, with include."
    )
    include: list[INCLUDABLE] | None = Field(
        None,
        max_length=64,
        description="message.output_text.logprobs: tell the log probability of every token. Others are accepted, "
        "and there is nothing of their kind to tell.",
    )
    store: bool | None = Field(None, description="Keep the response, so that it can be had again. Default true.")
    background: bool = Field(False, description="Answer at once, and make the response meanwhile: ask for it later.")
    metadata: dict[str, str] | None = Field(None, description="Up to 16 texts with names, kept with the response.")
    seed: int | None = Field(None, description="The same request with the same seed gets the same answer.")
    prompt: Any = Field(None, description="Refused: prompt templates are not kept here.")
    moderation: Any = Field(None, description="Refused: nothing is moderated here.")
    context_management: Any = Field(None, description="Refused: nothing is compacted here.")
    user: str | None = Field(None, description=f"Without effect: {WITHOUT_EFFECT['user']}.")
    safety_identifier: str | None = Field(None, description="Without effect, as user.")
    prompt_cache_key: str | None = Field(None, description=f"Without effect: {WITHOUT_EFFECT['prompt_cache_key']}.")
    prompt_cache_options: dict[str, Any] | None = Field(None, description="Without effect, as prompt_cache_key.")
    prompt_cache_retention: str | None = Field(None, description="Without effect, as prompt_cache_key.")
    service_tier: str | None = Field(None, description=f"Without effect: {WITHOUT_EFFECT['service_tier']}.")
    max_tool_calls: int | None = Field(None, description=f"Without effect: {WITHOUT_EFFECT['max_tool_calls']}.")

    def check(self) -> None:
        super().check()
        if self.stream_options is not None and not self.stream:
            raise APIError("stream_options is only allowed together with stream.", INVALID_VALUE, "stream_options")
        if self.stream_options is not None and self.stream_options.include_obfuscation:
            raise refuse("stream_options.include_obfuscation", "Padding events is not supported: set it to false.")
        if self.background and self.stream:
            raise refuse(
                "background", "A response that is made in the background cannot be streamed: ask for it later."
            )
        if self.background and self.store is False:
            raise APIError(
                "A response that is made in the background must be stored: leave store out.", INVALID_VALUE, "store"
            )
        if self.top_logprobs is not None and not self.wants_logprobs:
            sentence = f"top_logprobs is only allowed with '{LOGPROBS}' in include."
            raise APIError(sentence, INVALID_VALUE, "top_logprobs")
        _check_metadata(self.metadata or {})

    def longest_prompt(self, max_model_len: int) -> int | None:
        """See `PromptFields.longest_prompt`: an answer must fit in as well."""
        return max_model_len - first(self.max_output_tokens, 1) if self.truncation == "auto" else None

    @property
    def wants_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ())

    @property
    def is_stored(self) -> bool:
        return self.store is not False

    def sampling_params(self, defaults: GenerationDefaults, grammar: Grammar | None) -> SamplingParams:
        """defaults: the checkpoint's own, for what the request leaves open. Raises InvalidParameterError."""
        return SamplingParams(
            temperature=first(self.temperature, 0.0 if defaults.do_sample is False else defaults.temperature, 1.0),
            top_p=first(self.top_p, defaults.top_p, 1.0),
            top_k=first(defaults.top_k, 0),
            seed=self.seed,
            max_tokens=self.max_output_tokens,
            logprobs=first(self.top_logprobs, 0) if self.wants_logprobs else None,
            grammar=grammar,
        )


def _check_item(item: Any, where: str) -> None:
    if isinstance(item, OtherItem):
        raise refuse(f"{where}.type", f"An item of type '{item.type}' cannot be used here.")
    field = "output" if isinstance(item, FunctionCallOutput) else "content"
    parts = getattr(item, field, None)
    if not isinstance(parts, list):
        return
    for index, part in enumerate(parts):
        place = f"{where}.{field}[{index}]"
        if isinstance(part, OtherInput):
            raise refuse(place, f"This model reads text only: a part of type {part.type} cannot be used.")
        if isinstance(part, RefusalText) and getattr(item, "role", None) != "assistant":
            raise APIError(f"A refusal can only be part of an assistant's message, at {place}.", INVALID_VALUE, place)


def _choice(tool_choice: Mode | FlatName | FlatAllowed | OtherChoice | None, offered: Sequence[Function]) -> Choice:
    match tool_choice:
        case FlatName(name=name):
            return named_choice(name, offered, "tool_choice.name")
        case FlatAllowed(mode=mode, tools=tools):
            names = [tool.name for tool in tools]
            return allowed_choice(mode, names, offered, "tool_choice.tools[{}].name".format)
    return plain_choice(tool_choice)


def _check_metadata(metadata: Mapping[str, str]) -> None:
    if len(metadata) > MAX_METADATA:
        raise APIError(f"metadata may hold at most {MAX_METADATA} texts.", INVALID_VALUE, "metadata")
    for key, value in metadata.items():
        if len(key) > MAX_METADATA_KEY or len(value) > MAX_METADATA_VALUE:
            raise APIError(
                f"A name in metadata may be {MAX_METADATA_KEY} characters long, and a text {MAX_METADATA_VALUE}.",
                INVALID_VALUE,
                "metadata",
            )
