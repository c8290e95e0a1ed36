"""The forms in which Llama writes tool calls, read one character at a time.

What counts as a call, f being a function that may be called:

    {"name": "f", "parameters": {...}}     also with "arguments"; with "function" for "name"; with "type": "function";
                                           the members in any order; all but "type" inside "function"; arguments
                                           written as text; several in a row, or in an array
    [f(a=1, b="x"), g()]                   keyword arguments, their values Python literals
    <function=f>{...}</function>           the closing tag may be missing

each with or without <|python_tag|> before it. Whitespace, ";" and "," stand between calls, and a token that ends the
turn may follow one.

Knows what the text is, and nothing of what becomes of it: that is the Sink's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import NoReturn, Protocol

from pronk.server.chat.tool_literals import (
    ONE,
    MismatchError,
    Steps,
    json_object,
    json_string,
    one,
    python_arguments,
    space,
    whole,
    word,
)

PYTHON_TAG = "<|python_tag|>"
OPENERS = "{[<"
"""The characters with which a call can begin, any of which a new reader takes."""
TAUGHT_OPENERS = "{"
"""The same where only the taught form counts."""

_FUNCTION = "<function="
_FUNCTION_END = "</function>"
_ENDS = (_FUNCTION_END, "<|eom_id|>", "<|eot_id|>")
_ARGUMENTS = ("parameters", "arguments")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_KEYS = tuple(f'"{key}"' for key in ("name", "function", "type", *_ARGUMENTS))

_TAUGHT_FIRST = ('"name"',)
_TAUGHT_SECOND = ('"parameters"',)


class Sink(Protocol):
    """What is told of the calls in a text."""

    def begin(self, name: str, arguments: str, /) -> None:
        """A call is certain; so far its arguments are these."""

    def more(self, arguments: str, /) -> None:
        """The same call's next arguments."""

    def end(self) -> None:
        """The call is over. What is read from here on only separates it from the next, until `attempt`."""

    def attempt(self) -> None:
        """At the current character another call may begin."""

    def spent(self, *, current: bool) -> None:
        """All that was read belongs to a call's form, whatever comes; current: with the current character."""


def read_calls(names: Collection[str], sink: Sink, *, taught_only: bool = False) -> Steps[NoReturn]:
    """Any number of calls; taught_only: of the form {"name": "f", "parameters": {...}}, in this order, and no other.

    Raises MismatchError at the first character that belongs to none: what was read and was not spent is no call.
    Between two calls, and at the end of the text, that is what separates them.
    """
    return _Reader(tuple(names), sink, taught_only).calls()


class _Arguments:
    """Takes a call's arguments, and keeps them until the call is certain: its name known, a first value begun."""

    def __init__(self, sink: Sink) -> None:
        self.name: str | None = None
        self.complete = False
        self._sink = sink
        self._kept: list[str] = []
        self._begun = False
        self._certain = False

    def append(self, piece: str) -> None:
        if not self._certain:
            self._kept.append(piece)
            return
        self._sink.more(piece)
        self._sink.spent(current=True)

    def begin(self) -> None:
        """A first value begins, or the arguments are over."""
        self._begun = True
        self._decide()

    def call(self, name: str) -> None:
        """They are this function's."""
        self.name = name
        self._decide()

    def _decide(self) -> None:
        if self._begun and self.name is not None and not self._certain:
            self._certain = True
            self._sink.begin(self.name, "".join(self._kept))
            self._sink.spent(current=False)


class _Reader:
    def __init__(self, names: tuple[str, ...], sink: Sink, taught_only: bool) -> None:
        self._json_names = tuple(f'"{name}"' for name in names)
        self._tag_names = tuple(f"{name}>" for name in names)
        self._python_names = tuple(f"{name}(" for name in names)
        self._sink = sink
        self._taught_only = taught_only
        self._openers = TAUGHT_OPENERS if taught_only else OPENERS
        self._tags = () if taught_only else (PYTHON_TAG, _FUNCTION)

    def calls(self) -> Steps[NoReturn]:
        char = yield ONE
        after_call = False
        while True:
            char = yield from space(char)
            if after_call and char and char in ";,":
                char = yield ONE
                continue
            if not char or char not in self._openers + ("<" if after_call else ""):
                raise MismatchError
            self._sink.attempt()
            if char == "{":
                char = yield from self._object(char)
            elif char == "[":
                char = yield from self._list()
            else:
                tag, char = yield from word(char, self._tags + (_ENDS if after_call else ()))
                if tag == PYTHON_TAG:
                    continue
                if tag == _FUNCTION:
                    char = yield from self._function(char)
            self._end()
            after_call = True

    def _end(self) -> None:
        self._sink.spent(current=False)
        self._sink.end()

    def _object(self, char: str) -> Steps[str]:
        """{"name": ..., "parameters": {...}}"""
        arguments = _Arguments(self._sink)
        char = yield from self._members(arguments, inner=False)
        if arguments.name is None or not arguments.complete:
            raise MismatchError
        return char

    def _members(self, arguments: _Arguments, *, inner: bool) -> Steps[str]:
        """All members of an object, its brackets included; inner: of the one that "function" names."""
        char = yield from space((yield ONE))
        while True:
            taught = _TAUGHT_FIRST if arguments.name is None else _TAUGHT_SECOND
            quoted, char = yield from word(char, taught if self._taught_only else _KEYS)
            key = quoted.strip('"')
            char = yield from space(char)
            char = yield from one(char, ":")
            char = yield from space(char)
            if key in _ARGUMENTS:
                char = yield from self._arguments(char, arguments)
            elif key == "type":
                _, char = yield from word(char, ('"function"',))
            elif key == "function" and char == "{" and not inner:
                char = yield from self._members(arguments, inner=True)
            else:
                char = yield from self._name(char, arguments)
            char = yield from space(char)
            if char != "," or (self._taught_only and arguments.complete):
                break
            char = yield from space((yield ONE))
        return (yield from one(char, "}"))

    def _name(self, char: str, arguments: _Arguments) -> Steps[str]:
        if arguments.name is not None:
            raise MismatchError
        quoted, char = yield from word(char, self._json_names)
        arguments.call(quoted[1:-1])
        return char

    def _arguments(self, char: str, arguments: _Arguments) -> Steps[str]:
        if arguments.complete:
            raise MismatchError
        if char == '"' and not self._taught_only:
            char = yield from self._arguments_as_text(char, arguments)
        else:
            char = yield from json_object(char, arguments, begun=arguments.begin)
        arguments.complete = True
        arguments.begin()
        return char

    def _arguments_as_text(self, char: str, arguments: _Arguments) -> Steps[str]:
        """An object inside a string, as OpenAI's API has it."""
        written: list[str] = []
        char = yield from json_string(char, written)
        text = json.loads("".join(written))
        if _LONE_SURROGATE.search(text):
            raise MismatchError
        read: list[str] = []
        whole(json_object(text[:1], read), text[1:])
        arguments.append("".join(read))
        return char

    def _function(self, char: str) -> Steps[str]:
        """<function=f>{...}, after the first "="."""
        name, char = yield from word(char, self._tag_names)
        arguments = _Arguments(self._sink)
        arguments.call(name[:-1])
        char = yield from space(char)
        char = yield from json_object(char, arguments, begun=arguments.begin)
        arguments.begin()
        return char

    def _list(self) -> Steps[str]:
        char = yield from space((yield ONE))
        objects = char == "{"
        while True:
            char = yield from (self._object(char) if objects else self._python_call(char))
            self._end()
            char = yield from space(char)
            if char == "]":
                return (yield ONE)
            char = yield from one(char, ",")
            char = yield from space(char)
            if not char or (objects and char != "{"):
                raise MismatchError
            self._sink.attempt()

    def _python_call(self, char: str) -> Steps[str]:
        """f(a=1), certain only when what comes next is what can follow it."""
        name, char = yield from word(char, self._python_names)
        arguments: list[str] = []
        char = yield from python_arguments(char, arguments)
        char = yield from space(char)
        if not char or char not in ",]":
            raise MismatchError
        self._sink.begin(name[:-1], "".join(arguments))
        return char
