"""Byte-pair encoding: learn a rank table from text, and write it as a tiktoken file.

A rank is both a token's id and the order in which it was learned, so an encoder that always joins the adjacent pair of
lowest rank cuts text just as training did. Digits are never joined: numbers are spelt digit by digit.
"""

from __future__ import annotations

import base64
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import regex  # type: ignore[import-untyped]  # a dependency of tiktoken

from pronk.engine.tokenizer import SPLIT_PATTERN


def split(piece: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """Cut one piece into tokens: join the adjacent pair of lowest rank, the leftmost on ties, until none is left."""
    tokens = [piece[i : i + 1] for i in range(len(piece))]
    while len(tokens) > 1:
        joined = [ranks.get(left + right, len(ranks)) for left, right in pairwise(tokens)]
        lowest = min(joined)
        if lowest == len(ranks):
            break
        place = joined.index(lowest)
        tokens[place : place + 2] = [tokens[place] + tokens[place + 1]]
    return tokens


def count_pieces(texts: Iterable[str]) -> Counter[bytes]:
    """How often each piece of the pre-tokenisation occurs. Pieces that hold a digit are left out."""
    pieces: Counter[bytes] = Counter()
    for text in texts:
        pieces.update(
            piece.encode() for piece in regex.findall(SPLIT_PATTERN, text) if not regex.search(r"\p{N}", piece)
        )
    return pieces


def train(pieces: Counter[bytes], size: int) -> dict[bytes, int]:
    """Ranks 0..size-1: all 256 bytes, then the most frequent unions, the smaller bytes first on ties.

    Raises:
        ValueError: the text has too few different pairs for `size` ranks.
    """
    ranks = {bytes([value]): value for value in range(256)}
    cuts = {piece: split(piece, ranks) for piece in pieces}
    counts: Counter[bytes] = Counter()
    holders: defaultdict[bytes, set[bytes]] = defaultdict(set)

    def tally(piece: bytes, sign: int) -> None:
        for left, right in pairwise(cuts[piece]):
            counts[left + right] += sign * pieces[piece]
            holders[left + right].add(piece)

    for piece in pieces:
        tally(piece, 1)
    while len(ranks) < size:
        union = min(counts, key=lambda candidate: (-counts[candidate], candidate), default=b"")
        if counts[union] <= 0:
            raise ValueError(f"the text has only enough pairs for {len(ranks)} ranks; ask for fewer than {size}")
        ranks[union] = len(ranks)
        for piece in holders.pop(union):
            tally(piece, -1)
            cuts[piece] = split(piece, ranks)
            tally(piece, 1)
        del counts[union]
    return ranks


def write(ranks: dict[bytes, int], path: Path) -> None:
    """The tiktoken format: one line per token, base64 of its bytes, a space, the rank."""
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ordered))


def read(path: Path) -> dict[bytes, int]:
    lines = (line.split() for line in path.read_text().splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in lines}
