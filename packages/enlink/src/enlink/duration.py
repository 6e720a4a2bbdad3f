"""Spans of time as people write them in options and configuration files. Does no I/O."""

from __future__ import annotations

import re

from enlink.errors import UsageError

_DURATION = re.compile(r"(?P<number>[0-9]{1,9}(?:\.[0-9]{1,3})?)(?P<unit>ms|s|m|h)?")
_UNIT_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, None: 1.0}


def parse_duration_s(text: str) -> float:
    """Parse a duration such as ``10s``, ``500ms``, ``5m`` or ``1h``; a bare number is seconds.

    Raises:
        UsageError: anything else.
    """
    match = _DURATION.fullmatch(text)
    if match is None:
        raise UsageError(f"{text!r} is no duration: write a number and ms, s, m or h, as in 10s")
    return float(match["number"]) * _UNIT_S[match["unit"]]
