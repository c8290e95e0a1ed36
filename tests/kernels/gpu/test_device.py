"""What the GPU set does not run on is refused at once, in one sentence that says what to do."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from pronk.kernels import for_device, gpu, interpreter
from pronk.kernels.gpu import device as devices
from pronk.kernels.gpu import vendor


def test_a_dtype_that_is_none(device: str) -> None:
    assert "bfloat16" in gpu.describe(torch.bfloat16)
    with pytest.raises(ValueError, match="no float64: choose --dtype bfloat16, float16, float32"):
        gpu.describe(torch.float64)


def test_this_device_will_do(device: str) -> None:
    gpu.check_device()
    assert for_device("cuda") is gpu
    assert for_device("cuda", vendor_products=True) is vendor


@pytest.mark.parametrize(
    ("capability", "message"),
    [
        (None, "need an NVIDIA GPU that torch sees"),
        ((7, 5), "T4 has compute capability 7.5, .* need 8.0"),
        ((8, 0), ""),
    ],
)
def test_a_device_that_will_not_do(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None, message: str
) -> None:
    monkeypatch.setattr(interpreter, "installed", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "T4")
    monkeypatch.setattr(devices, "start_driver", lambda: None)
    if not message:
        gpu.check_device()
        return
    with pytest.raises(ValueError, match=f"{message}.*--device cpu"):
        gpu.check_device()


@pytest.mark.parametrize("error", [RuntimeError("Failed to find C compiler"), subprocess.CalledProcessError(1, "gcc")])
def test_a_machine_without_a_compiler(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(interpreter, "installed", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(devices, "start_driver", fail)
    with pytest.raises(ValueError, match=r"apt install gcc .* or choose --device cpu"):
        gpu.check_device()


def test_without_triton(compiling: dict[str, str]) -> None:
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "from pronk.kernels import for_device; for_device('cpu'); import pronk.kernels.gpu"
    )
    run = subprocess.run([sys.executable, "-c", program], env=compiling, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1
    assert "the GPU kernels need Triton: pip install 'triton>=3.6', or choose --device cpu" in run.stderr
