"""Tensors kept on disk and mapped again: a file in safetensors' layout, whose pages are read where they lie.

It appears whole or not at all, and is never written to again: servers that have it mapped go on with what they have.
Large tensors start on lines of the processor's cache. Knows names, dtypes and bytes; not what they mean.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import sys
import tempfile
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
"""Bytes that are written to the disk at a time, some hundredths of a second: a few of the largest pages there are."""
STRETCH = 256 << 20
"""Bytes that are mapped between two reports."""
MADV_POPULATE_READ = 22
"""Linux 5.14's; Python has no name for it."""


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
    try:
        with path.open("rb") as file:
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError):  # the latter for an empty file
        return None
    try:
        found = _tensors(pages)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    if found.key != key:
        return None
    for start in range(0, len(pages), STRETCH):
        report(start, len(pages))
        _populate(pages, start, min(STRETCH, len(pages) - start))
    report(len(pages), len(pages))
    return found


def write(path: Path, kept: Kept) -> Iterator[None]:
    """Into a folder that is there. Each step writes one piece, and the last puts the file in its place. Raises OSError
    where that cannot be done; what was written until then is removed."""
    for rest in path.parent.glob(f"{path.stem}.*.part"):  # of a process that was killed
        rest.unlink(missing_ok=True)
    descriptor, scratch = tempfile.mkstemp(dir=path.parent, prefix=f"{path.stem}.", suffix=".part")
    try:
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            for piece in _gathered(_content(kept)):
                while piece:
                    piece = piece[file.write(piece) :]
                # Now, not all of it in the end: the system would hold up whoever came next.
                os.fsync(file.fileno())
                yield
        Path(scratch).replace(path)
    finally:
        Path(scratch).unlink(missing_ok=True)


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


def _tensors(pages: mmap.mmap) -> Kept:
    """Raises ValueError, KeyError, TypeError or AttributeError where they are not what `write` leaves."""
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
