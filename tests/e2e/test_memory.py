"""What is said at start of the memory that the engine takes is what its processes have, once the cache is full."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest

from .serving import CONTEXT, Server, client_of

KINDS = ("weights", "kv_cache", "runtime")


@pytest.fixture(params=[1, 2], ids="{} ranks".format)
def cria(request: pytest.FixtureRequest) -> Iterator[Server]:
    size = ("--kv-cache-memory", "128MiB", "--tensor-parallel-size", str(request.param))
    running = Server(Path(str(files("pronk.engine") / "cria")), *size)
    yield running
    running.end()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the engine asks Linux")
async def test_the_engine_takes_what_it_says(cria: Server) -> None:
    sizes = {kind: cria.metric("pronk_device_memory_bytes", device="cpu", kind=kind) for kind in KINDS}
    assert sizes["kv_cache"] > len(cria.ranks) * 127 << 20
    pages = cria.metric("pronk_kv_pages", state="free")
    length = CONTEXT - 8
    async with client_of(cria) as client:
        for number in range(int(pages * 16 // length) + 2):
            # Each begins differently, so that none finds another's in the cache.
            await client.completions.create(model="tiny", prompt=[number + 10] * length, max_tokens=2)
    assert cria.metric("pronk_kv_pages", state="free") < 0.03 * pages
    assert sum(rank.memory_info().rss for rank in cria.ranks) == pytest.approx(sum(sizes.values()), rel=0.05)
