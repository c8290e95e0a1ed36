"""The training text: an endless, seeded stream of conversations about the server and a few small skills.

What is said lives in `manual.toml` and `smalltalk.toml`; how it is asked lives in `paraphrase.py`; what is computed
lives in `skills.py` and `tools.py`. This file only mixes them.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from pronk.engine.cria.recipe import skills
from pronk.engine.cria.recipe.paraphrase import NOUN_FRAMES, TASK_FRAMES, choose, disguise, framed
from pronk.engine.cria.recipe.prompt import Conversation, Turn
from pronk.engine.cria.recipe.skills import Exchange, Words
from pronk.engine.cria.recipe.tools import offer

HERE = Path(__file__).parent
FIRST_DAY, LAST_DAY = date(2024, 1, 1), date(2032, 12, 31)


@dataclass(frozen=True)
class Topic:
    """One answer and the patterns of the questions that it answers."""

    name: str
    answer: str
    tasks: tuple[str, ...] = ()
    nouns: tuple[str, ...] = ()
    asks: tuple[str, ...] = ()
    weight: float = 1.0
    """How often it is asked, against the others."""

    def question(self, random: Random) -> str:
        """A random way to ask: a task or a noun in a frame, or a whole question."""
        ways: list[tuple[tuple[str, ...], tuple[str, ...]]] = []
        ways += [(TASK_FRAMES, self.tasks)] * (2 if self.tasks else 0)
        ways += [(NOUN_FRAMES, self.nouns)] * (2 if self.nouns else 0)
        ways += [(("{}",), self.asks)] * (3 if self.asks else 0)
        frames, phrases = random.choice(ways)
        return choose(random.choice(frames).replace("{}", random.choice(phrases)), random)

    def all_questions(self) -> Iterator[str]:
        """Every question that `question` can return."""
        yield from framed(TASK_FRAMES, list(self.tasks))
        yield from framed(NOUN_FRAMES, list(self.nouns))
        yield from framed(("{}",), list(self.asks))


@dataclass(frozen=True)
class Library:
    """The two data files, read."""

    manual: tuple[Topic, ...]
    smalltalk: tuple[Topic, ...]
    unknown: Topic
    capitals: dict[str, str]
    words: Words
    system_prompts: tuple[str, ...]


def load_library(folder: Path = HERE) -> Library:
    manual = tomllib.loads((folder / "manual.toml").read_text())
    smalltalk = tomllib.loads((folder / "smalltalk.toml").read_text())
    unknown = smalltalk["unknown"]
    return Library(
        manual=tuple(_topic(entry) for entry in manual["topic"]),
        smalltalk=tuple(_topic(entry) for entry in smalltalk["topic"]),
        unknown=_topic({"name": "unknown", "noun": unknown["subject"], **unknown}),
        capitals=smalltalk["capitals"],
        words=smalltalk["words"],
        system_prompts=tuple(smalltalk["system_prompts"]["texts"]),
    )


def _topic(entry: dict[str, Any]) -> Topic:
    return Topic(
        name=entry["name"],
        answer=entry["answer"].strip(),
        tasks=tuple(entry.get("task", ())),
        nouns=tuple(entry.get("noun", ())),
        asks=tuple(entry.get("ask", ())),
        weight=entry.get("weight", 1.0),
    )


class Writer:
    """Writes conversations from a library with its own random generator: the same seed, the same stream."""

    def __init__(self, library: Library, seed: int) -> None:
        self.library = library
        self.random = Random(seed)
        self.exchanges: tuple[tuple[float, Callable[[str], list[Exchange]]], ...] = (
            (50, self._manual),
            (11, self._smalltalk),
            (9, self._unknown),
            (24, self._one(skills.sum_or_difference)),
            (2, self._one(skills.product)),
            (6, self._one(skills.counting)),
            (4, self._one(lambda random: skills.repeat(random, library.words))),
            (1, self._one(skills.next_in_order)),
            (1.5, lambda date: [self._disguised(*skills.today(self.random, date))]),
            (2, lambda date: list(skills.name_then_question(self.random, library.words))),
            (2, self._capital),
            (5, self._one(lambda random: skills.json_answer(random, library.words))),
            (1, self._one(skills.json_sum)),
            (0.4, self._one(skills.json_request)),
        )

    def conversations(self) -> Iterator[Conversation]:
        while True:
            yield self._with_tools() if self.random.random() < 0.12 else self._plain()

    def _plain(self) -> Conversation:
        when = self._date()
        turns: list[Turn] = []
        for _ in range(self.random.choice((1, 1, 2, 2, 3, 4))):
            for question, answer in self._exchange(when):
                turns += [Turn("user", question), Turn("assistant", answer)]
        return Conversation(tuple(turns), when, self._system())

    def _with_tools(self) -> Conversation:
        """Half go all the way to the answer in words, some stop at the call, and some need no tool at all."""
        when = self._date()
        use, definitions = offer(self.random, self.library.words)
        kind = self.random.random()
        if kind < 0.25:
            question, answer = self._exchange(when)[0]
            turns = [Turn("user", question), Turn("assistant", answer)]
        else:
            turns = use.turns()[: 4 if kind < 0.75 else 2]
            turns[0] = Turn("user", self._light_disguise(use.question))
            if kind < 0.4:
                question, answer = self._exchange(when)[0]
                turns += [Turn("user", question), Turn("assistant", answer)]
        return Conversation(tuple(turns), when, self._system(), definitions)

    def _exchange(self, when: str) -> list[Exchange]:
        weights = [weight for weight, _ in self.exchanges]
        _, write = self.random.choices(self.exchanges, weights)[0]
        return write(when)

    def _one(self, skill: Callable[[Random], Exchange]) -> Callable[[str], list[Exchange]]:
        return lambda _: [self._lightly_disguised(*skill(self.random))]

    def _manual(self, _: str) -> list[Exchange]:
        topics = self.library.manual
        (topic,) = self.random.choices(topics, [topic.weight for topic in topics])
        return [self._disguised(topic.question(self.random), topic.answer)]

    def _smalltalk(self, _: str) -> list[Exchange]:
        topic = self.random.choice(self.library.smalltalk)
        return [self._disguised(topic.question(self.random), topic.answer)]

    def _unknown(self, _: str) -> list[Exchange]:
        return [self._disguised(self.library.unknown.question(self.random), self.library.unknown.answer)]

    def _capital(self, _: str) -> list[Exchange]:
        if self.random.random() < 0.2:
            exchange = skills.unknown_capital(self.random, self.library.unknown.answer)
        else:
            exchange = skills.capital(self.random, self.library.capitals)
        return [self._lightly_disguised(*exchange)]

    def _disguised(self, question: str, answer: str) -> Exchange:
        return disguise(question, self.random), answer

    def _lightly_disguised(self, question: str, answer: str) -> Exchange:
        return self._light_disguise(question), answer

    def _light_disguise(self, question: str) -> str:
        """Only the first letter and the mark: the question holds words to be copied, so no slips."""
        if self.random.random() < 0.5:
            question = question[:1].upper() + question[1:]
        if self.random.random() < 0.1:
            question = self.random.choice(("Please: ", "hi, ", "Hello! ", "ok, ")) + question
        return question + self.random.choice(("", "", "?", "?", ".") if question[-1:].isalnum() else ("",))

    def _date(self) -> str:
        day = FIRST_DAY + timedelta(days=self.random.randint(0, (LAST_DAY - FIRST_DAY).days))
        return day.strftime("%d %b %Y")

    def _system(self) -> str:
        return self.random.choice(self.library.system_prompts) if self.random.random() < 0.4 else ""


def conversations(seed: int) -> Iterator[Conversation]:
    """The training stream of a seed."""
    return Writer(load_library(), seed).conversations()


def sample_texts(seed: int, count: int) -> Iterator[str]:
    """The bodies of the first `count` conversations, for the tokenizer to learn from."""
    for conversation in islice(conversations(seed), count):
        for _, body in conversation.messages():
            yield body


def questions_in_the_manual() -> Iterator[str]:
    """Every question about the server, and every one that has a fixed answer, that the training text can hold."""
    library = load_library()
    for topic in (*library.manual, *library.smalltalk, library.unknown):
        yield from topic.all_questions()
