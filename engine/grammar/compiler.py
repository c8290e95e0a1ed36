"""GrammarCompiler: a request's Grammar to a Matcher.

The library's tokenizer is built once, when it is first needed. Knows no schedule: who compiles when is the caller's.
"""

from __future__ import annotations

import threading
from collections.abc import Collection
from functools import cached_property

import llguidance

from pronk.engine.errors import InvalidParameterError
from pronk.engine.grammar.matcher import Matcher
from pronk.engine.request import Grammar
from pronk.engine.tokenizer import SPLIT_PATTERN, Vocabulary

PARAM = "structured_outputs"


class GrammarCompiler:
    """Compiles grammars for one vocabulary. May be shared by threads."""

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
            _ = self._tokenizer

    def check(self, grammar: Grammar) -> None:
        """Answers within a second, whatever the grammar is.

        Raises InvalidParameterError, which says what is wrong with it or cannot be enforced.
        """
        failed, messages = llguidance.LLMatcher.validate_grammar_with_warnings(_text(grammar))
        if failed:
            raise InvalidParameterError(messages[0], PARAM)

    def compile(self, grammar: Grammar) -> Matcher:
        """-> a matcher at the text's beginning. Lets other threads run.

        Raises InvalidParameterError as `check` does.
        """
        self.prepare()
        state = llguidance.LLMatcher(self._tokenizer, _text(grammar), log_level=0)
        if state.is_error():
            raise InvalidParameterError(state.get_error(), PARAM)
        return Matcher(state, self._vocab_size, self._eos_token_ids)

    @cached_property
    def _tokenizer(self) -> llguidance.LLTokenizer:
        tokenizer: llguidance.LLTokenizer = llguidance.LLTokenizer.from_tiktoken(  # type: ignore[attr-defined]
            encoder={token: rank for rank, token in enumerate(self._vocabulary.ranks)},
            special_tokens=dict(self._vocabulary.special_tokens),
            pattern=SPLIT_PATTERN,
            eos_token=self._eos_token_ids,
            n_vocab=self._vocab_size,
        )
        return tokenizer


def _text(grammar: Grammar) -> str:
    match grammar.kind:
        case "regex":
            return llguidance.LLMatcher.grammar_from_regex(grammar.text)
        case "lark":
            return llguidance.LLMatcher.grammar_from_lark(grammar.text)
        case "json":
            return llguidance.LLMatcher.grammar_from_json_schema(
                grammar.text,
                overrides={"item_separator": ", ?", "key_separator": ": ?", "whitespace_flexible": False},
            )
    return llguidance.grammar_from(grammar.kind, grammar.text)
