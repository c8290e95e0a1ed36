"""Structured outputs: does every schema of the corpus hold, and what do they cost?

    python bench/grammar.py --table docs/schemas.md     what is enforced and what is refused, with 500 completions each
    python bench/grammar.py --costs [--model FOLDER]    start-up, compilation and masks for a model's vocabulary

The corpus is tests/engine/schemas. A completion is drawn by chance from the masks, so the grammar alone decides; its
budget is the shortest completion's length and up to 80 tokens more.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "engine" / "schemas"))

import corpus  # noqa: E402
import generation  # noqa: E402

from pronk.engine.errors import InvalidParameterError  # noqa: E402
from pronk.engine.grammar import GrammarCompiler, Matcher  # noqa: E402
from pronk.engine.request import Grammar  # noqa: E402
from pronk.engine.tokenizer import Vocabulary, load_vocabulary  # noqa: E402

CRIA = ROOT / "engine" / "cria"
END = "<|eot_id|>"
HEAD = """# Which JSON schemas are enforced

Written by `python bench/grammar.py --table docs/schemas.md`; the schemas are in `tests/engine/schemas`.

Of {total} schemas {enforced} are enforced: {runs} completions of each, drawn by chance under the grammar with random
budgets, were all valid JSON of the schema by the `jsonschema` package. The other {refused} are refused with a message
that says what is at fault.

| schema | | |
|---|---|---|
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, help="write the table there")
    parser.add_argument("--costs", action="store_true", help="measure times")
    parser.add_argument("--model", type=Path, default=CRIA, help="folder with a tokenizer")
    parser.add_argument("--runs", type=int, default=500, help="completions of each schema")
    parser.add_argument("--only", default="", help="schemas whose name holds this")
    arguments = parser.parse_args()
    vocabulary = load_vocabulary(arguments.model)
    if arguments.costs:
        print_costs(vocabulary)
        return
    schemas = {name: schema for name, schema in corpus.corpus().items() if arguments.only in name}
    rows, failed = run_corpus(schemas, vocabulary, arguments.runs)
    enforced = sum(verdict == "enforced" for _, verdict, _ in rows)
    head = HEAD.format(total=len(rows), enforced=enforced, refused=len(rows) - enforced, runs=arguments.runs)
    table = head + "".join(f"| {escaped(name)} | {verdict} | {escaped(note)} |\n" for name, verdict, note in rows)
    if arguments.table and not failed:
        arguments.table.write_text(table)
    print(f"{len(rows)} schemas, {enforced} enforced, {failed} failed")
    raise SystemExit(failed > 0)


def escaped(text: str) -> str:
    """For a cell of Markdown's."""
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def run_corpus(schemas: dict[str, Any], vocabulary: Vocabulary, runs: int) -> tuple[list[tuple[str, str, str]], int]:
    """-> (name, verdict, note) of each, and how many were not kept to."""
    compiler = GrammarCompiler(vocabulary, [vocabulary.special_tokens[END]])
    rows: list[tuple[str, str, str]] = []
    failed = 0
    for name, schema in schemas.items():
        grammar = Grammar("json", json.dumps(schema))
        try:
            compiler.check(grammar)
        except InvalidParameterError as error:
            rows.append((name, "refused", str(error)))
            continue
        matcher = compiler.compile(grammar)
        fault = first_fault(matcher, vocabulary, schema, runs)
        if fault:
            failed += 1
            print(f"FAILED {name}: {fault}", flush=True)
        rows.append((name, "failed" if fault else "enforced", fault or f"shortest: {matcher.shortest} tokens"))
    compiler.close()
    return rows, failed


def first_fault(matcher: Matcher, vocabulary: Vocabulary, schema: Any, runs: int) -> str | None:
    """What is wrong with the first of so many completions that is not valid."""
    shortest = matcher.shortest
    if shortest is None:
        return "no completion was found"
    for seed in range(runs):
        chance = random.Random(seed)
        budget = max(1, shortest) + (chance.randrange(80) if seed % 4 else chance.randrange(4))
        try:
            completion = generation.generate(matcher, vocabulary, budget, chance)
        except InvalidParameterError as error:
            return f"seed {seed}, budget {budget}: {error}"
        fault = generation.fault(completion.text, schema)
        if fault:
            return f"seed {seed}, budget {budget} of {shortest}: {fault}: {completion.text[-200:]!r}"
    return None


def print_costs(vocabulary: Vocabulary) -> None:
    """Start-up, and of each realistic schema its check, its compilation, and its masks far from and near the budget."""
    compiler = GrammarCompiler(vocabulary, [vocabulary.special_tokens[END]])
    print(f"vocabulary of {vocabulary.size}; library and tables: {timed(compiler.prepare):.0f} ms\n")
    first = Grammar("json", "{}")
    print(f"first check, which starts a judge: {timed(lambda: compiler.check(first)):.0f} ms\n")
    print("| schema | check ms | compile ms | mask µs, median | 99 % | near the end, median | 99 % |")
    print("|---|---|---|---|---|---|---|")
    for name, schema in corpus.corpus().items():
        grammar = Grammar("json", json.dumps(schema))
        if not name.startswith("realistic/"):
            continue
        try:
            check = timed(lambda grammar=grammar: compiler.check(grammar))
        except InvalidParameterError:
            continue
        compiling = timed(lambda grammar=grammar: compiler.compile(grammar))
        matcher = compiler.compile(grammar)
        shortest = matcher.shortest or 1
        far, near = mask_times(matcher, 4000), mask_times(matcher, shortest + 10)
        cells = [f"{check:.1f}", f"{compiling:.1f}", *percentiles(far), *percentiles(near)]
        print(f"| {name.partition('/')[2]} | " + " | ".join(cells) + " |", flush=True)
    compiler.close()


def timed(work: Any) -> float:
    """Milliseconds."""
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1000


def mask_times(matcher: Matcher, budget: int) -> list[float]:
    """Microseconds of each mask of some completions."""
    times = []
    for seed in range(5):
        chance = random.Random(seed)
        place = matcher.copy()
        for spent in range(min(budget, 200)):
            if place.done:
                break
            start = time.perf_counter()
            mask = place.mask(budget - spent)
            times.append((time.perf_counter() - start) * 1e6)
            place.accept(chance.choice(generation.allowed(mask)))
    return times


def percentiles(times: list[float]) -> list[str]:
    ordered = sorted(times)
    return [f"{statistics.median(ordered):.0f}", f"{ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)]:.0f}"]


if __name__ == "__main__":
    main()
