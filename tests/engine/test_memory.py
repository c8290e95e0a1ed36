"""The KV cache: how many bytes a block takes, how many blocks fit, and tensors that cost nothing until written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from pronk.engine.cache import memory
from pronk.engine.cache.memory import CPU_DEFAULT_LIMIT, CachePlan, allocate, block_bytes, plan_cache
from pronk.engine.config import CacheConfig
from pronk.engine.errors import ConfigError
from pronk.engine.model.config import LlamaConfig

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GIB = 2**30


def llama(layers: int, kv_heads: int, head_dim: int, context: int = 131072) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=4 * kv_heads * head_dim,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4 * kv_heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=512,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=None,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        dtype="bfloat16",
        bos_token_id=None,
        eos_token_ids=(1,),
    )


LLAMA_1B = llama(16, 8, 64)
LLAMA_3B = llama(28, 8, 128)
TINY = llama(2, 2, 16, context=1000)
TINY_BLOCK = 2 * 2 * 2 * 16 * 16 * 4
"""Bytes: keys and values, layers, KV heads, head_dim, tokens of a block, float32."""


@pytest.mark.parametrize(
    ("config", "dtype", "per_token"),
    [
        (LLAMA_1B, torch.bfloat16, 32_768),
        (LLAMA_1B, torch.float16, 32_768),
        (LLAMA_1B, torch.float32, 65_536),
        (LLAMA_3B, torch.bfloat16, 114_688),
        (TINY, torch.float32, 512),
    ],
)
@pytest.mark.parametrize("block_size", [16, 256])
def test_block_bytes(config: LlamaConfig, dtype: torch.dtype, per_token: int, block_size: int) -> None:
    """The known sizes of a token's keys and values in the 1B and the 3B."""
    assert block_bytes(config, block_size, dtype) == per_token * block_size


def test_128k_tokens_of_the_1b_are_4_gib() -> None:
    assert 131072 // 16 * block_bytes(LLAMA_1B, 16, torch.bfloat16) == 4 * GIB


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_bytes_are_what_is_allocated(dtype: torch.dtype) -> None:
    cache = allocate(TINY, 7, 32, dtype=dtype, device=CPU)
    assert cache.nbytes == 7 * block_bytes(TINY, 32, dtype)


def plan(
    config: LlamaConfig = TINY,
    *,
    free: int = 100 * GIB,
    size: str | None = None,
    seqs: int = 4,
    length: int | None = None,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
) -> CachePlan:
    return plan_cache(
        config,
        CacheConfig(memory=size),
        dtype=dtype,
        device=device,
        free_bytes=free,
        max_num_seqs=seqs,
        max_model_len=length,
    )


def test_room_for_all_sequences_of_full_length_is_enough() -> None:
    """A context of 1000 tokens is 63 blocks of 16."""
    assert plan(seqs=4) == CachePlan(4 * 63, 1000)
    assert plan(seqs=4, length=160) == CachePlan(4 * 10, 160)
    assert plan(seqs=4, length=161) == CachePlan(4 * 11, 161)


def test_without_a_size_the_cache_takes_two_fifths_of_what_is_free() -> None:
    assert plan(free=200 * TINY_BLOCK) == CachePlan(80, 1000)
    assert plan(free=160 * TINY_BLOCK) == CachePlan(64, 1000)


def test_on_a_cpu_it_takes_4_gib_at_most() -> None:
    per_block = block_bytes(LLAMA_1B, 16, torch.bfloat16)
    on_cpu = plan(LLAMA_1B, free=100 * GIB, seqs=128, dtype=torch.bfloat16)
    assert CPU_DEFAULT_LIMIT == 4 * GIB
    assert on_cpu == CachePlan(4 * GIB // per_block, 131072)
    on_gpu = plan(LLAMA_1B, free=100 * GIB, seqs=128, dtype=torch.bfloat16, device=CUDA)
    assert on_gpu == CachePlan(40 * GIB // per_block, 131072)


def test_a_size_is_taken_as_it_is() -> None:
    """Neither the free memory nor the number of sequences changes it; a part of a block is left over."""
    assert plan(size=str(100 * TINY_BLOCK + TINY_BLOCK - 1), free=1, seqs=1) == CachePlan(100, 1000)
    assert plan(LLAMA_1B, size="8GiB", free=1, dtype=torch.bfloat16).num_blocks == 16384


def test_a_cache_too_small_for_the_context_shortens_it() -> None:
    """When nobody asked for a length: every request that is let in fits."""
    assert plan(size=str(10 * TINY_BLOCK)) == CachePlan(10, 160)
    assert plan(free=50 * TINY_BLOCK) == CachePlan(20, 320)
    assert plan(size=str(62 * TINY_BLOCK)) == CachePlan(62, 992)
    assert plan(size=str(63 * TINY_BLOCK)) == CachePlan(63, 1000)


def test_a_length_that_was_asked_for_is_not_shortened() -> None:
    assert plan(size=str(10 * TINY_BLOCK), length=160) == CachePlan(10, 160)
    with pytest.raises(ConfigError) as caught:
        plan(size=str(10 * TINY_BLOCK), length=161)
    sentence = str(caught.value)
    assert "--max-model-len 161" in sentence
    assert "--kv-cache-memory" in sentence
    assert str(11 * TINY_BLOCK) in sentence
    assert "160 tokens" in sentence


def test_a_length_beyond_the_model_is_refused() -> None:
    assert plan(length=1000).max_model_len == 1000
    with pytest.raises(ConfigError, match=r"--max-model-len 1001: .* at most 1000 tokens"):
        plan(length=1001)


@pytest.mark.parametrize("arguments", [{"size": str(TINY_BLOCK - 1)}, {"free": 2 * TINY_BLOCK}, {"free": 0}], ids=str)
def test_no_room_for_a_block_is_refused(arguments: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=rf"no room for one block of {TINY_BLOCK} bytes: raise --kv-cache-memory"):
        plan(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_cache_is_zero_and_its_layers_are_apart(dtype: torch.dtype) -> None:
    cache = allocate(TINY, 5, 16, dtype=dtype, device=CPU)
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    assert len(cache.layers) == TINY.num_hidden_layers
    for tensor in tensors:
        assert tensor.shape == (5, 2, 16, 16)
        assert tensor.dtype == dtype
        assert tensor.is_contiguous()
        assert not tensor.any()
    for number, tensor in enumerate(tensors):
        tensor.fill_(number + 1)
    for number, tensor in enumerate(tensors):
        assert bool((tensor == number + 1).all())


def resident_bytes() -> int:
    (kilobytes,) = re.findall(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kilobytes) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux how much memory is resident")
def test_pages_are_taken_when_they_are_written() -> None:
    config = llama(2, 8, 64)
    num_blocks = GIB // block_bytes(config, 16, torch.bfloat16)
    before = resident_bytes()
    cache = allocate(config, num_blocks, 16, dtype=torch.bfloat16, device=CPU)
    assert cache.nbytes == GIB
    assert resident_bytes() - before < 16 * 2**20
    cache.layers[0].keys[: num_blocks // 8] = 1.0
    written = cache.layers[0].keys.nbytes // 8
    assert written <= resident_bytes() - before < written + 16 * 2**20


@pytest.mark.parametrize("size", [2**58, 2**64])
def test_a_size_that_the_system_cannot_give_is_refused(size: int) -> None:
    num_blocks = size // block_bytes(TINY, 16, torch.float32)
    with pytest.raises(ConfigError, match="lower --kv-cache-memory"):
        allocate(TINY, num_blocks, 16, dtype=torch.float32, device=CPU)


def test_available_memory_is_less_than_there_is() -> None:
    available = memory.available_memory(CPU)
    assert available > 0
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        (kilobytes,) = re.findall(r"MemTotal:\s+(\d+) kB", meminfo.read_text())
        assert available <= int(kilobytes) * 1024


CGROUPS: list[tuple[dict[str, str], int]] = [
    ({}, 1 << 62),
    ({"memory.max": "max\n", "memory.current": "500\n"}, 1 << 62),
    ({"memory.max": "1000\n", "memory.current": "400\n"}, 600),
    ({"memory.max": "1000\n", "memory.current": "1000\n"}, 0),
    ({"memory.max": "1000\n", "memory.current": "1001\n"}, 0),
    # Files that were read are counted as used, but the system gives them up: they are free.
    ({"memory.max": "1000\n", "memory.current": "1000\n", "memory.stat": "inactive_file 300\nactive_file 40\n"}, 340),
    ({"memory.max": "1000\n", "memory.current": "1000\n", "memory.stat": "file 700\nanon 300\n"}, 0),
    ({"memory/memory.limit_in_bytes": "1000\n", "memory/memory.usage_in_bytes": "900\n"}, 100),
    (
        {
            "memory/memory.limit_in_bytes": "1000\n",
            "memory/memory.usage_in_bytes": "900\n",
            "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 300\ntotal_active_file 40\n",
        },
        440,
    ),
]


@pytest.mark.parametrize(("files", "available"), CGROUPS)
def test_the_containers_limit(files: dict[str, str], available: int, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert memory._cgroup_available(tmp_path) == available


def test_the_smaller_of_system_and_container_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_system_available", lambda: 700)
    monkeypatch.setattr(memory, "_cgroup_available", lambda: 500)
    assert memory.available_memory(CPU) == 500


def test_an_fp8_cache_has_a_scale_for_each_token_and_head() -> None:
    dtype = torch.float8_e4m3fn
    cache = allocate(TINY, 5, 16, dtype=dtype, device=CPU)
    for layer in cache.layers:
        assert layer.keys.dtype == layer.values.dtype == dtype
        assert layer.key_scales is not None
        assert layer.value_scales is not None
        assert layer.key_scales.shape == layer.value_scales.shape == layer.keys.shape[:3]
        assert layer.key_scales.dtype == torch.float32
    assert cache.nbytes == 5 * block_bytes(TINY, 16, dtype)
