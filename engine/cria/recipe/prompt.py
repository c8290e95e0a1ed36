"""Conversations as text pieces and as token ids, in the layout of Llama 3.2 Instruct.

Text is always encoded as text: special tokens are placed by name and never read out of a message. The server's own
template is `pronk.server.chat.template`; a test holds the two equal. This one also says which tokens to learn.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

import tiktoken

from pronk.engine.tokenizer import SPLIT_PATTERN, llama_special_tokens

TOOL_PREAMBLE = (
    "Given the following functions, please respond with a JSON for a function call with its proper arguments that best"
    " answers the given prompt.\n\n"
    'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.'
    "Do not use variables.\n\n"
)


def load_encoding(ranks: dict[bytes, int]) -> tiktoken.Encoding:
    """The tokenizer of a rank table: Llama 3's pattern, and the special tokens after the last rank."""
    specials = llama_special_tokens(len(ranks))
    return tiktoken.Encoding("cria", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=specials)


Role = Literal["user", "assistant", "ipython"]


@dataclass(frozen=True)
class Turn:
    role: Role
    text: str


@dataclass(frozen=True)
class Conversation:
    """One training example. `date` is written as in `26 Jul 2024`; `tools` are OpenAI tool definitions."""

    turns: tuple[Turn, ...]
    date: str
    system: str = ""
    tools: tuple[dict[str, Any], ...] = field(default=())

    def system_text(self) -> str:
        environment = "Environment: ipython\n" if self.tools else ""
        return f"{environment}Cutting Knowledge Date: December 2023\nToday Date: {self.date}\n\n{self.system}"

    def messages(self) -> list[tuple[str, str]]:
        """Role and body of every message as the template writes them, the system block first."""
        bodies = [("system", self.system_text())]
        for index, turn in enumerate(self.turns):
            preamble = self.tool_preamble() if index == 0 else ""
            bodies.append((turn.role, preamble + turn.text))
        return bodies

    def tool_preamble(self) -> str:
        if not self.tools:
            return ""
        return TOOL_PREAMBLE + "".join(json.dumps(tool, indent=4, ensure_ascii=False) + "\n\n" for tool in self.tools)


def render_prompt(conversation: Conversation, encoding: tiktoken.Encoding) -> list[int]:
    """Token ids of all messages, then the open header that asks for the assistant's answer."""
    ids, _ = render(conversation, encoding)
    return ids + _header("assistant", encoding)


def render(conversation: Conversation, encoding: tiktoken.Encoding) -> tuple[list[int], list[bool]]:
    """Token ids of all messages, and for each token whether the model has to say it (an answer and its end)."""
    ids, learned = [encoding.encode_single_token("<|begin_of_text|>")], [False]
    end = encoding.encode_single_token("<|eot_id|>")
    for role, body in conversation.messages():
        header = _header(role, encoding)
        said = [*encoding.encode_ordinary(body), end]
        ids += header + said
        learned += [False] * len(header) + [role == "assistant"] * len(said)
    return ids, learned


def _header(role: str, encoding: tiktoken.Encoding) -> list[int]:
    start, end = encoding.encode_single_token("<|start_header_id|>"), encoding.encode_single_token("<|end_header_id|>")
    return [start, *encoding.encode_ordinary(role), end, *encoding.encode_ordinary("\n\n")]
