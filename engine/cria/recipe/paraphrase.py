"""Many ways to ask one thing: patterns with choices, question frames, and the slips of a hurried typist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product
from random import Random

TASK_FRAMES = (
    "(how|how) (do|can|could|would|should) (i|i|i|we|you) {}",
    "how to {}",
    "how do i {}",
    "how can one {}",
    "i (want|would like|need|wish|am trying) to {}",
    "i('d| would) like to {}",
    "(show|tell) me how to {}",
    "(can|could) you (show|tell|explain to) me how to {}",
    "what do i (need|have) to do to {}",
    "what (must|should) i do to {}",
    "is (there a way|it possible) to {}",
    "can i {}",
    "(what is|what's) the (way|best way|easiest way|right way) to {}",
    "please (tell me|explain) how to {}",
    "(help me|help me to) {}",
    "how (do|does) (i|one) {} (here|with pronk|with this server|in pronk)",
    "how can i {} (here|with pronk|on this server|quickly|easily)",
    "{}",
    "let me {}",
    "i don't know how to {}",
    "what('s| is) needed to {}",
    "steps to {}",
    "what command do i use to {}",
    "(any idea|do you know|i was wondering) how to {}",
    "how is it possible to {}",
    "what if i want to {}",
    "which (option|setting|command) (lets me|helps me|is there to) {}",
    "my (plan|goal|task) is to {}",
    "we (want|need) to {}",
    "{}, how",
    "{}, (please|can you help)",
    "(before i go on, |first, |next, )(i|we) (want|need|have) to {}",
    "it would be (nice|good|great) to {}",
    "(am i|are we) able to {}",
    "i (tried|failed) to {}",
)
NOUN_FRAMES = (
    "what (is|are) {}",
    "what is {}",
    "what's {}",
    "(tell|inform) me about {}",
    "tell me (more|something) about {}",
    "(explain|describe) {}",
    "can you (explain|describe) {}",
    "(can|could) you tell me about {}",
    "i want to know about {}",
    "what (do you know|can you tell me) about {}",
    "{}",
    "{}?",
    "{} please",
    "what about {}",
    "(and|and what about) {}",
    "what does {} (do|mean)",
    "how does {} work",
    "how (do|can|should) i use {}",
    "what is {} (for|good for|used for)",
    "(help|info|information) (with|on|about) {}",
    "i have a question about {}",
    "i don't understand {}",
    "what is meant by {}",
    "give me (details|information) (on|about) {}",
    "please (explain|describe) {}",
    "define {}",
    "when (do|should) i use {}",
    "where can i (find|read) (out |)about {}",
    "i (read|heard) about {}",
    "(somebody|my colleague|the readme) mentioned {}",
    "i wonder what {} is",
    "do you (have|know) {}",
    "is there {}",
    "i (need|want|miss|am looking for) {}",
    "(where|how) do i (see|find|get|set) {}",
    "{}, what is (it|that)",
    "(talk|speak) to me about {}",
)
OPENINGS = (
    "",
    "",
    "",
    "",
    "",
    "",
    "hi, ",
    "hello, ",
    "hey, ",
    "please, ",
    "ok, ",
    "so ",
    "quick question: ",
    "sorry, ",
    "excuse me, ",
    "um, ",
    "hey cria, ",
    "question: ",
    "also, ",
    "and ",
)
CLOSINGS = ("", "", "", "", "", "", "", " please", " thanks", ", please", " exactly", " for me", " now", " again")
REMARKS = (
    "i am new here", "i just installed it", "i have a question", "we use it at work", "i am a student",
    "i read the readme", "it runs now", "this is my first try", "my boss asked me", "i am in a hurry",
    "i am not an expert", "it is late", "nice project", "i am stuck", "maybe you know this", "i looked everywhere",
    "i use linux", "my friend told me about it", "i could not find it", "i have been trying for an hour",
    "everything is ready", "i like llamas", "one more thing",
)  # fmt: skip
SYNONYMS = {
    "server": ("service", "program", "thing", "machine"),
    "answer": ("reply", "response", "output", "text"),
    "answers": ("replies", "responses", "outputs"),
    "get": ("obtain", "receive", "have"),
    "set": ("specify", "configure", "define", "adjust"),
    "change": ("modify", "alter", "adjust", "pick another"),
    "use": ("work with", "employ", "try", "apply"),
    "start": ("launch", "run", "boot", "bring up", "fire up"),
    "run": ("start", "execute", "operate"),
    "stop": ("end", "halt", "finish"),
    "show": ("display", "print", "give"),
    "see": ("view", "look at", "check", "watch"),
    "limit": ("restrict", "cap", "bound"),
    "load": ("open", "read", "bring in"),
    "send": ("pass", "give", "post"),
    "flag": ("switch", "option", "argument", "setting"),
    "request": ("call", "query", "question"),
    "requests": ("calls", "queries", "questions"),
    "model": ("checkpoint", "network", "llm"),
    "error": ("problem", "failure"),
    "what": ("which",),
    "tell": ("explain to", "say to"),
    "many": ("lots of", "a lot of"),
    "several": ("two", "many", "more than one"),
    "support": ("offer", "allow", "know", "handle"),
    "supported": ("allowed", "available", "possible"),
    "disable": ("turn off", "deactivate", "get rid of"),
    "enable": ("turn on", "activate"),
    "memory": ("ram",),
    "users": ("people", "clients", "visitors"),
}
_CHOICE = re.compile(r"\(([^()]*\|[^()]*)\)")


def choose(pattern: str, random: Random) -> str:
    """Replace every (a|b) of a pattern, which may be nested, with one of its choices."""
    while found := _CHOICE.search(pattern):
        pattern = pattern[: found.start()] + random.choice(found[1].split("|")) + pattern[found.end() :]
    return " ".join(pattern.split())


def expand(pattern: str) -> Iterator[str]:
    """Every string that `choose` can return for the pattern."""
    found = _CHOICE.search(pattern)
    if found is None:
        yield " ".join(pattern.split())
        return
    for choice in found[1].split("|"):
        yield from expand(pattern[: found.start()] + choice + pattern[found.end() :])


def framed(frames: tuple[str, ...], phrases: list[str]) -> Iterator[str]:
    """Every phrase in every frame, all choices expanded."""
    for frame, phrase in product(frames, phrases):
        yield from expand(frame.replace("{}", phrase))


def normalise(question: str) -> str:
    """Lower case, with nothing but letters, digits and single spaces: what two askings must share to be the same."""
    return " ".join(re.sub(r"[^a-z0-9]+", " ", question.lower()).split())


def disguise(question: str, random: Random) -> str:
    """The same question as people really type it: greeted, capitalised or not, with or without a mark, with slips."""
    if random.random() < 0.3:
        question = reword(question, random)
    if random.random() < 0.15:
        question = leave_out(question, random)
    if random.random() < 0.12:
        question = remark(question, random)
    elif random.random() < 0.3:
        question = random.choice(OPENINGS) + question + random.choice(CLOSINGS)
    if random.random() < 0.25:
        question = slip(question, random)
    if random.random() < 0.5:
        question = question[:1].upper() + question[1:]
        question = re.sub(r"\bi\b", "I", question)
    elif random.random() < 0.04:
        question = question.upper()
    if question[-1:].isalnum():
        question += random.choice(("?", "?", "?", "?", "", "", "", ".", "!", " ?", "??"))
    return question


def reword(question: str, random: Random) -> str:
    """Every word that has synonyms is, half of the time, one of them."""
    words = question.split(" ")
    return " ".join(
        random.choice(SYNONYMS[word]) if word in SYNONYMS and random.random() < 0.5 else word for word in words
    )


def leave_out(question: str, random: Random) -> str:
    """Without one or two of its words, if it has five or more: the others must be enough to go by."""
    words = question.split(" ")
    for _ in range(random.choice((1, 2)) if len(words) >= 5 else 0):
        del words[random.randrange(len(words))]
    return " ".join(words)


def remark(question: str, random: Random) -> str:
    """With a sentence before or after it that has nothing to do with it."""
    said = random.choice(REMARKS)
    return f"{said}. {question}" if random.random() < 0.7 else f"{question}? {said}"


def slip(text: str, random: Random) -> str:
    """One or two typing slips: a letter dropped, doubled, swapped with its neighbour or replaced."""
    for _ in range(random.choice((1, 1, 2))):
        places = [i for i in range(1, len(text) - 1) if text[i].isalpha() and text[i + 1].isalpha()]
        if not places:
            return text
        i = random.choice(places)
        text = random.choice(
            (
                text[:i] + text[i + 1 :],
                text[:i] + text[i] + text[i:],
                text[:i] + text[i + 1] + text[i] + text[i + 2 :],
                text[:i] + random.choice("abcdefghijklmnopqrstuvwxyz") + text[i + 1 :],
            )
        )
    return text
