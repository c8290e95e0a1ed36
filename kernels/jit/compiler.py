"""From LLVM's intermediate representation to code that can be called; kept on disk, so that it is compiled once.

Knows the machine it runs on; nothing of what the functions do.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
from llvmlite import binding, ir

CACHE_VARIABLE = "PRONK_CACHE"


@cache
def host() -> tuple[str, str]:
    """-> this processor's name and its features, as LLVM spells them."""
    return binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten()


def features() -> frozenset[str]:
    """What this processor has: "avx2", "avx512f", "avx512vnni", "amx-int8", "dotprod" and so on."""
    return frozenset(name[1:] for name in host()[1].split(",") if name.startswith("+"))


def cache_folder() -> Path | None:
    """Where compiled code is kept: $PRONK_CACHE, or pronk in the user's cache folder. None: nowhere, for a user without
    a home. Never where others may write: what lies there is run."""
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "pronk"
    try:
        return Path.home() / ".cache" / "pronk"
    except RuntimeError:
        return None


class Library:
    """Compiled functions, for as long as it lives."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def address(self, name: str) -> int:
        """Of a function. Raises KeyError for one that is not there."""
        found = int(self._engine.get_function_address(name))
        if not found:
            raise KeyError(name)
        return found


def load(name: str, sources: Sequence[Path], parameters: str, write: Callable[[], ir.Module]) -> Library:
    """The library `name`, compiled for this machine, or taken from the disk if it was compiled before.

    sources: the files that say what is compiled, and parameters: what else it depends on. With the version of LLVM and
    the processor they tell one compilation from another. write: emits the functions.
    """
    folder = cache_folder()
    path = None if folder is None else folder / f"{name}-{fingerprint(sources, parameters)}.o"
    kept = None if path is None else _read(path)
    if kept is None:
        kept = compile_object(write())
        if path is not None:
            _keep(path, kept)
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), _machine())
    engine.add_object_file(binding.ObjectFileRef.from_data(kept))
    engine.finalize_object()
    return Library(engine)


def compile_object(module: ir.Module) -> bytes:
    """-> an object file for this machine."""
    return bytes(_machine().emit_object(_optimized(module)))


def assembly(module: ir.Module) -> str:
    """What becomes of it, for those who want to see."""
    return str(_machine().emit_assembly(_optimized(module)))


def _optimized(module: ir.Module) -> Any:
    module.triple = binding.get_process_triple()
    parsed = binding.parse_assembly(str(module))
    parsed.verify()
    options = binding.create_pipeline_tuning_options(speed_level=2)
    # What is written is what is meant: vectors and unrolled loops are there already.
    options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = False
    builder = binding.create_pass_builder(_machine(), options)
    builder.getModulePassManager().run(parsed, builder)
    return parsed


def _machine() -> Any:
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    name, flags = host()
    target = binding.Target.from_triple(binding.get_process_triple())
    return target.create_target_machine(cpu=name, features=flags, opt=3, reloc="pic", codemodel="jitdefault", jit=True)


def fingerprint(sources: Sequence[Path], parameters: str) -> str:
    """Differs where the same function would become other code: with its sources, LLVM, the processor, the system."""
    digest = hashlib.sha256()
    for part in (llvmlite.__version__, *host(), platform.system(), parameters):
        digest.update(part.encode() + b"\0")
    for source in sources:
        digest.update(source.read_bytes() + b"\0")
    return digest.hexdigest()[:32]


def _read(path: Path) -> bytes | None:
    """-> what was kept, if it is whole."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    digest, object_file = data[:32], data[32:]
    return object_file if hashlib.sha256(object_file).digest() == digest else None


def _keep(path: Path, object_file: bytes) -> None:
    """At once or not at all, since others may start at the same time. A folder that cannot be written to costs the
    time of compiling at every start, and nothing else."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, scratch = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(hashlib.sha256(object_file).digest() + object_file)
        Path(scratch).replace(path)
