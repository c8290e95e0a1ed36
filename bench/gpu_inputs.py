"""Inputs of the GPU kernels at the shapes of the released models, made on the device. Knows no kernel."""

from __future__ import annotations

import dataclasses
import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pronk.engine.model import llama as llama_model
from pronk.engine.model.config import LlamaConfig
from pronk.engine.model.rope import cos_sin_table
from pronk.engine.model.split import split_of
from pronk.engine.parallel import ALONE, Collectives
from pronk.engine.weights.cut import part_of
from pronk.kernels.interface import LayerCache, Queries, SamplingBatch

BLOCK_SIZE = 16


def config(name: str, *, dry: bool) -> LlamaConfig:
    """name: 1B, 3B or 8B. dry: the same heads in a model of no size."""
    hidden, width, layers, heads, head_dim, tied = {
        "1B": (2048, 8192, 16, 32, 64, True),
        "3B": (3072, 8192, 28, 24, 128, True),
        "8B": (4096, 14336, 32, 32, 128, False),
    }[name]
    real = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=head_dim,
        vocab_size=128256,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=None,
        max_position_embeddings=131072,
        tie_word_embeddings=tied,
        dtype="bfloat16",
        bos_token_id=None,
        eos_token_ids=(128001,),
    )
    if not dry:
        return real
    group = heads // 8
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 512}
    return dataclasses.replace(
        real,
        **small,
        num_key_value_heads=1,
        num_attention_heads=group,
        eos_token_ids=(1,),
        max_position_embeddings=4096,
    )


@dataclass(frozen=True)
class Step:
    """A step's batch, as `Llama.forward` and the kernels take it."""

    positions: Tensor
    slots: Tensor
    queries: Queries
    logit_rows: Tensor


def block_tables(context_lens: list[int], *, block_size: int = BLOCK_SIZE, seed: int = 0) -> tuple[Tensor, int]:
    """Blocks in random order for sequences of these lengths. -> int64 [S, most blocks], and how many there are."""
    needed = [-(-context // block_size) for context in context_lens]
    order = torch.randperm(sum(needed), generator=torch.Generator().manual_seed(seed))
    tables = torch.zeros(len(needed), max(needed), dtype=torch.int64)
    for row, blocks in zip(tables, order.split(needed), strict=True):
        row[: len(blocks)] = blocks
    return tables, sum(needed)


def step(
    lens: list[int],
    context_lens: list[int],
    where: torch.device,
    *,
    block_size: int = BLOCK_SIZE,
    tables: Tensor | None = None,
) -> tuple[Step, int]:
    """-> the batch, and how many blocks the cache must have. tables: those of the sequences, if they have some."""
    made, num_blocks = block_tables(context_lens, block_size=block_size)
    tables = made if tables is None else tables
    positions, slots = [], []
    for blocks, length, context in zip(tables, lens, context_lens, strict=True):
        places = torch.arange(context - length, context)
        positions.append(places)
        slots.append(blocks[places // block_size] * block_size + places % block_size)
    ends = torch.tensor(lens).cumsum(0)
    queries = Queries(
        starts=(ends - torch.tensor(lens)).to(where),
        lens=torch.tensor(lens).to(where),
        context_lens=torch.tensor(context_lens).to(where),
        block_tables=tables.to(where),
        max_len=max(lens),
        max_context_len=max(context_lens),
    )
    return Step(torch.cat(positions).to(where), torch.cat(slots).to(where), queries, (ends - 1).to(where)), num_blocks


def cache(
    llama: LlamaConfig, num_blocks: int, where: torch.device, *, dtype: torch.dtype, block_size: int = BLOCK_SIZE
) -> LayerCache:
    """Normal numbers; with float8, scales of one."""
    shape = (num_blocks, llama.num_key_value_heads, block_size, llama.head_dim)
    keys, values = (torch.randn(shape, device=where, dtype=torch.bfloat16).to(dtype) for _ in range(2))
    if dtype != torch.float8_e4m3fn:
        return LayerCache(keys, values)
    scales = torch.ones(shape[:3], device=where)
    return LayerCache(keys, values, scales, scales.clone())


def random_model(
    gpu: Any,
    llama: LlamaConfig,
    where: torch.device,
    format: str,
    *,
    num_positions: int,
    tp: Collectives = ALONE,
) -> llama_model.Llama:
    """Weights of the family's spread: the same model in every process, and of it what the rank has."""
    hidden, width, head_dim = llama.hidden_size, llama.intermediate_size, llama.head_dim
    q_width, kv_width = llama.num_attention_heads * head_dim, llama.num_key_value_heads * head_dim
    layer_shapes = {
        "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (q_width, hidden), "self_attn.k_proj": (kv_width, hidden),
        "self_attn.v_proj": (kv_width, hidden), "self_attn.o_proj": (hidden, q_width),
        "mlp.gate_proj": (width, hidden), "mlp.up_proj": (width, hidden), "mlp.down_proj": (hidden, width),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (llama.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    for index in range(llama.num_hidden_layers):
        shapes |= {f"model.layers.{index}.{part}.weight": shape for part, shape in layer_shapes.items()}
    if not llama.tie_word_embeddings:
        shapes["lm_head.weight"] = (llama.vocab_size, hidden)

    split = split_of(llama, tp.rank, tp.size)

    def make(name: str, shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 1:
            return torch.ones(shape, device=where, dtype=torch.bfloat16)
        source = torch.Generator(where).manual_seed(zlib.crc32(name.encode()))
        whole = torch.randn(shape, device=where, dtype=torch.bfloat16, generator=source).mul_(0.02)
        return part_of(whole, split.cut(name))

    return llama_model.load(
        split,
        gpu,
        ((name, make(name, shape)) for name, shape in shapes.items()),
        dtype=torch.bfloat16,
        device=where,
        num_positions=num_positions,
        weight_format=format,  # type: ignore[arg-type]
        tp=tp,
    )


def rope_table(llama: LlamaConfig, length: int, where: torch.device) -> Tensor:
    return cos_sin_table(llama, length).to(where)


def sampling(
    rows: int,
    where: torch.device,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    entries: int = 0,
    vocab_size: int = 128256,
) -> SamplingBatch:
    """entries: tokens of each row with a penalty."""

    def full(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full((rows,), value, dtype=dtype, device=where)

    ids = torch.arange(entries, dtype=torch.int32, device=where) * (vocab_size // max(entries, 1))
    count = rows * entries
    return SamplingBatch(
        temperature=full(temperature),
        top_k=full(top_k, torch.int32),
        top_p=full(top_p),
        min_p=full(0.0),
        noise_keys=torch.arange(rows, device=where) * 0x1234567,
        repetition=full(1.1 if entries else 1.0),
        presence=full(0.5 if entries else 0.0),
        frequency=full(0.1 if entries else 0.0),
        entry_starts=(torch.arange(rows + 1, device=where) * entries).to(torch.int32),
        entry_ids=ids.repeat(rows),
        entry_bias=torch.zeros(count, device=where),
        entry_counts=torch.ones(count, dtype=torch.int32, device=where),
        entry_seen=torch.ones(count, dtype=torch.bool, device=where),
        mask=None,
        top_n=None,
        greedy=temperature == 0,
        plain=entries == 0,
    )
