"""Literals of JSON and of Python, read one character at a time.

Each reader is a generator in the manner of a recursive descent: it is given the character at which it begins, receives
one more at each `yield ONE` ("" is the end of the text), and returns the first character that is not its own. At a
`yield MANY` it takes any number of PLAIN ones at once, too. It raises MismatchError at the first
character with which the text cannot be such a literal. What it has read it appends to `out`
as JSON: that of JSON as it was written, that of Python converted.

Nothing is evaluated. Nesting is bounded, so that no text can exhaust the stack.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Generator
from typing import Protocol, TypeAlias, TypeVar

T = TypeVar("T")
Steps: TypeAlias = Generator[bool, str, T]

ONE = False
MANY = True
PLAIN = re.compile(r"""[^"'\\\x00-\x1f]+""")
"""Inside a string, one after the other, they stand for themselves."""

MAX_DEPTH = 64
SPACE = " \t\n\r"
JSON_VALUE_START = '"{[-0123456789tfn'
_DIGITS = "0123456789"
_HEX_DIGITS = "0123456789abcdefABCDEF"
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_JSON_WORDS = ("true", "false", "null")
_PYTHON_WORDS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_PYTHON_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "v": "\v", "a": "\a", "0": "\0", "\n": ""}
_PYTHON_CODE_LENGTHS = {"x": 2, "u": 4, "U": 8}


class MismatchError(Exception):
    """The text is not what it looked like."""


class Out(Protocol):
    """Where a reader puts what it has read; a list of strings will do."""

    def append(self, piece: str, /) -> None: ...


def whole(reader: Steps[object], text: str) -> None:
    """Read all of `text` with a reader that has not begun. Raises MismatchError when there is less in it, or more."""
    try:
        next(reader)
        for char in text:
            reader.send(char)
        reader.send("")
    except StopIteration as end:
        if end.value == "":
            return
    raise MismatchError


def space(char: str) -> Steps[str]:
    """Whitespace, which may be none."""
    while char and char in SPACE:
        char = yield ONE
    return char


def one(char: str, wanted: str) -> Steps[str]:
    """One of the characters of `wanted`."""
    if not char or char not in wanted:
        raise MismatchError
    return (yield ONE)


def word(char: str, words: tuple[str, ...]) -> Steps[tuple[str, str]]:
    """-> the first of `words` that is read to its end, and the next character."""
    seen = ""
    while True:
        seen += char
        if not char or not any(candidate.startswith(seen) for candidate in words):
            raise MismatchError
        char = yield ONE
        if seen in words:
            return seen, char


def json_value(char: str, out: Out, depth: int = 0) -> Steps[str]:
    """Any value of RFC 8259."""
    if char == '"':
        return (yield from json_string(char, out))
    if char == "{":
        return (yield from json_object(char, out, depth))
    if char == "[":
        return (yield from _json_array(char, out, depth))
    if char and char in "tfn":
        text, char = yield from word(char, _JSON_WORDS)
        out.append(text)
        return char
    return (yield from _json_number(char, out))


def json_object(char: str, out: Out, depth: int = 0, begun: Callable[[], None] | None = None) -> Steps[str]:
    """An object. `out` gets each piece before the next character is asked for; `begun` is called at each of its own
    values, before the first character of the value is put out."""
    char = yield from _open(char, "{", out, depth)
    if char != "}":
        while True:
            char = yield from json_string(char, out)
            char = yield from _spaced(char, ":", out)
            if not char or char not in JSON_VALUE_START:
                raise MismatchError
            if begun is not None:
                begun()
            char = yield from json_value(char, out, depth + 1)
            char = yield from _kept_space(char, out)
            if char != ",":
                break
            char = yield from _spaced(char, ",", out)
    if char != "}":
        raise MismatchError
    out.append(char)
    return (yield ONE)


def _json_array(char: str, out: Out, depth: int) -> Steps[str]:
    char = yield from _open(char, "[", out, depth)
    if char != "]":
        while True:
            char = yield from json_value(char, out, depth + 1)
            char = yield from _kept_space(char, out)
            if char != ",":
                break
            char = yield from _spaced(char, ",", out)
    if char != "]":
        raise MismatchError
    out.append(char)
    return (yield ONE)


def _open(char: str, bracket: str, out: Out, depth: int) -> Steps[str]:
    if char != bracket or depth >= MAX_DEPTH:
        raise MismatchError
    out.append(char)
    return (yield from _kept_space((yield ONE), out))


def _spaced(char: str, wanted: str, out: Out) -> Steps[str]:
    char = yield from _kept_space(char, out)
    if char != wanted:
        raise MismatchError
    out.append(char)
    return (yield from _kept_space((yield ONE), out))


def _kept_space(char: str, out: Out) -> Steps[str]:
    while char and char in SPACE:
        out.append(char)
        char = yield ONE
    return char


def json_string(char: str, out: Out) -> Steps[str]:
    """A string. A raw control character, which JSON forbids and models write, is escaped."""
    if char != '"':
        raise MismatchError
    out.append(char)
    char = yield MANY
    while char != '"':
        if not char:
            raise MismatchError
        if char == "\\":
            out.append(char)
            char = yield ONE
            if char == "u":
                out.append(char)
                for _ in range(4):
                    char = yield ONE
                    if not char or char not in _HEX_DIGITS:
                        raise MismatchError
                    out.append(char)
            elif not char or char not in '"\\/bfnrt':
                raise MismatchError
            else:
                out.append(char)
        else:
            out.append(char if char >= " " else json.dumps(char)[1:-1])
        char = yield MANY
    out.append(char)
    return (yield ONE)


def _json_number(char: str, out: Out) -> Steps[str]:
    if char == "-":
        out.append(char)
        char = yield ONE
    if char == "0":
        out.append(char)
        char = yield ONE
    else:
        char = yield from _digits(char, out)
    if char == ".":
        out.append(char)
        char = yield from _digits((yield ONE), out)
    if char and char in "eE":
        out.append(char)
        char = yield ONE
        if char and char in "+-":
            out.append(char)
            char = yield ONE
        char = yield from _digits(char, out)
    return char


def _digits(char: str, out: Out) -> Steps[str]:
    if not char or char not in _DIGITS:
        raise MismatchError
    while char and char in _DIGITS:
        out.append(char)
        char = yield ONE
    return char


def python_arguments(char: str, out: Out) -> Steps[str]:
    """`name=value, ...)`: keyword arguments up to their closing parenthesis. -> out: a JSON object."""
    names: set[str] = set()
    char = yield from space(char)
    out.append("{")
    while char != ")":
        name, char = yield from _identifier(char)
        if name in names:
            raise MismatchError
        out.append(f'{", " if names else ""}"{name}": ')
        names.add(name)
        char = yield from space(char)
        char = yield from one(char, "=")
        char = yield from space(char)
        char = yield from _python_value(char, out, 1)
        char = yield from _next_item(char, ")")
    out.append("}")
    return (yield ONE)


def _identifier(char: str) -> Steps[tuple[str, str]]:
    name = ""
    while char and char.isascii() and (char == "_" or char.isalpha() or (name and char.isdigit())):
        name += char
        char = yield ONE
    if not name:
        raise MismatchError
    return name, char


def _next_item(char: str, close: str) -> Steps[str]:
    """A comma, perhaps the last one, or what closes the list."""
    char = yield from space(char)
    if char == close:
        return char
    char = yield from one(char, ",")
    return (yield from space(char))


def _python_value(char: str, out: Out, depth: int) -> Steps[str]:
    if not char or (char in "[({" and depth >= MAX_DEPTH):
        raise MismatchError
    if char in "'\"":
        return (yield from _python_string(char, out))
    if char == "[":
        return (yield from _python_list(char, out, depth))
    if char == "(":
        return (yield from _python_tuple(char, out, depth))
    if char == "{":
        return (yield from _python_dict(char, out, depth))
    if char in "TFNtfn":
        text, char = yield from word(char, tuple(_PYTHON_WORDS))
        out.append(_PYTHON_WORDS[text])
        return char
    return (yield from _python_number(char, out))


def _python_list(char: str, out: Out, depth: int) -> Steps[str]:
    char = yield from space((yield ONE))
    out.append("[")
    first = True
    while char != "]":
        if not first:
            out.append(", ")
        first = False
        char = yield from _python_value(char, out, depth + 1)
        char = yield from _next_item(char, "]")
    out.append("]")
    return (yield ONE)


def _python_tuple(char: str, out: Out, depth: int) -> Steps[str]:
    """A tuple is an array; one value in parentheses, without a comma, is that value."""
    char = yield from space((yield ONE))
    items: list[str] = []
    comma = False
    while char != ")":
        item: list[str] = []
        char = yield from _python_value(char, item, depth + 1)
        char = yield from space(char)
        items.append("".join(item))
        if char != ")":
            comma = True
            char = yield from one(char, ",")
            char = yield from space(char)
    out.append(items[0] if len(items) == 1 and not comma else f"[{', '.join(items)}]")
    return (yield ONE)


def _python_dict(char: str, out: Out, depth: int) -> Steps[str]:
    char = yield from space((yield ONE))
    out.append("{")
    first = True
    while char != "}":
        if not first:
            out.append(", ")
        first = False
        if not char or char not in "'\"":
            raise MismatchError
        char = yield from _python_string(char, out)
        char = yield from space(char)
        char = yield from one(char, ":")
        out.append(": ")
        char = yield from space(char)
        char = yield from _python_value(char, out, depth + 1)
        char = yield from _next_item(char, "}")
    out.append("}")
    return (yield ONE)


def _python_string(char: str, out: Out) -> Steps[str]:
    """In one pair of quotes, without a prefix. A line break inside, which Python forbids, is taken as it is."""
    quote = char
    text: list[str] = []
    char = yield MANY
    while char != quote:
        if not char:
            raise MismatchError
        if char == "\\":
            text.append((yield from _python_escape((yield ONE))))
        else:
            text.append(char)
        char = yield MANY
    out.append(_as_json("".join(text)))
    return (yield ONE)


def _python_escape(char: str) -> Steps[str]:
    """What follows a backslash, its last character included: unlike other readers it does not go on to the next."""
    if not char:
        raise MismatchError
    if char not in _PYTHON_CODE_LENGTHS:
        # Python leaves an escape that it does not know as it is written.
        return _PYTHON_ESCAPES.get(char, char if char in "'\"\\" else "\\" + char)
    code = ""
    for _ in range(_PYTHON_CODE_LENGTHS[char]):
        digit = yield ONE
        if not digit or digit not in _HEX_DIGITS:
            raise MismatchError
        code += digit
    if int(code, 16) > 0x10FFFF:
        raise MismatchError
    return chr(int(code, 16))


def _as_json(text: str) -> str:
    written = json.dumps(text, ensure_ascii=False)
    # A lone surrogate has no UTF-8: it is written as an escape.
    return written if written.isascii() or not re.search("[\ud800-\udfff]", written) else json.dumps(text)


def _python_number(char: str, out: Out) -> Steps[str]:
    text = ""
    while char and char in "+-.eE" + _DIGITS:
        text += char
        char = yield ONE
    if not _NUMBER.fullmatch(text):
        try:
            value = float(text)  # .5 and 5. are numbers in Python only
        except ValueError:
            raise MismatchError from None
        if not math.isfinite(value):
            raise MismatchError
        text = repr(value)
    out.append(text)
    return char
