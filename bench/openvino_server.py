"""The least of a server around OpenVINO GenAI, which has none in Python, so that bench/peers.py can ask it as it asks
the others. Runs where openvino_genai is installed, and imports nothing else that Python does not have.

    python bench/openvino_server.py FOLDER --port 8000 [--cache GIB] [--precision bf16]

FOLDER holds the model as OpenVINO's own files. Each request is one that bench/peers.py makes; an answer's text is its
token's number, so that no time goes into text.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import queue
import threading
from typing import Any

import openvino
import openvino_genai as genai

OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"

TURNS = 5
"""Of the loop, after each step: to write tokens, and to accept a connection and read its request."""


class Engine(threading.Thread):
    """Steps the pipeline while there is something to do, and tells each request's queue of its new tokens."""

    def __init__(self, pipeline: genai.ContinuousBatchingPipeline, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(daemon=True)
        self._pipeline, self._loop = pipeline, loop
        self._coming: queue.Queue[tuple[dict[str, Any], asyncio.Queue[list[int]]]] = queue.Queue()
        self._running: dict[int, tuple[Any, asyncio.Queue[list[int]]]] = {}
        self._number = 0

    def submit(self, request: dict[str, Any]) -> asyncio.Queue[list[int]]:
        tokens: asyncio.Queue[list[int]] = asyncio.Queue()
        self._coming.put((request, tokens))
        return tokens

    def run(self) -> None:
        while True:
            while not self._running or not self._coming.empty():
                self._add(*self._coming.get())
            self._pipeline.step()
            asyncio.run_coroutine_threadsafe(self._tell(), self._loop).result()

    async def _tell(self) -> None:
        """A step may keep Python's lock to itself: what the loop has to do must be done before the next one."""
        for number, (handle, tokens) in list(self._running.items()):
            while handle.can_read():
                for output in handle.read().values():
                    tokens.put_nowait(list(output.generated_ids))
            if handle.get_status() != genai.GenerationStatus.RUNNING:
                del self._running[number]
        for _ in range(TURNS):
            await asyncio.sleep(0)

    def _add(self, request: dict[str, Any], tokens: asyncio.Queue[list[int]]) -> None:
        config = genai.GenerationConfig(max_new_tokens=request["max_tokens"], ignore_eos=True, do_sample=False)
        ids = openvino.Tensor([request["prompt"]])
        self._number += 1
        self._running[self._number] = (self._pipeline.add_request(self._number, ids, config), tokens)


async def answer(engine: Engine, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    writer.write(OK)
    if head.startswith(b"post"):
        length = int(head.split(b"content-length:")[1].split()[0])
        request = json.loads(await reader.readexactly(length))
        tokens, made = engine.submit(request), 0
        while made < request["max_tokens"]:
            for token in await tokens.get():
                made += 1
                writer.write(event({"choices": [{"index": 0, "text": str(token)}]}))
            await writer.drain()
        usage = {"prompt_tokens": len(request["prompt"]), "completion_tokens": made}
        writer.write(event({"choices": [], "usage": usage}))
    writer.close()


def event(fields: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


async def serve(asked: argparse.Namespace) -> None:
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size, scheduler.max_num_seqs = asked.cache, 32
    pipeline = genai.ContinuousBatchingPipeline(
        asked.folder, scheduler, "CPU", {"INFERENCE_PRECISION_HINT": asked.precision}
    )
    engine = Engine(pipeline, asyncio.get_running_loop())
    engine.start()
    server = await asyncio.start_server(lambda *ends: answer(engine, *ends), "127.0.0.1", asked.port)
    await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--cache", type=int, default=2, help="GiB of the KV cache")
    parser.add_argument("--precision", default="bf16", help="of activations: bf16, f32")
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
