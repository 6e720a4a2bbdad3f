"""``./dev bench [path|streams|relay|half-close] [--quick]``: each part beside what it compares with."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

from bench import four_hosts, half_close, relays, streams


def main() -> int:
    """Measure one part, or both; each prints a table and, as its last line, JSON."""
    parser = argparse.ArgumentParser("bench", description=__doc__)
    parser.add_argument(
        "part", nargs="?", choices=("path", "streams", "relay", "half-close"), help="measure this one only"
    )
    parser.add_argument("--quick", action="store_true", help="one short round of each, under a minute")
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--seconds", type=float, default=None, help="for each figure of the relay")
    options = parser.parse_args()
    if options.part == "half-close":
        half_close.run()
        return 0
    if options.part in (None, "path"):
        four_hosts.run(rounds=1 if options.quick else options.rounds or 5, seconds=1.0 if options.quick else 3.0)
    if options.part in (None, "streams"):
        streams.run(rounds=1 if options.quick else options.rounds or 5, seconds=0.3 if options.quick else 1.0)
    if options.part in (None, "relay"):
        size = relays.QUICK if options.quick else relays.FULL
        size = replace(size, rounds=options.rounds or size.rounds, seconds=options.seconds or size.seconds)
        relays.run(size)
    return 0


if __name__ == "__main__":
    sys.exit(main())
