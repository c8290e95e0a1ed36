"""Tensors kept on disk and mapped again: a file in safetensors' layout, whose pages are read where they lie.

It appears whole or not at all, and is never written to again: servers that have it mapped go on with what they have.
Until the disk has all of it, its name says which start of the machine it belongs to: after a power cut it is not read.
Large tensors start on lines of the processor's cache. Knows names, dtypes and bytes; not what they mean.
"""

from __future__ import annotations

import contextlib
import glob
import json
import math
import mmap
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "I8": torch.int8,
    "I32": torch.int32,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
METADATA = "__metadata__"
LINE = 64
PIECE = 8 << 20
"""Bytes that are written at a time, some thousandths of a second: a few of the largest pages there are."""
STRETCH = 256 << 20
"""Bytes that are mapped between two reports."""
MADV_POPULATE_READ = 22
"""Linux 5.14's; Python has no name for it."""
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Kept:
    """What a file holds."""

    key: str
    """Of what the tensors were made from, and how."""
    notes: str
    """What the tensors do not say."""
    tensors: dict[str, Tensor]


def read(path: Path, key: str, report: Callable[[int, int], None]) -> Kept | None:
    """Map the file, and have the system find its pages. None where there is no file with this key, or it is not whole.

    report: is called with bytes done, and all. The tensors are copies on write of what the file holds.
    """
    for place in (path, _unsettled(path)):
        pages = None if place is None else _pages(place)
        found = None if pages is None else _tensors(pages)
        if pages is None or found is None or found.key != key:
            continue
        if place != path:
            _start_to_settle(path)
        for start in range(0, len(pages), STRETCH):
            report(start, len(pages))
            _populate(pages, start, min(STRETCH, len(pages) - start))
        report(len(pages), len(pages))
        return found
    return None


def write(path: Path, kept: Kept) -> Iterator[None]:
    """Into a folder that is there. Each step writes one piece, and after the last the file can be read. Raises OSError
    where that cannot be done; what was written until then is removed."""
    for ending in ("part", "unsettled"):  # of processes that were killed, and of checkpoints that were there before
        for rest in path.parent.glob(f"{glob.escape(path.stem)}.*.{ending}"):
            rest.unlink(missing_ok=True)
    unsettled = _unsettled(path)
    descriptor, scratch = tempfile.mkstemp(dir=path.parent, prefix=f"{path.stem}.", suffix=".part")
    try:
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            for piece in _gathered(_content(kept)):
                while piece:
                    piece = piece[file.write(piece) :]
                yield
            if unsettled is None:
                os.fsync(file.fileno())
        Path(scratch).replace(path if unsettled is None else unsettled)
    finally:
        Path(scratch).unlink(missing_ok=True)
    if unsettled is not None:
        _start_to_settle(path)


def _unsettled(path: Path) -> Path | None:
    """The file's name while the system may have some of it in memory alone; None where starts have no names."""
    try:
        boot = BOOT_ID.read_text().strip()
    except OSError:
        return None
    return path.with_name(f"{path.stem}.{boot}.unsettled")


def _start_to_settle(path: Path) -> None:
    """The disk takes its time, and nobody is to wait for it."""
    threading.Thread(target=_settle, args=(path,), name="settle", daemon=True).start()


def _settle(path: Path) -> None:
    """Whatever stops it, the file stays as good as it is: until the machine starts again."""
    unsettled = _unsettled(path)
    with contextlib.suppress(OSError):
        if unsettled is not None:
            with unsettled.open("rb") as file:
                os.fsync(file.fileno())
            unsettled.replace(path)


def _gathered(parts: Iterator[memoryview]) -> Iterator[memoryview]:
    """The same bytes in pieces of one size, so that each is written where the system can have large pages for it."""
    piece = memoryview(bytearray(PIECE))
    filled = 0
    for part in parts:
        while part:
            count = min(len(part), PIECE - filled)
            piece[filled : filled + count] = part[:count]
            part, filled = part[count:], filled + count
            if filled == PIECE:
                yield piece
                filled = 0
    yield piece[:filled]


def _content(kept: Kept) -> Iterator[memoryview]:
    # Those of odd sizes last, so that none after them starts between two lines.
    tensors = dict(sorted(kept.tensors.items(), key=lambda item: item[1].nbytes % LINE != 0))
    header: dict[str, object] = {METADATA: {"key": kept.key, "notes": kept.notes}}
    place = 0
    for name, tensor in tensors.items():
        stop = place + tensor.nbytes
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [place, stop]}
        place = stop
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % mmap.PAGESIZE)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
        yield tensor.contiguous().flatten().view(torch.uint8).numpy().data


def _pages(path: Path) -> mmap.mmap | None:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError):  # the latter for an empty file
        return None


def _tensors(pages: mmap.mmap) -> Kept | None:
    """None where the pages are not what `write` leaves."""
    try:
        return _parse(pages)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _parse(pages: mmap.mmap) -> Kept:
    start = 8 + int.from_bytes(pages[:8], "little")
    header = json.loads(pages[8:start])
    about = header.pop(METADATA)
    tensors: dict[str, Tensor] = {}
    end = start
    for name, entry in header.items():
        dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
        first, last = (start + offset for offset in entry["data_offsets"])
        count = math.prod(shape)
        if first != end or last - first != count * dtype.itemsize:
            raise ValueError(f"{name} is not where it should be")
        # Torch takes no empty buffer.
        flat = torch.frombuffer(pages, dtype=dtype, count=count, offset=first) if count else torch.empty(0, dtype=dtype)
        tensors[name] = flat.view(shape)
        end = last
    if end != len(pages):
        raise ValueError("the file was cut short")
    return Kept(about["key"], about["notes"], tensors)


def _populate(pages: mmap.mmap, start: int, length: int) -> None:
    """Where the system does not know how, pages are found one by one when they are first read."""
    if sys.platform != "linux":
        return
    try:
        pages.madvise(MADV_POPULATE_READ, start, length)
    except OSError:
        return
