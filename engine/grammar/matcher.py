"""Matcher: one completion's place in its grammar, and the masks that keep it there and let it come to an end in time.

Of the tokens that the grammar allows, a mask leaves out those after which the text could not be completed with the
tokens that are left. A request that is far from its last token pays nothing for that: how long the shortest completion
can have become is counted on from when it was last known, and it is looked for again only when the budget comes near.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import llguidance
import numpy as np
from numpy.typing import NDArray

from pronk.engine.errors import InvalidParameterError
from pronk.engine.grammar.notation import Notation
from pronk.engine.grammar.place import QUOTE, JSONPlace
from pronk.engine.grammar.schema import PARAM
from pronk.engine.grammar.shortest import ByteTokenizer, Work, closing, shortest
from pronk.engine.tokenizer import Vocabulary

Mask = NDArray[np.int32]
"""Words of 32 tokens: bit t % 32 of word t // 32 says whether token t may come next."""

# Near the end, that many of the likeliest tokens are looked at one by one: lower ids are of more frequent tokens.
_MOST_REPLAYED = 128
_MOST_SEARCHED = 8
_LARGE_GRAMMAR = 1 << 18
"""In a large grammar a byte costs more: fewer tokens are looked at. Those times the grammar's characters are fewer."""
_MANY = 1 << 40
_WORK = 2_000
_WORK_OF_OTHERS = 500
_LONGEST_PATIENCE = 64

_MOST_DIGITS = 20
_MOST_SIGNIFICANT = 15
"""Of a number with a fraction: all that a double tells apart, so that no bound is met by rounding."""
_MOST_EXPONENT = 2
_LEADING_DIGITS = re.compile(rb"[0-9]*")
_LONG_EXPONENT = re.compile(rb"[eE][+-]?[0-9]{%d}" % (_MOST_EXPONENT + 1))
_NOT_PLAIN = re.compile(rb'["\\\x00-\x1f\x7f]')
_STRUCTURE = re.compile(rb'["\\{}\[\]<>\x00-\x08\x0b\x0c\x0e-\x1f\x7f]')
_LINES = re.compile(rb"[\t\n\r]")
_REPRESENTATIVES = 16
"""Of many tokens of one kind, those that are looked at near the end."""


class Tokens:
    """What matchers of one vocabulary share. Immutable; may be shared by threads."""

    def __init__(
        self, tokenizer: llguidance.LLTokenizer, in_bytes: ByteTokenizer, vocabulary: Vocabulary, size: int
    ) -> None:
        """size: as many as a row of logits is wide."""
        self.tokenizer = tokenizer
        self.in_bytes = in_bytes
        self.vocabulary = vocabulary
        self.num_words = -(-size // 32)

    def prepare(self) -> None:
        """Work out now what would be when it is first needed."""
        _ = (
            self.plain,
            self.whole,
            self.kinds,
            self.lengths,
            self.beginning_with_digits,
            self.beginning_with_point,
            self.with_long_exponent,
        )

    @cached_property
    def whole(self) -> Mask:
        """Tokens that are whole characters."""
        return self._where([_is_whole(token) for token in self.vocabulary.ranks])

    @cached_property
    def plain(self) -> Mask:
        """Tokens that are whole characters of a JSON string without escapes."""
        return self._where([_is_plain(token) for token in self.vocabulary.ranks])

    @cached_property
    def kinds(self) -> tuple[Mask, ...]:
        """Tokens that most grammars treat alike: words, numbers and punctuation; and the same with ends of lines."""
        texts = [_is_whole(token) and not _STRUCTURE.search(token) for token in self.vocabulary.ranks]
        lines = [bool(_LINES.search(token)) for token in self.vocabulary.ranks]
        return tuple(
            self._where([text and line == with_lines for text, line in zip(texts, lines, strict=True)])
            for with_lines in (False, True)
        )

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """Bytes of each token."""
        return np.array([len(token) for token in self.vocabulary.ranks], np.int32)

    @cached_property
    def beginning_with_digits(self) -> list[Mask]:
        """At n: tokens that begin with more than n digits."""
        counts = [len(match[0]) if (match := _LEADING_DIGITS.match(token)) else 0 for token in self.vocabulary.ranks]
        return [self._where(np.array(counts) > least) for least in range(_MOST_SIGNIFICANT + 1)]

    @cached_property
    def beginning_with_point(self) -> Mask:
        return self._where([token.startswith(b".") for token in self.vocabulary.ranks])

    @cached_property
    def with_long_exponent(self) -> Mask:
        """Tokens of an exponent too large for most who read JSON."""
        return self._where([bool(_LONG_EXPONENT.search(token)) for token in self.vocabulary.ranks])

    def _where(self, chosen: Sequence[bool] | NDArray[np.bool_]) -> Mask:
        words = np.zeros(self.num_words * 4, np.uint8)
        bits = np.packbits(np.array(chosen, bool), bitorder="little")
        words[: len(bits)] = bits
        return words.view(np.int32)


def _is_whole(token: bytes) -> bool:
    try:
        token.decode()
    except UnicodeDecodeError:
        return False
    return True


def _is_plain(token: bytes) -> bool:
    return _is_whole(token) and not _NOT_PLAIN.search(token)


@dataclass
class Completion:
    """A way to complete a text: symbols[offset:]; costs[n] is how many tokens symbols[n:] take."""

    symbols: list[int]
    costs: list[int]
    offset: int = 0

    @property
    def cost(self) -> int:
        return self.costs[self.offset]

    @property
    def following(self) -> int | None:
        """Its first symbol."""
        return self.symbols[self.offset] if self.offset < len(self.symbols) else None

    def after(self, symbols: Sequence[int]) -> Completion | None:
        """What is left of it when these were written; None when they are not how it begins."""
        end = self.offset + len(symbols)
        if self.symbols[self.offset : end] != list(symbols):
            return None
        return Completion(self.symbols, self.costs, end)


class Matcher:
    """Which tokens may come next, given those that were accepted. One thread at a time."""

    def __init__(
        self,
        tokens: Tokens,
        state: llguidance.LLMatcher,
        byte_state: llguidance.LLMatcher,
        notation: Notation,
        completion: list[int] | None,
        *,
        eos_token_ids: frozenset[int],
    ) -> None:
        """state, byte_state: of the grammar in notation, at its beginning, over the tokens and over `tokens.in_bytes`;
        completion: the shortest text that is known, as symbols."""
        self._tokens = tokens
        self._state = state
        self._byte_state = byte_state
        self._unread: list[int] = []  # symbols that byte_state has not consumed
        self._jump = notation.jump
        self._string_jump = notation.string_jump
        self._hints = [list(hint.encode()) for hint in notation.hints]
        self._place = JSONPlace() if notation.has_json else None
        self._eos_token_ids = eos_token_ids
        self._num_replayed = min(_MOST_REPLAYED, _LARGE_GRAMMAR // len(notation.text))
        self._ended = False
        self._num_tokens = 0
        self._search_from = 0
        self._patience = 1
        self._free = False
        self._vouched: dict[int, Completion] = {}
        self._alike: list[tuple[Mask, Completion]] = []
        self._completion = self._as_completion(completion)
        self._most = self._completion.cost if self._completion else 0
        """The shortest completion takes no more tokens than these; 0 while none is known."""

    @property
    def done(self) -> bool:
        """Whether the text is complete and nothing can follow (or EOS did): the completion ends here, by "stop"."""
        return self._ended or self._state.is_stopped()

    @property
    def complete(self) -> bool:
        """Whether the text could end here."""
        return self._ended or self._state.is_accepting()

    @property
    def shortest(self) -> int | None:
        """Tokens of the shortest completion that is found, EOS not counted; None when none is."""
        completion = self._known_completion(_MANY)
        return None if completion is None else completion.cost

    def copy(self) -> Matcher:
        """Another one at the same place."""
        twin = Matcher.__new__(Matcher)
        twin.__dict__.update(self.__dict__)
        twin._state = self._state.deep_copy()
        twin._byte_state = self._byte_state.deep_copy()
        twin._unread = self._unread.copy()
        twin._place = self._place.copy() if self._place else None
        return twin

    def mask(self, budget: int) -> Mask:
        """What may come next. -> [ceil(vocab_size / 32)]; never empty: EOS alone where nothing else can follow.

        budget: how many tokens the completion may still get, the next one included.
        Raises InvalidParameterError when the grammar has become too complex to go on: the request ends with it.
        """
        words = np.zeros(self._tokens.num_words, np.int32)
        self._state.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        return self.narrow(words, budget)

    @property
    def state(self) -> llguidance.LLMatcher:
        """The library's, for those who compute masks of many at once."""
        return self._state

    def narrow(self, words: Mask, budget: int) -> Mask:
        """words: what the grammar allows. -> the mask."""
        self._check()
        self._vouched, self._alike = {}, []
        self._free = self._is_free(words)
        short = self._with_short_numbers(words) if self._place else words
        if self._most + self._jump < budget:
            return short
        completion = self._known_completion(budget)
        if completion is None or not completion.cost <= budget <= completion.cost + self._jump:
            return short
        kept = self._in_time(short, budget, completion)
        if kept is None and short is not words:
            kept = self._in_time(words, budget, completion)
        return short if kept is None else kept

    def accept(self, token: int) -> None:
        """Take the sampled token. Raises InvalidParameterError for one that the mask does not allow."""
        if token in self._eos_token_ids and self.complete:
            self._ended = True
            return
        self._state.consume_token(token)
        self._check()
        self._num_tokens += 1
        symbols = self._tokens.in_bytes.symbols(token)
        self._follow(token, symbols)
        self._unread += symbols
        if self._place:
            self._place.feed(symbols)

    def _check(self) -> None:
        if self._state.is_error():
            reason = self._state.get_error().partition("\n")[0][:200]
            raise InvalidParameterError(f"The grammar cannot be followed further: {reason}.", PARAM)

    def _follow(self, token: int, symbols: Sequence[int]) -> None:
        """What the token makes of the shortest completion."""
        growth = self._jump
        if self._free and _bit(self._tokens.plain, token):
            growth = self._string_jump or 0
            if not growth and self._completion and self._completion.following == QUOTE:
                return
        rests = [self._completion.after(symbols) if self._completion else None, self._vouched.get(token)]
        rests += [rest for mask, rest in self._alike if _bit(mask, token)]
        self._completion = min((rest for rest in rests if rest), key=lambda rest: rest.cost, default=None)
        self._most = self._completion.cost if self._completion else self._most + growth

    def _is_free(self, words: Mask) -> bool:
        """Whether the text ends in a string that is a value and may go on with any characters."""
        if self._string_jump is None or self._place is None or not self._place.in_plain_string:
            return False
        plain = self._tokens.plain
        return bool(((words & plain) == plain).all())

    def _known_completion(self, budget: int) -> Completion | None:
        """The shortest completion that is known, looked for where none is, and well where it takes more than budget.
        Where even so it does, it is looked for less and less often: there was no time for the text from the start."""
        if self._completion is None and self._num_tokens >= self._search_from:
            symbols = closing(self._read(), self._place, self._hints, Work(_WORK), _WORK)
            self._completion = self._as_completion(symbols)
            if self._completion is None or self._completion.cost > budget:
                symbols = shortest(self._read(), self._place, self._hints, Work(_WORK))
                self._completion = self._as_completion(symbols)
            if self._completion:
                self._most = self._completion.cost
            if self._completion is None or self._completion.cost > budget:
                self._search_from = self._num_tokens + self._patience
                self._patience = min(2 * self._patience, _LONGEST_PATIENCE)
        return self._completion

    def _as_completion(self, symbols: list[int] | None) -> Completion | None:
        return None if symbols is None else Completion(symbols, self._tokens.in_bytes.costs(symbols))

    def _read(self) -> llguidance.LLMatcher:
        self._byte_state.consume_tokens(self._unread)
        self._unread = []
        return self._byte_state

    def _in_time(self, words: Mask, budget: int, completion: Completion) -> Mask | None:
        """Of the tokens in words, those after which the text can be completed in time: not all that there are, but the
        likeliest of them, and all with which the shortest completion that is known begins. None: none was found."""
        left = budget - 1
        kept = np.zeros_like(words)
        for token in self._eos_token_ids:
            _set(kept, token, _bit(words, token))
        for token, rest in self._beginnings(completion):
            if rest.cost <= left and _bit(words, token):
                self._vouched[token] = rest
        if self._free and not self._string_jump and completion.cost <= left:
            kept |= self._tokens.plain
        for token in self._vouched:
            _set(kept, token, True)
        others = _lowest(words & ~kept & self._tokens.whole, self._num_replayed)
        if completion.cost <= left:
            others = self._without_replayed(others, completion)
            for kind in self._tokens.kinds:
                kept |= self._kept_alike(words & ~kept & kind, completion)
        self._search(others, left)
        if not self._vouched and not kept.any():
            self._search(_lowest(words, _MOST_SEARCHED), left)
        for token in self._vouched:
            _set(kept, token, True)
        return kept if kept.any() else None

    def _beginnings(self, completion: Completion) -> list[tuple[int, Completion]]:
        """The tokens with which it may begin, each with the rest of it."""
        found = []
        symbols = completion.symbols[completion.offset :]
        for token, size in self._tokens.in_bytes.beginnings(symbols):
            found.append((token, Completion(completion.symbols, completion.costs, completion.offset + size)))
        return found

    def _kept_alike(self, words: Mask, completion: Completion) -> Mask:
        """words: tokens of one kind. -> they, if after some of them, long ones too, the completion still is one; else
        none. Where text is free there are too many to look at each, and the few that are looked at would be all that a
        model could say."""
        tokens = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
        if not len(tokens):
            return words
        spread = tokens[np.linspace(0, len(tokens) - 1, _REPRESENTATIVES // 2).astype(int)]
        longest = tokens[np.argsort(self._tokens.lengths[tokens])[-_REPRESENTATIVES // 2 :]]
        state, in_bytes = self._read(), self._tokens.in_bytes
        suffix = [*completion.symbols[completion.offset :], in_bytes.end]
        for token in {*spread.tolist(), *longest.tolist()}:
            symbols = in_bytes.symbols(token) + suffix
            if state.validate_tokens(symbols) != len(symbols):
                return np.zeros_like(words)
        self._alike.append((words, completion))
        return words

    def _without_replayed(self, tokens: list[int], completion: Completion) -> list[int]:
        """Vouch for tokens after which the completion still is one. -> the others"""
        state = self._read()
        in_bytes = self._tokens.in_bytes
        suffix = [*completion.symbols[completion.offset :], in_bytes.end]
        others = []
        for token in tokens:
            symbols = in_bytes.symbols(token) + suffix
            if state.validate_tokens(symbols) == len(symbols):
                self._vouched[token] = completion
            else:
                others.append(token)
        return others

    def _search(self, tokens: list[int], left: int) -> None:
        """Vouch for tokens after which a completion is found that takes at most `left` tokens."""
        work = Work(_WORK_OF_OTHERS)
        state = self._read()
        for token in tokens[:_MOST_SEARCHED]:
            child, place = state.deep_copy(), self._place.copy() if self._place else None
            symbols = self._tokens.in_bytes.symbols(token)
            if not child.consume_tokens(symbols):
                continue
            if place:
                place.feed(symbols)
            completion = self._as_completion(closing(child, place, self._hints, work, 8 * left))
            if completion and completion.cost <= left:
                self._vouched[token] = completion

    def _with_short_numbers(self, words: Mask) -> Mask:
        """JSON's numbers have no largest: a model that repeats a digit for ever is stopped, unless it has no choice."""
        refused = self._too_long_numbers()
        if refused is None:
            return words
        kept = words & ~refused
        return kept if kept.any() else words

    def _too_long_numbers(self) -> Mask | None:
        """Tokens that would make one of the number that the text ends with."""
        place, tokens = self._place, self._tokens
        if place is None or place.in_string:
            return None
        if place.in_exponent:
            return tokens.beginning_with_digits[max(0, _MOST_EXPONENT - place.digits)]
        if not place.mantissa:
            return None
        if place.in_fraction:
            left = max(0, _MOST_SIGNIFICANT - place.mantissa)
            return tokens.with_long_exponent | tokens.beginning_with_digits[left]
        refused = tokens.with_long_exponent
        if place.mantissa >= _MOST_SIGNIFICANT:
            refused = refused | tokens.beginning_with_point
        if place.mantissa >= _MOST_DIGITS:
            refused = refused | tokens.beginning_with_digits[0]
        return refused


def _bit(words: Mask, token: int) -> bool:
    return bool(words[token >> 5] >> (token & 31) & 1) if token >> 5 < len(words) else False


def _set(words: Mask, token: int, value: bool) -> None:
    if value:
        words.view(np.uint32)[token >> 5] |= np.uint32(1 << (token & 31))


def _lowest(words: Mask, count: int) -> list[int]:
    """The first tokens in a mask, in increasing order."""
    places = np.flatnonzero(words)[:count]
    bits = np.unpackbits(words[places].view(np.uint8), bitorder="little").reshape(-1, 32)
    rows, columns = np.nonzero(bits)
    lowest: list[int] = (places[rows] * 32 + columns)[:count].tolist()
    return lowest
