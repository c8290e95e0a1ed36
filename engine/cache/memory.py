"""The KV cache's tensors, their layout, and the arithmetic of how many blocks fit. Knows no sequence."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pronk.engine.config import CacheConfig, parse_bytes
from pronk.engine.errors import ConfigError
from pronk.engine.model.config import LlamaConfig
from pronk.kernels.interface import LayerCache

FREE_SHARE = 0.4
CPU_DEFAULT_LIMIT = 4 << 30


@dataclass(frozen=True)
class KVCache:
    """Each layer's blocks; zero where never written."""

    layers: list[LayerCache]

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)


@dataclass(frozen=True)
class CachePlan:
    """How large the cache is, and how long one request may be so that it always fits."""

    num_blocks: int
    max_model_len: int


def is_scaled(dtype: torch.dtype) -> bool:
    """Whether a cache of this dtype has a float32 scale for each token and head."""
    return dtype == torch.float8_e4m3fn


def block_bytes(config: LlamaConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers, keys and values: 2 · layers · KV heads · block_size · (head_dim · itemsize,
    and 4 for a scale)."""
    head = config.head_dim * dtype.itemsize + (torch.float32.itemsize if is_scaled(dtype) else 0)
    return 2 * config.num_hidden_layers * config.num_key_value_heads * block_size * head


def plan_cache(
    config: LlamaConfig,
    cache: CacheConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    free_bytes: int,
    max_num_seqs: int,
    max_model_len: int | None,
) -> CachePlan:
    """free_bytes: what the device has left after loading. Raises ConfigError when no useful cache fits.

    Without --kv-cache-memory the cache holds max_num_seqs requests of full length if that fits into its share.
    """
    one_block = block_bytes(config, cache.block_size, dtype)
    limit = max_model_len or config.max_position_embeddings
    if limit > config.max_position_embeddings:
        raise ConfigError(
            f"--max-model-len {limit}: the model was made for at most {config.max_position_embeddings} tokens"
        )
    blocks_of_one = -(-limit // cache.block_size)
    if cache.memory is not None:
        num_blocks = parse_bytes(cache.memory) // one_block
    else:
        share = int(free_bytes * FREE_SHARE)
        if device.type == "cpu":
            share = min(share, CPU_DEFAULT_LIMIT)
        num_blocks = min(share // one_block, max_num_seqs * blocks_of_one)
    if num_blocks < 1:
        raise ConfigError(f"the KV cache has no room for one block of {one_block} bytes: raise --kv-cache-memory")
    if num_blocks < blocks_of_one:
        fits = num_blocks * cache.block_size
        if max_model_len is not None:
            raise ConfigError(
                f"--max-model-len {limit} needs {blocks_of_one * one_block} bytes of KV cache, but {num_blocks} blocks "
                f"hold {fits} tokens: lower it, or raise --kv-cache-memory"
            )
        limit = fits
    return CachePlan(num_blocks, limit)


def allocate(
    config: LlamaConfig, num_blocks: int, block_size: int, *, dtype: torch.dtype, device: torch.device
) -> KVCache:
    """The tensors, zero. On a CPU their pages are taken from the system only when they are written.

    Raises ConfigError when the system gives no such memory.
    """
    shape = (num_blocks, config.num_key_value_heads, block_size, config.head_dim)

    def layer() -> LayerCache:
        keys, values = (_zeros(shape, dtype, device) for _ in range(2))
        if not is_scaled(dtype):
            return LayerCache(keys, values)
        return LayerCache(keys, values, *(_zeros(shape[:3], torch.float32, device) for _ in range(2)))

    return KVCache([layer() for _ in range(config.num_hidden_layers)])


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    count = 1
    for size in shape:
        count *= size
    # An anonymous map reads as zeros without being touched; torch.zeros would write every page at start. It is a shared
    # one, which the system counts apart from what else the process has (`footprint`).
    try:
        pages = mmap.mmap(-1, count * dtype.itemsize)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"the system gives no {count * dtype.itemsize} bytes for one layer of the KV cache ({error}): "
            "lower --kv-cache-memory"
        ) from error
    return torch.frombuffer(pages, dtype=dtype, count=count).view(shape)


def available_memory(device: torch.device) -> int:
    """Bytes free on the device now; on a CPU what the system can give, within the container's limit."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    return min(_system_available(), _cgroup_available())


def _system_available() -> int:
    """Linux tells; elsewhere half of the memory is taken as free."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    import os

    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _cgroup_available(root: Path = Path("/sys/fs/cgroup")) -> int:
    """What the cgroup's limit leaves, version 2 or 1; without a limit, no bound.

    Cached files count as free, as in MemAvailable: a checkpoint that was just read may fill all that the limit leaves.
    """
    for limit_file, usage_file, stat_file, prefix in (
        ("memory.max", "memory.current", "memory.stat", ""),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_"),
    ):
        limit, usage, stat = root / limit_file, root / usage_file, root / stat_file
        if limit.exists() and usage.exists():
            text = limit.read_text().strip()
            if text != "max":
                starts = (f"{prefix}active_file ", f"{prefix}inactive_file ")
                lines = stat.read_text().splitlines() if stat.exists() else []
                cached = sum(int(line.split()[1]) for line in lines if line.startswith(starts))
                return max(0, int(text) - int(usage.read_text()) + cached)
    return 1 << 62
