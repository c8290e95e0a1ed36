"""AsyncEngine and the engine's own processes, for real: answers, aborts, failures at start, death on either side, and
coming back from it."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from pronk.engine import wire
from pronk.engine.client import AsyncEngine
from pronk.engine.config import EngineConfig, replace
from pronk.engine.errors import (
    CheckpointNotFoundError,
    ConfigError,
    ContextLengthError,
    EngineDeadError,
    EngineDrainingError,
    EngineStartError,
    InvalidParameterError,
    TensorError,
)
from pronk.engine.host_process import HostProcess
from pronk.engine.llm import LLM
from pronk.engine.request import Request, SamplingParams

DEADLINE = 60
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
ENDLESS = SamplingParams(temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_llama: Callable[..., dict[str, Any]],
    write_checkpoint: Callable[..., Path],
) -> Path:
    config = tiny_llama("1b", hidden_size=128, intermediate_size=128, num_attention_heads=2, num_key_value_heads=1)
    return write_checkpoint(tmp_path_factory.mktemp("client") / "tiny", config, dtype="float32")


def config_of(folder: Path, **changes: Any) -> EngineConfig:
    return replace(EngineConfig(model=str(folder)), **{"memory": "16MiB", "max_model_len": 2000, **changes})


@pytest.fixture
async def engine(checkpoint: Path) -> AsyncIterator[AsyncEngine]:
    engine = await AsyncEngine.start(config_of(checkpoint))
    yield engine
    await engine.close()
    assert psutil.Process().children(recursive=True) == []


async def tokens_of(engine: AsyncEngine, name: str, prompt: list[int], params: SamplingParams = GREEDY) -> list[int]:
    tokens: list[int] = []
    async for output in engine.generate(Request(request_id=name, prompt=prompt, params=params)):
        tokens += output.token_ids
    return tokens


async def until_true(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE):
        while not condition():  # noqa: ASYNC110  what other processes do sets no event
            await asyncio.sleep(0.01)


async def until_up(engine: AsyncEngine, restarts: int = 1) -> None:
    """Wait until it has come back that many times."""
    await until_true(lambda: engine.restarts == restarts and engine.error is None)


async def until(engine: AsyncEngine, condition: Callable[[wire.EngineStats], bool]) -> None:
    """Wait for a step after which the condition holds."""
    reached = asyncio.Event()
    engine.add_stats_listener(lambda step: reached.set() if condition(step.stats) else None)
    if not condition(engine.stats):
        await asyncio.wait_for(reached.wait(), DEADLINE)


async def test_a_crowd_gets_what_each_gets_alone_and_offline(engine: AsyncEngine, checkpoint: Path) -> None:
    prompts = [[number, 1, 2, 3] for number in range(32)]
    crowd = await asyncio.gather(*(tokens_of(engine, str(i), prompt) for i, prompt in enumerate(prompts)))
    alone = [await tokens_of(engine, "alone", prompt) for prompt in prompts[:3]]
    offline = LLM(config_of(checkpoint)).generate(prompts, GREEDY)
    assert crowd[:3] == alone
    assert crowd == [completion.token_ids for completion in offline]
    assert engine.num_requests == 0


async def test_leaving_early_frees_the_blocks(engine: AsyncEngine) -> None:
    outputs = engine.generate(Request(request_id="leaver", prompt=[1, 2, 3], params=ENDLESS))
    async for output in outputs:
        assert output.finish_reason is None
        break
    await outputs.aclose()  # type: ignore[attr-defined]
    await until(engine, lambda stats: stats.num_running == 0 and stats.blocks_used == 0)
    assert engine.num_requests == 0
    assert await tokens_of(engine, "next", [1, 2, 3])


async def test_an_abort_ends_the_stream_and_is_idempotent(engine: AsyncEngine) -> None:
    reasons = []
    async for output in engine.generate(Request(request_id="aborted", prompt=[1], params=ENDLESS)):
        reasons.append(output.finish_reason)
        engine.abort("aborted")
        engine.abort("aborted")
    engine.abort("aborted")
    engine.abort("never there")
    assert reasons[-1] == "abort"
    assert set(reasons[:-1]) == {None}
    assert await tokens_of(engine, "next", [1, 2, 3])


async def test_outputs_say_what_was_cached_and_where_time_went(engine: AsyncEngine) -> None:
    prompt = list(range(100))
    await tokens_of(engine, "first", prompt)
    outputs = [o async for o in engine.generate(Request(request_id="second", prompt=prompt, params=GREEDY))]
    assert outputs[-1].num_cached_tokens == 96
    timing = outputs[-1].timing
    assert timing is not None
    assert min(timing.queue, timing.prefill, timing.decode) >= 0
    assert engine.stats.prompt_tokens_cached == 96
    assert engine.stats.prompt_tokens_computed == 104


async def test_salts_do_not_share_blocks(engine: AsyncEngine) -> None:
    for salt in ("one", "two"):
        request = Request(request_id=salt, prompt=list(range(100)), params=GREEDY, cache_salt=salt)
        outputs = [output async for output in engine.generate(request)]
        assert outputs[-1].num_cached_tokens == 0


async def test_how_much_of_a_prompt_is_cached_can_be_asked_and_is_what_it_then_finds(engine: AsyncEngine) -> None:
    prompt = list(range(100))
    assert await engine.num_cached(prompt) == 0
    await tokens_of(engine, "first", prompt)
    for asked in (prompt[:96], prompt[:97], [*prompt[:40], 0, 0], prompt[1:]):
        told = await engine.num_cached(asked)
        outputs = [o async for o in engine.generate(Request(request_id="next", prompt=asked, params=GREEDY))]
        assert told == outputs[-1].num_cached_tokens
    assert await engine.num_cached(prompt) == 96
    assert await engine.num_cached(prompt, "another salt") == 0
    assert await engine.num_cached([]) == 0


async def test_questions_are_answered_while_others_run_each_by_its_own_answer(engine: AsyncEngine) -> None:
    prompt = list(range(100))
    running = asyncio.create_task(tokens_of(engine, "running", prompt, ENDLESS))
    await until(engine, lambda stats: stats.generated_tokens > 0)
    counts = await asyncio.gather(*(engine.num_cached(prompt[:length]) for length in range(1, 101)))
    assert counts == [(length - 1) // 16 * 16 for length in range(1, 101)]
    running.cancel()


async def test_questions_that_cannot_be_answered_are_errors(engine: AsyncEngine) -> None:
    for wrong in ([-1], [512]):
        with pytest.raises(InvalidParameterError):
            await engine.num_cached(wrong)
    (pid,) = engine.pids
    os.kill(pid, signal.SIGSTOP)
    waiting = asyncio.create_task(engine.num_cached([1]))
    left = asyncio.create_task(engine.num_cached([1]))
    await asyncio.sleep(0)
    left.cancel()
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(EngineDeadError):
        await asyncio.wait_for(waiting, DEADLINE)
    with pytest.raises(EngineDeadError):
        await engine.num_cached([1])
    await until_up(engine)
    assert await engine.num_cached([1]) == 0


@pytest.mark.parametrize(
    ("prompt", "params", "error", "param"),
    [
        ([], GREEDY, InvalidParameterError, "prompt"),
        ([1] * 2000, GREEDY, ContextLengthError, "messages"),
        ([1] * 1990, GREEDY, ContextLengthError, "max_tokens"),
        ([512], GREEDY, InvalidParameterError, "prompt"),
        ([-1], GREEDY, InvalidParameterError, "prompt"),
        ([1], SamplingParams(logit_bias={512: 1.0}), InvalidParameterError, "logit_bias"),
        ([1], SamplingParams(stop_token_ids=(512,)), InvalidParameterError, "stop_token_ids"),
    ],
)
async def test_what_cannot_be_served_is_refused_and_the_rest_goes_on(
    engine: AsyncEngine, prompt: list[int], params: SamplingParams, error: type[Exception], param: str
) -> None:
    with pytest.raises(error) as caught:
        await tokens_of(engine, "bad", prompt, params)
    assert caught.value.param == param  # type: ignore[attr-defined]
    assert await tokens_of(engine, "good", [1, 2, 3])


async def test_the_longest_prompt_and_answer_that_fit_are_served(engine: AsyncEngine) -> None:
    assert len(await tokens_of(engine, "long", [1] * 1999, ENDLESS)) == 1
    assert len(await tokens_of(engine, "exact", [1] * 1988)) == 12


async def test_stop_strings_end_it_in_the_engine(engine: AsyncEngine) -> None:
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logit_bias={65: 100.0}, stop=("AAA",))
    outputs = [o async for o in engine.generate(Request(request_id="stop", prompt=[1], params=params))]
    assert sum(len(output.token_ids) for output in outputs) == 3
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("stop", "AAA")


async def test_draining_takes_nothing_new_and_finishes_what_runs(engine: AsyncEngine) -> None:
    params = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)
    running = asyncio.create_task(tokens_of(engine, "running", [1], params))
    await until(engine, lambda stats: stats.num_running == 1)
    drained = asyncio.create_task(engine.drain(DEADLINE))
    await asyncio.sleep(0)
    with pytest.raises(EngineDrainingError):
        await tokens_of(engine, "late", [1])
    assert await drained
    assert len(await running) == 50


async def test_draining_gives_up_at_its_deadline(engine: AsyncEngine) -> None:
    running = asyncio.create_task(tokens_of(engine, "running", [1], SamplingParams(ignore_eos=True)))
    await until(engine, lambda stats: stats.num_running == 1)
    assert not await engine.drain(0.01)
    await engine.close()
    with pytest.raises(EngineDeadError, match="shut down"):
        await running


async def test_a_killed_engine_fails_every_request_says_why_and_serves_again(
    engine: AsyncEngine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    before = await tokens_of(engine, "before", [1, 2, 3])
    steps = engine.stats.steps
    running = [asyncio.create_task(tokens_of(engine, str(number), [number], ENDLESS)) for number in range(4)]
    await until(engine, lambda stats: stats.num_running == 4)
    os.kill(engine.pids[0], signal.SIGKILL)
    results = await asyncio.wait_for(asyncio.gather(*running, return_exceptions=True), DEADLINE)
    why = "the engine died: rank 0 was killed by signal 9"
    assert [str(result) for result in results] == [why] * 4
    assert all(isinstance(result, EngineDeadError) for result in results)
    assert str(engine.error) == why
    assert engine.num_requests == 0
    assert engine.stats == wire.EngineStats(blocks_total=engine.info.num_blocks)
    with pytest.raises(EngineDeadError):
        await tokens_of(engine, "late", [1])
    engine.abort("0")
    await until_up(engine)
    engine.abort("0")
    assert await tokens_of(engine, "0", [1, 2, 3]) == before
    assert 0 < engine.stats.steps <= steps
    lines = [record.getMessage() for record in caplog.records if record.name == "pronk.engine.client"]
    assert len(lines) == 2
    assert why in lines[0]
    assert re.search(r"up again, \d+\.\d s after it died", lines[1])


async def test_a_reader_that_looks_when_it_is_up_again_gets_the_error_of_its_own(engine: AsyncEngine) -> None:
    outputs = engine.generate(Request(request_id="slow", prompt=[1], params=ENDLESS))
    await anext(outputs)
    os.kill(engine.pids[0], signal.SIGKILL)
    await until_up(engine)
    with pytest.raises(EngineDeadError, match="signal 9"):
        [output async for output in outputs]
    assert engine.num_requests == 0


async def test_it_comes_back_every_time(engine: AsyncEngine) -> None:
    for round_ in range(1, 4):
        os.kill(engine.pids[0], signal.SIGKILL)
        await until_up(engine, round_)
        assert await tokens_of(engine, "same id", [1, 2, 3])


async def test_a_hung_engine_counts_as_dead_and_serves_again(checkpoint: Path) -> None:
    engine = await AsyncEngine.start(config_of(checkpoint, step_timeout=1.0))
    running = asyncio.create_task(tokens_of(engine, "running", [1], ENDLESS))
    await until(engine, lambda stats: stats.num_running == 1)
    os.kill(engine.pids[0], signal.SIGSTOP)
    with pytest.raises(EngineDeadError, match="rank 0 did not answer for 1 s"):
        await asyncio.wait_for(running, DEADLINE)
    await until_up(engine)
    assert await tokens_of(engine, "next", [1])
    await engine.close()
    assert psutil.Process().children(recursive=True) == []


async def test_an_idle_engine_does_not_count_as_hung(checkpoint: Path) -> None:
    engine = await AsyncEngine.start(config_of(checkpoint, step_timeout=1.0))
    await asyncio.sleep(2)  # this time is what is tested
    assert engine.error is None
    assert engine.restarts == 0
    await engine.close()


async def test_a_request_of_an_engine_whose_death_is_not_known_yet_gets_the_error(engine: AsyncEngine) -> None:
    os.kill(engine._host.pid, signal.SIGSTOP)  # whoever would tell
    os.kill(engine.pids[0], signal.SIGKILL)
    waiting = asyncio.create_task(tokens_of(engine, "waiting", [1]))
    asked = asyncio.create_task(engine.num_cached([1]))
    await until_true(lambda: engine.num_requests == 1)
    assert engine.error is None
    os.kill(engine._host.pid, signal.SIGCONT)
    for task in (waiting, asked):
        with pytest.raises(EngineDeadError, match="signal 9"):
            await asyncio.wait_for(task, DEADLINE)
    await until_up(engine)


async def test_without_its_host_an_engine_dies_and_comes_back_with_another(engine: AsyncEngine) -> None:
    running = asyncio.create_task(tokens_of(engine, "running", [1], ENDLESS))
    await until(engine, lambda stats: stats.num_running == 1)
    os.kill(engine._host.pid, signal.SIGKILL)
    with pytest.raises(EngineDeadError, match="host of its processes was killed by signal 9"):
        await asyncio.wait_for(running, DEADLINE)
    await until_up(engine)
    assert await tokens_of(engine, "next", [1])


SPAWNING = """
import socket, sys
from pronk.engine import group, host
connection = socket.socket(fileno=int(sys.argv[1]))
connection.set_inheritable(False)
host.Host(connection, host.ring_ends, lambda leave: group.spawned, is_watched=False).run()
"""


async def test_where_a_host_must_not_fork_it_starts_an_interpreter_for_each_engine(checkpoint: Path) -> None:
    engine = await AsyncEngine.start(config_of(checkpoint), spawn=lambda: HostProcess.spawn(("-c", SPAWNING)))
    assert psutil.Process(engine.pids[0]).cmdline()[1:3] == ["-m", "pronk.engine.process"]
    before = await tokens_of(engine, "first", [1])
    os.kill(engine.pids[0], signal.SIGKILL)
    await until_up(engine)
    assert await tokens_of(engine, "second", [1]) == before
    await engine.close()
    assert psutil.Process().children(recursive=True) == []


NONSENSE = """
import signal, socket, sys
from pronk.engine import group, host
def run_rank(seat):
    seat.link.sendall(bytes(100))
    signal.pause()
connection = socket.socket(fileno=int(sys.argv[1]))
connection.set_inheritable(False)
host.Host(connection, host.ring_ends, lambda leave: group.forked(run_rank, leave)).run()
"""


async def test_an_engine_that_sends_nonsense_does_not_start(checkpoint: Path) -> None:
    with pytest.raises(EngineStartError, match="cannot be read"):
        await AsyncEngine.start(config_of(checkpoint), spawn=lambda: HostProcess.spawn(("-c", NONSENSE)))
    assert psutil.Process().children(recursive=True) == []


FAILING = """
import signal, socket, sys
from pronk.engine import group, host, process, worker
class Runner:
    def __init__(self, runner):
        self.device = runner.device
        self.runner = runner
    def carry_out(self, order, last):
        self.left = getattr(self, "left", 5) - 1
        if not self.left:
            raise ValueError("/a/path in serving")
        return self.runner.carry_out(order, last)
def join_group(company, config, *, join=worker.join_group, **calls):
    if sys.argv[1] == "joining":
        raise OSError("asked to join")
    return join(company, config, **calls)
def load_runner(*arguments, tp, load=worker.load_runner):
    if sys.argv[1] == "loading" and tp.rank == 1:
        raise OSError("/a/path in loading")
    if sys.argv[1] == "refusing" and tp.rank == 1:
        raise process.PronkError("no, thanks")
    return Runner(load(*arguments, tp=tp))
worker.load_runner, worker.join_group = load_runner, join_group
connection = socket.socket(fileno=int(sys.argv[2]))
connection.set_inheritable(False)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
host.Host(connection, host.ring_ends, lambda leave: group.forked(process.run_rank, leave)).run()
"""


def failing(when: str) -> Callable[[], HostProcess]:
    """-> a host whose rank 1 fails then."""
    return lambda: HostProcess.spawn(("-c", FAILING, when))


@pytest.fixture(scope="module")
def shared(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_llama: Callable[..., dict[str, Any]],
    write_checkpoint: Callable[..., Path],
) -> EngineConfig:
    """A model that two ranks can share."""
    folder = write_checkpoint(tmp_path_factory.mktemp("shared") / "tiny", tiny_llama("1b"), dtype="float32")
    return config_of(folder, tensor_parallel_size=2)


@pytest.mark.parametrize(
    ("when", "why"),
    [("loading", "rank 1 failed: OSError: /a/path in loading"), ("refusing", "rank 1 failed: no, thanks")],
)
async def test_a_follower_that_fails_while_it_loads_says_why(
    shared: EngineConfig, when: str, why: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(EngineStartError) as caught:
        await AsyncEngine.start(shared, spawn=failing(when))
    assert str(caught.value) == f"the engine ended while it was starting: {why}"
    assert capfd.readouterr().err.count("Traceback") == (when == "loading")  # its own, of a fault of ours
    assert psutil.Process().children(recursive=True) == []


async def test_a_follower_that_fails_while_it_serves_tells_clients_no_path(
    shared: EngineConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    engine = await AsyncEngine.start(shared, spawn=failing("serving"))
    with pytest.raises(EngineDeadError) as caught:
        await tokens_of(engine, "running", [1], ENDLESS)
    assert str(caught.value) == "the engine died: rank 1 failed: ValueError"
    assert "ValueError: /a/path in serving" in capfd.readouterr().err
    await until_up(engine)
    assert await tokens_of(engine, "next", [1], SamplingParams(temperature=0, max_tokens=2))
    await engine.close()
    assert psutil.Process().children(recursive=True) == []


async def test_what_all_ranks_meet_is_raised_by_its_own_name_and_logged_by_none(
    shared: EngineConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    damaged = without_a_layer(Path(shared.model), tmp_path / "damaged")
    with pytest.raises(TensorError, match=r"layers\.2"):
        await AsyncEngine.start(replace(shared, model=str(damaged)))
    with pytest.raises(ConfigError, match="--max-model-len"):
        await AsyncEngine.start(replace(shared, max_model_len=10**6))
    with pytest.raises(ConfigError, match="--tensor-parallel-size 3"):  # before the others are told anything
        await AsyncEngine.start(replace(shared, tensor_parallel_size=3), spawn=failing("joining"))
    told = capfd.readouterr().err
    assert "Traceback" not in told
    assert "failed" not in told
    assert psutil.Process().children(recursive=True) == []


async def test_ranks_that_wait_for_one_that_loads_do_not_count_as_hung(shared: EngineConfig) -> None:
    """One rank beats, as it does while it reads weights, for longer than ranks may be silent."""
    engine = await AsyncEngine.start(
        replace(shared, start_timeout=1.0), spawn=lambda: HostProcess.spawn(("-c", SLOW_TO_LOAD))
    )
    assert await tokens_of(engine, "next", [1])
    await engine.close()


SLOW_TO_LOAD = """
import socket, sys, time
from pronk.engine import group, host, process, worker
def load_runner(config, folder, report, *, tp, load=worker.load_runner):
    for _ in range(30):
        time.sleep(0.1)
        report(0, 0)
    return load(config, folder, report, tp=tp)
worker.load_runner = load_runner
connection = socket.socket(fileno=int(sys.argv[1]))
connection.set_inheritable(False)
host.Host(connection, host.ring_ends, lambda leave: group.forked(process.run_rank, leave)).run()
"""


def test_offline_there_is_one_rank(shared: EngineConfig) -> None:
    with pytest.raises(ConfigError, match="pronk serve"):
        LLM(shared)


@pytest.fixture
async def down(checkpoint: Path, tmp_path: Path) -> AsyncIterator[tuple[AsyncEngine, Callable[[], None]]]:
    """An engine that has died and cannot be started again; and what lets it."""
    there, away = tmp_path / "model", tmp_path / "away"
    shutil.copytree(checkpoint, there)
    engine = await AsyncEngine.start(config_of(there))
    there.rename(away)
    os.kill(engine.pids[0], signal.SIGKILL)
    await until_true(lambda: "could not be started again" in str(engine.error))
    assert str(tmp_path) not in str(engine.error)
    yield engine, lambda: away.rename(there) and None
    await engine.close()
    assert psutil.Process().children(recursive=True) == []


Down = tuple[AsyncEngine, Callable[[], None]]


async def test_a_start_that_fails_is_tried_again(down: Down, caplog: pytest.LogCaptureFixture) -> None:
    engine, mend = down
    assert engine.restarts == 0
    with pytest.raises(EngineDeadError, match="signal 9"):
        await tokens_of(engine, "late", [1])
    await until_true(lambda: "next try is in 2 s" in caplog.text)
    mend()
    await until_up(engine)
    assert await tokens_of(engine, "next", [1])


async def test_an_engine_that_is_down_has_drained(down: Down) -> None:
    engine, _ = down
    assert await engine.drain(DEADLINE)
    assert engine.error is not None


async def test_an_engine_can_be_closed_while_it_starts_again(checkpoint: Path) -> None:
    engine = await AsyncEngine.start(config_of(checkpoint))
    os.kill(engine.pids[0], signal.SIGKILL)
    await until_true(lambda: engine.error is not None)
    await asyncio.wait_for(engine.close(), DEADLINE)
    assert engine.restarts == 0
    assert psutil.Process().children(recursive=True) == []


async def test_an_engine_that_dies_while_it_drains_is_not_started_again(engine: AsyncEngine) -> None:
    running = asyncio.create_task(tokens_of(engine, "running", [1], ENDLESS))
    await until(engine, lambda stats: stats.num_running == 1)
    drained = asyncio.create_task(engine.drain(DEADLINE))
    await asyncio.sleep(0)
    os.kill(engine.pids[0], signal.SIGKILL)
    assert await drained
    with pytest.raises(EngineDeadError, match="signal 9"):
        await running
    await asyncio.wait_for(engine._keeper, DEADLINE)
    assert engine.error is not None


async def test_an_engine_that_sends_nonsense_counts_as_dead(engine: AsyncEngine) -> None:
    running = asyncio.create_task(tokens_of(engine, "running", [1], ENDLESS))
    await until(engine, lambda stats: stats.num_running == 1)
    engine._conversation._frames = wire.Frames(wire.ToEngine)  # what the engine says is no message of that direction
    with pytest.raises(EngineDeadError, match="cannot be read"):
        await asyncio.wait_for(running, DEADLINE)
    await until_up(engine)
    assert await tokens_of(engine, "next", [1])


async def test_signals_that_mean_the_server_leave_the_engine_alone(engine: AsyncEngine) -> None:
    os.kill(engine.pids[0], signal.SIGINT)
    os.kill(engine.pids[0], signal.SIGTERM)
    assert await tokens_of(engine, "still there", [1, 2, 3])


async def test_progress_is_told_before_it_is_ready(checkpoint: Path) -> None:
    told: list[wire.Progress] = []
    engine = await AsyncEngine.start(config_of(checkpoint), on_progress=told.append)
    await engine.close()
    weights = [progress for progress in told if progress.phase == "loading weights"]
    assert weights[-1].done == weights[-1].total > 0
    assert engine.info.num_parameters > 0
    assert engine.info.max_model_len == 2000


async def test_what_the_engine_meets_at_start_is_raised_by_its_own_name(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="nowhere"):
        await AsyncEngine.start(config_of(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="--max-model-len"):
        await AsyncEngine.start(config_of(checkpoint, max_model_len=10**6))
    with pytest.raises(TensorError, match=r"layers\.2"):
        await AsyncEngine.start(config_of(without_a_layer(checkpoint, tmp_path / "damaged")))


@pytest.mark.parametrize(
    ("number", "why"),
    [
        (signal.SIGKILL, "rank 0 was killed by signal 9"),
        (signal.SIGSTOP, "rank 0 made no progress for 1 s while it was starting"),
    ],
)
async def test_a_rank_that_is_lost_while_it_starts_is_named(checkpoint: Path, number: int, why: str) -> None:
    def lose(progress: wire.Progress) -> None:
        (host,) = psutil.Process().children()
        (rank,) = host.children()
        rank.send_signal(number)

    with pytest.raises(EngineStartError, match=why):
        await AsyncEngine.start(config_of(checkpoint, start_timeout=1.0), on_progress=lose)
    assert psutil.Process().children(recursive=True) == []


@pytest.mark.parametrize("is_up", [False, True], ids=["before there is a group", "while it loads"])
async def test_a_start_that_is_cancelled_leaves_no_process(checkpoint: Path, is_up: bool) -> None:
    has_begun = asyncio.Event()
    starting = asyncio.create_task(
        AsyncEngine.start(config_of(checkpoint), on_progress=lambda progress: has_begun.set())
    )
    await (has_begun.wait() if is_up else until_true(lambda: bool(psutil.Process().children())))
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(starting, DEADLINE)
    assert psutil.Process().children(recursive=True) == []


def without_a_layer(checkpoint: Path, folder: Path) -> Path:
    """A copy whose config asks for one layer more than the file holds."""
    shutil.copytree(checkpoint, folder)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    return folder


def start_process() -> tuple[subprocess.Popen[bytes], socket.socket]:
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, "-m", "pronk.engine.process", str(theirs.fileno())]
        return subprocess.Popen(command, pass_fds=[theirs.fileno()], stderr=subprocess.PIPE), ours


def test_the_engine_ends_when_its_server_is_gone(checkpoint: Path) -> None:
    process, connection = start_process()
    with process, connection:
        connection.sendall(wire.encode(wire.Start(config_of(checkpoint))))
        frames, ready = wire.Frames(wire.FromEngine), False
        while not ready:
            ready = any(isinstance(message, wire.EngineInfo) for message in frames.feed(connection.recv(1 << 16)))
        connection.sendall(wire.encode(wire.Add(Request(request_id="a", prompt=[1], params=ENDLESS))))
        connection.close()
        assert process.wait(DEADLINE) == 0


def test_the_engine_refuses_a_first_message_that_is_not_start() -> None:
    process, connection = start_process()
    with process, connection:
        connection.sendall(wire.encode(wire.Shutdown()))
        frames = wire.Frames(wire.FromEngine)
        (failed,) = frames.feed(connection.recv(1 << 16))
        assert isinstance(failed, wire.Failed)
        assert "Start" in failed.message
        assert process.wait(DEADLINE) == 1
