"""Text to token ids and back, by Llama 3's byte-level BPE.

`Vocabulary` is the table (id -> bytes) and is all that decoding needs; `Tokenizer` adds encoding, by tiktoken. Neither
knows of chat messages, nor of which model the ids are for.

Encoding is of ordinary text only: text that spells a special token is encoded as the characters it is made of. A
special token gets into a prompt only through its id.
"""

from __future__ import annotations

import binascii
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import tiktoken

from pronk.engine.errors import CheckpointFormatError, CheckpointNotFoundError, InvalidParameterError

# How Llama 3 cuts text into pieces; pairs are merged inside a piece and never across two.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# What `\s` means in SPLIT_PATTERN: Unicode's White_Space. Python's own `\s` has U+001C to U+001F as well.
WHITESPACE = (
    "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)
_WHITESPACE_RUN = re.compile(f"[{WHITESPACE}]+")

# tiktoken 0.14 matches `\s+(?!\S)` with a stack that a run of 999,999 spaces overflows (999,998 pass): it panics, and
# the panic is not an Exception. Longer runs than this, well below, are therefore cut out before tiktoken splits.
# Other long pieces came through: letters and punctuation up to 8 Mi characters, line breaks up to 4 million.
_LONGEST_RUN = 100_000

BEGIN_OF_TEXT = "<|begin_of_text|>"
_NUM_SPECIAL_TOKENS = 256
_NAMED_SPECIAL_TOKENS = {
    0: BEGIN_OF_TEXT,
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}


def llama_special_tokens(first_id: int) -> dict[str, int]:
    """The 256 special tokens of Llama 3.1, 3.2 and 3.3, spelling -> id, the first one at `first_id`."""
    names: dict[str, int] = {}
    num_reserved = 0
    for offset in range(_NUM_SPECIAL_TOKENS):
        name = _NAMED_SPECIAL_TOKENS.get(offset)
        if name is None:
            name = f"<|reserved_special_token_{num_reserved}|>"
            num_reserved += 1
        names[name] = first_id + offset
    return names


@dataclass(frozen=True)
class Vocabulary:
    """The table of tokens.

    ranks: the bytes of each ordinary token; its place is its id and its merge priority (lower merges first).
    special_tokens: spelling -> id; every id is beyond the ranks. Ids between and after them may have no token.
    """

    ranks: tuple[bytes, ...]
    special_tokens: Mapping[str, int]
    _special_bytes: dict[int, bytes] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        special_bytes = {token_id: name.encode(errors="replace") for name, token_id in self.special_tokens.items()}
        if len(special_bytes) < len(self.special_tokens):
            raise CheckpointFormatError("Two special tokens have the same id; give each an id of its own.")
        if special_bytes and min(special_bytes) < len(self.ranks):
            lowest = min(special_bytes)
            raise CheckpointFormatError(
                f"Special token {special_bytes[lowest].decode()} has id {lowest}, which is taken by one of the "
                f"{len(self.ranks)} ordinary tokens; special tokens must follow them."
            )
        object.__setattr__(self, "_special_bytes", special_bytes)

    @property
    def size(self) -> int:
        """One more than the highest id that has a token."""
        return max(self._special_bytes, default=len(self.ranks) - 1) + 1

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for: a special token's spelling in UTF-8, nothing for an id without a token.

        Raises InvalidParameterError for a negative id.
        """
        if token_id < 0:
            raise InvalidParameterError(f"Token id {token_id} is negative; ids start at 0.")
        if token_id < len(self.ranks):
            return self.ranks[token_id]
        return self._special_bytes.get(token_id, b"")

    def is_special(self, token_id: int) -> bool:
        """Whether the id is a special token's."""
        return token_id in self._special_bytes


class Tokenizer:
    """Encodes and decodes with one vocabulary. Immutable; may be shared by threads."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        """Raises CheckpointFormatError when a single byte has no token: such text could not be encoded."""
        _require_every_byte(vocabulary.ranks, "The vocabulary")
        self.vocabulary = vocabulary
        self._ranks = {token: rank for rank, token in enumerate(vocabulary.ranks)}
        self._pieces = self._encoding(SPLIT_PATTERN)

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """The tokenizer of the checkpoint in `folder`; raises what `load_vocabulary` raises."""
        return cls(load_vocabulary(folder))

    @property
    def vocab_size(self) -> int:
        """One more than the highest id that has a token; a model's output may be wider."""
        return self.vocabulary.size

    @property
    def bos_id(self) -> int:
        """The id of <|begin_of_text|>."""
        return self.special(BEGIN_OF_TEXT)

    def special(self, name: str) -> int:
        """The id of a special token by its spelling. Raises CheckpointFormatError when there is none."""
        token_id = self.vocabulary.special_tokens.get(name)
        if token_id is None:
            raise CheckpointFormatError(
                f"The tokenizer has no special token {name}; use the tokenizer files that belong to the model."
            )
        return token_id

    def encode(self, text: str) -> list[int]:
        """Ordinary text to ids, with no special token among them and none added.

        The result is the split pattern's and the merges', exactly, at any length; time grows a little faster than
        length. A lone surrogate, which is not text, counts as U+FFFD.
        """
        ids: list[int] = []
        done = 0
        for start, end in _long_whitespace_pieces(text):
            ids += self._pieces.encode_ordinary(text[done:start])
            ids += self._whole.encode_ordinary(text[start:end])
            done = end
        ids += self._pieces.encode_ordinary(text[done:])
        return ids

    def decode_bytes(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> bytes:
        """The tokens' bytes, one after the other."""
        vocabulary = self.vocabulary
        return b"".join(
            vocabulary.token_bytes(token_id)
            for token_id in token_ids
            if not (skip_special_tokens and vocabulary.is_special(token_id))
        )

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The tokens' text, byte for byte; U+FFFD stands for bytes that are not UTF-8. Spaces are never tidied."""
        return self.decode_bytes(token_ids, skip_special_tokens).decode("utf-8", errors="replace")

    @cached_property
    def _whole(self) -> tiktoken.Encoding:
        """Takes its input as a single piece."""
        return self._encoding(r"[\s\S]+")

    def _encoding(self, pattern: str) -> tiktoken.Encoding:
        # Built by hand: tiktoken's registry would want the network. Told of no special token, it can make none.
        return tiktoken.Encoding("llama", pat_str=pattern, mergeable_ranks=self._ranks, special_tokens={})


def _long_whitespace_pieces(text: str) -> Iterator[tuple[int, int]]:
    """(start, end) of each piece that SPLIT_PATTERN makes of more than _LONGEST_RUN whitespace characters without a
    line break. What lies between can be split on its own, as no alternative of the pattern looks back, and the only
    one that looks ahead does so from inside a run of whitespace.

    A text is probed every _LONGEST_RUN characters, so that ordinary text costs nothing.
    """
    done = 0
    probe = _LONGEST_RUN
    while probe < len(text):
        run = _WHITESPACE_RUN.match(text, probe)
        end = run.end() if run else probe
        if run:
            start = done + len(text[done:probe].rstrip(WHITESPACE))
            # `\s*[\r\n]+` takes the run as far as its last line break; it does not overflow.
            start = max(start, text.rfind("\n", start, end) + 1, text.rfind("\r", start, end) + 1)
            # `\s+(?!\S)` leaves the last character of a run to the piece that follows it.
            piece_end = end if end == len(text) else end - 1
            if piece_end - start > _LONGEST_RUN:
                yield start, piece_end
        done = end
        probe = end + _LONGEST_RUN


def load_vocabulary(folder: Path) -> Vocabulary:
    """The vocabulary of the checkpoint in `folder`.

    Ordinary tokens come from `tokenizer.model` (a tiktoken rank file), else from `tokenizer.json`. The spellings of the
    special tokens come from `tokenizer_config.json`, else from `tokenizer.json`, else they are Llama 3.2's 256,
    following the ordinary tokens.

    Raises CheckpointNotFoundError when there is neither file, and CheckpointFormatError, naming the file, when one is
    damaged or is no byte-level BPE with Llama 3's split pattern.
    """
    ranks_file = folder / "tokenizer.model"
    json_file = folder / "tokenizer.json"
    config_file = folder / "tokenizer_config.json"
    if not ranks_file.is_file() and not json_file.is_file():
        raise CheckpointNotFoundError(
            f"{folder} has neither tokenizer.model nor tokenizer.json; point to a folder that holds a Llama checkpoint."
        )
    document = None
    if ranks_file.is_file():
        source = ranks_file
        ranks = _read_ranks(ranks_file)
    else:
        source = json_file
        document = _read_json(json_file)
        ranks = _ranks_of_document(document, json_file)
    _require_every_byte(ranks, str(source))

    special_tokens = _read_special_tokens_of_config(config_file)
    if special_tokens is None and json_file.is_file():
        special_tokens = _special_tokens_of_document(document or _read_json(json_file), json_file)
    if special_tokens is None:
        special_tokens = llama_special_tokens(len(ranks))
    try:
        return Vocabulary(ranks, special_tokens)
    except CheckpointFormatError as error:
        raise CheckpointFormatError(f"{folder}: {error}") from error


def _require_every_byte(ranks: Sequence[bytes], source: str) -> None:
    present = set(ranks)
    missing = [byte for byte in range(256) if bytes([byte]) not in present]
    if missing:
        raise CheckpointFormatError(
            f"{source} has no token for the single byte 0x{missing[0]:02x}; a byte-level vocabulary needs all 256."
        )


def _read_ranks(file: Path) -> tuple[bytes, ...]:
    """A tiktoken rank file: one line per token, base64 of its bytes, a space, its rank; ranks count up from 0."""
    ranks: list[bytes] = []
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        if not line:
            continue
        try:
            encoded, rank_text = line.split()
            token = binascii.a2b_base64(encoded, strict_mode=True)
            rank = int(rank_text)
        except ValueError as error:
            raise CheckpointFormatError(
                f"{file}, line {number}: expected base64 of a token, a space and its rank, as in a tiktoken rank file; "
                f"found {line[:60]!r}."
            ) from error
        if not token or rank != len(ranks):
            raise CheckpointFormatError(
                f"{file}, line {number}: expected a token of rank {len(ranks)}, found {token!r} of rank {rank}; "
                "ranks must count up from 0 without a gap."
            )
        ranks.append(token)
    if len(set(ranks)) < len(ranks):
        raise _duplicate(ranks, file)
    return tuple(ranks)


def _duplicate(ranks: Sequence[bytes], file: Path) -> CheckpointFormatError:
    first: dict[bytes, int] = {}
    for rank, token in enumerate(ranks):
        if token in first:
            return CheckpointFormatError(f"{file}: ranks {first[token]} and {rank} are the same token {token!r}.")
        first[token] = rank
    return CheckpointFormatError(f"{file}: two ranks are the same token.")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        document = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointFormatError(f"{file} is not JSON: {error}.") from error
    if not isinstance(document, dict):
        raise CheckpointFormatError(f"{file}: expected a JSON object, found {type(document).__name__}.")
    return document


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet for bytes, character -> byte: a printable byte is its own character, and the 68 others have the
    characters from U+0100 on, in increasing order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + place): byte for place, byte in enumerate(others)})
    return alphabet


def _ranks_of_document(document: dict[str, Any], file: Path) -> tuple[bytes, ...]:
    """The ranks in a `tokenizer.json`. Its merges, redundant in a Llama's file, only serve to check the ids' order."""
    model = document.get("model")
    if not isinstance(model, dict):
        raise CheckpointFormatError(f"{file}: 'model' is missing; expected a byte-level BPE.")
    _require_byte_level_bpe(document, model, file)
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or not vocab or not all(isinstance(rank, int) for rank in vocab.values()):
        raise CheckpointFormatError(f"{file}: 'model.vocab' must map each token to its id.")
    spellings = sorted(vocab, key=vocab.__getitem__)
    for expected, spelling in enumerate(spellings):
        if vocab[spelling] != expected:
            raise CheckpointFormatError(
                f"{file}: expected a token of id {expected}, found {spelling!r} of id {vocab[spelling]}; "
                "the ids of 'model.vocab' must count up from 0 without a gap."
            )
    _require_merges_in_order(model.get("merges", []), vocab, file)
    alphabet = _byte_alphabet()
    ranks: list[bytes] = []
    for spelling in spellings:
        try:
            ranks.append(bytes([alphabet[character] for character in spelling]))
        except KeyError as error:
            raise CheckpointFormatError(
                f"{file}: token {spelling!r} has the character {error}, which stands for no byte in a byte-level BPE."
            ) from error
        if not spelling:
            raise CheckpointFormatError(f"{file}: token {vocab[spelling]} is empty.")
    return tuple(ranks)


def _require_byte_level_bpe(document: dict[str, Any], model: dict[str, Any], file: Path) -> None:
    def require(holds: bool, expected: str, found: object) -> None:
        if not holds:
            raise CheckpointFormatError(f"{file}: expected {expected}, found {json.dumps(found)[:300]}.")

    require(model.get("type", "BPE") == "BPE", "'model.type' BPE", model.get("type"))
    require(not model.get("byte_fallback"), "'model.byte_fallback' false", model.get("byte_fallback"))
    # Absent in files older than the field. An explicit false means other tokens than the ranks give.
    require(model.get("ignore_merges", True) is True, "'model.ignore_merges' true", model.get("ignore_merges"))
    require(document.get("normalizer") is None, "no 'normalizer'", document.get("normalizer"))
    steps = document.get("pre_tokenizer")
    kinds = _pre_tokenizer_steps(steps)
    split, byte_level = kinds if len(kinds) == 2 else ({}, {})
    require(
        split.get("type") == "Split"
        and split.get("pattern") == {"Regex": SPLIT_PATTERN}
        and split.get("behavior") == "Isolated"
        and split.get("invert") is False
        and byte_level.get("type") == "ByteLevel"
        and byte_level.get("use_regex") is False
        and byte_level.get("add_prefix_space") is False,
        "a 'pre_tokenizer' that splits by Llama 3's pattern, then maps bytes",
        steps,
    )


def _pre_tokenizer_steps(pre_tokenizer: object) -> list[dict[str, Any]]:
    if not isinstance(pre_tokenizer, dict):
        return []
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    return [step for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []


def _require_merges_in_order(merges: object, vocab: dict[str, int], file: Path) -> None:
    """An id is a priority only when the merges come in the order of the ids that they make."""
    if not isinstance(merges, list):
        raise CheckpointFormatError(f"{file}: 'model.merges' must be a list.")
    previous = -1
    for number, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge  # "a b" in older files, ["a", "b"] in newer ones
        result = vocab.get("".join(pair), -1) if isinstance(pair, list) and len(pair) == 2 else -1
        if result < previous or result < 0:
            raise CheckpointFormatError(
                f"{file}: merge {number} ({merge!r}) is not in the order of the token ids; only a BPE whose ids are "
                "its merge priorities can be used."
            )
        previous = result


def _special_tokens_of_document(document: dict[str, Any], file: Path) -> dict[str, int] | None:
    added = document.get("added_tokens")
    if not added:
        return None
    if not isinstance(added, list) or not all(isinstance(entry, dict) for entry in added):
        raise CheckpointFormatError(f"{file}: 'added_tokens' must be a list of objects.")
    return _special_tokens([(entry.get("id"), entry) for entry in added], file)


def _read_special_tokens_of_config(file: Path) -> dict[str, int] | None:
    if not file.is_file():
        return None
    added = _read_json(file).get("added_tokens_decoder")
    if not added:
        return None
    if not isinstance(added, dict) or not all(isinstance(entry, dict) for entry in added.values()):
        raise CheckpointFormatError(f"{file}: 'added_tokens_decoder' must map ids to objects.")
    return _special_tokens([(int(key) if key.isdecimal() else key, entry) for key, entry in added.items()], file)


def _special_tokens(entries: Iterable[tuple[object, dict[str, Any]]], file: Path) -> dict[str, int]:
    special_tokens: dict[str, int] = {}
    for token_id, entry in entries:
        name = entry.get("content")
        if not isinstance(token_id, int) or not isinstance(name, str) or not name or name in special_tokens:
            raise CheckpointFormatError(
                f"{file}: added token {name!r} of id {token_id!r} is damaged; each needs an id and a spelling of "
                "its own."
            )
        if not entry.get("special", False):
            raise CheckpointFormatError(
                f"{file}: added token {name!r} (id {token_id}) is not marked special; tokens added as ordinary text "
                "are not supported."
            )
        special_tokens[name] = token_id
    return special_tokens
