"""The host's process from its start until somebody talks to it.

It takes a second until it can fork, most of which is the import of torch; so it is started before the server imports
what it serves with. Imports little; knows how the process is started, and nothing of what is said to it.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence

PROGRAM = ("-m", "pronk.engine.host")


class Newborn:
    """A process that somebody is to take; whoever starts it ends it where nobody does."""

    def __init__(self, program: Sequence[str] = PROGRAM) -> None:
        """program: Python's arguments. Raises OSError where no process can be started."""
        self._connection, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, *program, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={
                    # A thread that spins while it waits for others keeps the core that they, or this process, need.
                    "OMP_WAIT_POLICY": "PASSIVE",
                    **os.environ,
                    # Started by numpy when it is imported, and the process must have one thread when it forks.
                    "OPENBLAS_NUM_THREADS": "1",
                },
                # A Ctrl-C on the terminal is the server's to answer: it drains, then tells the engine.
                start_new_session=True,
            )
        self.is_taken = False

    def take(self) -> tuple[subprocess.Popen[bytes], socket.socket]:
        """-> the process, and the connection to it; they are the caller's to end."""
        self.is_taken = True
        return self._process, self._connection

    def end(self) -> None:
        """Where nobody has taken it, it is gone when this returns."""
        if not self.is_taken:
            self._connection.close()
            self._process.kill()
            self._process.wait()
