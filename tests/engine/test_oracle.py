"""The whole model against transformers, in float32, on random checkpoints in both layouts."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pronk.engine.config import EngineConfig
from pronk.engine.config import replace as replace_config
from pronk.engine.llm import LLM
from pronk.engine.request import Request, SamplingParams
from pronk.engine.runner import ModelRunner
from pronk.engine.scheduler import Row
from pronk.engine.sequence import Sequence

SHAPES = [
    pytest.param(("1b", {"rope_factor": 32.0}, "hf", 1), id="1b-like-rope32-huggingface"),
    pytest.param(("3b", {"rope_factor": None}, "hf", 2), id="3b-like-no-rope-scaling-huggingface-2-files"),
    pytest.param(("8b", {"rope_factor": 8.0}, "hf", 1), id="8b-like-rope8-huggingface"),
    pytest.param(("1b", {"rope_factor": 32.0}, "meta", 2), id="1b-like-rope32-meta-2-shards"),
    pytest.param(("3b", {"rope_factor": 32.0}, "meta", 1), id="3b-like-rope32-meta"),
    pytest.param(("8b", {"rope_factor": 8.0}, "meta", 1), id="8b-like-rope8-meta"),
]


class Pair:
    """One checkpoint, loaded by us and by transformers."""

    def __init__(self, ours: Path, theirs: Path) -> None:
        from transformers import LlamaForCausalLM

        self.llm = LLM(replace_config(EngineConfig(model=str(ours), dtype="float32"), memory="192MiB"))
        self.model: Any = LlamaForCausalLM.from_pretrained(theirs, dtype=torch.float32).eval()


LONG = [
    pytest.param(("1b", {"rope_factor": 32.0, "hidden_size": 256, "num_attention_heads": 4}), id="1b-like"),
    pytest.param(("3b", {"rope_factor": None, "hidden_size": 384, "num_attention_heads": 3}), id="3b-like"),
    pytest.param(("8b", {"rope_factor": 8.0, "hidden_size": 256, "num_attention_heads": 2}), id="8b-like"),
]


@pytest.fixture(scope="module")
def load_pair(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_llama: Callable[..., dict[str, Any]],
    write_checkpoint: Callable[..., Path],
) -> Callable[..., Pair]:
    def load(like: str, changes: dict[str, Any], layout: str = "hf", shards: int = 1) -> Pair:
        config = tiny_llama(like, **changes)
        folder = tmp_path_factory.mktemp("oracle")
        ours = write_checkpoint(folder / "ours", config, layout=layout, shards=shards, dtype="float32")
        theirs = write_checkpoint(folder / "theirs", config, dtype="float32")
        return Pair(ours, theirs)

    return load


@pytest.fixture(scope="module", params=SHAPES)
def pair(request: pytest.FixtureRequest, load_pair: Callable[..., Pair]) -> Pair:
    return load_pair(*request.param)


@pytest.fixture(params=LONG)
def long_pair(request: pytest.FixtureRequest, load_pair: Callable[..., Pair]) -> Pair:
    like, changes = request.param
    return load_pair(like, {**changes, "num_hidden_layers": 1, "num_key_value_heads": 1})


def prompt_logits(runner: ModelRunner, prompt: list[int], chunk: int, wanted: list[int]) -> torch.Tensor:
    """The prompt in chunks over a cache in falling block order -> logits [wanted, V]."""
    request = Request(request_id="", prompt=prompt, params=SamplingParams())
    sequence = Sequence(request, seed=0, eos_token_ids=frozenset(), max_model_len=1 << 20, arrival=0)
    count = -(-len(prompt) // runner.block_size)
    sequence.block_table = list(reversed(range(count)))
    sequence.slot = 0
    logits = []
    for start in range(0, len(prompt), chunk):
        row = Row(sequence, start, min(chunk, len(prompt) - start), samples=False)
        hidden = runner.forward([row]).result.hidden
        rows = [place - start for place in wanted if start <= place < start + row.num_tokens]
        with torch.inference_mode():
            logits.append(runner.model.logits(hidden[torch.tensor(rows).long()]).float())
    return torch.cat(logits)


@pytest.mark.parametrize("length", [1, 17, 2_000])
def test_prompt_logits(pair: Pair, length: int) -> None:
    compare_logits(pair, length)


def test_prompt_logits_at_20000(long_pair: Pair) -> None:
    compare_logits(long_pair, 20_000)


def compare_logits(pair: Pair, length: int) -> None:
    generator = random.Random(length)
    prompt = [generator.randrange(512) for _ in range(length)]
    wanted = sorted({0, length // 3, length - 1, *range(0, length, 97)})
    ours = prompt_logits(pair.llm.core._runner, prompt, 512, wanted)
    with torch.inference_mode():
        theirs = pair.model(torch.tensor([prompt]), logits_to_keep=torch.tensor(wanted)).logits[0]
    # Relative to the row: a single logit may be near zero by chance.
    error = (ours - theirs).abs().amax(-1) / theirs.abs().amax(-1)
    assert error.max() < 1e-4


def test_greedy_tokens(pair: Pair) -> None:
    generator = random.Random(1)
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    for length in (3, 16, 40, 77, 130):
        prompts = [[generator.randrange(512) for _ in range(length)] for _ in range(10)]
        ours = [completion.token_ids for completion in pair.llm.generate(prompts, params)]
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            theirs = pair.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False, eos_token_id=None
            )
        assert ours == theirs[:, length:].tolist()
