"""What a person sees at start: progress while loading, then a table of what is served and a line to try it with.

Knows text and terminals; no engine but by the messages it sends.
"""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

import pronk
from pronk.engine.wire import EngineInfo, Progress, RankShare

PLAIN_STEP = 0.25
_BYTE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


class ProgressDisplay:
    """A bar on a terminal; elsewhere a line for each phase, and for each quarter of it."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._is_terminal = out.isatty()
        self._bar: Any = None
        self._phase = ""
        self._told = 0.0

    def __call__(self, progress: Progress) -> None:
        if progress.phase != self._phase:
            self.close()
            self._phase, self._told = progress.phase, 0.0
            if not (self._is_terminal and progress.total):
                print(f"{progress.phase} ...", file=self._out, flush=True)
        if not progress.total:
            return
        if self._is_terminal:
            self._draw(progress)
        else:
            self._tell(progress)

    def close(self) -> None:
        """Leave the bar as it stands; what is printed next begins on a line of its own."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _draw(self, progress: Progress) -> None:
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(
                desc=progress.phase, total=progress.total, unit=progress.unit, unit_scale=True, unit_divisor=1024,
                file=self._out, mininterval=0,
            )  # fmt: skip
        self._bar.update(progress.done - self._bar.n)

    def _tell(self, progress: Progress) -> None:
        share = progress.done / progress.total
        if share >= self._told + PLAIN_STEP or (share == 1 and self._told < 1):
            self._told = share - share % PLAIN_STEP
            size = readable_bytes(progress.total) if progress.unit == "B" else f"{progress.total} {progress.unit}"
            print(f"{progress.phase}: {share:.0%} of {size}", file=self._out, flush=True)


def readable_bytes(count: int) -> str:
    """1536 -> "1.5 KiB"."""
    size, unit = float(count), 0
    while size >= 1024 and unit < len(_BYTE_UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{count} B" if unit == 0 else f"{size:.1f} {_BYTE_UNITS[unit]}"


def readable_count(count: int) -> str:
    """1235814400 -> "1.24 billion"."""
    for size, word in ((10**9, "billion"), (10**6, "million")):
        if count >= size:
            return f"{count / size:.2f} {word}"
    return f"{count:,}"


def base_url(host: str, port: int) -> str:
    """host: what the server listens on. -> where a client on this machine finds it."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"


def start_table(info: EngineInfo, *, names: Sequence[str], url: str, needs_key: bool) -> str:
    """-> what is printed when the server is ready."""
    rows = [
        ("model", f"{', '.join(names)} ({info.folder})"),
        ("parameters", readable_count(info.num_parameters)),
        ("dtype", info.dtype),
        ("device", f"{info.device} ({info.kernels})"),
        ("weights", _weights(info)),
        ("KV cache", f"{readable_bytes(info.kv_cache_bytes)}: {info.num_blocks} blocks of {info.block_size} tokens"),
        *_memory(info),
        *_ranks(info.ranks),
        ("context", f"{info.max_model_len} tokens"),
        ("at a time", f"{info.max_num_seqs} sequences, {info.max_num_batched_tokens} tokens a step"),
        ("address", f"{url}/v1{' (API key needed)' if needs_key else ''}"),
    ]
    width = max(len(label) for label, _ in rows)
    table = "\n".join(f"  {label:<{width}}  {value}" for label, value in rows)
    curl = curl_line(names[0], url, needs_key=needs_key)
    return f"Pronk {pronk.__version__} is ready.\n\n{table}\n\nTry it:\n\n{curl}\n"


def _weights(info: EngineInfo) -> str:
    size, seconds = readable_bytes(info.weights_bytes), f"{info.load_seconds:.1f} s"
    if info.weights_mapped:
        return f"{size}, mapped in {seconds} from {info.weights_file}"
    later = "" if info.weights_file is None else f"; to be kept in {info.weights_file}"
    return f"{size}, loaded in {seconds}{later}"


def _memory(info: EngineInfo) -> list[tuple[str, str]]:
    """-> the row of what the engine takes in all, where that is known. Pages of the cache are taken when written."""
    if info.runtime_bytes is None:
        return []
    most = info.weights_bytes + info.kv_cache_bytes + info.runtime_bytes
    return [("memory", f"up to {readable_bytes(most)}: these two, and {readable_bytes(info.runtime_bytes)} to run")]


def _ranks(shares: Sequence[RankShare]) -> Iterator[tuple[str, str]]:
    """-> the rows that say what each of several ranks has; neighbours that have as much share one."""
    if len(shares) == 1:
        return
    first = 0
    for share, alike in itertools.groupby(shares):
        last = first + len(list(alike)) - 1
        heads = f"{share.kv_heads} KV head{'s' if share.kv_heads > 1 else ''}"
        yield (
            f"rank {first}" if first == last else f"ranks {first}-{last}",
            f"{'' if first == last else 'each '}{readable_bytes(share.weights_bytes)} of weights, {heads}, "
            f"{readable_bytes(share.kv_cache_bytes)} of KV cache, {share.token_ids} token ids",
        )
        first = last + 1


def curl_line(model: str, url: str, *, needs_key: bool) -> str:
    """-> a command to paste into a shell."""
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello!"}]}, ensure_ascii=False)
    key = '-H "Authorization: Bearer $PRONK_API_KEY" ' if needs_key else ""
    return f"curl {url}/v1/chat/completions -H 'Content-Type: application/json' {key}-d {shlex.quote(body)}"
