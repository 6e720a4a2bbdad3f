"""Spans of time as people write them in options and configuration files. Does no I/O."""

from __future__ import annotations

import re
from typing import Final

from enlink.errors import UsageError

# A choice of ours: more is no moment, and within it a processor does nothing else.
MAX_SPIN_S: Final = 0.01

_DURATION = re.compile(r"(?P<number>[0-9]{1,9}(?:\.[0-9]{1,3})?)(?P<unit>us|ms|s|m|h)?")
_UNIT_S = {"us": 0.000_001, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, None: 1.0}


def parse_duration_s(text: str) -> float:
    """Parse a duration such as ``10s``, ``500ms``, ``200us``, ``5m`` or ``1h``; a bare number is seconds.

    Raises:
        UsageError: anything else.
    """
    match = _DURATION.fullmatch(text)
    if match is None:
        raise UsageError(f"{text!r} is no duration: write a number and us, ms, s, m or h, as in 10s")
    return float(match["number"]) * _UNIT_S[match["unit"]]


def parse_spin_s(text: str) -> float:
    """Parse how long to spin: a duration of 10 ms at most; none is to spin not at all.

    Raises:
        UsageError: anything else.
    """
    seconds = parse_duration_s(text)
    if seconds > MAX_SPIN_S:
        raise UsageError(f"{text!r} is too long to spin: write at most 10ms, or as in 200us")
    return seconds
