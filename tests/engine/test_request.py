"""What a request may ask: each parameter's range to its edges, and the name of the parameter in each refusal."""

from __future__ import annotations

import math

import msgspec
import pytest

from pronk.engine.errors import InvalidParameterError, RequestError
from pronk.engine.request import (
    MAX_ALLOWED,
    MAX_BAD_WORDS,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_STOP,
    Request,
    SamplingParams,
)

INF, NAN = math.inf, math.nan
above, below = math.nextafter(2, 3), math.nextafter(0, -1)

LEGAL: list[tuple[str, list[object]]] = [
    ("temperature", [0, 0.0, 5e-324, 1, 2, 2.0]),
    ("top_p", [0, 0.0, 0.5, 1, 1.0]),
    ("top_k", [0, 1, 2**31 - 1]),
    ("min_p", [0, 0.0, 1.0]),
    ("seed", [None, 0, -1, -(2**63), 2**63 - 1]),
    ("presence_penalty", [-2, 0, 2.0]),
    ("frequency_penalty", [-2, 0, 2.0]),
    ("repetition_penalty", [5e-324, 0.5, 1, 100]),
    ("logit_bias", [{}, {0: 100, 5: -100.0}, dict.fromkeys(range(MAX_LOGIT_BIAS), 1.0)]),
    ("stop", [(), ("\n",), tuple("abcdefghijklmnop")]),
    ("max_tokens", [None, 0, 1, 2**40]),
    ("min_tokens", [0, 1, 2**31 - 1]),
    ("logprobs", [None, 0, 1, MAX_LOGPROBS]),
    ("prompt_logprobs", [None, 0, 1, MAX_LOGPROBS]),
    ("allowed_token_ids", [(), (0,), tuple(range(1000))]),
    ("bad_words", [(), ((1,), (1, 2, 3))]),
]
ILLEGAL: list[tuple[str, list[object]]] = [
    ("temperature", [below, above, -1, INF, -INF, NAN]),
    ("top_p", [below, 1.0000001, -1, INF, NAN]),
    ("top_k", [-1, 2**31]),
    ("min_p", [below, 1.0000001, INF, NAN]),
    ("seed", [-(2**63) - 1, 2**63]),
    ("presence_penalty", [-2.0000001, above, INF, -INF, NAN]),
    ("frequency_penalty", [-2.0000001, above, INF, -INF, NAN]),
    ("repetition_penalty", [0, -1, 100.0001, INF, NAN]),
    (
        "logit_bias",
        [{-1: 0}, {3: 100.0001}, {3: -101}, {3: NAN}, {3: INF}, dict.fromkeys(range(MAX_LOGIT_BIAS + 1), 1.0)],
    ),
    ("stop", [("",), ("a", ""), tuple("abcdefghijklmnopq")]),
    ("max_tokens", [-1, -(2**40)]),
    ("min_tokens", [-1, 2**31]),
    ("logprobs", [-1, MAX_LOGPROBS + 1]),
    ("prompt_logprobs", [-1, MAX_LOGPROBS + 1]),
    ("allowed_token_ids", [tuple(range(MAX_ALLOWED + 1))]),
    ("bad_words", [((),), ((1,),) * (MAX_BAD_WORDS + 1), ((1,) * (MAX_BAD_WORDS + 1),)]),
]


def pairs(table: list[tuple[str, list[object]]]) -> list[object]:
    return [
        pytest.param(name, value, id=f"{name}-{number}")
        for name, values in table
        for number, value in enumerate(values)
    ]


@pytest.mark.parametrize(("name", "value"), pairs(LEGAL))
def test_legal(name: str, value: object) -> None:
    assert getattr(SamplingParams(**{name: value}), name) == value  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "value"), pairs(ILLEGAL))
def test_illegal(name: str, value: object) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    assert caught.value.param == name
    assert name in str(caught.value)
    assert isinstance(caught.value, RequestError)


def test_the_tables_name_every_parameter_that_is_checked() -> None:
    unchecked = {"grammar", "stop_token_ids", "ignore_eos", "include_stop_str_in_output", "skip_special_tokens"}
    names = set(SamplingParams.__struct_fields__) - unchecked
    assert {name for name, _ in LEGAL} == {name for name, _ in ILLEGAL} == names


def test_limits_are_what_clients_are_told() -> None:
    assert (MAX_LOGPROBS, MAX_LOGIT_BIAS) == (20, 1024)
    assert MAX_STOP == 16


def test_min_tokens_fits_into_max_tokens() -> None:
    assert SamplingParams(min_tokens=7, max_tokens=7).min_tokens == 7
    with pytest.raises(InvalidParameterError, match="min_tokens must not be more than max_tokens") as caught:
        SamplingParams(min_tokens=8, max_tokens=7)
    assert caught.value.param == "min_tokens"


def test_the_sentence_says_the_range_and_the_value() -> None:
    with pytest.raises(InvalidParameterError, match=r"temperature must be between 0 and 2, but is 2\.5"):
        SamplingParams(temperature=2.5)


def test_defaults_change_nothing() -> None:
    """The model's own distribution, all of it, as long as the context lasts."""
    assert msgspec.structs.asdict(SamplingParams()) == {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "seed": None,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "logit_bias": {},
        "stop": (),
        "stop_token_ids": (),
        "ignore_eos": False,
        "include_stop_str_in_output": False,
        "skip_special_tokens": True,
        "max_tokens": None,
        "min_tokens": 0,
        "logprobs": None,
        "prompt_logprobs": None,
        "allowed_token_ids": (),
        "bad_words": (),
        "grammar": None,
    }


def test_params_do_not_change() -> None:
    params = SamplingParams()
    with pytest.raises(AttributeError):
        params.temperature = 0.5  # type: ignore[misc]
    request = Request(request_id="a", prompt=[1], params=params)
    with pytest.raises(AttributeError):
        request.cache_salt = "other"  # type: ignore[misc]


def test_two_params_share_no_dict() -> None:
    assert SamplingParams().logit_bias is not SamplingParams().logit_bias


def test_an_illegal_value_is_refused_off_the_wire_too() -> None:
    body = msgspec.msgpack.encode({"request_id": "a", "prompt": [1], "params": {"temperature": 3.0}})
    with pytest.raises(InvalidParameterError):
        msgspec.msgpack.decode(body, type=Request)
