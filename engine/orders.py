"""Orders: what rank 0 tells the other ranks to do with a step. Typed, msgpack; nothing is pickled.

An order holds what is new: of a sequence the tokens and blocks that a step adds, never the sequence; of a request what
its next token depends on, never the request. Rank 0 carries its own orders out like everyone else, so what the ranks
know of a step is the same.

Knows what is asked of a rank; not how it is done, nor how an order gets there.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import numpy as np

from pronk.engine.config import EngineConfig

Draw = Literal["nothing", "largest", "sample"]
"""What a step does with its logits. largest: chooses the most likely tokens. sample: draws tokens by the numbers that
each row has in the batch. nothing: they are left to whoever knows of penalties, masks and log probabilities."""


class RowOrder(msgspec.Struct, frozen=True, array_like=True):
    """One sequence's part of a step: its tokens [start, start + num_tokens)."""

    slot: int
    """Of the sequence while it runs."""
    start: int
    num_tokens: int
    token_ids: list[int]
    """Those of them that the host knows. The others are what the slot's sequence sampled last."""
    first_block: int
    """Where in the slot's block table `blocks` begin; what stands before it stays."""
    blocks: list[int]
    samples: bool
    """Whether the next token is wanted."""
    numbers: tuple[int, float, int, float, float, float, float, float] | None = None
    """What the next token depends on, where the step draws it: see `sampler.NUMBERS`."""

    @property
    def end(self) -> int:
        """The first position after its tokens."""
        return self.start + self.num_tokens


class Compute(msgspec.Struct, frozen=True, array_like=True, tag="compute"):
    """Compute a step: keys and values of every row's tokens, and the tokens that `draw` says."""

    rows: list[RowOrder]
    draw: Draw
    scores: bool = False
    """Whether log probabilities of prompts are wanted after it."""


class Array(msgspec.Struct, frozen=True, array_like=True):
    """A NumPy array."""

    dtype: str
    shape: list[int]
    data: bytes

    @classmethod
    def of(cls, array: np.ndarray[Any, Any]) -> Array:
        return cls(array.dtype.str, list(array.shape), array.tobytes())

    def numpy(self) -> np.ndarray[Any, Any]:
        return np.frombuffer(self.data, self.dtype).reshape(self.shape)


class Sample(msgspec.Struct, frozen=True, array_like=True, tag="sample"):
    """Choose the next tokens of the last step's rows that sample. Fields are those of a `SamplingBatch`."""

    arrays: dict[str, Array]
    top_n: int | None
    greedy: bool
    plain: bool


class Score(msgspec.Struct, frozen=True, array_like=True, tag="score"):
    """Work out log probabilities of tokens of prompts, from the last step's output."""

    first: int
    """The first of its rows that are looked at; there is one for each token."""
    token_ids: list[int]
    top_n: int


class Prepare(msgspec.Struct, frozen=True, array_like=True, tag="prepare"):
    """Make ready what makes later steps faster."""


class KeepWeights(msgspec.Struct, frozen=True, array_like=True, tag="keep"):
    """Write a little more of what a later start maps."""


class Weigh(msgspec.Struct, frozen=True, array_like=True, tag="weigh"):
    """Say how much memory the rank's process takes."""


class Begin(msgspec.Struct, frozen=True, array_like=True, tag="begin"):
    """The first: load this."""

    config: EngineConfig


class Stop(msgspec.Struct, frozen=True, array_like=True, tag="stop"):
    """There will be no more orders."""


Order = Begin | Compute | Sample | Score | Prepare | KeepWeights | Weigh | Stop


_ENCODER = msgspec.msgpack.Encoder()
_DECODER: msgspec.msgpack.Decoder[Order] = msgspec.msgpack.Decoder(Order)


def encode(order: Order) -> bytes:
    return _ENCODER.encode(order)


def decode(message: bytes) -> Order:
    """Raises msgspec.DecodeError for what is no order."""
    return _DECODER.decode(message)
