"""What one request may call, and what follows from it: the prompt's definitions, the grammar, and the parser.

`ToolCalls` is all that a protocol needs to know of tools. For each request:

1. `pronk.server.protocol.tools` makes a ToolCalls of the request's fields (or None, when it offers no tools).
2. `template.render(normalise(messages), **calls.render_args(messages))` puts the definitions into the prompt.
3. `calls.grammar(format)` is the engine's Grammar; `format` is that of the request's response_format.
4. `calls.parser(format)` is fed the answer's text, one parser for each choice; what it returns are the parts of deltas.
5. `calls.finish_reason(reason, parser)` is the reason that the client is told.

Knows no HTTP, no tokens and no body's shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pronk.engine.request import Grammar
from pronk.server.chat.tool_grammar import arguments_grammar, call_grammar
from pronk.server.chat.tool_parser import ToolParser

Mode = Literal["none", "auto", "required"]
_SYSTEM_ROLES = ("system", "developer")
EMPTY_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}}


@dataclass(frozen=True)
class Function:
    """A function that the model may call.

    parameters: a JSON schema of an object; None where the client gave none: the function takes no arguments.
    strict: the arguments must follow the schema also where the model may choose to call or not.
    """

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] | None = None
    strict: bool = False

    @property
    def schema(self) -> Mapping[str, Any]:
        """What the arguments must be."""
        return EMPTY_PARAMETERS if self.parameters is None else self.parameters

    @property
    def definition(self) -> dict[str, Any]:
        """As the prompt shows it: what Llama was trained on, in that order. `strict` is not for the model."""
        described = {} if self.description is None else {"description": self.description}
        function = {"name": self.name, **described, "parameters": self.schema}
        return {"type": "function", "function": function}


@dataclass(frozen=True)
class Choice:
    """What a request's tool_choice says.

    names: the functions that may be called; None is all of them.
    named: exactly one call of the one function in `names`.
    """

    mode: Mode = "auto"
    names: frozenset[str] | None = None
    named: bool = False


@dataclass(frozen=True)
class ToolCalls:
    """Tools of one request. Immutable; `parser` makes what changes.

    parallel: whether an answer may hold more than one call.
    legacy: they came as `functions`: the answer's one call is told as `function_call`, and so is its finish reason.
    """

    offered: tuple[Function, ...]
    choice: Choice = field(default_factory=Choice)
    parallel: bool = True
    legacy: bool = False

    @property
    def callable(self) -> tuple[Function, ...]:
        """The functions that this answer may call, in the request's order."""
        if self.choice.mode == "none":
            return ()
        names = self.choice.names
        return tuple(function for function in self.offered if names is None or function.name in names)

    def render_args(self, messages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """-> keyword arguments of ChatTemplate.render: `tools` and `tools_in_user_message`.

        messages: those of the request, as OpenAI's clients write them.

        The prompt shows all functions that are offered, or those that allowed_tools leaves: a small model that is not
        to call a function had better not see it. With tool_choice "none" it shows none. They stand in the first user
        message, as the templates have them by default, where the conversation begins with one; else in the system
        message, as the templates would take any other first message for the user's.
        """
        shown = self.offered if self.choice.named else self.callable
        if not shown:
            return {}
        roles = [message["role"] for message in messages[:2]]
        first = roles[1:] if roles[0] in _SYSTEM_ROLES else roles
        definitions = [function.definition for function in shown]
        return {"tools": definitions, "tools_in_user_message": first[:1] == ["user"]}

    def grammar(self, response_format: Grammar | None = None) -> Grammar | None:
        """-> what the answer's text must be; None: anything.

        response_format: of an answer that calls nothing. An answer that calls is not bound by it. Without callable
        functions it is returned as it is.
        """
        return call_grammar(self.callable, self.choice, parallel=self.parallel, response_format=response_format)

    def bound_arguments(self) -> list[tuple[int, Grammar]]:
        """-> the arguments that `grammar` holds to their schemas, each as a grammar by itself, with its function's
        place in the request: to find out which of them it is that cannot be enforced."""
        return [
            (place, arguments_grammar(function))
            for place, function in enumerate(self.offered)
            if function in self.callable and (function.strict or self.choice.mode == "required")
        ]

    def parser(self, response_format: Grammar | None = None) -> ToolParser | None:
        """-> a new machine for one choice's text; None: the text is content, whatever it looks like.

        response_format: as for `grammar`. Under a grammar only calls that it has held to their schemas count.
        """
        names = [function.name for function in self.callable]
        if not names:
            return None
        text = self.choice.mode == "auto" and response_format is None
        bound = not text or any(function.strict for function in self.callable)
        return ToolParser(names, parallel=self.parallel, taught_only=bound, anywhere=text)

    def finish_reason(self, reason: str | None, parser: ToolParser | None) -> str | None:
        """The engine's reason -> the client's: "stop" after a call is "tool_calls" (or "function_call"); all others,
        "length" among them, stay what they are."""
        if reason != "stop" or parser is None or parser.num_calls == 0:
            return reason
        return "function_call" if self.legacy else "tool_calls"
