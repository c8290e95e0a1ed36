"""A part of a tensor: what one of several ranks holds of it.

It knows shapes. Which part of which tensor a rank holds is `pronk.engine.model.split`'s to say, and where it lies in
which file each layout's. It imports no torch: whoever only counts needs none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Cut:
    """Places `start` to `stop` - 1 along `axis`; none where both are the same.

    Raises ValueError for an axis or a place below 0, and for a stop below the start.
    """

    axis: int
    start: int
    stop: int

    def __post_init__(self) -> None:
        if self.axis < 0 or not 0 <= self.start <= self.stop:
            raise ValueError(f"{self} is no part of a tensor")

    @property
    def length(self) -> int:
        return self.stop - self.start

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """The part's shape. Raises ValueError when the part reaches out of a tensor of shape `whole`."""
        if self.axis >= len(whole) or self.stop > whole[self.axis]:
            raise ValueError(f"{self} is no part of a tensor of shape {list(whole)}")
        return (*whole[: self.axis], self.length, *whole[self.axis + 1 :])

    def of(self, tensor: Tensor) -> Tensor:
        """The part, as a view. Raises ValueError when it reaches out of the tensor."""
        self.shape(tuple(tensor.shape))
        return tensor.narrow(self.axis, self.start, self.length)


# Which part of each tensor is wanted, by its canonical name; None: all of it.
Cuts = Callable[[str], Cut | None]


def whole(name: str) -> Cut | None:
    """All of every tensor."""
    return None


def part_of(tensor: Tensor, cut: Cut | None) -> Tensor:
    return tensor if cut is None else cut.of(tensor)


def shape_of(shape: tuple[int, ...], cut: Cut | None) -> tuple[int, ...]:
    return shape if cut is None else cut.shape(shape)
