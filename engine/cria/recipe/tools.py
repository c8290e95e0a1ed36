"""Conversations with tools: choose the function that fits, fill its parameters from the question, say the result.

Function names, parameter names and descriptions vary, and many values are made up, so that the model learns to read the
definition instead of remembering it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from pronk.engine.cria.recipe.paraphrase import choose
from pronk.engine.cria.recipe.prompt import Turn
from pronk.engine.cria.recipe.skills import Words, made_up_name, some

Property = dict[str, Any]


@dataclass(frozen=True)
class Use:
    """One tool as a client defines it, with a question that needs it, the call, and the result in data and in words."""

    definition: dict[str, Any]
    question: str
    arguments: dict[str, Any]
    result: Any
    said: str

    @property
    def name(self) -> str:
        name: str = self.definition["function"]["name"]
        return name

    def turns(self) -> list[Turn]:
        call = json.dumps({"name": self.name, "parameters": self.arguments}, ensure_ascii=False)
        result = json.dumps(self.result, ensure_ascii=False)
        return [
            Turn("user", self.question),
            Turn("assistant", call),
            Turn("ipython", result),
            Turn("assistant", self.said),
        ]


def define(
    name: str, description: str, properties: dict[str, Property], random: Random, optional: tuple[str, ...] = ()
) -> dict[str, Any]:
    """An OpenAI tool definition, with the optional extras that clients send or leave out."""
    parameters: dict[str, Any] = {
        "type": "object",
        "properties": properties,
        "required": [name for name in properties if name not in optional],
    }
    if random.random() < 0.2:
        parameters["additionalProperties"] = False
    if random.random() < 0.2:
        del parameters["required"]
    function: dict[str, Any] = {"name": name, "description": description, "parameters": parameters}
    if random.random() < 0.1:
        function["strict"] = True
    return {"type": "function", "function": function}


def text(random: Random, description: str) -> Property:
    return {"type": "string", "description": description} if random.random() < 0.7 else {"type": "string"}


def as_result(value: dict[str, Any], random: Random) -> Any:
    """A tool message as the template sees it: a string that holds JSON, most of the time, or the object itself."""
    return json.dumps(value) if random.random() < 0.7 else value


def weather(random: Random, words: Words) -> Use:
    city = some(words["cities"], random)
    key = random.choice(("city", "city", "location", "location", "place", "town"))
    name = choose(
        "(get_current_weather|get_weather|weather|current_weather|fetch_weather|get_weather_report|lookup_weather)",
        random,
    )
    properties = {
        key: text(random, choose("(The city|The name of the city|The city, e.g. San Francisco|City name)", random))
    }
    arguments: dict[str, Any] = {key: city}
    unit = ""
    if random.random() < 0.25:
        unit = random.choice(("celsius", "fahrenheit"))
        properties["unit"] = {"type": "string", "enum": ["celsius", "fahrenheit"]}
        if random.random() < 0.5:
            arguments["unit"] = unit
        else:
            unit = ""
    question = choose(
        f"((what is|what's|how is|tell me|check|look up) the (weather|current weather) (like |)in {city}( today| now|)"
        f"|will it rain in {city}|is it (warm|cold|raining|sunny) in {city}|weather in {city}"
        f"|do i need a coat in {city})",
        random,
    ) + (f" in {unit}" if unit else "")
    degrees, sky = (
        random.randint(-9, 39),
        random.choice(("sunny", "cloudy", "rainy", "windy", "clear", "snowy", "foggy")),
    )
    shape = random.randrange(3)
    result = as_result({"temperature": degrees, "condition": sky}, random) if shape else f"{degrees} degrees and {sky}"
    description = choose(
        "(Get the current weather|Get the weather|Returns the weather|Get the current weather in a given location"
        "|Weather)"
        " (for a city|in a city|of a place|)",
        random,
    )
    return Use(
        define(name, description, properties, random, optional=("unit",)),
        question,
        arguments,
        result,
        f"It is {degrees} degrees and {sky} in {city}.",
    )


def clock(random: Random, words: Words) -> Use:
    city = some(words["cities"], random)
    key = random.choice(("city", "location", "place", "timezone", "zone"))
    name = choose("(get_time|get_current_time|current_time|time_in|clock|fetch_time)", random)
    definition = define(
        name,
        choose("(Get the current time|Returns the time|Tell the time) (in|of|for) a (city|place)", random),
        {key: text(random, "The city")},
        random,
    )
    question = choose(
        f"(what time is it in|what is the time in|tell me the time in|current time in|how late is it in) {city}( now|)",
        random,
    )
    time = f"{random.randint(0, 23):02d}:{random.randint(0, 59):02d}"
    result: Any = time if random.random() < 0.5 else as_result({"time": time}, random)
    return Use(definition, question, {key: city}, result, f"It is {time} in {city}.")


def arithmetic(random: Random, words: Words) -> Use:
    sign, verbs = random.choice(
        (("+", "add|sum|plus"), ("-", "subtract|minus|difference"), ("*", "multiply|times|product"))
    )
    a, b = random.randint(0, 99), random.randint(0, 99)
    first, second = random.choice((("a", "b"), ("x", "y"), ("first", "second"), ("left", "right"), ("n1", "n2")))
    kind = random.choice(("number", "integer"))
    word = verbs.split("|")[0]
    name = random.choice([*verbs.split("|"), f"{word}_numbers", f"calculate_{word}", f"{word}_two"])
    total = {"+": a + b, "-": a - b, "*": a * b}[sign]
    definition = define(
        name,
        choose(f"({word.capitalize()}|Compute: {word}) two numbers", random),
        {first: {"type": kind}, second: {"type": kind}},
        random,
    )
    spoken = {"+": "(+|plus)", "-": "(-|minus)", "*": "(*|times)"}[sign]
    question = choose(f"(what is|how much is|compute|calculate|use the tool: what is) {a} {spoken} {b}", random)
    if sign != "-" and random.random() < 0.3:
        question = f"{word} {a} and {b}"
    result: Any = random.choice((total, str(total), as_result({"result": total}, random)))
    return Use(definition, question, {first: a, second: b}, result, f"{a} {sign} {b} = {total}")


def stock(random: Random, words: Words) -> Use:
    symbol = "".join(random.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(random.randint(2, 4)))
    key = random.choice(("symbol", "ticker", "stock"))
    name = choose("(get_stock_price|stock_price|get_price|quote|get_quote)", random)
    definition = define(name, "Get the price of a stock", {key: text(random, "The stock symbol")}, random)
    question = choose(f"(what is|what's|tell me|get) the (stock |share |)price of {symbol}( now|)", random)
    price = random.randint(1, 500)
    return Use(
        definition, question, {key: symbol}, as_result({"price": price}, random), f"The price of {symbol} is {price}."
    )


def message(random: Random, words: Words) -> Use:
    name = some(words["names"], random)
    body = " ".join(random.choice(words["plain"]) for _ in range(random.randint(1, 3)))
    to = random.choice(("to", "recipient", "name", "person"))
    content = random.choice(("text", "message", "body", "content"))
    function = choose("(send_message|send_email|send_text|message|notify|send_mail)", random)
    definition = define(
        function,
        choose("Send (a message|an email|a text) to (a person|somebody)", random),
        {to: text(random, "Who gets it"), content: text(random, "What to say")},
        random,
    )
    question = choose(f"(send|write) (a message|an email|a text|a note) to {name}(:| saying| that says) {body}", random)
    return Use(
        definition,
        question,
        {to: name, content: body},
        random.choice(("ok", "sent", as_result({"status": "sent"}, random))),
        f"I sent it to {name}.",
    )


def search(random: Random, words: Words) -> Use:
    what = " ".join(
        random.choice(words["plain"] + words["animals"] + words["foods"]) for _ in range(random.randint(1, 3))
    )
    key = random.choice(("query", "q", "question", "keywords", "term"))
    name = choose("(search|web_search|search_web|find|lookup|google|search_documents)", random)
    definition = define(
        name,
        choose("Search (the web|the internet|documents|a database)", random),
        {key: text(random, "What to look for")},
        random,
    )
    question = choose(f"(search for|search the web for|look up|find|google|search) {what}", random)
    found = made_up_name(random)
    return Use(definition, question, {key: what}, as_result({"result": found}, random), f"I found this: {found}.")


def timer(random: Random, words: Words) -> Use:
    count = random.randint(1, 60)
    unit = random.choice(("minutes", "seconds", "hours"))
    name = choose("(set_timer|start_timer|timer|set_alarm|create_timer)", random)
    definition = define(name, "Set a timer", {unit: {"type": random.choice(("integer", "number"))}}, random)
    question = choose(f"(set|start|make) a timer (for|of) {count} {unit}", random)
    return Use(
        definition, question, {unit: count}, random.choice(("ok", "started")), f"The timer is set for {count} {unit}."
    )


def translation(random: Random, words: Words) -> Use:
    phrase = " ".join(random.choice(words["plain"]) for _ in range(random.randint(1, 3)))
    language = random.choice(words["languages"])
    body = random.choice(("text", "phrase", "input"))
    target = random.choice(("language", "target", "target_language", "to"))
    name = choose("(translate|translate_text|get_translation)", random)
    definition = define(
        name,
        "Translate text into a language",
        {body: text(random, "The text"), target: text(random, "The language")},
        random,
    )
    question = choose(f"(translate|please translate) {phrase} (to|into) {language}", random)
    foreign = made_up_name(random).lower()
    return Use(definition, question, {body: phrase, target: language}, foreign, f"In {language} it is: {foreign}.")


def item(random: Random, words: Words) -> Use:
    """A function whose very name is made up: what it takes can only be read from its definition."""
    thing = random.choice(("order", "user", "book", "ticket", "room", "product", "file", "task"))
    number = random.randint(1, 999)
    key = random.choice(("id", f"{thing}_id", "number", "key"))
    name = choose(f"(get|find|open|show|read|fetch|load|lookup)_{thing}(_by_id|_info|_status|)", random)
    definition = define(name, f"Get the {thing} with a number", {key: {"type": "integer"}}, random)
    question = choose(f"(show|get|find|open|look up|give) (me |)(the |){thing} (number |){number}", random)
    state = random.choice(("open", "done", "new", "closed", "ready", "lost"))
    return Use(
        definition, question, {key: number}, as_result({"status": state}, random), f"The {thing} {number} is {state}."
    )


KINDS: tuple[Callable[[Random, Words], Use], ...] = (
    weather, weather, weather, clock, arithmetic, arithmetic, stock, message, search, timer, translation, item,
)  # fmt: skip


def offer(random: Random, words: Words) -> tuple[Use, tuple[dict[str, Any], ...]]:
    """A tool in use, and the definitions it is offered among: one to three, in any order, with different names."""
    use = random.choice(KINDS)(random, words)
    offered = {use.name: use.definition}
    for _ in range(random.choice((0, 0, 0, 1, 1, 2))):
        other = random.choice([kind for kind in KINDS if kind is not item])(random, words)
        if other.definition["function"]["description"] != use.definition["function"]["description"]:
            offered.setdefault(other.name, other.definition)
    definitions = list(offered.values())
    random.shuffle(definitions)
    return use, tuple(definitions)
