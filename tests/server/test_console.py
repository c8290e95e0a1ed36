"""What a person sees at start, on a terminal and elsewhere."""

from __future__ import annotations

import io
import json
import shlex

import pytest

from pronk.engine.wire import Progress, RankShare
from pronk.server.console import (
    ProgressDisplay,
    base_url,
    curl_line,
    readable_bytes,
    readable_count,
    start_table,
)

from .fakes import info


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def show(out: io.StringIO) -> str:
    display = ProgressDisplay(out)
    display(Progress("starting"))
    for done in range(0, 1025, 64):
        display(Progress("loading weights", done << 20, 1 << 30))
    display(Progress("warming up"))
    display.close()
    return out.getvalue()


def test_elsewhere_there_are_plain_lines() -> None:
    assert show(io.StringIO()).splitlines() == [
        "starting ...",
        "loading weights ...",
        "loading weights: 25% of 1.0 GiB",
        "loading weights: 50% of 1.0 GiB",
        "loading weights: 75% of 1.0 GiB",
        "loading weights: 100% of 1.0 GiB",
        "warming up ...",
    ]


def test_on_a_terminal_there_is_one_bar_that_fills() -> None:
    shown = show(Terminal())
    assert "\r" in shown
    assert "loading weights:   0%" in shown
    assert "loading weights: 100%" in shown
    # The bar has its line; what follows begins on the next.
    assert shown.splitlines()[-1] == "warming up ..."


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (4 << 30, "4.0 GiB"), (5 << 50, "5120.0 TiB")]
)
def test_sizes(count: int, text: str) -> None:
    assert readable_bytes(count) == text


def test_counts() -> None:
    assert readable_count(1_235_814_400) == "1.24 billion"
    assert readable_count(3_150_000) == "3.15 million"
    assert readable_count(9_999) == "9,999"


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("::", "http://[::1]:80"),
        ("::1", "http://[::1]:80"),
        ("llama.example", "http://llama.example:80"),
    ],
)
def test_addresses_that_a_client_can_use(host: str, url: str) -> None:
    assert base_url(host, 80) == url


def test_the_curl_line_survives_the_shell() -> None:
    words = shlex.split(curl_line("it's", "http://x", needs_key=True))
    assert json.loads(words[words.index("-d") + 1])["model"] == "it's"
    assert "Authorization: Bearer $PRONK_API_KEY" in words
    assert "Authorization" not in curl_line("m", "http://x", needs_key=False)


def test_the_table() -> None:
    table = start_table(info(), names=("tiny", "other"), url="http://x:1", needs_key=True)
    for fact in (
        "tiny, other (/models/tiny)", "1.24 billion", "bfloat16", "cpu (fake)", "2.0 GiB, loaded in 1.5 s",
        "1.0 GiB: 100 blocks of 16 tokens", "4096 tokens", "8 sequences, 256 tokens a step",
        "http://x:1/v1 (API key needed)", "up to 3.2 GiB: these two, and 256.0 MiB to run",
    ):  # fmt: skip
        assert fact in table
    assert "rank" not in table


def test_the_table_says_where_packed_weights_are() -> None:
    for mapped, words in (
        (False, "2.0 GiB, loaded in 1.5 s; to be kept in /cache/llama.safetensors\n"),
        (True, "2.0 GiB, mapped in 1.5 s from /cache/llama.safetensors\n"),
    ):
        known = info(weights_file="/cache/llama.safetensors", weights_mapped=mapped)
        assert words in start_table(known, names=("tiny",), url="http://x:1", needs_key=False)


def test_the_table_says_what_each_of_several_ranks_has() -> None:
    most, last = RankShare(3 << 30, 1 << 30, 2, 1024), RankShare(2 << 30, 1 << 30, 1, 960)
    table = start_table(info(ranks=[most, most, most, last]), names=("tiny",), url="http://x:1", needs_key=False)
    rows = [line.strip() for line in table.splitlines() if "rank" in line]
    assert rows == [
        "ranks 0-2   each 3.0 GiB of weights, 2 KV heads, 1.0 GiB of KV cache, 1024 token ids",
        "rank 3      2.0 GiB of weights, 1 KV head, 1.0 GiB of KV cache, 960 token ids",
    ]


def test_memory_in_all_is_told_only_where_it_is_known() -> None:
    table = start_table(info(runtime_bytes=None), names=("tiny",), url="http://x:1", needs_key=False)
    assert "weights" in table
    assert "memory" not in table
