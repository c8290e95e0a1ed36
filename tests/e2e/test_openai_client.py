"""The whole of it: `pronk serve` in a process of its own, a tiny random model, and OpenAI's own client."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from .serving import CONTEXT, SECONDS, Server, client_of, until


def request(number: int, **changes: Any) -> dict[str, Any]:
    """Requests that differ in length, in parameters and in where their prompts part."""
    return {
        "model": "tiny",
        "messages": [
            {"role": "system", "content": "You are a llama." * (number % 3)},
            {"role": "user", "content": f"{number} pronks. " * (1 + number % 7)},
        ],
        "max_tokens": 5 + number % 11,
        "temperature": (0, 0.7, 1.3)[number % 3],
        "top_p": (1, 0.9)[number % 2],
        "presence_penalty": (0, 0.5)[number % 2],
        "seed": number,
        "logprobs": True,
        "top_logprobs": number % 4,
        **changes,
    }


async def ask(client: openai.AsyncOpenAI, number: int) -> Any:
    """-> text, finish_reason, logprobs and token counts; streamed for odd numbers."""
    if number % 2 == 0:
        completion = await client.chat.completions.create(**request(number))
        choice, usage = completion.choices[0], completion.usage
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        entries, text, finish = choice.logprobs.content, choice.message.content, choice.finish_reason
    else:
        stream = await client.chat.completions.create(
            **request(number), stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
        text = "".join(choice.delta.content or "" for choice in choices)
        entries = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content or ()]
        finish, usage = choices[-1].finish_reason, chunks[-1].usage
    assert usage is not None
    assert len(entries) == usage.completion_tokens
    return text, finish, [entry.model_dump() for entry in entries], usage.prompt_tokens, usage.completion_tokens


async def test_32_at_once_answer_as_each_alone(server: Server) -> None:
    """Text, finish reason and every logprob, to the last bit; the second time the prefix cache is warm."""
    async with client_of(server) as client:
        alone = [await ask(client, number) for number in range(32)]
        together = await asyncio.gather(*(ask(client, number) for number in range(32)))
    assert together == alone
    assert len({json.dumps(answer) for answer in alone}) == 32
    assert server.metric("pronk_prompt_tokens_total", source="cached") > 0
    assert (
        server.metric("pronk_requests_total", outcome="length") + server.metric("pronk_requests_total", outcome="stop")
        == 64
    )
    until(lambda: server.metric("pronk_kv_pages", state="used") == 0)


async def test_tokens_are_counted_exactly(own_server: Server) -> None:
    async with client_of(own_server) as client:
        answers = await asyncio.gather(*(ask(client, number) for number in range(8)))
    prompt_tokens = sum(answer[3] for answer in answers)
    completion_tokens = sum(answer[4] for answer in answers)
    assert own_server.metric("pronk_generated_tokens_total") == completion_tokens
    assert own_server.metric("pronk_request_generated_tokens_sum") == completion_tokens
    assert own_server.metric("pronk_request_prompt_tokens_sum") == prompt_tokens
    computed = own_server.metric("pronk_prompt_tokens_total", source="computed")
    assert computed + own_server.metric("pronk_prompt_tokens_total", source="cached") == prompt_tokens
    assert own_server.metric("pronk_time_to_first_token_seconds_count") == 8
    assert own_server.metric("pronk_inter_token_latency_seconds_count") == completion_tokens - 8


def long_request(number: int = 1, max_tokens: int = CONTEXT - 600) -> dict[str, Any]:
    """A stream that does not end before max_tokens."""
    asked = request(number, logprobs=False, top_logprobs=None, max_tokens=max_tokens, stream=True)
    return {**asked, "extra_body": {"ignore_eos": True}}


async def test_clients_that_leave_free_their_blocks(server: Server) -> None:
    aborted = server.metric("pronk_requests_total", outcome="client_abort")
    async with client_of(server) as client:
        streams = await asyncio.gather(*(client.chat.completions.create(**long_request(n)) for n in range(4)))
        await asyncio.gather(*(anext(aiter(stream)) for stream in streams))
        assert server.metric("pronk_kv_pages", state="used") > 0
        for stream in streams:
            await stream.close()
        whole = asyncio.create_task(client.chat.completions.create(**{**long_request(9), "stream": False}))
        until_running = asyncio.to_thread(until, lambda: server.metric("pronk_requests_running") >= 1)
        await until_running
        whole.cancel()
        await asyncio.gather(whole, return_exceptions=True)
    until(lambda: server.metric("pronk_requests_total", outcome="client_abort") == aborted + 5)
    until(lambda: server.metric("pronk_kv_pages", state="used") == 0)
    assert server.metric("pronk_requests_running") == 0


async def test_stop_texts_and_mistakes(server: Server) -> None:
    async with client_of(server) as client:
        asked = request(3, temperature=1.3, max_tokens=60)
        free = (await client.chat.completions.create(**asked)).choices[0].message.content
        assert free
        stop = free[len(free) // 2]
        cut = (await client.chat.completions.create(**asked, stop=stop)).choices[0]
        assert (cut.message.content, cut.finish_reason) == (free[: free.index(stop)], "stop")
        with pytest.raises(openai.BadRequestError, match=f"maximum context length is {CONTEXT} tokens"):
            await client.chat.completions.create(**request(3, messages=[{"role": "user", "content": "x" * CONTEXT}]))
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(**request(3, logit_bias={"512": 1}))
        assert caught.value.param == "logit_bias"
        assert (await ask(client, 4))[4] > 0


def test_the_table_tells_what_is_served(server: Server, model: Path) -> None:
    for fact in ("tiny", str(model), "bfloat16", "cpu", "32.0 MiB", f"{CONTEXT} tokens"):
        assert fact in server.table
    assert "torch" not in Path(f"/proc/{server.process.pid}/maps").read_text()


@pytest.fixture
def mendable(model: Path, tmp_path: Path) -> Iterator[tuple[Server, Path, Path]]:
    """A server; its model's folder; and where that can be put, so that no engine can be started."""
    folder = tmp_path / "tiny"
    shutil.copytree(model, folder)
    running = Server(folder)
    yield running, folder, tmp_path / "away"
    running.end()


async def test_a_killed_engine_ends_streams_and_comes_back_by_itself(mendable: tuple[Server, Path, Path]) -> None:
    server, folder, away = mendable
    async with client_of(server) as client:
        asked = request(1, temperature=0)
        before = await client.chat.completions.create(**asked)
        stream = aiter(await client.chat.completions.create(**long_request()))
        await anext(stream)
        folder.rename(away)
        server.engine.kill()
        with pytest.raises(openai.APIError, match="engine died: rank 0 was killed by signal 9"):
            await drain(stream)
        with pytest.raises(openai.InternalServerError) as caught:
            await client.chat.completions.create(**request(1))
        assert caught.value.status_code == 503
        status, body = server.get("/health")
        assert status == 503
        assert "signal 9" in json.loads(body)["reason"]
        assert server.metric("pronk_engine_up") == 0 == server.metric("pronk_rank_up", rank="0")
        away.rename(folder)
        await asyncio.to_thread(until, lambda: server.get("/health")[0] == 200)
        after = await client.chat.completions.create(**asked)
    assert after.choices[0].message.content == before.choices[0].message.content
    assert server.metric("pronk_engine_up") == 1 == server.metric("pronk_rank_up", rank="0")
    assert server.metric("pronk_engine_restarts_total") == 1
    processes = server.processes()
    server.process.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(server.wait) == 0
    assert not any(process.is_running() for process in processes)
    log = "".join(server.errors)
    assert "rank 0 was killed by signal 9; requests are answered with 503" in log
    assert "the engine is up again" in log


async def test_a_server_that_is_told_to_stop_while_its_engine_is_down_stops(
    mendable: tuple[Server, Path, Path],
) -> None:
    server, folder, away = mendable
    processes = server.processes()
    folder.rename(away)
    server.engine.kill()
    await asyncio.to_thread(until, lambda: server.get("/health")[0] == 503)
    server.process.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(server.wait) == 1
    assert not any(process.is_running() for process in processes)


def test_without_the_server_no_process_is_left(own_server: Server) -> None:
    processes = own_server.processes()
    own_server.process.kill()
    until(lambda: not any(process.is_running() for process in processes))


async def drain(stream: Any) -> None:
    async for _ in stream:
        continue


async def test_sigterm_lets_what_runs_end(own_server: Server) -> None:
    engine = own_server.engine
    async with client_of(own_server) as client:
        stream = aiter(await client.chat.completions.create(**long_request(max_tokens=200)))
        await anext(stream)
        own_server.process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(until, lambda: own_server.get("/health")[0] == 503)
        with pytest.raises(openai.InternalServerError) as caught:
            await client.chat.completions.create(**request(1))
        assert caught.value.response.headers["retry-after"]
        *_, last = [chunk async for chunk in stream]
    assert last.choices[0].finish_reason == "length"
    assert await asyncio.to_thread(own_server.wait) == 0
    assert not engine.is_running()


def test_a_folder_that_is_no_model_is_one_sentence(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pronk.server.cli", "serve", str(tmp_path), "--port", "0"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert ended.returncode == 1
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("pronk: ")
    assert str(tmp_path) in last
    assert "Traceback" not in ended.stderr
