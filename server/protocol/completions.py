"""The body of POST /v1/completions: a prompt that is text or tokens, and what is wanted of it.

Knows JSON and the tokenizer. What is refused is refused by name.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag

from pronk.engine.request import MAX_LOGPROBS
from pronk.engine.tokenizer import Tokenizer
from pronk.server.errors import INVALID_VALUE, APIError
from pronk.server.protocol.common import refuse
from pronk.server.protocol.sampling import MAX_CHOICES, SamplingFields

MAX_PROMPTS = 2048
MAX_COMPLETIONS = 2048
DEFAULT_LENGTH = 16


def _kind_of_prompt(prompt: Any) -> str:
    if not isinstance(prompt, list):
        return "text"
    first = prompt[0] if prompt else ""
    if isinstance(first, list):
        return "token_lists"
    return "tokens" if isinstance(first, int) and not isinstance(first, bool) else "texts"


Tokens = Annotated[list[int], Field(min_length=1, fail_fast=True)]
PromptField = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)], Tag("texts")]
    | Annotated[Tokens, Tag("tokens")]
    | Annotated[Annotated[list[Tokens], Field(max_length=MAX_PROMPTS, fail_fast=True)], Tag("token_lists")],
    Discriminator(_kind_of_prompt),
]


class CompletionRequest(SamplingFields):
    prompt: PromptField | None = Field(
        None, description="A text, token ids, or a list of either. Default: the beginning of a document."
    )
    add_special_tokens: bool = Field(True, description="Begin each text with <|begin_of_text|>.")
    max_tokens: int | None = Field(
        None, ge=0, description="Length of a completion at most; 0 only scores the prompt. Default 16."
    )
    echo: bool = Field(False, description="Begin the answer with the prompt; with logprobs, also with its scores.")
    best_of: int | None = Field(
        None,
        ge=1,
        le=MAX_CHOICES,
        description="Make so many, and answer with the n of the highest mean log probability.",
    )
    logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_LOGPROBS,
        description="Tell the log probability of each token of the answer, and of so many of the most likely ones.",
    )
    suffix: str | None = Field(None, description="Refused: these models do not fill in the middle.")
    user: str | None = Field(None, description="No effect.")

    def check(self) -> None:
        super().check()
        if self.suffix:
            raise refuse("suffix", "These models do not write what stands before a suffix: leave suffix out.")
        if self.best_of is not None and self.best_of < self.num_choices:
            raise APIError("best_of must be at least n.", INVALID_VALUE, "best_of")
        if self.best_of is not None and self.best_of > self.num_choices and self.stream:
            raise APIError(
                "best_of more than n cannot be streamed: the best is known at the end.", INVALID_VALUE, "best_of"
            )
        prompts = len(self.prompt) if isinstance(self.prompt, list) else 1
        if prompts * self.num_made > MAX_COMPLETIONS and _kind_of_prompt(self.prompt) != "tokens":
            raise APIError(f"One request may make at most {MAX_COMPLETIONS} completions.", INVALID_VALUE, "prompt")
        if self.use_beam_search and (self.echo or self.best_of is not None):
            raise refuse("use_beam_search", "A beam search has no echo and no best_of: leave them out.")

    @property
    def num_made(self) -> int:
        """Completions of each prompt that are made, of which n are told."""
        return self.best_of or self.num_choices

    @property
    def length(self) -> int:
        return DEFAULT_LENGTH if self.max_tokens is None else self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return 0 if self.logprobs is None and self.num_made > self.num_choices else self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        """As SamplingParams.prompt_logprobs: what echo or prompt_logprobs want, whichever is more."""
        echoed = self.logprobs if self.echo else None
        wanted = [count for count in (echoed, self.prompt_logprobs) if count is not None]
        return max(wanted, default=None)

    def prompts(self, tokenizer: Tokenizer) -> list[list[int]]:
        """-> token ids of each prompt."""
        match _kind_of_prompt(self.prompt), self.prompt:
            case "tokens", list(tokens):
                return [tokens]  # type: ignore[list-item]
            case "token_lists", list(lists):
                return lists  # type: ignore[return-value]
            case "texts", list(texts):
                return [self._encode(text, tokenizer) for text in texts]  # type: ignore[arg-type]
            case _, str(text):
                return [self._encode(text, tokenizer)]
        return [[tokenizer.bos_id]]

    def _encode(self, text: str, tokenizer: Tokenizer) -> list[int]:
        start = [tokenizer.bos_id] if self.add_special_tokens else []
        return [*start, *tokenizer.encode(text)]
