"""StepGraphs: whole steps that were captured, replayed with one call instead of some hundred launches.

A graph fixes what is launched and where it reads and writes, not what stands there: so there is one for each bucket of
token counts, a step is padded to the next bucket, and its numbers are copied into the buffer that the graph reads.
Attention is planned anew by each replay, so one graph serves any mix of lengths up to its bounds. Graphs are captured
when they are needed a second time, or one by one while nobody waits (`capture_next`): a start does not wait for them.
On a GPU they are CUDA's; on a CPU the kernel set records its launches.

Knows how to pad, capture and replay; what a step computes is a function that it is given, and how a graph is captured
is another, so the padding is tested where no GPU is.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pronk.engine.batch import Batch, BatchBuilder, Layout
from pronk.engine.orders import Draw, RowOrder

CONTEXT_LENS = (2048, 8192, 32768, 131072)
"""Buckets of the longest sequence: they bound the memory in which attention's splits are merged."""
MAX_SPLITS = 1 << 16
"""Token and key-split pairs of one graph at most: 32 heads of 64 need half a gigabyte for so many."""
KEY_SPLIT = 256
USES_BEFORE_CAPTURE = 2


@dataclass(frozen=True)
class Buckets:
    """Numbers of tokens of the steps that are captured, rising. Longer steps keep a device busy for longer than it
    takes to launch them."""

    decode: Rows[int]
    """Of steps in which every sequence has one token."""
    mixed: Rows[int]
    """Of steps with parts of prompts."""
    ahead: Rows[int]
    """Those of `decode` that are captured before they are needed."""


_GPU_DECODE = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
GPU_BUCKETS = Buckets(decode=_GPU_DECODE, mixed=(16, 32, 64, 128, 256, 512), ahead=_GPU_DECODE)
CPU_BUCKETS = Buckets(decode=range(1, 33), mixed=(), ahead=())
"""A CPU would pay for padding, and a recording takes it milliseconds: there is one of each number, when it comes."""


@dataclass(frozen=True, order=True)
class Key:
    """What tells graphs apart."""

    num_tokens: int
    context_len: int
    decodes: bool
    """Every sequence has one token."""
    draw: Draw


@dataclass(frozen=True)
class StepResult:
    """What a step computed, in tensors that the next step with the same graph writes anew."""

    batch: Batch
    hidden: Tensor
    """[T, H], after the final norm."""
    token_ids: Tensor | None
    """int64 [R], when the step chose them; -1 where the numbers were not finite."""


class Capture(Protocol):
    """Records what `run` launches. -> a function that launches it again, and run's result."""

    def __call__(self, run: Callable[[], StepResult], /) -> tuple[Callable[[], object], StepResult]: ...


@dataclass(frozen=True)
class Graph:
    """A captured step."""

    layout: Layout
    buffer: Tensor
    """int64 [layout.size], on the device: the batch that a replay reads."""
    replay: Callable[[], object]
    result: StepResult


class StepGraphs:
    """The graphs captured so far."""

    def __init__(
        self,
        step: Callable[[Batch, Draw], StepResult],
        capture: Capture,
        builder: BatchBuilder,
        buckets: Buckets,
        *,
        block_size: int,
        max_model_len: int,
        max_num_seqs: int,
        device: torch.device,
    ) -> None:
        """step: computes a batch, and chooses its tokens as it is told."""
        self._step = step
        self._capture = capture
        self._builder = builder
        self._buckets = buckets
        self._block_size = block_size
        self._max_num_seqs = max_num_seqs
        self._device = device
        self._context_lens = [length for length in CONTEXT_LENS if length < max_model_len] + [max_model_len]
        self._graphs: dict[Key, Graph] = {}
        self._uses: Counter[Key] = Counter()
        self._ladder = self._expected()

    @property
    def num_captured(self) -> int:
        return len(self._graphs)

    def launch(self, rows: Rows[RowOrder], draw: Draw) -> StepResult | None:
        """Replay the step's graph. -> None when it has none (yet): then it must be launched operation by operation."""
        key = self.key_of(rows, draw)
        if key is None:
            return None
        graph = self._graphs.get(key)
        if graph is None:
            self._uses[key] += 1
            if self._uses[key] < USES_BEFORE_CAPTURE:
                return None
            graph = self.capture(key)
        staged = stage(self._builder, rows, graph.layout, self._device)
        graph.buffer.copy_(staged, non_blocking=True)
        graph.replay()
        return graph.result

    def capture_next(self) -> bool:
        """Capture one more of the graphs that decoding will need, small ones first. -> False when none is left."""
        for key in self._ladder:
            if key not in self._graphs:
                self.capture(key)
                return True
        return False

    def key_of(self, rows: Rows[RowOrder], draw: Draw) -> Key | None:
        """-> the smallest buckets that hold the step; None when none does."""
        decodes = all(row.num_tokens == 1 for row in rows)
        buckets = self._buckets.decode if decodes else self._buckets.mixed
        num_tokens = _at_least(buckets, sum(row.num_tokens for row in rows))
        context_len = _at_least(self._context_lens, max(row.end for row in rows))
        if num_tokens is None or context_len is None or len(rows) > self._num_seqs(num_tokens):
            return None
        if num_tokens * -(-context_len // KEY_SPLIT) > MAX_SPLITS:
            return None
        return Key(num_tokens, context_len, decodes, draw)

    def capture(self, key: Key) -> Graph:
        """Capture a graph on a step of nothing but padding, which changes nothing."""
        num_seqs = self._num_seqs(key.num_tokens)
        layout = Layout(
            num_tokens=key.num_tokens,
            num_seqs=num_seqs,
            num_samples=num_seqs,
            draws=key.draw == "sample",
            num_blocks=-(-key.context_len // self._block_size),
            max_len=1 if key.decodes else key.num_tokens,
            max_context_len=key.context_len,
        )
        buffer = stage(self._builder, (), layout, self._device).to(self._device)
        batch = layout.batch(buffer)
        with torch.inference_mode():
            replay, result = self._capture(lambda: self._step(batch, key.draw))
        graph = Graph(layout, buffer, replay, result)
        self._graphs[key] = graph
        return graph

    def _num_seqs(self, num_tokens: int) -> int:
        return min(num_tokens, self._max_num_seqs)

    def _expected(self) -> Iterator[Key]:
        for context_len in self._context_lens[:2]:
            for num_tokens in self._buckets.ahead:
                if num_tokens <= self._max_num_seqs:
                    yield Key(num_tokens, context_len, decodes=True, draw="largest")
                    yield Key(num_tokens, context_len, decodes=True, draw="sample")


def stage(builder: BatchBuilder, rows: Rows[RowOrder], layout: Layout, device: torch.device) -> Tensor:
    """-> the step's numbers on the host, int64 [layout.size], where the device can fetch them without being waited
    for."""
    staged = torch.empty(layout.size, dtype=torch.int64, pin_memory=device.type == "cuda")
    builder.fill(rows, layout, staged.numpy())
    return staged


class CudaCapture:
    """Captures with CUDA. All graphs take their memory from one pool: they are never replayed side by side, and what
    one of them returns is held, so no other writes there."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], StepResult], /) -> tuple[Callable[[], object], StepResult]:
        """See `Capture`."""
        # What is compiled, loaded or set up for good comes into being here, outside of the graph.
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = run()
        return graph.replay, result


def _at_least(buckets: Rows[int], value: int) -> int | None:
    """-> the first bucket, in rising order, that is not smaller; None past the last."""
    index = bisect.bisect_left(buckets, value)
    return buckets[index] if index < len(buckets) else None
