"""Structured outputs: does every schema of the corpus hold, and what do they cost?

    python bench/grammar.py --record bench/results/schemas.json   what is enforced and what is refused
    python bench/grammar.py --costs [--model FOLDER]              start-up, compilation, masks for a model's vocabulary

The corpus is tests/engine/schemas. Of each schema that is not refused, 500 completions are drawn by chance from the
masks, so the grammar alone decides. A fourth have the budget of the shortest completion and up to 3 tokens more, the
others up to 80 more, one in eight up to 400 more. Each has to be strict JSON, and of the schema by the `jsonschema`
package. What --record writes is read by docs/generate.py, for docs/structured-outputs.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
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
Row = dict[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, help="write what came out there, unless a schema failed")
    parser.add_argument("--costs", action="store_true", help="measure times")
    parser.add_argument("--model", type=Path, default=CRIA, help="folder with a tokenizer")
    parser.add_argument("--runs", type=int, default=500, help="completions of each schema")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--only", default="", help="schemas whose name holds this")
    arguments = parser.parse_args()
    if arguments.costs:
        print_costs(load_vocabulary(arguments.model))
        return
    names = [name for name in corpus.corpus() if arguments.only in name]
    rows = run_corpus(names, arguments.model, arguments.runs, arguments.jobs)
    counts = {verdict: sum(row["verdict"] == verdict for row in rows) for verdict in ("enforced", "refused", "failed")}
    print(f"{len(rows)} schemas:", ", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    if arguments.record and not counts["failed"]:
        record(arguments.record, rows, arguments.runs)
    raise SystemExit(counts["failed"] > 0)


def record(path: Path, rows: list[Row], runs: int) -> None:
    about = {
        "command": f"python bench/grammar.py --record {path} --runs {runs}",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {name: version(name) for name in ("llguidance", "jsonschema")},
        "completions": runs,
        "schemas": rows,
    }
    path.write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n")


def run_corpus(names: list[str], model: Path, runs: int, jobs: int) -> list[Row]:
    """-> name, verdict and note of each, in order."""
    parts = [names[start::jobs] for start in range(jobs)]
    with ProcessPoolExecutor(jobs) as pool:
        done = pool.map(run_schemas, parts, [model] * jobs, [runs] * jobs)
        rows = {row["name"]: row for part in done for row in part}
    return [rows[name] for name in names]


def run_schemas(names: list[str], model: Path, runs: int) -> list[Row]:
    vocabulary = load_vocabulary(model)
    compiler = GrammarCompiler(vocabulary, [vocabulary.special_tokens[END]])
    schemas = corpus.corpus()
    rows = []
    for name in names:
        verdict, note = judge(compiler, vocabulary, schemas[name], runs)
        if verdict == "failed":
            print(f"FAILED {name}: {note}", flush=True)
        rows.append({"name": name, "verdict": verdict, "note": note})
    compiler.close()
    return rows


def judge(compiler: GrammarCompiler, vocabulary: Vocabulary, schema: Any, runs: int) -> tuple[str, str]:
    """-> verdict and note."""
    grammar = Grammar("json", json.dumps(schema))
    try:
        compiler.check(grammar)
    except InvalidParameterError as error:
        return "refused", str(error)
    matcher = compiler.compile(grammar)
    fault = first_fault(matcher, vocabulary, schema, runs)
    return ("failed", fault) if fault else ("enforced", f"shortest: {matcher.shortest} tokens")


def first_fault(matcher: Matcher, vocabulary: Vocabulary, schema: Any, runs: int) -> str | None:
    """What is wrong with the first of so many completions that is not valid."""
    shortest = matcher.shortest
    if shortest is None:
        return "no completion was found"
    for seed in range(runs):
        chance = random.Random(seed)
        budget = max(1, shortest) + chance.randrange((4, 80, 80, 80, 4, 80, 80, 400)[seed % 8])
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
