"""What lies between a load's two ends: this project's programs, peers in their place, or nothing but the kernels.

All of them on four hosts in a row, those of examples/demo/path.py, each course on hosts of its own.
"""

from __future__ import annotations

import json
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Final

import standin
from attested import attested_path
from enlink.testing.hosts import Host, run
from path import GATEWAY_OF_APP, GATEWAY_OF_SERVER, PEER_GATEWAY, PLACES, Path, Place, Program

from bench.processes import cpu_s, peak_resident_bytes
from bench.streams import make_certificate

LOAD: Final = str(FilePath(__file__).with_name("load.py"))
HAPROXY: Final = FilePath(__file__).with_name("haproxy.cfg")
PORT: Final = "7"
CAPTURED: Final = (PORT, f"udp/{PORT}")  # connections and datagrams
BEHIND: Final = "7007"  # the server, where something else has the port
SPIN: Final = "300us"
SERVER: Final = "10.81.3.2"
# Whom a program on each host passes connections on to.
ONWARD: Final[dict[Place, tuple[str, str]]] = {
    "app": (GATEWAY_OF_APP, PORT),
    "near": (PEER_GATEWAY, PORT),
    "far": (SERVER, PORT),
    "server": ("127.0.0.1", BEHIND),
}

Setting = Callable[[Path], AbstractContextManager[object]]
"""Changes the hosts of a path and the wires between them for the block, in which everything is started."""


@dataclass(frozen=True, slots=True)
class Course:
    """Where a load runs: on which hosts, from the first one to which address, through which programs."""

    hosts: Mapping[Place, Host]
    address: str
    programs: Sequence[Program] = ()
    carries_datagrams: bool = True

    def load(self, job: str, *words: float) -> dict[str, float]:
        """Run a load of bench/load.py; its figures."""
        argv = (sys.executable, LOAD, job, self.address, PORT, *map(str, words))
        figures: dict[str, float] = json.loads(self.hosts["app"].run(*argv))
        return figures

    def cpu_s(self) -> float:
        """Processor time that all programs together have used."""
        return sum(cpu_s(each.process.pid) for each in self.programs)

    def peak_memory_bytes(self) -> int:
        """What the largest of all processes has had in use."""
        return max((peak_resident_bytes(each.process.pid) for each in self.programs), default=0)


@dataclass(frozen=True, slots=True)
class Kind:
    """A way to set up a course, the commands that it needs, and how many connections at once are sensible."""

    start: Callable[[Path], AbstractContextManager[Course]]
    needs: tuple[str, ...] = ()
    path: Callable[[], AbstractContextManager[Path]] = Path
    most_connections: int = 1000

    def missing(self) -> list[str]:
        """The commands that are not installed."""
        return [name for name in self.needs if not shutil.which(name)]

    @contextmanager
    def open(self, setting: Setting = nullcontext) -> Iterator[Course]:
        """Make the hosts, start everything, and yield the course when a load may begin."""
        with self.path() as path, setting(path), self.start(path) as course:
            yield course


@contextmanager
def through_eng(path: Path) -> Iterator[Course]:
    """Captured, four programs or more, replayed."""
    programs = [*path.programs.values(), *path.further_gateways]
    with ExitStack() as stack:
        for program in programs:
            stack.callback(program.end)  # before the wires go, over which they part
        path.start()
        stack.enter_context(path.running("server", sys.executable, LOAD, "serve", PORT))
        yield Course(path.hosts, "1.1.1.1", programs)


def plain_links() -> Path:
    """A path that captures the load's port, and replays it."""
    return Path(capture=CAPTURED, replay=CAPTURED)


def spinning() -> Path:
    """The same with programs that look for more traffic for a moment before they sleep."""
    spin = ("--spin", SPIN)
    return Path(capture=CAPTURED, replay=CAPTURED, client=spin, server=spin, near=spin, far=spin)


def two_lanes() -> Path:
    """The same with two pairs of gateways, over which the agents spread connections."""
    return Path(capture=CAPTURED, replay=CAPTURED, lanes=2)


@contextmanager
def attested_links() -> Iterator[Path]:
    """The same with attested links, by the tests' stand-in for librats_tls, which encrypts as that does."""
    with tempfile.TemporaryDirectory(prefix="eng-bench-") as directory:
        library = standin.build(FilePath(directory) / "rats-tls")
        with attested_path(library, FilePath(directory), capture=CAPTURED, replay=CAPTURED) as path:
            yield path


@contextmanager
def _relayed(path: Path, argv: Mapping[Place, Sequence[str]]) -> Iterator[Course]:
    """A program on each host that passes connections on, which have to be made to the first."""
    with ExitStack() as stack:
        stack.enter_context(path.running("server", sys.executable, LOAD, "serve", BEHIND))
        programs = [stack.enter_context(path.running(place, *argv[place], ready=None)) for place in PLACES]
        for program in programs:
            _wait_until_listening(program)
        yield Course(path.hosts, "127.0.0.1", programs, carries_datagrams=False)


def _wait_until_listening(program: Program, timeout_s: float = 40) -> None:
    deadline_s = time.monotonic() + timeout_s
    while f":{PORT} " not in program.host.run("ss", "-Hltn"):
        if program.process.poll() is not None or time.monotonic() > deadline_s:
            raise RuntimeError(f"{' '.join(program.argv)}: does not listen on port {PORT}:\n{program.log()}")
        time.sleep(0.02)


def through_socat(path: Path) -> AbstractContextManager[Course]:
    """Four socat, which carry connections and no packets."""
    return _relayed(
        path,
        {
            place: ("socat", f"TCP-LISTEN:{PORT},fork,reuseaddr,nodelay,backlog=1024", f"TCP:{host}:{port},nodelay")
            for place, (host, port) in ONWARD.items()
        },
    )


def through_socat_tls(path: Path) -> AbstractContextManager[Course]:
    """The same with TLS between the hosts, no questions asked."""
    pem = make_certificate(path.directory)
    argv = {}
    for place, (host, port) in ONWARD.items():
        listen, dial = f"TCP-LISTEN:{PORT},fork,reuseaddr,nodelay,backlog=1024", f"TCP:{host}:{port},nodelay"
        if place != "app":
            listen = f"OPENSSL-LISTEN:{PORT},fork,reuseaddr,nodelay,backlog=1024,verify=0,cert={pem}"
        if place != "server":
            dial = f"OPENSSL:{host}:{port},nodelay,verify=0"
        argv[place] = ("socat", listen, dial)
    return _relayed(path, argv)


def through_haproxy(path: Path) -> AbstractContextManager[Course]:
    """Four HAProxy of one thread each."""
    argv = {}
    for place, (host, port) in ONWARD.items():
        file = path.directory / f"{place}-haproxy.cfg"
        file.write_text(HAPROXY.read_text().format(bind=f":{PORT}", target=f"{host}:{port}"))
        argv[place] = ("haproxy", "-db", "-f", str(file))
    return _relayed(path, argv)


def _forward(path: Path) -> None:
    """Let the gateways' kernels forward."""
    for place in ("near", "far"):
        path.hosts[place].run("sysctl", "-qw", "net.ipv4.ip_forward=1")


@contextmanager
def through_openvpn(path: Path) -> Iterator[Course]:
    """Three tunnels in a row over TCP, neither encrypted nor authenticated: six programs, as each knows one peer."""
    hops: list[tuple[Place, Place, str]] = [
        ("near", "app", GATEWAY_OF_APP),
        ("far", "near", PEER_GATEWAY),
        ("far", "server", GATEWAY_OF_SERVER),
    ]
    _forward(path)
    with ExitStack() as stack:
        programs = []
        for number, (listening, dialling, address) in enumerate(hops):
            device, ends = f"vpn{number}", (f"10.82.{number}.1", f"10.82.{number}.2")
            bare = ("--dev", device, "--dev-type", "tun", "--cipher", "none", "--auth", "none", "--verb", "3")
            common = ("openvpn", *bare, "--socket-flags", "TCP_NODELAY", "--port", str(1194 + number))
            server = (*common, "--proto", "tcp-server", "--ifconfig", *ends)
            client = (*common, "--proto", "tcp-client", "--remote", address, "--ifconfig", *reversed(ends))
            programs += [
                stack.enter_context(path.running(place, *argv, ready=None))
                for place, argv in ((listening, server), (dialling, client))
            ]
        for program in programs:
            program.wait_for("Initialization Sequence Completed")
        routes: list[tuple[Place, str, str]] = [
            *(("app", "10.82.2.0/24", "vpn0"), ("near", "10.82.2.0/24", "vpn1")),
            *(("far", "10.82.0.0/24", "vpn1"), ("server", "10.82.0.0/24", "vpn2")),
        ]
        for place, network, device in routes:
            path.hosts[place].run("ip", "route", "add", network, "dev", device)
        stack.enter_context(path.running("server", sys.executable, LOAD, "serve", PORT))
        yield Course(path.hosts, "10.82.2.2", programs)


@contextmanager
def through_wireguard(path: Path) -> Iterator[Course]:
    """Four wireguard-go, each with its neighbours as peers: encrypted UDP, hop by hop."""
    _forward(path)
    device = f"b{secrets.token_hex(3)}"  # its control socket lies outside of the hosts' namespaces
    names = {place: f"{device}{number}" for number, place in enumerate(PLACES)}
    addresses = {place: f"10.83.0.{number}" for number, place in enumerate(PLACES, 1)}
    wires: list[tuple[Place, Place, str]] = [
        *(("app", "near", GATEWAY_OF_APP), ("near", "app", "10.81.1.1")),
        *(("near", "far", PEER_GATEWAY), ("far", "near", "10.81.2.1")),
        *(("far", "server", SERVER), ("server", "far", GATEWAY_OF_SERVER)),
    ]
    with ExitStack() as stack:
        keys = {place: run(["wg", "genkey"]) for place in PLACES}
        programs = []
        for place in PLACES:
            argv = ("env", "LOG_LEVEL=verbose", "wireguard-go", "-f", names[place])
            programs.append(stack.enter_context(path.running(place, *argv, ready="UAPI listener started")))
        for place, peer, address in wires:
            is_ahead = PLACES.index(peer) > PLACES.index(place)
            beyond = PLACES[PLACES.index(peer) :] if is_ahead else PLACES[: PLACES.index(peer) + 1]
            allowed = ",".join(f"{addresses[each]}/32" for each in beyond)
            private = path.directory / f"{place}.key"
            private.touch(0o600)
            private.write_text(keys[place])
            public = run(["wg", "pubkey"], input=keys[peer]).strip()
            own = ("listen-port", "51820", "private-key", str(private))
            to = ("peer", public, "endpoint", f"{address}:51820", "allowed-ips", allowed)
            path.hosts[place].run("wg", "set", names[place], *own, *to)
        for place in PLACES:
            path.hosts[place].run("ip", "address", "add", f"{addresses[place]}/24", "dev", names[place])
            path.hosts[place].run("ip", "link", "set", names[place], "up", "mtu", "1420")
        stack.enter_context(path.running("server", sys.executable, LOAD, "serve", PORT))
        yield Course(path.hosts, addresses["server"], programs)


@contextmanager
def direct(path: Path) -> Iterator[Course]:
    """The same hosts and wires without programs: the kernels forward."""
    _forward(path)
    path.hosts["near"].run("ip", "route", "add", "10.81.3.0/24", "via", PEER_GATEWAY)
    path.hosts["far"].run("ip", "route", "add", "10.81.1.0/24", "via", "10.81.2.1")
    with path.running("server", sys.executable, LOAD, "serve", PORT):
        yield Course(path.hosts, SERVER)


KINDS: Final = {
    "eng": Kind(through_eng, path=plain_links),
    "eng spinning": Kind(through_eng, path=spinning),
    "eng 2 lanes": Kind(through_eng, path=two_lanes),
    "attested": Kind(through_eng, path=attested_links, needs=("gcc",)),
    # A connection costs them four processes and more.
    "4 socat": Kind(through_socat, ("socat",), most_connections=100),
    "socat TLS": Kind(through_socat_tls, ("socat", "openssl"), most_connections=8),
    "4 haproxy": Kind(through_haproxy, ("haproxy",)),
    "openvpn": Kind(through_openvpn, ("openvpn",)),
    "wireguard-go": Kind(through_wireguard, ("wireguard-go", "wg")),
    "direct": Kind(direct),
}


def installed(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Which of these courses can be measured here, and the commands that others lack."""
    missing = sorted({command for name in names for command in KINDS[name].missing()})
    return [name for name in names if not KINDS[name].missing()], missing


def opened(stack: ExitStack, names: Sequence[str], setting: Setting = nullcontext) -> dict[str, Course]:
    """Open these courses; the stack closes them."""
    return {name: stack.enter_context(KINDS[name].open(setting)) for name in names}


def with_control(control: str) -> Setting:
    """Give the hosts another TCP congestion control than the machine's, which they have otherwise."""

    def setting(path: Path) -> AbstractContextManager[None]:
        for host in path.hosts.values():
            host.run("sysctl", "-qw", f"net.ipv4.tcp_congestion_control={control}")
        return nullcontext()

    return setting
