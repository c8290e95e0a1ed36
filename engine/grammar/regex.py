"""How long the shortest text of a regular expression is at most, and which notations mean something else here.

A scan, not a parser: what is wrong with an expression is the grammar library's to say.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from pronk.engine.errors import InvalidParameterError

MOST = 1 << 40
"""Sizes stop growing here."""

_ENDING = re.compile(r"\\.|/|\n", re.DOTALL)
_ESCAPES = {"/": r"\/", "\n": r"\n", "\\\n": r"\n"}
_COUNT = re.compile(r"\{(\d*)(,?)(\d*)\}")
_LITERAL = re.compile(r"[^\W_]{1,64}|(?<=\\)[^\w\s]|[@:/,;#%&=!~<>'-]")
_MOST_LITERALS = 24
_MOST_READ = 10_000
_CHARACTER = 2  # bytes, in JSON, of the shortest of the characters that a class or a dot stands for
_ESCAPED = 6  # of a control character in JSON
_OPEN = re.compile(r"\.|\[\^|\\[DSWPpBb]|\(\?[^:]")
_SPACES = r"\t\n\v\f\r \u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_COMMON = {
    ".": r"[^\n\r\u2028\u2029]",
    r"\s": f"[{_SPACES}]",
    r"\S": r"[^\s\x1c-\x1f\ufeff]",
    r"\D": r"\P{Nd}",
    r"\W": r"[^\p{L}\p{M}\p{N}\p{Pc}]",
}
_ESCAPE = re.compile(r"\\.", re.DOTALL)
# In a class of Rust's syntax these intersect, subtract and so on; in every other they are characters.
_SET_OPERATORS = ("&&", "--", "~~")


def between_slashes(pattern: str) -> str:
    """As Lark writes it: a slash and a line break, which would end it there, escaped."""
    return _ENDING.sub(lambda found: _ESCAPES.get(found[0], found[0]), pattern)


def shortest_at_most(pattern: str) -> int:
    """-> bytes: no text that can still be completed to match needs more."""
    sizes = [0]
    last = 0  # of the item before a repetition
    place = 0
    while place < len(pattern):
        character = pattern[place]
        if character == "(":
            sizes.append(0)
            last = 0
            place += 1
            continue
        if character == ")":
            last = sizes.pop() if len(sizes) > 1 else 0
            sizes[-1] += last
            place += 1
            continue
        count = _COUNT.match(pattern, place) if character == "{" else None
        if count:
            # A group that is entered is completed, so it counts once even where it may be left out.
            sizes[-1] = min(MOST, sizes[-1] + last * (max(1, int(count[1][:12] or 0)) - 1))
            place = count.end()
            continue
        if character not in "?*+|^$":
            last = _ESCAPED if character == "\\" else max(_CHARACTER, len(character.encode()))
            sizes[-1] += last
        place = _end_of_item(pattern, place)
    return min(MOST, sum(sizes))


def literals(pattern: str) -> tuple[str, ...]:
    """-> the longest pieces of plain text in it, in its order: what a search for a match may have to spell out."""
    found = dict.fromkeys(match[0] for match in _LITERAL.finditer(pattern[:_MOST_READ]))
    kept = set(sorted(found, key=len, reverse=True)[:_MOST_LITERALS])
    return tuple(piece for piece in found if piece in kept)


def is_open(pattern: str) -> bool:
    """Whether a text that matches may hold any characters at some place, as far as a scan can tell."""
    anchored = pattern.startswith("^") and pattern.endswith("$")
    return not anchored or bool(_OPEN.search(pattern)) or _has_alternatives_of_its_own(pattern)


def _has_alternatives_of_its_own(pattern: str) -> bool:
    """Of which the anchors at its ends are parts."""
    depth = 0
    for item in _items(pattern):
        depth += (item == "(") - (item == ")")
        if item == "|" and depth == 0:
            return True
    return False


def narrowed(pattern: str) -> str:
    """A pattern of JSON Schema's for the grammar library, so that what it matches is matched by every validator.

    Classes mean a little less or more from one language to the next: `\\s` holds U+0085 or U+FEFF or U+001C, `\\d`
    the digits of other scripts, a dot the line separators. They become what is in all of them.

    Raises InvalidParameterError for operators in classes, which other languages read as characters.
    """
    return "".join(_narrowed_class(item) if item[0] == "[" else _COMMON.get(item, item) for item in _items(pattern))


def _narrowed_class(text: str) -> str:
    for operator in _SET_OPERATORS:
        if operator in text[1:-1]:
            raise InvalidParameterError(
                f"pattern has {operator} in the class {text[:80]}, which other languages read differently; write the "
                "characters out.",
                "structured_outputs",
            )
    return _ESCAPE.sub(lambda found: _COMMON.get(found[0], found[0]), text)


def _items(pattern: str) -> Iterator[str]:
    """Characters, escapes and classes."""
    place = 0
    while place < len(pattern):
        end = _end_of_item(pattern, place)
        yield pattern[place:end]
        place = end


def _end_of_item(pattern: str, place: int) -> int:
    """Past a character, an escape, or a class in brackets."""
    if pattern[place] == "\\":
        return place + 2
    if pattern[place] != "[":
        return place + 1
    place += 1
    if pattern[place : place + 1] == "^":
        place += 1
    first = True
    depth = 1
    while place < len(pattern) and depth:
        character = pattern[place]
        if character == "\\":
            place += 1
        elif character == "[":
            depth += 1
        elif character == "]" and not first:
            depth -= 1
        first = False
        place += 1
    return place
