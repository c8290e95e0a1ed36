"""Parts of a checkpoint: put together they are what transformers saved, and no more of the files is read than they."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pronk.engine.errors import TensorError
from pronk.engine.model.config import LlamaConfig
from pronk.engine.model.split import Split, possible_sizes, split_of
from pronk.engine.weights.checkpoint import Checkpoint, open_checkpoint
from pronk.engine.weights.cut import Cut
from pronk.engine.weights.names import expected_tensors
from pronk.engine.weights.progress import track

SMALL = {
    "hidden_size": 64,
    "head_dim": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
}
EMBEDDING = "model.embed_tokens.weight"
LAYOUTS = ["hf", "meta"]

needs_maps = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads what Linux says of its mappings")


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory: Any, tiny_llama: Any, write_checkpoint: Any) -> Callable[..., Path]:
    """`checkpoint_of(layout, shards, **changes)` -> its folder. `repeat`: every shard of Meta's has a whole head."""

    def write(layout: str, shards: int, *, repeat: bool = False, like: str = "8b", **changes: Any) -> Path:
        config = tiny_llama(like, **{**SMALL, **changes})
        folder: Path = write_checkpoint(tmp_path_factory.mktemp(layout), config, layout=layout, shards=shards)
        if repeat:
            repeat_heads(folder, config["num_key_value_heads"])
        return folder

    return write


def repeat_heads(folder: Path, heads: int) -> None:
    """Gives each of more shards than heads the head that its queries need, as Meta does."""
    files = sorted(folder.glob("*.pth"))
    shards = [torch.load(file, weights_only=True) for file in files]
    for name in [name for name in shards[0] if name.endswith(("wk.weight", "wv.weight"))]:
        whole = torch.cat([shard[name] for shard in shards]).chunk(heads)
        for rank, shard in enumerate(shards):
            shard[name] = whole[rank * heads // len(shards)].clone()
    for file, shard in zip(files, shards, strict=True):
        torch.save(shard, file)


def splits_of(checkpoint: Checkpoint, size: int) -> list[Split]:
    return [split_of(checkpoint.config, rank, size) for rank in range(size)]


def put_together(config: LlamaConfig, name: str, parts: list[Tensor]) -> Tensor:
    """A whole tensor of all ranks' parts. It knows the layout of Megatron, and does not ask the split."""
    if "norm" in name:
        assert all(torch.equal(part, parts[0]) for part in parts)
        return parts[0]
    if "k_proj" in name or "v_proj" in name:
        copies = max(len(parts) // config.num_key_value_heads, 1)
        assert all(torch.equal(part, parts[rank // copies * copies]) for rank, part in enumerate(parts))
        parts = parts[::copies]
    return torch.cat(parts, dim=1 if "o_proj" in name or "down_proj" in name else 0)


def assert_parts_are_the_whole(checkpoint: Checkpoint, size: int, whole: dict[str, Tensor]) -> None:
    ranks = []
    for split in splits_of(checkpoint, size):
        ranks.append({name: part.clone() for name, part in checkpoint.tensors(split.cut)})
        assert list(ranks[-1]) == list(ranks[0])
        assert checkpoint.num_bytes(split.cut) == sum(part.nbytes for part in ranks[-1].values())
    assert sorted(ranks[0]) == sorted(whole)
    for name, tensor in whole.items():
        joined = put_together(checkpoint.config, name, [rank[name] for rank in ranks])
        assert joined.dtype == tensor.dtype
        assert torch.equal(joined, tensor), name


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    """Heads of 2, 4 or 8 numbers; a vocabulary that may leave the last ranks little or nothing."""
    kv_heads, head_dim = draw(st.integers(1, 4)), draw(st.sampled_from([2, 4, 8]))
    heads = kv_heads * draw(st.integers(1, 4))
    return {
        "like": draw(st.sampled_from(["1b", "8b"])),
        "head_dim": head_dim,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_size": heads * head_dim,
        "intermediate_size": heads * draw(st.integers(1, 5)),
        "vocab_size": draw(st.integers(512, 800)),
    }


def size_for(data: st.DataObject, checkpoint: Checkpoint) -> int:
    return data.draw(st.sampled_from(possible_sizes(checkpoint.config)), label="size")


@settings(max_examples=40, deadline=None)
@given(shapes(), st.sampled_from([1, 2, 3]), st.data())
def test_huggingfaces_parts_are_the_whole(
    checkpoint_of: Any, shape: dict[str, Any], files: int, data: st.DataObject
) -> None:
    folder = checkpoint_of("hf", files, **shape)
    whole: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        whole.update(load_file(file))
    checkpoint = open_checkpoint(folder)
    assert_parts_are_the_whole(checkpoint, size_for(data, checkpoint), whole)


@settings(max_examples=60, deadline=None)
@given(shapes(), st.data())
def test_metas_parts_are_the_whole(checkpoint_of: Any, shape: dict[str, Any], data: st.DataObject) -> None:
    """Cut for any number of ranks, by a file that was cut for any other."""
    whole = load_file(checkpoint_of("hf", 1, **shape) / "model.safetensors")
    kv_heads = shape["num_key_value_heads"]
    evenly = math.gcd(shape["num_attention_heads"], kv_heads * shape["head_dim"])
    shards = data.draw(st.sampled_from([number for number in (1, 2, 3, 4, 6, 8) if evenly % number == 0]), "shards")
    repeat = shards > kv_heads and shards % kv_heads == 0
    checkpoint = open_checkpoint(checkpoint_of("meta", shards, repeat=repeat, **shape))
    assert_parts_are_the_whole(checkpoint, size_for(data, checkpoint), whole)


@settings(max_examples=20, deadline=None)
@given(shapes(), st.data())
def test_dummy_parts_are_the_whole(checkpoint_of: Any, shape: dict[str, Any], data: st.DataObject) -> None:
    checkpoint = open_checkpoint(checkpoint_of("hf", 1, **shape), "dummy", seed=3)
    assert_parts_are_the_whole(checkpoint, size_for(data, checkpoint), dict(checkpoint.tensors()))


@pytest.fixture(scope="module", params=["one file", "three files", "one shard", "four shards", "repeated", "dummy"])
def checkpoint(request: pytest.FixtureRequest, checkpoint_of: Any) -> Checkpoint:
    folder = {
        "one file": lambda: checkpoint_of("hf", 1),
        "three files": lambda: checkpoint_of("hf", 3),
        "one shard": lambda: checkpoint_of("meta", 1),
        "four shards": lambda: checkpoint_of("meta", 4),
        "repeated": lambda: checkpoint_of("meta", 8, repeat=True),
        "dummy": lambda: checkpoint_of("hf", 1),
    }[request.param]()
    return open_checkpoint(folder, "dummy" if request.param == "dummy" else "auto")


class TestAnyPart:
    """What a layout gives is the part of what it gives whole, also where no split would cut."""

    @settings(max_examples=30, deadline=None)
    @given(st.data())
    def test_it_is_the_part_of_the_whole(self, checkpoint: Checkpoint, data: st.DataObject) -> None:
        cuts = {name: data.draw(self.cuts(name, shape)) for name, shape in expected_tensors(checkpoint.config).items()}
        parts = dict(checkpoint.tensors(cuts.__getitem__))
        for name, tensor in checkpoint.tensors():
            cut = cuts[name]
            expected = tensor if cut is None else tensor.transpose(0, cut.axis)[cut.start : cut.stop]
            given = parts[name] if cut is None else parts[name].transpose(0, cut.axis)
            assert torch.equal(given, expected), (name, cut)
            assert parts[name].is_contiguous()
        assert checkpoint.num_bytes(cuts.__getitem__) == sum(part.nbytes for part in parts.values())

    def cuts(self, name: str, shape: tuple[int, ...]) -> st.SearchStrategy[Cut | None]:
        def along(axis: int) -> st.SearchStrategy[Cut]:
            unit = 8 if axis == 0 and re.search("[qkv]_proj", name) else 1
            places = st.integers(0, shape[axis] // unit).map(lambda number: number * unit)
            return st.tuples(places, places).map(lambda ends: Cut(axis, min(ends), max(ends)))

        return st.none() | st.integers(0, len(shape) - 1).flatmap(along)

    @pytest.mark.parametrize(
        ("name", "cut"),
        [
            (EMBEDDING, Cut(0, 500, 513)),
            (EMBEDDING, Cut(1, 0, 65)),
            (EMBEDDING, Cut(2, 0, 0)),
            ("model.norm.weight", Cut(0, 65, 65)),
            ("model.layers.1.self_attn.k_proj.weight", Cut(0, 24, 40)),
        ],
    )
    def test_what_a_tensor_does_not_have(self, checkpoint: Checkpoint, name: str, cut: Cut) -> None:
        with pytest.raises(ValueError, match=rf"axis={cut.axis}, start={cut.start}, stop={cut.stop}\) is no part of"):
            list(checkpoint.tensors(lambda other: cut if other == name else None))


@pytest.mark.parametrize(("axis", "start", "stop"), [(-1, 0, 1), (0, -1, 1), (0, 2, 1)])
def test_no_part(axis: int, start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="is no part of a tensor"):
        Cut(axis, start, stop)


def test_a_head_that_would_be_cut_in_two(checkpoint_of: Any) -> None:
    checkpoint = open_checkpoint(checkpoint_of("meta", 2))
    with pytest.raises(ValueError, match=r"wv\.weight cuts a head of 8 rows in two"):
        list(checkpoint.tensors(lambda name: Cut(0, 8, 12) if "v_proj" in name else None))


def test_ranks_without_a_token_id(checkpoint_of: Any) -> None:
    """512 ids for six ranks, by 128: the last two have none."""
    shape = {"num_attention_heads": 6, "num_key_value_heads": 6, "hidden_size": 48, "intermediate_size": 12}
    for layout in LAYOUTS:
        checkpoint = open_checkpoint(checkpoint_of(layout, 3, **shape))
        for rank, rows in enumerate([128, 128, 128, 128, 0, 0]):
            parts = dict(checkpoint.tensors(split_of(checkpoint.config, rank, 6).cut))
            assert parts[EMBEDDING].shape == parts["lm_head.weight"].shape == (rows, 48)


def test_only_the_copies_of_the_heads_that_are_needed_are_compared(checkpoint_of: Any) -> None:
    folder = checkpoint_of("meta", 8, repeat=True)
    last = torch.load(folder / "consolidated.07.pth", weights_only=True)
    last["layers.1.attention.wv.weight"].mul_(2)
    torch.save(last, folder / "consolidated.07.pth")
    checkpoint = open_checkpoint(folder)
    first, second = splits_of(checkpoint, 2)
    list(checkpoint.tensors(first.cut))
    with pytest.raises(TensorError, match=r"layers\.1\.attention\.wv\.weight repeats its 4 key/value heads"):
        list(checkpoint.tensors(second.cut))


def test_progress_ends_at_a_ranks_bytes(checkpoint_of: Any) -> None:
    checkpoint = open_checkpoint(checkpoint_of("hf", 3))
    split = split_of(checkpoint.config, 1, 4)
    reports: list[tuple[int, int]] = []
    list(track(checkpoint.tensors(split.cut), checkpoint.num_bytes(split.cut), report=lambda *at: reports.append(at)))
    assert reports[0] == (0, reports[-1][0])
    assert reports[-1][0] == reports[-1][1] < checkpoint.num_bytes() / 3


class Reads(TorchDispatchMode):
    """Counts bytes of a folder's mapped files that operations take in, each as often as it is taken."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.num_bytes += sum(self.mapped_bytes(leaf) for leaf in tree_leaves((args, kwargs)))
        return func(*args, **(kwargs or {}))

    def mapped_bytes(self, value: object) -> int:
        """Bytes of a tensor that lies in one of the files."""
        if not isinstance(value, Tensor) or not value.numel():
            return 0
        return value.nbytes if any(value.data_ptr() in places for places in mappings(self.folder)) else 0


def mappings(folder: Path) -> Iterator[range]:
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(folder) in line:
            start, stop = line.split()[0].split("-")
            yield range(int(start, 16), int(stop, 16))


def bytes_read(folder: Path, checkpoint: Checkpoint, split: Split) -> int:
    """What a rank takes out of the files: what the checkpoint copies or compares, and the views that it gives."""
    with Reads(folder) as reads:
        given = sum(reads.mapped_bytes(part) for _, part in checkpoint.tensors(split.cut))
    return reads.num_bytes + given


@needs_maps
@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("like", ["1b", "8b"])
@pytest.mark.parametrize(("layout", "shards"), [("hf", 1), ("hf", 3), ("meta", 1), ("meta", 2), ("meta", 4)])
def test_a_rank_reads_its_share_once(checkpoint_of: Any, layout: str, shards: int, like: str, size: int) -> None:
    folder = checkpoint_of(layout, shards, like=like)
    for rank in range(size):
        with Reads(folder) as opening:
            checkpoint = open_checkpoint(folder)
        split = split_of(checkpoint.config, rank, size)
        share = checkpoint.num_bytes(split.cut)
        read = opening.num_bytes + bytes_read(folder, checkpoint, split)
        # safetensors has torch look at one byte of each, and whether Meta's head is tied shows in eight rows of two.
        looked_at = len(expected_tensors(split.model)) + 2 * 8 * 2 * split.model.hidden_size
        assert share <= read <= share + looked_at


@needs_maps
def test_of_repeated_heads_every_copy_is_read(checkpoint_of: Any) -> None:
    folder = checkpoint_of("meta", 8, repeat=True)
    checkpoint = open_checkpoint(folder)
    split = split_of(checkpoint.config, 1, 2)
    keys_and_values = checkpoint.num_bytes(
        lambda name: split.cut(name) if "k_proj" in name or "v_proj" in name else Cut(0, 0, 0)
    )
    assert bytes_read(folder, checkpoint, split) == checkpoint.num_bytes(split.cut) + keys_and_values


@needs_maps
def test_a_tied_head_is_read_where_it_is_stored_again(checkpoint_of: Any) -> None:
    folder = checkpoint_of("meta", 1, like="1b")
    file = folder / "consolidated.00.pth"
    tensors = torch.load(file, weights_only=True)
    embedding = tensors["tok_embeddings.weight"]
    for head, read in ((embedding, 0), (embedding.clone(), 2 * (embedding.nbytes + embedding[:8].nbytes))):
        torch.save({**tensors, "output.weight": head}, file)
        with Reads(folder) as opening:
            assert open_checkpoint(folder).config.tie_word_embeddings
        assert opening.num_bytes == read


@needs_maps
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pages_of_the_other_ranks_rows_stay_on_the_disk(checkpoint_of: Any, layout: str) -> None:
    """A table of 64 MiB, a rank of eight, and what Linux maps around a page that is touched."""
    folder = checkpoint_of(layout, 1, vocab_size=2**19, like="1b")
    checkpoint = open_checkpoint(folder)
    split = split_of(checkpoint.config, 2, 8)
    before = resident_bytes(folder)
    for name, part in checkpoint.tensors(split.cut):
        if name == EMBEDDING:
            assert part.nbytes == 2**23
            part.clone()
            assert part.nbytes <= resident_bytes(folder) - before < 2**25


def resident_bytes(folder: Path) -> int:
    """Bytes of the folder's files that are mapped into this process and in memory."""
    inside, kibibytes = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = str(folder) in line
        elif inside and line.startswith("Rss:"):
            kibibytes += int(line.split()[1])
    return kibibytes * 1024
