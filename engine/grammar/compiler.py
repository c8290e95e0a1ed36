"""GrammarCompiler: a request's Grammar to a Matcher.

The library's tokenizer is built once, when it is first needed. Knows no schedule: who compiles when is the caller's.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from functools import cached_property

import llguidance
import numpy as np

from pronk.engine.errors import InvalidParameterError
from pronk.engine.grammar.matcher import Mask, Matcher, Tokens
from pronk.engine.grammar.notation import Notation, translate
from pronk.engine.grammar.place import JSONPlace
from pronk.engine.grammar.schema import PARAM
from pronk.engine.grammar.shortest import ByteTokenizer, Work, shortest
from pronk.engine.request import Grammar
from pronk.engine.tokenizer import SPLIT_PATTERN, Vocabulary

# Of a grammar's lexer and of a step. A state takes 1 to 2 KB; a step with all its fuel takes 15 ms.
_MAX_LEXER_STATES = 20_000
_STEP_FUEL = 200_000

_WORK_OF_CHECK = 40_000
_FEW_ROWS = 8  # fewer are not worth the library's thread pool


class GrammarCompiler:
    """Compiles grammars for one vocabulary. May be shared by threads; `fill` is one thread's."""

    def __init__(self, vocabulary: Vocabulary, eos_token_ids: Collection[int], vocab_size: int | None = None) -> None:
        """Costs nothing yet.

        eos_token_ids: the tokens that end a completion: at least one. A mask allows them where the text is complete.
        vocab_size: as many as a row of logits is wide; None is as many as have a token.
        """
        self._vocabulary = vocabulary
        self._eos_token_ids = sorted(eos_token_ids)
        self._vocab_size = vocab_size or vocabulary.size
        self._lock = threading.Lock()

    def prepare(self) -> None:
        """Build now what `compile` needs once: 0.4 s for 128k tokens, during which Python's other threads stand."""
        with self._lock:
            self._tokens.prepare()

    def check(self, grammar: Grammar) -> None:
        """Answers within a second, whatever the grammar is, and needs no `prepare`.

        Raises InvalidParameterError, which says what is wrong with it, cannot be enforced, or has no text that is short
        enough.
        """
        notation = translate(grammar)
        with self._lock:
            in_bytes = self._in_bytes
        state = _start(in_bytes.tokenizer, notation)
        place = JSONPlace() if notation.has_json else None
        if shortest(state, place, _symbols(notation.hints), Work(_WORK_OF_CHECK)) is None:
            raise InvalidParameterError("No text was found that satisfies the grammar and is short enough.", PARAM)

    def compile(self, grammar: Grammar) -> Matcher:
        """-> a matcher at the text's beginning. Lets other threads run.

        Raises InvalidParameterError as `check` does, but for texts that are too long.
        """
        notation = translate(grammar)
        self.prepare()
        return Matcher(
            self._tokens,
            _start(self._tokens.tokenizer, notation),
            _start(self._in_bytes.tokenizer, notation),
            jump=notation.jump,
            hints=_symbols(notation.hints),
            has_json=notation.has_json,
            string_jump=notation.string_jump,
            eos_token_ids=frozenset(self._eos_token_ids),
        )

    def fill(self, matchers: Sequence[Matcher], budgets: Sequence[int]) -> Mask:
        """The masks of one step, those of many by several threads. -> [R, ceil(vocab_size / 32)]

        Raises what `Matcher.mask` raises, for the first that does: ask each for its own then.
        """
        words = np.zeros((len(matchers), -(-self._vocab_size // 32)), np.int32)
        if len(matchers) < _FEW_ROWS:
            for row, (matcher, budget) in enumerate(zip(matchers, budgets, strict=True)):
                words[row] = matcher.mask(budget)
            return words
        rows = [(matcher.state, row) for row, matcher in enumerate(matchers)]
        self._executor.unsafe_compute_mask_ptr(rows, words.ctypes.data, words.shape[1] * 4, len(rows))
        for row, (matcher, budget) in enumerate(zip(matchers, budgets, strict=True)):
            words[row] = matcher.narrow(words[row], budget)
        return words

    @cached_property
    def _executor(self) -> llguidance.LLExecutor:
        return llguidance.LLExecutor()

    @cached_property
    def _in_bytes(self) -> ByteTokenizer:
        return ByteTokenizer(self._vocabulary, self._eos_token_ids)

    @cached_property
    def _tokens(self) -> Tokens:
        tokenizer: llguidance.LLTokenizer = llguidance.LLTokenizer.from_tiktoken(  # type: ignore[attr-defined]
            encoder={token: rank for rank, token in enumerate(self._vocabulary.ranks)},
            special_tokens=dict(self._vocabulary.special_tokens),
            pattern=SPLIT_PATTERN,
            eos_token=self._eos_token_ids,
            n_vocab=self._vocab_size,
        )
        return Tokens(tokenizer, self._in_bytes, self._vocabulary, self._vocab_size)


def _start(tokenizer: llguidance.LLTokenizer, notation: Notation) -> llguidance.LLMatcher:
    limits = llguidance.LLParserLimits(
        max_lexer_states=_MAX_LEXER_STATES, step_lexer_fuel=_STEP_FUEL, verbose_errors=False
    )
    state = llguidance.LLMatcher(tokenizer, notation.text, log_level=0, limits=limits)
    if state.is_error():
        raise InvalidParameterError(f"The grammar cannot be used: {_reason(state.get_error())}.", PARAM)
    return state


def _reason(message: str) -> str:
    return " ".join(message.split())[:300].rstrip(".")


def _symbols(hints: Sequence[str]) -> list[list[int]]:
    return [list(hint.encode()) for hint in hints]
