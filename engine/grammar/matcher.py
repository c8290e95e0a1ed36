"""Matcher: one completion's place in its grammar."""

from __future__ import annotations

from collections.abc import Sequence

import llguidance
import numpy as np
from numpy.typing import NDArray

from pronk.engine.errors import InvalidParameterError

Mask = NDArray[np.int32]
"""Words of 32 tokens: bit t % 32 of word t // 32 says whether token t may come next."""


class Matcher:
    """Which tokens may come next, given those that were accepted. One thread at a time."""

    def __init__(self, state: llguidance.LLMatcher, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._state = state
        self._vocab_size = vocab_size
        self._eos_token_ids = frozenset(eos_token_ids)
        self._ended = False

    def mask(self, budget: int) -> Mask:
        """What may come next. -> [ceil(vocab_size / 32)]; never empty: EOS alone where nothing else can follow.

        budget: how many tokens the completion may still get, the next one included. Where few are left, tokens are
        left out after which the text could not be completed with the rest; EOS needs no token of it.
        Raises InvalidParameterError when the grammar has become too complex to go on: the request ends with it.
        """
        words = np.zeros(-(-self._vocab_size // 32), np.int32)
        self._state.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        self._check()
        return words

    def accept(self, token: int) -> None:
        """Take the sampled token. Raises InvalidParameterError for one that the mask does not allow."""
        if token in self._eos_token_ids:
            self._ended = True
            return
        self._state.consume_token(token)
        self._check()

    @property
    def done(self) -> bool:
        """Whether the text is complete and nothing can follow (or EOS did): the completion ends here, by "stop"."""
        return self._ended or self._state.is_stopped()

    @property
    def complete(self) -> bool:
        """Whether the text could end here."""
        return self._ended or self._state.is_accepting()

    def copy(self) -> Matcher:
        """Another one at the same place."""
        twin = Matcher(self._state.deep_copy(), self._vocab_size, tuple(self._eos_token_ids))
        twin._ended = self._ended
        return twin

    def _check(self) -> None:
        if self._state.is_error():
            raise InvalidParameterError(self._state.get_error(), "structured_outputs")


def fill(matchers: Sequence[Matcher], budgets: Sequence[int]) -> Mask:
    """The masks of one step. -> [R, ceil(vocab_size / 32)]"""
    return np.stack([matcher.mask(budget) for matcher, budget in zip(matchers, budgets, strict=True)])
