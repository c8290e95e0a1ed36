"""A server without a model: a fake engine with the face of AsyncEngine, a vocabulary of bytes, and a caller of ASGI.

The fake answers what the test scripts, or, without a script, the prompt's own text backwards: an answer that depends on
the prompt, so that one request's answer cannot pass for another's.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Any

from pronk.engine.client import check_prompt, check_request
from pronk.engine.errors import EngineDeadError, EngineDrainingError, InvalidParameterError
from pronk.engine.model.config import GenerationDefaults
from pronk.engine.request import Grammar, Output, Request, TokenLogprobs
from pronk.engine.tokenizer import Tokenizer, Vocabulary, llama_special_tokens
from pronk.engine.wire import EngineInfo, EngineStats, RankShare, Step
from pronk.server.chat.template import ChatTemplate
from pronk.server.service import ServedModel, Service

BYTES = Vocabulary(tuple(bytes([byte]) for byte in range(256)), llama_special_tokens(256))
END_OF_TURN = BYTES.special_tokens["<|eot_id|>"]
CONTEXT = 4096

Script = Callable[[Request], Sequence[Output]]


def info(**changes: Any) -> EngineInfo:
    """A small engine's description."""
    facts: dict[str, Any] = {
        "folder": "/models/tiny",
        "num_parameters": 1_235_814_400,
        "dtype": "bfloat16",
        "device": "cpu",
        "kernels": "fake",
        "weights_bytes": 2 << 30,
        "kv_cache_bytes": 1 << 30,
        "num_blocks": 100,
        "block_size": 16,
        "max_model_len": CONTEXT,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 256,
        "vocab_size": 512,
        "eos_token_ids": [END_OF_TURN],
        "load_seconds": 1.5,
        "ranks": [RankShare(2 << 30, 1 << 30, 8, 512)],
        "runtime_bytes": 256 << 20,
    }
    return EngineInfo(**{**facts, **changes})


def outputs(tokens: Sequence[int], *, finish: str = "stop", logprobs: int | None = None) -> list[Output]:
    """One output for each token; the last one finishes."""
    last = len(tokens) - 1
    return [
        Output(
            request_id="",
            token_ids=[token],
            logprobs=None if logprobs is None else [fake_logprobs(token, logprobs)],
            finish_reason=finish if place == last else None,  # type: ignore[arg-type]
        )
        for place, token in enumerate(tokens)
    ]


def fake_logprobs(token: int, top: int) -> TokenLogprobs:
    """Values that name their token."""
    return TokenLogprobs(-token / 1000, [(token + n) % 512 for n in range(top)], [-n / 8 for n in range(top)])


def echo(request: Request) -> list[Output]:
    """The last user text, backwards, then the end of the turn; cut at max_tokens. The prompt's scores come before it,
    in two pieces."""
    text = BYTES_TOKENIZER.decode(request.prompt, skip_special_tokens=False)
    turn = text.split("<|start_header_id|>user<|end_header_id|>\n\n")[-1].split("<|eot_id|>")[0]
    tokens = [*turn.encode()[::-1], END_OF_TURN]
    limit = len(tokens) if request.params.max_tokens is None else request.params.max_tokens
    finish = "length" if limit < len(tokens) else "stop"
    answer = outputs(tokens[:limit], finish=finish, logprobs=request.params.logprobs)
    wanted = request.params.prompt_logprobs
    if wanted is None:
        return answer or [Output(request_id="", finish_reason="length")]
    scored = [fake_logprobs(token, wanted) for token in request.prompt[1:]]
    first = Output(request_id="", prompt_logprobs=scored[:3])
    if not answer:
        return [first, Output(request_id="", prompt_logprobs=scored[3:], finish_reason="length")]
    return [first, Output(request_id="", prompt_logprobs=scored[3:]), *answer]


BYTES_TOKENIZER = Tokenizer(BYTES)


class FakeEngine:
    """AsyncEngine's face. Each output is one step; while `gate` is not set, none is made.

    hold_after: that many outputs of a request, and the gate closes.
    """

    def __init__(self, script: Script = echo, **changes: Any) -> None:
        self.info = info(**changes)
        self.stats = EngineStats(blocks_total=self.info.num_blocks)
        self.error: EngineDeadError | None = None
        self.restarts = 0
        self.num_ranks = 1
        self.script = script
        self.requests: list[Request] = []
        self.aborted: list[str] = []
        self.running: set[str] = set()
        self.closed = 0
        self.kept: bool | None = None
        """Whether it was asked to keep weights when it was closed."""
        self.is_slow_to_keep = False
        self.killed = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()
        self.hold_after: int | None = None
        self._changed = asyncio.Event()
        self._gone = asyncio.Event()
        self._listeners: list[Callable[[Step], None]] = []
        self._draining = False

    @property
    def num_requests(self) -> int:
        return len(self.running)

    def add_stats_listener(self, listener: Callable[[Step], None]) -> None:
        self._listeners.append(listener)

    async def generate(self, request: Request) -> AsyncIterator[Output]:
        if self.error is not None:
            raise self.error
        if self._draining:
            raise EngineDrainingError("the engine is draining")
        check_request(request, self.info)
        self.requests.append(request)
        self._update(self.running.add, request.request_id)
        ended = False
        try:
            for place, scripted in enumerate(self.script(request)):
                if place == self.hold_after:
                    self.gate.clear()
                await asyncio.sleep(0)
                await self.gate.wait()
                if self.error is not None:
                    ended = True
                    raise self.error
                output = _named(scripted, request.request_id)
                ended = output.finish_reason is not None
                self._step(output)
                yield output
        finally:
            self._update(self.running.discard, request.request_id)
            if not ended:
                self.aborted.append(request.request_id)

    async def num_cached(self, prompt: Sequence[int], cache_salt: str) -> int:
        """The whole blocks that the prompt has in common with an earlier one of the same salt."""
        if self.error is not None:
            raise self.error
        check_prompt(prompt, self.info)
        earlier = (request.prompt for request in self.requests if request.cache_salt == cache_salt)
        common = max((_common(prompt[:-1], other) for other in earlier), default=0)
        return common - common % self.info.block_size

    def die(self) -> None:
        """Its processes are gone."""
        self.error = EngineDeadError("the engine died: rank 0 was killed by signal 9")
        self.gate.set()

    def come_back(self) -> None:
        """Others run in their place."""
        self.error = None
        self.restarts += 1
        self.stats = EngineStats(blocks_total=self.info.num_blocks)

    def go(self) -> None:
        """They are gone for good."""
        self.die()
        self._gone.set()

    async def gone(self) -> None:
        await self._gone.wait()

    async def drain(self, timeout: float) -> bool:  # noqa: ASYNC109
        self._draining = True
        try:
            await asyncio.wait_for(self.until(lambda: not self.running), timeout)
        except TimeoutError:
            return False
        return True

    async def close(self, *, keeps: bool = False) -> None:
        self.closed += 1
        self.kept = keeps
        if self.error is None:
            self.error = EngineDeadError("the engine was shut down")
        self.gate.set()
        self._changed.set()
        if keeps and self.is_slow_to_keep:
            await self.killed.wait()

    def kill(self) -> None:
        self.killed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until it holds, looking at every request that comes or goes, and at every step. Raises TimeoutError."""
        async with asyncio.timeout(20):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    def _update(self, change: Callable[[str], None], request_id: str) -> None:
        change(request_id)
        self._changed.set()

    def _step(self, output: Output) -> None:
        old = self.stats
        self.stats = EngineStats(
            num_running=len(self.running) - (output.finish_reason is not None),
            blocks_used=len(self.running),
            blocks_total=self.info.num_blocks,
            steps=old.steps + 1,
            generated_tokens=old.generated_tokens + len(output.token_ids),
            step_seconds=0.01,
            step_tokens=len(output.token_ids),
            step_sequences=1,
        )
        self._changed.set()
        for listener in self._listeners:
            listener(Step([output], self.stats))


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """-> how many tokens both begin with."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _named(output: Output, request_id: str) -> Output:
    return Output(**{name: getattr(output, name) for name in output.__struct_fields__} | {"request_id": request_id})


@dataclass
class Reply:
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    parts: list[bytes] = field(default_factory=list)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """OpenAI's error object; its four keys, no more and no less, are checked here for every test."""
        body = self.json
        assert list(body) == ["error"]
        assert sorted(body["error"]) == ["code", "message", "param", "type"]
        return dict(body["error"])

    @property
    def events(self) -> list[Any]:
        """The events of a stream, parsed; [DONE] as it is."""
        assert self.headers["content-type"].startswith("text/event-stream")
        assert self.body.endswith(b"\n\n")
        lines = self.body.decode().removesuffix("\n\n").split("\n\n")
        assert all(line.startswith("data: ") and "\n" not in line for line in lines)
        return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


class Client:
    """Calls an ASGI application as a server would."""

    def __init__(self, app: Any, service: Service, engine: FakeEngine) -> None:
        self.app = app
        self.service = service
        self.engine = engine

    async def call(
        self,
        method: str,
        path: str,
        body: bytes | Sequence[bytes] = b"",
        *,
        headers: Mapping[str, str] | Sequence[tuple[str, str]] = (),
        leave: asyncio.Event | None = None,
        on_part: Callable[[bytes], None] | None = None,
    ) -> Reply:
        """body: in one part or several. leave: when set, the client has gone. on_part: sees each part of the reply."""
        pairs = headers.items() if isinstance(headers, Mapping) else headers
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in pairs],
            "client": ("127.0.0.1", 1234),
            "server": ("127.0.0.1", 8000),
            "state": {},
        }
        parts = [body] if isinstance(body, bytes) else list(body)
        messages = [
            {"type": "http.request", "body": part, "more_body": place < len(parts) - 1}
            for place, part in enumerate(parts)
        ]
        leave = leave or asyncio.Event()
        reply = Reply()

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop(0)
            await leave.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                assert not reply.status
                reply.status = message["status"]
                reply.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            else:
                reply.parts.append(message["body"])
                reply.body += message["body"]
                if on_part is not None:
                    on_part(message["body"])

        await self.app(scope, receive, send)
        return reply

    async def chat(self, **fields: Any) -> Reply:
        """POST a chat completion; model and messages are there unless they are given."""
        body = {"model": "tiny", "messages": [{"role": "user", "content": "stressed"}], **fields}
        return await self.call("POST", "/v1/chat/completions", json.dumps(body).encode())


def check_grammar(grammar: Grammar) -> None:
    """Refuses what has the word impossible in it."""
    if "impossible" in grammar.text:
        raise InvalidParameterError("this cannot be enforced", "structured_outputs")


def served(engine: FakeEngine, **defaults: Any) -> ServedModel:
    return ServedModel(
        engine=engine,
        tokenizer=BYTES_TOKENIZER,
        template=ChatTemplate(BYTES_TOKENIZER, today=lambda: date(2024, 7, 26)),
        defaults=GenerationDefaults(**defaults),
        check_grammar=check_grammar,
        created=1_700_000_000,
    )
