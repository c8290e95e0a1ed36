"""Where the tests of kernels/gpu run: on a CUDA device if there is one, else in Triton's interpreter.

A process has one of the two, since a kernel is interpreted or compiled from its definition on. Tests here import
nothing but torch, triton, numpy, pytest and pronk.kernels, so that a GPU machine needs no more. All of it is
`pytest -m gpu`; where pytest is bare, without the plugins that pyproject.toml sets up, these tests are

    pytest -o addopts= --import-mode=importlib -W ignore::pytest.PytestConfigWarning -m gpu tests/kernels/gpu
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import torch

from pronk.kernels import interpreter


def pytest_configure(config: pytest.Config) -> None:
    """Fresh memory is filled in torch's deterministic mode alone, which warns of some of torch's own operations."""
    config.addinivalue_line("filterwarnings", "ignore:.*does not have a deterministic implementation:UserWarning")


if torch.cuda.is_available():
    # Without it torch's own products warn in that mode too.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
else:
    interpreter.install()


@pytest.fixture(params=[pytest.param("cpu", id="interpreter"), pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where a test's tensors live."""
    name: str = request.param
    if name == "cpu" and torch.cuda.is_available():
        pytest.skip("the kernels run on the GPU in this process")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    return name


@pytest.fixture(scope="session")
def compiling() -> dict[str, str]:
    """The environment of another process in which kernels are compiled, not interpreted."""
    environment = {key: value for key, value in os.environ.items() if key != interpreter.VARIABLE}
    return environment | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan() -> Iterator[None]:
    """torch fills what it allocates with NaN, or the largest integer, in this mode: what a kernel leaves out shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small products are slower with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
