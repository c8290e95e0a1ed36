"""Compile every kernel ahead of time, on a machine without a GPU, and hold the machine code to a recorded budget.

    python -m pronk.kernels.gpu.aot              compiles all, prints a table, ends with 1 where the budget is broken
    python -m pronk.kernels.gpu.aot --record     and writes the budget of this version of Triton anew
    python -m pronk.kernels.gpu.aot decode       only what has "decode" in its name

The budget is budget.json. Registers and shared memory decide how many programs an SM holds, so they may grow by a tenth
and no more; spilled registers are memory traffic that nobody asked for, so there are none but those a Compilation
allows; a kernel that should read 16 bytes at a time, or multiply on tensor cores, must have the instructions for it.
Triton brings the assembler and the disassembler, so with the same version of Triton the numbers are those of a machine
with a GPU. Registers are only compared with those of the same version: each has its own allocation.

Knows nothing of speed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pronk.kernels.gpu.compilation import Compilation

BUDGET = Path(__file__).parent / "budget.json"
TOLERANCE = 1.1
SHARED_LIMITS = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Compute capability -> bytes of shared memory that one program may have (CUDA C++ Programming Guide)."""

_WIDE_LOAD = re.compile(r"\b(?:LDG|LDGSTS|LD)\.[\w.]*128\b|\b(?:UTMALDG|UBLKCP)\b")
_TENSOR_CORE = re.compile(r"\b(?:[HIQDB]|HG|IG|QG|BG)MMA\b|\bUTC\w*MMA\b")
_LOCAL = re.compile(r"\b(?:LDL|STL)\b")


@dataclass(frozen=True)
class Measurement:
    """What one specialisation became for one target. Its fields, but for the first two, are what a budget records."""

    name: str
    target: int
    """Compute capability: 90 for 9.0."""
    registers: int
    """Of each thread."""
    shared_bytes: int
    """Of each program."""
    spilled_bytes: int
    """Of each thread: its stack."""
    wide_loads: int
    """Instructions that read global memory 16 bytes at a time, or by the copy engine."""
    tensor_core_instructions: int
    local_instructions: int
    """Loads from and stores to a thread's own memory: spills at work."""


def compilations() -> list[Compilation]:
    """Of every module of the package, in the order of their names."""
    package = importlib.import_module("pronk.kernels.gpu")
    modules = [importlib.import_module(f"{package.__name__}.{info.name}") for info in _modules(package)]
    found = [item for module in modules for item in getattr(module, "COMPILATIONS", ())]
    names = [item.name for item in found]
    if doubled := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"two compilations have one name: {', '.join(sorted(doubled))}")
    return found


def _modules(package: Any) -> list[pkgutil.ModuleInfo]:
    own = str(__spec__.name).rpartition(".")[2] if __spec__ else "aot"
    return sorted((info for info in pkgutil.iter_modules(package.__path__) if info.name != own), key=lambda i: i.name)


def compile_for(item: Compilation, target: int) -> tuple[bytes, int]:
    """-> machine code (a cubin), and bytes of shared memory. Raises what Triton raises."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = item.kernel.arg_names
    if missing := set(names) ^ (item.signature.keys() | item.constants.keys()):
        raise ValueError(f"{item.name}: not both a parameter and in the compilation: {', '.join(sorted(missing))}")
    source = ASTSource(
        fn=item.kernel,
        signature={name: "constexpr" if name in item.constants else item.signature[name] for name in names},
        constexprs={(names.index(name),): value for name, value in item.constants.items()},
        attrs={
            (place,): [["tt.divisibility", 16]]
            for place, name in enumerate(names)
            if item.signature.get(name, "").startswith("*") or name in item.divisible
        },
    )
    options = {"num_warps": item.num_warps, "num_stages": item.num_stages, **item.options}
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    return compiled.asm["cubin"], compiled.metadata.shared


def measure(name: str, target: int, cubin: bytes, shared_bytes: int) -> Measurement:
    """Reads the machine code. What was read once is kept beside Triton's cache."""
    import triton

    kept = Path(triton.knobs.cache.dir) / "measured" / f"{hashlib.sha256(cubin).hexdigest()}.json"
    if kept.exists():
        counts = json.loads(kept.read_text())
    else:
        counts = _read(cubin)
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(counts))
    return Measurement(name=name, target=target, shared_bytes=shared_bytes, **counts)


def _read(cubin: bytes) -> dict[str, int]:
    import triton

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _run(triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path))
        code = _run(triton.knobs.nvidia.nvdisasm.path, "-c", "-ndf", str(path))
    resources = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "registers": resources["REG"],
        "spilled_bytes": resources["STACK"] + resources["LOCAL"],
        "wide_loads": len(_WIDE_LOAD.findall(code)),
        "tensor_core_instructions": len(_TENSOR_CORE.findall(code)),
        "local_instructions": len(_LOCAL.findall(code)),
    }


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def measure_all(items: Iterable[Compilation]) -> tuple[list[Measurement], list[str]]:
    """-> measurements in the order of the items, and in words what did not compile. Reading one cubin goes on beside
    compiling the next."""
    from triton.errors import TritonError

    pending, failures = [], []
    with ThreadPoolExecutor(max_workers=1) as reader:
        for item in items:
            for target in item.targets:
                try:
                    pending.append(reader.submit(measure, item.name, target, *compile_for(item, target)))
                except (TritonError, RuntimeError) as error:
                    failures.append(f"{item.name} for sm_{target} does not compile: {_in_short(error)}")
        return [result.result() for result in pending], failures


def _in_short(error: BaseException) -> str:
    """Its first lines; an assembler's error goes on with the whole program. What lies at the bottom comes first."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error)[:600]}"


Budget = Mapping[tuple[str, int], Mapping[str, Any]]
"""Of one version of Triton: (name, target) -> the fields of a Measurement."""


def load_budget(path: Path = BUDGET) -> dict[str, Budget]:
    """-> version of Triton -> its budget. No file: empty."""
    if not path.exists():
        return {}
    versions = json.loads(path.read_text())
    return {version: {(row["name"], row["target"]): row for row in rows} for version, rows in versions.items()}


def record(version: str, measurements: Sequence[Measurement], path: Path = BUDGET) -> None:
    """Writes them as the version's budget, one line each, and keeps what other versions have of the same names."""
    versions = json.loads(path.read_text()) if path.exists() else {}
    kept = {(measurement.name, measurement.target) for measurement in measurements}
    versions = {v: [row for row in rows if (row["name"], row["target"]) in kept] for v, rows in versions.items()}
    versions[version] = [asdict(measurement) for measurement in measurements]
    blocks = []
    for name in sorted(versions):
        rows = ",\n".join(f"    {json.dumps(row)}" for row in versions[name])
        blocks.append(f"  {json.dumps(name)}: [\n{rows}\n  ]")
    path.write_text("{\n" + ",\n".join(blocks) + "\n}\n")


def faults(item: Compilation, found: Measurement, budget: Budget | None) -> list[str]:
    """What is wrong with one specialisation, in words. budget: of the running Triton; None: it has none."""
    out = []
    if found.spilled_bytes > item.allowed_spills or (found.local_instructions and not item.allowed_spills):
        out.append(f"spills {found.spilled_bytes} bytes in {found.local_instructions} instructions")
    if found.shared_bytes > SHARED_LIMITS[found.target]:
        out.append(f"needs {found.shared_bytes} shared bytes, a program has at most {SHARED_LIMITS[found.target]}")
    if item.expects_wide_loads and not found.wide_loads:
        out.append("has no 16-byte load")
    if item.expects_tensor_cores and not found.tensor_core_instructions:
        out.append("uses no tensor cores")
    if budget is not None:
        recorded = budget.get((found.name, found.target))
        if recorded is None:
            out.append("is not in the budget: python -m pronk.kernels.gpu.aot --record")
        else:
            for field in ("registers", "shared_bytes"):
                now, before = getattr(found, field), recorded[field]
                if now > before * TOLERANCE:
                    out.append(f"needs {now} {field.replace('_', ' ')}, {before} are recorded")
    return [f"{found.name} for sm_{found.target} {fault}" for fault in out]


def main(arguments: Sequence[str] | None = None) -> int:
    """-> exit code."""
    parser = argparse.ArgumentParser(prog="python -m pronk.kernels.gpu.aot", description="Compile the GPU kernels.")
    parser.add_argument("name", nargs="?", default="", help="only those with this in their name")
    parser.add_argument("--record", action="store_true", help="write the budget anew")
    parser.add_argument("--json", action="store_true", help="print measurements as JSON, judge nothing")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        print("TRITON_INTERPRET is set: nothing is compiled in such a process; unset it", file=sys.stderr)
        return 2
    if options.record and options.name:
        print("a budget is recorded whole: leave the name out", file=sys.stderr)
        return 2
    import triton

    items = {item.name: item for item in compilations() if options.name in item.name}
    measurements, failures = measure_all(items.values())
    if options.json:
        rows = [asdict(measurement) for measurement in measurements]
        print(json.dumps({"triton": triton.__version__, "measurements": rows, "failures": failures}))
        return 0
    for found in measurements:
        print(
            f"{found.name:36} sm_{found.target:<4} {found.registers:4} registers {found.shared_bytes:7} B shared "
            f"{found.spilled_bytes:4} B spilled {found.wide_loads:4} wide loads "
            f"{found.tensor_core_instructions:4} tensor core instructions"
        )
    if options.record and not failures:
        record(triton.__version__, measurements)
    budget = load_budget().get(triton.__version__)
    wrong = failures + [fault for found in measurements for fault in faults(items[found.name], found, budget)]
    for fault in wrong:
        print(fault, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
