"""The rotary frequencies and table, against transformers bit for bit and against the float64 reference."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from pronk.engine.model.config import LlamaConfig, RopeScaling
from pronk.engine.model.rope import cos_sin_table, inverse_frequencies

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "rope_golden.json").read_text())["cases"]


def config_of(head_dim: int, theta: float, scaling: RopeScaling | None) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=4 * head_dim,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        vocab_size=512,
        rms_norm_eps=1e-5,
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
        dtype="bfloat16",
        bos_token_id=None,
        eos_token_ids=(1,),
    )


CONFIGS = {
    "3.2 1B": config_of(64, 500000.0, RopeScaling(32.0, 1.0, 4.0, 8192)),
    "3.2 3B": config_of(128, 500000.0, RopeScaling(32.0, 1.0, 4.0, 8192)),
    "3.1 8B": config_of(128, 500000.0, RopeScaling(8.0, 1.0, 4.0, 8192)),
    "3 8B": config_of(128, 500000.0, None),
    "short": config_of(16, 10000.0, RopeScaling(4.0, 1.5, 3.0, 128)),
}


def oracle(config: LlamaConfig) -> torch.nn.Module:
    from transformers import LlamaConfig as TheirConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = config.rope_scaling
    block = {"rope_type": "default"} if scaling is None else {"rope_type": "llama3", **dataclasses.asdict(scaling)}
    return LlamaRotaryEmbedding(
        TheirConfig(
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            rope_parameters={**block, "rope_theta": config.rope_theta},
        )
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_frequencies_are_transformers_to_the_bit(name: str) -> None:
    config = CONFIGS[name]
    frequencies = inverse_frequencies(config)
    assert frequencies.dtype == torch.float32
    assert torch.equal(frequencies, oracle(config).inv_freq)


@pytest.mark.parametrize("name", CONFIGS)
def test_table_is_transformers_to_the_bit(name: str) -> None:
    config = CONFIGS[name]
    positions = 20000
    table = cos_sin_table(config, positions)
    assert table.shape == (positions, config.head_dim)
    assert table.dtype == torch.float32
    cos, sin = oracle(config)(torch.empty(0), torch.arange(positions)[None])
    half = config.head_dim // 2
    assert torch.equal(table[:, :half], cos[0, :, :half])
    assert torch.equal(table[:, half:], sin[0, :, :half])


@pytest.mark.parametrize("position", [1, 8191, 8192, 100_000, 131_071])
def test_a_row_does_not_depend_on_the_length_of_the_table(position: int) -> None:
    config = CONFIGS["3.2 1B"]
    row = cos_sin_table(config, position + 1)[position]
    assert torch.equal(row, cos_sin_table(config, 131_072)[position])


@pytest.mark.parametrize("case", GOLDEN, ids=[case["name"] for case in GOLDEN])
def test_frequencies_are_the_formulas(case: dict) -> None:
    scaling = None
    if case.get("factor"):
        scaling = RopeScaling(
            case["factor"],
            case["low_freq_factor"],
            case["high_freq_factor"],
            case["original_max_position_embeddings"],
        )
    frequencies = inverse_frequencies(config_of(case["head_dim"], case["rope_theta"], scaling))
    torch.testing.assert_close(frequencies, torch.tensor(case["inv_freq"]), rtol=1e-6, atol=0.0)
