"""What ranks do together, over real gloo groups: sums are those of adding in the ranks' order, whatever the size."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]

from pronk.engine.parallel import ONE_SHOT_BYTES, Place, Ranks, add_in_order, join

SECONDS = 60.0
CPU = torch.device("cpu")


def do_nothing() -> None:
    pass


def groups(size: int, pool: ThreadPoolExecutor) -> list[Ranks]:
    store = HashStore()
    places = [
        Place(
            rank=rank,
            size=size,
            neighbours=size,
            store=store,
            address="127.0.0.1",
            timeout=SECONDS,
        )
        for rank in range(size)
    ]
    return list(pool.map(lambda place: join(place, CPU, beat=do_nothing, on_begin=do_nothing), places))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_sums_are_made_in_the_order_of_the_ranks(size: int, dtype: torch.dtype) -> None:
    """In one shot, in two, and at the border; numbers of elements that the ranks do not divide."""
    most = ONE_SHOT_BYTES // dtype.itemsize
    parts = torch.randn(size, 2 * most + 7, generator=torch.Generator().manual_seed(size)).to(dtype)
    lengths = (1, 5, most, most + 1, parts.shape[1])

    def one(group: Ranks) -> list[Tensor]:
        return [group.all_reduce(parts[group.rank, :length]) for length in lengths]

    with ThreadPoolExecutor(size) as pool:
        for sums in pool.map(one, groups(size, pool)):
            for length, total in zip(lengths, sums, strict=True):
                assert torch.equal(total, add_in_order(parts[:, :length]))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_what_is_gathered_is_everyones_in_order(size: int, dtype: torch.dtype) -> None:
    own = torch.arange(size * 6).view(size, 2, 3).to(dtype)
    with ThreadPoolExecutor(size) as pool:
        for gathered in pool.map(lambda group: group.all_gather(own[group.rank]), groups(size, pool)):
            assert torch.equal(gathered.view(torch.uint8), own.view(torch.uint8))
