"""What all layouts share: which is opened, dummy weights, and the report of progress."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pronk.engine.errors import CheckpointNotFoundError, ConfigError
from pronk.engine.weights.checkpoint import expected_tensors, open_checkpoint
from pronk.engine.weights.dummy import BLOCK, DummyCheckpoint
from pronk.engine.weights.huggingface import HuggingFaceCheckpoint
from pronk.engine.weights.meta import MetaCheckpoint
from pronk.engine.weights.progress import track

SMALL = {
    "hidden_size": 32,
    "head_dim": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
}


def test_which_layout_is_opened(tmp_path: Path, tiny_llama: Any, write_checkpoint: Any) -> None:
    config = tiny_llama("1b", **SMALL)
    write_checkpoint(tmp_path, config, layout="meta")
    assert isinstance(open_checkpoint(tmp_path), MetaCheckpoint)
    write_checkpoint(tmp_path, config)
    assert isinstance(open_checkpoint(tmp_path), HuggingFaceCheckpoint)
    assert isinstance(open_checkpoint(tmp_path, "pth"), MetaCheckpoint)
    assert isinstance(open_checkpoint(tmp_path, "dummy"), DummyCheckpoint)


def test_what_cannot_be_opened(tmp_path: Path, tiny_llama: Any, write_checkpoint: Any) -> None:
    with pytest.raises(CheckpointNotFoundError, match="is no folder"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointNotFoundError, match=r"neither config\.json nor params\.json"):
        open_checkpoint(tmp_path, "dummy")
    with pytest.raises(ConfigError, match="'gguf' is unknown"):
        open_checkpoint(write_checkpoint(tmp_path, tiny_llama("1b", **SMALL)), "gguf")


class TestDummy:
    @pytest.fixture
    def folder(self, tmp_path: Path, tiny_llama: Any, write_checkpoint: Any) -> Path:
        """A config without weights, whose embedding is larger than a block, in rows of a power of two."""
        folder = write_checkpoint(tmp_path, tiny_llama("8b", **{**SMALL, "hidden_size": 4096}))
        (folder / "model.safetensors").unlink()
        return folder

    def test_the_tensors_of_the_config(self, folder: Path) -> None:
        checkpoint = open_checkpoint(folder, "dummy")
        tensors = dict(checkpoint.tensors())
        assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected_tensors(checkpoint.config)
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
        assert checkpoint.num_bytes() == sum(tensor.numel() * 2 for tensor in tensors.values())

    def test_the_same_seed_gives_the_same(self, folder: Path) -> None:
        torch.manual_seed(1)
        first = dict(open_checkpoint(folder, "dummy", seed=7).tensors())
        torch.manual_seed(2)
        again = dict(open_checkpoint(folder, "dummy", seed=7).tensors())
        other = dict(open_checkpoint(folder, "dummy", seed=8).tensors())
        for name, tensor in first.items():
            assert torch.equal(tensor, again[name]), name
            assert torch.equal(tensor, other[name]) == ("norm" in name), name

    def test_numbers_are_spread_as_in_a_model(self, folder: Path) -> None:
        for name, tensor in open_checkpoint(folder, "dummy").tensors():
            if "norm" in name:
                assert torch.all(tensor == 1)
            else:
                assert abs(tensor.float().mean()) < 1e-3
                assert abs(tensor.float().std() - 0.02) < 1e-3

    def test_a_tensor_larger_than_a_block_is_filled_and_no_row_comes_twice(self, folder: Path) -> None:
        embedding = dict(open_checkpoint(folder, "dummy").tensors())["model.embed_tokens.weight"]
        assert embedding.numel() > BLOCK
        assert len(torch.unique(embedding.float(), dim=0)) == len(embedding)
        assert embedding[-1].float().std() > 0.01

    def test_tensors_of_one_shape_differ(self, folder: Path) -> None:
        tensors = dict(open_checkpoint(folder, "dummy").tensors())
        layer = "model.layers.0.self_attn"
        assert not torch.equal(tensors[f"{layer}.k_proj.weight"], tensors[f"{layer}.v_proj.weight"])


def test_progress_counts_bytes_as_tensors_are_used() -> None:
    tensors = [("a", torch.zeros(3, dtype=torch.bfloat16)), ("b", torch.zeros(2, 2))]
    reports: list[tuple[int, int]] = []
    seen = []
    for name, tensor in track(iter(tensors), 22, report=lambda done, total: reports.append((done, total))):
        seen.append((name, tensor, list(reports)))
    assert [(name, tensor) for name, tensor, _ in seen] == tensors
    assert [known for _, _, known in seen] == [[(0, 22)], [(0, 22), (6, 22)]]
    assert reports == [(0, 22), (6, 22), (22, 22)]
