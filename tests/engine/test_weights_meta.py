"""Meta's layout: equal to Hugging Face's of the same model, in any number of shards; and nothing in it ever runs."""

from __future__ import annotations

import io
import json
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pronk.engine.errors import CheckpointError, CheckpointFormatError, CheckpointNotFoundError, TensorError
from pronk.engine.weights.checkpoint import open_checkpoint
from pronk.engine.weights.meta import MetaCheckpoint

# Two query heads to a key/value head, cut in at most three.
SMALL = {
    "hidden_size": 48,
    "head_dim": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
}
FIRST = "consolidated.00.pth"
DOWN = "layers.1.feed_forward.w2.weight"


@pytest.fixture
def small(tmp_path: Path, tiny_llama: Any, write_checkpoint: Any) -> Path:
    return write_checkpoint(tmp_path / "small", tiny_llama("1b", **SMALL), layout="meta")


@pytest.fixture
def sharded(tmp_path: Path, tiny_llama: Any, write_checkpoint: Any) -> Path:
    return write_checkpoint(tmp_path / "sharded", tiny_llama("1b", **SMALL), layout="meta", shards=3)


def change(file: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    tensors = torch.load(file, weights_only=True)
    edit(tensors)
    torch.save(tensors, file)


def change_params(folder: Path, **changes: Any) -> None:
    params = {**json.loads((folder / "params.json").read_text()), **changes}
    (folder / "params.json").write_text(json.dumps({key: value for key, value in params.items() if value is not None}))


def tensors_of(folder: Path, load_format: str = "auto") -> dict[str, Tensor]:
    """Copies: the tensors themselves are views of files, which the tests overwrite."""
    return {name: tensor.clone() for name, tensor in open_checkpoint(folder, load_format).tensors()}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert sorted(left) == sorted(right)
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    ("like", "changes", "dtype"),
    [
        ("1b", {}, "bfloat16"),
        ("3b", {}, "float16"),
        ("8b", {}, "float32"),
        ("8b", {"rope_factor": None, "max_position_embeddings": 8192}, "bfloat16"),
        ("3b", SMALL, "bfloat16"),
    ],
)
def test_both_layouts_give_the_same(
    tmp_path: Path, tiny_llama: Any, write_checkpoint: Any, like: str, changes: dict[str, Any], dtype: str, shards: int
) -> None:
    config = tiny_llama(like, **changes)
    huggingface = open_checkpoint(write_checkpoint(tmp_path / "hf", config, dtype=dtype))
    folder = write_checkpoint(tmp_path / "meta", config, layout="meta", shards=shards, dtype=dtype)
    checkpoint = open_checkpoint(folder)
    assert isinstance(checkpoint, MetaCheckpoint)
    assert checkpoint.config == huggingface.config
    assert checkpoint.num_bytes() == huggingface.num_bytes()
    assert_same(dict(checkpoint.tensors()), dict(huggingface.tensors()))
    assert all(tensor.is_contiguous() for _, tensor in checkpoint.tensors())


def test_scores_are_those_of_metas_own_rotation(small: Path) -> None:
    """Meta turns neighbouring pairs as complex numbers, Hugging Face halves: each on its rows gives the same scores."""
    raw = torch.load(small / FIRST, weights_only=True)
    ours = tensors_of(small)
    torch.manual_seed(0)
    hidden = torch.randn(5, 48, dtype=torch.float64)
    angles = torch.arange(5)[:, None] * torch.rand(4, dtype=torch.float64)

    def meta_rotated(weight: Tensor) -> Tensor:
        pairs = torch.view_as_complex((hidden @ weight.double().T).view(5, -1, 4, 2))
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[:, None]).flatten(2)

    def halves_rotated(weight: Tensor) -> Tensor:
        first, second = (hidden @ weight.double().T).view(5, -1, 8).chunk(2, dim=-1)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    def scores(queries: Tensor, keys: Tensor) -> Tensor:
        return torch.einsum("qhd,khd->hqk", queries, keys.repeat_interleave(2, dim=1))

    theirs = scores(
        meta_rotated(raw["layers.1.attention.wq.weight"]), meta_rotated(raw["layers.1.attention.wk.weight"])
    )
    layer = "model.layers.1.self_attn"
    mine = scores(halves_rotated(ours[f"{layer}.q_proj.weight"]), halves_rotated(ours[f"{layer}.k_proj.weight"]))
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_a_model_wrapper_and_an_ordered_dict(small: Path) -> None:
    clean = tensors_of(small)
    content = torch.load(small / FIRST, weights_only=True)
    torch.save({"model": OrderedDict(content)}, small / FIRST)
    assert_same(tensors_of(small), clean)


def test_the_one_file_without_a_number(small: Path) -> None:
    clean = tensors_of(small)
    (small / FIRST).rename(small / "consolidated.pth")
    assert_same(tensors_of(small), clean)


def test_the_rotary_buffer_is_skipped(sharded: Path) -> None:
    clean = tensors_of(sharded)
    for file in sharded.glob("*.pth"):
        change(file, lambda tensors: tensors.update({"rope.freqs": torch.ones(4, dtype=torch.complex64)}))
    assert_same(tensors_of(sharded), clean)


def test_a_tensor_that_is_a_view_of_another(small: Path) -> None:
    clean = tensors_of(small)
    change(small / FIRST, lambda tensors: tensors.update({DOWN: tensors[DOWN].T.contiguous().T}))
    assert_same(tensors_of(small), clean)
    assert all(tensor.is_contiguous() for _, tensor in open_checkpoint(small).tensors())


class TestTiedHead:
    @pytest.mark.parametrize("shards", [1, 3])
    def test_the_embedding_stored_again(
        self, tmp_path: Path, tiny_llama: Any, write_checkpoint: Any, shards: int
    ) -> None:
        folder = write_checkpoint(tmp_path, tiny_llama("1b", **SMALL), layout="meta", shards=shards)
        clean = tensors_of(folder)
        for file in folder.glob("*.pth"):
            change(file, lambda tensors: tensors.update({"output.weight": tensors["tok_embeddings.weight"].clone()}))
        assert open_checkpoint(folder).config.tie_word_embeddings
        assert_same(tensors_of(folder), clean)

    @pytest.mark.parametrize("row", [0, 511])
    def test_one_other_number_makes_it_a_head_of_its_own(self, small: Path, row: int) -> None:
        def add_head(tensors: dict[str, Tensor]) -> None:
            tensors["output.weight"] = tensors["tok_embeddings.weight"].clone()
            tensors["output.weight"][row, 5] += 1

        change(small / FIRST, add_head)
        assert not open_checkpoint(small).config.tie_word_embeddings
        assert "lm_head.weight" in tensors_of(small)


@pytest.mark.parametrize("vocab_size", [-1, None])
def test_the_embedding_tells_the_vocabulary(sharded: Path, vocab_size: int | None) -> None:
    change_params(sharded, vocab_size=vocab_size)
    (sharded / "tokenizer.model").unlink()
    assert open_checkpoint(sharded).config.vocab_size == 512


class TestRepeatedHeads:
    """A model of one key/value head, cut for two ranks: each holds the whole head."""

    @pytest.fixture
    def folder(self, tmp_path: Path, tiny_llama: Any, write_checkpoint: Any) -> Path:
        config = tiny_llama("1b", **{**SMALL, "num_key_value_heads": 1})
        write_checkpoint(tmp_path / "whole", config, layout="meta")
        folder = write_checkpoint(tmp_path / "cut", config, layout="meta", shards=2)
        whole = torch.load(tmp_path / "whole" / FIRST, weights_only=True)
        repeated = {name: whole[name] for name in whole if name.endswith(("wk.weight", "wv.weight"))}
        for file in folder.glob("*.pth"):
            change(file, lambda tensors: tensors.update(repeated))
        return folder

    def test_they_are_taken_once(self, folder: Path) -> None:
        assert_same(tensors_of(folder), tensors_of(folder.parent / "whole"))

    def test_they_must_be_the_same(self, folder: Path) -> None:
        change(folder / FIRST, lambda tensors: tensors["layers.1.attention.wv.weight"].mul_(2))
        with pytest.raises(TensorError, match=r"layers\.1\.attention\.wv\.weight repeats its 1 key/value heads"):
            tensors_of(folder)


class TestNamedErrors:
    def test_a_missing_shard(self, sharded: Path) -> None:
        (sharded / "consolidated.01.pth").unlink()
        with pytest.raises(CheckpointFormatError, match=r"lacks consolidated\.01\.pth"):
            open_checkpoint(sharded)

    def test_the_last_shard_missing(self, sharded: Path) -> None:
        (sharded / "consolidated.02.pth").unlink()
        with pytest.raises(TensorError, match=r"tensor .* has shape"):
            open_checkpoint(sharded)

    def test_no_file(self, small: Path) -> None:
        (small / FIRST).unlink()
        with pytest.raises(CheckpointNotFoundError, match=r"no consolidated\.\*\.pth"):
            open_checkpoint(small, "pth")

    def test_a_missing_tensor(self, small: Path) -> None:
        change(small / FIRST, lambda tensors: tensors.pop(DOWN))
        with pytest.raises(
            TensorError, match=r"model\.layers\.1\.mlp\.down_proj\.weight, expected with shape \[48, 24\]"
        ):
            open_checkpoint(small)

    def test_no_embedding(self, small: Path) -> None:
        change(small / FIRST, lambda tensors: tensors.pop("tok_embeddings.weight"))
        with pytest.raises(TensorError, match=rf"{FIRST}: tensor tok_embeddings\.weight is missing"):
            open_checkpoint(small)

    def test_a_tensor_missing_in_one_shard(self, sharded: Path) -> None:
        change(sharded / "consolidated.01.pth", lambda tensors: tensors.pop(DOWN))
        with pytest.raises(TensorError, match=rf"consolidated\.01\.pth: tensor {DOWN} is missing"):
            open_checkpoint(sharded)

    @pytest.mark.parametrize("name", ["stranger.weight", "output.weight"])
    def test_a_tensor_in_one_shard_alone(self, sharded: Path, name: str) -> None:
        change(sharded / "consolidated.01.pth", lambda tensors: tensors.update({name: torch.ones(48)}))
        with pytest.raises(
            TensorError, match=rf"{FIRST}: tensor {name} is missing, consolidated\.01\.pth has its part"
        ):
            open_checkpoint(sharded)

    def test_an_unexpected_tensor(self, small: Path) -> None:
        change(small / FIRST, lambda tensors: tensors.update({"layers.2.ffn_norm.weight": torch.ones(48)}))
        with pytest.raises(TensorError, match=rf"{FIRST}: tensor layers\.2\.ffn_norm\.weight"):
            open_checkpoint(small)

    @pytest.mark.parametrize("shape", [(24, 48), (48, 25), (48,), (), (48, 24, 1)])
    def test_a_wrong_shape(self, small: Path, shape: tuple[int, ...]) -> None:
        change(small / FIRST, lambda tensors: tensors.update({DOWN: torch.zeros(shape)}))
        with pytest.raises(TensorError, match=rf"{FIRST}: tensor {DOWN} has shape .*, expected \[48, 24\]"):
            open_checkpoint(small)

    @pytest.mark.parametrize("shape", [(), (5,), (100, 48)])
    def test_a_wrong_embedding(self, small: Path, shape: tuple[int, ...]) -> None:
        change(
            small / FIRST,
            lambda tensors: tensors.update(
                {"tok_embeddings.weight": torch.zeros(shape), "output.weight": torch.zeros(shape)}
            ),
        )
        with pytest.raises(TensorError, match=r"tok_embeddings\.weight has shape .*, expected \[512, 48\]"):
            open_checkpoint(small)

    def test_shards_of_other_dtypes(self, sharded: Path) -> None:
        change(sharded / "consolidated.01.pth", lambda tensors: tensors.update({DOWN: tensors[DOWN].float()}))
        with pytest.raises(TensorError, match=rf"consolidated\.01\.pth: tensor {DOWN} is torch\.float32"):
            open_checkpoint(sharded)

    def test_quantised_weights(self, small: Path) -> None:
        change(small / FIRST, lambda tensors: tensors.update({DOWN: tensors[DOWN].to(torch.int8)}))
        with pytest.raises(CheckpointFormatError, match=rf"{FIRST}: tensor {DOWN} is int8"):
            open_checkpoint(small)
        change_params(small, quantization_args={"scheme": "int4_weight_int8_dynamic_activation"})
        with pytest.raises(CheckpointFormatError, match="quantization_args"):
            open_checkpoint(small)

    @pytest.mark.parametrize("content", [[1, 2], {"model": [1]}, {3: torch.ones(1)}, {DOWN: "text"}, torch.ones(2)])
    def test_no_named_tensors(self, small: Path, content: Any) -> None:
        torch.save(content, small / FIRST)
        with pytest.raises(CheckpointFormatError, match=FIRST):
            open_checkpoint(small)

    def test_a_sparse_tensor(self, small: Path) -> None:
        change(small / FIRST, lambda tensors: tensors.update({DOWN: tensors[DOWN].to_sparse()}))
        with pytest.raises(CheckpointFormatError, match=rf"{FIRST}: '{DOWN}' is a Tensor: expected a plain tensor"):
            open_checkpoint(small)


class Attack:
    """Unpickled by a loader that trusts its files, it would leave a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_a_pickle_that_runs_code_is_refused(small: Path, tmp_path: Path) -> None:
    mark = tmp_path / "it ran"
    attack = {"tok_embeddings.weight": Attack(mark)}
    buffer = io.BytesIO()
    torch.save(attack, buffer)
    for content in (buffer.getvalue(), pickle.dumps(attack)):
        (small / FIRST).write_bytes(content)
        with pytest.raises(CheckpointFormatError, match=rf"{FIRST} cannot be read as weights only"):
            open_checkpoint(small)
    assert not mark.exists()
    buffer.seek(0)
    torch.load(buffer, weights_only=False)
    assert mark.exists(), "the attack itself does not work"


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_file_cut_short_anywhere(small: Path, data: st.DataObject) -> None:
    file = small / FIRST
    content = file.read_bytes()
    try:
        file.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
        with pytest.raises(CheckpointFormatError, match=rf"{FIRST} cannot be read as weights only"):
            open_checkpoint(small)
    finally:
        file.write_bytes(content)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_file_brings_no_other_error(small: Path, data: st.DataObject) -> None:
    file = small / FIRST
    content = file.read_bytes()
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        near_an_end = data.draw(st.integers(0, 3000))
        place = near_an_end if data.draw(st.booleans()) else len(content) - 1 - near_an_end
        damaged[place] = data.draw(st.integers(0, 255))
    try:
        file.write_bytes(damaged)
        tensors_of(small)
    except CheckpointError:
        pass
    finally:
        file.write_bytes(content)
