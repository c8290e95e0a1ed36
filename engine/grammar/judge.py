"""Whether a grammar can be used, found out in a process of its own, so that none can hold up or bring down others.

The library reads a grammar in one call that nothing can interrupt, and one that is made for it takes minutes or
overflows the stack. A judge reads it first, with a timer that ends the process; who asked learns that
from the end of the pipe, and the next grammar gets a new judge.

    python -m pronk.engine.grammar      requests on stdin, verdicts on stdout, ends with its stdin
"""

from __future__ import annotations

import hashlib
import resource
import signal
import struct
import subprocess
import sys
import threading
import traceback
import weakref
from collections import OrderedDict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import IO, TypeVar

import msgspec

from pronk.engine.errors import InvalidParameterError, PronkError
from pronk.engine.grammar.deep import JUDGE_STACK, run_deep
from pronk.engine.grammar.notation import require_text, translate
from pronk.engine.grammar.schema import PARAM
from pronk.engine.grammar.shortest import ByteTokenizer, first_completion, start
from pronk.engine.request import Grammar
from pronk.engine.tokenizer import Vocabulary

SECONDS = 0.5
"""Of processor time for one grammar: on an idle machine, its answer within a second."""
_MEMORY = 2 << 30
"""Bytes of addresses."""
NUM_JUDGES = 2
"""How many grammars are judged at once; more wait."""
_NUM_REMEMBERED = 1024

_Message = TypeVar("_Message")
_HEADER = struct.Struct("<I")


class Briefing(msgspec.Struct, frozen=True):
    """What a judge must know."""

    special_tokens: dict[str, int]
    eos_token_ids: list[int]
    seconds: float
    """Of processor time for one grammar."""


class Verdict(msgspec.Struct, frozen=True):
    """refusal: what is wrong with the grammar; None when it can be used. fault: what went wrong with the judge."""

    refusal: str | None = None
    fault: str | None = None


class Judges:
    """A few processes that judge grammars, started when they are first needed. May be shared by threads."""

    def __init__(self, vocabulary: Vocabulary, eos_token_ids: Collection[int], seconds: float = SECONDS) -> None:
        """seconds: of processor time for one grammar."""
        self._briefing = Briefing(dict(vocabulary.special_tokens), list(eos_token_ids), seconds)
        self._lock = threading.Lock()
        self._free: list[subprocess.Popen[bytes]] = []
        self._places = threading.BoundedSemaphore(NUM_JUDGES)
        self._accepted: OrderedDict[bytes, None] = OrderedDict()
        self._finalizer = weakref.finalize(self, _end_all, self._free)

    def knows(self, grammar: Grammar) -> bool:
        """Whether it was accepted lately, so that `check` returns at once."""
        key = _key(grammar)
        with self._lock:
            known = key in self._accepted
            if known:
                self._accepted.move_to_end(key)
        return known

    def check(self, grammar: Grammar) -> None:
        """Raises InvalidParameterError for a grammar that cannot be used."""
        require_text(grammar)
        if self.knows(grammar):
            return
        with self._places:
            refusal = self._ask(grammar)
        if refusal is not None:
            raise InvalidParameterError(refusal, PARAM)
        with self._lock:
            self._accepted[_key(grammar)] = None
            while len(self._accepted) > _NUM_REMEMBERED:
                self._accepted.popitem(last=False)

    def close(self) -> None:
        """End the processes. Another check would start new ones."""
        with self._lock:
            _end_all(self._free)

    def _ask(self, grammar: Grammar) -> str | None:
        with self._judge() as judge:
            pipe, answers = judge.stdin, judge.stdout
            if pipe is None or answers is None:
                return None
            try:
                _write(pipe, grammar)
                verdict = _read(answers, Verdict)
            except OSError:
                verdict = None
            if verdict is not None and verdict.fault is not None:
                raise PronkError(f"A grammar could not be judged: {verdict.fault}")
            if verdict is not None:
                return verdict.refusal
            code = judge.wait()
        if code == -signal.SIGPROF:
            return "The grammar takes too long to read; use a simpler one."
        return "The grammar is nested too deeply, or too large, to be read; use a simpler one."

    @contextmanager
    def _judge(self) -> Iterator[subprocess.Popen[bytes]]:
        with self._lock:
            judge = self._free.pop() if self._free else None
        if judge is None or judge.poll() is not None:
            judge = self._start()
        try:
            yield judge
        except BaseException:
            judge.kill()
            judge.wait()
            raise
        with self._lock:
            if judge.poll() is None:
                self._free.append(judge)
            else:
                _end(judge)

    def _start(self) -> subprocess.Popen[bytes]:
        judge = subprocess.Popen(
            [sys.executable, "-m", __package__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # what the library says when it gives up
            start_new_session=True,
        )
        if judge.stdin is not None:
            _write(judge.stdin, self._briefing)
        return judge


def _key(grammar: Grammar) -> bytes:
    return hashlib.sha256(f"{grammar.kind} {grammar.text}".encode(errors="surrogatepass")).digest()


def _end_all(judges: list[subprocess.Popen[bytes]]) -> None:
    while judges:
        _end(judges.pop())


def _end(judge: subprocess.Popen[bytes]) -> None:
    judge.kill()
    judge.wait()
    for pipe in (judge.stdin, judge.stdout):
        if pipe is not None:
            pipe.close()


def _write(pipe: IO[bytes], message: msgspec.Struct) -> None:
    data = msgspec.msgpack.encode(message)
    pipe.write(_HEADER.pack(len(data)) + data)
    pipe.flush()


def _read(pipe: IO[bytes], kind: type[_Message]) -> _Message | None:
    """None at the end of the pipe."""
    header = pipe.read(_HEADER.size)
    if len(header) < _HEADER.size:
        return None
    (size,) = _HEADER.unpack(header)
    data = pipe.read(size)
    return msgspec.msgpack.decode(data, type=kind) if len(data) == size else None


def judge(grammar: Grammar, in_bytes: ByteTokenizer) -> Verdict:
    """Read a grammar, as `compile` will."""
    try:
        notation = translate(grammar)
        state = start(in_bytes.tokenizer, notation.text)
        if first_completion(state, notation) is None:
            return Verdict("No text was found that satisfies the grammar and is short enough: it may have none.")
    except InvalidParameterError as error:
        return Verdict(str(error))
    except MemoryError:
        return Verdict("The grammar takes too much memory; use a simpler one.")
    except Exception:  # noqa: BLE001  told to whoever asked, who raises it
        return Verdict(fault=traceback.format_exc())
    return Verdict()


def _serve() -> None:
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    briefing = _read(requests, Briefing)
    if briefing is None:
        return
    in_bytes = ByteTokenizer(Vocabulary((), briefing.special_tokens), briefing.eos_token_ids)
    while (grammar := _read(requests, Grammar)) is not None:
        # Nobody handles SIGPROF: it ends the process, inside the library too.
        signal.setitimer(signal.ITIMER_PROF, briefing.seconds)
        verdict = judge(grammar, in_bytes)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _write(answers, verdict)


def main() -> None:
    """The judge's process."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C on the terminal is the server's business
    run_deep(_serve, JUDGE_STACK)
