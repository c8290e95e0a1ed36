"""Completions by chance: a model that knows nothing, so that the grammar alone decides; and what they are judged by."""

from __future__ import annotations

import datetime
import decimal
import functools
import json
import math
import random
import re
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import jsonschema
import numpy as np
from numpy.typing import NDArray

from pronk.engine.grammar import Mask, Matcher
from pronk.engine.tokenizer import Vocabulary

_SHORT = 2  # bytes


@dataclass(frozen=True)
class Completion:
    """num_tokens: EOS not counted. ended: by itself, and not because the budget was spent."""

    text: bytes
    num_tokens: int
    ended: bool


def allowed(mask: Mask) -> list[int]:
    """The tokens in a mask."""
    tokens: list[int] = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()
    return tokens


def generate(matcher: Matcher, vocabulary: Vocabulary, budget: int, chance: random.Random) -> Completion:
    """Sample from a copy of the matcher until it is done or the budget is spent.

    Two kinds of model by turns, by chance. One draws half of its tokens from all that are allowed, half from those of a
    byte or two: in a large vocabulary most tokens are words, and nothing would ever end. The other has random weights
    that stay as they are, as a model's do: what it likes it writes again and again.
    """
    matcher = matcher.copy()
    draw = _Stubborn(vocabulary.size, chance) if chance.random() < 0.3 else _Fickle(vocabulary, chance)
    text = b""
    for num_tokens in range(budget):
        if matcher.done:
            return Completion(text, num_tokens, True)
        token = draw(np.flatnonzero(np.unpackbits(matcher.mask(budget - num_tokens).view(np.uint8), bitorder="little")))
        matcher.accept(token)
        if vocabulary.is_special(token):
            return Completion(text, num_tokens, True)
        text += vocabulary.token_bytes(token)
    return Completion(text, budget, matcher.done)


class _Fickle:
    def __init__(self, vocabulary: Vocabulary, chance: random.Random) -> None:
        self._lengths = _lengths(vocabulary.ranks)
        self._chance = chance

    def __call__(self, tokens: NDArray[np.intp]) -> int:
        if self._chance.random() < 0.5:
            short = tokens[self._lengths[np.minimum(tokens, len(self._lengths) - 1)] <= _SHORT]
            tokens = short if len(short) else tokens
        return int(tokens[self._chance.randrange(len(tokens))])


class _Stubborn:
    def __init__(self, size: int, chance: random.Random) -> None:
        self._noise = np.random.default_rng(chance.getrandbits(64))
        self._logits = self._noise.standard_normal(size) * chance.choice((1, 3, 10))

    def __call__(self, tokens: NDArray[np.intp]) -> int:
        return int(tokens[np.argmax(self._logits[tokens] + self._noise.gumbel(size=len(tokens)))])


@functools.lru_cache(4)
def _lengths(ranks: tuple[bytes, ...]) -> NDArray[np.int64]:
    """Of tokens, in bytes. What comes after the last is of special tokens, which end things and count as short."""
    return np.array([*map(len, ranks), 0])


def _is_time(value: object) -> bool:
    if isinstance(value, str):
        moment = datetime.time.fromisoformat(value)
        return moment.tzinfo is not None
    return True


def _is_moment(value: object) -> bool:
    if isinstance(value, str):
        moment = datetime.datetime.fromisoformat(value)
        return "T" in value and moment.tzinfo is not None
    return True


def _is_uri(value: object) -> bool:
    return not isinstance(value, str) or bool(urllib.parse.urlsplit(value).scheme)


FORMATS = jsonschema.FormatChecker()
FORMATS.checks("time", raises=ValueError)(_is_time)
FORMATS.checks("date-time", raises=ValueError)(_is_moment)
FORMATS.checks("uri", raises=ValueError)(_is_uri)


def fault(text: bytes, schema: Any) -> str | None:
    """What is wrong with a text as JSON of the schema; None when nothing is. Independent of the code under test."""
    try:
        value = json.loads(text.decode(), parse_constant=_refuse, parse_float=_finite)
    except ValueError as error:
        return f"not JSON: {error}"
    if any(byte < 0x20 for byte in text) or b"  " in _outside_strings(text):
        return "white space that nobody asked for"
    kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    exact = jsonschema.validators.extend(kind, {"multipleOf": _multiple, "pattern": _pattern})
    for fault in exact(schema, format_checker=FORMATS).iter_errors(value):
        return str(fault.message)
    return None


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is Python's and no JSON")


def _finite(digits: str) -> float:
    if math.isinf(float(digits)):
        raise ValueError(f"{digits[:60]} is more than a double holds")
    return float(digits)


def _multiple(validator: Any, divisor: Any, value: Any, schema: Any) -> Iterator[jsonschema.ValidationError]:
    """Decimal: the package divides floats, by which 0.21 is no multiple of 0.01."""
    if validator.is_type(value, "number"):
        with decimal.localcontext(prec=400):
            if decimal.Decimal(str(value)) % decimal.Decimal(str(divisor)):
                yield jsonschema.ValidationError(f"{value} is not a multiple of {divisor}")


# What `\s` means in ECMAScript, which JSON Schema goes by. Python's own has U+001C to U+001F as well.
_SPACES = r"\t\n\v\f\r \u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ufeff"


def _pattern(validator: Any, pattern: str, value: Any, schema: Any) -> Iterator[jsonschema.ValidationError]:
    if validator.is_type(value, "string"):
        pattern = pattern.replace(r"\S", f"[^{_SPACES}]").replace(r"\s", f"[{_SPACES}]")
        if not re.search(pattern, value):
            yield jsonschema.ValidationError(f"{value!r} does not match {pattern!r}")


def _outside_strings(text: bytes) -> bytes:
    parts = text.replace(rb"\\", b"").replace(rb"\"", b"").split(b'"')
    return b'"'.join(parts[::2])
