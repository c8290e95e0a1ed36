"""Captured steps without a GPU: the capture is played by running the step's function again on the same buffers, so
padding, buffers and the choice of a graph are what is tested. (`pytest -m gpu` captures in earnest.)"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pronk.engine.config import EngineConfig, replace
from pronk.engine.core import EngineCore
from pronk.engine.graphs import GPU_BUCKETS, CudaCapture, StepResult
from pronk.engine.request import Request, SamplingParams, TokenLogprobs
from pronk.engine.runner import ModelRunner, load_runner, with_graphs
from pronk.engine.tokenizer import Vocabulary, load_vocabulary


class PlayedCapture:
    """A replay runs the function anew and writes where the first run's results lie."""

    def __init__(self) -> None:
        self.captured = 0
        self.replayed = 0

    def __call__(self, run: Callable[[], StepResult], /) -> tuple[Callable[[], object], StepResult]:
        self.captured += 1
        result = run()

        def replay() -> None:
            self.replayed += 1
            again = run()
            result.hidden.copy_(again.hidden)
            if result.token_ids is not None and again.token_ids is not None:
                result.token_ids.copy_(again.token_ids)

        return replay, result


@pytest.fixture(scope="module")
def loaded(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_llama: Callable[..., dict[str, object]],
    write_checkpoint: Callable[..., Path],
) -> tuple[EngineConfig, ModelRunner, Vocabulary]:
    folder = write_checkpoint(tmp_path_factory.mktemp("graphs"), tiny_llama("1b"), dtype="float32")
    config = replace(
        EngineConfig(model=str(folder), max_model_len=600, enforce_eager=True), memory="8MiB", max_num_seqs=8
    )
    return config, load_runner(config, folder, lambda done, total: None), load_vocabulary(folder)


def requests() -> list[Request]:
    generator = random.Random(3)
    kinds = [
        {"temperature": 0.0},
        {"temperature": 0.0, "logprobs": 2},
        {"temperature": 1.0, "seed": 5, "top_k": 20},
        {"temperature": 0.0, "presence_penalty": 1.0},
        {"temperature": 0.0, "prompt_logprobs": 1},
        {"temperature": 0.0, "min_tokens": 5},
    ]
    return [
        Request(
            request_id=str(number),
            prompt=[generator.randrange(256) for _ in range(generator.choice([1, 3, 20, 70, 300]))],
            params=SamplingParams(max_tokens=generator.randrange(1, 30), **kinds[number % len(kinds)]),  # type: ignore[arg-type]
        )
        for number in range(18)
    ]


Answer = tuple[list[int], list[TokenLogprobs], str | None]


def answers(core: EngineCore, *, one_by_one: bool) -> dict[str, Answer]:
    """What each request gets: tokens, their log probabilities and those of the prompt, and how it ended."""
    found: dict[str, Answer] = {}
    queue = requests()
    while queue or core.has_work:
        if queue and not (one_by_one and core.has_work):
            core.add(queue.pop(0))
        for output in core.step():
            tokens, logprobs, _ = found.get(output.request_id, ([], [], None))
            logprobs = logprobs + (output.prompt_logprobs or []) + (output.logprobs or [])
            found[output.request_id] = (tokens + output.token_ids, logprobs, output.finish_reason)
    return found


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("one_by_one", [False, True])
def test_a_captured_step_gives_the_same_answers(
    loaded: tuple[EngineConfig, ModelRunner, Vocabulary], overlaps: bool, one_by_one: bool
) -> None:
    config, runner, vocabulary = loaded
    plain = answers(EngineCore(config, runner, vocabulary), one_by_one=True)
    capture = PlayedCapture()
    captured = dataclasses.replace(with_graphs(runner, capture, GPU_BUCKETS, max_num_seqs=8), overlaps=overlaps)
    core = EngineCore(config, captured, vocabulary)
    assert answers(core, one_by_one=one_by_one) == plain
    assert capture.replayed > capture.captured > 2
    assert core.stats.blocks_used == 0


def test_what_is_captured_ahead_is_what_decoding_needs(loaded: tuple[EngineConfig, ModelRunner, Vocabulary]) -> None:
    config, runner, vocabulary = loaded
    capture = PlayedCapture()
    core = EngineCore(config, with_graphs(runner, capture, GPU_BUCKETS, max_num_seqs=8), vocabulary)
    while core.prepare():
        pass
    ahead = capture.captured
    assert ahead == 8  # 1, 2, 4 and 8 tokens, greedy and not, in the one context bucket of a short model
    core.add(Request(request_id="a", prompt=[1], params=SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)))
    while core.has_work:
        core.step()
    assert (capture.captured, capture.replayed) == (ahead, 9)


def test_a_step_too_large_for_any_graph_is_launched_without_one(
    loaded: tuple[EngineConfig, ModelRunner, Vocabulary],
) -> None:
    config, runner, vocabulary = loaded
    capture = PlayedCapture()
    wide = dataclasses.replace(with_graphs(runner, capture, GPU_BUCKETS, max_num_seqs=8), max_num_batched_tokens=10_000)
    core = EngineCore(config, wide, vocabulary)
    for name in ("a", "b"):
        core.add(Request(request_id=name, prompt=[1] * 560, params=SamplingParams(max_tokens=1)))
        core.step()
    assert capture.captured == 0


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize(("dtype", "quantization", "threads"), [("float32", "none", 1), ("bfloat16", "int8", 3)])
def test_recorded_on_a_cpu(
    tmp_path: Path,
    tiny_llama: Callable[..., dict[str, object]],
    write_checkpoint: Callable[..., Path],
    dtype: str,
    quantization: str,
    threads: int,
    one_by_one: bool,
) -> None:
    """Not played: the kernels' own recordings, which `load_runner` chooses."""
    folder = write_checkpoint(tmp_path, tiny_llama("1b", head_dim=64), dtype=dtype)
    config = replace(
        EngineConfig(model=str(folder), max_model_len=2500, quantization=quantization, cpu_threads=threads),
        memory="8MiB",
        max_num_seqs=8,
    )
    vocabulary = load_vocabulary(folder)
    eager = load_runner(replace(config, enforce_eager=True), folder, lambda done, total: None)
    assert eager.graphs is None
    plain = answers(EngineCore(config, eager, vocabulary), one_by_one=True)
    recorded = load_runner(config, folder, lambda done, total: None)
    core = EngineCore(config, recorded, vocabulary)
    assert answers(core, one_by_one=one_by_one) == plain
    assert recorded.graphs is not None
    assert recorded.graphs.num_captured > (0 if one_by_one else 4)
    assert core.stats.blocks_used == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_captured_in_earnest(
    tmp_path: Path, tiny_llama: Callable[..., dict[str, object]], write_checkpoint: Callable[..., Path]
) -> None:
    folder = write_checkpoint(tmp_path, tiny_llama("1b", head_dim=64), dtype="bfloat16")
    config = replace(
        EngineConfig(model=str(folder), device="cuda", max_model_len=600, enforce_eager=True),
        memory="8MiB",
        max_num_seqs=8,
    )
    runner = load_runner(config, folder, lambda done, total: None)
    vocabulary = load_vocabulary(folder)
    plain = answers(EngineCore(config, runner, vocabulary), one_by_one=True)
    captured = with_graphs(runner, CudaCapture(), GPU_BUCKETS, max_num_seqs=8)
    assert answers(EngineCore(config, captured, vocabulary), one_by_one=False) == plain
