"""What this process takes of memory beside the weights and the KV cache: the interpreter, torch, code, vocabulary,
buffers. It is measured, as nobody could count it; on Linux only. Knows no model.
"""

from __future__ import annotations

from pathlib import Path

STATUS = Path("/proc/self/status")
OWN = ("RssAnon:", "RssFile:")
"""Not RssShmem: that is the KV cache, as far as it has been written, and memory that ranks share."""


def runtime_bytes(weights_bytes: int) -> int | None:
    """weights_bytes: of weights that lie in this process's memory. -> what is resident beside them and the KV cache,
    code that other processes share included; None where the system does not tell."""
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith(OWN)]
    return max(sum(found) - weights_bytes, 0) if len(found) == len(OWN) else None
