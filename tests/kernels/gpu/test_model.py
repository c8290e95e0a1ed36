"""The whole model on the GPU kernels against the whole model on their definitions: a tiny Llama, prompts in chunks
beside decoding sequences, then greedy answers. And promise 1 through all layers: a sequence alone, and in company."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pronk.engine.model import llama
from pronk.engine.model.config import LlamaConfig
from pronk.engine.model.split import split_of
from pronk.kernels import gpu, reference
from pronk.kernels.interface import LayerCache, Queries

BLOCK_SIZE = 16
NUM_BLOCKS = 64
CONFIG = LlamaConfig(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    vocab_size=200,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=None,
    max_position_embeddings=512,
    tie_word_embeddings=True,
    dtype="float32",
    bos_token_id=None,
    eos_token_ids=(1,),
)
SHAPES = {
    "input_layernorm": (64,),
    "post_attention_layernorm": (64,),
    "self_attn.q_proj": (256, 64),
    "self_attn.k_proj": (128, 64),
    "self_attn.v_proj": (128, 64),
    "self_attn.o_proj": (64, 256),
    "mlp.gate_proj": (96, 64),
    "mlp.up_proj": (96, 64),
    "mlp.down_proj": (64, 96),
}


def load(kernels: Any, dtype: torch.dtype, device: str, weight_format: Any = "plain") -> llama.Llama:
    """The same random weights for every set."""
    source = torch.Generator().manual_seed(5)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (200, 64), "model.norm.weight": (64,)}
    for index in range(2):
        shapes |= {f"model.layers.{index}.{part}.weight": shape for part, shape in SHAPES.items()}
    tensors = [
        (name, torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=source) * shape[1] ** -0.5)
        for name, shape in shapes.items()
    ]
    with torch.inference_mode():
        return llama.load(
            split_of(CONFIG, 0, 1),
            kernels,
            tensors,
            dtype=dtype,
            device=torch.device(device),
            num_positions=512,
            weight_format=weight_format,
        )


class Model:
    """A model with a cache, run step by step. Blocks of sequence s: every third, from s on."""

    def __init__(self, kernels: Any, dtype: torch.dtype, device: str, *, scaled: bool = False, **options: Any) -> None:
        self.device = device
        self.model = load(kernels, dtype, device, **options)
        shape = (NUM_BLOCKS, 2, BLOCK_SIZE, 64)

        def layer() -> LayerCache:
            if not scaled:
                return LayerCache(*(torch.full(shape, torch.nan, dtype=dtype, device=device) for _ in range(2)))
            keys, values = (torch.zeros(shape, device=device).to(torch.float8_e4m3fn) for _ in range(2))
            return LayerCache(keys, values, *(torch.zeros(shape[:3], device=device) for _ in range(2)))

        self.cache = SimpleNamespace(layers=[layer() for _ in range(2)])
        self.computed = [0, 0, 0]

    def step(self, rows: list[tuple[int, list[int]]]) -> Tensor:
        """rows: (sequence, its next tokens). -> logits of each row's last token, [rows, V]."""
        tokens, positions, slots, starts, lens, contexts, tables = [], [], [], [], [], [], []
        for sequence, new in rows:
            first = self.computed[sequence]
            places = range(first, first + len(new))
            starts.append(len(tokens))
            tokens += new
            positions += places
            slots += [(sequence + 3 * (place // BLOCK_SIZE)) * BLOCK_SIZE + place % BLOCK_SIZE for place in places]
            lens.append(len(new))
            contexts.append(first + len(new))
            tables.append([sequence + 3 * index for index in range(NUM_BLOCKS // 3)])
            self.computed[sequence] += len(new)

        def there(numbers: Any) -> Tensor:
            return torch.tensor(numbers, device=self.device)

        queries = Queries(there(starts), there(lens), there(contexts), there(tables), max(lens), max(contexts))
        batch: Any = SimpleNamespace(positions=there(positions), slots=there(slots), queries=queries)
        with torch.inference_mode():
            hidden = self.model.forward(there(tokens), batch, self.cache)  # type: ignore[arg-type]
            return self.model.logits(hidden[there([end + n - 1 for end, n in zip(starts, lens, strict=True)])])


def prompt(length: int) -> list[int]:
    return [(7 * place + length) % 200 for place in range(length)]


def conversation(model: Model) -> tuple[list[Tensor], list[list[int]]]:
    """Three prompts that come in turn and in chunks, while those before decode. -> all logits, and the answers."""
    seen: list[Tensor] = []
    answers: list[list[int]] = [[], [], []]

    def run(rows: list[tuple[int, list[int]]]) -> None:
        logits = model.step(rows)
        seen.append(logits.float().cpu())
        for (sequence, _), token in zip(rows, logits.float().argmax(-1).tolist(), strict=True):
            answers[sequence].append(token)

    first, second, third = prompt(5), prompt(70), prompt(33)
    run([(0, first)])
    run([(0, answers[0][-1:]), (1, second[:40])])
    run([(0, answers[0][-1:]), (1, second[40:]), (2, third[:1])])
    run([(0, answers[0][-1:]), (1, answers[1][-1:]), (2, third[1:])])
    for _ in range(2):
        run([(sequence, answers[sequence][-1:]) for sequence in (2, 0, 1)])
    return seen, answers


def test_in_float32_the_answers_are_the_definitions(device: str) -> None:
    ours, our_answers = conversation(Model(gpu, torch.float32, device))
    theirs, their_answers = conversation(Model(reference, torch.float32, "cpu"))
    assert our_answers == their_answers
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5)


@pytest.mark.parametrize("scaled", [False, True])
def test_in_bfloat16_the_logits_are_near(device: str, scaled: bool) -> None:
    """Forced to the same tokens, since a rounding may turn one."""
    ours = Model(gpu, torch.bfloat16, device, scaled=scaled)
    theirs = Model(reference, torch.bfloat16, "cpu", scaled=scaled)
    for rows in ([(0, prompt(5)), (1, prompt(40))], [(0, [3]), (1, [4]), (2, prompt(20))], [(2, [5]), (0, [6])]):
        one, other = ours.step(rows).float().cpu(), theirs.step(rows).float()
        # A handful of roundings to 2^-9 through two layers, against logits of unit size.
        assert (one - other).abs().max() < 0.06 * other.abs().max()


@pytest.mark.parametrize("weight_format", ["int8", "fp8", "int4"])
def test_weights_in_fewer_bits(device: str, weight_format: str) -> None:
    ours = Model(gpu, torch.bfloat16, device, weight_format=weight_format)
    theirs = Model(reference, torch.bfloat16, "cpu", weight_format=weight_format)
    one, other = (model.step([(0, prompt(7))]).float().cpu() for model in (ours, theirs))
    assert (one - other).abs().max() < 0.06 * other.abs().max()


def test_a_sequence_has_the_same_bits_in_any_company(device: str) -> None:
    alone = Model(gpu, torch.bfloat16, device)
    whole = [alone.step([(1, prompt(70))]), alone.step([(1, [9])])]
    mixed = Model(gpu, torch.bfloat16, device)
    mixed.step([(0, prompt(5)), (1, prompt(70)[:33])])
    mixed.step([(1, prompt(70)[33:50]), (0, [8])])
    together = [mixed.step([(2, prompt(3)), (1, prompt(70)[50:])])[1:], mixed.step([(0, [1]), (1, [9]), (2, [2])])[1:2]]
    for one, other in zip(whole, together, strict=True):
        assert torch.equal(one, other)
