"""The grammars of tool calls, run on sample texts by the grammar library: what they let through, and where they end."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pronk.engine.errors import InvalidParameterError
from pronk.engine.grammar import GrammarCompiler
from pronk.engine.request import Grammar
from pronk.engine.tokenizer import Vocabulary, llama_special_tokens
from pronk.server.chat.tool_grammar import MOST_CALLS
from pronk.server.chat.tool_parser import fold
from pronk.server.chat.tool_schema import closed
from pronk.server.chat.tools import Choice, Function, ToolCalls

BYTES = Vocabulary(tuple(bytes([byte]) for byte in range(256)), llama_special_tokens(256))
COMPILER = GrammarCompiler(BYTES, [BYTES.special_tokens["<|eot_id|>"]])
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}
TREE = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "$id": "https://example.org/tree",
    "type": "object",
    "properties": {
        "value": {"$ref": "#/$defs/value"},
        "kids": {"type": "array", "items": {"$ref": "#"}},
        "or": {"$ref": "#v"},
    },
    "required": ["value"],
    "additionalProperties": False,
    "$defs": {"value": {"$anchor": "v", "type": "integer"}},
}
WEATHER = Function("get_weather", "Weather.", CITY)
STRICT_WEATHER = Function("get_weather", "Weather.", CITY, strict=True)
NOW = Function("now")
GROW = Function("grow-2", None, TREE, strict=True)

PARIS = '{"name": "get_weather", "parameters": {"city": "Paris", "days": 3}}'
NOWHERE = '{"name": "get_weather", "parameters": {"town": "Paris"}}'
TIME = '{"name": "now", "parameters": {}}'
GROWN = '{"name": "grow-2", "parameters": {"value": 1, "kids": [{"value": 2, "kids": []}]}}'
WITHERED = '{"name": "grow-2", "parameters": {"value": 1, "kids": [{"kids": []}]}}'


class Run:
    """How far a text gets: taken whole, may end there, must end there."""

    def __init__(self, grammar: Grammar | None, text: str) -> None:
        assert grammar is not None
        COMPILER.check(grammar)
        matcher = COMPILER.compile(grammar)
        self.taken = True
        try:
            for byte in text.encode():
                matcher.accept(byte)
        except InvalidParameterError:
            self.taken = False
        self.may_end = self.taken and matcher.complete
        self.must_end = self.taken and matcher.done


def calls(*functions: Function, parallel: bool = True, choice: Choice | None = None) -> ToolCalls:
    return ToolCalls(functions, choice or Choice(), parallel=parallel)


REQUIRED = Choice("required")


def named(name: str) -> Choice:
    return Choice("required", frozenset((name,)), named=True)


# A call is required


@pytest.mark.parametrize("text", [PARIS, TIME, '{"name": "get_weather", "parameters": {"city": "\\"é😀"}}', GROWN])
def test_one_required_call_ends_the_answer(text: str) -> None:
    run = Run(calls(WEATHER, NOW, GROW, choice=REQUIRED, parallel=False).grammar(), text)
    assert (run.taken, run.must_end) == (True, True)


@pytest.mark.parametrize(
    "text",
    [
        "Hello",
        " " + PARIS,
        NOWHERE,
        WITHERED,
        '{"name": "other", "parameters": {}}',
        '{"name":"now"',
        '{"name": "now", "parameters": {"a": 1}}',
        '{"name": "now", "parameters": []',
        '{"parameters"',
        "[now()]",
        PARIS + " ",
        PARIS + ";",
    ],
)
def test_nothing_but_a_call_is_possible(text: str) -> None:
    assert not Run(calls(WEATHER, NOW, GROW, choice=REQUIRED, parallel=False).grammar(), text).taken


def test_several_required_calls() -> None:
    grammar = calls(WEATHER, NOW, choice=REQUIRED).grammar()
    run = Run(grammar, f"{PARIS}; {TIME}")
    assert (run.may_end, run.must_end) == (True, False)
    assert Run(grammar, "; ".join([TIME] * MOST_CALLS)).must_end
    assert not Run(grammar, "; ".join([TIME] * (MOST_CALLS + 1))).taken
    assert not Run(grammar, f"{PARIS}; Hello").taken


def test_a_named_call_is_one_call_of_that_function() -> None:
    grammar = calls(WEATHER, NOW, choice=named("now")).grammar()
    assert Run(grammar, TIME).must_end
    assert not Run(grammar, PARIS).taken


def test_of_allowed_tools_only_those() -> None:
    tools = calls(WEATHER, NOW, GROW, choice=Choice("required", frozenset(("now", "grow-2"))))
    assert Run(tools.grammar(), f"{TIME}; {GROWN}").may_end
    assert not Run(tools.grammar(), PARIS).taken


def test_a_required_call_pays_no_heed_to_the_format() -> None:
    grammar = calls(WEATHER, choice=REQUIRED).grammar(Grammar("json", json.dumps(CITY)))
    assert Run(grammar, PARIS).may_end
    assert not Run(grammar, '{"city"').taken


# The model chooses, a function is strict

AUTO = calls(STRICT_WEATHER, NOW, GROW)


def read(
    tools: ToolCalls, text: str, response_format: Grammar | None = None
) -> tuple[str | None, list[tuple[str, str]]]:
    parser = tools.parser(response_format)
    assert parser is not None
    content, found = fold(parser.feed(text) + parser.finish())
    return content, [(call.name, call.arguments) for call in found]


@pytest.mark.parametrize(
    "text",
    [
        "Hello.",
        " \n Hello {x} {{}} {",
        'A person: {"name": "Ann", "age": 3}, {"name": 5}, {"na',
        'Another {"name": "get_weather_now", "parameters": {}} {"name": "get"}',
        "<html>[1] </html>",
        'Hi {"type": "function", "name": "other"}',
        "Hi [now()]",
        "é😀",
    ],
)
def test_text_is_free(text: str) -> None:
    run = Run(AUTO.grammar(), text)
    assert (run.may_end, run.must_end) == (True, False)
    assert read(AUTO, text) == (text, [])


PARIS_CALL = ("get_weather", '{"city": "Paris", "days": 3}')


@pytest.mark.parametrize(
    ("text", "content", "found"),
    [
        (PARIS, None, [PARIS_CALL]),
        (f"Let me see.\n\n{PARIS}", "Let me see.\n\n", [PARIS_CALL]),
        (f"See {{x}}: {PARIS}; {TIME}", "See {x}: ", [PARIS_CALL, ("now", "{}")]),
        ('Hi {\n "name":"now", "parameters": {"any": [1, {}]}}', "Hi ", [("now", '{"any": [1, {}]}')]),
        (f"{GROWN}; {GROWN}", None, [("grow-2", GROWN[33:-1])] * 2),
    ],
)
def test_calls_are_possible_and_are_read(text: str, content: str | None, found: list[tuple[str, str]]) -> None:
    assert Run(AUTO.grammar(), text).may_end
    assert read(AUTO, text) == (content, found)


@pytest.mark.parametrize(
    "text",
    [
        NOWHERE,
        f"Hi {NOWHERE}",
        WITHERED,
        f"Hi {WITHERED}",
        f"{PARIS}; {NOWHERE}",
        f"{PARIS} and",
        'Hi { "name"\n: "get_weather" ,',
        'Hi {"name": "get_weather"}',
        'Hi {"name": "get_weather", "arguments"',
        '{"type"',
        '{"name": "Ann"',
        ' {"na ',
        "[now()]",
        "<function=now>",
    ],
)
def test_what_looks_like_a_call_is_one_to_its_end(text: str) -> None:
    assert not Run(AUTO.grammar(), text).taken


def test_a_single_call_ends_the_answer() -> None:
    assert Run(calls(STRICT_WEATHER, parallel=False).grammar(), f"Hi {PARIS}").must_end


@pytest.mark.parametrize(
    "text",
    [
        f"Hi [{PARIS}]",
        'Hi {"parameters": {"town": 1}, "name": "get_weather"}',
        'Hi {"type": "function", "name": "get_weather", "parameters": {"town": 1}}',
        'Hi {"function": "get_weather", "parameters": {"town": 1}}',
        'Hi [get_weather(town="x")]',
        'Hi <function=get_weather>{"town": 1}</function>',
        'Hi <|python_tag|>{"arguments": {"town": 1}, "name": "get_weather"}',
    ],
)
def test_no_call_that_is_read_gets_around_its_schema(text: str) -> None:
    if Run(AUTO.grammar(), text).taken:
        assert read(AUTO, text) == (text, [])
    else:
        assert PARIS in text


# The model chooses, answers have a format

ANN: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
ANN_TEXTS = ['{"name": "Ann", "age": 3}', '{"name": "get_weather", "age": 3}', '{"name": "get_w", "age": 3}']


@pytest.mark.parametrize("functions", [(WEATHER, NOW, GROW), (STRICT_WEATHER, NOW, GROW)])
def test_calls_or_the_format(functions: tuple[Function, ...]) -> None:
    tools = calls(*functions)
    response_format = Grammar("json", json.dumps(ANN))
    grammar = tools.grammar(response_format)
    for text in ANN_TEXTS:
        assert Run(grammar, text).must_end
        assert read(tools, text, response_format) == (text, [])
    for text, found in ((PARIS, [PARIS_CALL]), (f"{TIME}; {PARIS}", [("now", "{}"), PARIS_CALL])):
        assert Run(grammar, text).may_end
        assert read(tools, text, response_format) == (None, found)
    assert Run(grammar, NOWHERE).taken is not functions[0].strict
    for text in ("Hello", '{"name": "Ann", "parameters"', WITHERED, f"{PARIS}; {ANN_TEXTS[0]}", "[now()]"):
        assert not Run(grammar, text).taken


@pytest.mark.parametrize(
    ("schema", "is_free"),
    [
        ({"type": "object"}, True),
        ({}, True),
        ({"properties": {"name": {}}}, True),
        ({"additionalProperties": {"type": "object"}}, True),
        ({"anyOf": [{"type": "object"}]}, True),
        ({"anyOf": [{"type": "null"}, {"anyOf": [{"type": "object"}, {"type": "string"}]}]}, True),
        ({"anyOf": [True, {"type": "object"}]}, True),
    ],
)
def test_a_call_that_breaks_its_schema_is_no_answer_of_an_open_format(schema: dict[str, Any], is_free: bool) -> None:
    grammar = calls(STRICT_WEATHER).grammar(Grammar("json", json.dumps(schema)))
    assert Run(grammar, PARIS).may_end
    if "additionalProperties" not in schema:
        assert Run(grammar, '{"name": "get_weather", "age": {"parameters": 1}}').may_end
    assert not Run(grammar, NOWHERE).taken


NAMED: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "parameters": {"type": "object"}},
    "required": ["name", "parameters"],
    "additionalProperties": False,
}
NOWHERE_VALUE = json.loads(NOWHERE)


@pytest.mark.parametrize(
    "schema",
    [
        NAMED,
        {"properties": {"name": {}, "parameters": {}}},
        {"properties": {"name": {}}, "required": ["parameters"]},
        {"properties": {"parameters": True}},
        {"patternProperties": {"": {}}, "additionalProperties": False},
        {"anyOf": [{"type": "null"}, NAMED]},
        {"oneOf": [{"type": "null"}, NAMED]},
        {"allOf": [NAMED]},
        {"allOf": [{"$ref": "#/$defs/n"}, {"$ref": "#/$defs/n"}], "$defs": {"n": NAMED}},
        {"$ref": "#/$defs/n", "$defs": {"n": NAMED}},
        {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/n"}]}, "n": NAMED}},
        {"$ref": "#n", "$defs": {"n": {**NAMED, "$anchor": "n"}}},
        {"enum": [1, NOWHERE_VALUE]},
        {"const": NOWHERE_VALUE},
        {"anyOf": [{"const": NOWHERE_VALUE}]},
        {**NAMED, "properties": {"name": {"enum": ["x", "get_weather"]}, "parameters": {}}},
    ],
)
def test_a_format_that_could_show_a_broken_call_is_refused(schema: dict[str, Any]) -> None:
    response_format = Grammar("json", json.dumps(schema))
    with pytest.raises(InvalidParameterError, match="get_weather, which is strict") as caught:
        calls(STRICT_WEATHER, NOW).grammar(response_format)
    assert caught.value.param == "tools"
    # Where no schema is to be kept to, a call may be any.
    assert calls(WEATHER).grammar(response_format) is not None


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        (ANN, ANN_TEXTS[0]),
        ({"$ref": "#/$defs/a", "$defs": {"a": ANN}}, ANN_TEXTS[0]),
        ({"anyOf": [{"$ref": "#/$defs/a"}, {"type": "array"}], "$defs": {"a": ANN}}, ANN_TEXTS[0]),
        ({"allOf": [ANN, {"type": "object"}]}, ANN_TEXTS[0]),
        ({"enum": [1, {"name": "get_weather"}]}, "1"),
        ({**NAMED, "properties": {"name": {"const": "x"}, "parameters": {}}}, '{"name": "x", "parameters": 1}'),
        ({**NAMED, "properties": {"name": {"type": "string"}, "parameters": {"type": "integer"}}}, None),
        ({**NAMED, "properties": {"name": {"type": "null"}, "parameters": {}}}, '{"name": null, "parameters": {}}'),
    ],
)
def test_a_format_that_cannot_show_a_call_of_a_strict_function_stays(schema: dict[str, Any], text: str | None) -> None:
    grammar = calls(STRICT_WEATHER).grammar(Grammar("json", json.dumps(schema)))
    assert Run(grammar, text or '{"name": "get_weather", "parameters": 1}').may_end
    assert Run(grammar, PARIS).may_end
    assert not Run(grammar, NOWHERE).taken


def test_schemas_that_refer_to_one_another_twice_over_are_looked_at_once() -> None:
    schemas: dict[str, Any] = {
        f"d{depth}": {"allOf": [{"$ref": f"#/$defs/d{depth + 1}"}, {"$ref": f"#/$defs/d{depth + 1}"}]}
        for depth in range(60)
    }
    schema = {"$ref": "#/$defs/d0", "$defs": {**schemas, "d60": {"$ref": "#/$defs/d0"}}}
    with pytest.raises(InvalidParameterError):
        calls(STRICT_WEATHER).grammar(Grammar("json", json.dumps(schema)))


def test_other_formats_beside_a_strict_function() -> None:
    tools = calls(STRICT_WEATHER)
    with pytest.raises(InvalidParameterError):
        tools.grammar(Grammar("choice", json.dumps(["yes", NOWHERE])))
    assert Run(tools.grammar(Grammar("choice", json.dumps(["yes", TIME]))), TIME).may_end
    grammar = tools.grammar(Grammar("regex", r"[\s\S]*"))
    assert Run(grammar, PARIS).may_end
    assert Run(grammar, f"Say {NOWHERE}").may_end
    assert not Run(grammar, f" {NOWHERE}").taken
    assert not Run(grammar, NOWHERE).taken
    with pytest.raises(InvalidParameterError):
        Run(tools.grammar(Grammar("regex", r"\{[\s\S]*\}")), PARIS)


def test_a_format_may_be_anything_or_nothing() -> None:
    assert Run(calls(NOW).grammar(Grammar("json", "true")), "[1]").may_end
    assert Run(calls(NOW).grammar(Grammar("json", "true")), TIME).may_end


def test_a_format_that_shows_a_call_is_no_call() -> None:
    tools = calls(WEATHER)
    response_format = Grammar("json", '{"type": "object"}')
    text = f'{{"plan": {PARIS}}}'
    assert Run(tools.grammar(response_format), text).may_end
    assert read(tools, text, response_format) == (text, [])


@pytest.mark.parametrize(
    ("response_format", "fits", "fails"),
    [
        (Grammar("choice", json.dumps(["yes", 'a "b" \\ é\n/'])), ["yes", 'a "b" \\ é\n/'], ["no", "yes "]),
        (Grammar("regex", r"[0-9]{2}/\/\d\n"), ["12//3\n"], ["x", "12/3"]),
    ],
)
def test_other_formats(response_format: Grammar, fits: list[str], fails: list[str]) -> None:
    grammar = calls(WEATHER, NOW).grammar(response_format)
    assert all(Run(grammar, text).may_end for text in [*fits, PARIS])
    assert not any(Run(grammar, text).taken for text in fails)


@pytest.mark.parametrize("kind", ["lark", "gbnf"])
def test_a_grammar_cannot_stand_beside_calls(kind: Any) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        calls(NOW).grammar(Grammar(kind, "start: /x/"))
    assert caught.value.param == "structured_outputs"


KEYWORDS = st.sampled_from(
    [
        "type",
        "properties",
        "required",
        "additionalProperties",
        "items",
        "anyOf",
        "allOf",
        "$ref",
        "$defs",
        "enum",
        "not",
    ]
)
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(["object", "parameters", "#", "#/x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYWORDS, inner, max_size=3),
    max_leaves=12,
)


@settings(deadline=None)
@given(st.dictionaries(KEYWORDS, JUNK, max_size=4), JUNK, st.sampled_from([Choice(), REQUIRED]))
def test_what_is_no_schema_is_for_the_library_to_refuse(schema: dict[str, Any], answer: Any, choice: Choice) -> None:
    tools = calls(Function("f", None, schema, strict=True), choice=choice)
    for response_format in (None, Grammar("json", json.dumps(answer))):
        with contextlib.suppress(InvalidParameterError):
            grammar = tools.grammar(response_format)
            assert grammar is not None
            assert grammar.kind == "lark"


# Nothing to hold to


def test_without_a_reason_there_is_no_grammar() -> None:
    assert calls(WEATHER, NOW).grammar() is None


def test_where_nothing_can_be_called_the_format_stays_what_it_is() -> None:
    response_format = Grammar("gbnf", "x")
    tools = calls(STRICT_WEATHER, choice=Choice("none"))
    assert tools.grammar(response_format) is response_format
    assert tools.grammar() is None


def test_a_schema_without_a_type_is_an_objects() -> None:
    grammar = calls(Function("f", None, {"properties": {"a": {}}}), choice=REQUIRED).grammar()
    assert Run(grammar, '{"name": "f", "parameters": {"a": 1}}').may_end
    assert not Run(grammar, '{"name": "f", "parameters": 1').taken


def test_a_schema_that_is_too_deep_is_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(3_000):
        schema = {"items": schema}
    for response_format, choice in ((None, REQUIRED), (Grammar("json", "{}"), Choice("auto"))):
        tools = calls(Function("f", None, {"properties": {"a": schema}}, strict=True), choice=choice)
        with pytest.raises(InvalidParameterError) as caught:
            tools.grammar(response_format)
        assert caught.value.param == "tools"


PART = {"properties": {"a": {}}}
OPEN = '{"a": 1, "b": 2}'


@pytest.mark.parametrize(
    ("schema", "arguments"),
    [
        (PART, OPEN),
        ({"properties": {"x": {"type": "array", "items": PART}}}, f'{{"x": [{OPEN}]}}'),
        ({"properties": {"x": {"anyOf": [{"type": "null"}, PART]}}}, f'{{"x": {OPEN}}}'),
        ({"properties": {"x": {"$ref": "#/$defs/y"}}, "$defs": {"y": PART}}, f'{{"x": {OPEN}}}'),
        ({**PART, "required": ["a"]}, OPEN),
    ],
)
def test_an_object_that_names_its_properties_has_no_others(schema: dict[str, Any], arguments: str) -> None:
    typed = json.loads(json.dumps(schema).replace('{"properties"', '{"type": "object", "properties"'))
    before = json.dumps(typed)
    grammar = calls(Function("f", None, typed), choice=REQUIRED).grammar()
    assert Run(grammar, f'{{"name": "f", "parameters": {arguments.replace(", " + OPEN[9:-1], "")}}}').may_end
    assert not Run(grammar, f'{{"name": "f", "parameters": {arguments}}}').taken
    assert json.dumps(typed) == before


@pytest.mark.parametrize(
    "schema",
    [
        {},
        {**PART, "additionalProperties": True},
        {**PART, "additionalProperties": {"type": "integer"}},
        {**PART, "required": ["b"]},
        {**PART, "required": [{}]},
        {**PART, "required": "a"},
        {**PART, "minProperties": 2},
        {**PART, "allOf": [{"properties": {"b": {}}}]},
        {**PART, "anyOf": [{"properties": {"b": {}}, "required": ["b"]}]},
        {"properties": {"a": {}}, "$ref": "#/$defs/b", "$defs": {"b": {"properties": {"b": {}}}}},
    ],
)
def test_what_may_have_others_stays_open(schema: dict[str, Any]) -> None:
    assert closed(schema) == schema


@pytest.mark.parametrize("name", ["$ref", "const", "items"])
def test_a_property_may_have_a_keywords_name(name: str) -> None:
    schema = {
        "type": "object",
        "properties": {name: {"$ref": "#/$defs/a"}},
        "required": [name],
        "additionalProperties": False,
        "$defs": {"a": {"const": {"$ref": "#"}}},
    }
    tools = calls(Function("f", None, schema, strict=True))
    grammar = tools.grammar(Grammar("json", '{"type": "object", "additionalProperties": false}'))
    assert Run(grammar, f'{{"name": "f", "parameters": {{"{name}": {{"$ref": "#"}}}}}}').may_end
    assert not Run(grammar, f'{{"name": "f", "parameters": {{"{name}": 1').taken
