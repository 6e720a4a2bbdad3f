"""The four-host path beside the direct one, in interleaved rounds of one run.

Only ratios between columns of one run mean anything: machines differ, and so do minutes. The direct path is the same
four hosts and three wires, with the kernel forwarding in between.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path as FilePath
from typing import Final, NamedTuple

from enlink.testing.hosts import Host

sys.path.insert(0, str(FilePath(__file__).parents[1] / "examples" / "demo"))
from path import PLACES, Path

LOAD: Final = str(FilePath(__file__).with_name("load.py"))
PORT: Final = "7"
# What the original in Rust reached, beside a direct path on its own machine: for the ratios only.
ORIGINAL: Final = {
    "up_mbit_s": (184, 7377),
    "down_mbit_s": (166, 7271),
    "round_trip_p50_us": (411, 31),
    "round_trip_p99_us": (2737, 79),
    "loaded_round_trip_p50_us": (15200, 30),
    "connections_per_s": (14, 1596),
}


class Course(NamedTuple):
    """Where a load runs: from which host, to which address."""

    client: Host
    address: str


@contextmanager
def through_eng() -> Iterator[Course]:
    """The path: captured, four programs, replayed."""
    with Path(capture=[PORT], replay=[PORT]) as path:
        path.start()
        with path.running("server", sys.executable, LOAD, "serve", PORT):
            yield Course(path.hosts["app"], "1.1.1.1")


@contextmanager
def direct() -> Iterator[Course]:
    """The same hosts and wires without the programs: the kernels forward."""
    with Path() as path:
        app, near, far, server = (path.hosts[place] for place in PLACES)
        near.run("ip", "route", "add", "10.81.3.0/24", "via", "10.81.2.2")
        far.run("ip", "route", "add", "10.81.1.0/24", "via", "10.81.2.1")
        for gateway in (near, far):
            gateway.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
        with path.running("server", sys.executable, LOAD, "serve", PORT):
            yield Course(app, "10.81.3.2")
        del server


def run(*, rounds: int, seconds: float) -> None:
    """Measure, and print a table and, as the last line, JSON."""
    results: dict[str, list[dict[str, float]]] = {"eng": [], "direct": []}
    with ExitStack() as stack:
        courses = {"eng": stack.enter_context(through_eng()), "direct": stack.enter_context(direct())}
        for _ in range(rounds):
            for name, course in courses.items():
                argv = (sys.executable, LOAD, "measure", course.address, PORT, str(seconds))
                results[name].append(json.loads(course.client.run(*argv)))
    _print_table(results)
    print(json.dumps({"machine": platform.platform(), "rounds": rounds, "seconds": seconds, "results": results}))


def _print_table(results: dict[str, list[dict[str, float]]]) -> None:
    print(f"{'':26}{'eng':>10}{'direct':>10}{'eng/direct':>12}{'original/direct':>17}")
    for figure, (original, original_direct) in ORIGINAL.items():
        eng, direct_ = (statistics.median(round_[figure] for round_ in results[name]) for name in ("eng", "direct"))
        print(f"{figure:26}{eng:10.0f}{direct_:10.0f}{eng / direct_:12.3f}{original / original_direct:17.3f}")
