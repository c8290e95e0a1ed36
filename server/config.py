"""ServerConfig: what the HTTP server is told at start. Holds the EngineConfig; frozen, as that is.

Knows no argument parser: `cli` reads the flags, their help and their environment variables from the declarations.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from pronk.engine.config import EngineConfig, option
from pronk.engine.errors import ConfigError

LOG_LEVELS = ("debug", "info", "warning", "error")
MAX_BODY_BYTES = 8 << 20
EMBEDDED_MODEL = "cria"
# As browsers write it: no path, not even a slash. Extensions have schemes of their own, and a local file is "null".
_ORIGIN = re.compile(r"null|[a-z][a-z0-9+.-]*://[^/\s,]+")


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Everything that `pronk serve` is told."""

    host: str = option(
        "127.0.0.1", "address to listen on; 0.0.0.0 for every network of this machine", flag="--host", metavar="ADDRESS"
    )
    port: int = option(8000, "port to listen on; 0 takes a free one", flag="--port")
    api_keys: tuple[str, ...] = option(
        (),
        "keys that clients must show, separated by commas; each key has a prefix cache of its own (default: no key)",
        flag="--api-key",
        metavar="KEY[,KEY]",
    )
    served_model_names: tuple[str, ...] = option(
        (),
        "names under which clients ask for the model, separated by commas (default: the Hub id, or the folder's name)",
        flag="--served-model-name",
        metavar="NAME[,NAME]",
    )
    allowed_origins: tuple[str, ...] = option(
        (),
        "origins of web pages that may ask, separated by commas, as in http://localhost:3000; * for every page "
        "(default: none)",
        flag="--allowed-origins",
        metavar="ORIGIN[,ORIGIN]",
    )
    max_waiting: int = option(
        1024,
        "requests that may wait for their first token, each answer that one asks for counted; another gets 429 and "
        "is told to come again",
        flag="--max-waiting",
    )
    keep_alive: float = option(
        15.0,
        "seconds after which a stream that has nothing to say sends a comment, so that nothing on the way closes it; "
        "0 sends none",
        flag="--keep-alive",
        metavar="SECONDS",
    )
    stream_timeout: float = option(
        300.0,
        "seconds after which a client that has an answer waiting for it and reads nothing of it is dropped",
        flag="--stream-timeout",
        metavar="SECONDS",
    )
    shutdown_timeout: float = option(
        60.0,
        "seconds that running requests have to finish after Ctrl-C or SIGTERM",
        flag="--shutdown-timeout",
        metavar="SECONDS",
    )
    max_stored_responses: int = option(
        1000,
        "responses of /v1/responses that are kept in memory, for an hour at most and in 64 MiB at most, so that they "
        "can be had again and gone on from; 0 keeps none",
        flag="--max-stored-responses",
    )
    log_level: str = option("info", "least severity that is logged", flag="--log-level", choices=LOG_LEVELS)
    engine: EngineConfig = field(default_factory=EngineConfig)
    max_body_bytes: int = MAX_BODY_BYTES
    """A longer request body is refused with 413, while it is being read. Not a flag."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port {self.port}: choose one from 1 to 65535, or 0 for a free one")
        if not 0 <= self.shutdown_timeout <= 86400:
            raise ConfigError(f"--shutdown-timeout {self.shutdown_timeout:g}: choose 0 to 86400 seconds")
        for origin in self.allowed_origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ConfigError(f"--allowed-origins {origin}: write http://HOST or http://HOST:PORT, or *")
        if self.max_waiting < 1:
            raise ConfigError(f"--max-waiting {self.max_waiting}: choose 1 or more")
        if not 0 <= self.keep_alive <= 3600:
            raise ConfigError(f"--keep-alive {self.keep_alive:g}: choose 0 to 3600 seconds")
        if not 1 <= self.stream_timeout <= 86400:
            raise ConfigError(f"--stream-timeout {self.stream_timeout:g}: choose 1 to 86400 seconds")
        if self.max_stored_responses < 0:
            raise ConfigError(f"--max-stored-responses {self.max_stored_responses}: choose 0 or more")
        if self.log_level not in LOG_LEVELS:
            raise ConfigError(f"--log-level {self.log_level}: choose one of {', '.join(LOG_LEVELS)}")
        if any(not key.strip() for key in self.api_keys):
            raise ConfigError("--api-key holds an empty key: write keys separated by single commas")
        if any(not name.strip() for name in self.served_model_names):
            raise ConfigError("--served-model-name holds an empty name: write names separated by single commas")

    @property
    def model_names(self) -> tuple[str, ...]:
        """The names that clients may ask for; answers carry the first. Never a path: a folder gives its last part."""
        if self.served_model_names:
            return self.served_model_names
        model = self.engine.model
        if not model:
            return (EMBEDDED_MODEL,)
        folder = Path(model).expanduser()
        return (folder.resolve().name or EMBEDDED_MODEL,) if folder.exists() else (model,)
