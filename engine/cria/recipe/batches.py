"""What the model sees in a training step: rows of tokens, and which of them it has to learn to say.

Two streams. `copying` holds random tokens whose spans come back later: it teaches attention to look things up, which
conversations alone teach only very late. `talking` holds the conversations of the corpus.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from random import Random

import tiktoken
import torch
from torch import Tensor

from pronk.engine.cria.recipe import corpus
from pronk.engine.cria.recipe.prompt import render


@dataclass(frozen=True)
class Batch:
    """Tokens [rows, length] int64; learned [rows, length - 1] bool: which next tokens count in the loss."""

    tokens: Tensor
    learned: Tensor


def copying(seed: int, vocabulary: int, rows: int = 16, length: int = 97) -> Iterator[Batch]:
    """Rows of random tokens below `vocabulary`, in which spans of 4 to 16 tokens come back. All of a returning span but
    its first token is learned, for the first cannot be foreseen."""
    random = Random(seed)
    while True:
        learned = torch.zeros(rows, length - 1, dtype=torch.bool)
        written = [_row_with_copies(random, vocabulary, length, learned[row]) for row in range(rows)]
        yield Batch(torch.tensor(written), learned)


def _row_with_copies(random: Random, vocabulary: int, length: int, learned: Tensor) -> list[int]:
    row = [random.randrange(vocabulary) for _ in range(random.randint(8, 40))]
    while len(row) < length - 4:
        span = min(random.randint(4, 16), length - len(row), len(row))
        start = random.randint(0, len(row) - span)
        learned[len(row) : len(row) + span - 1] = True
        row += row[start : start + span]
        row += [random.randrange(vocabulary) for _ in range(random.randint(0, 2))]
    return (row + [random.randrange(vocabulary) for _ in range(4)])[:length]


def talking(seed: int, encoding: tiktoken.Encoding, size: int, pool: int = 1024, multiple: int = 32) -> Iterator[Batch]:
    """Conversations of similar length together, one per row, so that little is padded and none sees another.

    size: about how many tokens a batch has, padding included.
    """
    stream, random = corpus.conversations(seed), Random(seed)
    while True:
        rendered = sorted((render(talk, encoding) for talk in islice(stream, pool)), key=lambda pair: len(pair[0]))
        packed: list[Batch] = []
        while rendered:
            length = -(-len(rendered[-1][0]) // multiple) * multiple + 1
            rows = max(1, size // length)
            packed.append(_pad(rendered[-rows:], length))
            del rendered[-rows:]
        random.shuffle(packed)
        yield from packed


def _pad(rows: list[tuple[list[int], list[bool]]], length: int) -> Batch:
    tokens = torch.zeros(len(rows), length, dtype=torch.int64)
    answers = torch.zeros(len(rows), length - 1, dtype=torch.bool)
    for row, (ids, learned) in enumerate(rows):
        tokens[row, : len(ids)] = torch.tensor(ids)
        answers[row, : len(ids) - 1] = torch.tensor(learned[1:])
    return Batch(tokens, answers)
