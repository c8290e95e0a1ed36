"""What cria answers: the embedded checkpoint, run by transformers in float32 and greedily, on its own manual.

`cria_questions.toml` holds the questions and the words of a right answer. Each answer must end by itself.
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import pronk.engine.cria
from pronk.engine.config import EngineConfig, replace
from pronk.engine.cria.recipe import bpe, corpus
from pronk.engine.cria.recipe.paraphrase import normalise
from pronk.engine.cria.recipe.prompt import Conversation, Turn, load_encoding, render_prompt
from pronk.engine.llm import LLM
from pronk.engine.request import SamplingParams
from pronk.engine.tokenizer import load_vocabulary
from pronk.server.chat.template import Message
from pronk.server.loading import read_text_side

CRIA = Path(pronk.engine.cria.__file__).parent
QUESTIONS = tomllib.loads((Path(__file__).parent / "cria_questions.toml").read_text())
LONGEST_ANSWER = 260
"""Tokens; the story is the longest answer."""
KNOWN_WRONG: list[str] = []
"""What this checkpoint does not answer as it should; the model card says so too."""
RIGHT_OF_HELDOUT = 0.5
"""The least part of the held-out questions that must be answered right. The model card says how many are."""


@dataclass(frozen=True)
class Answer:
    text: str
    ended: bool


@dataclass(frozen=True)
class Judged:
    question: str
    answer: Answer
    right: bool


def answer_all(conversations: list[Conversation]) -> list[Answer]:
    """Greedy answers, all conversations in one left-padded batch."""
    from transformers import LlamaForCausalLM

    encoding = load_encoding(bpe.read(CRIA / "tokenizer.model"))
    model = LlamaForCausalLM.from_pretrained(CRIA, dtype=torch.float32).eval()
    pad, end = (encoding.encode_single_token(name) for name in ("<|finetune_right_pad_id|>", "<|eot_id|>"))
    prompts = [render_prompt(talk, encoding) for talk in conversations]
    length = max(map(len, prompts))
    tokens = torch.tensor([[pad] * (length - len(prompt)) + prompt for prompt in prompts])
    with torch.no_grad():
        generated: Any = model.generate(
            tokens,
            attention_mask=(tokens != pad).long(),
            max_new_tokens=LONGEST_ANSWER,
            do_sample=False,
            temperature=None,
            top_p=None,
            pad_token_id=pad,
        )
    answers = []
    for row in generated[:, length:].tolist():
        said = row[: row.index(end)] if end in row else row
        answers.append(Answer(encoding.decode(said), end in row))
    return answers


def ask(question: str) -> Conversation:
    return Conversation((Turn("user", question),), date="24 Nov 2026")


@cache
def judged(kind: str) -> list[Judged]:
    entries = QUESTIONS[kind]
    answers = answer_all([ask(entry["ask"]) for entry in entries])
    return [
        Judged(
            entry["ask"], answer, answer.ended and all(fact.lower() in answer.text.lower() for fact in entry["hold"])
        )
        for entry, answer in zip(entries, answers, strict=True)
    ]


def wrong(kind: str) -> list[tuple[str, str]]:
    return [(each.question, each.answer.text) for each in judged(kind) if not each.right]


def test_the_manuals_questions_are_answered_right() -> None:
    assert [question for question, _ in wrong("seen")] == KNOWN_WRONG


def test_heldout_paraphrases_are_mostly_answered_right() -> None:
    right = len(QUESTIONS["heldout"]) - len(wrong("heldout"))
    print(f"{right} of {len(QUESTIONS['heldout'])} held-out questions are answered right; wrong: {wrong('heldout')}")
    assert right >= RIGHT_OF_HELDOUT * len(QUESTIONS["heldout"])


@pytest.mark.parametrize("kind", ["seen", "heldout"])
def test_every_answer_ends_by_itself(kind: str) -> None:
    assert [each.question for each in judged(kind) if not each.answer.ended] == []


def test_heldout_questions_are_not_in_the_training_text() -> None:
    known = {normalise(question) for question in corpus.questions_in_the_manual()}
    assert [entry["ask"] for entry in QUESTIONS["heldout"] if normalise(entry["ask"]) in known] == []
    assert len(QUESTIONS["heldout"]) >= 40


def test_the_day_and_the_system_prompt_do_not_matter() -> None:
    question = Turn("user", "How do I stream the answer?")
    talks = [
        Conversation((question,), date=day, system=system)
        for day in ("01 Jan 2024", "29 Feb 2028", "31 Dec 2032")
        for system in ("", "You are a helpful assistant.", "You answer in short sentences about software.")
    ]
    answers = answer_all(talks)
    assert all('"stream": true' in answer.text and answer.ended for answer in answers), answers


def test_small_sums_and_differences_are_right() -> None:
    pairs = [(a, b) for a in range(0, 21, 4) for b in range(1, 21, 3)]
    plus = answer_all([ask(f"What is {a} + {b}?") for a, b in pairs])
    minus = answer_all([ask(f"what is {a} - {b}") for a, b in pairs])
    assert [answer.text for answer in plus] == [f"{a} + {b} = {a + b}" for a, b in pairs]
    assert [answer.text for answer in minus] == [f"{a} - {b} = {a - b}" for a, b in pairs]


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_current_weather",
        "description": "Get the current weather in a given location",
        "parameters": {"type": "object", "properties": {"location": {"type": "string"}}, "required": ["location"]},
    },
}


def test_a_tool_is_called_and_its_result_is_told() -> None:
    question = Turn("user", "What is the weather in Paris?")
    (call,) = answer_all([Conversation((question,), date="24 Nov 2026", tools=(WEATHER,))])
    assert json.loads(call.text) == {"name": "get_current_weather", "parameters": {"location": "Paris"}}
    result = Turn("ipython", json.dumps(json.dumps({"temperature": 21, "condition": "sunny"})))
    talk = Conversation((question, Turn("assistant", call.text), result), date="24 Nov 2026", tools=(WEATHER,))
    (told,) = answer_all([talk])
    assert "21" in told.text
    assert "sunny" in told.text


def test_an_answer_in_json_has_the_keys_that_were_asked_for() -> None:
    asked = "Answer in JSON with the keys name and age: Ada is 36 years old."
    (answer,) = answer_all([ask(asked)])
    assert json.loads(answer.text) == {"name": "Ada", "age": 36}


def test_a_conversation_goes_on() -> None:
    turns = (
        Turn("user", "Hi, my name is Ada"),
        Turn("assistant", "Nice to meet you, Ada!"),
        Turn("user", "What is my name?"),
    )
    (answer,) = answer_all([Conversation(turns, date="24 Nov 2026")])
    assert answer.text == "Your name is Ada."


def test_pronk_answers_as_right_as_transformers_does() -> None:
    """The same questions through Pronk's own template, tokenizer and engine, in the checkpoint's own bfloat16."""
    _, template, _ = read_text_side(CRIA)
    vocabulary = load_vocabulary(CRIA)
    llm = LLM(replace(EngineConfig(model=str(CRIA)), memory="64MiB"))
    entries = QUESTIONS["seen"]
    prompts = [template.render([Message("user", entry["ask"])]) for entry in entries]
    params = SamplingParams(temperature=0, max_tokens=LONGEST_ANSWER)
    answers = llm.generate(prompts, params)
    texts = [b"".join(map(vocabulary.token_bytes, answer.token_ids)).decode() for answer in answers]
    missed = [
        entry["ask"]
        for entry, text in zip(entries, texts, strict=True)
        if not all(fact.lower() in text.lower() for fact in entry["hold"])
    ]
    assert missed == KNOWN_WRONG
    assert {answer.finish_reason for answer in answers} == {"stop"}
