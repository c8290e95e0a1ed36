"""ModelRunner: one device with a loaded model and its KV cache. Loads, measures memory, runs steps.

Knows batches and sampling rows; not who is waiting, nor why a step holds what it holds.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pronk.engine.batch import Batch, BatchBuilder, layout_of
from pronk.engine.cache import memory
from pronk.engine.config import EngineConfig
from pronk.engine.errors import ConfigError
from pronk.engine.grammar import Mask
from pronk.engine.graphs import Capture, CudaCapture, Draw, StepGraphs, StepResult, stage
from pronk.engine.model import llama
from pronk.engine.model.config import LlamaConfig
from pronk.engine.request import TokenLogprobs
from pronk.engine.sampling.sampler import Sampled, SampleRow, build, read
from pronk.engine.scheduler import Row
from pronk.engine.sequence import Sequence
from pronk.engine.weights.checkpoint import open_checkpoint
from pronk.engine.weights.progress import track
from pronk.kernels import for_device
from pronk.kernels.interface import Kernels, Queries, Samples, WeightFormat

CPU_STEP_TOKENS = 128
GPU_STEP_TOKENS = 4096
SCORED_TOGETHER = 64
"""Rows of logits that are worked out at once for log probabilities of a prompt: 32 MB of a large vocabulary."""


@dataclass(frozen=True)
class Forward:
    """A step whose tokens are computed, or being so."""

    rows: Rows[Row]
    result: StepResult


@dataclass(frozen=True)
class Launched:
    """A step under way: what `collect` waits for."""

    asked: Rows[int | None]
    """For each row that samples: how many log probabilities it wants, if any."""
    samples: Readback | None
    """None where no row samples."""
    prompt_logprobs: dict[Sequence, list[TokenLogprobs]]


@dataclass(frozen=True)
class Collected:
    """What a step found."""

    sampled: list[Sampled]
    """For each row that samples, in order."""
    prompt_logprobs: dict[Sequence, list[TokenLogprobs]]
    """For each sequence with a row that scores: the next tokens of its prompt."""


class Readback:
    """Samples on their way from the device to the host. They are copied: the next step may write where they lie."""

    def __init__(self, samples: Samples) -> None:
        on_gpu = samples.token_ids.device.type == "cuda"
        self._host = Samples(
            *(None if tensor is None else _copied(tensor, pin_memory=on_gpu) for tensor in _tensors(samples))  # type: ignore[arg-type]
        )
        self._arrived = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]
        if self._arrived is not None:
            self._arrived.record()

    def read(self) -> Samples:
        """Wait for them. -> they, on the host."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host


def _tensors(samples: Samples) -> tuple[Tensor | None, ...]:
    return samples.token_ids, samples.logprobs, samples.top_ids, samples.top_logprobs


def _copied(tensor: Tensor, *, pin_memory: bool) -> Tensor:
    return torch.empty_like(tensor, device="cpu", pin_memory=pin_memory).copy_(tensor, non_blocking=True)


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
    builder: BatchBuilder
    last_tokens: Tensor
    """int64 [slots + 1], on the device: the token that each slot's sequence sampled last; padding has the last."""
    graphs: StepGraphs | None
    overlaps: bool
    """Whether a step is to be launched while the one before it runs."""
    load_seconds: float

    def forward(self, rows: Rows[Row]) -> Forward:
        """Compute a step: keys and values of every row's tokens. Where that is all it takes, also the tokens that are
        sampled."""
        draw = draw_of([row for row in rows if row.samples])
        with torch.inference_mode():
            result = None
            if self.graphs is not None and not any(row.scores for row in rows):
                result = self.graphs.launch(rows, draw)
            if result is None:
                layout = layout_of(rows, self.block_size, draws=draw == "sample")
                buffer = stage(self.builder, rows, layout, self.device).to(self.device, non_blocking=True)
                result = self.step(layout.batch(buffer), draw)
        return Forward(rows, result)

    def step(self, batch: Batch, draw: Draw) -> StepResult:
        """The device's part of a step, with nothing in it that waits for the host: it can be captured."""
        known = batch.from_slots < 0
        token_ids = torch.where(known, batch.token_ids, self.last_tokens[batch.from_slots.clamp(min=0)])
        hidden = self.model.forward(token_ids, batch, self.cache)
        kernels, chosen = self.model.kernels, None
        if draw == "largest":
            chosen, _ = kernels.linear_argmax(hidden[batch.logit_rows], self.model.head)
        elif batch.sampling is not None:
            chosen = kernels.sample(self.model.logits(hidden[batch.logit_rows]), batch.sampling).token_ids
        if chosen is not None:
            self._keep(batch.to_slots, chosen)
        return StepResult(batch, hidden, chosen)

    def launch(self, forward: Forward, masks: Mapping[Sequence, Mask]) -> Launched:
        """Sample the next token of those rows that sample, and keep it for the step after. masks: which tokens may be
        sampled, for sequences where not all may."""
        sampling = [row for row in forward.rows if row.samples]
        result = forward.result
        with torch.inference_mode():
            prompt_logprobs = self._score_prompts(forward)
            if not sampling:
                return Launched((), None, prompt_logprobs)
            if result.token_ids is not None:
                samples = Samples(result.token_ids[: len(sampling)])
            else:
                logits = self.model.logits(result.hidden[result.batch.logit_rows[: len(sampling)]])
                rows = [_sample_row(row, masks.get(row.sequence)) for row in sampling]
                samples = self.model.kernels.sample(logits, build(rows, logits.shape[1], logits.device))
                self._keep(result.batch.to_slots[: len(sampling)], samples.token_ids)
            asked = [row.sequence.params.logprobs for row in sampling]
            return Launched(asked, Readback(samples), prompt_logprobs)

    def _keep(self, slots: Tensor, tokens: Tensor) -> None:
        """slots, tokens int64 [R]: what the next step reads. A token that is none stands for a row that has failed."""
        self.last_tokens[slots] = tokens.clamp(min=0)

    def collect(self, launched: Launched) -> Collected:
        """Wait for a step's results."""
        sampled = [] if launched.samples is None else read(launched.samples.read(), launched.asked)
        return Collected(sampled, launched.prompt_logprobs)

    def _score_prompts(self, forward: Forward) -> dict[Sequence, list[TokenLogprobs]]:
        scored: dict[Sequence, list[TokenLogprobs]] = {}
        first = 0
        for row in forward.rows:
            top_n = row.sequence.params.prompt_logprobs or 0
            for start in range(row.scores.start, row.scores.stop, SCORED_TOGETHER):
                end = min(start + SCORED_TOGETHER, row.scores.stop)
                hidden = forward.result.hidden[first + start - row.start : first + end - row.start]
                tokens = torch.tensor(row.sequence.tokens[start + 1 : end + 1], device=self.device)
                found = self.model.kernels.logprobs(self.model.logits(hidden), tokens, top_n)
                entries = zip(*(each.tolist() for each in found), strict=True)
                scored.setdefault(row.sequence, []).extend(TokenLogprobs(*entry) for entry in entries)
            first += row.num_tokens
        return scored


def draw_of(sampling: Rows[Row]) -> Draw:
    """-> what the device can do with the logits of these rows by itself."""
    if not sampling or not all(_is_plain(row) for row in sampling):
        return "nothing"
    return "largest" if all(row.sequence.params.temperature == 0 for row in sampling) else "sample"


def _is_plain(row: Row) -> bool:
    """Whether the row's next token depends on its logits and a few numbers, and nothing but the token is asked."""
    params = row.sequence.params
    changed = params.logit_bias or params.allowed_token_ids or row.sequence.ending_ids(row.end)
    return params.logprobs is None and not (row.sequence.needs_history or changed)


def _sample_row(row: Row, mask: Mask | None) -> SampleRow:
    sequence = row.sequence
    return SampleRow(
        params=sequence.params,
        seed=sequence.seed,
        position=row.end,
        output_counts=sequence.output_counts,
        prompt_ids=sequence.prompt_ids,
        forbidden_ids=sequence.ending_ids(row.end),
        output_ids=sequence.tokens[sequence.num_prompt :] if sequence.params.bad_words else (),
        mask=mask,
    )


def load_runner(config: EngineConfig, folder: Path, report: Callable[[int, int], None]) -> ModelRunner:
    """Load the checkpoint in `folder` and allocate the cache.

    report(done, total) is called with bytes of weights. Raises CheckpointError and ConfigError.
    """
    started = time.monotonic()
    device = choose_device(config.device)
    checkpoint = open_checkpoint(folder, config.load_format, seed=config.seed or 0)
    dtype = choose_dtype(config.dtype, checkpoint.config)
    kernels = choose_kernels(config, device)
    weight_format = choose_weight_format(config.quantization, kernels)
    cache_dtype = choose_cache_dtype(config.cache.kv_cache_dtype, dtype, device)
    check_kernels(
        kernels, checkpoint.config, config.cache.block_size, dtype=dtype, cache_dtype=cache_dtype, device=device
    )
    with torch.inference_mode():
        model = llama.load(
            checkpoint.config,
            kernels,
            track(checkpoint.tensors(), checkpoint.num_bytes(), report=report),
            dtype=dtype,
            device=device,
            num_positions=min(config.max_model_len or 1 << 62, checkpoint.config.max_position_embeddings),
            weight_format=weight_format,
        )
        plan = memory.plan_cache(
            checkpoint.config,
            config.cache,
            dtype=cache_dtype,
            device=device,
            free_bytes=memory.available_memory(device),
            max_num_seqs=config.scheduler.max_num_seqs,
            max_model_len=config.max_model_len,
        )
        cache = memory.allocate(
            checkpoint.config, plan.num_blocks, config.cache.block_size, dtype=cache_dtype, device=device
        )
        last_tokens = torch.zeros(config.scheduler.max_num_seqs + 1, dtype=torch.int64, device=device)
    default_tokens = CPU_STEP_TOKENS if device.type == "cpu" else GPU_STEP_TOKENS
    builder = BatchBuilder(
        num_slots=config.scheduler.max_num_seqs, max_model_len=plan.max_model_len, block_size=config.cache.block_size
    )
    runner = ModelRunner(
        model=model,
        cache=cache,
        plan=plan,
        device=device,
        dtype=dtype,
        block_size=config.cache.block_size,
        max_num_batched_tokens=config.scheduler.max_num_batched_tokens or default_tokens,
        builder=builder,
        last_tokens=last_tokens,
        graphs=None,
        overlaps=device.type == "cuda",
        load_seconds=time.monotonic() - started,
    )
    if device.type != "cuda" or config.enforce_eager:
        return runner
    return with_graphs(runner, CudaCapture(), max_num_seqs=config.scheduler.max_num_seqs)


def with_graphs(runner: ModelRunner, capture: Capture, *, max_num_seqs: int) -> ModelRunner:
    """-> the same runner, which replays its steps where they can be captured."""
    graphs = StepGraphs(
        runner.step,
        capture,
        runner.builder,
        block_size=runner.block_size,
        max_model_len=runner.plan.max_model_len,
        max_num_seqs=max_num_seqs,
        device=runner.device,
    )
    return dataclasses.replace(runner, graphs=graphs)


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


def choose_kernels(config: EngineConfig, device: torch.device) -> Kernels:
    """Raises ConfigError where the device's set does not run."""
    try:
        return for_device(device.type, vendor_products=config.vendor_products, num_threads=config.cpu_threads)
    except (ImportError, ValueError) as error:
        raise ConfigError(str(error)) from error


def check_kernels(
    kernels: Kernels,
    model: LlamaConfig,
    block_size: int,
    *,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Before anything is loaded: raises ConfigError for a model, a dtype or a cache that the set is not made for."""
    nobody = torch.zeros(0, dtype=torch.int64, device=device)
    queries = Queries(nobody, nobody, nobody, nobody.view(0, 1), max_len=1, max_context_len=1)
    try:
        kernels.describe(dtype)
        cache = memory.allocate(model, 1, block_size, dtype=cache_dtype, device=device)
        kernels.plan_attention(queries, num_heads=model.num_attention_heads, cache=cache.layers[0])
    except ValueError as error:
        raise ConfigError(str(error)) from error


def choose_weight_format(quantization: str, kernels: Kernels) -> WeightFormat:
    """Raises ConfigError when the device's kernels do not have it."""
    for weight_format in kernels.WEIGHT_FORMATS:
        if weight_format == ("plain" if quantization == "none" else quantization):
            return weight_format
    formats = ", ".join("none" if each == "plain" else each for each in kernels.WEIGHT_FORMATS)
    raise ConfigError(f"--quantization {quantization}: the kernels of this device have {formats}; choose one of those")


def choose_cache_dtype(name: str, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """ "auto" is the activations'. Raises ConfigError for what the device's kernels do not read."""
    if name == "auto":
        return dtype
    if device.type == "cpu":
        raise ConfigError(f"--kv-cache-dtype {name}: the CPU kernels have no such cache; leave it at auto")
    return torch.float8_e4m3fn
