"""String formats whose patterns are ours: the grammar library's let through a 29 February of any year and a second 60
at any time of day (RFC 3339, sections 5.6 and 5.7). Seconds stop at 59 here, and years begin at 1.
"""

from __future__ import annotations

_BY_FOUR = "(0[48]|[2468][048]|[13579][26])"  # two digits, not 00, that four divides
_YEAR = "([0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"
_LEAP_YEAR = f"([0-9]{{2}}{_BY_FOUR}|{_BY_FOUR}00)"
_MONTH_DAY = "((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8]))"
_DATE = f"({_YEAR}-{_MONTH_DAY}|{_LEAP_YEAR}-02-29)"
_HOUR_MINUTE = "([01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = rf"{_HOUR_MINUTE}:[0-5][0-9](\.[0-9]{{1,9}})?(Z|[+-]{_HOUR_MINUTE})"

PATTERNS = {"date": f"^{_DATE}$", "time": f"^{_TIME}$", "date-time": f"^{_DATE}T{_TIME}$"}
"""format -> a pattern that only its values match."""

ENFORCED = frozenset({*PATTERNS, "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"})
"""Formats of strings that are enforced."""

INTEGERS = {"int32": (-(2**31), 2**31 - 1), "int64": (-9 * 10**18, 9 * 10**18)}
"""OpenAPI's formats of integers -> the least and the largest that is written. Those of 64 bits are a little fewer than
there are: the grammar library has no bounds so near to what it counts in itself."""

FLOATS = frozenset({"float", "double"})
"""OpenAPI's formats of numbers, which say how one is kept; any JSON number can be."""
