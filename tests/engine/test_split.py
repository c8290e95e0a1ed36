"""A split model: the ranks' parts tile it, each rank's heads belong together, and what cannot be split is named."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pronk.engine.errors import ConfigError
from pronk.engine.model.config import LlamaConfig
from pronk.engine.model.split import Split, check_groups, possible_sizes, split_of
from pronk.engine.weights.cut import Cut, shape_of
from pronk.engine.weights.names import expected_tensors

# The 8B's shape, but for its number of layers.
EIGHT = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=1,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=128256,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=None,
    max_position_embeddings=131072,
    tie_word_embeddings=False,
    dtype="bfloat16",
    bos_token_id=None,
    eos_token_ids=(0,),
)
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


def splits_of(config: LlamaConfig, size: int) -> list[Split]:
    return [split_of(config, rank, size) for rank in range(size)]


@st.composite
def configs(draw: st.DrawFn) -> LlamaConfig:
    kv_heads = draw(st.integers(1, 8))
    return replace(
        EIGHT,
        num_attention_heads=kv_heads * draw(st.integers(1, 8)),
        num_key_value_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 40)),
        hidden_size=draw(st.integers(1, 50)),
        intermediate_size=draw(st.integers(1, 4)) * draw(st.sampled_from([1, 12, 64, 840])),
        vocab_size=draw(st.integers(1, 5000)),
        tie_word_embeddings=draw(st.booleans()),
    )


@st.composite
def configs_and_sizes(draw: st.DrawFn) -> tuple[LlamaConfig, int]:
    config = draw(configs())
    return config, draw(st.sampled_from(possible_sizes(config)))


@given(configs_and_sizes())
def test_the_ranks_parts_tile_every_tensor(drawn: tuple[LlamaConfig, int]) -> None:
    config, size = drawn
    splits = splits_of(config, size)
    for name, shape in expected_tensors(config).items():
        cuts = [split.cut(name) for split in splits]
        if size == 1 or "norm" in name:
            assert set(cuts) == {None}
            continue
        distinct = list(dict.fromkeys(cut for cut in cuts if cut is not None and cut.length))
        axis = 1 if "o_proj" in name or "down_proj" in name else 0
        assert {cut.axis for cut in distinct} == {axis}
        assert [cut.start for cut in distinct] == [0, *(cut.stop for cut in distinct[:-1])]
        assert distinct[-1].stop == shape[axis]
        copies = size // len(distinct)
        if "k_proj" in name or "v_proj" in name:
            assert cuts == [cut for cut in distinct for _ in range(copies)]
        elif name not in VOCABULARY:
            assert len(distinct) == size


@given(configs_and_sizes())
def test_the_config_of_a_rank_describes_its_parts(drawn: tuple[LlamaConfig, int]) -> None:
    config, size = drawn
    for split in splits_of(config, size):
        for name, shape in expected_tensors(config).items():
            if name not in VOCABULARY:
                assert shape_of(shape, split.cut(name)) == expected_tensors(split.config)[name], name
        changed = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
        assert replace(split.config, **{field: getattr(config, field) for field in changed}) == config


@given(configs_and_sizes())
def test_a_ranks_query_heads_find_their_keys_and_values(drawn: tuple[LlamaConfig, int]) -> None:
    config, size = drawn
    for split in splits_of(config, size):
        for head in range(split.config.num_attention_heads):
            here = split.first_kv_head + head // split.config.group
            assert here == (split.first_query_head + head) // config.group


@given(st.integers(1, 200_000), st.sampled_from([2, 4, 8, 16, 32]))
def test_token_ids_are_dealt_out_in_order_and_by_whole_words_of_a_mask(vocab_size: int, size: int) -> None:
    splits = splits_of(replace(EIGHT, vocab_size=vocab_size), size)
    each = math.ceil(Fraction(vocab_size, size) / 64) * 64
    assert [split.vocab_per_rank for split in splits] == [each] * size
    owned = [(split.rank, token) for split in splits for token in range(split.vocab_start, split.vocab_stop)]
    assert owned == [(token // each, token) for token in range(vocab_size)]
    for split in splits:
        assert {split.cut(name) for name in VOCABULARY} == {Cut(0, split.vocab_start, split.vocab_stop)}


def test_a_vocabulary_that_ends_before_the_ranks_do() -> None:
    splits = splits_of(replace(EIGHT, vocab_size=320), 4)
    assert [(split.vocab_start, split.vocab_stop) for split in splits] == [(0, 128), (128, 256), (256, 320), (320, 320)]
    assert splits_of(replace(EIGHT, vocab_size=5), 4)[3].cut("lm_head.weight") == Cut(0, 5, 5)


def test_one_rank_has_all_and_no_padding() -> None:
    config = replace(EIGHT, vocab_size=1001)
    split = split_of(config, 0, 1)
    assert split.config == config
    assert (split.vocab_start, split.vocab_stop, split.vocab_per_rank) == (0, 1001, 1001)


def test_the_8b_on_two_and_on_sixteen() -> None:
    second = split_of(EIGHT, 1, 2)
    layer = "model.layers.0"
    assert second.cut(f"{layer}.self_attn.q_proj.weight") == Cut(0, 2048, 4096)
    assert second.cut(f"{layer}.self_attn.v_proj.weight") == Cut(0, 512, 1024)
    assert second.cut(f"{layer}.self_attn.o_proj.weight") == Cut(1, 2048, 4096)
    assert second.cut(f"{layer}.mlp.up_proj.weight") == Cut(0, 7168, 14336)
    assert second.cut(f"{layer}.mlp.down_proj.weight") == Cut(1, 7168, 14336)
    assert second.cut("lm_head.weight") == Cut(0, 64128, 128256)
    sixteenth = split_of(EIGHT, 15, 16)
    assert (sixteenth.config.num_attention_heads, sixteenth.config.num_key_value_heads) == (2, 1)
    assert sixteenth.cut(f"{layer}.self_attn.k_proj.weight") == Cut(0, 896, 1024)
    assert [split_of(EIGHT, rank, 16).first_kv_head for rank in range(5)] == [0, 0, 1, 1, 2]


@given(configs(), st.integers(1, 70))
def test_what_can_be_split(config: LlamaConfig, size: int) -> None:
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    evenly = heads % size == 0 and config.intermediate_size % size == 0
    possible = evenly and (kv_heads % size == 0 or size % kv_heads == 0)
    assert (size in possible_sizes(config)) == possible
    if not possible:
        with pytest.raises(ConfigError):
            split_of(config, 0, size)


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        ({}, 3, "the model's 32 query heads cannot be dealt out evenly: choose 1, 2, 4, 8, 16 or 32"),
        ({}, 64, "the model's 32 query heads cannot be dealt out evenly: choose 1, 2, 4, 8, 16 or 32"),
        ({}, 0, "at least 1 rank must run the model: choose 1, 2, 4, 8, 16 or 32"),
        ({}, -2, "at least 1 rank must run the model: choose 1, 2, 4, 8, 16 or 32"),
        (
            {"num_attention_heads": 24, "num_key_value_heads": 6},
            4,
            "the model's 6 key/value heads can be neither dealt out nor repeated evenly: choose 1 or 2",
        ),
        ({"intermediate_size": 14338}, 4, "the MLP's width of 14338 cannot be cut evenly: choose 1 or 2"),
        ({"intermediate_size": 33}, 2, "the MLP's width of 33 cannot be cut evenly: choose 1"),
    ],
)
def test_a_refusal_says_what_does_not_divide_and_what_does(changes: dict[str, int], size: int, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        split_of(replace(EIGHT, **changes), 0, size)
    assert str(caught.value) == f"--tensor-parallel-size {size}: {message}"


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        ({"intermediate_size": 14336 + 32}, 4, "the 14368 inputs of down_proj cannot be cut .* 32, .*: choose 1$"),
        ({"intermediate_size": 192}, 4, "the 192 inputs of down_proj cannot be cut .* 32, .*: choose 1 or 2$"),
        ({"head_dim": 16}, 32, "the 512 inputs of o_proj cannot be cut .* 32, .*: choose 1, 2, 4, 8 or 16$"),
    ],
)
def test_groups_that_would_be_cut_in_two(changes: dict[str, int], size: int, message: str) -> None:
    split = split_of(replace(EIGHT, **changes), 0, size)
    with pytest.raises(ConfigError, match=f"^--tensor-parallel-size {size}: {message}"):
        check_groups(split, 32)
    check_groups(split, 8)


def test_groups_that_stay_whole() -> None:
    for size in (1, 2, 4, 8, 16, 32):
        check_groups(split_of(EIGHT, 0, size), 32)
    check_groups(split_of(replace(EIGHT, intermediate_size=33), 0, 1), 32)


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_that_is_none(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank {rank} is none of 2"):
        split_of(EIGHT, rank, 2)


def test_a_name_that_is_none() -> None:
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.gate\.weight is no tensor"):
        split_of(EIGHT, 0, 2).cut("model.layers.0.mlp.gate.weight")


def test_no_torch_is_imported() -> None:
    code = "import sys, pronk.engine.model.split; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
