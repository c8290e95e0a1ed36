"""How much of a checkpoint has been read. It knows no terminal: whoever wants a bar passes `report`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from torch import Tensor


def track(
    tensors: Iterable[tuple[str, Tensor]], total_bytes: int, *, report: Callable[[int, int], None]
) -> Iterator[tuple[str, Tensor]]:
    """Passes `tensors` on and calls `report(bytes read, total_bytes)`: first with 0, then after each one is used."""
    done = 0
    report(done, total_bytes)
    for name, tensor in tensors:
        yield name, tensor
        done += tensor.numel() * tensor.element_size()
        report(done, total_bytes)
