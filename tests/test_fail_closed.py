"""Captured traffic never leaves a host bare: while an agent starts, lives, is damaged or dead, on the whole path.

Each silence has its control: once what holds the traffic back is removed, the same program is heard on the same wire.
"""

from __future__ import annotations

import contextlib
import errno
import signal
import socket
from collections.abc import Callable, Iterator

import pytest
from enlink.testing.hosts import Host
from enlink.testing.probe import Packet, Wire, canary, send
from enlink.testing.programs import comes_true
from enlink.testing.state import difference, network_state
from enta.cleanup import clean_up
from path import GATEWAY_OF_APP, GATEWAY_OF_SERVER, Path, Program

FAR_BEYOND_S = 8.0  # whatever is removed is back within a second
GUARD = "table inet eng_default_guard"
TRIES = {("tcp", 4), ("tcp", 6), ("udp", 4), ("udp", 6)}  # a canary's


@pytest.fixture(scope="module")
def path() -> Iterator[Path]:
    """The path with the client's agent not started, and IPv6 to lead captured traffic astray."""
    with Path(capture=["7", "udp/53"], replay=["7", "udp/5353"]) as made:
        app, device = made.hosts["app"], made.outer_device
        app.run("ip", "address", "add", "2001:db8:1::1/64", "dev", device, "nodad")
        app.run("ip", "neighbour", "add", "2001:db8:1::9", "lladdr", "02:00:00:00:00:09", "dev", device)
        app.run("ip", "-6", "route", "add", "default", "via", "2001:db8:1::9")
        made.start("far", "near", "server")
        with made.running("server", "echosvr", "server", "--port", "7"):
            yield made


@pytest.fixture(scope="module")
def before(path: Path) -> list[str]:
    """The app's host before there was an agent."""
    state = network_state(path.hosts["app"])
    path.start("app")
    return state


@pytest.fixture
def agent(path: Path, before: list[str]) -> Iterator[Program]:
    """The client's agent, ready. What a dead one leaves is cleaned up afterwards, and then its host is as it was."""
    agent, host = path.programs["app"], path.hosts["app"]
    if agent.process.poll() is not None:
        path.start("app")
    yield agent
    if agent.process.poll() is not None:
        _clean_up(host)
        assert difference(before, network_state(host)) == []


@pytest.fixture(scope="module")
def ear(path: Path) -> Iterator[Wire]:
    with Wire(path.hosts["app"], path.hosts["near"], "wire1b", GATEWAY_OF_APP) as wire:
        yield wire


@pytest.fixture
def wire(ear: Wire, agent: Program) -> Wire:
    """The app's wire, from when its agent is ready."""
    ear.packets()
    return ear


def _clean_up(host: Host) -> list[str]:
    with host.entered():
        return clean_up()


def _strays(wire: Wire) -> list[Packet]:
    """What has left but the agent's own link to its gateway."""
    return [packet for packet in wire.packets() if (str(packet.destination), packet.port) != (GATEWAY_OF_APP, 6980)]


def _assert_heard(wire: Wire) -> None:
    """The control: without a guard the canary is heard, in each way in which it tries."""
    heard: set[tuple[str, int]] = set()

    def is_heard() -> bool:
        heard.update((packet.protocol, packet.destination.version) for packet in _strays(wire))
        return heard >= TRIES

    assert comes_true(is_heard, FAR_BEYOND_S), f"the probe is blind: it has heard only {heard}"


def _has_guard(host: Host) -> bool:
    return GUARD in host.run("nft", "list", "tables")


def _refusal(host: Host, protocol: str, address: str, port: int) -> int:
    """Why a program cannot send: errno, which it must get at once."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with host.entered():
        program = socket.socket(family, socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM)
    with program:
        program.settimeout(FAR_BEYOND_S)
        try:
            program.connect((address, port))
            program.send(b"canary")
        except OSError as error:
            return error.errno or 0
    return 0


@contextlib.contextmanager
def _connection(path: Path) -> Iterator[Callable[[bytes], bytes]]:
    """A captured program's connection to the echo server."""
    with path.hosts["app"].entered():
        program = socket.socket()
    with program:
        program.settimeout(40)
        program.connect(("1.1.1.1", 7))

        def echo(data: bytes) -> bytes:
            program.sendall(data)
            return program.recv(len(data), socket.MSG_WAITALL)

        yield echo


# ---- while the agent lives


@pytest.mark.proves("F64", "F62", "G8", "D16")
@pytest.mark.parametrize(
    "damage",
    [
        "ip rule delete priority 6978 from 0.0.0.0 iif lo ipproto tcp dport 7",
        "ip rule flush protocol 78",
        "ip route flush table 6978",
        "ip address flush dev eng0",
        "ip link set eng0 down",
        "ip link set eng0 mtu 1400",
        "nft flush chain inet eng_default_guard outgoing",
        f"nft delete {GUARD}",
        "nft flush ruleset",
    ],
)
def test_what_others_remove_comes_back_and_nothing_leaves_meanwhile(
    path: Path, wire: Wire, agent: Program, damage: str
) -> None:
    """Within a second, typically in a fifth of one; a connection that was there goes on."""
    host = path.hosts["app"]
    running = network_state(host)
    with canary(host, tcp_port=7, udp_port=53), _connection(path) as echo:
        assert echo(b"before") == b"before"
        host.run(*damage.split())
        assert comes_true(lambda: difference(running, network_state(host)) == [], FAR_BEYOND_S), difference(
            running, network_state(host)
        )
        assert _strays(wire) == []
        assert echo(b"after") == b"after"
    assert agent.status()["counters"]["restored"]["removed_by_others"] > 0


@pytest.mark.proves("G8", "D16")
def test_while_the_gateway_is_away_nothing_leaves_and_then_all_goes_on(path: Path, wire: Wire, agent: Program) -> None:
    """Programs wait; neither new nor old connections find another way."""
    near, host = path.programs["near"], path.hosts["app"]
    with _connection(path) as echo:
        near.kill()
        with canary(host, tcp_port=7, udp_port=53):
            near.start()
            near.wait_for("ready")
            assert echo(b"back again") == b"back again"
        assert _strays(wire) == []
    assert agent.process.poll() is None


@pytest.mark.proves("G8", "D16")
def test_before_the_first_uplink_captured_ports_are_closed(path: Path, wire: Wire, agent: Program) -> None:
    """A cold start without a gateway: the guard is there first, and nothing is captured that could not be carried."""
    host = path.hosts["app"]
    argv = ("enta", "client", "--capture", "7", "--capture", "udp/53", "--entg-connect", f"{GATEWAY_OF_APP}:6981")
    agent.end()
    with canary(host, tcp_port=7, udp_port=53):
        with path.running("app", *argv, ready="uplink_down"):
            _strays(wire)
            for address in ("1.1.1.1", "2001:db8::1"):
                assert _refusal(host, "tcp", address, 7) == errno.ECONNREFUSED
                assert _refusal(host, "udp", address, 53) == errno.EPERM
            assert [packet for packet in _strays(wire) if packet.port != 6981] == []
        _assert_heard(wire)


# ---- when the agent is dead


@pytest.mark.proves("F04", "G8", "D16")
def test_programs_see_at_once_that_a_dead_agents_ports_are_closed(path: Path, wire: Wire, agent: Program) -> None:
    """An error instead of a wait, by IPv4 and IPv6; what the host captures not, it still reaches."""
    host = path.hosts["app"]
    agent.kill()
    for address in ("1.1.1.1", "192.168.0.254"):
        assert _refusal(host, "tcp", address, 7) == errno.EHOSTUNREACH
        assert _refusal(host, "udp", address, 53) == errno.EHOSTUNREACH
    assert _refusal(host, "tcp", "2001:db8::1", 7) == errno.ECONNREFUSED
    assert _refusal(host, "udp", "2001:db8::1", 53) == errno.EPERM
    assert _strays(wire) == []
    assert send(host, "tcp", "1.1.1.1", 8) == 0
    assert [packet.port for packet in _strays(wire)] == [8]


@pytest.mark.proves("F04", "F64", "G8", "D16")
@pytest.mark.parametrize("is_restored", [True, False], ids=["restored in between", "killed at once"])
def test_a_flushed_ruleset_and_a_kill_let_nothing_out(
    path: Path, wire: Wire, agent: Program, is_restored: bool
) -> None:
    """Without the time to restore its guard, what is left of the agent still holds IPv4."""
    host = path.hosts["app"]
    with canary(host, tcp_port=7, udp_port=53), _connection(path) as echo:
        assert echo(b"before") == b"before"
        if not is_restored:
            agent.process.send_signal(signal.SIGSTOP)
        host.run("nft", "flush", "ruleset")
        assert not is_restored or comes_true(lambda: _has_guard(host), FAR_BEYOND_S)
        agent.kill()
        strays = [packet for packet in _strays(wire) if is_restored or packet.destination.version == 4]
        assert strays == []
        _clean_up(host)
        _assert_heard(wire)


@pytest.mark.proves("F62", "G8", "D16")
def test_a_deleted_tun_ends_the_agent_with_one_line_and_the_ports_stay_closed(
    path: Path, wire: Wire, agent: Program
) -> None:
    """Exit code 71; what stays is what a kill would leave."""
    host = path.hosts["app"]
    with canary(host, tcp_port=7, udp_port=53), _connection(path) as echo:
        assert echo(b"before") == b"before"
        host.run("ip", "link", "delete", "eng0")
        assert agent.process.wait(FAR_BEYOND_S) == 71
        last = agent.log().splitlines()[-1]
        assert last == "enta: eng0 was deleted by another program: start again"
        assert "Traceback" not in agent.log()
        assert _has_guard(host)
        assert _strays(wire) == []
        removed = _clean_up(host)
        assert len([line for line in removed if line.startswith("rule ")]) == 6
        assert len([line for line in removed if line.startswith("route unreachable ")]) == 1
        _assert_heard(wire)


@pytest.mark.proves("F04", "G8", "D16")
@pytest.mark.usefixtures("agent")
def test_a_server_answers_nobody_once_its_agent_is_dead(path: Path) -> None:
    """Its UDP answer is for an address that every host could route somewhere; a clean host lets it out."""
    host, server_agent = path.hosts["server"], path.programs["server"]
    with (
        Wire(host, path.hosts["far"], "wire3a", GATEWAY_OF_SERVER) as wire,
        _connection(path) as echo,
        host.entered(),
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server,
    ):
        assert echo(b"before") == b"before"
        server.bind(("0.0.0.0", 5353))
        server.settimeout(40)
        assert send(path.hosts["app"], "udp", "1.1.1.1", 53, payload=b"question") == 0
        question, client = server.recvfrom(100)
        assert (question, client[0]) == (b"question", "192.168.0.1")
        server_agent.kill()
        wire.packets()
        with contextlib.suppress(OSError):
            server.sendto(b"answer", client)
        assert [packet for packet in wire.packets() if packet.port != 6980] == []
        _clean_up(host)
        server.sendto(b"answer", client)
        assert [packet.payload for packet in wire.packets() if packet.port != 6980] == [b"answer"]
    path.start("server")


# ---- if somebody wants it open


@pytest.mark.proves("D16")
def test_with_on_crash_open_neither_guard_nor_unreachable_route_is_ever_there(
    path: Path, wire: Wire, agent: Program
) -> None:
    """Whatever happens to it: captured while it lives, open to the world when it is dead."""
    host = path.hosts["app"]
    argv = ("enta", "client", "--capture", "7", "--capture", "udp/53", "--entg-connect", f"{GATEWAY_OF_APP}:6980")
    agent.end()

    def is_open() -> bool:
        routes = host.run("ip", "route", "show", "table", "all")
        return not _has_guard(host) and "unreachable" not in routes

    with path.running("app", *argv, "--on-crash", "open") as open_agent:
        assert is_open()
        with _connection(path) as echo:
            assert echo(b"captured") == b"captured"
        host.run("ip", "rule", "flush", "protocol", "78")
        assert comes_true(lambda: host.run("ip", "rule").count("proto 78") == 6, FAR_BEYOND_S)
        host.run("nft", "flush", "ruleset")
        assert is_open()
        with canary(host, tcp_port=7, udp_port=53):
            open_agent.kill()
            assert is_open()
            _assert_heard(wire)
    assert "eng" not in host.run("nft", "list", "tables")
