"""The bodies of POST /tokenize and /detokenize, in vLLM's form."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pronk.server.protocol.chat import ChatFields
from pronk.server.protocol.common import Body, told

MODEL = "One of the names that GET /v1/models lists. Default: the first."
STRINGS = "Tell each token's text as well."


class TokenizeTextRequest(Body):
    """Of a text."""

    model: str | None = Field(None, description=MODEL)
    prompt: str = Field(description="The text.")
    add_special_tokens: bool = Field(True, description="Begin with <|begin_of_text|>, as /v1/completions does.")
    return_token_strs: bool = Field(False, description=STRINGS)


class TokenizeChatRequest(ChatFields):
    """Of a chat, as /v1/chat/completions makes a prompt of it."""

    model: str | None = Field(None, description=MODEL)
    add_special_tokens: bool = Field(
        False, description="Begin with one more <|begin_of_text|> than the chat template's own."
    )
    return_token_strs: bool = Field(False, description=STRINGS)


class DetokenizeRequest(Body):
    model: str | None = Field(None, description=MODEL)
    tokens: Annotated[list[int], Field(fail_fast=True), told("array", items={"type": "integer", "minimum": 0})] = Field(
        description="Token ids."
    )
