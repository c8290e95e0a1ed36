"""The tokenizer against golden ids, against Hugging Face's `tokenizers`, and against damaged files.

The golden ids need the real rank file: PRONK_LLAMA3_TOKENIZER names it, and those tests are skipped where it is unset.
Everything else uses a small vocabulary made here.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from pronk.engine.errors import CheckpointFormatError, CheckpointNotFoundError, InvalidParameterError
from pronk.engine.tokenizer import (
    SPLIT_PATTERN,
    WHITESPACE,
    Tokenizer,
    Vocabulary,
    llama_special_tokens,
    load_vocabulary,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "tokenizer_golden.json").read_text(encoding="utf-8"))[
    "cases"
]
REAL_FILE = os.environ.get("PRONK_LLAMA3_TOKENIZER")
needs_real_file = pytest.mark.skipif(
    REAL_FILE is None, reason="PRONK_LLAMA3_TOKENIZER does not name Llama 3's tokenizer.model"
)

# A busy machine is no fault of the code.
UNHURRIED = settings(deadline=None)

SAMPLE = (
    "the llama that pronks is a happy llama, and they're the ones we'll follow; don't run, don't shout, it's theirs. "
    "Whoever asks token by token, to decide when to stop, and whoever asks in larger steps, to send text, must agree. "
    "12 345 6789 l'été déjà naïve 中文字符 中文 日本語 नमस्ते 🦙🦙   \n\n  def f(x):\n        return x + 1\r\n\r\n"
    "\t\tHELLO Hello hello                 \t\t\t\t\t\n\n\n\n\xa0\xa0\xa0\xa0\n   \n   \n"
)
NUM_MERGES = 150
NUM_RANKS = 256 + NUM_MERGES


def merged(tokens: Sequence[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    result: list[bytes] = []
    place = 0
    while place < len(tokens):
        step = 2 if tuple(tokens[place : place + 2]) == pair else 1
        result.append(b"".join(tokens[place : place + step]))
        place += step
    return result


@cache
def small_ranks() -> tuple[bytes, ...]:
    """256 bytes in an order of their own, and NUM_MERGES merges of the most frequent pair in SAMPLE."""
    ranks = [bytes([(byte * 7 + 3) % 256]) for byte in range(256)]
    words = [[bytes([byte]) for byte in word.encode()] for word in re.findall(r" ?\S+|\s+", SAMPLE)]
    for _ in range(NUM_MERGES):
        pairs = Counter(pair for word in words for pair in itertools.pairwise(word))
        best = max((pair for pair in pairs if b"".join(pair) not in ranks), key=lambda pair: (pairs[pair], pair))
        ranks.append(b"".join(best))
        words = [merged(word, best) for word in words]
    return tuple(ranks)


@cache
def small_tokenizer() -> Tokenizer:
    return Tokenizer(Vocabulary(small_ranks(), llama_special_tokens(len(small_ranks()))))


def rank_file(ranks: Sequence[bytes]) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranks))


@cache
def spelled_bytes() -> list[str]:
    """GPT-2's character for each byte, as `tokenizers` tells it."""
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    spelled: dict[int, str] = {}
    for character in map(chr, range(0x800)):
        spelled |= zip(character.encode(), byte_level.pre_tokenize_str(character)[0][0], strict=True)
    # The bytes that begin longer characters, and those that UTF-8 never has, are all printable: they are themselves.
    return [spelled.get(byte, chr(byte)) for byte in range(256)]


def spelling(token: bytes) -> str:
    return "".join(spelled_bytes()[byte] for byte in token)


def all_merges(ranks: Sequence[bytes]) -> list[list[str]]:
    place = {token: rank for rank, token in enumerate(ranks)}
    merges = []
    for token in ranks:
        halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [pair for pair in halves if pair[0] in place and pair[1] in place]
        merges += [
            [spelling(left), spelling(right)]
            for left, right in sorted(known, key=lambda pair: (place[pair[0]], place[pair[1]]))
        ]
    return merges


def tokenizer_document(ranks: Sequence[bytes], special_tokens: dict[str, int]) -> dict[str, Any]:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": token_id,
                "content": name,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for name, token_id in special_tokens.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": SPLIT_PATTERN}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {spelling(token): rank for rank, token in enumerate(ranks)},
            "merges": all_merges(ranks),
        },
    }


def small_document() -> dict[str, Any]:
    return tokenizer_document(small_ranks(), llama_special_tokens(len(small_ranks())))


@cache
def hugging_face_small() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(json.dumps(small_document()))


def write_json(folder: Path, document: object, name: str = "tokenizer.json") -> Path:
    (folder / name).write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
    return folder


# Characters of every class the pattern tells apart, none of them so new that Unicode versions differ on it.
CHARACTERS = st.sampled_from(
    list("aZéñßſ中文字नमस्ते가🦙👨\u200d👩0189²½٣!?,.'\"_-=<|>{}()\r\n\t \x0b\x1c\x85\xa0\u2003\u3000\u200b")
)
FRAGMENTS = st.one_of(
    st.text(CHARACTERS, max_size=12),
    st.sampled_from(SAMPLE.split(" ")),
    st.sampled_from(["'s", "'LL", "don't", " \n", "\r\n\r\n", "    ", "<|eot_id|>", "<|begin_of_text|>", "\t\t x"]),
)
TEXTS = st.lists(FRAGMENTS, max_size=12).map("".join)


# Against other implementations


@UNHURRIED
@given(TEXTS)
def test_ids_equal_those_of_hugging_face(text: str) -> None:
    expected = hugging_face_small().encode(text, add_special_tokens=False)
    # Hugging Face recognises special spellings in text, which `encode` never does.
    if not any(name in text for name in small_tokenizer().vocabulary.special_tokens):
        assert small_tokenizer().encode(text) == expected.ids


@UNHURRIED
@given(st.lists(st.integers(0, NUM_RANKS + 255)))
def test_text_equals_that_of_hugging_face(token_ids: list[int]) -> None:
    for skip in (True, False):
        expected = hugging_face_small().decode(token_ids, skip_special_tokens=skip)
        if skip or not any(small_tokenizer().vocabulary.is_special(token_id) for token_id in token_ids):
            assert small_tokenizer().decode(token_ids, skip_special_tokens=skip) == expected


@UNHURRIED
@given(TEXTS | st.text())
def test_ids_give_back_the_text_and_are_never_special(text: str) -> None:
    tokenizer = small_tokenizer()
    token_ids = tokenizer.encode(text)
    assert tokenizer.decode(token_ids) == text
    assert not any(tokenizer.vocabulary.is_special(token_id) for token_id in token_ids)


@needs_real_file
def test_golden_ids(real_tokenizer: Tokenizer) -> None:
    for case in GOLDEN:
        assert real_tokenizer.encode(case["text"]) == case["plain_ids"], case["text"]
        assert real_tokenizer.decode(case["plain_ids"]) == case["text"]
        if "special_ids" in case:
            assert [real_tokenizer.special(case["text"])] == case["special_ids"]


@needs_real_file
def test_both_files_hold_the_same_vocabulary(real_tokenizer: Tokenizer, tmp_path: Path) -> None:
    vocabulary = real_tokenizer.vocabulary
    document = tokenizer_document(vocabulary.ranks, dict(vocabulary.special_tokens))
    from_json = load_vocabulary(write_json(tmp_path, document))
    assert from_json == vocabulary
    other = Tokenizer(from_json)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for case in GOLDEN:
        assert other.encode(case["text"]) == case["plain_ids"]
        expected = case.get("special_ids", case["plain_ids"])
        assert theirs.encode(case["text"], add_special_tokens=False).ids == expected


@pytest.fixture(scope="module")
def real_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("llama3")
    (folder / "tokenizer.model").symlink_to(Path(str(REAL_FILE)).resolve())
    return Tokenizer.from_folder(folder)


# Long input


def test_whitespace_is_what_the_pattern_says() -> None:
    ranks = {bytes([byte]): byte for byte in range(256)}
    # Text that the pattern does not match is left out.
    only_whitespace = tiktoken.Encoding("whitespace", pat_str=r"\s", mergeable_ranks=ranks, special_tokens={})
    everything = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    assert only_whitespace.decode_bytes(only_whitespace.encode_ordinary(everything)).decode() == WHITESPACE


def as_one_piece(text: str) -> list[int]:
    ranks = {token: rank for rank, token in enumerate(small_ranks())}
    whole = tiktoken.Encoding("whole", pat_str=r"[\s\S]+", mergeable_ranks=ranks, special_tokens={})
    return whole.encode_ordinary(text)


def test_four_million_spaces() -> None:
    """More than tiktoken's pattern matching survives; the longest token of spaces here has eight."""
    assert small_tokenizer().encode(" " * 4_000_000) == [small_ranks().index(b" " * 8)] * 500_000


def test_a_run_that_tiktoken_does_not_survive_before_a_word() -> None:
    tokenizer = small_tokenizer()
    assert tokenizer.encode(" " * 1_000_003 + "x") == [*as_one_piece(" " * 1_000_002), *tokenizer.encode(" x")]


WHITESPACE_HEAVY = st.lists(st.text(st.sampled_from("  \t\xa0\n\r"), max_size=9) | st.sampled_from("x1!é"), max_size=9)


@UNHURRIED
@given(WHITESPACE_HEAVY.map("".join), st.integers(1, 7))
def test_cutting_out_long_runs_leaves_the_ids_as_they_are(text: str, longest_run: int) -> None:
    """With a small limit, so that every kind of surrounding occurs; tiktoken alone is the definition."""
    with mock.patch("pronk.engine.tokenizer._LONGEST_RUN", longest_run):
        assert small_tokenizer().encode(text) == pattern_only().encode_ordinary(text)


@pytest.mark.parametrize("length", [100_000, 100_001, 100_002, 200_001])
def test_runs_about_the_limit(length: int) -> None:
    text = "word" + " " * length + "word\n" + "\t\u2003" * (length // 2)
    assert small_tokenizer().encode(text) == pattern_only().encode_ordinary(text)


@cache
def pattern_only() -> tiktoken.Encoding:
    ranks = {token: rank for rank, token in enumerate(small_ranks())}
    return tiktoken.Encoding("pattern", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})


@pytest.mark.parametrize("text", ["a" * 1_500_000, "\n" * 1_500_000, "=" * 1_500_000, " \n" * 700_000 + "x"])
def test_other_long_pieces_come_through(text: str) -> None:
    tokenizer = small_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


# Decoding and the table


def test_decoding_is_exact() -> None:
    tokenizer = small_tokenizer()
    assert tokenizer.decode(tokenizer.encode(" , don't .  x ")) == " , don't .  x "
    first, rest = "é".encode()[:1], "é".encode()[1:]
    place = small_ranks().index
    assert tokenizer.decode_bytes([place(first)]) == first
    assert tokenizer.decode([place(first), tokenizer.bos_id, place(rest)]) == "é"
    assert tokenizer.decode([place(first), ord("\0")]).startswith("\ufffd")
    assert tokenizer.decode([tokenizer.bos_id], skip_special_tokens=False) == "<|begin_of_text|>"


def test_a_lone_surrogate_counts_as_the_replacement_character() -> None:
    assert small_tokenizer().encode("a\ud800b") == small_tokenizer().encode("a\ufffdb")


def test_the_table_of_special_tokens() -> None:
    special = llama_special_tokens(128_000)
    assert len(special) == 256
    assert {name: special[name] for name in ("<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")} == {
        "<|begin_of_text|>": 128_000,
        "<|end_of_text|>": 128_001,
        "<|eom_id|>": 128_008,
        "<|eot_id|>": 128_009,
    }
    assert special["<|finetune_right_pad_id|>"] == 128_004
    assert (special["<|start_header_id|>"], special["<|end_header_id|>"]) == (128_006, 128_007)
    assert special["<|python_tag|>"] == 128_010
    reserved = {0: 2, 1: 3, 2: 5, 3: 11, 4: 12, 247: 255}
    assert {number: special[f"<|reserved_special_token_{number}|>"] - 128_000 for number in reserved} == reserved


def test_the_table_of_tokens() -> None:
    vocabulary = Vocabulary((b"a", b"\xff"), {"<|x|>": 2, "<|é|>": 5})
    assert vocabulary.size == 6
    assert [vocabulary.token_bytes(token_id) for token_id in range(7)] == [
        b"a",
        b"\xff",
        b"<|x|>",
        b"",
        b"",
        "<|é|>".encode(),
        b"",
    ]
    assert [vocabulary.is_special(token_id) for token_id in range(7)] == [False, False, True, False, False, True, False]
    assert Vocabulary((b"a",), {}).size == 1
    with pytest.raises(InvalidParameterError, match="-1"):
        vocabulary.token_bytes(-1)
    with pytest.raises(CheckpointFormatError, match="taken"):
        Vocabulary((b"a", b"b"), {"<|x|>": 1})
    with pytest.raises(CheckpointFormatError, match="same id"):
        Vocabulary((b"a", b"b"), {"<|x|>": 2, "<|y|>": 2})


def test_an_unknown_special_token_is_named() -> None:
    with pytest.raises(CheckpointFormatError, match=r"<\|image\|>"):
        small_tokenizer().special("<|image|>")


def test_a_vocabulary_without_a_byte_cannot_encode() -> None:
    with pytest.raises(CheckpointFormatError, match="0x41"):
        Tokenizer(Vocabulary(tuple(bytes([byte]) for byte in range(256) if byte != 0x41), {}))


# Files


def test_a_rank_file_alone_gets_the_built_in_special_tokens(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(rank_file(small_ranks()))
    vocabulary = load_vocabulary(tmp_path)
    assert vocabulary.ranks == small_ranks()
    assert vocabulary.special_tokens == llama_special_tokens(NUM_RANKS)
    assert Tokenizer.from_folder(tmp_path).vocab_size == NUM_RANKS + 256


def test_a_tokenizer_json_alone(tmp_path: Path) -> None:
    assert load_vocabulary(write_json(tmp_path, small_document())) == small_tokenizer().vocabulary


def test_merges_spelled_as_in_older_files(tmp_path: Path) -> None:
    document = small_document()
    document["model"]["merges"] = [" ".join(pair) for pair in document["model"]["merges"]]
    del document["model"]["ignore_merges"]
    assert load_vocabulary(write_json(tmp_path, document)) == small_tokenizer().vocabulary


def test_special_names_come_from_the_config_then_from_the_json_then_from_the_table(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(rank_file(small_ranks()))
    document = small_document()
    document["added_tokens"][2]["content"] = "<|from_json|>"
    write_json(tmp_path, document)
    assert load_vocabulary(tmp_path).special_tokens["<|from_json|>"] == NUM_RANKS + 2
    config = {"added_tokens_decoder": {str(NUM_RANKS + 2): {"content": "<|from_config|>", "special": True}}}
    write_json(tmp_path, config, "tokenizer_config.json")
    assert load_vocabulary(tmp_path).special_tokens == {"<|from_config|>": NUM_RANKS + 2}
    write_json(tmp_path, {"model_max_length": 1}, "tokenizer_config.json")
    assert load_vocabulary(tmp_path).special_tokens["<|from_json|>"] == NUM_RANKS + 2


def test_no_tokenizer_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"tokenizer\.model"):
        load_vocabulary(tmp_path)


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        (["QQ== 0", "Qg= 1"], "line 2"),
        (["QQ== 0", "Qg==1"], "line 2"),
        (["QQ== 0", "Qg== one"], "line 2"),
        (["QQ== 0", "", "Qg== 2"], "line 3: expected a token of rank 1"),
        (["QQ== 1"], "line 1: expected a token of rank 0"),
        (["QQ== 0", "QQ== 1"], "ranks 0 and 1 are the same token b'A'"),
        (["QQ== 0"], "0x00"),
        ([], "0x00"),
        (["\x06<unk>\x15"], "line 1"),
    ],
)
def test_a_damaged_rank_file_is_named(tmp_path: Path, lines: list[str], complaint: str) -> None:
    (tmp_path / "tokenizer.model").write_text("\n".join(lines))
    with pytest.raises(CheckpointFormatError, match=r"tokenizer\.model") as caught:
        load_vocabulary(tmp_path)
    assert complaint in str(caught.value)


def damage(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    document = small_document()
    change(document)
    return document


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another kind of model": (lambda d: d["model"].update(type="Unigram"), "Unigram"),
    "byte fallback": (lambda d: d["model"].update(byte_fallback=True), "byte_fallback"),
    "merges that decide": (lambda d: d["model"].update(ignore_merges=False), "ignore_merges"),
    "a normalizer": (lambda d: d.update(normalizer={"type": "NFC"}), "NFC"),
    "no pre-tokenizer": (lambda d: d.update(pre_tokenizer=None), "pre_tokenizer"),
    "only bytes": (lambda d: d["pre_tokenizer"]["pretokenizers"].pop(0), "pre_tokenizer"),
    "another pattern": (lambda d: d["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\w+"), "w+"),
    "a prefix space": (lambda d: d["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True), "pre_tokenizer"),
    "no model": (lambda d: d.pop("model"), "model"),
    "no vocabulary": (lambda d: d["model"].update(vocab={}), "vocab"),
    "a gap": (
        lambda d: d["model"]["vocab"].update({spelling(small_ranks()[-1]): NUM_RANKS + 4}),
        f"expected a token of id {NUM_RANKS - 1}",
    ),
    "the same id twice": (lambda d: d["model"]["vocab"].update({spelling(small_ranks()[-1]): 4}), "of id 4"),
    "a character that is no byte": (
        lambda d: d["model"].update(vocab={**d["model"]["vocab"], "▁the": NUM_RANKS}, merges=[]),
        "▁the",
    ),
    "no single bytes": (lambda d: d["model"].update(vocab={"a": 0}, merges=[]), "0x00"),
    "ids that are no priorities": (lambda d: d["model"]["merges"].reverse(), "merge 1"),
    "a merge of nothing": (lambda d: d["model"]["merges"].insert(0, ["a", "\u0100\u0100"]), "merge 0"),
    "a special token without an id": (lambda d: d["added_tokens"][0].pop("id"), "begin_of_text"),
    "a special token twice": (lambda d: d["added_tokens"].append(d["added_tokens"][0]), "begin_of_text"),
    "an added token that is no special one": (
        lambda d: d["added_tokens"][3].update(special=False),
        "not marked special",
    ),
    "a special token among the ranks": (lambda d: d["added_tokens"][3].update(id=7), "id 7"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_tokenizer_json_is_named(tmp_path: Path, name: str) -> None:
    change, complaint = DAMAGES[name]
    with pytest.raises(CheckpointFormatError) as caught:
        load_vocabulary(write_json(tmp_path, damage(change)))
    assert str(tmp_path) in str(caught.value)
    assert complaint in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_a_file_that_is_no_json_object_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointFormatError, match=r"tokenizer\.json"):
        load_vocabulary(tmp_path)
