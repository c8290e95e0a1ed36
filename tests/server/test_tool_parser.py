"""The parser of tool calls: every form Llama writes, every cut of the text, and no text lost."""

from __future__ import annotations

import json
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pronk.server.chat.tool_literals import MAX_DEPTH
from pronk.server.chat.tool_parser import Call, CallDelta, Part, ToolParser, fold, new_call_id

NAMES = ("f", "g", "get_weather", "get-time")
UNHURRIED = settings(deadline=None)


def parser(**options: bool) -> ToolParser:
    numbers = count()
    return ToolParser(NAMES, new_id=lambda: f"call_{next(numbers)}", **options)


def parts_of(pieces: list[str], **options: bool) -> list[Part]:
    machine = parser(**options)
    return [part for piece in pieces for part in machine.feed(piece)] + machine.finish()


def read(text: str, **options: bool) -> tuple[str | None, list[tuple[str, str]]]:
    """-> content, and (name, arguments) of each call; the same for the whole text and for single characters."""
    whole = fold(parts_of([text], **options))
    assert fold(parts_of(list(text), **options)) == whole
    content, calls = whole
    assert [call.id for call in calls] == [f"call_{place}" for place in range(len(calls))]
    return content, [(call.name, call.arguments) for call in calls]


PARIS = ("get_weather", '{"city": "Paris", "days": [1, -2.5e3, {"a": null}]}')
PARIS_TEXT = f'{{"name": "get_weather", "parameters": {PARIS[1]}}}'

CALLS: dict[str, tuple[str, list[tuple[str, str]]]] = {
    "as the template teaches": (PARIS_TEXT, [PARIS]),
    "no space": ('{"name":"f","parameters":{"a":1}}', [("f", '{"a":1}')]),
    "all the space there is": (
        ' \n{ "name" : "f" ,\n\t"parameters" : { "a" : [ 1 , 2 ] }\r\n} \n',
        [("f", '{ "a" : [ 1 , 2 ] }')],
    ),
    "no arguments": ('{"name": "f", "parameters": {}}', [("f", "{}")]),
    "arguments": ('{"name": "f", "arguments": {"a": true}}', [("f", '{"a": true}')]),
    "a type": ('{"type": "function", "name": "f", "parameters": {"a": ""}}', [("f", '{"a": ""}')]),
    "function for name": ('{"type": "function", "function": "f", "parameters": {}}', [("f", "{}")]),
    "function around": ('{"type": "function", "function": {"name": "f", "parameters": {"a": 0}}}', [("f", '{"a": 0}')]),
    "the name last": ('{"parameters": {"a": {"b": 1}}, "name": "f"}', [("f", '{"a": {"b": 1}}')]),
    "the type last": ('{"name": "f", "parameters": {"a": 1}, "type": "function"}', [("f", '{"a": 1}')]),
    "arguments as text": (r'{"name": "f", "arguments": "{\"a\": \"\\n\"}"}', [("f", r'{"a": "\n"}')]),
    "after ;": ('{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}', [("f", "{}"), ("g", "{}")]),
    "after a line": ('{"name": "f", "parameters": {}}\n{"name": "g", "parameters": {}}', [("f", "{}"), ("g", "{}")]),
    "at once": ('{"name": "f", "parameters": {}}{"name": "f", "parameters": {}}', [("f", "{}"), ("f", "{}")]),
    "an array": ('[{"name": "f", "parameters": {}}, {"name": "g", "parameters": {}}]', [("f", "{}"), ("g", "{}")]),
    "pythonic": ("[f(a=1, b='x'), g()]", [("f", '{"a": 1, "b": "x"}'), ("g", "{}")]),
    "two lists": ("[f()] [g()]", [("f", "{}"), ("g", "{}")]),
    "a name with a dash": ("[get-time()]", [("get-time", "{}")]),
    "a tag": ('<function=f>{"a": 1}</function>', [("f", '{"a": 1}')]),
    "tags": ('<function=f>{"a": 1}</function>\n<function=g> {}</function>', [("f", '{"a": 1}'), ("g", "{}")]),
    "a tag left open": ('<function=f>{"a": 1}', [("f", '{"a": 1}')]),
    "all forms": (
        '{"name": "f", "parameters": {}}; [g()] <function=f>{}</function>',
        [("f", "{}"), ("g", "{}"), ("f", "{}")],
    ),
    "spaces in text": ('{"name": "f", "parameters": {"a": " x  y "}}', [("f", '{"a": " x  y "}')]),
    "raw line breaks": ('{"name": "f", "parameters": {"a": "x\n\ty\x00"}}', [("f", r'{"a": "x\n\ty\u0000"}')]),
    "escapes": (r'{"name": "f", "parameters": {"a": "\"\\\u00e9\ud83d"}}', [("f", r'{"a": "\"\\\u00e9\ud83d"}')]),
    "other letters": ('{"name": "f", "parameters": {"ключ": "é😀"}}', [("f", '{"ключ": "é😀"}')]),
}


@pytest.mark.parametrize("tag", ["", "<|python_tag|>", "<|python_tag|> "])
@pytest.mark.parametrize("end", ["", "<|eom_id|>", "\n<|eot_id|>\n"])
@pytest.mark.parametrize("name", CALLS)
def test_the_forms(name: str, tag: str, end: str) -> None:
    text, calls = CALLS[name]
    assert read(tag + text + end) == (None, calls)


@pytest.mark.parametrize("name", CALLS)
def test_text_before_a_call_is_content(name: str) -> None:
    text, calls = CALLS[name]
    before = "Let me [see], {x} < y: "
    assert read(before + text) == (before + text[: len(text) - len(text.lstrip())], calls)


@pytest.mark.parametrize("name", CALLS)
def test_text_after_a_call_is_content(name: str) -> None:
    text, calls = CALLS[name]
    assert read(text.rstrip() + "\n\nDone.") == ("\n\nDone.", calls)


CONTENT = {
    "nothing": "",
    "whitespace": " \n ",
    "prose": " Hello. ",
    "brackets": "[[{<x>}]] {{ }} [1] (2) a[i] <b> {",
    "an unknown function": '{"name": "h", "parameters": {}}',
    "a longer name": '{"name": "get_weather_now", "parameters": {}}',
    "a shorter name": '{"name": "get", "parameters": {}}',
    "no arguments": '{"name": "f"}',
    "no name": '{"parameters": {"a": 1}}',
    "a person": '{"name": "Ann", "age": 3}',
    "a definition": '{"type": "function", "function": {"name": "f", "description": "x", "parameters": {}}}',
    "a schema": '{"name": "f", "description": "x", "parameters": {"type": "object"}}',
    "a placeholder": '{"name": "f", "parameters": {...}}',
    "a placeholder for a value": '{"name": "f", "parameters": {"a": <a>}}',
    "a list of arguments": '{"name": "f", "parameters": [1]}',
    "null": '{"name": "f", "parameters": null}',
    "arguments twice": '{"parameters": {"a": 1}, "arguments": {"a": 1}, "name": "f"}',
    "a name twice": '{"name": "f", "name": "f", "parameters": {}}',
    "a name and a function": '{"name": "f", "function": "g", "parameters": {}}',
    "another type": '{"type": "object", "name": "f", "parameters": {}}',
    "text that is no object": r'{"name": "f", "arguments": "[1]"}',
    "text with more than an object": r'{"name": "f", "arguments": "{} x"}',
    "text with half an object": r'{"name": "f", "arguments": "{"}',
    "text with half a character": r'{"name": "f", "arguments": "{\"a\": \"\ud800\"}"}',
    "an unknown tag": "<function=h>{}</function>",
    "a tag without arguments": "<function=f>x</function>",
    "a tag alone": "<|python_tag|>print(1)",
    "a closing tag": "</function>",
    "an end": "<|eom_id|>",
    "a link": "[f](https://x) [f(x)](https://x)",
    "an unknown pythonic call": "[h(a=1)]",
    "positions": "[f(1)]",
    "a pythonic call without a list": "f(a=1)",
    "a name": "[f(a=b)]",
    "an expression": "[f(a=1+1)]",
    "a call inside": "[f(a=g())]",
    "an attribute": "[f(a='x'.upper())]",
    "two strings": "[f(a='x' 'y')]",
    "a prefix": "[f(a=f'x')]",
    "no name of an argument": "[f(=1)]",
    "a key without quotes": "[f(a={1x1: 2})]",
    "text left open": '{"name": "f", "arguments": "{',
    "an escape left open": "[f(a='\\",
    "a set": "[f(a={1})]",
    "a key that is no text": "[f(a={1: 2})]",
    "an argument twice": "[f(a=1, a=2)]",
    "an infinite number": "[f(a=.9e999)]",
    "no number": "[f(a=1.2.3)]",
    "no such character": r"[f(a='\U00110000')]",
    "half a character": r"[f(a='\u12')]",
    "a list left open": "[f(a=1)",
    "a call left open": "[f(a=1",
    "a string left open": "[f(a='1)]",
    "half a name": '{"name": "get_wea',
    "half a call": '{"name": "f", "parameters": {"a": ',
    "half a tag": "<|python_tag|",
}


@pytest.mark.parametrize("name", CONTENT)
def test_what_only_looks_like_a_call_is_content(name: str) -> None:
    text = CONTENT[name]
    assert read(text) == (text or None, [])


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ('{{"name": "f", "parameters": {}}', "{", [("f", "{}")]),
        ('[[f()], {"name": "h", "parameters": {}}]', '[, {"name": "h", "parameters": {}}]', [("f", "{}")]),
        (
            '[{"name": "h", "parameters": {}}, {"name": "f", "parameters": {}}]',
            '[{"name": "h", "parameters": {}}, ]',
            [("f", "{}")],
        ),
        ("[f(), h()]", ", h()]", [("f", "{}")]),
        ('{"name": "f", "parameters": {}}; and', "; and", [("f", "{}")]),
        ('{"name": "f", "parameters": {}};; {"na', ';; {"na', [("f", "{}")]),
        ('{"name": "f", "parameters": {}, "why": 1}', ', "why": 1}', [("f", "{}")]),
        ('{"name": "f", "parameters": {"a": 1, b: 2}} x', "b: 2}} x", [("f", '{"a": 1, ')]),
        ('{"name": "f", "parameters": {"a": 01}}', "1}}", [("f", '{"a": 0')]),
        ('{"name": "f", "parameters": {"a": "x', None, [("f", '{"a": "x')]),
        ('{"name": "f", "parameters": {"a": 1}', None, [("f", '{"a": 1}')]),
        ('[{"name": "f", "parameters": {}}', None, [("f", "{}")]),
        ('[{"name": "f", "parameters": {}}, ', None, [("f", "{}")]),
        ("[f(), ", None, [("f", "{}")]),
        ("[f(), g(a=", ", g(a=", [("f", "{}")]),
        ('[{"name": "f", "parameters": {}}, {"na', ', {"na', [("f", "{}")]),
        ("```json\n[f()]\n```", "```json\n\n```", [("f", "{}")]),
    ],
)
def test_where_calls_end_and_content_begins(text: str, content: str | None, calls: list[tuple[str, str]]) -> None:
    assert read(text) == (content, calls)


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ("[1 ", "2]"),
        ("[1", "}"),
        ("[1, ", "]"),
        ("[", ",]"),
        ('{"b" ', "1}"),
        ('{"b": 1, ', "}"),
        ('{"b": 1', "]"),
        ("{", "b: 1}"),
        ('{"b": ', ", 1}"),
        ('"\\', 'x"'),
        ('"\\u12', 'g4"'),
        ('"\\u123', '"'),
        ("-", "x"),
        ("1.", "x"),
        ("1e+", "x"),
        ("0", "1"),
        ("1", "true"),
    ],
)
def test_arguments_end_where_they_are_no_longer_json(good: str, bad: str) -> None:
    begin = '{"z": 0, "a": '
    assert read(f'{{"name": "f", "parameters": {begin}{good}{bad}}}}}') == (bad + "}}", [("f", begin + good)])


@pytest.mark.parametrize("word", ["true", "false", "null"])
def test_a_word_that_is_not_jsons_is_no_argument(word: str) -> None:
    begin = '{"z": 0, "a": '
    for cut in range(1, len(word)):
        text = f'{{"name": "f", "parameters": {begin}{word[:cut]}x}}}}'
        assert read(text) == (word[:cut] + "x}}", [("f", begin)])
    assert read(f'{{"name": "f", "parameters": {begin}{word}}}}}') == (None, [("f", f"{begin}{word}}}")])


# Python's literals


@pytest.mark.parametrize(
    ("literal", "written"),
    [
        ("True", "true"),
        ("False", "false"),
        ("None", "null"),
        ("null", "null"),
        ("-7", "-7"),
        ("1.50e+3", "1.50e+3"),
        (".5", "0.5"),
        ("5.", "5.0"),
        ("'it\\'s'", '"it\'s"'),
        ('"it\'s"', '"it\'s"'),
        (r"'\n\x41\u00e9\U0001F600\\\"\q'", r'"\nAé😀\\\"\\q"'),
        (r"'\ud800'", r'"\ud800"'),
        (r"'\U0010FFFF'", '"\U0010ffff"'),
        ("'a\nb'", r'"a\nb"'),
        ("[]", "[]"),
        ("[ 1 , [2,], ]", "[1, [2]]"),
        ("()", "[]"),
        ("(1)", "1"),
        ("(1,)", "[1]"),
        ("(1, 2)", "[1, 2]"),
        ("{}", "{}"),
        ("{'a': {\"b\": [None]}, }", '{"a": {"b": [null]}}'),
    ],
)
def test_python_literals(literal: str, written: str) -> None:
    assert read(f"[f(a={literal})]") == (None, [("f", f'{{"a": {written}}}')])


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
ARGUMENT_NAMES = st.from_regex("[a-z_][a-z0-9_]{0,4}", fullmatch=True)


@UNHURRIED
@given(st.dictionaries(ARGUMENT_NAMES, VALUES, max_size=3))
def test_whatever_python_writes_is_read(arguments: dict[str, object]) -> None:
    text = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    content, calls = read(f"[f({text})]")
    assert (content, [(name, json.loads(written)) for name, written in calls]) == (None, [("f", arguments)])


@UNHURRIED
@given(st.dictionaries(st.text(), VALUES, max_size=3), st.booleans(), st.sampled_from([None, 2]))
def test_whatever_json_is_written_is_read(arguments: dict[str, object], ascii_only: bool, indent: int | None) -> None:
    written = json.dumps(arguments, ensure_ascii=ascii_only, indent=indent)
    assert read(f'{{"name": "f", "parameters": {written}}}') == (None, [("f", written)])
    as_text = json.dumps({"name": "f", "arguments": written})
    assert read(as_text) == (None, [("f", written)])


# Every cut, every text

PIECES = st.sampled_from(
    [
        *(text for text, _ in CALLS.values()),
        *CONTENT.values(),
        *'{}[]<>()",:;= \n\\',
        '"name"',
        '"parameters"',
        '"arguments"',
        '"function"',
        '"type"',
        '"f"',
        "f(a=",
        "<function=",
        "</function>",
        "<|python_tag|>",
        "<|eom_id|>",
        "'",
    ]
)
TEXTS = st.lists(PIECES | st.text(max_size=3), max_size=8).map("".join)
OPTIONS = st.fixed_dictionaries({}, optional=dict.fromkeys(("parallel", "taught_only", "anywhere"), st.booleans()))


@UNHURRIED
@given(TEXTS, st.data(), OPTIONS)
def test_the_fold_of_a_stream_is_the_whole_answer(text: str, data: st.DataObject, options: dict[str, bool]) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = fold(parts_of([text], **options))
    assert fold(parts_of(pieces, **options)) == whole
    assert fold(parts_of(list(text), **options)) == whole


@UNHURRIED
@given(TEXTS, OPTIONS)
def test_content_is_what_was_written_in_order_and_once(text: str, options: dict[str, bool]) -> None:
    content, calls = fold(parts_of([text], **options))
    characters = iter(text)
    assert all(character in characters for character in content or "")
    if not calls:
        assert (content or "") == text


@UNHURRIED
@given(TEXTS)
def test_deltas_are_as_clients_expect(text: str) -> None:
    seen = 0
    for part in parts_of(list(text)):
        if isinstance(part, str):
            assert part
        elif part.id is not None:
            assert (part.index, part.name in NAMES) == (seen, True)
            seen += 1
        else:
            assert (part.index, part.name, part.arguments != "") == (seen - 1, None, True)


@UNHURRIED
@given(TEXTS)
def test_without_parallel_calls_the_first_is_kept_and_content_is_the_same(text: str) -> None:
    content, calls = fold(parts_of([text]))
    assert fold(parts_of([text], parallel=False)) == (content, calls[:1])


# Under a grammar

TAUGHT = {
    "as the template teaches", "no space", "all the space there is", "no arguments", "after ;", "after a line",
    "at once", "raw line breaks", "spaces in text", "escapes", "other letters",
}  # fmt: skip
INSIDE = {"function around", "all forms", "the type last"}


@pytest.mark.parametrize("name", CALLS)
def test_only_the_taught_form_counts_where_a_grammar_holds_it(name: str) -> None:
    text, calls = CALLS[name]
    if name in TAUGHT:
        assert read(text + "<|eot_id|>", taught_only=True) == (None, calls)
    elif name in INSIDE:
        content, found = read(text, taught_only=True)
        assert (content is not None, found) == (True, calls[:1])
    elif not name.startswith("an array"):
        assert read(text, taught_only=True) == (text, [])


@pytest.mark.parametrize("name", CALLS)
def test_calls_at_the_beginning_only(name: str) -> None:
    text, calls = CALLS[name]
    assert read(text, anywhere=False) == (None, calls)
    assert read("x " + text, anywhere=False) == ("x " + text, [])


# What is held back


def steps(text: str) -> list[list[Part]]:
    machine = parser()
    return [machine.feed(character) for character in text]


def test_content_is_held_only_while_it_may_be_a_call() -> None:
    assert steps("a [b] {") == [["a"], [" "], [], ["[b"], ["]"], [" "], []]
    assert steps('{"x') == [[], [], ['{"x']]


def test_a_call_is_given_out_at_its_first_value_and_then_character_by_character() -> None:
    text = '{"name": "f", "parameters": {"a": "xy"}}'
    given_out = steps(text)
    begin = text.index('"xy')
    assert given_out[:begin] == [[]] * begin
    assert given_out[begin:] == [
        [CallDelta(0, "call_0", "f", '{"a": "')],
        [CallDelta(0, None, None, "x")],
        [CallDelta(0, None, None, "y")],
        [CallDelta(0, None, None, '"')],
        [CallDelta(0, None, None, "}")],
        [],
    ]


def test_a_long_string_comes_in_one_delta_a_piece() -> None:
    machine = parser()
    machine.feed('{"name": "f", "parameters": {"a": "')
    assert machine.feed("it's\n" + "x" * 1000) == [CallDelta(0, None, None, "it's\\n" + "x" * 1000)]


def test_calls_are_counted() -> None:
    machine = parser(parallel=False)
    assert machine.num_calls == 0
    machine.feed("[f(), g()]")
    machine.finish()
    assert machine.num_calls == 1


# Hostile text


@pytest.mark.parametrize(
    "unit", ["{", "[", '{"parameters": ', '{"a":', "[f(a=", "[f(a=[", "<", "{ ", '{"function": ', "\\"]
)
def test_repeated_openings_are_content(unit: str) -> None:
    text = unit * 2000
    content, calls = fold(parts_of([text]))
    assert (content, calls) == (text, [])


JSON_CALL = ('{"name": "f", "parameters": {"a": ', "}}")
PYTHONIC_CALL = ("[f(a=", ")]")


@pytest.mark.parametrize(
    ("before", "opening", "closing", "after"),
    [
        (before, opening, closing, after)
        for before, after in (JSON_CALL, PYTHONIC_CALL)
        for opening, closing in (("[", "]"), ('{"b": ', "}"), ("(", ",)"))
        if opening != "(" or (before, after) == PYTHONIC_CALL
    ],
)
def test_deep_nesting_ends_a_call(before: str, opening: str, closing: str, after: str) -> None:
    fits = MAX_DEPTH - 1
    content, calls = fold(parts_of([before + opening * fits + "1" + closing * fits + after]))
    assert (content, len(calls)) == (None, 1)
    for depth in (fits + 1, 100_000):
        content, _ = fold(parts_of([before + opening * depth + "1" + closing * depth + after]))
        assert content is not None
        assert content.endswith("1" + closing * depth + after)


def test_ids_look_like_openais() -> None:
    assert len({new_call_id() for _ in range(100)}) == 100
    assert len(new_call_id()) == len("call_") + 24


def test_folding_joins_deltas() -> None:
    parts = ["a", CallDelta(0, "x", "f", "{"), CallDelta(0, None, None, "}"), "b", CallDelta(1, "y", "g", "{}")]
    assert fold(parts) == ("ab", [Call("x", "f", "{}"), Call("y", "g", "{}")])
    assert fold([]) == (None, [])
