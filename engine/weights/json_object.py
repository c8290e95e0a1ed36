"""One JSON object of a checkpoint, read with suspicion: every mistake in it names the file and the key.

It knows nothing of what the keys mean. A key that holds `null` counts as missing, as it does for those who write such
files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pronk.engine.errors import CheckpointFormatError, CheckpointNotFoundError


@dataclass(frozen=True)
class JsonObject:
    """path: the file. values: the object. prefix: what stands before a key in messages, "rope_scaling." for one."""

    path: Path
    values: Mapping[str, Any]
    prefix: str = ""

    @classmethod
    def read(cls, path: Path) -> JsonObject:
        """Raises CheckpointNotFoundError where there is no such file, CheckpointFormatError where it is no object."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise CheckpointNotFoundError(f"{path} does not exist") from error
        except OSError as error:
            raise CheckpointNotFoundError(f"{path} cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise CheckpointFormatError(f"{path} is damaged: it is not JSON ({error}); fetch it again") from error
        if not isinstance(values, dict):
            raise CheckpointFormatError(f"{path} is damaged: it holds no JSON object; fetch it again")
        return cls(path, values)

    def get(self, key: str) -> Any:
        """The value as JSON gave it, or None."""
        return self.values.get(key)

    def has(self, key: str) -> bool:
        return self.get(key) is not None

    def error(self, key: str, problem: str) -> CheckpointFormatError:
        """An error, to be raised by the caller, that names the file and the key."""
        return CheckpointFormatError(f"{self.path}: {self.prefix}{key} {problem}")

    def require(self, key: str) -> Any:
        if not self.has(key):
            raise self.error(key, "is missing")
        return self.get(key)

    def integer(self, key: str) -> int:
        value = self.require(key)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.error(key, f"is {value!r}: it must be a whole number")
        return value

    def number(self, key: str) -> float:
        value = self.require(key)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            raise self.error(key, f"is {value!r}: it must be a finite number")
        return float(value)

    def flag(self, key: str, *, default: bool) -> bool:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, f"is {value!r}: it must be true or false")
        return value

    def text(self, key: str, *, default: str) -> str:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.error(key, f"is {value!r}: it must be a string")
        return value

    def integers(self, key: str) -> tuple[int, ...]:
        """One whole number or a list of them; () when the key is missing."""
        value = self.get(key)
        listed = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) for item in listed):
            raise self.error(key, f"is {value!r}: it must be a whole number or a list of them")
        return tuple(listed)

    def child(self, key: str) -> JsonObject | None:
        """The object under `key`, or None when the key is missing."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(key, f"is {value!r}: it must be an object")
        return JsonObject(self.path, value, f"{self.prefix}{key}.")
