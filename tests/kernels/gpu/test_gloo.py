"""The GPU's kernels in ranks: processes that share a model over gloo generate what they do on the definitions."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("msgspec", reason="the engine's messages need it, the kernels do not")

PROGRAM = Path(__file__).with_name("gloo_rank.py")
SIZE = 2
SECONDS = 240


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def generated(kernels: str, folder: Path) -> dict[str, list[int]]:
    port = free_port()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), kernels, str(rank), str(SIZE), str(port), str(folder)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(SIZE)
    ]
    try:
        said = [rank.communicate(timeout=SECONDS)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [0] * SIZE
    found: dict[str, list[int]] = json.loads(said[0])
    return found


@pytest.mark.multi
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled in this environment")
def test_the_tokens_are_those_of_the_definitions(
    tmp_path: Path, tiny_llama: Callable[..., dict[str, object]], write_checkpoint: Callable[..., Path]
) -> None:
    folder = write_checkpoint(tmp_path / "tiny", tiny_llama("1b", num_hidden_layers=1), dtype="float32")
    ours = generated("gpu", folder)
    assert ours == generated("reference", folder)
    assert [len(tokens) for tokens in ours.values()] == [6, 6, 6]
