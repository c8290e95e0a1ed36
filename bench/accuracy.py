"""What rounding costs: logits of models in bfloat16 and int8 against the same models in float32, by plain definitions.

    python bench/accuracy.py

Two models. cria, on its own manual. And one of random weights whose norms make a few channels 30 times as large as the
others, which is what makes 8 bits hard in large models: a row's scale is its largest number's.
"""

from __future__ import annotations

import dataclasses
import datetime
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_inputs
import torch
from models import model_folder
from torch import Tensor

from pronk.engine.model import llama
from pronk.engine.model.config import LlamaConfig
from pronk.engine.model.split import split_of
from pronk.engine.tokenizer import Tokenizer, load_vocabulary
from pronk.engine.weights.checkpoint import open_checkpoint
from pronk.kernels import reference
from pronk.kernels.cpu import CpuKernels
from pronk.kernels.cpu.cores import default_threads

CPU = torch.device("cpu")
LENGTH = 512
OUTLIERS = 6
TIMES = 30.0


@dataclass(frozen=True)
class Model:
    """Weights in float32, and texts to read."""

    name: str
    config: LlamaConfig
    tensors: list[tuple[str, Tensor]]
    texts: list[list[int]]


def cria() -> Model:
    with tempfile.TemporaryDirectory() as scratch:
        folder, _ = model_folder("cria", Path(scratch))
        checkpoint = open_checkpoint(folder, "auto", seed=0)
        tokenizer = Tokenizer(load_vocabulary(folder))
        manual = (folder / "recipe" / "manual.toml").read_text()
        tensors = [(name, tensor.float()) for name, tensor in checkpoint.tensors()]
    tokens = tokenizer.encode(manual)
    texts = [tokens[start : start + LENGTH] for start in range(0, 8 * LENGTH, LENGTH)]
    return Model("cria, its manual", checkpoint.config, tensors, texts)


def outlying() -> Model:
    """The 1B's proportions, a quarter as wide, four layers."""
    whole = gpu_inputs.config("1B", dry=False)
    config = dataclasses.replace(
        whole, hidden_size=512, intermediate_size=2048, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, vocab_size=8192, eos_token_ids=(1,),
    )  # fmt: skip
    source = torch.Generator().manual_seed(1)
    tensors = []
    for name, shape in _shapes(config):
        if len(shape) == 1:
            weight = torch.ones(shape)
            weight[torch.randperm(shape[0], generator=source)[:OUTLIERS]] = TIMES
        else:
            weight = torch.randn(shape, generator=source) * shape[1] ** -0.5
        tensors.append((name, weight))
    picks = random.Random(1)
    texts = [[picks.randrange(config.vocab_size) for _ in range(LENGTH)] for _ in range(4)]
    return Model(f"random, {OUTLIERS} channels of {TIMES:.0f} times the others", config, tensors, texts)


def _shapes(config: LlamaConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, width, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    yield "model.embed_tokens.weight", (config.vocab_size, hidden)
    yield "model.norm.weight", (hidden,)
    for index in range(config.num_hidden_layers):
        for part, shape in {
            "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,), "self_attn.q_proj": (q, hidden),
            "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden), "self_attn.o_proj": (hidden, q),
            "mlp.gate_proj": (width, hidden), "mlp.up_proj": (width, hidden), "mlp.down_proj": (hidden, width),
        }.items():  # fmt: skip
            yield f"model.layers.{index}.{part}.weight", shape


def logits(model: Model, kernels: Any, dtype: torch.dtype, format: Any) -> Tensor:
    """Of every position of every text, float32."""
    with torch.inference_mode():
        split = split_of(model.config, 0, 1)
        loaded = llama.load(
            split, kernels, model.tensors, dtype=dtype, device=CPU, num_positions=LENGTH, weight_format=format
        )
        found = []
        for text in model.texts:
            step, num_blocks = gpu_inputs.step([len(text)], [len(text)], CPU)
            layers = [
                gpu_inputs.cache(model.config, num_blocks, CPU, dtype=dtype)
                for _ in range(model.config.num_hidden_layers)
            ]
            hidden = loaded.forward(torch.tensor(text), step, SimpleNamespace(layers=layers))  # type: ignore[arg-type]
            found.append(loaded.logits(hidden).float())
    return torch.cat(found)


def line(name: str, how: str, found: Tensor, exact: Tensor) -> str:
    error = ((found - exact).norm(dim=1) / exact.norm(dim=1)).mean()
    same = (found.argmax(1) == exact.argmax(1)).float().mean()
    logs, wanted = found.log_softmax(1), exact.log_softmax(1)
    divergence = (wanted.exp() * (wanted - logs)).sum(1)
    return f"| {name} | {how} | {error:.4f} | {same:.2%} | {divergence.mean():.2e} | {divergence.max():.2e} |"


def main() -> None:
    torch.set_num_threads(2)
    kernels = CpuKernels(default_threads())
    print(f"`python bench/accuracy.py`, {datetime.date.today()}, {kernels.describe(torch.bfloat16)}\n")
    print("| model | weights | relative error of logits | same most likely token | mean KL | largest KL |")
    print("|---|---|---|---|---|---|")
    for model in (cria(), outlying()):
        exact = logits(model, reference, torch.float32, "plain")
        for dtype in (torch.float32, torch.bfloat16):
            for format in ("plain", "int8"):
                found = logits(model, kernels, dtype, format)
                how = f"{str(dtype).removeprefix('torch.')}, {format}"
                print(line(model.name, how, found, exact), flush=True)


if __name__ == "__main__":
    main()
