"""GrammarCompiler: a request's Grammar to a Matcher.

The library's tokenizer is built once, when it is first needed. Knows no schedule: who compiles when is the caller's.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from functools import cached_property

import llguidance
import numpy as np

from pronk.engine.grammar.deep import COMPILER_STACK, run_deep
from pronk.engine.grammar.judge import SECONDS, Judges
from pronk.engine.grammar.matcher import Mask, Matcher, Tokens
from pronk.engine.grammar.notation import translate
from pronk.engine.grammar.shortest import ByteTokenizer, first_completion, start
from pronk.engine.request import Grammar
from pronk.engine.tokenizer import SPLIT_PATTERN, Vocabulary

_NUM_REMEMBERED = 16
_FEW_ROWS = 8  # fewer are not worth the library's thread pool


class GrammarCompiler:
    """Compiles grammars for one vocabulary. May be shared by threads; `fill` is one thread's."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        eos_token_ids: Collection[int],
        vocab_size: int | None = None,
        *,
        seconds: float = SECONDS,
    ) -> None:
        """Costs nothing yet.

        eos_token_ids: the tokens that end a completion: at least one. A mask allows them where the text is complete.
        vocab_size: as many as a row of logits is wide; None is as many as have a token. seconds: of processor time
        that `check` takes at most.
        """
        self._vocabulary = vocabulary
        self._eos_token_ids = sorted(eos_token_ids)
        self._vocab_size = vocab_size or vocabulary.size
        self._lock = threading.Lock()
        self._judges = Judges(vocabulary, self._eos_token_ids, seconds)
        self._compiled: OrderedDict[Grammar, Matcher] = OrderedDict()

    def prepare(self) -> None:
        """Build now what `compile` needs once: 0.4 s for 128k tokens, during which Python's other threads stand."""
        with self._lock:
            self._tokens.prepare()

    def check(self, grammar: Grammar) -> None:
        """Answers within `seconds`, whatever the grammar is, and needs no `prepare`: other processes read it, which the
        first call starts.

        Raises InvalidParameterError, which says what is wrong with it, cannot be enforced, or has no text that is short
        enough.
        """
        self._judges.check(grammar)

    def is_checked(self, grammar: Grammar) -> bool:
        """Whether `check` accepted it lately, and would again at once."""
        return self._judges.knows(grammar)

    def close(self) -> None:
        """End those processes."""
        self._judges.close()

    def compile(self, grammar: Grammar) -> Matcher:
        """-> a matcher at the text's beginning. Lets other threads run. For a grammar that was checked, or is the
        caller's own: one that was made to hurt could take minutes, or end the process.

        The last few are remembered: the many choices of one request cost one compilation.
        Raises InvalidParameterError as `check` does, but for texts that are too long.
        """
        with self._lock:
            matcher = self._compiled.pop(grammar, None)
        if matcher is None:
            matcher = run_deep(lambda: self._compile(grammar), COMPILER_STACK)
        twin = matcher.copy()
        with self._lock:
            self._compiled[grammar] = matcher
            while len(self._compiled) > _NUM_REMEMBERED:
                self._compiled.popitem(last=False)
        return twin

    def _compile(self, grammar: Grammar) -> Matcher:
        notation = translate(grammar)
        self.prepare()
        byte_state = start(self._in_bytes.tokenizer, notation.text)
        return Matcher(
            self._tokens,
            start(self._tokens.tokenizer, notation.text),
            byte_state,
            notation,
            first_completion(byte_state, notation),
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
