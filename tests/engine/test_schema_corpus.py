"""Each schema of the corpus is enforced, or refused, as docs/structured-outputs.md says. The page's 500 completions of
each schema are drawn by bench/grammar.py; here it is one."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from pronk.engine.errors import InvalidParameterError
from pronk.engine.grammar import GrammarCompiler
from pronk.engine.request import Grammar
from pronk.engine.tokenizer import load_vocabulary

from .schemas.corpus import corpus
from .schemas.generation import fault, generate

ROOT = Path(__file__).parent.parent.parent
CRIA = load_vocabulary(ROOT / "engine" / "cria")
COMPILER = GrammarCompiler(CRIA, [CRIA.special_tokens["<|eot_id|>"]])
VERDICTS = {
    row["name"]: row["verdict"]
    for row in json.loads((ROOT / "bench" / "results" / "schemas.json").read_text())["schemas"]
}
SCHEMAS = corpus()


def test_the_record_is_of_this_corpus() -> None:
    assert list(VERDICTS) == list(SCHEMAS)
    assert len(VERDICTS) >= 300
    assert set(VERDICTS.values()) == {"enforced", "refused"}


@pytest.mark.parametrize("group", sorted({name.partition("/")[0] for name in SCHEMAS}))
def test_schemas_are_enforced_or_refused(group: str) -> None:
    faults = {}
    for number, (name, schema) in enumerate(SCHEMAS.items()):
        if name.partition("/")[0] != group:
            continue
        try:
            matcher = COMPILER.compile(Grammar("json", json.dumps(schema)))
            shortest = matcher.shortest
        except InvalidParameterError:
            shortest = None
        if (shortest is not None) != (VERDICTS[name] == "enforced"):
            faults[name] = f"shortest: {shortest}"
        elif shortest is not None:
            chance = random.Random(number)
            written = generate(matcher, CRIA, max(1, shortest) + chance.randrange(20), chance)
            found = fault(written.text, schema)
            if found:
                faults[name] = f"{found}: {written.text[-200:]!r}"
    assert faults == {}
