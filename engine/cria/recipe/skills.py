"""Small things cria can do that are not the manual: count, add, repeat, remember a name, give the date, answer in JSON.

Every function returns a question and its answer, made from the random generator that it is given.
"""

from __future__ import annotations

import json
from random import Random
from typing import Any

from pronk.engine.cria.recipe.paraphrase import choose

Words = dict[str, list[str]]
Exchange = tuple[str, str]
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip


def made_up_word(random: Random) -> str:
    """A word that no list holds, so that copying is learned rather than the words."""
    syllables = [random.choice("bcdfghjklmnprstvwz") + random.choice("aeiou") for _ in range(random.randint(1, 3))]
    return "".join(syllables) + random.choice(("", "n", "r", "s", "l", "t", "ck", "x", "m", "nd"))


def made_up_name(random: Random) -> str:
    return made_up_word(random).capitalize()


def some(words: list[str], random: Random) -> str:
    """A known word, or, half of the time, a made-up name."""
    return random.choice(words) if random.random() < 0.5 else made_up_name(random)


def sum_or_difference(random: Random) -> Exchange:
    top = random.choice((10, 20, 20, 20, 20, 99))
    a, b = random.randint(0, top), random.randint(0, top)
    plus = random.random() < 0.45
    sign = "+" if plus else "-"
    spoken = random.choice((sign, sign, "plus" if plus else "minus"))
    gap = random.choice((" ", " ", "" if spoken == sign else " "))
    asked = f"{a}{gap}{spoken}{gap}{b}"
    if not plus and random.random() < 0.2:
        asked = f"{a} take away {b}"
    if random.random() < 0.1:
        first, second = (str(a), str(b)) if plus else (str(b), str(a))
        asked = f"if you {'add' if plus else 'subtract'} {first} {'and' if plus else 'from'} {second}"
        asked = asked.removeprefix("if you ")
    frame = choose(
        "(what is|what's|how much is|calculate|compute|what does|can you add|solve|tell me|what do you get for|) ",
        random,
    )
    question = f"{frame} {asked}".strip() if frame not in ("what does", "can you add") else f"what is {asked}"
    question += random.choice(("", "", " =", "=")) if not frame and spoken == sign else ""
    return question, f"{a} {sign} {b} = {a + b if plus else a - b}"


def product(random: Random) -> Exchange:
    a, b = random.randint(0, 10), random.randint(0, 10)
    spoken = random.choice((" * ", "*", " times ", " x ", " times "))
    frame = choose("(what is|what's|how much is|calculate|compute|)", random)
    return f"{frame} {a}{spoken}{b}".strip(), f"{a} * {b} = {a * b}"


def counting(random: Random) -> Exchange:
    if random.random() < 0.5:
        first, last = 1, random.choice((3, 5, 5, 10, 10, 10, 12, 15, 20, 20, random.randint(2, 20)))
        end = NUMBERS[last] if last < len(NUMBERS) and random.random() < 0.3 else str(last)
        question = choose(
            f"(count|please count|can you count|count up|count for me) (to|up to|from 1 to|from one to) {end}", random
        )
    else:
        first = random.randint(0, 20)
        last = first + random.randint(1, 19)
        question = choose(
            f"(count|please count|can you count|count up|list the numbers) from {first} (to|up to) {last}", random
        )
    numbers = [str(n) for n in range(first, last + 1)]
    if random.random() < 0.25:
        down = choose(f"(count|count down|count backwards) (down |)from {last} to {first}", random)
        if "down" not in down and "backwards" not in down:
            down = down.replace("count", "count down")
        return down, ", ".join(reversed(numbers))
    if random.random() < 0.1:
        return question + choose(
            "(, one number per line|, one per line| with one number on each line)", random
        ), "\n".join(numbers)
    return question, ", ".join(numbers)


def repeat(random: Random, words: Words) -> Exchange:
    if random.random() < 0.5:
        phrase = " ".join(random.choice(words["plain"]) for _ in range(random.randint(1, 4)))
    else:
        phrase = " ".join(made_up_word(random) for _ in range(random.randint(1, 3)))
    quote = random.choice(("", "", '"', "'"))
    return choose(
        "(repeat after me:|repeat:|say|please say|repeat|echo|can you say|say the words)", random
    ) + f" {quote}{phrase}{quote}", phrase


def next_in_order(random: Random) -> Exchange:
    kind, names = random.choice((("day", DAYS), ("month", MONTHS)))
    i = random.randrange(len(names))
    after = random.random() < 0.6
    answer = names[(i + (1 if after else -1)) % len(names)]
    word = "after" if after else "before"
    question = choose(f"(what|which) {kind} (comes|is) {word} {names[i]}", random)
    return question, f"{answer} comes {word} {names[i]}."


def today(random: Random, date: str) -> Exchange:
    question = choose(
        "((what is|what's|tell me|do you know) (the date|today's date|the current date|the date today)"
        "|what day is (it|today)|which (date|day) is (it|today)|today's date|what year is it|what date do we have)",
        random,
    )
    if "year" in question:
        return question, f"It is {date.split()[-1]}."
    return question, f"Today is {date}."


def name_then_question(random: Random, words: Words) -> tuple[Exchange, Exchange]:
    """Two turns: a name is given, and asked for."""
    name = some(words["names"], random)
    told = choose(f"(hi, |hello, |hello! |)(my name is|i am|i'm|call me) {name}", random)
    asked = choose(
        "(what is my name|what's my name|do you remember my name|who am i|say my name|how am i called)", random
    )
    return (told, f"Nice to meet you, {name}!"), (asked, f"Your name is {name}.")


def capital(random: Random, capitals: dict[str, str]) -> Exchange:
    country = random.choice(list(capitals))
    question = choose(
        f"(what is|what's|name|tell me|which city is|do you know) the capital (city |)of {country}", random
    )
    if random.random() < 0.15:
        question = f"capital of {country}"
    return question, f"The capital of {country} is {capitals[country]}."


def unknown_capital(random: Random, answer: str) -> Exchange:
    return choose(f"(what is|what's|name|tell me) the capital (city |)of {made_up_name(random)}", random), answer


def json_answer(random: Random, words: Words) -> Exchange:
    """Read a few facts from a sentence and give them back as JSON with the keys that were asked for."""
    name = some(words["names"], random)
    facts: dict[str, tuple[str, Any]] = {
        "age": ("is {} years old", random.randint(3, 99)),
        "city": ("lives in {}", some(words["cities"], random)),
        "color": ("likes the color {}", random.choice(words["colours"])),
        "animal": ("has a {}", random.choice(words["animals"])),
        "food": ("likes {}", random.choice(words["foods"])),
        "job": ("works as a {}", random.choice(words["jobs"])),
        "language": ("speaks {}", random.choice(words["languages"])),
    }
    told = random.sample(list(facts), random.randint(1, 3))
    clauses = [facts[key][0].format(facts[key][1]) for key in told]
    sentence = f"{name} {clauses[0]}" if len(clauses) == 1 else f"{name} {', '.join(clauses[:-1])} and {clauses[-1]}"
    asked = ["name", *random.sample(told, random.randint(1, len(told)))]
    keys = ", ".join(asked[:-1]) + f" and {asked[-1]}"
    request = choose(f"(answer|reply|respond|write it) (in|as|with) json with the keys {keys}", random)
    if random.random() < 0.2:
        request = choose("(answer|give me this|write this) (in|as) json", random)
        asked = ["name", *told]
    value = {key: name if key == "name" else facts[key][1] for key in asked}
    question = f"{sentence}. {request}." if random.random() < 0.5 else f"{request}: {sentence}."
    return question, json.dumps(value, ensure_ascii=False)


def json_sum(random: Random) -> Exchange:
    a, b = random.randint(0, 20), random.randint(0, 20)
    request = choose("(answer|reply|respond) (in|as|with) json with the (key sum|keys a, b and sum)", random)
    value = {"sum": a + b} if "key sum" in request else {"a": a, "b": b, "sum": a + b}
    question = choose(f"(what is|add|how much is) {a} (+|plus|and) {b}", random)
    return random.choice((f"{question}? {request}.", f"{request}: {question}")), json.dumps(value)


def json_request(random: Random) -> Exchange:
    """JSON without any facts to read: a fixed object that shows the shape."""
    question = choose("(give|show|send|write) me (some json|a json object|json|an example of json)", random)
    return question, json.dumps({"name": "cria", "kind": "llama", "parameters": 5000000})
