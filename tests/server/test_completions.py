"""POST /v1/completions over a fake engine: prompts of every form, echo, scores, the best of several, and streams."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pronk.engine.errors import PronkError
from pronk.engine.model.config import GenerationDefaults
from pronk.engine.request import Output, Request, SamplingParams, TokenLogprobs
from pronk.server.completing import LogprobsWriter, Wanted
from pronk.server.errors import answer_of
from pronk.server.protocol.common import parse
from pronk.server.protocol.completions import CompletionRequest

from .conftest import Connect
from .fakes import BYTES, BYTES_TOKENIZER, END_OF_TURN, Client, FakeEngine, Reply, fake_logprobs, outputs

BEGIN = BYTES_TOKENIZER.bos_id


def backwards(request: Request) -> list[Output]:
    """The prompt's text backwards, then choice's seed; the prompt's scores before it."""
    text = bytes(token for token in request.prompt[::-1] if token < 256)
    seed = b"" if request.params.seed is None else str(request.params.seed).encode()
    limit = request.params.max_tokens if request.params.max_tokens is not None else 16
    ids = [*text, *seed, END_OF_TURN]
    finish = "stop" if len(ids) <= limit else "length"
    answer = outputs(ids[:limit], finish=finish, logprobs=request.params.logprobs)
    wanted = request.params.prompt_logprobs
    if wanted is None:
        return answer or [Output(request_id="", finish_reason="length")]
    scored = [fake_logprobs(token, wanted) for token in request.prompt[1:]]
    last = answer or [Output(request_id="", finish_reason="length")]
    return [Output(request_id="", prompt_logprobs=scored[:1]), Output(request_id="", prompt_logprobs=scored[1:]), *last]


@pytest.fixture
def client(connect: Connect) -> Client:
    return connect(FakeEngine(backwards))


async def complete(client: Client, **fields: Any) -> Reply:
    body = {"model": "tiny", "prompt": "abc", **fields}
    return await client.call("POST", "/v1/completions", json.dumps(body).encode())


def folded(reply: Reply) -> list[dict[str, Any]]:
    """What a client makes of a stream."""
    *chunks, done = reply.events
    assert done == "[DONE]"
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        assert chunk["object"] == "text_completion"
        for told in chunk["choices"]:
            choice = choices.setdefault(
                told["index"], {"index": told["index"], "text": "", "logprobs": None, "finish_reason": None}
            )
            assert choice["finish_reason"] is None
            choice["text"] += told["text"]
            choice["finish_reason"] = told["finish_reason"]
            for name, entries in (told["logprobs"] or {}).items():
                choice["logprobs"] = choice["logprobs"] or {}
                choice["logprobs"][name] = choice["logprobs"].get(name, []) + entries
            for name in ("token_ids", "prompt_token_ids"):
                if name in told:
                    choice[name] = choice.get(name, []) + told[name]
    return [choices[index] for index in sorted(choices)]


async def test_a_text(client: Client) -> None:
    reply = await complete(client)
    body = reply.json
    assert body.pop("id").startswith("cmpl-")
    assert body.pop("created") > 1_700_000_000
    assert body == {
        "object": "text_completion",
        "model": "tiny",
        "choices": [{"index": 0, "text": "cba", "logprobs": None, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": 4,
            "completion_tokens": 4,
            "total_tokens": 8,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }
    params = client.engine.requests[0].params
    assert (params.max_tokens, params.logprobs, params.prompt_logprobs) == (16, None, None)


PROMPTS: list[tuple[Any, list[list[int]]]] = [
    ("ab", [[BEGIN, 97, 98]]),
    ("", [[BEGIN]]),
    (None, [[BEGIN]]),
    ("<|eot_id|>", [[BEGIN, *b"<|eot_id|>"]]),
    (["a", "b"], [[BEGIN, 97], [BEGIN, 98]]),
    ([97, 98], [[97, 98]]),
    ([[97], [98, END_OF_TURN]], [[97], [98, END_OF_TURN]]),
]


@pytest.mark.parametrize(("prompt", "ids"), PROMPTS, ids=[str(prompt) for prompt, _ in PROMPTS])
async def test_prompts_of_every_form(client: Client, prompt: Any, ids: list[list[int]]) -> None:
    assert (await complete(client, prompt=prompt)).status == 200
    assert [request.prompt for request in client.engine.requests] == ids


async def test_texts_without_special_tokens(client: Client) -> None:
    await complete(client, prompt="ab", add_special_tokens=False)
    assert client.engine.requests[0].prompt == [97, 98]


async def test_the_index_counts_prompts_then_choices(client: Client) -> None:
    fields = {"prompt": ["ab", "cd"], "n": 2, "seed": 5}
    whole = (await complete(client, **fields)).json
    assert [(choice["index"], choice["text"]) for choice in whole["choices"]] == [
        (0, "ba5"), (1, "ba6"), (2, "dc5"), (3, "dc6"),
    ]  # fmt: skip
    assert whole["usage"]["prompt_tokens"] == 6
    assert whole["usage"]["completion_tokens"] == 16
    assert folded(await complete(client, **fields, stream=True)) == whole["choices"]


async def test_echo(client: Client) -> None:
    for prompt, text in (("née", "née"), ([*"né".encode(), END_OF_TURN], "né"), (None, "")):
        for stream in (False, True):
            reply = await complete(client, prompt=prompt, echo=True, max_tokens=0, stream=stream)
            (choice,) = folded(reply) if stream else reply.json["choices"]
            assert (choice["text"], choice["finish_reason"]) == (text, "length")
    (choice,) = (await complete(client, echo=True)).json["choices"]
    assert choice["text"] == "abccba"
    (choice,) = (await complete(client, prompt=[97, END_OF_TURN], echo=True, skip_special_tokens=False)).json["choices"]
    assert choice["text"] == "a<|eot_id|>a"


async def test_pure_scoring_makes_no_token(client: Client) -> None:
    whole = (await complete(client, prompt=[97, 98, 99], echo=True, max_tokens=0, logprobs=1)).json
    assert whole["usage"]["completion_tokens"] == 0
    (choice,) = whole["choices"]
    assert choice["text"] == "abc"
    assert choice["logprobs"] == {
        "tokens": ["a", "b", "c"],
        "token_logprobs": [None, -0.098, -0.099],
        "top_logprobs": [None, {"b": -0.098}, {"c": -0.099}],
        "text_offset": [0, 1, 2],
    }


def scored(top: int, *, chosen_first: bool) -> FakeEngine:
    """Logprobs as an engine has them: the chosen token is the likeliest, or it is not among the likeliest."""

    def entry(token: int) -> TokenLogprobs:
        if chosen_first:
            tops = [(token, -0.1), *(((token + n) % 256, -1.0 - n) for n in range(1, top))][:top]
            return TokenLogprobs(-0.1, [one for one, _ in tops], [value for _, value in tops])
        tops = [((token + 1 + n) % 256, -0.5 - n) for n in range(top)]
        return TokenLogprobs(-9.0, [one for one, _ in tops], [value for _, value in tops])

    def script(request: Request) -> list[Output]:
        before = [entry(token) for token in request.prompt[1:]]
        return [
            Output(request_id="", prompt_logprobs=before),
            Output(request_id="", token_ids=[100], logprobs=[entry(100)], finish_reason="length"),
        ]

    return FakeEngine(script)


@pytest.mark.parametrize("greedy", [True, False])
async def test_what_lm_eval_makes_of_it(connect: Connect, greedy: bool) -> None:
    """It asks for one token, drops it, and takes an answer for greedy when each token's value is its dict's maximum."""
    client = connect(scored(1, chosen_first=greedy))
    prompt = [[97, 98, 99], [98, 99, 100, 101]]
    reply = await complete(client, prompt=prompt, echo=True, max_tokens=1, logprobs=1, seed=1234)
    for choice, ids in zip(sorted(reply.json["choices"], key=lambda choice: choice["index"]), prompt, strict=True):
        logprobs = choice["logprobs"]
        assert len(logprobs["token_logprobs"]) == len(logprobs["top_logprobs"]) == len(ids) + 1
        values = logprobs["token_logprobs"][1:-1]
        tops = logprobs["top_logprobs"][1:-1]
        assert sum(values) == pytest.approx(len(ids[1:]) * (-0.1 if greedy else -9.0))
        assert all((value == max(top.values())) is greedy for value, top in zip(values, tops, strict=True))
        assert all(len(top) == (1 if greedy else 2) for top in tops)


async def test_logprobs_without_echo(client: Client) -> None:
    for fields in ({"logprobs": 0}, {"logprobs": 2}, {"logprobs": 2, "echo": True, "n": 2}):
        whole = (await complete(client, prompt="é", **fields)).json["choices"]
        assert folded(await complete(client, prompt="é", **fields, stream=True)) == whole
    logprobs = (await complete(client, prompt="é", logprobs=1)).json["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["bytes:\\xa9", "bytes:\\xc3", "<|eot_id|>"]
    assert logprobs["text_offset"] == [0, 1, 1]
    assert [list(top) for top in logprobs["top_logprobs"]] == [[name] for name in logprobs["tokens"]]


async def test_scores_come_before_an_answer_whose_text_is_not_certain_yet(client: Client) -> None:
    """The first choice's first token is half a character; the others have the prompt's scores all the same."""
    fields: dict[str, Any] = {"prompt": [97, 0xA9, 0xC3], "echo": True, "logprobs": 1, "n": 3}
    whole = (await complete(client, **fields)).json["choices"]
    assert [choice["text"] for choice in whole] == ["a\ufffd\ufffdéa"] * 3
    assert folded(await complete(client, **fields, stream=True)) == whole


async def test_a_prompt_of_one_token_has_nothing_to_score(client: Client) -> None:
    for stream in (False, True):
        reply = await complete(client, prompt=[97], echo=True, logprobs=1, max_tokens=0, stream=stream)
        (choice,) = folded(reply) if stream else reply.json["choices"]
        assert choice["logprobs"] == {
            "tokens": ["a"], "token_logprobs": [None], "top_logprobs": [None], "text_offset": [0],
        }  # fmt: skip


async def test_what_cannot_be_is_a_number_too(connect: Connect) -> None:
    entry = TokenLogprobs(float("-inf"), [97], [float("-inf")])
    script = [
        Output(request_id="", prompt_logprobs=[entry]),
        Output(request_id="", token_ids=[97], logprobs=[entry], finish_reason="stop"),
    ]
    client = connect(FakeEngine(lambda request: script))
    fields: dict[str, Any] = {"prompt": [97, 97], "echo": True, "logprobs": 1, "prompt_logprobs": 1}
    (choice,) = (await complete(client, **fields)).json["choices"]
    assert choice["logprobs"]["token_logprobs"] == [None, -9999, -9999]
    assert choice["logprobs"]["top_logprobs"] == [None, {"a": -9999}, {"a": -9999}]
    assert choice["prompt_logprobs"][1]["97"]["logprob"] == -9999


@given(st.text(max_size=12), st.booleans())
def test_offsets_are_where_tokens_begin(text: str, skip: bool) -> None:
    tokens = [BEGIN, *text.encode()]
    wanted = Wanted(logprobs=0, skip_special_tokens=skip)
    told = LogprobsWriter(BYTES, wanted).write([(token, None) for token in tokens])
    shown = ("" if skip else "<|begin_of_text|>") + text
    byte_offset = 0
    for token, offset in zip(tokens, told["text_offset"], strict=True):
        assert offset == len(shown.encode()[:byte_offset].decode(errors="ignore"))
        byte_offset += len(BYTES.token_bytes(token)) * (not (skip and token == BEGIN))


async def test_prompt_logprobs_in_the_other_form(client: Client) -> None:
    whole = (await complete(client, prompt=["ab", "c"], prompt_logprobs=1, n=2)).json["choices"]
    assert [len(choice["prompt_logprobs"]) for choice in whole] == [3, 3, 2, 2]
    assert whole[0]["prompt_logprobs"][1] == {"97": {"logprob": 0, "rank": 1, "decoded_token": "a"}}
    assert all(choice["logprobs"] is None for choice in whole)


async def test_the_best_of_several(connect: Connect) -> None:
    def script(request: Request) -> list[Output]:
        seed = request.params.seed or 0
        mean = {0: -3.0, 1: -1.0, 2: -2.0, 3: -1.5}[seed]
        ids = [*str(seed).encode()] * (seed + 1)
        logprobs = [TokenLogprobs(mean, [], []) for _ in ids]
        return [Output(request_id="", token_ids=ids, logprobs=logprobs, finish_reason="length")]

    client = connect(FakeEngine(script))
    body = (await complete(client, prompt=["a", "b"], n=2, best_of=4, seed=0)).json
    told = [(choice["index"], choice["text"], choice["logprobs"]) for choice in body["choices"]]
    assert told == [(0, "11", None), (1, "3333", None), (2, "11", None), (3, "3333", None)]
    assert body["usage"]["completion_tokens"] == 2 * (1 + 2 + 3 + 4)
    assert {request.params.logprobs for request in client.engine.requests} == {0}


async def test_best_of_n_is_n(client: Client) -> None:
    reply = await complete(client, n=2, best_of=2, seed=1, stream=True)
    assert [choice["text"] for choice in folded(reply)] == ["cba1", "cba2"]
    assert client.engine.requests[0].params.logprobs is None


async def test_a_stream_ends_with_usage(client: Client) -> None:
    reply = await complete(client, stream=True, stream_options={"include_usage": True}, timings=True)
    *chunks, usage, done = reply.events
    assert done == "[DONE]"
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["c", "b", "a", ""]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert (usage["choices"], usage["usage"]["total_tokens"]) == ([], 8)
    reply = await complete(client, stream=True, stream_options={"continuous_usage_stats": True})
    counts = [chunk["usage"]["completion_tokens"] for chunk in reply.events[:-1]]
    assert counts == [1, 2, 3, 4]


async def test_token_ids(client: Client) -> None:
    for echo in (False, True):
        whole = (await complete(client, return_token_ids=True, n=2, echo=echo)).json["choices"]
        assert folded(await complete(client, return_token_ids=True, n=2, echo=echo, stream=True)) == whole
        assert whole[0]["prompt_token_ids"] == [BEGIN, 97, 98, 99]
        assert whole[0]["token_ids"] == [*b"cba", END_OF_TURN]


async def test_formats_and_truncation(client: Client) -> None:
    await complete(client, structured_outputs={"regex": "[ab]*"}, truncate_prompt_tokens=2)
    request = client.engine.requests[0]
    assert request.prompt == [98, 99]
    assert request.params.grammar is not None
    assert request.params.grammar.text == "[ab]*"


FAULTS: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": []}, "prompt", "invalid_value"),
    ({"prompt": [[]]}, "prompt[0]", "invalid_value"),
    ({"prompt": [1, "a"]}, "prompt[1]", "invalid_type"),
    ({"prompt": ["a", 1]}, "prompt[1]", "invalid_type"),
    ({"prompt": [[1], "a"]}, "prompt[1]", "invalid_type"),
    ({"prompt": [[1, 2.5]]}, "prompt[0][1]", "invalid_type"),
    ({"prompt": {"a": 1}}, "prompt", "invalid_type"),
    ({"prompt": [512]}, "prompt", "invalid_value"),
    ({"prompt": [-1]}, "prompt", "invalid_value"),
    ({"prompt": "", "add_special_tokens": False}, "prompt", "invalid_value"),
    ({"prompt": ["a"] * 2049}, "prompt", "invalid_value"),
    ({"prompt": ["a"] * 100, "n": 21}, "prompt", "invalid_value"),
    ({"prompt": "x" * 4096}, "prompt", "context_length_exceeded"),
    ({"max_tokens": 4093}, "max_tokens", "context_length_exceeded"),
    ({"max_tokens": -1}, "max_tokens", "invalid_value"),
    ({"logprobs": 21}, "logprobs", "invalid_value"),
    ({"logprobs": True}, "logprobs", "invalid_type"),
    ({"suffix": "end"}, "suffix", "unsupported_parameter"),
    ({"best_of": 1, "n": 2}, "best_of", "invalid_value"),
    ({"best_of": 2, "stream": True}, "best_of", "invalid_value"),
    ({"messages": []}, "messages", "unknown_parameter"),
    ({"tools": []}, "tools", "unknown_parameter"),
    ({"structured_outputs": {"regex": "impossible"}}, "structured_outputs", "invalid_value"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "invalid_value"),
]


@pytest.mark.parametrize(("fields", "param", "code"), FAULTS, ids=[json.dumps(fault[0])[:50] for fault in FAULTS])
async def test_a_fault_is_a_400_that_names_its_field(
    client: Client, fields: dict[str, Any], param: str, code: str
) -> None:
    reply = await complete(client, **fields)
    assert (reply.status, reply.error["param"], reply.error["code"]) == (400, param, code)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = sorted({field.alias or name for name, field in CompletionRequest.model_fields.items()})


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=5))
def test_any_json_is_accepted_or_refused_by_name(fields: dict[str, Any]) -> None:
    body = json.dumps({**fields, "model": "tiny"}).encode("utf-8", "surrogatepass")
    fault = fault_in(body)
    if fault is not None:
        assert answer_of(fault).status == 400
        assert fault.param or answer_of(fault).code == "invalid_json"  # type: ignore[attr-defined]


def fault_in(body: bytes) -> PronkError | None:
    try:
        asked = parse(CompletionRequest, body)
        asked.sampling_params(GenerationDefaults(), BYTES_TOKENIZER, grammar=asked.text_grammar())
        asked.prompts(BYTES_TOKENIZER)
    except PronkError as error:
        return error
    return None


async def test_a_wrong_model_is_a_404(client: Client) -> None:
    assert (await complete(client, model="gpt-4o")).status == 404


async def test_the_fields_are_described(client: Client) -> None:
    document = (await client.call("GET", "/openapi.json")).json
    schema = document["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(schema["properties"]) == set(CompletionRequest.model_fields)
    assert all("description" in field for field in schema["properties"].values())


async def test_defaults_are_the_checkpoints(connect: Connect) -> None:
    client = connect(FakeEngine(backwards), defaults={"do_sample": True, "temperature": 0.5, "top_p": 0.75})
    await complete(client)
    await complete(client, temperature=0, top_p=1)
    first, second = (request.params for request in client.engine.requests)
    assert (first.temperature, first.top_p) == (0.5, 0.75)
    assert second == SamplingParams(temperature=0, max_tokens=16)
