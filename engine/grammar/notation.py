"""A request's Grammar in the grammar library's notation, with what is known of the length of its texts.

Knows each kind's syntax; no tokens.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

import llguidance
from llguidance.gbnf_to_lark import gbnf_to_lark

from pronk.engine.errors import InvalidParameterError
from pronk.engine.grammar import regex
from pronk.engine.grammar.schema import PARAM, read_schema
from pronk.engine.request import Grammar

MAX_BYTES = 1 << 16
"""Of a regular expression, of choices, or of a grammar without the JSON schemas in it."""
MAX_BYTES_WITH_SCHEMAS = 1 << 19
"""Of a grammar; each JSON schema in it has a limit of its own."""
MAX_CHOICES = 4_096

# At most one space, and only after a comma or a colon, as models write it.
_JSON_STYLE = {"item_separator": ", ?", "key_separator": ": ?", "whitespace_flexible": False}

_OF_FORMATS = ("@", ":", "://", "::", ".", "-")  # pieces of text that formats ask for

_EMBEDDED_SCHEMA = re.compile(r"%json\s*(?=\{)")
# Options that would make the library take tokens back, or choose other sampling parameters.
_REFUSED_OPTION = re.compile(r"^[ \t]*[?!]?[a-z_][\w-]*[ \t]*\[[^\]\n]*\b(stop|max_tokens|temperature)\b", re.M)
_TOKEN_NUMBERS = re.compile(r"<\[[\^\d*,\s-]+\]>")


@dataclass(frozen=True)
class Notation:
    """text: for the library.

    jump: by how many bytes the shortest completion grows at most when one token is taken.
    hints: pieces of text that a pattern may ask for somewhere.
    has_json: the text is JSON, or parts of it are.
    string_jump: the same as jump, of a token of characters in a string that is a JSON value and could be any string;
        None where it does not show in the text what is such a string.
    """

    text: str
    jump: int
    hints: tuple[str, ...] = ()
    has_json: bool = False
    string_jump: int | None = None


def translate(grammar: Grammar) -> Notation:
    """Raises InvalidParameterError for what is not enforced, or wrong in a way that shows at once."""
    require_text(grammar)
    most = MAX_BYTES_WITH_SCHEMAS if grammar.kind == "lark" else MAX_BYTES
    if grammar.kind != "json":
        _require_size("grammar" if grammar.kind == "lark" else grammar.kind, grammar.text, most)
    match grammar.kind:
        case "json":
            return _of_schema(grammar.text)
        case "regex":
            text = f"start: /{regex.between_slashes(grammar.text)}/"
            return Notation(_library(text), regex.shortest_at_most(grammar.text), regex.literals(grammar.text))
        case "choice":
            return _of_choices(grammar.text)
        case "lark":
            return _of_lark(grammar.text)
        case "gbnf":
            return _of_gbnf(grammar.text)


def _require_size(what: str, text: str, most: int) -> None:
    if len(text.encode()) > most:
        raise _refusal(f"The {what} has more than {most} bytes; send a smaller one.")


def require_text(grammar: Grammar) -> None:
    """Raises InvalidParameterError for a Python string that is no Unicode text."""
    try:
        grammar.text.encode()
    except UnicodeEncodeError:
        raise _refusal(f"The {grammar.kind} holds a lone surrogate, which is no text.") from None


def _refusal(message: str) -> InvalidParameterError:
    return InvalidParameterError(message, PARAM)


def _library(lark: str) -> str:
    """The library would let only one spelling in tokens of a text that is given; which one it is, is the model's."""
    return llguidance.LLMatcher.grammar_from_lark(lark + '\n%llguidance {"no_forcing": true}\n')


def _of_schema(text: str) -> Notation:
    schema = read_schema(text)
    hints = (*_OF_FORMATS, *regex.literals("|".join(schema.patterns)))
    return Notation(
        _library("start: %json " + _styled(schema.text)),
        schema.jump,
        hints,
        has_json=True,
        string_jump=schema.string_jump,
    )


def _of_choices(text: str) -> Notation:
    try:
        choices = json.loads(text)
    except (ValueError, RecursionError):
        choices = None
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) for choice in choices):
        raise _refusal("choice must be a JSON list of one or more strings.")
    if len(choices) > MAX_CHOICES:
        raise _refusal(f"choice has more than {MAX_CHOICES} strings.")
    try:
        longest = max(len(choice.encode()) for choice in choices)
    except UnicodeEncodeError:
        raise _refusal("choice holds a lone surrogate, which is no text.") from None
    # One terminal: as alternatives of a rule, more than 2000 would be too many for the library at once.
    lark = "start: CHOICE\nCHOICE: " + " | ".join(_literal(choice) for choice in dict.fromkeys(choices))
    return Notation(_library(lark), longest)


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _of_lark(text: str) -> Notation:
    parts: list[str] = []
    jump = 0
    place = 0
    while match := _EMBEDDED_SCHEMA.search(text, place):
        end = _end_of_object(text, match.end())
        schema = read_schema(text[match.end() : end], options_allowed=True)
        parts += [text[place : match.start()], "%json ", _styled(schema.text)]
        jump += schema.jump
        place = end
    parts.append(text[place:])
    rules = "".join(parts[::3])
    _require_size("grammar, without its JSON schemas,", rules, MAX_BYTES)
    if option := _REFUSED_OPTION.search(rules):
        raise _refusal(f"The option {option[1]} of a rule is not supported.")
    if _TOKEN_NUMBERS.search(rules):
        raise _refusal("Tokens by number are not supported; write a special token by its name.")
    translated = _library("".join(parts))
    hints = (*_OF_FORMATS, *regex.literals(rules))
    return Notation(translated, jump + regex.shortest_at_most(rules), hints, has_json=len(parts) > 1)


def _end_of_object(text: str, start: int) -> int:
    try:
        return json.JSONDecoder().raw_decode(text, start)[1]
    except (ValueError, RecursionError) as error:
        raise _refusal(f"A schema after %json is not JSON: {str(error)[:200]}.") from error


def _styled(schema: str) -> str:
    return json.dumps({"x-guidance": _JSON_STYLE, **json.loads(schema)}, ensure_ascii=False)


def _of_gbnf(text: str) -> Notation:
    try:
        lark = gbnf_to_lark(text)
    # Whatever the library's converter trips over, it is the text that it cannot read.
    except Exception as error:
        raise _refusal(f"The grammar is not GBNF: {str(error)[:200]}.") from error
    return _of_lark(lark)
