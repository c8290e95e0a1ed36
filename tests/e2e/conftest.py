"""What the end-to-end tests share: a tiny random model, and a server of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .serving import Server


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, write_checkpoint: Any, tiny_llama: Any) -> Path:
    folder: Path = write_checkpoint(tmp_path_factory.mktemp("model") / "tiny", tiny_llama("1b"))
    return folder


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    """Shared by the tests that leave it as it was."""
    running = Server(model)
    yield running
    running.end()


@pytest.fixture
def own_server(model: Path) -> Iterator[Server]:
    """For a test that ends it or breaks it."""
    running = Server(model)
    yield running
    running.end()
