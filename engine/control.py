"""The messages between the server's process and the host's: start a group, end it, and how it ended.

Framed as those of `wire` are. Knows processes; no model and no request.
"""

from __future__ import annotations

import msgspec


class StartGroup(msgspec.Struct, frozen=True, tag="start_group"):
    """Fork the ranks of a group. Beside the frame goes one file descriptor: rank 0's end of the link to the server.

    Answered by GroupStarted, and some day by GroupEnded. There is one group at a time.
    """

    size: int
    start_timeout: float
    """Seconds without a beat after which a rank that is starting counts as hung."""


class StopGroup(msgspec.Struct, frozen=True, tag="stop_group"):
    """Kill every rank at once. Answered by GroupEnded; without a group, by nothing."""


class GroupStarted(msgspec.Struct, frozen=True, tag="group_started"):
    """The processes run; what they can do, rank 0 says over its link."""

    pids: list[int]
    """By rank."""


class GroupEnded(msgspec.Struct, frozen=True, tag="group_ended"):
    """No process of the group is left."""

    rank: int
    """The one that ended first, or was hung, or 0 when none was at fault."""
    reason: str
    """One part of a sentence that names the rank: "rank 1 was killed by signal 9"."""


ToHost = StartGroup | StopGroup
FromHost = GroupStarted | GroupEnded
