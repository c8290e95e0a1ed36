"""Short completions: what may still have to be written, at least, before a text is complete.

A search over single bytes, by a grammar's state over a vocabulary of bytes: a byte costs microseconds there, and any
token is a run of bytes. What it finds completes the text, always; that nothing shorter would is likely and not proven.

Beside the 256 bytes, a symbol may be a special token: symbol 256 is the one with the lowest id.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Sequence

import llguidance

from pronk.engine.errors import InvalidParameterError
from pronk.engine.grammar.notation import Notation
from pronk.engine.grammar.place import CLOSE_ARRAY, CLOSE_OBJECT, COMMA, QUOTE, JSONPlace
from pronk.engine.grammar.schema import PARAM
from pronk.engine.tokenizer import Vocabulary

NUM_BYTES = 256
_LONGEST_TOKEN = 16  # bytes; longer ones, of white space above all, are not worth the time
_FEW = 32
_LISTING = re.compile(r"\s*\d+ \| |<non-verbose/>")
_PHRASES = ("at 1(8): ", "Parser Error: ", "failed to compile JSON schema: ", " (in regex)")
_NOTHING = "NoExtension"  # the library's word for a grammar without any text
_LONGEST_TEXT = 1 << 18
_STEPS_TO_ANY = 50_000
_STEPS_TO_SHORTEST = 8_000

# Of several bytes that may come next: what ends something, what is short, what begins something, what is odd.
_ORDER = b"}])0123456789\"aebcdfghijklmnopqrstuvwxyz[ABCDEFGHIJKLMNOPQRSTUVWXYZ.,:;-_/{+*!?@#$%&'()<=>^`|~ \n\t\r\\"
_RANK = {byte: rank for rank, byte in enumerate(dict.fromkeys(_ORDER))}
# In a string that must go on, letters make the fewest tokens.
_FILL = b"aeb0123456789"
_OTHERS = 4
_RUN = 8
_REPEATS = 3
_DIGITS = b"0123456789"
_MOST_DIGITS_TRIED = 3


class Work:
    """How many steps a search may take. Steps and not time, so that it finds the same on any machine."""

    def __init__(self, steps: int) -> None:
        self._left = steps
        self.error = ""
        """The library's, when it gave up on the way."""

    def take(self) -> bool:
        """Take a step. -> whether there was one."""
        self._left -= 1
        return self._left >= 0


class ByteTokenizer:
    """The library's tokenizer of single bytes and the special tokens, and how tokens are spelled in it."""

    def __init__(self, vocabulary: Vocabulary, eos_token_ids: Sequence[int]) -> None:
        self._ranks = {token: rank for rank, token in enumerate(vocabulary.ranks) if len(token) <= _LONGEST_TOKEN}
        specials = sorted(vocabulary.special_tokens.items(), key=lambda item: item[1])
        self._symbols = {token_id: NUM_BYTES + place for place, (_, token_id) in enumerate(specials)}
        self._tokens = [token_id for _, token_id in specials]
        self._vocabulary = vocabulary
        wrapped = llguidance.TokenizerWrapper(_Bytes([name for name, _ in specials]))
        ends = [self._symbols[token_id] for token_id in eos_token_ids if token_id in self._symbols]
        ends = ends or [NUM_BYTES + len(specials)]
        self.end = ends[0]
        """The symbol that ends a text."""
        self.tokenizer = llguidance.LLTokenizer(wrapped, eos_token=ends, slices=[])

    def symbols(self, token_id: int) -> list[int]:
        """How a token is spelled."""
        if token_id in self._symbols:
            return [self._symbols[token_id]]
        return list(self._vocabulary.token_bytes(token_id))

    def beginnings(self, symbols: Sequence[int]) -> list[tuple[int, int]]:
        """-> (token, number of symbols) of all tokens with which the symbols begin."""
        if symbols and symbols[0] >= NUM_BYTES:
            return [(self._tokens[symbols[0] - NUM_BYTES], 1)]
        found = []
        for end in range(1, min(len(symbols), _LONGEST_TOKEN) + 1):
            if symbols[end - 1] >= NUM_BYTES:
                break
            token = self._ranks.get(bytes(symbols[:end]))
            if token is not None:
                found.append((token, end))
        return found

    def costs(self, symbols: Sequence[int]) -> list[int]:
        """-> of each rest of the symbols, the whole and the empty one included, the tokens that spell it, at least."""
        count = len(symbols)
        costs = [0] * (count + 1)
        # A special token's symbol is no byte: whatever spans it is no ordinary token.
        text = "".join(map(chr, symbols)).encode("latin-1", "replace")
        special = next((place for place, symbol in enumerate(symbols) if symbol >= NUM_BYTES), None)
        for start in range(count - 1, -1, -1):
            best = costs[start + 1] + 1  # each byte is a token
            for end in range(start + 2, min(count, start + _LONGEST_TOKEN) + 1):
                if costs[end] + 1 < best and text[start:end] in self._ranks:
                    if special is not None and any(symbol >= NUM_BYTES for symbol in symbols[start:end]):
                        break
                    best = costs[end] + 1
            costs[start] = best
        return costs


class _Bytes:
    """What the library asks of a tokenizer."""

    def __init__(self, special_tokens: Sequence[str]) -> None:
        names = [*special_tokens, "<|no_other_end|>"]
        self.tokens = [bytes([byte]) for byte in range(NUM_BYTES)] + [name.encode(errors="replace") for name in names]
        self.special_token_ids = list(range(NUM_BYTES, len(self.tokens)))
        self.eos_token_id = self.special_token_ids[-1]
        self.bos_token_id = None

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text if isinstance(text, bytes) else text.encode())


def start(tokenizer: llguidance.LLTokenizer, text: str) -> llguidance.LLMatcher:
    """A grammar's state at the beginning of a text. text: the grammar, for the library.

    Raises InvalidParameterError when the library cannot use it.
    """
    limits = llguidance.LLParserLimits(verbose_errors=False)
    state = llguidance.LLMatcher(tokenizer, text, log_level=0, limits=limits)
    if state.is_error():
        raise _unusable(state.get_error())
    return state


def _unusable(message: str) -> InvalidParameterError:
    return InvalidParameterError(f"The grammar cannot be used: {_reason(message)}.", PARAM)


def _reason(message: str) -> str:
    """The library's message in one line, without its listing of the grammar, most of which the client did not write."""
    lines = itertools.takewhile(lambda line: not _LISTING.match(line), message.splitlines())
    reason = " ".join(" ".join(lines).split())
    for phrase in _PHRASES:
        reason = reason.replace(phrase, "")
    return reason[:300].rstrip(". ")


def first_completion(state: llguidance.LLMatcher, notation: Notation) -> list[int] | None:
    """The shortest text that is found at the beginning; None when none is. The same work wherever it is done.

    Raises InvalidParameterError when the grammar is too much for the library as soon as a text begins.
    """
    _require_beginning(state)
    place = JSONPlace() if notation.has_json else None
    hints = [list(hint.encode()) for hint in notation.hints]
    work = Work(_STEPS_TO_ANY)
    found = closing(state, place, hints, work, _LONGEST_TEXT)
    found = shortest(state, place, hints, Work(_STEPS_TO_SHORTEST), found)
    if found is None and work.error and not work.error.startswith(_NOTHING):
        raise _unusable(work.error)
    return found


def _require_beginning(state: llguidance.LLMatcher) -> None:
    for symbol in _symbols(state.compute_bitmask())[:_FEW]:
        child = state.deep_copy()
        if symbol < NUM_BYTES and not child.consume_token(symbol) and child.is_error():
            raise _unusable(child.get_error())


def shortest(
    state: llguidance.LLMatcher,
    place: JSONPlace | None,
    hints: Sequence[Sequence[int]],
    work: Work,
    best: list[int] | None = None,
) -> list[int] | None:
    """The shortest completion that is found: at each point where the text could go on in several ways, each is tried,
    and completed by `closing`.

    best: one that is known. -> its symbols; None when none is found.
    """
    best = best if best is not None else closing(state, place, hints, work, _LONGEST_TEXT)
    state, place = state.deep_copy(), place.copy() if place else None
    done: list[int] = []
    while not state.is_accepting() and work.take():
        ways = _ways(state, place, hints, work)
        if len(ways) > 1:
            for way in ways:
                limit = (len(best) if best is not None else _LONGEST_TEXT) - len(done) - len(way) - 1
                child, child_place = state.deep_copy(), place.copy() if place else None
                _take(child, child_place, way)
                rest = None if limit < 0 else closing(child, child_place, hints, work, limit)
                if rest is not None:
                    best = [*done, *way, *rest]
        if best is None and len(ways) != 1:
            return None
        following = ways[0] if best is None else best[len(done) : len(done) + 1]
        _take(state, place, following)
        done += following
    return done if state.is_accepting() and (best is None or len(done) < len(best)) else best


def _take(state: llguidance.LLMatcher, place: JSONPlace | None, symbols: Sequence[int]) -> None:
    state.consume_tokens(list(symbols))
    if place:
        place.feed(symbols)


def _ways(
    state: llguidance.LLMatcher, place: JSONPlace | None, hints: Sequence[Sequence[int]], work: Work
) -> list[list[int]]:
    """How the text may go on: by symbols after which different ones may follow, and by hints."""
    mask = state.compute_bitmask()
    symbols = _symbols(mask)
    at_once = symbols[0] if len(symbols) == 1 else _at_once(mask, place)
    if at_once is not None:
        return [[at_once]]
    if len(symbols) > _FEW:
        by_next: dict[bytes, int] = {}
        for symbol in symbols:
            if not work.take():
                break
            child = state.deep_copy()
            if child.consume_token(symbol):
                by_next.setdefault(child.compute_bitmask(), symbol)
        symbols = tuple(by_next.values())
    fitting = [list(hint) for hint in hints if state.validate_tokens(list(hint)) == len(hint)]
    return [*([symbol] for symbol in symbols), *fitting]


def closing(
    state: llguidance.LLMatcher,
    place: JSONPlace | None,
    hints: Sequence[Sequence[int]],
    work: Work,
    limit: int,
) -> list[int] | None:
    """A completion of at most `limit` symbols that ends each thing as soon as it can; None when it comes to no end."""
    state, place = state.deep_copy(), place.copy() if place else None
    done: list[int] = []
    # A state that comes again is left in another way each time, until something ends.
    seen: dict[bytes, int] = {}
    while not state.is_accepting():
        mask = state.compute_bitmask()
        symbols = _symbols(mask)
        if not symbols or len(done) >= limit or not work.take():
            work.error = state.get_error()
            return None
        following = [symbols[0]]
        if len(symbols) == 1 and symbols[0] < NUM_BYTES:
            following = list(state.compute_ff_bytes()) or following
        elif (at_once := _at_once(mask, place)) is not None:
            seen.clear()
            following = [at_once]
        elif place and place.digits and (end := _end_of_number(state, place, work)):
            following = end
        else:
            visit = seen.get(mask, 0)
            seen[mask] = visit + 1
            following = _nth_way(state, symbols, hints, visit)
        if not state.consume_tokens(following):
            work.error = state.get_error()
            return None
        if place:
            place.feed(following)
        done += following
    return done if len(done) <= limit else None


def _end_of_number(state: llguidance.LLMatcher, place: JSONPlace, work: Work) -> list[int] | None:
    """The fewest digits after which a number that cannot end here can, as where it has to be a multiple of another."""
    last: list[tuple[llguidance.LLMatcher, list[int]]] = [(state, [])]
    for _ in range(_MOST_DIGITS_TRIED):
        following = []
        for before, digits in last:
            for digit in _DIGITS:
                if not work.take():
                    return None
                child = before.deep_copy()
                if child.validate_tokens([digit]) and child.consume_token(digit):
                    if child.is_accepting() or _at_once(child.compute_bitmask(), place) is not None:
                        return [*digits, digit]
                    following.append((child, [*digits, digit]))
        last = following
    return None


def _nth_way(
    state: llguidance.LLMatcher, symbols: Sequence[int], hints: Sequence[Sequence[int]], visit: int
) -> list[int]:
    """The way that is taken on the n-th visit of what may be one state: the likeliest, the hints, and then others.
    Where much can follow, as in a string that has to go on, these are letters and now and then something else; where
    little can, each several times over. Hints come in between, so that any sequence comes sooner or later."""
    chance = visit * 2654435761 % 2**32 / 2**32
    hint = _nth_hint(hints, visit, chance)
    if hint is not None and state.validate_tokens(hint) == len(hint):
        return hint
    if len(symbols) > _FEW:
        if visit % _OTHERS == _OTHERS - 1:
            return [symbols[visit // _OTHERS % len(symbols)]]
        return [next((byte for byte in _FILL if byte in symbols), symbols[0])]
    run = max(0, visit - 1 - (1 + _REPEATS) * len(hints)) // _RUN
    return [symbols[run if run < len(symbols) else int(chance * len(symbols))]]


def _nth_hint(hints: Sequence[Sequence[int]], visit: int, chance: float) -> list[int] | None:
    """Each once, then each a few times over, then any at every other visit."""
    if visit == 0 or not hints:
        return None
    if visit <= len(hints):
        return list(hints[visit - 1])
    if visit <= (1 + _REPEATS) * len(hints):
        return list(hints[(visit - 1 - len(hints)) // _REPEATS])
    return list(hints[int(chance * len(hints))]) if visit % 2 else None


@functools.lru_cache(4096)
def _symbols(mask: bytes) -> tuple[int, ...]:
    """Those that may come next, the one to be preferred first."""
    bits = int.from_bytes(mask, "little")
    found = []
    while bits:
        low = bits & -bits
        found.append(low.bit_length() - 1)
        bits ^= low
    return tuple(sorted(found, key=lambda symbol: _RANK.get(symbol, len(_RANK) + symbol)))


def _at_once(mask: bytes, place: JSONPlace | None) -> int | None:
    """What is taken without a look at the others: in JSON, whatever ends a string, an object, an array or an item."""
    if place is None:
        return None
    ends = (QUOTE,) if place.in_string else (CLOSE_OBJECT, CLOSE_ARRAY, COMMA)
    return next((end for end in ends if mask[end >> 3] >> (end & 7) & 1), None)
