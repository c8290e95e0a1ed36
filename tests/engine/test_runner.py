"""What a runner refuses before it loads anything, and how it tells what the device can do with a step's logits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from pronk.engine.config import EngineConfig
from pronk.engine.errors import ConfigError
from pronk.engine.model.config import LlamaConfig
from pronk.engine.request import Grammar, Request, SamplingParams
from pronk.engine.runner import check_kernels, choose_kernels, choose_split, draw_of
from pronk.engine.scheduler import Row
from pronk.engine.sequence import Sequence
from pronk.kernels import reference
from pronk.kernels.cpu import CpuKernels

CPU = torch.device("cpu")


def test_the_vendors_products_are_for_a_gpu() -> None:
    assert isinstance(choose_kernels(EngineConfig(cpu_threads=1), CPU), CpuKernels)
    with pytest.raises(ConfigError, match="--device cuda"):
        choose_kernels(EngineConfig(vendor_products=True), CPU)


MODEL = LlamaConfig(
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=512,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=None,
    max_position_embeddings=100,
    tie_word_embeddings=True,
    dtype="float32",
    bos_token_id=None,
    eos_token_ids=(1,),
)


def test_groups_of_int4_are_not_cut() -> None:
    assert choose_split(MODEL, "none", size=4).config.intermediate_size == 16
    assert choose_split(MODEL, "int4", size=2).config.intermediate_size == 32
    with pytest.raises(ConfigError, match=r"--tensor-parallel-size 4: the 64 inputs of o_proj .* choose 1 or 2"):
        choose_split(MODEL, "int4", size=4)


@pytest.mark.parametrize("operation", ["describe", "plan_attention"])
def test_what_a_kernel_set_is_not_made_for_is_said_at_start(operation: str) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise ValueError("heads of 80: run this model on the CPU")

    for kernels in (CpuKernels(1), reference):
        check_kernels(kernels, MODEL, 16, dtype=torch.float32, cache_dtype=torch.float32, device=CPU)
        names = [name for name in dir(kernels) if not name.startswith("_")]
        refusing = SimpleNamespace(**{name: getattr(kernels, name) for name in names} | {operation: refuse})
        with pytest.raises(ConfigError, match="heads of 80: run this model on the CPU"):
            check_kernels(
                refusing,  # type: ignore[arg-type]
                MODEL, 16, dtype=torch.float32, cache_dtype=torch.float32, device=CPU,
            )  # fmt: skip


def sampling_row(**params: object) -> Row:
    request = Request(request_id="a", prompt=[1, 2], params=SamplingParams(max_tokens=4, **params))  # type: ignore[arg-type]
    sequence = Sequence(request, seed=0, eos_token_ids=frozenset({9}), max_model_len=100, arrival=0.0)
    return Row(sequence, 0, 2, samples=True)


@pytest.mark.parametrize(
    ("params", "draw"),
    [
        ({"temperature": 0.0}, "largest"),
        ({"temperature": 1.0, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "seed": 3}, "sample"),
        ({"temperature": 0.0, "logprobs": 0}, "nothing"),
        ({"temperature": 0.0, "min_tokens": 1}, "nothing"),
        ({"temperature": 0.0, "logit_bias": {3: 1.0}}, "nothing"),
        ({"temperature": 0.0, "allowed_token_ids": (3,)}, "nothing"),
        ({"temperature": 0.0, "bad_words": ((3,),)}, "nothing"),
        ({"temperature": 0.0, "presence_penalty": 0.1}, "nothing"),
        ({"temperature": 0.0, "frequency_penalty": 0.1}, "nothing"),
        ({"temperature": 0.0, "repetition_penalty": 1.1}, "nothing"),
        ({"temperature": 0.0, "grammar": Grammar("regex", "a+")}, "nothing"),
    ],
    ids=str,
)
def test_what_the_device_can_do_by_itself(params: dict[str, object], draw: str) -> None:
    assert draw_of([sampling_row(**params)]) == draw
    assert draw_of([sampling_row(temperature=1.0), sampling_row(**params)]) == (
        "nothing" if draw == "nothing" else "sample"
    )


def test_nothing_is_drawn_where_nobody_samples() -> None:
    assert draw_of([]) == "nothing"
