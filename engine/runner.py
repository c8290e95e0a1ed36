"""ModelRunner: one device with a loaded model and its KV cache. Loads, measures memory, runs steps.

Knows batches and sampling rows; not who is waiting, nor why a step holds what it holds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from pathlib import Path

import torch

from pronk.engine import batch as batches
from pronk.engine.cache import memory
from pronk.engine.config import EngineConfig
from pronk.engine.errors import ConfigError
from pronk.engine.model import llama
from pronk.engine.model.config import LlamaConfig
from pronk.engine.sampling.sampler import Sampled, SampleRow, sample
from pronk.engine.scheduler import Row
from pronk.engine.weights.checkpoint import open_checkpoint
from pronk.engine.weights.progress import track
from pronk.kernels import for_device

CPU_STEP_TOKENS = 256
GPU_STEP_TOKENS = 4096


@dataclass(frozen=True)
class Launched:
    """A step under way: what `collect` turns into tokens."""

    rows: list[Row]
    sampled: list[Sampled]


@dataclass(frozen=True)
class ModelRunner:
    """A model that can run. Make one with `load_runner`."""

    model: llama.Llama
    cache: memory.KVCache
    plan: memory.CachePlan
    device: torch.device
    dtype: torch.dtype
    block_size: int
    max_num_batched_tokens: int
    load_seconds: float

    def launch(self, rows: Rows[Row]) -> Launched:
        """Compute a step: keys and values of every row's tokens, and the next token of those rows that sample."""
        batch = batches.build(rows, self.block_size, self.device)
        with torch.inference_mode():
            logits = self.model.forward(batch, self.cache)
            sampling = [row for row in rows if row.samples]
            sampled = sample(logits, [_sample_row(row) for row in sampling])
        return Launched(sampling, sampled)

    def collect(self, launched: Launched) -> dict[str, Sampled]:
        """-> what each sampling row's request got, by request id."""
        return {row.sequence.request_id: sampled for row, sampled in zip(launched.rows, launched.sampled, strict=True)}


def _sample_row(row: Row) -> SampleRow:
    sequence = row.sequence
    return SampleRow(
        params=sequence.params,
        seed=sequence.seed,
        position=sequence.num_tokens,
        output_counts=sequence.output_counts,
        prompt_ids=sequence.prompt_ids,
        forbidden_ids=sequence.forbidden_ids,
    )


def load_runner(config: EngineConfig, folder: Path, report: Callable[[int, int], None]) -> ModelRunner:
    """Load the checkpoint in `folder` and allocate the cache.

    report(done, total) is called with bytes of weights. Raises CheckpointError and ConfigError.
    """
    started = time.monotonic()
    device = choose_device(config.device)
    checkpoint = open_checkpoint(folder, config.load_format, seed=config.seed or 0)
    dtype = choose_dtype(config.dtype, checkpoint.config)
    kernels = for_device(device.type)
    with torch.inference_mode():
        model = llama.load(
            checkpoint.config,
            kernels,
            track(checkpoint.tensors(), checkpoint.total_bytes, report=report),
            dtype=dtype,
            device=device,
            num_positions=min(config.max_model_len or 1 << 62, checkpoint.config.max_position_embeddings),
        )
        plan = memory.plan_cache(
            checkpoint.config,
            config.cache,
            dtype=dtype,
            device=device,
            free_bytes=memory.available_memory(device),
            max_num_seqs=config.scheduler.max_num_seqs,
            max_model_len=config.max_model_len,
        )
        cache = memory.allocate(checkpoint.config, plan.num_blocks, config.cache.block_size, dtype=dtype, device=device)
    default_tokens = CPU_STEP_TOKENS if device.type == "cpu" else GPU_STEP_TOKENS
    return ModelRunner(
        model=model,
        cache=cache,
        plan=plan,
        device=device,
        dtype=dtype,
        block_size=config.cache.block_size,
        max_num_batched_tokens=config.scheduler.max_num_batched_tokens or default_tokens,
        load_seconds=time.monotonic() - started,
    )


def choose_device(name: str) -> torch.device:
    """ "auto" is a GPU where torch sees one. ConfigError when a GPU is asked for that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "--device cuda: torch sees no GPU here; check the driver and that this torch was built for CUDA, "
            "or choose --device cpu"
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def choose_dtype(name: str, config: LlamaConfig) -> torch.dtype:
    """ "auto" is the checkpoint's own."""
    return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[
        config.dtype if name == "auto" else name
    ]
