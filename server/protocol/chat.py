"""The body of POST /v1/chat/completions: OpenAI's fields, vLLM's extensions, and nothing that is ignored.

Knows JSON and the engine's SamplingParams; no template. A field that would change the answer and is not served is a 400
that names it; the fields of WITHOUT_EFFECT are accepted, each for the reason written beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from pronk.engine.request import MAX_LOGPROBS, Grammar
from pronk.server.chat.tools import ToolCalls
from pronk.server.errors import INVALID_VALUE, APIError
from pronk.server.protocol.common import Body, refuse, told
from pronk.server.protocol.messages import Messages, check_messages, plain_messages
from pronk.server.protocol.sampling import SamplingFields, first
from pronk.server.protocol.tools import FunctionCallChoice, Functions, ToolChoice, Tools, read_tools

WITHOUT_EFFECT: Mapping[str, str] = {
    "user": "names an end user for the operator's records; the model does not see it",
    "safety_identifier": "names an end user, as user does",
    "metadata": "labels a stored completion; completions are not stored",
    "store": "completions are not stored; OpenAI's own answer is the same either way",
    "prompt_cache_key": "steers OpenAI's cache; ours finds common beginnings itself",
    "prompt_cache_options": "steers OpenAI's cache, as prompt_cache_key does",
    "prompt_cache_retention": "steers OpenAI's cache, as prompt_cache_key does",
    "prediction": "only makes OpenAI's decoding faster",
    "reasoning_effort": "speaks of hidden reasoning; these models have none",
    "name": "in a message: Llama's format has no place for a participant's name",
}

NO_EFFECT = {name: f"No effect: {reason}." for name, reason in WITHOUT_EFFECT.items()}

REFUSED: Mapping[str, str] = {
    "audio": "This model answers in text only: leave audio out.",
    "moderation": "Nothing is moderated here: leave moderation out.",
    "web_search_options": "This model searches no web: leave web_search_options out.",
}


class ChatTemplateKwargs(Body):
    """What Llama's templates know."""

    date_string: str | None = Field(None, description='The day that the prompt names as "Today Date".')
    tools_in_user_message: bool | None = Field(
        None, description="Describe tools in the first user message (true) or in the system message."
    )


class ChatFields(Body):
    """Base of the bodies that a chat's prompt is made of."""

    messages: Messages = Field(description="The conversation so far.")
    tools: Tools | None = Field(None, description="Functions that the model may call.")
    tool_choice: ToolChoice | None = Field(
        None, description="none, auto (the default), required, a function by name, or allowed_tools."
    )
    parallel_tool_calls: bool | None = Field(None, description="False: one call at most. Default true.")
    functions: Functions | None = Field(None, description="OpenAI's older name for tools.")
    function_call: FunctionCallChoice | None = Field(None, description="OpenAI's older name for tool_choice.")
    add_generation_prompt: bool | None = Field(
        None, description="End the prompt with the header of the model's turn. Default: unless it continues one."
    )
    continue_final_message: bool = Field(False, description="Go on with the last message instead of answering it.")
    chat_template_kwargs: ChatTemplateKwargs | None = Field(None, description="What the chat template knows besides.")

    def check(self) -> None:
        if self.continue_final_message and self.add_generation_prompt:
            raise APIError(
                "continue_final_message goes on with the last message, and add_generation_prompt begins a new one: "
                "send one of them.",
                INVALID_VALUE,
                "continue_final_message",
            )
        check_messages(self.messages)

    def tool_calls(self) -> ToolCalls | None:
        """What the model may call; None: no tools are offered. Raises APIError that names the field."""
        return read_tools(self.tools, self.tool_choice, self.parallel_tool_calls, self.functions, self.function_call)

    def render_args(self, tools: ToolCalls | None) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """-> messages, and options of ChatTemplate.render."""
        messages = plain_messages(self.messages)
        options: dict[str, Any] = {} if tools is None else tools.render_args(messages)
        kwargs = {} if self.chat_template_kwargs is None else self.chat_template_kwargs.model_dump(exclude_none=True)
        begins = first(self.add_generation_prompt, not self.continue_final_message)
        return messages, {
            **options,
            **kwargs,
            "add_generation_prompt": begins,
            "continue_final_message": self.continue_final_message,
        }


@dataclass(frozen=True)
class Constraint:
    """What the answers must be. form: of an answer that calls nothing; grammar: of any."""

    tools: ToolCalls | None
    form: Grammar | None
    grammar: Grammar | None


class ChatCompletionRequest(ChatFields, SamplingFields):
    max_tokens: int | None = Field(None, ge=1, description="As max_completion_tokens; OpenAI's older name.")
    max_completion_tokens: int | None = Field(
        None, ge=1, description="Length of an answer at most. Default: as much as the context holds."
    )
    logprobs: bool | None = Field(None, description="Tell the log probability of every token of the answer.")
    top_logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="How many of the most likely tokens to tell as well."
    )
    modalities: Annotated[list[str], told("array", items={"const": "text"}, minItems=1, maxItems=1)] | None = Field(
        None, description='Only ["text"].'
    )
    verbosity: str | None = Field(None, description='Only "medium", which changes nothing.')
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast"] | None = Field(
        None, description="flex: let requests of other tiers go first; the others are alike."
    )

    user: str | None = Field(None, description=NO_EFFECT["user"])
    safety_identifier: str | None = Field(None, description=NO_EFFECT["safety_identifier"])
    metadata: dict[str, Any] | None = Field(None, description=NO_EFFECT["metadata"])
    store: bool | None = Field(None, description=NO_EFFECT["store"])
    prompt_cache_key: str | None = Field(None, description=NO_EFFECT["prompt_cache_key"])
    prompt_cache_options: dict[str, Any] | None = Field(None, description=NO_EFFECT["prompt_cache_options"])
    prompt_cache_retention: str | None = Field(None, description=NO_EFFECT["prompt_cache_retention"])
    prediction: dict[str, Any] | None = Field(None, description=NO_EFFECT["prediction"])
    reasoning_effort: str | None = Field(None, description=NO_EFFECT["reasoning_effort"])
    audio: Any = Field(None, description="Refused: this model answers in text only.")
    moderation: Any = Field(None, description="Refused: nothing is moderated here.")
    web_search_options: Any = Field(None, description="Refused: this model searches no web.")

    def check(self) -> None:
        for name, sentence in REFUSED.items():
            if getattr(self, name) is not None:
                raise refuse(name, sentence)
        if self.modalities not in (None, ["text"]):
            raise refuse("modalities", 'This model answers in text only: modalities must be ["text"].')
        if self.verbosity not in (None, "medium"):
            raise refuse("verbosity", "This model cannot be told how much to say by verbosity: leave it out.")
        if self.top_logprobs and not self.logprobs:
            raise APIError("top_logprobs is only allowed with logprobs set to true.", INVALID_VALUE, "top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise APIError(
                "max_tokens and max_completion_tokens say different things: send one of them.",
                INVALID_VALUE,
                "max_tokens",
            )
        SamplingFields.check(self)
        ChatFields.check(self)
        if self.use_beam_search and (self.tools or self.functions):
            raise refuse("use_beam_search", "A beam search cannot call tools: leave one of them out.")

    @property
    def length(self) -> int | None:
        limit: int | None = first(self.max_completion_tokens, self.max_tokens)
        return limit

    @property
    def length_field(self) -> str:
        """The name under which the client gave the length of the answer."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def engine_priority(self) -> int:
        """Lower ones first."""
        return int(first(self.priority, 1 if self.service_tier == "flex" else 0))

    def constraint(self) -> Constraint:
        """Raises APIError that names the field."""
        tools, form = self.tool_calls(), self.text_grammar()
        return Constraint(tools, form, form if tools is None else tools.grammar(form))

    @property
    def tools_field(self) -> str:
        """The name under which the client gave its tools."""
        return "functions" if self.functions else "tools"

    def parameters_of(self, tools: ToolCalls | None) -> list[tuple[str, Grammar]]:
        """-> the parameters that bind calls: the name of each field, and what its schema means."""
        bound = [] if tools is None else tools.bound_arguments()
        member = "" if self.functions else ".function"
        return [(f"{self.tools_field}[{place}]{member}.parameters", grammar) for place, grammar in bound]
