"""The page on structured outputs: what is said here, with the tables of what the code enforces and what was shown."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pronk.engine.grammar import formats, notation, schema

ROOT = Path(__file__).parent.parent
RECORD = ROOT / "bench" / "results" / "schemas.json"

ABOUT = """
`response_format` and `structured_outputs` (see [chat](chat.md)), and the arguments of strict and of required calls
(see [tools](tools.md)), hold what is generated to a grammar: of the tokens that the model could choose next, those stay
after which the text can still become one of the grammar. The library is llguidance; what it would enforce too loosely
is refused, or said to it in other words (`engine/grammar/`).

- **White space.** One space may follow a comma and a colon; JSON has no other.
- **Order.** Properties come in the order in which the schema names them, and those that it does not name after them.
- **Numbers.** At most 20 digits, 15 where there is a fraction, and 2 in an exponent: none is infinite as a double, and
  none is so near to a bound that as a double it is the bound. More digits come only where a schema leaves nothing else.
- **The end.** When the tokens that are left come near to what the shortest completion needs, only tokens stay after
  which the text can be completed in time. So `finish_reason` `length` never leaves broken JSON, if the shortest text
  that is found fits into `max_tokens` at all. That no other text would be shorter is likely and not proven.
- **What a schema may cost.** A process of its own reads each grammar first, for half a second of processor time and in
  2 GiB at most. What it does not get through is a 400; two such processes read for all requests. A grammar that was
  accepted lately is not read again.
- **Patterns** are searched for, as JSON Schema says, and a class of characters is what all languages agree on.
- **Tools beside a format.** An answer of the format never is a call that breaks a strict schema: objects of the format
  that could read as one are left out, or the request is refused and says so.
"""


def page(note: str) -> str:
    """note: that the page is generated."""
    record = json.loads(RECORD.read_text())
    parts = [f"# Structured outputs\n\n{note}{ABOUT}", _keywords(record), _formats(), _limits(), _shown(record)]
    return "\n".join(parts)


def _keywords(record: dict[str, Any]) -> str:
    enforced, refused = _uses(record)
    rows = [
        *((name, "enforced") for name in sorted(schema.ENFORCED)),
        *((name, "says nothing of values") for name in sorted(schema.ANNOTATIONS)),
        *((name, "refused") for name in sorted(schema.REFUSED)),
    ]
    table = "".join(
        f"| `{name}` | {verdict} | {enforced[name] or ''} | {refused[name] or ''} |\n" for name, verdict in rows
    )
    return (
        "## Keywords of JSON Schema\n\nThe last columns say how many schemas of the corpus below have the keyword: of "
        "those that are enforced, and of those that\nare refused, for this keyword or for another reason. An unknown "
        "keyword is taken for an annotation, unless it looks like one\nof these, misspelt. `uniqueItems` and "
        "`nullable` may be false. `oneOf` needs schemas of which a value can match only one,\n`minProperties` no more "
        "than are required, and `multipleOf` few digits.\n\n"
        "| keyword | | in enforced | in refused |\n|---|---|---|---|\n" + table
    )


def _uses(record: dict[str, Any]) -> tuple[Counter[str], Counter[str]]:
    """-> keyword -> schemas that have it: enforced ones, refused ones."""
    sys.path.insert(0, str(ROOT / "tests" / "engine" / "schemas"))
    import corpus

    schemas = corpus.corpus()
    counts = {"enforced": Counter[str](), "refused": Counter[str]()}
    for row in record["schemas"]:
        counts[row["verdict"]].update(set(_keywords_in(schemas[row["name"]])))
    return counts["enforced"], counts["refused"]


def _keywords_in(part: Any) -> Iterator[str]:
    waiting = [part]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            yield from part
            waiting += [inside for _, inside in schema.inside("", part)]


def _formats() -> str:
    names = ", ".join(f"`{name}`" for name in sorted(formats.ENFORCED))
    numbers = ", ".join(f"`{name}`" for name in (*formats.INTEGERS, *sorted(formats.FLOATS)))
    return f"## Formats\n\nOf strings: {names}. Of numbers: {numbers}. Any other `format` is refused.\n"


def _limits() -> str:
    rows = {
        "bytes of a schema": schema.MAX_BYTES,
        "levels of nesting": schema.MAX_DEPTH,
        "schemas in a schema": schema.MAX_SCHEMAS,
        "properties in all": schema.MAX_PROPERTIES,
        "properties of an object that are not required": schema.MAX_OPTIONAL,
        "schemas of an `anyOf`, `oneOf`, `allOf`": schema.MAX_ALTERNATIVES,
        "values of an `enum`": schema.MAX_VALUES,
        "`minItems`, `minLength`": schema.MAX_REPEATS,
        "bytes of a regular expression, of choices, of a grammar beside its schemas": notation.MAX_BYTES,
        "bytes of a grammar with its schemas, those of all tools among them": notation.MAX_BYTES_WITH_SCHEMAS,
        "choices": notation.MAX_CHOICES,
    }
    return "## Limits\n\n| at most | |\n|---|---|\n" + "".join(f"| {what} | {most} |\n" for what, most in rows.items())


def _shown(record: dict[str, Any]) -> str:
    rows = record["schemas"]
    enforced = [row for row in rows if row["verdict"] == "enforced"]
    refused = [row for row in rows if row["verdict"] == "refused"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    text = (
        f"## What was shown\n\n`{record['command']}`, {record['date']}, {versions}.\n\n"
        f"The corpus (`tests/engine/schemas`) has {len(rows)} schemas. {len(enforced)} are enforced: of each, "
        f"{record['completions']} completions were drawn by chance under its\nmasks, with budgets from the shortest "
        "completion's up to 400 tokens more. All were strict JSON and valid by the `jsonschema`\npackage, with its "
        f"checks of formats. The other {len(refused)} are refused:\n\n| schema | why |\n|---|---|\n"
    )
    text += "".join(f"| {_cell(row['name'])} | {_cell(row['note'])} |\n" for row in refused)
    text += "\nThe enforced ones, each with the tokens that its shortest text takes in the vocabulary of cria:\n\n"
    groups: dict[str, list[str]] = {}
    for row in enforced:
        group, _, name = row["name"].partition("/")
        groups.setdefault(group, []).append(f"{_cell(name)} ({row['note'].removeprefix('shortest: ').split()[0]})")
    return text + "\n".join(f"- **{group}**: {', '.join(names)}" for group, names in groups.items()) + "\n"


def _cell(text: str) -> str:
    """As Markdown shows it as it is."""
    shown = text.replace("\n", " ").replace("`", "'").replace("|", "\\|")
    return f"`{shown}`" if any(character in shown for character in "*_<[^\\") else shown
