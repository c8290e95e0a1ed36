"""The GPU kernels on a GPU: are they right, is promise 1 kept, and how near do they come to what the machine can do?

    PYTHONPATH=src python bench/gpu.py [--only NAME ...] [--seconds 540] [--out FOLDER]
    PYTHONPATH=src python bench/gpu.py --dry-run     every line of it on a CPU, in Triton's interpreter, tiny

Needs torch and triton and nothing else. Ceilings come first (what this GPU reads, copies and multiplies today), then
correctness, then bits, then time; each row of the table says what share of the ceiling measured in the same run it
reaches, and how much faster it is than the best of torch's own. Results are JSON lines and one Markdown table. A part
that fails is reported, and the rest goes on; exit code 1 then, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import gpu_checks
import gpu_device
import gpu_ranks
import gpu_times
import torch
from gpu_times import Row

GOALS: tuple[tuple[str, str, str, float], ...] = (
    # (group, how the row's name begins and what it holds, what is asked, value)
    ("decode attention", "1B bfloat16 batch 128 context 1024", "share of the measured read bandwidth", 0.85),
    ("decode attention", "1B bfloat16 batch 32 context 4096", "share of the measured read bandwidth", 0.85),
    ("decode attention", "3B bfloat16 batch 128 context 1024", "share of the measured read bandwidth", 0.85),
    ("step", "1B plain weights, batch 1, context 1024", "tokens a second", 1000),
    ("step", "3B plain weights, batch 1, context 1024", "tokens a second", 500),
    ("step", "1B plain weights, batch 64, context 1024", "tokens a second", 35000),
    ("step", "1B plain weights, batch 256, context 1024", "tokens a second", 60000),
    ("sampler", "top_k 50, top_p 0.9, 128 rows", "µs at most", 60),
)


class Report:
    """What was found, as it is found: a line of JSON each, and a table at the end."""

    def __init__(self, folder: Path | None, device: Any) -> None:
        stamp = f"{date.today().isoformat()}-gpu"
        self._lines = None if folder is None else (folder / f"{stamp}.jsonl").open("w")
        self._table = None if folder is None else folder / f"{stamp}.md"
        self.device = device
        self.ceilings: dict[str, float] = {}
        self.checks: list[tuple[str, bool, str]] = []
        self.rows: list[Row] = []
        self.failures: list[str] = []

    def say(self, **fields: Any) -> None:
        line = json.dumps(fields)
        print(line, flush=True)
        if self._lines is not None:
            self._lines.write(line + "\n")
            self._lines.flush()

    def add_row(self, row: Row) -> None:
        self.rows.append(row)
        told = {name: value for name, value in vars(row).items() if value}
        self.say(**told, **self._shares(row))

    def add_check(self, name: str, holds: bool, figure: str) -> None:
        self.checks.append((name, holds, figure))
        self.say(check=name, holds=holds, figure=figure)

    def _shares(self, row: Row) -> dict[str, float]:
        shares = {}
        if row.nbytes and self.ceilings:
            shares["of_read"] = row.nbytes / row.seconds / self.ceilings["read"]
        if row.flops and self.ceilings:
            shares["of_product"] = row.flops / row.seconds / self.ceilings["product"]
        return shares

    def finish(self) -> str:
        """-> the Markdown."""
        lines = [f"# {date.today().isoformat()}, {self.device.name}, torch {torch.__version__}", ""]
        lines += [f"- {name}: {value / 1e12:.3f} T/s" for name, value in self.ceilings.items()]
        wrong = [check for check in self.checks if not check[1]]
        lines += ["", f"{len(self.checks) - len(wrong)} of {len(self.checks)} checks hold."]
        lines += [f"- **does not hold**: {name} ({figure})" for name, _, figure in wrong]
        lines += [f"- **failed**: {failure}" for failure in self.failures]
        lines += ["", "| goal | asked | seen | reached |", "|---|---|---|---|", *self._goals()]
        lines += [
            "",
            "| what | µs | GB/s | of read | TFLOP/s | of product | tokens/s | times torch |",
            "|---|" + "---|" * 7,
        ]
        lines += [self._line(row) for row in self.rows]
        text = "\n".join(lines) + "\n"
        if self._table is not None:
            self._table.write_text(text)
        return text

    def _line(self, row: Row) -> str:
        shares = self._shares(row)
        cells = [
            f"{row.group}: {row.name}",
            f"{row.seconds * 1e6:.1f}",
            f"{row.nbytes / row.seconds / 1e9:.0f}" if row.nbytes else "",
            f"{shares['of_read']:.0%}" if "of_read" in shares else "",
            f"{row.flops / row.seconds / 1e12:.1f}" if row.flops else "",
            f"{shares['of_product']:.0%}" if "of_product" in shares else "",
            f"{row.tokens / row.seconds:.0f}" if row.tokens else "",
            f"{row.torch_seconds / row.seconds:.2f}" if row.torch_seconds else "",
        ]
        return "| " + " | ".join(cells) + " |"

    def _goals(self) -> Iterator[str]:
        for group, name, asked, value in GOALS:
            row = next((row for row in self.rows if row.group == group and row.name == name), None)
            if row is None:
                seen, reached = "not measured", ""
            elif asked == "µs at most":
                seen, reached = f"{row.seconds * 1e6:.1f}", "yes" if row.seconds * 1e6 <= value else "no"
            elif asked == "tokens a second":
                seen, reached = f"{row.tokens / row.seconds:.0f}", "yes" if row.tokens / row.seconds >= value else "no"
            else:
                share = self._shares(row).get("of_read", 0.0)
                seen, reached = f"{share:.0%}", "yes" if share >= value else "no"
            yield f"| {group}: {name}: {asked} | {value:g} | {seen} | {reached} |"


def main() -> int:
    arguments = _arguments()
    if not arguments.dry_run and not torch.cuda.is_available():
        print("torch sees no GPU here: run this where there is one, or with --dry-run on a CPU.", file=sys.stderr)
        return 2
    if arguments.dry_run:
        from pronk.kernels import interpreter

        interpreter.install()
    from pronk.kernels import gpu

    device: Any = gpu_device.Dry() if arguments.dry_run else gpu_device.Cuda()
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
    report = Report(arguments.out, device)
    deadline = time.monotonic() + arguments.seconds
    seed = int.from_bytes(torch.randint(256, (4,), dtype=torch.uint8).numpy().tobytes(), "little") % 2**31
    report.say(device=device.name, torch=torch.__version__, seed=seed)
    parts = _parts(gpu, device, report, seed, dry=arguments.dry_run)
    for name, part in parts.items():
        if arguments.only and name not in arguments.only and name != "ceilings":
            continue
        if time.monotonic() > deadline:
            report.failures.append(f"{name}: no time was left")
            continue
        try:
            part(deadline)
        except Exception as error:  # noqa: BLE001  told, and the other parts go on
            traceback.print_exc()
            report.failures.append(f"{name}: {type(error).__name__}: {error}")
    print(report.finish())
    return 1 if report.failures or not all(holds for _, holds, _ in report.checks) else 0


def _parts(gpu: Any, device: Any, report: Report, seed: int, *, dry: bool) -> dict[str, Callable[[float], None]]:
    """Each is told until when it may go on."""

    def ceilings(deadline: float) -> None:
        del deadline
        report.ceilings = gpu_times.ceilings(device)
        report.say(ceilings=report.ceilings)

    def checks(found: Callable[..., Iterator[gpu_checks.Check]]) -> Callable[[float], None]:
        def part(deadline: float) -> None:
            for check in found(gpu, device.where, seed, dry=dry):
                report.add_check(*check)
                if time.monotonic() > deadline:
                    raise TimeoutError("no time was left for the rest")

        return part

    def timed(found: Callable[[Any, Any], Iterator[Row]]) -> Callable[[float], None]:
        def part(deadline: float) -> None:
            for row in found(gpu, device):
                report.add_row(row)
                if time.monotonic() > deadline:
                    raise TimeoutError("no time was left for the rest")

        return part

    def ranks(deadline: float) -> None:
        """Sums over two GPUs, where there are two."""
        del deadline
        for found in gpu_ranks.ranks(dry=dry):
            if "check" in found:
                report.add_check(*found["check"])
            else:
                report.add_row(Row("ranks", *found["row"]))

    def vendor(deadline: float) -> None:
        """What batch invariance costs: the same steps with torch's own products."""
        from pronk.kernels.gpu import vendor as products

        for row in gpu_times.whole_steps(products, device, group="step with torch's products"):
            report.add_row(row)
            if time.monotonic() > deadline:
                raise TimeoutError("no time was left for the rest")

    parts: dict[str, Callable[[float], None]] = {
        "ceilings": ceilings,
        "correctness": checks(gpu_checks.correctness),
        "invariance": checks(gpu_checks.invariance),
        "whole-steps": checks(lambda gpu, where, seed, *, dry: gpu_checks.steps(gpu, device, seed, dry=dry)),
    }
    # Whole steps before the long tables, so that they are there when time runs out.
    order = ("steps", "sampler", "decode-attention", "products", "prefill-attention")
    parts |= {name: timed(gpu_times.TIMED[name]) for name in order}
    parts["vendor"] = vendor
    parts["one-rank"] = checks(gpu_ranks.alone)
    parts["ranks"] = ranks
    return parts


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="run every line on a CPU; nothing is measured")
    parser.add_argument("--only", action="append", metavar="PART", help="this part, and the ceilings; may be repeated")
    parser.add_argument("--seconds", type=float, default=540.0, help="begin nothing new after this long")
    parser.add_argument("--out", type=Path, help="a folder for the JSON lines and the table")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
