"""A model that ranks share is the model: float64 logits within 1e-12 of one rank's, the same greedy tokens in float32.
(Promise 1 at several ranks is in test_promise.py.)"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pronk.engine import footprint
from pronk.engine.batch import BatchBuilder, layout_of
from pronk.engine.cache.memory import allocate
from pronk.engine.config import EngineConfig, replace
from pronk.engine.core import EngineCore
from pronk.engine.errors import ConfigError
from pronk.engine.model import llama
from pronk.engine.model.split import split_of
from pronk.engine.orders import RowOrder
from pronk.engine.parallel import ALONE, ONE_SHOT_BYTES, Collectives, Ranks, add_in_order
from pronk.engine.request import Request, SamplingParams
from pronk.engine.runner import load_runner
from pronk.engine.tokenizer import load_vocabulary
from pronk.engine.weights.checkpoint import open_checkpoint
from pronk.kernels import reference

from .ranks import Crew, together

CPU = torch.device("cpu")


def shape(heads: int, kv_heads: int, width: int) -> dict[str, int]:
    sizes = {"hidden_size": heads * 16, "head_dim": 16, "intermediate_size": width}
    return {**sizes, "num_attention_heads": heads, "num_key_value_heads": kv_heads}


# KV heads 8, 2 and 1, groups of 2, 8 and 3. No number of ranks divides the vocabulary.
SHAPES = {"kv8": shape(16, 8, 160), "kv2": shape(16, 2, 96), "group3": shape(24, 8, 200), "kv1": shape(8, 1, 64)}
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [500, 0, 255], list(range(40, 120))]


@pytest.fixture(scope="module")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_llama: Callable[..., dict[str, object]],
    write_checkpoint: Callable[..., Path],
) -> Callable[..., Path]:
    written: dict[tuple[str, str, int], Path] = {}

    def one(shape: str, layout: str = "hf", shards: int = 1) -> Path:
        key = shape, layout, shards
        if key not in written:
            like = "8b" if shape == "kv1" else "1b"
            vocab = 512 if layout == "meta" else 517
            config = tiny_llama(like, **SHAPES[shape], vocab_size=vocab)
            folder = tmp_path_factory.mktemp("-".join(map(str, key)))
            written[key] = write_checkpoint(folder, config, layout=layout, shards=shards, dtype="float32")
        return written[key]

    return one


def logits_of(folder: Path, group: Collectives) -> Tensor:
    """Of every position of the prompts, in one step, float64: this rank's columns."""
    checkpoint = open_checkpoint(folder)
    split = split_of(checkpoint.config, group.rank, group.size)
    model = llama.load(
        split, reference, checkpoint.tensors(split.cut),  # type: ignore[arg-type]
        dtype=torch.float64, device=CPU, num_positions=200, tp=group,
    )  # fmt: skip
    rows, first = [], 0
    for slot, prompt in enumerate(PROMPTS):
        blocks = list(range(first, first + 8))
        rows.append(RowOrder(slot, 0, len(prompt), prompt, 0, blocks, samples=True))
        first += 8
    builder = BatchBuilder(num_slots=len(rows), max_model_len=200, block_size=16)
    layout = layout_of(rows, 16, draws=False)
    buffer = torch.empty(layout.size, dtype=torch.int64)
    builder.fill(rows, layout, buffer.numpy())
    batch = layout.batch(buffer)
    cache = allocate(split.config, first, 16, dtype=torch.float64, device=CPU)
    return model.logits(model.forward(batch.token_ids, batch, SimpleNamespace(layers=cache.layers)))  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize(
    ("shape", "layout", "shards"),
    [("kv8", "hf", 1), ("kv8", "meta", 2), ("kv2", "hf", 3), ("kv2", "meta", 1), ("group3", "hf", 1), ("kv1", "hf", 1),
     ("kv1", "meta", 1)],
)  # fmt: skip
def test_logits_are_those_of_one_rank(
    checkpoint: Callable[..., Path], shape: str, layout: str, shards: int, size: int
) -> None:
    folder = checkpoint(shape, layout, shards)
    alone = logits_of(folder, ALONE)
    ranks: list[Ranks] = []

    def one(group: Ranks) -> Tensor:
        ranks.append(group)
        return logits_of(folder, group)

    shared = torch.cat(together(size, one), dim=1)
    assert shared.shape == alone.shape
    assert (shared - alone).abs().max() <= 1e-12 * alone.abs().max()
    num_layers = open_checkpoint(folder).config.num_hidden_layers
    assert [group.counts.all_reduces for group in ranks] == [2 * num_layers + 1] * size


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("shape", ["kv8", "kv2", "group3", "kv1"])
def test_greedy_tokens_are_those_of_one_rank(checkpoint: Callable[..., Path], shape: str, size: int) -> None:
    folder = checkpoint(shape)
    config = replace(EngineConfig(model=str(folder), max_model_len=300, cpu_threads=1), memory="8MiB", max_num_seqs=4)
    alone = answers(config, load_runner(config, folder, lambda done, total: None), folder)
    crew = Crew(config, folder, size)
    assert answers(config, crew.runner, folder) == alone
    crew.close()


def test_what_ranks_take_to_run_is_told_in_one_sum(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = checkpoint("kv8")
    config = replace(EngineConfig(model=str(folder), max_model_len=300, cpu_threads=1), memory="8MiB", max_num_seqs=4)
    crew = Crew(config, folder, 2)
    monkeypatch.setattr(footprint, "STATUS", tmp_path / "status")
    assert crew.runner.runtime_bytes() is None
    (tmp_path / "status").write_text("RssAnon:\t 90000 kB\nRssFile:\t 10000 kB\n")
    weights = sum(share.weights_bytes for share in crew.runner.shares)
    assert crew.runner.runtime_bytes() == 2 * 100_000 * 1024 - weights
    crew.close()


def test_a_step_adds_twice_a_layer_and_once_for_its_embedding_and_loading_counts_for_nothing(
    checkpoint: Callable[..., Path],
) -> None:
    folder = checkpoint("kv8")
    config = replace(EngineConfig(model=str(folder), max_model_len=300, cpu_threads=1), memory="8MiB", max_num_seqs=4)
    crew = Crew(config, folder, 2)
    core = EngineCore(config, crew.runner, load_vocabulary(folder))
    assert (core.stats.all_reduces, core.stats.all_gathers, core.stats.collective_seconds) == (0, 0, 0)
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    core.add(Request(request_id="a", prompt=[1, 2, 3], params=params))
    while core.has_work:
        core.step()
    assert core.stats.all_reduces == core.stats.steps * (2 * crew.runner.model.config.num_hidden_layers + 1)
    assert core.stats.all_gathers > 0
    assert core.stats.collective_seconds > 0
    shares = crew.runner.shares
    assert [share.kv_heads for share in shares] == [4, 4]
    assert sum(share.token_ids for share in shares) == crew.runner.model.config.vocab_size
    assert shares[0].weights_bytes == crew.runner.model.nbytes
    assert shares[0].kv_cache_bytes == crew.runner.cache.nbytes
    crew.close()


def answers(config: EngineConfig, runner: Any, folder: Path) -> dict[str, list[int]]:
    core = EngineCore(config, runner, load_vocabulary(folder))
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    for number, prompt in enumerate(PROMPTS * 2):
        core.add(Request(request_id=str(number), prompt=prompt, params=params))
    found: dict[str, list[int]] = {}
    while core.has_work:
        for output in core.step():
            found.setdefault(output.request_id, []).extend(output.token_ids)
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [2, 3, 8])
def test_sums_do_not_depend_on_how_much_is_summed(dtype: torch.dtype, size: int) -> None:
    """One shot and two, whole and row by row: the same bits, which are those of adding in the ranks' order."""
    rows = ONE_SHOT_BYTES // (64 * dtype.itemsize) + 7
    parts = torch.randn(size, rows, 64, generator=torch.Generator().manual_seed(size)).to(dtype)

    def one(group: Ranks) -> tuple[Tensor, Tensor]:
        own = parts[group.rank]
        return group.all_reduce(own), torch.cat([group.all_reduce(own[:5]), group.all_reduce(own[5:9])])

    expected = add_in_order(parts)
    for large, small in together(size, one):
        assert torch.equal(large, expected)
        assert torch.equal(small, expected[:9])
    wide = parts.to(torch.promote_types(dtype, torch.float32))
    by_hand = wide[0]
    for part in wide[1:]:
        by_hand = by_hand + part
    assert torch.equal(expected, by_hand.to(dtype))


def test_a_size_that_does_not_divide_is_refused_before_anything_is_loaded(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("kv8")
    for file in folder.glob("*.safetensors"):
        assert file.stat().st_size
    config = EngineConfig(model=str(folder), cpu_threads=1)

    def load(group: Collectives) -> None:
        load_runner(config, folder, lambda done, total: pytest.fail("it reads weights"), tp=group)

    with pytest.raises(ConfigError, match="--tensor-parallel-size 3: the model's 16 query heads"):
        together(3, load)
