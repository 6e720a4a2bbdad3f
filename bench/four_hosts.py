"""The four-host path, with plain and with attested links, beside four socat and beside nothing but the kernels.

Interleaved rounds of one run: only ratios between its columns mean anything, since machines differ, and so do minutes.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path as FilePath
from typing import Final, NamedTuple

from enlink.testing.hosts import Host

sys.path.insert(0, str(FilePath(__file__).parents[1] / "examples" / "demo"))
sys.path.insert(0, str(FilePath(__file__).parents[1] / "tests" / "native"))
import standin
from attested import attested_path
from path import GATEWAY_OF_APP, PEER_GATEWAY, PLACES, Path, Place

from bench.streams import make_certificate

LOAD: Final = str(FilePath(__file__).with_name("load.py"))
PORT: Final = "7"
BEHIND: Final = "7007"  # the server, where something else has the port
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
def through_eng(path: Path) -> Iterator[Course]:
    """The path: captured, four programs, replayed."""
    with path:
        path.start()
        with path.running("server", sys.executable, LOAD, "serve", PORT):
            yield Course(path.hosts["app"], "1.1.1.1")


@contextmanager
def through_attested() -> Iterator[Course]:
    """The same with attested links, by the tests' stand-in for librats_tls, which encrypts as that does."""
    with tempfile.TemporaryDirectory(prefix="eng-bench-") as directory:
        library = standin.build(FilePath(directory) / "rats-tls")
        with through_eng(attested_path(library, FilePath(directory), capture=[PORT], replay=[PORT])) as course:
            yield course


@contextmanager
def through_socat(*, is_encrypted: bool) -> Iterator[Course]:
    """The same hosts, each with a socat that passes connections on, which have to be made to it.

    Encrypted, the three of them between the hosts are TLS, with no questions asked.
    """
    onward: dict[Place, str] = {
        "app": f"{GATEWAY_OF_APP}:{PORT}",
        "near": f"{PEER_GATEWAY}:{PORT}",
        "far": f"10.81.3.2:{PORT}",
        "server": f"127.0.0.1:{BEHIND}",
    }
    with Path() as path, ExitStack() as stack:
        pem = make_certificate(path.directory)
        for place, address in onward.items():
            listen, dial = f"TCP-LISTEN:{PORT},fork,reuseaddr,nodelay", f"TCP:{address},nodelay"
            if is_encrypted and place != "app":
                listen = f"OPENSSL-LISTEN:{PORT},fork,reuseaddr,nodelay,verify=0,cert={pem}"
            if is_encrypted and place != "server":
                dial = f"OPENSSL:{address},nodelay,verify=0"
            stack.enter_context(path.running(place, "socat", listen, dial, ready=None))
        stack.enter_context(path.running("server", sys.executable, LOAD, "serve", BEHIND))
        time.sleep(1)  # socat does not say when it listens
        yield Course(path.hosts["app"], "127.0.0.1")


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
    with ExitStack() as stack:
        courses = {
            "eng": stack.enter_context(through_eng(Path(capture=[PORT], replay=[PORT]))),
            "attested": stack.enter_context(through_attested()),
            "4 socat": stack.enter_context(through_socat(is_encrypted=False)),
            "socat TLS": stack.enter_context(through_socat(is_encrypted=True)),
            "direct": stack.enter_context(direct()),
        }
        results: dict[str, list[dict[str, float]]] = {name: [] for name in courses}
        for _ in range(rounds):
            for name, course in courses.items():
                argv = (sys.executable, LOAD, "measure", course.address, PORT, str(seconds))
                results[name].append(json.loads(course.client.run(*argv)))
    _print_table(results)
    print(json.dumps({"machine": platform.platform(), "rounds": rounds, "seconds": seconds, "results": results}))


def _print_table(results: dict[str, list[dict[str, float]]]) -> None:
    print(f"{'':26}", *(f"{name:>10}" for name in results), f"{'eng/direct':>12}{'original/direct':>17}", sep="")
    for figure, (original, original_direct) in ORIGINAL.items():
        medians = [statistics.median(round_[figure] for round_ in rounds) for rounds in results.values()]
        cells = "".join(f"{median:10.0f}" for median in medians)
        print(f"{figure:26}{cells}{medians[0] / medians[-1]:12.3f}{original / original_direct:17.3f}")
