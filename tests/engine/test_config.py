"""What the engine can be told: sizes in words, each refusal with the flag it is about, and changed copies."""

from __future__ import annotations

import dataclasses

import pytest

from pronk.engine.config import (
    DEVICES,
    DTYPES,
    KEY_SPLIT,
    KV_CACHE_DTYPES,
    LOAD_FORMATS,
    QUANTIZATIONS,
    CacheConfig,
    EngineConfig,
    SchedulerConfig,
    parse_bytes,
    replace,
)
from pronk.engine.errors import ConfigError
from pronk.kernels.cpu.attention_kernels import SPLIT

SIZES = {
    "0": 0,
    "1": 1,
    "1000000": 10**6,
    "10B": 10,
    "1KiB": 2**10,
    "1kB": 1000,
    "512MiB": 512 * 2**20,
    "512 MiB": 512 * 2**20,
    "  512MiB  ": 512 * 2**20,
    "4GiB": 4 * 2**30,
    "4gib": 4 * 2**30,
    "4G": 4 * 2**30,
    "4g": 4 * 2**30,
    "4GB": 4 * 10**9,
    "1.5GiB": 3 * 2**29,
    "0.5GB": 5 * 10**8,
    "2TiB": 2 * 2**40,
    "2TB": 2 * 10**12,
}


@pytest.mark.parametrize(("text", "size"), SIZES.items())
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


def test_a_size_may_be_a_number() -> None:
    assert parse_bytes(4096) == 4096


@pytest.mark.parametrize(
    "text",
    ["", " ", "much", "GiB", "-1", "-1GiB", "1,5GiB", "1 5", "4GiBs", "4PB", "0x10", "1e9", "nan", ".5GiB", "5."],
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a size") as caught:
        parse_bytes(text)
    assert repr(text) in str(caught.value)
    assert "4GiB" in str(caught.value)


REFUSED: list[tuple[type, dict[str, object], str]] = [
    (CacheConfig, {"block_size": 0}, "--block-size 0"),
    (CacheConfig, {"block_size": 8}, "--block-size 8"),
    (CacheConfig, {"block_size": 48}, "--block-size 48"),
    (CacheConfig, {"block_size": 512}, "--block-size 512"),
    (CacheConfig, {"block_size": -16}, "--block-size -16"),
    (CacheConfig, {"memory": "0"}, "--kv-cache-memory 0"),
    (CacheConfig, {"memory": "0.0001KiB"}, "--kv-cache-memory 0.0001KiB"),
    (CacheConfig, {"memory": "much"}, "--kv-cache-memory: 'much'"),
    (SchedulerConfig, {"max_num_seqs": 0}, "--max-num-seqs 0"),
    (SchedulerConfig, {"max_num_batched_tokens": 0}, "--max-num-batched-tokens 0"),
    (EngineConfig, {"load_format": "gguf"}, "--load-format gguf"),
    (EngineConfig, {"dtype": "int4"}, "--dtype int4"),
    (EngineConfig, {"device": "tpu"}, "--device tpu"),
    (EngineConfig, {"max_model_len": 0}, "--max-model-len 0"),
    (EngineConfig, {"tensor_parallel_size": -2}, "--tensor-parallel-size -2"),
    (EngineConfig, {"tensor_parallel_size": 0}, "--tensor-parallel-size 0"),
    (EngineConfig, {"step_timeout": 0.5}, "--step-timeout 0.5"),
    (EngineConfig, {"step_timeout": float("nan")}, "--step-timeout nan"),
    (EngineConfig, {"start_timeout": 0.0}, "--start-timeout 0"),
    (EngineConfig, {"start_timeout": float("inf")}, "--start-timeout inf"),
    (EngineConfig, {"seed": 2**63}, f"--seed {2**63}"),
    (EngineConfig, {"seed": -(2**63) - 1}, f"--seed {-(2**63) - 1}"),
]


@pytest.mark.parametrize(("kind", "values", "start"), REFUSED, ids=[start for _, _, start in REFUSED])
def test_a_refusal_begins_with_its_flag(kind: type, values: dict[str, object], start: str) -> None:
    with pytest.raises(ConfigError) as caught:
        kind(**values)
    assert str(caught.value).startswith(start)


@pytest.mark.parametrize(
    ("flag", "values", "choices"),
    [
        ("--load-format", {"load_format": ""}, LOAD_FORMATS),
        ("--dtype", {"dtype": "fp16"}, DTYPES),
        ("--device", {"device": "CUDA"}, DEVICES),
        ("--quantization", {"quantization": "int2"}, QUANTIZATIONS),
        ("--kv-cache-dtype", {"kv_cache_dtype": "int8"}, KV_CACHE_DTYPES),
        ("--block-size", {"block_size": 17}, ("16", "32", "64", "128", "256")),
    ],
)
def test_a_refusal_names_what_can_be_chosen(flag: str, values: dict[str, object], choices: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=flag) as caught:
        replace(EngineConfig(), **values)
    assert all(choice in str(caught.value) for choice in choices)


ACCEPTED: list[tuple[type, dict[str, object]]] = [
    *((CacheConfig, {"block_size": size}) for size in (16, 32, 64, 128, 256)),
    (CacheConfig, {"memory": "1"}),
    (SchedulerConfig, {"max_num_seqs": 1, "max_num_batched_tokens": 1}),
    (EngineConfig, {"max_model_len": 1}),
    (EngineConfig, {"seed": 2**63 - 1}),
    (EngineConfig, {"seed": -(2**63)}),
    *((EngineConfig, {"load_format": value}) for value in LOAD_FORMATS),
    *((EngineConfig, {"dtype": value}) for value in DTYPES),
    *((EngineConfig, {"device": value}) for value in DEVICES),
]


@pytest.mark.parametrize(("kind", "values"), ACCEPTED, ids=str)
def test_edges_are_accepted(kind: type, values: dict[str, object]) -> None:
    config = kind(**values)
    assert {name: getattr(config, name) for name in values} == values


def test_the_key_split_is_the_kernels() -> None:
    """The server's process reads this module and must not load torch for one number."""
    assert SPLIT % KEY_SPLIT == 0


def test_every_flag_is_one_of_a_kind_and_documented() -> None:
    fields = [field for kind in (EngineConfig, CacheConfig, SchedulerConfig) for field in dataclasses.fields(kind)]
    flags = [field.metadata["flag"] for field in fields if "flag" in field.metadata]
    assert len(flags) == len(set(flags))
    assert all(flag.startswith("--") and flag == flag.lower() for flag in flags)
    assert all(field.metadata["help"] for field in fields if field.metadata)


def test_replace_reaches_the_parts() -> None:
    config = replace(
        EngineConfig(model="a", seed=3), dtype="float32", block_size=32, memory="1GiB", max_num_seqs=7, model="b"
    )
    assert config == EngineConfig(
        model="b",
        seed=3,
        dtype="float32",
        cache=CacheConfig(block_size=32, memory="1GiB"),
        scheduler=SchedulerConfig(max_num_seqs=7),
    )


def test_replace_keeps_what_is_not_named() -> None:
    config = replace(EngineConfig(), block_size=64, max_num_batched_tokens=100)
    assert replace(config, memory="1GiB").cache == CacheConfig(block_size=64, memory="1GiB")
    assert replace(config, max_num_seqs=3).scheduler == SchedulerConfig(max_num_seqs=3, max_num_batched_tokens=100)
    assert replace(config) == config


def test_replace_leaves_the_original() -> None:
    config = EngineConfig()
    replace(config, block_size=32, seed=1)
    assert config == EngineConfig()


def test_replace_checks_again_and_knows_no_other_names() -> None:
    with pytest.raises(ConfigError, match="--block-size 17"):
        replace(EngineConfig(), block_size=17)
    with pytest.raises(TypeError, match="blocksize"):
        replace(EngineConfig(), blocksize=32)


@pytest.mark.parametrize("config", [EngineConfig(), CacheConfig(), SchedulerConfig()], ids=lambda c: type(c).__name__)
def test_configs_are_frozen(config: object) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, dataclasses.fields(config)[0].name, None)  # type: ignore[arg-type]
