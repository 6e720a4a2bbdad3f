"""The relay beside its peers and beside a connection without any, in interleaved rounds of one run.

All of them listen in one network namespace and lead to one server. The direct connection is that server's own port.
Only columns of one run compare: machines differ, and so do minutes.
"""

from __future__ import annotations

import json
import math
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from enlink.testing.hosts import Host, Network

from bench.processes import Load, cpu_s, descendants, memory_bytes

TRAFFIC: Final = str(Path(__file__).with_name("traffic.py"))
HAPROXY: Final = Path(__file__).with_name("haproxy.cfg")
DEADLINE_S: Final = 60.0
MANY: Final = 64

Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Size:
    """How long a run measures."""

    rounds: int
    seconds: float
    held: int


FULL: Final = Size(rounds=9, seconds=1.0, held=1000)
QUICK: Final = Size(rounds=2, seconds=0.3, held=200)


@dataclass(frozen=True, slots=True)
class Peer:
    """Something that relays from *port* to *target*, and the program that it needs."""

    name: str
    program: str
    argv: tuple[str, ...]

    def command(self, port: int, target: int, directory: Path) -> list[str]:
        """The command line, with its configuration written."""
        configuration = directory / "haproxy.cfg"
        if self.program == "haproxy":
            configuration.write_text(HAPROXY.read_text().format(bind=f"127.0.0.1:{port}", target=f"127.0.0.1:{target}"))
        return [word.format(port=port, target=target, configuration=configuration) for word in self.argv]


@dataclass(frozen=True, slots=True)
class Course:
    """Where a load goes: to which port, and what process carries it, if any."""

    port: int
    pid: int | None


RELAY: Final = "relay"
SPINNING: Final = "relay spinning"
_PROGRAM: Final = str(Path(sys.executable).with_name("relay"))
_ARGV: Final = (
    _PROGRAM,
    *("--listen", "127.0.0.1:{port}", "--target", "127.0.0.1:{target}", "--log-level", "warning"),
    *("--max-concurrent-connections", "2000"),
)
_TUNED: Final = ",nodelay,backlog=1024"
AS_IT_COMES: Final = Peer(RELAY, _PROGRAM, _ARGV)
SOCAT: Final = Peer(
    "socat", "socat", ("socat", "TCP-LISTEN:{port},bind=127.0.0.1,fork,reuseaddr", "TCP:127.0.0.1:{target}")
)
PEERS: Final = (
    AS_IT_COMES,
    Peer(SPINNING, _PROGRAM, (*_ARGV, "--spin", "300us")),
    SOCAT,
    Peer(
        "socat -b 256k",
        "socat",
        (
            *("socat", "-b", "262144"),
            f"TCP-LISTEN:{{port}},bind=127.0.0.1,fork,reuseaddr{_TUNED}",
            "TCP:127.0.0.1:{target},nodelay",
        ),
    ),
    Peer("haproxy", "haproxy", ("haproxy", "-db", "-f", "{configuration}")),
)


def run(size: Size) -> None:
    """Measure, and print a table, the goals, and, as the last line, JSON."""
    installed = [peer for peer in PEERS if shutil.which(peer.program)]
    missing = sorted({peer.program for peer in PEERS if peer not in installed})
    for program in missing:
        print(f"{program} is not installed and left out: apt-get install {program}")
    rounds: list[dict[str, Figures]] = []
    foreign = []
    with ExitStack() as stack:
        host = stack.enter_context(Network()).host("bench")
        host.run("sysctl", "-qw", "net.ipv4.ip_local_port_range=1024 65000")
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="eng-bench-")))
        courses = _courses(stack, host, installed, directory)
        memory = {name: _memory(host, course.port, course.pid, size) for name, course in courses.items() if course.pid}
        for number in range(size.rounds):
            start = Load.now()
            # Whoever comes first in a round is not so in the next.
            names = list(courses)[number % len(courses) :] + list(courses)[: number % len(courses)]
            rounds.append(_measure(host, courses, names, size))
            foreign.append(round(Load.now().foreign_share_since(start), 2))
    results = {
        name: {
            **{figure: [each[name][figure] for each in rounds] for figure in rounds[0][name]},
            **{figure: [value] for figure, value in memory.get(name, {}).items()},
        }
        for name in courses
    }
    medians = {
        name: {key: statistics.median(each) for key, each in figures.items()} for name, figures in results.items()
    }
    _print_table(results, medians)
    goals = _goals(rounds)
    for goal, (found, is_met) in goals.items():
        print(f"{'met   ' if is_met else 'MISSED'} {found:5.2f}  {goal}")
    print(f"foreign load, of all processors: {', '.join(f'{share:.0%}' for share in foreign)}")
    document = {
        "machine": platform.platform(),
        "rounds": size.rounds,
        "seconds": size.seconds,
        "missing": missing,
        "foreign": foreign,
        "goals": goals,
        "results": results,
    }
    print(json.dumps(document))


def _courses(stack: ExitStack, host: Host, peers: Sequence[Peer], directory: Path) -> dict[str, Course]:
    """Start the server and all peers."""
    server = stack.enter_context(running(host, directory, sys.executable, TRAFFIC, "serve"))
    assert server.stdout is not None
    target = int(server.stdout.readline())
    courses = {"direct": Course(target, None)}
    for peer in peers:
        port = free_port(host)
        process = stack.enter_context(running(host, directory, *peer.command(port, target, directory)))
        wait_until_listening(host, port, process, directory)
        courses[peer.name] = Course(port, process.pid)
    return courses


@contextmanager
def running(host: Host, directory: Path, *argv: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program, whose complaints go to a file."""
    with (directory / "complaints").open("ab") as complaints:
        process = host.popen(*argv, stdout=subprocess.PIPE, stderr=complaints)
    try:
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=DEADLINE_S)


def free_port(host: Host) -> int:
    """A port of that host that nobody had a moment ago."""
    with host.entered(), socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
        return port


def wait_until_listening(host: Host, port: int, process: subprocess.Popen[bytes], directory: Path) -> None:
    """Wait until somebody listens on a port, or the process that is to do it has ended.

    Raises:
        RuntimeError: it has; the text has its complaints.
    """
    deadline_s = time.monotonic() + DEADLINE_S
    while f":{port} " not in host.run("ss", "-Hltn"):
        if process.poll() is not None or time.monotonic() > deadline_s:
            complaints = (directory / "complaints").read_text()
            raise RuntimeError(f"{process.args!r} does not listen on {port} (exit {process.returncode}): {complaints}")
        time.sleep(0.02)


def _load(host: Host, job: str, port: int, *words: float) -> Figures:
    figures: Figures = json.loads(host.run(sys.executable, TRAFFIC, job, str(port), *map(str, words)))
    return figures


def _throughput(host: Host, course: Course, count: int, seconds: float) -> Figures:
    before_s = _cpu_when_quiet_s(course.pid)
    found = _load(host, "throughput", course.port, seconds, count)
    used_s = _cpu_when_quiet_s(course.pid) - before_s
    name = f"{count} connection" + "s" * (count > 1)
    figures = {f"mbit_s, {name}": found["mbit_s"]}
    return {**figures, f"cpu_s_per_gb, {name}": used_s / found["gigabytes"]} if course.pid else figures


def _rate(host: Host, course: Course, seconds: float) -> Figures:
    before_s = _cpu_when_quiet_s(course.pid)
    found = _load(host, "connections", course.port, seconds)
    used_s = _cpu_when_quiet_s(course.pid) - before_s
    figures = {"per_s": found["per_s"]}
    return {**figures, "cpu_us_per_connection": used_s / found["count"] * 1e6} if course.pid else figures


def _measure(host: Host, courses: dict[str, Course], names: Sequence[str], size: Size) -> dict[str, Figures]:
    """Take every figure of one round: each of all courses at once, since the machine may be another a second later."""
    measures: list[Callable[[Course], Figures]] = [
        lambda course: _throughput(host, course, 1, size.seconds),
        lambda course: _throughput(host, course, MANY, size.seconds),
        lambda course: _load(host, "round_trips", course.port, size.seconds),
        lambda course: _rate(host, course, size.seconds),
    ]
    found: dict[str, Figures] = {name: {} for name in courses}
    for measure in measures:
        for name in names:
            found[name].update(measure(courses[name]))
    return found


def _cpu_when_quiet_s(pid: int | None) -> float:
    """Processor time of a peer, once processes that it made for connections have ended and it has waited for them."""
    deadline_s = time.monotonic() + DEADLINE_S
    while pid and descendants(pid) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    return cpu_s(pid) if pid else 0.0


def _memory(host: Host, port: int, pid: int, size: Size) -> Figures:
    """Take what a peer holds with nothing to do, and what each connection adds that has been used once and is idle."""
    _load(host, "connections", port, 0)
    _cpu_when_quiet_s(pid)
    idle = memory_bytes(pid)
    argv = host.argv([sys.executable, TRAFFIC, "hold", str(port), str(size.held)])
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        if client.stdout.readline() != b"open\n":
            raise RuntimeError(f"{size.held} connections could not be opened: see above")
        held = memory_bytes(pid)
    return {"memory_kib": idle / 1024, "memory_kib_per_connection": (held - idle) / 1024 / size.held}


def _goals(rounds: Sequence[dict[str, Figures]]) -> dict[str, tuple[float, bool]]:
    """What the relay is to reach beside each peer: as it comes, and spinning."""
    spinning = {f"spinning: {goal}": found for goal, found in _goals_of(SPINNING, rounds).items()}
    return _goals_of(RELAY, rounds) | spinning


def _goals_of(column: str, rounds: Sequence[dict[str, Figures]]) -> dict[str, tuple[float, bool]]:
    """The median of the rounds' ratios, and whether that is enough.

    Within a round both were measured in the same minute. Their medians might be of different ones.
    """

    def ratio(figure: str, name: str) -> float:
        return statistics.median(each[column][figure] / (each[name][figure] or math.inf) for each in rounds)

    goals = {}
    for name in rounds[0]:
        if name in (RELAY, SPINNING, "direct"):
            continue
        is_socat = name.startswith("socat")
        for load in ("1 connection", f"{MANY} connections"):
            speed, cost = ratio(f"mbit_s, {load}", name), ratio(f"cpu_s_per_gb, {load}", name)
            goals[f"mbit_s, {load}: {'2' if is_socat else '1'} × {name}"] = speed, speed >= 1 + is_socat
            goals[f"cpu_s_per_gb, {load}: below {name}"] = cost, cost < 1
        if is_socat:
            trip, rate = ratio("p50_us", name), ratio("per_s", name)
            cost = ratio("cpu_us_per_connection", name)
            goals[f"cpu_us_per_connection: below {name}"] = cost, cost < 1
            goals[f"p50_us: no worse than {name}"] = trip, trip <= 1
            goals[f"per_s: 2 × {name}"] = rate, rate >= 2
    return goals


def _print_table(results: dict[str, dict[str, list[float]]], medians: dict[str, Figures]) -> None:
    print("medians, and from the least to the greatest")
    names = list(results)
    print(f"{'':26}" + "".join(f"{name:>21}" for name in names))
    for figure in results[RELAY]:
        cells = []
        for name in names:
            values = results[name].get(figure)
            cells.append(
                "–"
                if values is None
                else f"{_short(medians[name][figure])} ({_short(min(values))}–{_short(max(values))})"
            )
        print(f"{figure:26}" + "".join(f"{cell:>21}" for cell in cells))


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
