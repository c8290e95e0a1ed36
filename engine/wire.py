"""The messages between the server's process and the engine's: typed, msgpack, one length-prefixed frame each.

Both directions are tagged unions, so a message that is not in this file cannot be sent or received; nothing is
pickled. Knows sockets only as bytes to frame.
"""

from __future__ import annotations

import struct

import msgspec

from pronk.engine.config import EngineConfig
from pronk.engine.request import Output, Request

HEADER = struct.Struct("<I")
READ_SIZE = 1 << 20
"""Bytes that either side reads at once, at most."""


class Start(msgspec.Struct, frozen=True, tag="start"):
    """First message to the engine: load this."""

    config: EngineConfig


class Add(msgspec.Struct, frozen=True, tag="add"):
    request: Request


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """Forget these requests; each is answered by an Output with finish_reason "abort", unless it had ended."""

    request_ids: list[str]


class CountCached(msgspec.Struct, frozen=True, tag="count_cached"):
    """How many tokens of this prompt would a request find in the prefix cache? Answered by a CachedCount."""

    query: int
    """Comes back with the answer."""
    prompt: list[int]
    cache_salt: str = ""


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    """Stop now: the client has drained what it wanted drained."""

    keeps: bool = False
    """Not before packed weights are written, as far as that takes no more than some seconds."""


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """While loading. total 0: not known."""

    phase: str
    done: int = 0
    total: int = 0
    unit: str = "B"


class RankShare(msgspec.Struct, frozen=True):
    """What one of several ranks has of the model."""

    weights_bytes: int
    kv_cache_bytes: int
    kv_heads: int
    """Of each layer."""
    token_ids: int
    """Of the vocabulary."""


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """The engine has loaded the model and made a first token: it can serve."""

    folder: str
    num_parameters: int
    dtype: str
    device: str
    kernels: str
    """Which kernel set runs, in words: for the table at start."""
    weights_bytes: int
    """Of all ranks."""
    kv_cache_bytes: int
    """Of all ranks."""
    num_blocks: int
    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    vocab_size: int
    eos_token_ids: list[int]
    load_seconds: float
    ranks: list[RankShare]
    """By rank."""
    weights_file: str | None = None
    """Where packed weights are kept, or are going to be: rank 0's."""
    weights_mapped: bool = False
    """Whether they were there."""
    runtime_bytes: int | None = None
    """What the processes of all ranks took beside weights and KV cache when they had made a token, what they share
    counted for each; None where that is not known."""


class EngineStats(msgspec.Struct, frozen=True, array_like=True, kw_only=False):
    """The engine's state after a step; the counters only grow."""

    num_running: int = 0
    num_waiting: int = 0
    blocks_used: int = 0
    """Held by running sequences."""
    blocks_cached: int = 0
    """Free, but still holding a prefix that may be hit."""
    blocks_total: int = 0
    steps: int = 0
    preemptions: int = 0
    prompt_tokens_computed: int = 0
    prompt_tokens_cached: int = 0
    generated_tokens: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    prefix_evicted_blocks: int = 0
    nonfinite_logits: int = 0
    step_seconds: float = 0.0
    """Of the last step."""
    step_tokens: int = 0
    """In the last step."""
    step_sequences: int = 0
    """In the last step."""
    all_reduces: int = 0
    """Operations of the ranks that share the model, as are the next: rank 0's."""
    all_gathers: int = 0
    collective_seconds: float = 0.0
    """That went by in them, waiting for other ranks included."""


class Step(msgspec.Struct, frozen=True, tag="step"):
    """One message a step, for all requests together."""

    outputs: list[Output]
    stats: EngineStats


class CachedCount(msgspec.Struct, frozen=True, tag="cached_count"):
    """The answer to a CountCached, as the cache is between two steps."""

    query: int
    num_tokens: int


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The engine cannot start, or cannot go on. Its process ends after this.

    kind: the name of the class in errors.py, or of another exception when it is a fault of ours.
    """

    kind: str
    message: str
    traceback: str = ""


ToEngine = Start | Add | Abort | CountCached | Shutdown
FromEngine = Progress | EngineInfo | Step | CachedCount | Failed


def encode(message: msgspec.Struct) -> bytes:
    """-> one frame: four bytes of length, little-endian, then msgpack."""
    body = msgspec.msgpack.encode(message)
    return HEADER.pack(len(body)) + body


class Frames:
    """Cuts a stream of bytes into messages of one direction."""

    def __init__(self, kind: object) -> None:
        self._decoder: msgspec.msgpack.Decoder[object] = msgspec.msgpack.Decoder(kind)
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[object]:
        """data: whatever arrived, cut anywhere. -> the messages that are complete now."""
        self._buffer += data
        messages = []
        start = 0
        while len(self._buffer) - start >= HEADER.size:
            (length,) = HEADER.unpack_from(self._buffer, start)
            end = start + HEADER.size + length
            if len(self._buffer) < end:
                break
            messages.append(self._decoder.decode(memoryview(self._buffer)[start + HEADER.size : end]))
            start = end
        del self._buffer[:start]
        return messages
