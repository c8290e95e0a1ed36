"""ModelRunner: one device with a model, or its share of one, and its KV cache. Loads, measures memory, runs steps.

Rank 0's turns a step's plan into orders, tells the other ranks, and carries them out like they do (`carry_out`). So
everything that a step computes is one code for all ranks, and where there is one rank nobody is told.

Knows batches and sampling rows; not who is waiting, nor why a step holds what it holds.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Rows
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from pronk.engine import footprint
from pronk.engine.batch import Batch, BatchBuilder, layout_of
from pronk.engine.cache import memory
from pronk.engine.config import EngineConfig
from pronk.engine.deltas import Deltas
from pronk.engine.errors import ConfigError
from pronk.engine.grammar import Mask
from pronk.engine.graphs import CPU_BUCKETS, GPU_BUCKETS, Buckets, Capture, CudaCapture, StepGraphs, StepResult, stage
from pronk.engine.model import llama
from pronk.engine.model.config import LlamaConfig
from pronk.engine.model.split import Split, check_groups, split_of
from pronk.engine.orders import Array, Compute, Draw, KeepWeights, Order, Prepare, Sample, Score, Weigh
from pronk.engine.parallel import ALONE, Collectives
from pronk.engine.request import TokenLogprobs
from pronk.engine.sampling.sampler import Sampled, SampleRow, SamplingArrays, build, read
from pronk.engine.scheduler import Row
from pronk.engine.sequence import Sequence
from pronk.engine.shelf import Shelf, shelf_for
from pronk.engine.weights.checkpoint import open_checkpoint
from pronk.engine.weights.progress import track
from pronk.engine.wire import RankShare
from pronk.kernels import for_device
from pronk.kernels.cpu import CpuKernels
from pronk.kernels.cpu.cores import default_threads
from pronk.kernels.interface import INT4_GROUP, Kernels, Queries, Samples, WeightFormat

STEP_TOKENS: Mapping[str, tuple[int, int | None]] = {"cpu": (128, 48), "cuda": (4096, None)}
"""In all, and of prompts beside sequences that decode."""
SCORED_TOGETHER = 64
"""Rows of logits that are worked out at once for log probabilities of a prompt: 32 MB of a large vocabulary."""


def tell_nobody(order: Order) -> None:
    """Where there is one rank."""
    del order


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
    max_num_prompt_tokens: int | None
    """Of a step in which sequences decode; None: what they leave of it."""
    deltas: Deltas
    builder: BatchBuilder
    last_tokens: Tensor
    """int64 [slots + 1], on the device: the token that each slot's sequence sampled last; padding has the last."""
    graphs: StepGraphs | None
    gathering: Callable[[], AbstractContextManager[None]]
    """In which the kernels of a forward pass may be launched together, in the end."""
    overlaps: bool
    """Whether a step is to be launched while the one before it runs."""
    load_seconds: float
    shelf: Shelf | None
    """Where packed weights are kept; None: nowhere."""
    keeping: Iterator[None] | None
    """Keeps them, step by step; None where they were there."""
    shares: list[RankShare]
    """What each rank has of the model."""
    tell: Callable[[Order], None]
    """Tells the other ranks."""

    def forward(self, rows: Rows[Row]) -> Forward:
        """Compute a step: keys and values of every row's tokens. Where that is all it takes, also the tokens that are
        sampled."""
        draw = draw_of([row for row in rows if row.samples])
        order = self.deltas.compute(rows, draw if self.model.head.can_draw or draw == "largest" else "nothing")
        self.tell(order)
        return Forward(rows, self.compute(order))

    def launch(self, forward: Forward, masks: Mapping[Sequence, Mask]) -> Launched:
        """Sample the next token of those rows that sample, and keep it for the step after. masks: which tokens may be
        sampled, for sequences where not all may."""
        sampling = [row for row in forward.rows if row.samples]
        result = forward.result
        prompt_logprobs = self._score_prompts(forward)
        if not sampling:
            return Launched((), None, prompt_logprobs)
        if result.token_ids is not None:
            samples = Samples(result.token_ids[: len(sampling)])
        else:
            rows = [_sample_row(row, masks.get(row.sequence)) for row in sampling]
            arrays = build(rows, self.model.config.vocab_size)
            if self.model.tp.size > 1:  # the order is a copy of the arrays, which nobody would read
                self.tell(sample_order(arrays))
            samples = self.sample(result, arrays)
        asked = [row.sequence.params.logprobs for row in sampling]
        return Launched(asked, Readback(samples), prompt_logprobs)

    def collect(self, launched: Launched) -> Collected:
        """Wait for a step's results."""
        sampled = [] if launched.samples is None else read(launched.samples.read(), launched.asked)
        return Collected(sampled, launched.prompt_logprobs)

    def prepare(self) -> bool:
        """While there is nothing to do: make ready what makes later steps faster, and then a later start. -> whether
        there may be more."""
        if self.graphs is not None:
            self.tell(Prepare())
            if self.graphs.capture_next():
                return True
        return self.keep_weights()

    def keep_weights(self) -> bool:
        """Write a little more of what a later start maps. -> whether there may be more."""
        if self.keeping is None:
            return False
        self.tell(KeepWeights())
        return next(self.keeping, self) is not self

    def runtime_bytes(self) -> int | None:
        """What the processes of all ranks take now beside weights and KV cache, in a CPU's memory; what they share
        counts for each. None on a GPU, and where the system does not tell."""
        if self.device.type != "cpu":
            return None
        self.tell(Weigh())
        return self.weigh()

    def _score_prompts(self, forward: Forward) -> dict[Sequence, list[TokenLogprobs]]:
        scored: dict[Sequence, list[TokenLogprobs]] = {}
        first = 0
        for row in forward.rows:
            top_n = row.sequence.params.prompt_logprobs or 0
            for start in range(row.scores.start, row.scores.stop, SCORED_TOGETHER):
                end = min(start + SCORED_TOGETHER, row.scores.stop)
                order = Score(first + start - row.start, row.sequence.tokens[start + 1 : end + 1], top_n)
                self.tell(order)
                entries = zip(*(each.tolist() for each in self.score(forward.result, order)), strict=True)
                scored.setdefault(row.sequence, []).extend(TokenLogprobs(*entry) for entry in entries)
            first += row.num_tokens
        return scored

    def carry_out(self, order: Order, last: StepResult | None) -> StepResult | None:
        """What a rank does that was told. last: what the last step computed. -> what the last step now is."""
        if isinstance(order, Compute):
            return self.compute(order)
        if isinstance(order, Prepare):
            if self.graphs is not None:
                self.graphs.capture_next()
        elif isinstance(order, KeepWeights):
            if self.keeping is not None:
                next(self.keeping, None)
        elif isinstance(order, Weigh):
            self.weigh()
        elif last is None:
            raise ValueError(f"{type(order).__name__} before any step was computed")
        elif isinstance(order, Sample):
            self.sample(last, arrays_of(order))
        elif isinstance(order, Score):
            self.score(last, order)
        return last

    def compute(self, order: Compute) -> StepResult:
        """Compute a step, by its graph where it has one."""
        with torch.inference_mode():
            if self.graphs is not None and not order.scores:
                result = self.graphs.launch(order.rows, order.draw)
                if result is not None:
                    return result
            layout = layout_of(order.rows, self.block_size, draws=order.draw == "sample")
            buffer = stage(self.builder, order.rows, layout, self.device).to(self.device, non_blocking=True)
            return self.step(layout.batch(buffer), order.draw)

    def step(self, batch: Batch, draw: Draw) -> StepResult:
        """The device's part of a step, with nothing in it that waits for the host: it can be captured."""
        known = batch.from_slots < 0
        token_ids = torch.where(known, batch.token_ids, self.last_tokens[batch.from_slots.clamp(min=0)])
        with self.gathering():
            hidden = self.model.forward(token_ids, batch, self.cache)
        chosen = None
        if draw == "largest":
            chosen = self.model.head.largest(hidden[batch.logit_rows])
        elif batch.sampling is not None:
            chosen = self.model.head.sample(hidden[batch.logit_rows], batch.sampling).token_ids
        if chosen is not None:
            self._keep(batch.to_slots, chosen)
        return StepResult(batch, hidden, chosen)

    def sample(self, result: StepResult, arrays: SamplingArrays) -> Samples:
        """The next tokens of the step's rows that sample, kept for the step after."""
        count = len(arrays.arrays["temperature"])
        with torch.inference_mode():
            hidden = result.hidden[result.batch.logit_rows[:count]]
            samples = self.model.head.sample(hidden, arrays.batch(self.device))
            self._keep(result.batch.to_slots[:count], samples.token_ids)
        return samples

    def score(self, result: StepResult, order: Score) -> tuple[Tensor, Tensor, Tensor]:
        """See `Head.logprobs`."""
        with torch.inference_mode():
            hidden = result.hidden[order.first : order.first + len(order.token_ids)]
            return self.model.head.logprobs(hidden, torch.tensor(order.token_ids, device=self.device), order.top_n)

    def weigh(self) -> int | None:
        """See `runtime_bytes`. To be called by all."""
        own = footprint.runtime_bytes(self.model.nbytes)
        everyones: list[int] = self.model.tp.all_gather(torch.tensor(-1 if own is None else own)).tolist()
        return None if min(everyones) < 0 else sum(everyones)

    def _keep(self, slots: Tensor, tokens: Tensor) -> None:
        """slots, tokens int64 [R]: what the next step reads. A token that is none stands for a row that has failed."""
        self.last_tokens[slots] = tokens.clamp(min=0)


def sample_order(arrays: SamplingArrays) -> Sample:
    """-> the order by which other ranks sample as this one does."""
    return Sample(
        {name: Array.of(array) for name, array in arrays.arrays.items()}, arrays.top_n, arrays.greedy, arrays.plain
    )


def arrays_of(order: Sample) -> SamplingArrays:
    """What `sample_order` made it of."""
    arrays = {name: array.numpy() for name, array in order.arrays.items()}
    return SamplingArrays(arrays, order.top_n, order.greedy, order.plain)


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


def load_runner(
    config: EngineConfig,
    folder: Path,
    report: Callable[[int, int], None],
    *,
    tp: Collectives = ALONE,
    tell: Callable[[Order], None] = tell_nobody,
) -> ModelRunner:
    """Load the checkpoint in `folder`, or this rank's share of it, and allocate the cache.

    report(done, total) is called with bytes of weights. tell: see `ModelRunner`. Raises CheckpointError, ConfigError
    and GroupError.
    """
    started = time.monotonic()
    device = choose_device(config.device, rank=tp.rank, neighbours=tp.neighbours)
    checkpoint = open_checkpoint(folder, config.load_format, seed=config.seed or 0)
    dtype = choose_dtype(config.dtype, checkpoint.config)
    kernels = choose_kernels(config, device, tp)
    weight_format = choose_weight_format(config.quantization, kernels)
    split = choose_split(checkpoint.config, config.quantization, rank=tp.rank, size=tp.size)
    cache_dtype = choose_cache_dtype(config.cache.kv_cache_dtype, dtype, device)
    check_kernels(kernels, split.config, config.cache.block_size, dtype=dtype, cache_dtype=cache_dtype, device=device)
    num_bytes = checkpoint.num_bytes(split.cut)
    shelf = None
    if isinstance(kernels, CpuKernels) and config.load_format != "dummy":
        variant = f"{dtype} {weight_format} {tp.rank} of {tp.size}"
        shelf = shelf_for(config.weights_cache, folder, kernels, variant=variant, num_bytes=num_bytes)
    with torch.inference_mode():
        kept = None if shelf is None else shelf.find(report)
        tensors = track(checkpoint.tensors(split.cut), num_bytes, report=report)
        parts = kept or llama.pack(split, kernels, tensors, dtype=dtype, device=device, weight_format=weight_format)
        num_positions = min(config.max_model_len or 1 << 62, checkpoint.config.max_position_embeddings)
        model = llama.assemble(split, kernels, parts, device=device, num_positions=num_positions, tp=tp)
        mapped = 0 if kept is None else model.nbytes
        plan, cache = make_cache(config, split, dtype=cache_dtype, device=device, tp=tp, mapped_bytes=mapped)
        last_tokens = torch.zeros(config.scheduler.max_num_seqs + 1, dtype=torch.int64, device=device)
    default_tokens, default_prompt_tokens = STEP_TOKENS[device.type]
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
        max_num_prompt_tokens=config.scheduler.max_num_prompt_tokens or default_prompt_tokens,
        deltas=Deltas(config.scheduler.max_num_seqs),
        builder=builder,
        last_tokens=last_tokens,
        graphs=None,
        gathering=nullcontext,
        overlaps=device.type == "cuda",
        load_seconds=time.monotonic() - started,
        shelf=shelf,
        keeping=None if shelf is None or kept is not None else shelf.keep(parts),
        shares=shares_of(model, cache, device),
        tell=tell,
    )
    if config.enforce_eager:
        return runner
    if device.type == "cuda":
        return with_graphs(runner, CudaCapture(), GPU_BUCKETS, max_num_seqs=config.scheduler.max_num_seqs)
    if isinstance(kernels, CpuKernels) and tp.size == 1:  # gloo's exchanges cannot be recorded
        runner = dataclasses.replace(runner, gathering=kernels.gathering)
        return with_graphs(runner, kernels.capture, CPU_BUCKETS, max_num_seqs=config.scheduler.max_num_seqs)
    return runner


def make_cache(
    config: EngineConfig,
    split: Split,
    *,
    dtype: torch.dtype,
    device: torch.device,
    tp: Collectives,
    mapped_bytes: int,
) -> tuple[memory.CachePlan, memory.KVCache]:
    """After the weights are loaded: this rank's part of a cache that is as long on all ranks. mapped_bytes: of weights
    in a file, which the system counts as memory that it could give. Raises ConfigError, and GroupError."""
    plan = memory.plan_cache(
        split.config,
        config.cache,
        dtype=dtype,
        device=device,
        free_bytes=share_of_memory(device, tp, mapped_bytes),
        max_num_seqs=config.scheduler.max_num_seqs,
        max_model_len=config.max_model_len,
    )
    return plan, memory.allocate(split.config, plan.num_blocks, config.cache.block_size, dtype=dtype, device=device)


def check_size(config: EngineConfig, folder: Path, size: int, neighbours: int) -> None:
    """Before anything is loaded: raises ConfigError where so many ranks cannot share the model in `folder`, or those of
    this host (`neighbours`) find no devices, and CheckpointError where it cannot be read."""
    checkpoint = open_checkpoint(folder, config.load_format, seed=config.seed or 0)
    choose_split(checkpoint.config, config.quantization, size=size)
    choose_device(config.device, neighbours=neighbours)


def choose_split(model: LlamaConfig, quantization: str, *, rank: int = 0, size: int = 1) -> Split:
    """Raises ConfigError for a number of ranks that the model cannot be dealt out to with int4's groups left whole."""
    split = split_of(model, rank, size)
    if quantization == "int4":
        check_groups(split, INT4_GROUP)
    return split


def share_of_memory(device: torch.device, tp: Collectives, mapped_bytes: int) -> int:
    """Bytes that each rank may count on: what the rank with the least has, so that all plan the same cache."""
    tp.meet()
    free = memory.available_memory(device)
    if device.type == "cpu":
        # Neighbours take from the same memory; that the first have begun while the last still look is no matter.
        free = max(0, free // tp.neighbours - mapped_bytes)
    if tp.size == 1:
        return free
    return int(tp.all_gather(torch.tensor([free], device=device)).min())


def shares_of(model: llama.Llama, cache: memory.KVCache, device: torch.device) -> list[RankShare]:
    """What each rank has, by rank. To be called by all."""
    split = model.split
    own = RankShare(model.nbytes, cache.nbytes, split.config.num_key_value_heads, split.vocab_stop - split.vocab_start)
    everyones = model.tp.all_gather(torch.tensor(msgspec.structs.astuple(own), device=device))
    return [RankShare(*numbers) for numbers in everyones.tolist()]


def with_graphs(runner: ModelRunner, capture: Capture, buckets: Buckets, *, max_num_seqs: int) -> ModelRunner:
    """-> the same runner, which replays its steps where they can be captured."""
    graphs = StepGraphs(
        runner.step,
        capture,
        runner.builder,
        buckets,
        block_size=runner.block_size,
        max_model_len=runner.plan.max_model_len,
        max_num_seqs=max_num_seqs,
        device=runner.device,
    )
    return dataclasses.replace(runner, graphs=graphs)


def choose_device(name: str, *, rank: int = 0, neighbours: int = 1) -> torch.device:
    """ "auto" is a GPU where torch sees one. rank: of those that share the model; neighbours: how many of them are on
    this host, each with a GPU of its own. Raises ConfigError when a GPU is asked for that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "--device cuda: torch sees no GPU here; check the driver and that this torch was built for CUDA, "
            "or choose --device cpu"
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu" or neighbours == 1:
        return torch.device(name)
    if torch.cuda.device_count() < neighbours:
        raise ConfigError(
            f"--tensor-parallel-size: {neighbours} ranks on this host need as many GPUs, and torch sees "
            f"{torch.cuda.device_count()}; lower it, or choose --device cpu"
        )
    device = torch.device("cuda", rank % neighbours)
    torch.cuda.set_device(device)
    return device


def choose_dtype(name: str, config: LlamaConfig) -> torch.dtype:
    """ "auto" is the checkpoint's own."""
    return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[
        config.dtype if name == "auto" else name
    ]


def choose_kernels(config: EngineConfig, device: torch.device, tp: Collectives = ALONE) -> Kernels:
    """Raises ConfigError where the device's set does not run."""
    num_threads = config.cpu_threads
    if num_threads is None and tp.neighbours > 1:
        num_threads = max(1, default_threads() // tp.neighbours)
    try:
        return for_device(device.type, vendor_products=config.vendor_products, num_threads=num_threads)
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
