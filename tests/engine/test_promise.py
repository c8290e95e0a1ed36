"""Promise 1: the schedule never changes the answer. Tokens and logprobs of each request equal, bit for bit, those of
the same request alone, whoever shares the batch, however prompts are cut, whatever the cache hits, and however often
blocks run out. At each number of ranks that share the model; between them nothing is promised."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pronk.engine.cache.memory import CachePlan
from pronk.engine.config import EngineConfig, replace
from pronk.engine.core import EngineCore
from pronk.engine.request import Output, Request, SamplingParams, TokenLogprobs
from pronk.engine.runner import ModelRunner
from pronk.engine.tokenizer import Vocabulary, load_vocabulary

from .ranks import Crew

MAX_LEN = 600
BLOCK_SIZE = 16

# Prompts begin alike, so that the prefix cache has something to hit; a third crosses the attention's key splits.
STEMS = [
    [(7 * place + stem) % 251 for place in range(length)] for stem, length in ((0, 40), (0, 90), (1, 33), (2, 300))
]

params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.0, 0.7, 1.0, 2.0]),
    top_p=st.sampled_from([1.0, 0.9, 0.3]),
    top_k=st.sampled_from([0, 1, 40]),
    min_p=st.sampled_from([0.0, 0.05]),
    seed=st.integers(0, 3),
    presence_penalty=st.sampled_from([0.0, 1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.2]),
    logit_bias=st.sampled_from([{}, {65: 4.0, 66: -100.0}]),
    stop=st.sampled_from([(), ("A",), ("AB", "C")]),
    max_tokens=st.integers(0, 40),
    min_tokens=st.just(0),
    logprobs=st.sampled_from([0, 3]),
    prompt_logprobs=st.sampled_from([None, None, 0, 2]),
)
prompts = st.builds(
    lambda stem, cut, own: stem[:cut] + own,
    st.sampled_from(STEMS),
    st.integers(1, 300),
    st.lists(st.integers(0, 255), max_size=6),
)


@dataclasses.dataclass(frozen=True)
class Arrival:
    """A request, the step before which it comes, and the step before which it is aborted, if any."""

    prompt: list[int]
    params: SamplingParams
    step: int
    aborted: int | None


arrivals = st.builds(
    Arrival, prompts, params, st.integers(0, 12), st.one_of(st.none(), st.none(), st.none(), st.integers(3, 14))
)

Answer = tuple[list[int], list[TokenLogprobs], str | None, list[TokenLogprobs]]


class Engine:
    """One loaded model, run under any schedule. What earlier runs left in the cache's tensors stays there. Answers to
    compare with are made by one thread of each rank, operation by operation, whatever the others are made by."""

    def __init__(self, folder: Path, dtype: str, quantization: str, cpu_threads: int, ranks: int) -> None:
        config = EngineConfig(
            model=str(folder), dtype=dtype, quantization=quantization, cpu_threads=cpu_threads, max_model_len=MAX_LEN
        )
        self.config = replace(config, memory="8MiB")
        plain = replace(self.config, cpu_threads=1, enforce_eager=True)
        self.crews = [Crew(config, folder, ranks) for config in (self.config, plain)]
        self.runner, self.alone = (crew.runner for crew in self.crews)
        self.vocabulary: Vocabulary = load_vocabulary(folder)

    def core(
        self,
        *,
        num_blocks: int,
        budget: int,
        max_num_seqs: int,
        prefix_caching: bool,
        overlaps: bool = False,
        alone: bool = False,
    ) -> EngineCore:
        """overlaps: run steps as where a device works beside the host, each planned before the last one is read."""
        runner: ModelRunner = dataclasses.replace(
            self.alone if alone else self.runner,
            plan=CachePlan(num_blocks, MAX_LEN),
            max_num_batched_tokens=budget,
            overlaps=overlaps,
        )
        config = replace(self.config, enable_prefix_caching=prefix_caching, max_num_seqs=max_num_seqs)
        return EngineCore(config, runner, self.vocabulary)

    def solo(self, prompt: list[int], params: SamplingParams) -> Answer:
        core = self.core(num_blocks=200, budget=10_000, max_num_seqs=1, prefix_caching=False, alone=True)
        core.add(Request(request_id="solo", prompt=prompt, params=params))
        return drive(core, [])["solo"]


def drive(core: EngineCore, arriving: list[Arrival]) -> dict[str, Answer]:
    answers: dict[str, Answer] = {}
    step = 0
    while core.has_work or step <= 14:
        for name, arrival in enumerate(arriving):
            if arrival.step == step:
                core.add(Request(request_id=str(name), prompt=arrival.prompt, params=arrival.params))
            if arrival.aborted == step:
                core.abort([str(name)])
        for output in core.step():
            add(answers, output)
        step += 1
    return answers


def add(answers: dict[str, Answer], output: Output) -> None:
    tokens, logprobs, _, scored = answers.get(output.request_id, ([], [], None, []))
    answers[output.request_id] = (
        tokens + output.token_ids,
        logprobs + (output.logprobs or []),
        output.finish_reason,
        scored + (output.prompt_logprobs or []),
    )


Write = Callable[..., Path]


def loaded(param: tuple[Any, ...], tiny_llama: Callable[..., dict[str, object]], write: Write, folder: Path) -> Engine:
    """param: dtype, quantization, threads and ranks."""
    dtype, *rest, ranks = param
    heads = 6 if ranks == 1 else 8
    # No width divides the lanes of a vector but those that must.
    sizes = {"hidden_size": 216, "intermediate_size": 232, "vocab_size": 517}
    config = tiny_llama("1b", **sizes, num_attention_heads=heads, num_key_value_heads=2)
    return Engine(write(folder, {**config, "head_dim": 64}, dtype=dtype), dtype, *rest, ranks)


@pytest.fixture(
    scope="module",
    params=[("float32", "none", 1, 1), ("bfloat16", "none", 2, 1), ("bfloat16", "int8", 3, 1)],
    ids=["float32-1-thread", "bfloat16-2-threads", "int8-3-threads"],
)
def engine(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_llama: Callable[..., dict[str, object]],
    write_checkpoint: Write,
) -> Engine:
    return loaded(request.param, tiny_llama, write_checkpoint, tmp_path_factory.mktemp("promise"))


@pytest.fixture(
    scope="module",
    params=[("bfloat16", "none", 2, 2), ("float32", "none", 1, 4), ("bfloat16", "int8", 1, 8)],
    ids=["bfloat16-2-ranks", "float32-4-ranks", "int8-8-ranks"],
)
def shared(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_llama: Callable[..., dict[str, object]],
    write_checkpoint: Write,
) -> Iterator[Engine]:
    engine = loaded(request.param, tiny_llama, write_checkpoint, tmp_path_factory.mktemp("promise"))
    yield engine
    for crew in engine.crews:
        crew.close()


SCHEDULES = {
    "arriving": st.lists(arrivals, min_size=1, max_size=8),
    "num_blocks": st.integers(23, 60),
    "budget": st.sampled_from([1, 3, 16, 17, 64, 300, 1000]),
    "max_num_seqs": st.integers(1, 8),
    "prefix_caching": st.booleans(),
    "overlaps": st.booleans(),
}


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(**SCHEDULES)
def test_the_schedule_never_changes_the_answer(engine: Engine, arriving: list[Arrival], **schedule: Any) -> None:
    check(engine, arriving, **schedule)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(**SCHEDULES)
def test_nor_where_ranks_share_the_model(shared: Engine, arriving: list[Arrival], **schedule: Any) -> None:
    check(shared, arriving, **schedule)


def check(engine: Engine, arriving: list[Arrival], **schedule: Any) -> None:
    """What each request gets under this schedule is what it gets alone."""
    core = engine.core(**schedule)
    answers = drive(core, arriving)
    for name, arrival in enumerate(arriving):
        if arrival.aborted is not None and arrival.aborted < arrival.step:
            continue  # the abort came before the request, which is no error and changes nothing
        tokens, logprobs, reason, scored = answers[str(name)]
        alone = engine.solo(arrival.prompt, arrival.params)
        if reason == "abort":
            assert tokens == alone[0][: len(tokens)]
            assert logprobs == alone[1][: len(tokens)]
            assert scored == alone[3][: len(scored)]
        else:
            assert (tokens, logprobs, reason, scored) == alone
            assert len(scored) == (0 if arrival.params.prompt_logprobs is None else len(arrival.prompt) - 1)
    assert core.stats.blocks_used == 0
    assert core.stats.num_running == core.stats.num_waiting == 0


@pytest.mark.parametrize("overlaps", [False, True])
def test_preemption_and_cache_hits_do_happen(engine: Engine, overlaps: bool) -> None:
    """The property above is worth something only if its schedules reach these cases."""
    greedy = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, logprobs=2)
    arriving = [Arrival([*STEMS[0][:-name], name], greedy, 0, None) for name in range(1, 9)]
    core = engine.core(num_blocks=14, budget=64, max_num_seqs=8, prefix_caching=True, overlaps=overlaps)
    answers = drive(core, arriving)
    assert core.stats.preemptions > 0
    assert core.stats.prefix_hit_tokens > 0
    for name, arrival in enumerate(arriving):
        assert answers[str(name)] == engine.solo(arrival.prompt, arrival.params)


def test_threads_and_batch_leave_no_trace_in_a_long_prompt(engine: Engine) -> None:
    """Chunks of every size give the same bits over several key splits."""
    prompt = [(5 * place) % 256 for place in range(570)]
    greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=5)
    answer = functools.partial(engine.core, num_blocks=60, max_num_seqs=4, prefix_caching=False)
    alone = engine.solo(prompt, greedy)
    for budget in (2, 5, 33, 256, 257):
        core = answer(budget=budget)
        core.add(Request(request_id="solo", prompt=prompt, params=greedy))
        assert drive(core, [])["solo"] == alone


@pytest.mark.parametrize(("config_seed", "same"), [(None, False), (5, True)])
def test_a_request_without_a_seed_is_random_unless_the_engine_has_one(
    engine: Engine, config_seed: int | None, same: bool
) -> None:
    flat = SamplingParams(temperature=2.0, max_tokens=12, ignore_eos=True, logit_bias={65: 0.0})
    seeded = dataclasses.replace(engine.config, seed=config_seed)
    answers = []
    for name in ("first", "second"):
        core = EngineCore(seeded, engine.runner, engine.vocabulary)
        core.add(Request(request_id=name, prompt=[1, 2, 3], params=flat))
        answers.append(drive(core, [])[name])
    assert (answers[0] == answers[1]) == same
