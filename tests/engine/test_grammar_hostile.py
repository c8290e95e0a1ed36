"""Grammars that are made to hurt: each is refused, in words that a client can use, or it is enforced like any other."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pronk.engine.errors import InvalidParameterError
from pronk.engine.grammar import GrammarCompiler
from pronk.engine.request import Grammar
from pronk.engine.tokenizer import load_vocabulary

from .schemas.generation import fault, generate

CRIA = load_vocabulary(Path(__file__).parent.parent.parent / "engine" / "cria")


@pytest.fixture(scope="module")
def compiler() -> Iterator[GrammarCompiler]:
    """With more time than a server gives: on a machine that is busy, what is refused for another reason comes near."""
    compiler = GrammarCompiler(CRIA, [CRIA.special_tokens["<|eot_id|>"]], seconds=3)
    yield compiler
    compiler.close()


def closed(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def nested(depth: int, around: Callable[[Any], Any], inside: Any) -> Any:
    for _ in range(depth):
        inside = around(inside)
    return inside


def doubling(keyword: str) -> dict[str, Any]:
    """Forty schemas, each of which holds the next one twice."""
    schemas: dict[str, Any] = {
        f"s{number}": {keyword: [{"$ref": f"#/$defs/s{number + 1}"}] * 2} for number in range(40)
    }
    return {"$ref": "#/$defs/s0", "$defs": {**schemas, "s40": {"type": "integer"}}}


def whole(**bounds: float) -> dict[str, Any]:
    return {"type": "integer", **bounds}


OPTIONAL = {f"p{number}": whole() for number in range(401)}
PAIRS = {f"s{number}": closed({name: {"$ref": f"#/$defs/s{number + 1}"} for name in "ab"}) for number in range(40)} | {
    "s40": {"type": "null"}
}
TO_A = {"$ref": "#/$defs/a"}
TO_B = {"$ref": "#/$defs/b"}

NO_TEXT = "No text was found"
REFUSED_SCHEMAS: dict[str, tuple[Any, str]] = {
    "deep": (nested(300, lambda part: closed({"a": part}), {"type": "null"}), "more than 100 levels deep"),
    "itself": ({"$ref": "#"}, NO_TEXT),
    "without an end": ({**TO_A, "$defs": {"a": closed({"b": TO_B}), "b": closed({"a": TO_A})}}, NO_TEXT),
    "references alone": ({**TO_A, "$defs": {"a": TO_B, "b": TO_A}}, NO_TEXT),
    "choices alone": ({**TO_A, "$defs": {"a": {"anyOf": [TO_A, TO_B]}, "b": {"anyOf": [TO_A]}}}, NO_TEXT),
    "a tree of 2^40": ({"$ref": "#/$defs/s0", "$defs": PAIRS}, NO_TEXT),
    "product": (
        {"allOf": [{"anyOf": [closed({f"p{row}": whole(), "k": {"const": n}}) for n in range(9)]} for row in range(9)]},
        "too large",
    ),
    "alternatives": ({"anyOf": [{"const": f"value {number}"} for number in range(10_000)]}, "#/anyOf has more than"),
    "values": ({"enum": [f"value {number}" for number in range(10_000)]}, "#/enum has more than"),
    "optional": ({"type": "object", "properties": OPTIONAL}, "#/properties has more than"),
    "schemas": ({"type": "array", "prefixItems": [{} for _ in range(25_000)]}, "more than 20000 schemas"),
    "a megabyte": ({"type": "object", "description": "x" * 1_000_000}, "more than 262144 bytes"),
    "keywords": ({f"keyword{number}": 1 for number in range(5000)}, "different keywords"),
    "items": ({"type": "array", "minItems": 10**9}, "#/minItems is more than"),
    "nested items": (nested(5, lambda part: {"type": "array", "items": part, "minItems": 100}, whole()), NO_TEXT),
    "characters": ({"type": "string", "minLength": 10**9}, "#/minLength is more than"),
    "negative": ({"type": "string", "minLength": -5}, "minLength"),
    "no integer": ({"type": "array", "minItems": 1.5}, "minItems"),
    "fine multiples": ({"type": "number", "multipleOf": 1e-300}, "#/multipleOf"),
    "prime multiples": (whole(allOf=[{"multipleOf": prime} for prime in (7, 11, 13, 17, 19, 23, 29, 31)]), "lexemes"),
    "minimum": (whole(minimum=5, maximum=3), "minimum (5) is greater than maximum (3)"),
    "minItems": ({"type": "array", "minItems": 5, "maxItems": 3}, "minItems (5) is greater than maxItems (3)"),
    "minLength": ({"type": "string", "minLength": 5, "maxLength": 3}, "minLength (5) is greater than maxLength (3)"),
    "no values": ({"enum": []}, "empty"),
    "no common value": ({"allOf": [{"enum": ["a"]}, {"enum": ["b"]}]}, "Unsatisfiable"),
    "an impossible property": (closed({"a": whole(minimum=9, maximum=2)}), "'a' is unsatisfiable"),
    "repeats": ({"type": "string", "pattern": "^a{1000000}$"}, "too many expressions"),
    "optional repeats": ({"type": "string", "pattern": "^(a?){500}a{500}$"}, "too many expressions"),
    "a huge count": ({"type": "string", "pattern": "^a{99999999999999999999}$"}, "decimal literal invalid"),
    "a group left open": ({"type": "string", "pattern": "((((("}, "unclosed group"),
    "parentheses": ({"type": "string", "pattern": "^" + "(" * 5000 + "a" + ")" * 5000 + "$"}, "regex parse error"),
    "looking back": ({"type": "string", "pattern": r"^(a)\1$"}, "backreferences are not supported"),
    "patterns at once": ({"type": "string", "allOf": [{"pattern": f"x{number}"} for number in range(40)]}, "too long"),
}


@pytest.mark.parametrize("name", REFUSED_SCHEMAS)
def test_a_hostile_schema_is_refused(compiler: GrammarCompiler, name: str) -> None:
    schema, reason = REFUSED_SCHEMAS[name]
    with pytest.raises(InvalidParameterError) as caught:
        compiler.check(Grammar("json", json.dumps(schema)))
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


ENFORCED_SCHEMAS: dict[str, Any] = {
    "deep": nested(45, lambda part: closed({"a": part}), {"type": "null"}),
    "deep choices": nested(45, lambda part: {"anyOf": [part, whole()]}, {"type": "null"}),
    "alternatives": {"anyOf": [{"const": f"value {number}"} for number in range(1000)]},
    "alike alternatives": {"anyOf": [closed({"a": whole(), "b": {"const": number}}) for number in range(100)]},
    "endless choices": {"anyOf": [{"type": "array", "items": {"type": "array", "minItems": n}} for n in range(100)]},
    "optional": {"type": "object", "properties": dict(list(OPTIONAL.items())[:200]), "additionalProperties": False},
    "long": {"type": "string", "maxLength": 10**9},
    "many": {"type": "array", "items": whole(), "maxItems": 10**9},
    "an impossible option": {"type": "object", "properties": {"a": whole(minimum=9, maximum=2)}},
    "nested repeats": {"type": "string", "pattern": "^(a+)+$"},
    "nested counts": {"type": "string", "pattern": "^((a{1,100}){1,100}){1,100}$"},
    "the same twice": {"type": "string", "pattern": "^(a|a)*b$"},
    "a window": {"type": "string", "pattern": "^.*a.{12}$"},
    "a distant end": {"type": "string", "pattern": "^.*a.{40}$"},
}


@pytest.mark.parametrize("name", ENFORCED_SCHEMAS)
def test_a_schema_that_only_looks_hostile_is_enforced(compiler: GrammarCompiler, name: str) -> None:
    schema = ENFORCED_SCHEMAS[name]
    grammar = Grammar("json", json.dumps(schema))
    compiler.check(grammar)
    assert compiler.is_checked(grammar)
    matcher = compiler.compile(grammar)
    assert matcher.shortest is not None
    for seed in range(3):
        written = generate(matcher, CRIA, max(1, matcher.shortest + 4 * seed), random.Random(seed))
        assert fault(written.text, schema) is None


@pytest.mark.parametrize("keyword", ["allOf", "anyOf"])
def test_what_is_the_same_2_to_the_40_times_is_enforced(compiler: GrammarCompiler, keyword: str) -> None:
    grammar = Grammar("json", json.dumps(doubling(keyword)))
    compiler.check(grammar)
    written = generate(compiler.compile(grammar), CRIA, 9, random.Random(1))
    assert isinstance(json.loads(written.text), int)


OPTIONS = " ".join(['"a"?'] * 2000)
REFUSED_GRAMMARS: dict[str, tuple[str, str]] = {
    "itself": ("start: start", NO_TEXT),
    "each other": ("start: a\na: b\nb: a", NO_TEXT),
    "without an end": ('start: "a" start', "Too many items"),
    "doubling": ("start: r0\n" + "\n".join(f"r{n}: r{n + 1} r{n + 1}" for n in range(60)) + '\nr60: "a"', "Too many"),
    "alternatives": ("start: " + " | ".join(f'"text {number}"' for number in range(4000)), "4001 items"),
    "all optional": (f"start: {OPTIONS}", "items"),
    "repeats": ('start: "a"{1000000000}', "Too many items"),
    "no text in common": ("start: A\nA: /a+/ & /b+/", NO_TEXT),
    "parentheses": ("start: " + "(" * 3000 + '"a"' + ")" * 3000, "too deeply nested"),
    "nothing": ("", "no start rule"),
    "a file": ("start: x\n%import .secret.x", "Unknown common regex"),
    "another grammar": ('start: "a" @x', "unknown grammar"),
    "no such token": ("start: <|nope|>", "unknown special token"),
    "long": ("start: " + '"a" ' * 20_000, "more than 65536 bytes"),
    "a schema": ('start: %json {"not": {}}', "'not' is not supported"),
    "taking tokens back": ("start: x\nx[max_tokens=3]: /.*/", "max_tokens of a rule is not supported"),
}


@pytest.mark.parametrize("name", REFUSED_GRAMMARS)
def test_a_hostile_grammar_is_refused(compiler: GrammarCompiler, name: str) -> None:
    text, reason = REFUSED_GRAMMARS[name]
    with pytest.raises(InvalidParameterError, match=reason):
        compiler.check(Grammar("lark", text))


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ('start: start "a" | "b"', "ba*"),
        ('start: s\ns: s s | "a" | ', "a*"),
        ('start: e\ne: e "+" e | "(" e ")" | /[0-9]+/', r"[(]*[0-9]+[)]*(\+[(]*[0-9]+[)]*)*"),
        ('start: ("a"{1,1000}){1,1000}', "a+"),
        ('start: (((("a"*)*)*)*)*', "a*"),
        ('start: ("a"?)*', "a*"),
        ("start: A\nA: /[ab]+/ & ~/.*a.{15}/", "[ab]+"),
        ("start: <|eot_id|>", ""),
    ],
)
def test_an_ambiguous_grammar_is_enforced(compiler: GrammarCompiler, text: str, pattern: str) -> None:
    grammar = Grammar("lark", text)
    compiler.check(grammar)
    matcher = compiler.compile(grammar)
    assert matcher.shortest is not None
    for seed in range(4):
        written = generate(matcher, CRIA, max(1, matcher.shortest + 2 * seed), random.Random(seed))
        assert re.fullmatch(pattern, written.text.decode())


@pytest.mark.parametrize("kind", ["regex", "gbnf", "choice"])
def test_other_kinds_have_a_size_too(compiler: GrammarCompiler, kind: Any) -> None:
    with pytest.raises(InvalidParameterError, match="more than 65536 bytes"):
        compiler.check(Grammar(kind, "x" * 70_000))


def test_whoever_asks_after_a_grammar_that_took_too_long_gets_an_answer(compiler: GrammarCompiler) -> None:
    """The process that reads grammars does not survive it."""
    slow = Grammar("json", json.dumps(REFUSED_SCHEMAS["patterns at once"][0]))
    for _ in range(2):
        with pytest.raises(InvalidParameterError, match="too long"):
            compiler.check(slow)
        assert not compiler.is_checked(slow)
    compiler.check(Grammar("regex", "after [a-z]+"))


def test_half_a_surrogate_pair_is_no_text(compiler: GrammarCompiler) -> None:
    grammar = Grammar("regex", "a\ud800")
    assert not compiler.is_checked(grammar)
    with pytest.raises(InvalidParameterError, match="lone surrogate"):
        compiler.check(grammar)
