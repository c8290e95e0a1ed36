"""What the engine is told at start: frozen, composed, each field documented where it is declared.

The command line, its environment variables and the reference page are generated from these declarations (`option`).
Knows no argument parser, and no value that only a loaded model can tell.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any

from pronk.engine.errors import ConfigError
from pronk.engine.torchrun import Position

LOAD_FORMATS = ("auto", "safetensors", "pth", "dummy")
DTYPES = ("auto", "bfloat16", "float16", "float32")
DEVICES = ("auto", "cpu", "cuda")
QUANTIZATIONS = ("none", "fp8", "int8", "int4")
KV_CACHE_DTYPES = ("auto", "fp8")

# Attention splits a sequence's keys at multiples of this many positions, so a block must divide it (DESIGN: promise 1).
KEY_SPLIT = 256


def option(default: Any, help: str, *, flag: str, choices: tuple[str, ...] = (), metavar: str = "") -> Any:
    """A dataclass field that is also a command-line flag.

    flag: its long name, `--max-model-len`; the environment variable follows from it, `PRONK_MAX_MODEL_LEN`.
    """
    metadata = {"help": help, "flag": flag, "choices": choices, "metavar": metavar}
    return field(default=default, metadata=metadata)


def parse_bytes(text: str | int) -> int:
    """ "4GiB", "512 MiB", "2G", "1000000" -> bytes. G and GiB mean 2**30, GB means 10**9."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?B)?\s*", str(text), re.IGNORECASE)
    if match is None:
        raise ConfigError(f"{text!r} is not a size: write a number of bytes, or for example 4GiB or 512MiB")
    number, prefix, suffix = match.groups()
    base = 1000 if (suffix or "").upper() == "B" and prefix else 1024
    return int(float(number) * base ** " KMGT".index(prefix.upper() or " "))


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The paged KV cache."""

    block_size: int = option(16, "tokens in one block of the KV cache: 16, 32, 64, 128 or 256", flag="--block-size")
    memory: str | None = option(
        None,
        "memory for the KV cache, for example 4GiB (default: what the running requests can use, "
        "at most 40 % of the memory that is free after loading, and on a CPU at most 4GiB)",
        flag="--kv-cache-memory",
        metavar="SIZE",
    )
    kv_cache_dtype: str = option(
        "auto",
        "precision of the KV cache: auto is that of the activations; fp8 (GPU only) holds twice the tokens, "
        "each head's key and value of a token with a scale of its own",
        flag="--kv-cache-dtype",
        choices=KV_CACHE_DTYPES,
    )
    enable_prefix_caching: bool = option(
        True,
        "do not keep finished prompts in the KV cache for requests that begin alike",
        flag="--no-enable-prefix-caching",
    )

    def __post_init__(self) -> None:
        if self.block_size < 16 or KEY_SPLIT % self.block_size:
            raise ConfigError(f"--block-size {self.block_size}: choose 16, 32, 64, 128 or 256")
        if self.kv_cache_dtype not in KV_CACHE_DTYPES:
            raise ConfigError(f"--kv-cache-dtype {self.kv_cache_dtype}: choose one of {', '.join(KV_CACHE_DTYPES)}")
        if self.memory is not None:
            try:
                size = parse_bytes(self.memory)
            except ConfigError as error:
                raise ConfigError(f"--kv-cache-memory: {error}") from error
            if size <= 0:
                raise ConfigError(f"--kv-cache-memory {self.memory}: it must be more than 0")


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Who runs next, and how many tokens a step may hold."""

    max_num_seqs: int = option(128, "sequences that run at the same time; more wait", flag="--max-num-seqs")
    max_num_batched_tokens: int | None = option(
        None,
        "tokens in one step, prompts and answers together; smaller steps keep streams smoother while long prompts "
        "are read (default: 128 on a CPU, 4096 on a GPU)",
        flag="--max-num-batched-tokens",
    )
    max_num_prompt_tokens: int | None = option(
        None,
        "tokens of prompts in a step in which others get their next token: fewer keep streams smoother, more let "
        "answers begin sooner (default: 48 on a CPU; on a GPU as many as --max-num-batched-tokens allows)",
        flag="--max-num-prompt-tokens",
    )

    def __post_init__(self) -> None:
        if self.max_num_seqs < 1:
            raise ConfigError(f"--max-num-seqs {self.max_num_seqs}: at least 1 sequence must run")
        if self.max_num_batched_tokens is not None and self.max_num_batched_tokens < 1:
            raise ConfigError(f"--max-num-batched-tokens {self.max_num_batched_tokens}: a step needs at least 1 token")
        if self.max_num_prompt_tokens is not None and self.max_num_prompt_tokens < 1:
            raise ConfigError(f"--max-num-prompt-tokens {self.max_num_prompt_tokens}: prompts need at least 1 token")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Everything the engine process is told; sent to it as its first message."""

    model: str = field(
        default="",
        metadata={"help": "a folder with a checkpoint, or a Hugging Face Hub id (default: cria, the embedded model)"},
    )
    load_format: str = option(
        "auto",
        "weights to read: auto finds safetensors, then Meta's .pth; dummy makes random ones for benchmarks",
        flag="--load-format",
        choices=LOAD_FORMATS,
    )
    dtype: str = option(
        "auto",
        "precision of weights, activations and KV cache: auto is the checkpoint's own",
        flag="--dtype",
        choices=DTYPES,
    )
    quantization: str = option(
        "none",
        "keep the linear layers' weights in fewer bits: int8 and (GPU only) fp8 with a scale for each output, (GPU "
        "only) int4 with one for each 32 inputs and an int8 head; the embedding stays as it is. On a CPU int8 "
        "rounds their inputs to 15 bits",
        flag="--quantization",
        choices=QUANTIZATIONS,
    )
    device: str = option(
        "auto",
        "where the model runs: auto is a GPU where there is one, else the CPU",
        flag="--device",
        choices=DEVICES,
    )
    max_model_len: int | None = option(
        None,
        "longest prompt and completion together, in tokens (default: what the model was made for, "
        "as far as the KV cache can hold one such request)",
        flag="--max-model-len",
    )
    enforce_eager: bool = option(
        False,
        "launch each operation of a step by itself, instead of replaying captured steps (CUDA graphs on a GPU, the "
        "kernels' own recordings on a CPU): slower, and the answers are the same",
        flag="--enforce-eager",
    )
    cpu_threads: int | None = option(
        None,
        "threads that the model is run by on a CPU (default: one for each physical core that the process may use and "
        "its container's quota allows; with more than two cores one is left to the process that serves HTTP)",
        flag="--cpu-threads",
    )
    weights_cache: str | None = option(
        None,
        "folder in which a CPU keeps a model's weights as it has laid them out, about as large as they are in memory: "
        "later starts map them, and neither read nor round a checkpoint (default: weights in $PRONK_CACHE, or in "
        "pronk in the user's cache folder, for models of more than 64 MiB; off: nowhere)",
        flag="--weights-cache",
        metavar="FOLDER",
    )
    vendor_products: bool = option(
        False,
        "let a GPU's vendor multiply matrices in steps of more than 64 tokens: what a request is answered then depends "
        "on the requests beside it, and a seed does not bring an answer back",
        flag="--vendor-products",
    )
    tensor_parallel_size: int = option(
        1,
        "ranks that share the model: GPUs of this host, or processes on a CPU; each has its share of the heads, of the "
        "MLP's width, of the vocabulary and of the KV cache. Answers are the same whatever runs beside them, at each "
        "number of ranks, and may differ between numbers",
        flag="--tensor-parallel-size",
    )
    seed: int | None = option(
        None,
        "seed of requests that name none, so that the same request always gets the same answer, and of dummy weights "
        "(default: such requests are random, dummy weights are those of seed 0)",
        flag="--seed",
    )
    step_timeout: float | None = option(
        None,
        "seconds that a step may take before the engine counts as hung, is killed and starts again, which ends what "
        "runs with an error (default: 60 on a GPU, 600 on a CPU)",
        flag="--step-timeout",
        metavar="SECONDS",
    )
    start_timeout: float = option(
        600.0,
        "seconds that the engine may load without getting on before it counts as hung and is killed",
        flag="--start-timeout",
        metavar="SECONDS",
    )
    position: Position | None = None
    """Where this process stands in a group that torchrun has started. Not a flag."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)

    def __post_init__(self) -> None:
        for name, choices in (
            ("load_format", LOAD_FORMATS),
            ("dtype", DTYPES),
            ("quantization", QUANTIZATIONS),
            ("device", DEVICES),
        ):
            value = getattr(self, name)
            if value not in choices:
                flag = "--" + name.replace("_", "-")
                raise ConfigError(f"{flag} {value}: choose one of {', '.join(choices)}")
        if self.max_model_len is not None and self.max_model_len < 1:
            raise ConfigError(f"--max-model-len {self.max_model_len}: at least 1 token must fit")
        if self.cpu_threads is not None and self.cpu_threads < 1:
            raise ConfigError(f"--cpu-threads {self.cpu_threads}: at least 1 thread must run the model")
        if self.tensor_parallel_size < 1:
            raise ConfigError(f"--tensor-parallel-size {self.tensor_parallel_size}: at least 1 rank must run the model")
        if self.position is not None and self.position.size != self.tensor_parallel_size:
            raise ConfigError(
                f"--tensor-parallel-size {self.tensor_parallel_size}: torchrun has started {self.position.size} "
                f"processes; write --tensor-parallel-size {self.position.size}, or start as many as you want ranks"
            )
        if self.step_timeout is not None and not 1 <= self.step_timeout <= 86400:
            raise ConfigError(f"--step-timeout {self.step_timeout:g}: choose 1 to 86400 seconds")
        if not 1 <= self.start_timeout <= 86400:
            raise ConfigError(f"--start-timeout {self.start_timeout:g}: choose 1 to 86400 seconds")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise ConfigError(f"--seed {self.seed}: the seed must fit in 64 bits")


def replace(config: EngineConfig, **changes: Any) -> EngineConfig:
    """A copy with some fields changed; the fields of `cache` and `scheduler` may be given by their own names."""
    cache_names = {f.name for f in dataclasses.fields(CacheConfig)}
    scheduler_names = {f.name for f in dataclasses.fields(SchedulerConfig)}
    cache = {name: changes.pop(name) for name in cache_names & changes.keys()}
    scheduler = {name: changes.pop(name) for name in scheduler_names & changes.keys()}
    return dataclasses.replace(
        config,
        cache=dataclasses.replace(config.cache, **cache),
        scheduler=dataclasses.replace(config.scheduler, **scheduler),
        **changes,
    )
