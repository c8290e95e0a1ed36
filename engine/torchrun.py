"""Position: what torchrun tells a process of the group that it starts on several hosts. Reads an environment.

Knows the variables, and what is wrong with them; opens nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pronk.engine.errors import ConfigError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True)
class Position:
    """One rank among those that torchrun started."""

    rank: int
    size: int
    neighbours: int
    """Ranks on this host, this one included. Every host has as many, so the rank counts on from host to host."""
    host: str
    port: int
    """Where the store is, by which ranks find each other."""
    has_store: bool = True
    """Whether torchrun keeps the store; else rank 0 does."""
    round: str = "0"
    """Differs each time that torchrun starts the group, so that nobody finds what the last one left in the store."""

    @property
    def local_rank(self) -> int:
        """This one's number among its neighbours."""
        return self.rank % self.neighbours


def position_of(environment: Mapping[str, str]) -> Position | None:
    """-> where this process stands, or None where torchrun did not start it. Raises ConfigError."""
    if not all(environment.get(name) for name in VARIABLES):
        return None
    rank, size, local_rank, neighbours, port = (
        _number(environment, name) for name in VARIABLES if name != "MASTER_ADDR"
    )
    if neighbours < 1 or size % neighbours or local_rank != rank % neighbours:
        raise ConfigError(
            f"RANK={rank}, LOCAL_RANK={local_rank}, LOCAL_WORLD_SIZE={neighbours}: give torchrun the same "
            "--nproc-per-node on each host, and no --virtual-local-rank"
        )
    return Position(
        rank=rank,
        size=size,
        neighbours=neighbours,
        host=environment["MASTER_ADDR"],
        port=port,
        has_store=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        round=environment.get("TORCHELASTIC_RESTART_COUNT", "0"),
    )


def _number(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except ValueError:
        raise ConfigError(f"{name} {environment[name]!r}: torchrun sets it to a whole number") from None
