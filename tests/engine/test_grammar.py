"""Structured outputs: what the masks let through, whatever the model prefers, and where completions end."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pronk.engine.errors import InvalidParameterError
from pronk.engine.grammar import GrammarCompiler, Matcher
from pronk.engine.request import Grammar
from pronk.engine.tokenizer import Tokenizer, Vocabulary, llama_special_tokens, load_vocabulary

from .schemas.generation import Completion, allowed, fault, generate

ROOT = Path(__file__).parent.parent.parent
CRIA = load_vocabulary(ROOT / "engine" / "cria")
TOKENIZER = Tokenizer(CRIA)
EOT, END = CRIA.special_tokens["<|eot_id|>"], CRIA.special_tokens["<|end_of_text|>"]
COMPILER = GrammarCompiler(CRIA, [EOT, END])

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "tags": {"type": "array", "items": {}}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
MANY = 10_000


def of_json(schema: Any) -> Matcher:
    return COMPILER.compile(Grammar("json", json.dumps(schema)))


def take(matcher: Matcher, text: str) -> Matcher:
    for token in TOKENIZER.encode(text):
        matcher.accept(token)
    return matcher


def accepts(matcher: Matcher, text: str) -> bool:
    """Whether the text can be written, and could end there."""
    matcher = matcher.copy()
    for token in TOKENIZER.encode(text):
        if token not in allowed(matcher.mask(MANY)):
            return False
        matcher.accept(token)
    return matcher.complete


def prefer(matcher: Matcher, budget: int, wish: Callable[[bytes], bool]) -> Completion:
    """What a model writes that takes, wherever it may, tokens that it wishes for."""
    text = b""
    for count in range(budget):
        if matcher.done:
            return Completion(text, count, True)
        tokens = allowed(matcher.mask(budget - count))
        token = next((token for token in tokens if wish(CRIA.token_bytes(token))), tokens[0])
        matcher.accept(token)
        if CRIA.is_special(token):
            return Completion(text, count, True)
        text += CRIA.token_bytes(token)
    return Completion(text, budget, matcher.done)


# The interface


def test_a_mask_has_a_bit_for_each_token_and_nothing_beyond() -> None:
    wide = GrammarCompiler(CRIA, [EOT], CRIA.size + 100)
    mask = wide.compile(Grammar("choice", '["a"]')).mask(MANY)
    assert mask.dtype == np.int32
    assert mask.shape == ((CRIA.size + 100 + 31) // 32,)
    assert [CRIA.token_bytes(token) for token in allowed(mask)] == [b"a"]


def test_eos_comes_where_the_text_is_complete_and_only_there() -> None:
    matcher = of_json({"type": "integer"})
    assert not {EOT, END} & set(allowed(matcher.mask(MANY)))
    take(matcher, "12")
    assert {EOT, END} <= set(allowed(matcher.mask(MANY)))
    assert matcher.complete
    assert not matcher.done
    matcher.accept(EOT)
    assert matcher.done


def test_a_text_that_nothing_can_follow_is_done() -> None:
    matcher = of_json(PERSON)
    assert not take(matcher, '{"name": "Ada", "age": 36').done
    assert take(matcher, "}").done
    assert set(allowed(matcher.mask(MANY))) == {EOT, END}


def test_a_token_that_the_mask_does_not_allow_is_an_error() -> None:
    matcher = of_json(PERSON)
    with pytest.raises(InvalidParameterError) as caught:
        take(matcher, "[")
    assert caught.value.param == "structured_outputs"


def test_eos_before_the_end_is_an_error() -> None:
    with pytest.raises(InvalidParameterError):
        take(of_json(PERSON), '{"name').accept(EOT)


def test_a_copy_goes_its_own_way() -> None:
    first = take(of_json(PERSON), '{"name": "')
    second = first.copy()
    take(first, 'Ada", "age": 1}')
    assert first.done
    assert not second.done
    take(second, 'Grace", "age": 2}')
    assert second.done


@pytest.mark.parametrize("count", [1, 3, 20])
def test_masks_filled_together_are_those_filled_one_by_one(count: int) -> None:
    chance = random.Random(count)
    matchers, budgets = [], []
    for row in range(count):
        matcher = of_json(PERSON) if row % 2 else COMPILER.compile(Grammar("regex", "(ab|cd){3,}[0-9]*"))
        for _ in range(row % 7):
            matcher.accept(chance.choice(allowed(matcher.mask(MANY))))
            if matcher.done:
                break
        matchers.append(matcher)
        budgets.append(8 if row % 3 else MANY)
    alone = [matcher.copy().mask(budget) for matcher, budget in zip(matchers, budgets, strict=True)]
    np.testing.assert_array_equal(COMPILER.fill(matchers, budgets), np.stack(alone))


def test_a_grammar_that_is_remembered_begins_anew() -> None:
    first = take(of_json(PERSON), '{"name": "Ada", "age": 1')
    second = of_json(PERSON)
    assert not second.complete
    assert take(second, '{"name": "Grace", "age": 2}').done
    assert take(first, "0}").done


def test_masks_depend_on_the_tokens_alone() -> None:
    """And not on which masks were asked for: a preempted sequence is masked again."""
    tokens = TOKENIZER.encode('{"name": "Ada Lovelace", "age": 3')
    asked, silent = of_json(PERSON), of_json(PERSON)
    for count, token in enumerate(tokens):
        asked.mask(MANY - count)
        asked.accept(token)
        silent.accept(token)
    np.testing.assert_array_equal(asked.mask(MANY), silent.mask(MANY))


# The kinds of grammar


def test_choices_are_exact() -> None:
    choices = ["yes", "yes please", 'a "quote"\\', "line\nbreak", "é😀", "", "\x7f"]
    matcher = COMPILER.compile(Grammar("choice", json.dumps(choices)))
    assert all(accepts(matcher, choice) for choice in choices)
    assert not any(accepts(matcher, text) for text in ("ye", "yes ", "yes pleas", "no", "linebreak", " "))


def test_many_choices() -> None:
    matcher = COMPILER.compile(Grammar("choice", json.dumps([f"number {number}" for number in range(4000)])))
    assert accepts(matcher, "number 3999")
    assert not accepts(matcher, "number 4000")


@pytest.mark.parametrize(
    ("pattern", "good", "bad"),
    [
        ("[0-9]{3}-[a-z]+", ["123-a", "000-xyz"], ["12-a", "123-", "123-a "]),
        ("^ab$", ["ab"], ["abc", "xab"]),
        ("a|bc", ["a", "bc"], ["ac", "b", ""]),
        ("(?i)yes", ["yes", "YES", "yEs"], ["no"]),
        (r"\d+/\d+", ["1/2", "10/20"], ["1", "/"]),
        ("a\nb", ["a\nb"], ["ab", "a b"]),
        (r"\p{Lu}\p{Ll}*", ["Éa", "A"], ["éa", "1"]),
        ("", [""], ["a"]),
    ],
)
def test_a_regex_matches_the_whole_text(pattern: str, good: list[str], bad: list[str]) -> None:
    matcher = COMPILER.compile(Grammar("regex", pattern))
    assert [text for text in good if not accepts(matcher, text)] == []
    assert [text for text in bad if accepts(matcher, text)] == []


def test_lark_holds_schemas_and_special_tokens() -> None:
    text = 'start: "call " body <|eom_id|>\nbody: %json {"type": "object", "properties": {"n": {"type": "integer"}}}\n'
    matcher = take(COMPILER.compile(Grammar("lark", text)), 'call {"n": 3}')
    assert allowed(matcher.mask(MANY)) == [CRIA.special_tokens["<|eom_id|>"]]
    matcher.accept(CRIA.special_tokens["<|eom_id|>"])
    assert matcher.complete


def test_a_schema_in_lark_may_speak_of_what_lark_may_not() -> None:
    schema = {"type": "integer", "description": "x <[1]>\nx[max_tokens=3]: y", "examples": ["x" * 70_000]}
    matcher = COMPILER.compile(Grammar("lark", f"start: %json {json.dumps(schema)}"))
    assert accepts(matcher, "7")


def test_gbnf_is_translated() -> None:
    text = 'root ::= term ("+" term)*\nterm ::= [0-9]+ | "(" root ")"\n'
    matcher = COMPILER.compile(Grammar("gbnf", text))
    assert accepts(matcher, "1+(23+4)")
    assert not accepts(matcher, "1+")
    assert not accepts(matcher, "(1")


def test_properties_come_in_the_schema_s_order() -> None:
    matcher = of_json({"type": "object", "properties": {"b": {}, "a": {}}, "required": ["a", "b"]})
    assert accepts(matcher, '{"b": 1, "a": 2}')
    assert not accepts(matcher, '{"a": 2, "b": 1}')


def test_any_object_is_any_json_object() -> None:
    matcher = of_json({"type": "object"})
    assert accepts(matcher, '{"a": [1, {"b": null}], "é": "\\n", "": -1.5e3}')
    assert accepts(matcher, "{}")
    assert not any(accepts(matcher, text) for text in ("[]", "1", '{"a": 01}', "{'a': 1}", '{"a": 1,}'))


@pytest.mark.parametrize("text", ['{"a":1,"b":[1,2]}', '{"a": 1, "b": [1, 2]}'])
def test_one_space_may_follow_a_comma_and_a_colon(text: str) -> None:
    assert accepts(of_json({}), text)


@pytest.mark.parametrize("text", ['{ "a": 1}', '{"a":  1}', '{"a" : 1}', '{"a": 1\n}', "[1 , 2]", " 1", "[\t1]", "1 "])
def test_no_other_white_space_comes(text: str) -> None:
    assert not accepts(of_json({}), text)


# Models with bad habits


def test_white_space_and_control_characters_never_fill_a_text() -> None:
    for schema in (
        PERSON,
        {"type": "object"},
        {"type": "string", "maxLength": 20},
        {"type": "string", "pattern": "^.*$"},
    ):
        written = prefer(of_json(schema), 60, lambda token: token.isspace() or token[:1] < b" ")
        assert fault(written.text, schema) is None
        assert b"\n" not in written.text


def test_a_digit_repeated_for_ever_ends() -> None:
    for schema in ({"type": "integer"}, {"type": "number"}, {"type": "array", "items": {"type": "number"}}):
        written = prefer(of_json(schema), 400, bytes.isdigit)
        value = json.loads(written.text)
        assert max(len(run) for run in re.findall(r"\d+", json.dumps(value))) < 30


def test_an_exponent_stays_one_that_a_double_can_hold() -> None:
    matcher = of_json({"type": "number"})
    written = prefer(matcher, 400, lambda token: token in (b"e", b"E") or token.isdigit())
    assert float(written.text) < float("inf")


@pytest.mark.parametrize("budget", range(2, 8))
def test_an_exponent_stays_so_at_the_end_of_the_budget(budget: int) -> None:
    written = prefer(take(of_json({"type": "array"}), "[42E"), budget, bytes.isdigit)
    assert all(value < float("inf") for value in json.loads(b"[42E" + written.text))


@pytest.mark.parametrize("bound", [3, 1000000, 0.3, 10**17])
def test_no_fraction_comes_so_near_to_a_bound_that_a_double_is_the_bound(bound: float) -> None:
    """A model that repeats the digit 9."""
    schema = {"type": "number", "exclusiveMaximum": bound, "minimum": 0}
    for budget in (10, 25, 400):
        written = prefer(of_json(schema), budget, lambda token: token in (b".", b"9", b"99", b"999"))
        assert float(written.text) < bound


def test_a_string_of_many_digits_is_left_alone() -> None:
    assert accepts(of_json({"type": "string"}), '"' + "7" * 100 + '"')


def test_a_character_split_over_tokens_is_completed() -> None:
    """Bytes of an emoji are tokens of their own in a small vocabulary; the budget ends in the middle of one."""
    for budget in range(2, 12):
        written = prefer(of_json({"type": "string"}), budget, lambda token: token[:1] >= b"\x80")
        assert fault(written.text, {"type": "string"}) is None


# The budget


def test_the_shortest_completion_is_found() -> None:
    bare = Vocabulary(tuple(bytes([byte]) for byte in range(256)), llama_special_tokens(256))
    compiler = GrammarCompiler(bare, [bare.special_tokens["<|eot_id|>"]])
    way_out = {
        "anyOf": [
            {"type": "object", "properties": {"x": {"$ref": "#"}}, "required": ["x"]},
            {"type": "object", "properties": {"y": {"type": "null"}}, "required": ["y"]},
        ]
    }
    shortest: list[tuple[Any, str]] = [
        ({"type": "integer"}, "0"),
        ({"type": "integer", "minimum": 20}, "20"),
        ({"type": "integer", "minimum": 5, "maximum": 1200}, "5"),
        ({"type": "integer", "multipleOf": 7, "minimum": 1}, "7"),
        ({"type": "string", "minLength": 3}, '"aaa"'),
        ({"enum": ["longest", "long", "longer"]}, '"long"'),
        ({"type": "array", "items": {"type": "boolean"}, "minItems": 2}, "[true,true]"),
        ({"anyOf": [{"enum": ["abcdefgh"]}, {"type": "object"}]}, "{}"),
        ({"type": "string", "pattern": "^(abcdef|xyz)$"}, '"xyz"'),
        ({"type": "string", "pattern": "needle"}, '"needle"'),
        ({"type": "string", "format": "date"}, '"0123-01-02"'),
        ({"type": "string", "format": "email"}, '"a@a"'),
        (way_out, '{"y":null}'),
    ]
    found = [compiler.compile(Grammar("json", json.dumps(schema))).shortest for schema, _ in shortest]
    assert found == [len(text) for _, text in shortest]


@pytest.mark.parametrize("extra", range(12))
def test_a_budget_that_the_shortest_completion_fits_is_enough(extra: int) -> None:
    matcher = of_json(PERSON)
    assert matcher.shortest is not None
    for seed in range(5):
        written = generate(matcher, CRIA, matcher.shortest + extra, random.Random(seed))
        assert fault(written.text, PERSON) is None


def test_a_budget_of_exactly_the_shortest_completion_ends_by_itself() -> None:
    matcher = of_json(PERSON)
    assert generate(matcher, CRIA, matcher.shortest or 0, random.Random(0)).ended


def test_far_from_the_budget_nothing_is_left_out() -> None:
    matcher = take(of_json(PERSON), '{"name": "')
    words = [token for token in range(len(CRIA.ranks)) if CRIA.ranks[token].isalpha() and CRIA.ranks[token].isascii()]
    assert set(words) <= set(allowed(matcher.mask(MANY)))


WORDS = {
    token
    for token, spelling in enumerate(CRIA.ranks)
    if re.fullmatch(rb"[ A-Za-z0-9.,:;()!?'-]+", spelling)
}  # fmt: skip
CALLS_OR_TEXT = r"""
start: calls | FIRST (TEXT | BRACE)* calls?
calls: call ("; " call){0,15}
call: OPEN ", \"parameters\": " arguments "}"
OPEN: /\{[ \t\n\r]*"name"[ \t\n\r]*:[ \t\n\r]*"weather"/
arguments: %json {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FIRST: /[^ \t\n\r{]/
TEXT: /[^{]+/
BRACE: /\{[ \t\n\r]*("[a-zA-Z0-9_-]*)?/
"""


@pytest.mark.parametrize(
    ("grammar", "start"),
    [
        (Grammar("lark", CALLS_OR_TEXT), "I"),
        (Grammar("lark", CALLS_OR_TEXT), '{"name": "weather", "parameters": {"city": "P'),
        (Grammar("regex", r"[A-Z][^\n]*\."), "A llama"),
        (Grammar("json", json.dumps(PERSON)), '{"name": "A'),
    ],
)
@pytest.mark.parametrize("budget", [60, 100, 250])
def test_where_text_is_free_it_stays_free_long_before_the_end(grammar: Grammar, start: str, budget: int) -> None:
    """A bound on how far one token may lead away from the end is large for some grammars. Words lead nowhere."""
    matcher = take(COMPILER.compile(grammar), start)
    anything = WORDS & set(allowed(matcher.mask(MANY)))
    assert len(anything) > 500
    assert anything <= set(allowed(matcher.mask(budget)))
    take(matcher, " llama")
    assert matcher.shortest is not None
    assert matcher.shortest < 20


def test_near_the_budget_a_string_may_still_be_any() -> None:
    matcher = take(of_json(PERSON), '{"name": "')
    words = [token for token in range(len(CRIA.ranks)) if CRIA.ranks[token].isalpha() and CRIA.ranks[token].isascii()]
    assert matcher.shortest is not None
    assert set(words) <= set(allowed(matcher.mask(matcher.shortest + 1)))
    assert not set(words) & set(allowed(matcher.mask(matcher.shortest)))


def test_an_optional_property_without_end_is_never_begun() -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/endless"}},
        "additionalProperties": False,
        "$defs": {"endless": {"type": "object", "properties": {"b": {"$ref": "#/$defs/endless"}}, "required": ["b"]}},
    }
    for seed in range(5):
        assert generate(of_json(schema), CRIA, 30, random.Random(seed)).text == b"{}"


def test_a_budget_that_is_too_small_stops_nothing() -> None:
    matcher = of_json(PERSON)
    written = generate(matcher, CRIA, 4, random.Random(0))
    assert written.num_tokens == 4
    assert not written.ended


PATTERNS = ("^[a-c]{2,5}$", "x", "^a.*b$", "^(ab|cde)+$")
FORMATS = ("date", "uuid", "ipv4", "date-time")


def scalars() -> st.SearchStrategy[dict[str, Any]]:
    def integers(low: int, size: int) -> dict[str, Any]:
        return {"type": "integer", "minimum": low, "maximum": low + size}

    def strings(low: int, size: int) -> dict[str, Any]:
        return {"type": "string", "minLength": low, "maxLength": low + size}

    return st.one_of(
        st.sampled_from([{"type": "null"}, {"type": "boolean"}, {"type": "string"}, {"type": "number"}, {}]),
        st.builds(integers, st.integers(-300, 300), st.integers(0, 400)),
        st.builds(strings, st.integers(0, 9), st.integers(0, 9)),
        st.builds(lambda values: {"enum": values}, st.lists(st.text(max_size=8), min_size=1, max_size=4, unique=True)),
        st.sampled_from([{"type": "string", "pattern": pattern} for pattern in PATTERNS]),
        st.sampled_from([{"type": "string", "format": name} for name in FORMATS]),
        st.sampled_from([{"type": "number", "multipleOf": multiple} for multiple in (3, 40, 0.25)]),
    )


def containers(parts: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    def an_object(properties: dict[str, Any], optional: int, additional: bool) -> dict[str, Any]:
        required = list(properties)[optional:]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": additional}

    names = st.text("abc_é", max_size=6)
    return st.one_of(
        st.builds(lambda items, low: {"type": "array", "items": items, "minItems": low}, parts, st.integers(0, 3)),
        st.builds(an_object, st.dictionaries(names, parts, max_size=4), st.integers(0, 4), st.booleans()),
        st.builds(lambda options: {"anyOf": options}, st.lists(parts, min_size=1, max_size=3)),
    )


SCHEMAS = st.recursive(scalars(), containers, max_leaves=6)


@settings(max_examples=80, deadline=None)
@given(SCHEMAS, st.integers(0, 25), st.integers(0, 2**32))
def test_any_schema_and_any_budget_make_valid_json(schema: dict[str, Any], extra: int, seed: int) -> None:
    matcher = of_json(schema)
    assert matcher.shortest is not None
    written = generate(matcher, CRIA, max(1, matcher.shortest + extra), random.Random(seed))
    assert fault(written.text, schema) is None


PIECES = st.sampled_from(["a", "b", "[0-9]", "[a-z]", "é", " ", "\\.", "xyz"])
REGEXES = st.recursive(
    PIECES,
    lambda parts: st.one_of(
        st.builds(lambda one, two: one + two, parts, parts),
        st.builds(lambda one, two: f"(?:{one}|{two})", parts, parts),
        st.builds(
            lambda one, times: f"(?:{one}){times}", parts, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "{3,}"])
        ),
    ),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(REGEXES, st.integers(0, 12), st.integers(0, 2**32))
def test_any_regex_and_any_budget_make_a_match(pattern: str, extra: int, seed: int) -> None:
    matcher = COMPILER.compile(Grammar("regex", pattern))
    assert matcher.shortest is not None
    written = generate(matcher, CRIA, max(1, matcher.shortest + extra), random.Random(seed))
    assert re.fullmatch(pattern, written.text.decode())


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(max_size=12), min_size=1, max_size=6), st.integers(0, 6), st.integers(0, 2**32))
def test_any_choices_and_any_budget_make_a_choice(choices: list[str], extra: int, seed: int) -> None:
    matcher = COMPILER.compile(Grammar("choice", json.dumps(choices)))
    assert matcher.shortest is not None
    written = generate(matcher, CRIA, max(1, matcher.shortest + extra), random.Random(seed))
    assert written.text.decode() in choices
