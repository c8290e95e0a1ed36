"""The detokenizer against two definitions that know the whole text: one-shot decoding, and a search by brute force."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pronk.engine.detokenizer import Detokenizer
from pronk.engine.errors import InvalidParameterError
from pronk.engine.tokenizer import Tokenizer, Vocabulary, llama_special_tokens

# Tokens beyond the single bytes: whole words, a token across two characters, parts of characters.
WORDS = ["ab", "abc", "bc", "STOP", "é", "中文", "\ufffd"]
PARTS = [b"\xe4\xb8", b"\xad\xe6", b"\x96\x87", b"\xf0\x9f", b"\x98\x80a", b"\xff\xfe", b"a\xc3"]
RANKS = (*(bytes([byte]) for byte in range(256)), *(word.encode() for word in WORDS), *PARTS)
VOCABULARY = Vocabulary(RANKS, llama_special_tokens(len(RANKS)))
TOKENIZER = Tokenizer(VOCABULARY)
END_OF_TURN = TOKENIZER.special("<|eot_id|>")
HOLE = VOCABULARY.size + 7

# Few letters, so that stop strings do occur, and overlap.
LETTERS = st.sampled_from([ord(letter) for letter in "abc"])
ANY_TOKEN = st.one_of(LETTERS, st.integers(0, len(RANKS) - 1), st.sampled_from([END_OF_TURN, HOLE]))
TOKENS = st.lists(ANY_TOKEN, max_size=24)
LETTER_TOKENS = st.lists(st.one_of(LETTERS, st.integers(256, len(RANKS) - 1)), max_size=24)
STOPS = st.lists(st.text(alphabet="abcé中文\ufffd", min_size=1, max_size=5), min_size=1, max_size=4)
# A busy machine is no fault of the code.
UNHURRIED = settings(deadline=None)

CUTS = st.lists(st.integers(0, 24), max_size=6)


def feeds(token_ids: Sequence[int], cuts: Sequence[int]) -> list[Sequence[int]]:
    edges = [0, *sorted(min(cut, len(token_ids)) for cut in cuts), len(token_ids)]
    return [token_ids[start:end] for start, end in itertools.pairwise(edges)]


def shown(detokenizer: Detokenizer, token_ids: Sequence[int], cuts: Sequence[int] = ()) -> str:
    return "".join(detokenizer.feed(part) for part in feeds(token_ids, cuts)) + detokenizer.finish()


def first_stop(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """By the definition: the least end; among equal ends the least start. Returns (start, stop)."""
    ends = [
        (start + len(stop), start, stop) for stop in stops for start in range(len(text)) if text.startswith(stop, start)
    ]
    if not ends:
        return None
    _, start, stop = min(ends)
    return start, stop


@UNHURRIED
@given(TOKENS, CUTS, st.booleans())
def test_any_cut_gives_the_text_of_decoding_at_once(token_ids: list[int], cuts: list[int], skip: bool) -> None:
    detokenizer = Detokenizer(VOCABULARY, skip_special_tokens=skip)
    assert shown(detokenizer, token_ids, cuts) == TOKENIZER.decode(token_ids, skip_special_tokens=skip)
    assert detokenizer.stopped is None


@UNHURRIED
@given(LETTER_TOKENS, STOPS, CUTS, st.booleans())
def test_any_cut_ends_the_text_at_the_stop_string_that_is_complete_first(
    token_ids: list[int], stops: list[str], cuts: list[int], include: bool
) -> None:
    text = TOKENIZER.decode(token_ids)
    found = first_stop(text, stops)
    detokenizer = Detokenizer(VOCABULARY, stop=stops, include_stop_str_in_output=include)
    result = shown(detokenizer, token_ids, cuts)
    if found is None:
        assert (result, detokenizer.stopped) == (text, None)
    else:
        start, stop = found
        assert (result, detokenizer.stopped) == (text[: start + len(stop) if include else start], stop)


@UNHURRIED
@given(LETTER_TOKENS, STOPS)
def test_text_is_held_back_only_while_it_may_become_a_stop_string(token_ids: list[int], stops: list[str]) -> None:
    detokenizer = Detokenizer(VOCABULARY, stop=stops)
    visible = ""
    for place, token_id in enumerate(token_ids, start=1):
        visible += detokenizer.feed([token_id])
        if detokenizer.stopped is not None:
            break
        # What the bytes so far say for certain: an unfinished character at the end says nothing yet.
        certain = Detokenizer(VOCABULARY).feed(token_ids[:place])
        held = certain.removeprefix(visible)
        assert certain == visible + held
        tails = [certain[-length:] for length in range(1, len(certain) + 1)]
        longest = max((tail for tail in tails if any(stop.startswith(tail) for stop in stops)), key=len, default="")
        assert held == longest


@UNHURRIED
@given(TOKENS, STOPS)
def test_the_token_that_stops_is_the_same_for_every_cut(token_ids: list[int], stops: list[str]) -> None:
    one_by_one = Detokenizer(VOCABULARY, stop=stops)
    needed = 0
    while needed < len(token_ids) and one_by_one.stopped is None:
        one_by_one.feed([token_ids[needed]])
        needed += 1
    if one_by_one.stopped is None:
        return
    short, exact = Detokenizer(VOCABULARY, stop=stops), Detokenizer(VOCABULARY, stop=stops)
    short.feed(token_ids[: needed - 1])
    exact.feed(token_ids[:needed])
    assert short.stopped is None
    assert exact.stopped == one_by_one.stopped


def test_an_unfinished_character_is_replaced_only_at_the_end() -> None:
    detokenizer = Detokenizer(VOCABULARY)
    assert detokenizer.feed([0xE4]) == ""
    assert detokenizer.feed([0xB8]) == ""
    assert detokenizer.feed([0xAD]) == "中"
    assert detokenizer.feed([0xE4, 0xB8]) == ""
    assert detokenizer.finish() == "\ufffd"


def test_a_character_that_can_no_longer_be_finished_is_replaced_at_once() -> None:
    detokenizer = Detokenizer(VOCABULARY)
    assert detokenizer.feed([0xE4, ord("x")]) == "\ufffdx"


def test_a_stop_string_across_tokens_and_bytes_never_shows() -> None:
    detokenizer = Detokenizer(VOCABULARY, stop=["é中"])
    tokens = [ord("a"), *"é中".encode(), ord("b")]
    assert [detokenizer.feed([token]) for token in tokens] == ["a", "", "", "", "", "", ""]
    assert detokenizer.stopped == "é中"
    assert detokenizer.feed([ord("x")]) == ""
    assert detokenizer.finish() == ""


def test_a_prefix_that_does_not_become_a_stop_string_is_released() -> None:
    detokenizer = Detokenizer(VOCABULARY, stop=["aab"])
    assert [detokenizer.feed([ord(letter)]) for letter in "aaac"] == ["", "", "a", "aac"]
    assert detokenizer.feed([ord("a")]) == ""
    assert detokenizer.finish() == "a"
    assert detokenizer.stopped is None


@pytest.mark.parametrize(
    ("stops", "text", "result", "stopped"),
    [
        (["b", "ab"], "xab", "x", "ab"),  # both end at the b: the longer one, so that no half of it shows
        (["abcd", "bc"], "xabcd", "xa", "bc"),  # the shorter one is complete first
        (["ab", "a"], "xab", "x", "a"),
        (["zz", "c"], "abcab", "ab", "c"),
    ],
)
def test_which_of_several_stop_strings_wins(stops: list[str], text: str, result: str, stopped: str) -> None:
    for order in (stops, stops[::-1]):
        detokenizer = Detokenizer(VOCABULARY, stop=order)
        assert shown(detokenizer, [*text.encode()]) == result
        assert detokenizer.stopped == stopped


def test_the_replacement_of_an_unfinished_character_may_complete_a_stop_string() -> None:
    detokenizer = Detokenizer(VOCABULARY, stop=["a\ufffd"])
    assert detokenizer.feed([ord("x"), ord("a"), 0xE4]) == "x"
    assert detokenizer.finish() == ""
    assert detokenizer.stopped == "a\ufffd"


def test_special_tokens_are_skipped_or_spelled() -> None:
    tokens = [ord("a"), END_OF_TURN, ord("b")]
    assert shown(Detokenizer(VOCABULARY), tokens) == "ab"
    assert shown(Detokenizer(VOCABULARY, skip_special_tokens=False), tokens) == "a<|eot_id|>b"
    assert shown(Detokenizer(VOCABULARY, stop=["<|eot"], skip_special_tokens=False), tokens) == "a"
    assert shown(Detokenizer(VOCABULARY, stop=["ab"]), tokens) == ""


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(InvalidParameterError) as caught:
        Detokenizer(VOCABULARY, stop=["x", ""])
    assert caught.value.param == "stop"


def test_a_finished_completion_takes_no_more_tokens() -> None:
    detokenizer = Detokenizer(VOCABULARY)
    detokenizer.feed([0xE4])
    assert (detokenizer.finish(), detokenizer.finish()) == ("\ufffd", "")
    with pytest.raises(ValueError, match="finished"):
        detokenizer.feed([ord("a")])


def test_a_long_stop_string_that_is_nearly_there_is_released() -> None:
    stop = "a" * 20_000 + "b"
    detokenizer = Detokenizer(VOCABULARY, stop=[stop])
    assert detokenizer.feed([ord("a")] * 60_000) == "a" * 40_000
    assert detokenizer.feed([ord("b")]) == ""
    assert detokenizer.stopped == stop


@pytest.mark.parametrize(
    ("min_tokens", "text", "stopped"),
    [(0, "x", "ab"), (3, "x", "ab"), (4, "xab", "ab"), (5, "xab", "ab"), (6, "xababc", None)],
)
def test_a_stop_string_does_not_count_before_min_tokens(min_tokens: int, text: str, stopped: str | None) -> None:
    """Tokens: x a b a b c; "ab" is complete with the third and with the fifth."""
    for cut in range(7):
        detokenizer = Detokenizer(VOCABULARY, stop=["ab"], min_tokens=min_tokens)
        ids = list(b"xababc")
        shown = detokenizer.feed(ids[:cut]) + detokenizer.feed(ids[cut:]) + detokenizer.finish()
        assert (shown, detokenizer.stopped) == (text, stopped)


def test_a_stop_string_that_did_not_count_is_not_held_back() -> None:
    detokenizer = Detokenizer(VOCABULARY, stop=["aa"], min_tokens=3)
    assert detokenizer.feed(b"a") == ""
    assert detokenizer.feed(b"a") == "a"  # the second may still be the first of another
    assert detokenizer.feed(b"b") == "ab"
