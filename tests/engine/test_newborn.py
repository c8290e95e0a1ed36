"""A process that was started early is taken by somebody, or gone."""

from __future__ import annotations

import socket

import psutil

from pronk.engine.newborn import Newborn

ECHO = (
    "-c",
    "import socket, sys; s = socket.socket(fileno=int(sys.argv[1]))\nwhile data := s.recv(100): s.sendall(data)",
)


def test_who_takes_it_talks_to_it() -> None:
    newborn = Newborn(ECHO)
    process, connection = newborn.take()
    newborn.end()  # no longer its business
    with connection:
        connection.sendall(b"hello")
        assert connection.recv(100) == b"hello"
        connection.shutdown(socket.SHUT_WR)
        assert process.wait() == 0


def test_where_nobody_takes_it_it_is_gone() -> None:
    newborn = Newborn(ECHO)
    (child,) = [each for each in psutil.Process().children() if ECHO[1] in each.cmdline()]
    newborn.end()
    assert not child.is_running()
