"""The tokens of one completion to text, as they come.

Text is given out as soon as nothing that follows can change it: the bytes of an unfinished character are kept back, and
so is a tail that may yet become a stop string. How the tokens are cut into calls makes no difference to the text, so
whoever asks token by token (to decide when to stop) and whoever asks in larger steps (to send text) agree.

It knows nothing of stop token ids, of lengths, or of why a completion ends.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from pronk.engine.errors import InvalidParameterError
from pronk.engine.tokenizer import Vocabulary


class Detokenizer:
    """One completion's text.

    A stop string ends the text where it is completed: of several, the one whose last character comes first; of those
    that end at the same character, the longest, that is the one that began first. This depends on the text only, not on
    how it was cut into tokens. It follows that no text is given out and then found to belong to the stop string.
    Special tokens that are skipped leave no gap: a stop string may run across them.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
    ) -> None:
        """min_tokens: a stop string that is complete before the completion has so many tokens is ordinary text.

        Raises InvalidParameterError for an empty stop string.
        """
        if not all(stop):
            raise InvalidParameterError("A stop string must not be empty.", param="stop")
        self._vocabulary = vocabulary
        self._skip_special_tokens = skip_special_tokens
        self._include_stop = include_stop_str_in_output
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._matchers = [_StopMatcher(text) for text in stop]
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._held = ""
        self._finished = False
        self._stopped: str | None = None

    @property
    def stopped(self) -> str | None:
        """The stop string that ended the text, or None."""
        return self._stopped

    def feed(self, token_ids: Iterable[int]) -> str:
        """Take the next tokens and return the text that is now certain; "" for ever once a stop string is complete.

        Raises ValueError after `finish`.
        """
        if self._finished:
            raise ValueError("This completion is finished; use a new Detokenizer for the next one.")
        shown = []
        for token_id in token_ids:
            self._num_tokens += 1
            shown.append(self._advance(self._decoder.decode(self._bytes(token_id))))
        return "".join(shown)

    def finish(self) -> str:
        """No token follows: return what was kept back, an unfinished character as U+FFFD. A second call gives ""."""
        if self._finished:
            return ""
        self._finished = True
        shown = self._advance(self._decoder.decode(b"", final=True))
        held, self._held = self._held, ""
        return shown + held

    def _bytes(self, token_id: int) -> bytes:
        if self._skip_special_tokens and self._vocabulary.is_special(token_id):
            return b""
        return self._vocabulary.token_bytes(token_id)

    def _advance(self, new: str) -> str:
        """Append decoded text; return what is certain and keep the rest in `_held`."""
        if self._stopped is not None:
            return ""
        if not self._matchers:
            return new
        text = self._held + new
        for place, character in enumerate(new, start=len(self._held) + 1):
            complete = [matcher.stop for matcher in self._matchers if matcher.advance(character)]
            if complete and self._num_tokens >= self._min_tokens:
                self._stopped = max(complete, key=len)
                self._held = ""
                return text[:place] if self._include_stop else text[: place - len(self._stopped)]
        certain = len(text) - max(matcher.matched for matcher in self._matchers)
        self._held = text[certain:]
        return text[:certain]


class _StopMatcher:
    """How much of one stop string the text ends with (Knuth, Morris and Pratt): amortised constant time a character,
    whatever the string's length."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.matched = 0
        # _fallback[n]: the longest proper prefix of stop[:n + 1] that is also its suffix.
        self._fallback = [0] * len(stop)
        for place in range(1, len(stop)):
            self._fallback[place] = self._longer(self._fallback[place - 1], stop[place])

    def advance(self, character: str) -> bool:
        """Take one character; true when it completes the stop string. What may begin anew with it stays matched."""
        self.matched = self._longer(self.matched, character)
        if self.matched < len(self.stop):
            return False
        self.matched = self._fallback[-1]
        return True

    def _longer(self, matched: int, character: str) -> int:
        while matched and self.stop[matched] != character:
            matched = self._fallback[matched - 1]
        return matched + 1 if self.stop[matched] == character else 0
