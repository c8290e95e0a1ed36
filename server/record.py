"""RequestRecord: what is known about one HTTP request while it lives, for its log line and its metrics when it ends.

Knows no metric and no log. Holds counts and times, and no word of a prompt or an answer.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal

from pronk.engine.request import Timing

Outcome = Literal["stop", "length", "client_abort", "error"]

# What a server writes down when the client has left before an answer (nginx's number; it is never sent).
CLIENT_CLOSED_REQUEST = 499


@dataclass(slots=True)
class RequestRecord:
    """Filled in on the way. Times are seconds of time.perf_counter()."""

    request_id: str
    arrived: float = field(default_factory=time.perf_counter)
    status: int | None = None
    """Of the response, once it has started."""
    rejection: str = ""
    """Why it was refused, in the words of `request_rejections_total`."""
    outcome: Outcome | None = None
    """How the completion ended; None: the engine has not taken it."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    render_seconds: float | None = None
    """Messages to token ids."""
    first_token: float | None = None
    last_token: float | None = None
    timing: Timing | None = None
    """Where the engine's time went."""

    def count(self, num_tokens: int) -> None:
        """The completion has grown."""
        if num_tokens:
            self.last_token = time.perf_counter()
            if self.first_token is None:
                self.first_token = self.last_token
            self.completion_tokens += num_tokens

    @property
    def time_to_first_token(self) -> float | None:
        return None if self.first_token is None else self.first_token - self.arrived

    @property
    def time_per_output_token(self) -> float | None:
        """Seconds from one token to the next, on average; None below two tokens."""
        if self.first_token is None or self.last_token is None or self.completion_tokens < 2:
            return None
        return (self.last_token - self.first_token) / (self.completion_tokens - 1)
