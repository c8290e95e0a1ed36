"""Hugging Face's layout: what transformers saved comes back to the bit, strays are skipped, what is wrong is named."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from pronk.engine.errors import CheckpointError, CheckpointFormatError, CheckpointNotFoundError, TensorError
from pronk.engine.weights.checkpoint import expected_tensors, open_checkpoint
from pronk.engine.weights.huggingface import HuggingFaceCheckpoint

SMALL = {
    "hidden_size": 32,
    "head_dim": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
}
INDEX = "model.safetensors.index.json"
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def small(tmp_path: Path, tiny_llama: Any, write_checkpoint: Any) -> Path:
    """A tied checkpoint in one file."""
    return write_checkpoint(tmp_path / "small", tiny_llama("1b", **SMALL))


@pytest.fixture
def sharded(tmp_path: Path, tiny_llama: Any, write_checkpoint: Any) -> Path:
    """The same in three files with an index."""
    return write_checkpoint(tmp_path / "sharded", tiny_llama("1b", **SMALL), shards=3)


def change(file: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    edit(tensors)
    save_file(tensors, file)


def change_json(file: Path, **changes: Any) -> None:
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Copies: the tensors themselves are views of files, which the tests overwrite."""
    return {name: tensor.clone() for name, tensor in open_checkpoint(folder).tensors()}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert sorted(left) == sorted(right)
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(("like", "dtype"), [("1b", "bfloat16"), ("3b", "float16"), ("8b", "float32")])
def test_what_transformers_saved(
    tmp_path: Path, tiny_llama: Any, write_checkpoint: Any, like: str, dtype: str, shards: int
) -> None:
    folder = write_checkpoint(tmp_path, tiny_llama(like), shards=shards, dtype=dtype)
    saved: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        saved.update(load_file(file))
    checkpoint = open_checkpoint(folder)
    assert isinstance(checkpoint, HuggingFaceCheckpoint)
    assert checkpoint.config.dtype == dtype
    read = list(checkpoint.tensors())
    assert_same(dict(read), saved)
    assert len(read) == len(saved)
    assert {name: tuple(tensor.shape) for name, tensor in read} == expected_tensors(checkpoint.config)
    assert checkpoint.num_bytes() == sum(tensor.numel() * tensor.element_size() for tensor in saved.values())
    assert checkpoint.config.num_parameters == sum(tensor.numel() for tensor in saved.values())


def test_files_without_an_index(sharded: Path) -> None:
    indexed = tensors_of(sharded)
    (sharded / INDEX).unlink()
    assert_same(tensors_of(sharded), indexed)


def test_the_index_decides_which_files_are_read(sharded: Path) -> None:
    (sharded / "model-00004-of-00004.safetensors").write_bytes(b"left over from another download")
    assert len(list(open_checkpoint(sharded).tensors())) == 2 + 9 * 2


def test_metas_folder_inside_is_left_alone(small: Path) -> None:
    (small / "original").mkdir()
    save_file({"stranger": torch.zeros(1)}, small / "original" / "model.safetensors")
    assert len(list(open_checkpoint(small).tensors())) == 2 + 9 * 2


@pytest.mark.parametrize("shards", [1, 3])
def test_stray_tensors_are_skipped(tmp_path: Path, tiny_llama: Any, write_checkpoint: Any, shards: int) -> None:
    """The head that tied exports store again, and the rotary buffer of old ones."""
    folder = write_checkpoint(tmp_path, tiny_llama("1b", **SMALL), shards=shards)
    clean = tensors_of(folder)
    file = max(folder.glob("*.safetensors"))
    stray = {
        "lm_head.weight": torch.zeros(512, 32, dtype=torch.bfloat16),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.rotary_emb.inv_freq": torch.ones(4, dtype=torch.float64),
    }
    change(file, lambda tensors: tensors.update(stray))
    if shards > 1:
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        change_json(folder / INDEX, weight_map={**weight_map, **dict.fromkeys(stray, file.name)})
    assert_same(tensors_of(folder), clean)


def test_an_untied_head_is_required(tmp_path: Path, tiny_llama: Any, write_checkpoint: Any) -> None:
    folder = write_checkpoint(tmp_path, tiny_llama("8b", **SMALL))
    change(folder / "model.safetensors", lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(TensorError, match=r"lm_head\.weight, expected with shape \[512, 32\]"):
        open_checkpoint(folder)


def test_a_config_without_dtype_takes_the_weights_own(tmp_path: Path, tiny_llama: Any, write_checkpoint: Any) -> None:
    folder = write_checkpoint(tmp_path, tiny_llama("1b", **SMALL), dtype="float32")
    change_json(folder / "config.json", dtype=None)
    assert open_checkpoint(folder).config.dtype == "float32"


def test_a_missing_tensor(small: Path) -> None:
    change(small / "model.safetensors", lambda tensors: (tensors.pop(DOWN), tensors.pop("model.norm.weight")))
    with pytest.raises(TensorError, match=rf"{re.escape(str(small))}.*{DOWN}.*\[32, 16\], and 1 more"):
        open_checkpoint(small)


def test_an_unexpected_tensor(small: Path) -> None:
    name = "model.layers.2.input_layernorm.weight"
    change(small / "model.safetensors", lambda tensors: tensors.update({name: torch.ones(32)}))
    with pytest.raises(TensorError, match=rf"model\.safetensors: tensor {name}"):
        open_checkpoint(small)


def test_a_wrong_shape(small: Path) -> None:
    change(small / "model.safetensors", lambda tensors: tensors.update({DOWN: tensors[DOWN].T.contiguous()}))
    with pytest.raises(
        TensorError, match=rf"model\.safetensors: tensor {DOWN} has shape \[16, 32\], expected \[32, 16\]"
    ):
        open_checkpoint(small)


def test_a_tensor_in_two_files(small: Path) -> None:
    save_file({DOWN: torch.zeros(32, 16)}, small / "more.safetensors")
    with pytest.raises(TensorError, match=rf"more\.safetensors: tensor {DOWN} is in model\.safetensors too"):
        open_checkpoint(small)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.float64])
def test_another_dtype(small: Path, dtype: torch.dtype) -> None:
    change(small / "model.safetensors", lambda tensors: tensors.update({DOWN: tensors[DOWN].to(dtype)}))
    with pytest.raises(CheckpointFormatError, match=rf"model\.safetensors: tensor {DOWN} is (F8_E4M3|I8|F64)"):
        open_checkpoint(small)


def test_quantised_by_config(small: Path) -> None:
    change_json(small / "config.json", quantization_config={"quant_method": "compressed-tensors"})
    with pytest.raises(CheckpointFormatError, match="compressed-tensors"):
        open_checkpoint(small)


class TestIndex:
    def test_a_file_that_is_not_there(self, sharded: Path) -> None:
        (sharded / "model-00002-of-00003.safetensors").unlink()
        with pytest.raises(CheckpointFormatError, match=r"not there: model-00002-of-00003\.safetensors"):
            open_checkpoint(sharded)

    def test_a_tensor_that_is_elsewhere(self, sharded: Path) -> None:
        weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
        other = next(file for file in weight_map.values() if file != weight_map[DOWN])
        change_json(sharded / INDEX, weight_map={**weight_map, DOWN: other})
        with pytest.raises(TensorError, match=rf"{other} does not hold tensor {DOWN}"):
            open_checkpoint(sharded)

    def test_a_tensor_that_it_does_not_name(self, sharded: Path) -> None:
        weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
        change_json(sharded / INDEX, weight_map={name: file for name, file in weight_map.items() if name != DOWN})
        with pytest.raises(TensorError, match=rf"tensor {DOWN} is not named by {INDEX}"):
            open_checkpoint(sharded)

    @pytest.mark.parametrize("file", ["../small/model.safetensors", "/etc/passwd", "weights.bin", ""])
    def test_a_file_outside_the_folder(self, sharded: Path, file: str) -> None:
        weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
        change_json(sharded / INDEX, weight_map={**weight_map, DOWN: file})
        with pytest.raises(CheckpointFormatError, match=r"which is no \.safetensors file beside it"):
            open_checkpoint(sharded)

    @pytest.mark.parametrize("content", ["{", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
    def test_damaged(self, sharded: Path, content: str) -> None:
        (sharded / INDEX).write_text(content)
        with pytest.raises(CheckpointFormatError, match=re.escape(INDEX)):
            open_checkpoint(sharded)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_file_cut_short_anywhere(small: Path, data: st.DataObject) -> None:
    file = small / "model.safetensors"
    content = file.read_bytes()
    try:
        file.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
        with pytest.raises(CheckpointFormatError, match=r"model\.safetensors is damaged or cut short"):
            open_checkpoint(small)
    finally:
        file.write_bytes(content)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_header_brings_no_other_error(small: Path, data: st.DataObject) -> None:
    file = small / "model.safetensors"
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    try:
        file.write_bytes(damaged)
        list(open_checkpoint(small).tensors())
    except CheckpointError:
        pass
    finally:
        file.write_bytes(content)


def test_no_weights(small: Path) -> None:
    (small / "model.safetensors").unlink()
    for load_format in ("auto", "safetensors", "pth"):
        with pytest.raises(CheckpointError, match=re.escape(str(small))):
            open_checkpoint(small, load_format)


@pytest.mark.parametrize(
    ("file", "advice"),
    [
        ("pytorch_model.bin", "convert pytorch_model.bin to safetensors"),
        ("model.gguf", "GGUF files are not served yet"),
        ("original/consolidated.00.pth", "original, give that folder"),
    ],
)
def test_other_weights_are_named(small: Path, file: str, advice: str) -> None:
    (small / "model.safetensors").unlink()
    (small / file).parent.mkdir(exist_ok=True)
    (small / file).write_bytes(b"weights")
    with pytest.raises(CheckpointNotFoundError, match=advice):
        open_checkpoint(small)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux what is mapped")
def test_a_file_is_mapped_no_longer_than_its_tensors_are_there(small: Path) -> None:
    """What was read of a map counts as the process's memory until the map is gone."""

    def maps() -> int:
        return Path("/proc/self/maps").read_text().count(str(small))

    checkpoint = HuggingFaceCheckpoint.open(small)
    assert maps() == 0
    most = 0
    for _, tensor in checkpoint.tensors():
        most = max(most, maps())
        del tensor
    assert most == 1
    assert maps() == 0
