"""How long the shortest text of a regular expression is at most, and which notations mean something else here.

A scan, not a parser: what is wrong with an expression is the grammar library's to say.
"""

from __future__ import annotations

import re

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
    return not (pattern.startswith("^") and pattern.endswith("$")) or bool(_OPEN.search(pattern))


def require_common_syntax(pattern: str) -> None:
    """Raises InvalidParameterError for what a JSON schema's author means otherwise than the grammar library."""
    place = 0
    while place < len(pattern):
        end = _end_of_item(pattern, place)
        if pattern[place] == "[":
            for operator in _SET_OPERATORS:
                if operator in pattern[place + 1 : end - 1]:
                    raise InvalidParameterError(
                        f"pattern {pattern[:80]!r} has {operator} in a character class, which other syntaxes read "
                        "differently; write the characters out.",
                        "structured_outputs",
                    )
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
