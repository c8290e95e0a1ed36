"""AsyncEngine and the engine's own process, for real: answers, aborts, failures at start, death on either side."""

from __future__ import annotations

import asyncio
import os
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
    InvalidParameterError,
    TensorError,
)
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
    assert not psutil.pid_exists(engine._process.pid)


async def tokens_of(engine: AsyncEngine, name: str, prompt: list[int], params: SamplingParams = GREEDY) -> list[int]:
    tokens: list[int] = []
    async for output in engine.generate(Request(request_id=name, prompt=prompt, params=params)):
        tokens += output.token_ids
    return tokens


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
    os.kill(engine._process.pid, signal.SIGSTOP)
    waiting = asyncio.create_task(engine.num_cached([1]))
    left = asyncio.create_task(engine.num_cached([1]))
    await asyncio.sleep(0)
    left.cancel()
    os.kill(engine._process.pid, signal.SIGKILL)
    with pytest.raises(EngineDeadError):
        await asyncio.wait_for(waiting, DEADLINE)
    with pytest.raises(EngineDeadError):
        await engine.num_cached([1])


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


async def test_a_killed_engine_fails_every_request_and_says_why(checkpoint: Path) -> None:
    engine = await AsyncEngine.start(config_of(checkpoint))
    running = [asyncio.create_task(tokens_of(engine, str(number), [number], ENDLESS)) for number in range(4)]
    await until(engine, lambda stats: stats.num_running == 4)
    os.kill(engine._process.pid, signal.SIGKILL)
    results = await asyncio.wait_for(asyncio.gather(*running, return_exceptions=True), DEADLINE)
    assert all(isinstance(result, EngineDeadError) and "signal 9" in str(result) for result in results)
    with pytest.raises(EngineDeadError):
        await tokens_of(engine, "late", [1])
    assert engine.error is not None
    await engine.close()


async def test_an_engine_that_sends_nonsense_counts_as_dead(engine: AsyncEngine) -> None:
    running = asyncio.create_task(tokens_of(engine, "running", [1], ENDLESS))
    await until(engine, lambda stats: stats.num_running == 1)
    engine._frames = wire.Frames(wire.ToEngine)  # what the engine says is no message of that direction
    with pytest.raises(EngineDeadError, match="cannot be read"):
        await asyncio.wait_for(running, DEADLINE)


async def test_signals_that_mean_the_server_leave_the_engine_alone(engine: AsyncEngine) -> None:
    os.kill(engine._process.pid, signal.SIGINT)
    os.kill(engine._process.pid, signal.SIGTERM)
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
