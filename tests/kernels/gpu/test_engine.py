"""The whole engine on the GPU kernels: requests of every kind that come while others run, steps captured and one in
flight, against the same requests one by one on the definitions; and, in bfloat16, against themselves one by one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("msgspec", reason="the engine's messages need it, the kernels do not")

from pronk.engine import runner as runners
from pronk.engine.config import EngineConfig, replace
from pronk.engine.core import EngineCore
from pronk.engine.graphs import GPU_BUCKETS, CudaCapture, StepResult
from pronk.engine.request import Grammar, Request, SamplingParams, TokenLogprobs
from pronk.engine.tokenizer import load_vocabulary
from pronk.kernels import gpu, reference
from pronk.kernels.interface import Kernels

KINDS: tuple[dict[str, object], ...] = (
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 5, "top_k": 40, "top_p": 0.9},
    {"temperature": 0.7, "seed": 6, "min_p": 0.05, "logprobs": 2},
    {"temperature": 0.0, "repetition_penalty": 1.3, "presence_penalty": 0.5, "prompt_logprobs": 1},
    {"temperature": 1.0, "seed": 7, "grammar": Grammar("regex", "(ab|c)+d")},
    {"temperature": 0.0, "min_tokens": 3, "bad_words": ((5, 6), (7,))},
)

Answer = tuple[list[int], list[TokenLogprobs]]


def played(run: Callable[[], StepResult], /) -> tuple[Callable[[], object], StepResult]:
    """A capture without a GPU: a replay runs the step again and writes where its first run's results lie."""
    result = run()

    def replay() -> None:
        again = run()
        result.hidden.copy_(again.hidden)
        if result.token_ids is not None and again.token_ids is not None:
            result.token_ids.copy_(again.token_ids)

    return replay, result


@dataclasses.dataclass(frozen=True)
class Engine:
    """Makes engines over a checkpoint on one kernel set or another."""

    folder: Path
    device: str
    monkeypatch: pytest.MonkeyPatch

    def answers(self, kernels: Kernels, *, one_by_one: bool) -> dict[str, Answer]:
        device = self.device if kernels is gpu else "cpu"
        self.monkeypatch.setattr(runners, "for_device", lambda device, **options: kernels)
        config = replace(
            EngineConfig(model=str(self.folder), device=device, max_model_len=200, enforce_eager=True),
            memory="4MiB",
            max_num_seqs=4,
            max_num_batched_tokens=24,
        )
        runner = runners.load_runner(config, self.folder, lambda done, total: None)
        if not one_by_one:
            capture = CudaCapture() if device == "cuda" else played
            runner = dataclasses.replace(
                runners.with_graphs(runner, capture, GPU_BUCKETS, max_num_seqs=4), overlaps=True
            )
        return run(EngineCore(config, runner, load_vocabulary(self.folder)), one_by_one=one_by_one)


def run(core: EngineCore, *, one_by_one: bool) -> dict[str, Answer]:
    queue = [
        Request(
            request_id=str(number),
            prompt=[(7 * place + number) % 200 for place in range(1 + 9 * number)],
            params=SamplingParams(max_tokens=4, ignore_eos=True, **kind),  # type: ignore[arg-type]
        )
        for number, kind in enumerate(KINDS)
    ]
    found: dict[str, Answer] = {}
    while queue or core.has_work:
        if queue and not (one_by_one and core.has_work):
            core.add(queue.pop(0))
        for output in core.step():
            assert output.error is None, output.error
            tokens, scores = found.get(output.request_id, ([], []))
            scores = scores + (output.prompt_logprobs or []) + (output.logprobs or [])
            found[output.request_id] = (tokens + output.token_ids, scores)
    return found


@pytest.fixture
def make(
    device: str,
    tmp_path: Path,
    tiny_llama: Callable[..., dict[str, object]],
    write_checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[str], Engine]:
    def engine(dtype: str) -> Engine:
        return Engine(
            write_checkpoint(tmp_path, tiny_llama("1b", head_dim=64, num_hidden_layers=1), dtype=dtype),
            device,
            monkeypatch,
        )

    return engine


def test_the_answers_are_those_of_the_definitions(make: Callable[[str], Engine]) -> None:
    engine = make("float32")
    ours, theirs = engine.answers(gpu, one_by_one=False), engine.answers(reference, one_by_one=True)
    assert {name: tokens for name, (tokens, _) in ours.items()} == {
        name: tokens for name, (tokens, _) in theirs.items()
    }
    for name, (_, scores) in ours.items():
        mine = torch.tensor([entry.logprob for entry in scores])
        torch.testing.assert_close(mine, torch.tensor([e.logprob for e in theirs[name][1]]), rtol=0, atol=1e-4)


def test_the_schedule_never_changes_the_answer(make: Callable[[str], Engine]) -> None:
    engine = make("bfloat16")
    assert engine.answers(gpu, one_by_one=False) == engine.answers(gpu, one_by_one=True)
