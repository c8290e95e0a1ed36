"""ToolCalls: what the prompt shows, which texts count as calls, and what a client is told of the end."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from pronk.engine.grammar import GrammarCompiler
from pronk.engine.request import Grammar
from pronk.engine.tokenizer import Tokenizer, Vocabulary, llama_special_tokens
from pronk.server.chat.template import ChatTemplate, TemplateFamily, normalise
from pronk.server.chat.tool_grammar import MOST_CALLS
from pronk.server.chat.tool_parser import fold
from pronk.server.chat.tools import Choice, Function, ToolCalls
from pronk.server.protocol.common import Body, parse
from pronk.server.protocol.tools import Tools, read_tools

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "chat_template_golden.json").read_text(encoding="utf-8"))
FAMILIES = {
    "llama-3.1/3.3-instruct": TemplateFamily.LLAMA_3_1,
    "llama-3.2-text-instruct": TemplateFamily.LLAMA_3_2,
}
VOCABULARY = Vocabulary(tuple(bytes([byte]) for byte in range(256)), llama_special_tokens(256))
BYTES = Tokenizer(VOCABULARY)
END_OF_TURN = BYTES.special("<|eot_id|>")

F, G = Function("f", "Does f."), Function("g", None, {"type": "object", "properties": {"a": {}}}, strict=True)
USER = {"role": "user", "content": "x"}


# The prompt


class Fields(Body):
    tools: Tools


@pytest.mark.parametrize(
    "case", [case for case in GOLDEN["cases"] if case["tools"]], ids=lambda case: str(case["name"])
)
def test_a_client_gets_the_prompt_of_the_checkpoints_own_template(case: dict[str, Any]) -> None:
    calls = read_tools(parse(Fields, json.dumps({"tools": case["tools"]}).encode()).tools)
    assert calls is not None
    messages = [as_a_client_sends_it(message) for message in case["messages"]]
    options = {**calls.render_args(messages), **case["options"]}
    token_ids = ChatTemplate(BYTES, FAMILIES[case["template"]]).render(normalise(messages), **options)
    assert BYTES.decode(token_ids, skip_special_tokens=False) == case["expected_prompt"]


def as_a_client_sends_it(message: dict[str, Any]) -> dict[str, Any]:
    """With arguments as text."""
    calls = []
    for call in message.get("tool_calls", []):
        function = {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}
        calls.append({"id": "1", "type": "function", "function": function})
    return {**message, **({"tool_calls": calls} if calls else {})}


def test_a_definition_has_what_llama_was_trained_on_in_that_order() -> None:
    assert json.dumps(F.definition) == (
        '{"type": "function", "function": {"name": "f", "description": "Does f.", '
        '"parameters": {"type": "object", "properties": {}}}}'
    )
    assert list(G.definition["function"]) == ["name", "parameters"]


@pytest.mark.parametrize(
    ("choice", "shown"),
    [
        (Choice(), "fg"),
        (Choice("required"), "fg"),
        (Choice("required", frozenset("g"), named=True), "fg"),
        (Choice("auto", frozenset("g")), "g"),
        (Choice("required", frozenset("g")), "g"),
        (Choice("none"), ""),
    ],
)
def test_which_functions_the_prompt_shows(choice: Choice, shown: str) -> None:
    options = ToolCalls((F, G), choice).render_args([USER])
    assert [tool["function"]["name"] for tool in options.get("tools", [])] == list(shown)
    assert ("tools" in options) is bool(shown)


@pytest.mark.parametrize(
    ("roles", "in_user_message"),
    [
        (["user"], True),
        (["system", "user"], True),
        (["developer", "user", "assistant"], True),
        (["system"], False),
        (["system", "system", "user"], False),
        (["assistant", "user"], False),
        (["system", "assistant"], False),
        (["user", "system"], True),
    ],
)
def test_where_the_definitions_stand(roles: list[str], in_user_message: bool) -> None:
    messages = [{"role": role, "content": f"{place}."} for place, role in enumerate(roles)]
    options = ToolCalls((F,)).render_args(messages)
    assert options["tools_in_user_message"] is in_user_message
    prompt = BYTES.decode(ChatTemplate(BYTES).render(normalise(messages), **options))
    assert all(f"{place}." in prompt for place in range(len(roles)))
    assert '"name": "f"' in prompt
    assert "Environment: ipython" in prompt


def test_a_conversation_that_begins_with_a_call_keeps_it() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "1", "content": "y"}]
    prompt = BYTES.decode(ChatTemplate(BYTES).render(normalise(messages), **ToolCalls((F,)).render_args(messages)))
    assert '{"name": "f", "parameters": {"a": 1}}' in prompt


# The answer

TAUGHT = '{"name": "f", "parameters": {}}'


def read(calls: ToolCalls, text: str, response_format: Grammar | None = None) -> tuple[str | None, list[str]]:
    parser = calls.parser(response_format)
    assert parser is not None
    content, found = fold(parser.feed(text) + parser.finish())
    return content, [call.name for call in found]


def test_without_a_choice_of_calls_there_is_no_parser() -> None:
    assert ToolCalls((F, G), Choice("none")).parser() is None


def test_only_what_may_be_called_counts() -> None:
    text = f"[f(), g()] {TAUGHT}"
    assert read(ToolCalls((F,)), text) == (", g()] ", ["f", "f"])
    assert read(ToolCalls((F, Function("g")), Choice("auto", frozenset("g"))), "[g(), f()]") == (", f()]", ["g"])
    assert read(ToolCalls((F,), parallel=False), text) == (", g()] ", ["f"])


def test_under_a_grammar_only_what_it_holds_counts() -> None:
    assert read(ToolCalls((F, G)), f"[f()] {TAUGHT}") == ("[f()] ", ["f"])
    assert read(ToolCalls((F,), Choice("required")), f"x {TAUGHT}") == (f"x {TAUGHT}", [])
    assert read(ToolCalls((F,)), f"x {TAUGHT}", Grammar("json", "{}")) == (f"x {TAUGHT}", [])
    assert read(ToolCalls((F,)), TAUGHT, Grammar("json", "{}")) == (None, ["f"])


@pytest.mark.parametrize(
    ("reason", "text", "legacy", "told"),
    [
        ("stop", "x", False, "stop"),
        ("stop", TAUGHT, False, "tool_calls"),
        ("stop", TAUGHT, True, "function_call"),
        ("stop", TAUGHT + " x", False, "tool_calls"),
        ("length", TAUGHT, False, "length"),
        ("length", "x", False, "length"),
        (None, TAUGHT, False, None),
    ],
)
def test_the_end_that_a_client_is_told(reason: str | None, text: str, legacy: bool, told: str | None) -> None:
    calls = ToolCalls((F,), parallel=not legacy, legacy=legacy)
    parser = calls.parser()
    assert parser is not None
    parser.feed(text)
    parser.finish()
    assert calls.finish_reason(reason, parser) == told


def test_without_a_parser_the_end_stays_what_it_is() -> None:
    assert ToolCalls((F,), Choice("none")).finish_reason("stop", None) == "stop"


# Random tokens under the grammar

TRIP: dict[str, Any] = {
    "type": "object",
    "properties": {
        "to": {"type": "string", "maxLength": 8},
        "days": {"type": "integer", "minimum": 1, "maximum": 30},
        "by": {"enum": ["train", "foot"]},
        "stops": {"type": "array", "items": {"$ref": "#/$defs/stop"}, "maxItems": 2},
    },
    "required": ["to", "days", "by", "stops"],
    "additionalProperties": False,
    "$defs": {
        "stop": {
            "type": "object",
            "properties": {"at": {"type": "string", "pattern": "^[A-Z][a-z]{1,5}$"}, "sleep": {"type": "boolean"}},
            "required": ["at", "sleep"],
            "additionalProperties": False,
        }
    },
}
TRAVEL, REST = Function("travel", None, TRIP, strict=True), Function("rest")
SCHEMAS = {"travel": TRIP, "rest": {"type": "object", "maxProperties": 0}}
COMPILER = GrammarCompiler(VOCABULARY, [END_OF_TURN])
MOST_TOKENS = 20_000


def sampled(grammar: Grammar | None, draw: random.Random, begin: str = "") -> str:
    """What a model of random weights writes after `begin`, ending where the grammar ends or, if it may, at one time out
    of four."""
    assert grammar is not None
    matcher = COMPILER.compile(grammar)
    tokens = list(begin.encode())
    for token in tokens:
        matcher.accept(token)
    while not matcher.done:
        words = matcher.mask(MOST_TOKENS - len(tokens)).view(np.uint32)
        allowed = [token for token in range(VOCABULARY.size) if words[token // 32] >> (token % 32) & 1]
        token = END_OF_TURN if END_OF_TURN in allowed and draw.random() < 0.25 else draw.choice(allowed)
        matcher.accept(token)
        tokens.append(token)
    return BYTES.decode(tokens)


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("seed", range(15))
@pytest.mark.parametrize(
    "choice", [Choice("required"), Choice("required", frozenset(("travel",)), named=True)], ids=["required", "named"]
)
def test_a_model_of_random_weights_cannot_miss(choice: Choice, parallel: bool, seed: int) -> None:
    calls = ToolCalls((TRAVEL, REST), choice, parallel=parallel)
    parser = calls.parser()
    assert parser is not None
    content, found = fold(parser.feed(sampled(calls.grammar(), random.Random(seed))) + parser.finish())
    assert content is None
    assert 1 <= len(found) <= (MOST_CALLS if parallel and not choice.named else 1)
    assert calls.finish_reason("stop", parser) == "tool_calls"
    for call in found:
        assert choice.names is None or call.name in choice.names
        jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])


@pytest.mark.parametrize("seed", range(15))
def test_a_model_that_may_choose_calls_or_keeps_to_the_format(seed: int) -> None:
    calls = ToolCalls((TRAVEL, REST))
    response_format = Grammar("json", json.dumps(TRIP["$defs"]["stop"]))
    text = sampled(calls.grammar(response_format), random.Random(seed))
    parser = calls.parser(response_format)
    assert parser is not None
    content, found = fold(parser.feed(text) + parser.finish())
    assert (content is None) is bool(found)
    if content is not None:
        jsonschema.validate(json.loads(content), TRIP["$defs"]["stop"])
    for call in found:
        jsonschema.validate(json.loads(call.arguments), {**SCHEMAS, "rest": {"type": "object"}}[call.name])


@pytest.mark.parametrize("begin", ['{"name": "travel"', 'So:\n{ "name":"travel"'])
@pytest.mark.parametrize("seed", range(5))
def test_a_call_that_a_model_begins_by_itself_keeps_to_a_strict_schema(begin: str, seed: int) -> None:
    calls = ToolCalls((TRAVEL, REST))
    parser = calls.parser()
    assert parser is not None
    text = sampled(calls.grammar(), random.Random(seed), begin)
    content, found = fold(parser.feed(text) + parser.finish())
    assert (content, found[0].name) == (begin.partition("{")[0] or None, "travel")
    for call in found:
        jsonschema.validate(json.loads(call.arguments), {**SCHEMAS, "rest": {"type": "object"}}[call.name])
