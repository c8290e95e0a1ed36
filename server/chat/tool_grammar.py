"""tools + tool_choice -> the engine's Grammar under which a small model cannot miss.

All calls in it have the form that the chat templates teach, {"name": "f", "parameters": {...}}, and the answer ends
with them. Functions of what the request says, in the notation of the grammar library (Lark with `%json`); how it is run
is the engine's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pronk.engine.errors import InvalidParameterError
from pronk.engine.request import Grammar
from pronk.server.chat.call_shapes import call_pattern, without_calls
from pronk.server.chat.tool_schema import closed, moved

if TYPE_CHECKING:
    from pronk.server.chat.tools import Choice, Function

MOST_CALLS = 16
"""How many calls an answer under a grammar may hold: a small model that repeats itself comes to an end."""

ANY_OBJECT: Mapping[str, Any] = {"type": "object"}

# Space is bounded as in the engine's own JSON: none but one after a colon and a comma.
_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
_SPACE = "[ \\t\\n\\r]*"
# Everything with which `{"name": "f"` begins, f being any name; where the text goes on differently it is only text.
_BRACE = rf'\{{{_SPACE}("(n(a(m(e("{_SPACE}(:{_SPACE}("[a-zA-Z0-9_-]*)?)?)?)?)?)?)?)?'
# A regular expression all of whose texts, as far as can be seen, begin with a brace.
_BEGINS_WITH_BRACE = re.compile(r"(?:\^|\(\?:|\(|\\s[*+?]?|[ ])*(?:\\\{|\[\\?\{\])")


def call_grammar(
    functions: Sequence[Function],
    choice: Choice,
    *,
    parallel: bool,
    response_format: Grammar | None = None,
) -> Grammar | None:
    """functions: those that may be called; response_format: of an answer without a call. -> None for any text.

    - A call is required: it, or several where that is allowed and none is named. Arguments follow their schemas, in
      which an object that names its properties has no others.
    - The model chooses, and answers have a format: calls, or an answer of the format. Where a function is strict, an
      answer of a regular expression does not begin with a brace.
    - The model chooses, and a function is strict: text, calls, or text and then calls. Text does not begin like a call
      of any form, and wherever a call of the taught form begins, it is one to its end.

    Where the model chooses, arguments of functions that are not strict are any object.
    Raises InvalidParameterError for a format that no other text can stand beside, and for one of which some answers
    could be read as calls of a strict function.
    """
    if not functions:
        return response_format
    calls = f'calls: call ("; " call){{0,{MOST_CALLS - 1}}}' if parallel and not choice.named else "calls: call"
    try:
        if choice.mode == "required":
            return _lark("start: calls", calls, _forced_calls(functions))
        if response_format is not None:
            return _lark("start: calls | format", calls, _calls_as_json(functions), _format(response_format, functions))
        if any(function.strict for function in functions):
            return _lark("start: calls | FIRST (TEXT | BRACE)* calls?", calls, _calls_in_text(functions))
    except RecursionError:
        raise InvalidParameterError("A schema in tools is nested too deeply.", "tools") from None
    return None


def arguments_grammar(function: Function) -> Grammar:
    """Of one call's arguments alone."""
    return Grammar("json", json.dumps(_arguments(function)))


def _lark(*parts: str) -> Grammar:
    return Grammar("lark", "\n".join(parts) + "\n")


def _forced_calls(functions: Sequence[Function]) -> str:
    rules = []
    for place, function in enumerate(functions):
        begin = f'{{"name": "{function.name}", "parameters": '
        rules.append(f'call_{place}: {json.dumps(begin)} args_{place} "}}"')
        rules.append(f"args_{place}: {_json(_arguments(function))}")
    return "\n".join([_one_of("call", len(functions)), *rules])


def _calls_as_json(functions: Sequence[Function]) -> str:
    """As one JSON text, for the library to tell it from another JSON text at any token."""
    rules = []
    for place, function in enumerate(functions):
        call = {
            "type": "object",
            "properties": {
                "name": {"const": function.name},
                "parameters": moved(_chosen_arguments(function), "#/properties/parameters"),
            },
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        rules.append(f"call_{place}: {_json(call)}")
    return "\n".join([_one_of("call", len(functions)), *rules])


def _calls_in_text(functions: Sequence[Function]) -> str:
    """A call's beginning is one terminal, which wins over text because it is longer than every BRACE."""
    rules = []
    for place, function in enumerate(functions):
        rules.append(f'call_{place}: OPEN_{place} ", \\"parameters\\": " args_{place} "}}"')
        rules.append(f'OPEN_{place}: /\\{{{_SPACE}"name"{_SPACE}:{_SPACE}"{function.name}"/')
        rules.append(f"args_{place}: {_json(_chosen_arguments(function))}")
    text = [f"FIRST: /{_SPACE}([^ \\t\\n\\r{{\\[<]|<[^f])/", "TEXT: /[^{]+/", f"BRACE: /{_BRACE}/"]
    return "\n".join([_one_of("call", len(functions)), *rules, *text])


def _one_of(name: str, count: int) -> str:
    return f"{name}: " + " | ".join(f"{name}_{place}" for place in range(count))


def _arguments(function: Function) -> Mapping[str, Any]:
    return {"type": "object", **closed(function.schema)}


def _chosen_arguments(function: Function) -> Mapping[str, Any]:
    return _arguments(function) if function.strict else ANY_OBJECT


def _format(response_format: Grammar, functions: Sequence[Function]) -> str:
    strict = {function.name for function in functions if function.strict}
    match response_format.kind:
        case "json":
            schema = json.loads(response_format.text)
            if not isinstance(schema, dict):
                schema = {"allOf": [schema]} if schema is not True else {}
            return f"format: {_json(_required(without_calls(schema, strict), strict))}"
        case "choice":
            choices: list[str] = json.loads(response_format.text)
            calls = re.compile(call_pattern(strict)) if strict else None
            if calls and any(calls.match(text) for text in choices):
                raise _mistakable(strict)
            return "format: " + " | ".join(json.dumps(text) for text in choices)
        case "regex":
            pattern = f"/{_between_slashes(response_format.text)}/"
            if strict and _BEGINS_WITH_BRACE.match(response_format.text):
                raise _mistakable(strict)
            # Once a text is begun as one terminal it cannot go on as a call: here the first brace tells them apart.
            return f"format: FORMAT\nFORMAT: {pattern}" + (f" & ~/{_SPACE}\\{{[\\s\\S]*/" if strict else "")
    raise InvalidParameterError(
        f"structured_outputs as a grammar ({response_format.kind}) cannot stand beside tools that may be called: leave "
        "the tools out, or use json, regex or choice.",
        "structured_outputs",
    )


def _required(schema: Mapping[str, Any] | None, strict: Collection[str]) -> Mapping[str, Any]:
    if schema is None:
        raise _mistakable(strict)
    return schema


def _mistakable(strict: Collection[str]) -> InvalidParameterError:
    return InvalidParameterError(
        f"An answer of the format asked for could read as a call of {' or '.join(sorted(strict)[:3])}, which is strict,"
        " and not keep to its parameters: let the format's objects have no property 'parameters', or a property "
        "'name' that is no function's, or leave strict out.",
        "tools",
    )


def _between_slashes(pattern: str) -> str:
    return re.sub(
        r"\\.|/|\n", lambda found: {"/": r"\/", "\n": r"\n"}.get(found[0], found[0]), pattern, flags=re.DOTALL
    )


def _json(schema: Mapping[str, Any]) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": _JSON_STYLE}, ensure_ascii=False)
