"""An agent leaves its host as it was: told to stop at any moment, refused a start, crashed and cleaned up, one of two.

The host belongs to strangers, who have rules and routes wherever an agent has its own.
"""

from __future__ import annotations

import json
import random
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest
from enlink.testing.hosts import Host
from enlink.testing.programs import comes_true
from enlink.testing.state import difference, network_state
from path import BIN, GATEWAY_OF_APP, GATEWAY_OF_SERVER, PEER_GATEWAY, Path, Program

FAR_BEYOND_S = 8 * 2.0  # an agent that is told to stop has gone within two seconds
ENTA = str(BIN / "enta")
CLIENT = ("enta", "client", "--capture", "7", "--capture", "udp/53")
GATEWAY = ("--entg-connect", f"{GATEWAY_OF_APP}:6980")


@pytest.fixture(scope="module")
def path() -> Iterator[Path]:
    with Path(capture=["7", "udp/53"], replay=["7", "udp/5353"]) as made:
        for command in (
            "ip route add 10.99.0.0/16 via 10.81.1.2 table 6978",
            "ip rule add priority 6978 to 10.98.0.0/16 lookup 6978",
            "ip rule add priority 6979 fwmark 0x1/0xff lookup main protocol 99",
            "nft add table inet eng_stranger",
            "nft add chain inet eng_stranger output { type filter hook output priority -150; }",
            "nft add rule inet eng_stranger output tcp dport 7 accept",
        ):
            made.hosts["app"].run(*command.split())
        made.start("far", "near", "server")
        with made.running("server", "echosvr", "server", "--port", "7"):
            yield made


@pytest.fixture
def host(path: Path) -> Host:
    return path.hosts["app"]


@pytest.fixture(autouse=True)
def before(path: Path, host: Host) -> Iterator[list[str]]:
    """The app's host, which is after each test what it was before."""
    before = network_state(host)
    yield before
    path.programs["app"].end()
    assert difference(before, network_state(host)) == []


def _echo(host: Host, address: str = "1.1.1.1", port: int = 7) -> None:
    """Reach the echo server as a captured program."""
    with host.entered():
        program = socket.socket()
    with program:
        program.settimeout(40)
        program.connect((address, port))
        program.sendall(b"hello")
        assert program.recv(5, socket.MSG_WAITALL) == b"hello"


def _end_of(path: Path, *argv: str) -> tuple[int, list[str]]:
    """Run a program that ends by itself; return its exit code and what it wrote, line by line."""
    program = path.program("app", argv, f"run-{time.monotonic_ns()}")
    program.start()
    code = program.process.wait(40)
    assert "Traceback" not in program.log()
    return code, program.log().splitlines()


# ---- told to stop


@pytest.mark.proves("F06", "G7", "D29")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_at_random_moments_of_its_start_it_leaves_nothing(
    path: Path, host: Host, before: list[str], number: signal.Signals
) -> None:
    """From its first change to the host until it is ready, and a little longer."""
    agent = path.programs["app"]
    for _ in range(8):
        agent.start()
        assert comes_true(lambda: "table=6978" in host.run("nft", "list", "ruleset"), FAR_BEYOND_S)
        with suppress(subprocess.TimeoutExpired):
            agent.process.wait(random.uniform(0, 0.2))
        agent.process.send_signal(number)
        assert agent.process.wait(FAR_BEYOND_S) == 0, agent.log()
        assert difference(before, network_state(host)) == []


@pytest.mark.proves("F06", "G7", "D29")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_in_the_middle_of_traffic_it_takes_all_back(
    path: Path, host: Host, before: list[str], number: signal.Signals
) -> None:
    """The guard as well: the ports are open again, and a connection goes where any other goes."""
    path.start("app")
    agent = path.programs["app"]
    with host.entered():
        program = socket.socket()
    with program:
        program.connect(("1.1.1.1", 7))
        program.setblocking(False)
        assert comes_true(lambda: not _is_sent(program), 40), "the tunnel takes everything"
        agent.process.send_signal(number)
        assert agent.process.wait(FAR_BEYOND_S) == 0
    assert agent.log().splitlines()[-1].endswith(f"stopping signal={number.name}")
    assert difference(before, network_state(host)) == []


def _is_sent(program: socket.socket) -> bool:
    try:
        return program.send(bytes(1 << 16)) > 0
    except BlockingIOError:
        return False


@pytest.mark.proves("F06")
@pytest.mark.parametrize("gateway", ["refuses", "is nowhere", "is silent", "takes nothing"])
def test_told_to_stop_while_its_gateway_is_no_help_it_leaves_nothing(
    path: Path, host: Host, before: list[str], gateway: str
) -> None:
    """Neither an attempt that goes on for seconds nor a farewell that nobody takes holds it up."""
    with path.hosts["near"].entered():
        silent = socket.create_server((GATEWAY_OF_APP, 0))
    port = silent.getsockname()[1]
    where = {"refuses": f"{GATEWAY_OF_APP}:1", "is nowhere": "10.81.1.77:6980", "is silent": f"{GATEWAY_OF_APP}:{port}"}
    near = path.programs["near"]
    with host.entered():
        program = socket.socket()
    with (
        silent,
        program,
        path.running("app", *CLIENT, "--entg-connect", where.get(gateway, GATEWAY[1]), ready=None) as agent,
    ):
        if gateway == "takes nothing":
            agent.wait_for("ready")
            program.connect(("1.1.1.1", 7))
            program.setblocking(False)
            near.process.send_signal(signal.SIGSTOP)
            assert comes_true(lambda: not _is_sent(program), 40), "a link takes everything"
        try:
            assert comes_true(lambda: "eng_default_guard" in host.run("nft", "list", "tables"), FAR_BEYOND_S)
            agent.process.send_signal(signal.SIGTERM)
            assert agent.process.wait(FAR_BEYOND_S) == 0
        finally:
            near.process.send_signal(signal.SIGCONT)
    assert difference(before, network_state(host)) == []


@pytest.mark.proves("F06")
def test_sighup_changes_nothing(path: Path, host: Host) -> None:
    """There is nothing to reload, and the agent says so."""
    path.start("app")
    agent, running = path.programs["app"], network_state(host)
    agent.process.send_signal(signal.SIGHUP)
    agent.wait_for("nothing_to_reload")
    _echo(host)
    assert difference(running, network_state(host)) == []
    assert agent.stop() == 0


@pytest.mark.proves("F07")
def test_an_agent_that_was_stopped_for_longer_than_its_gateway_waits_goes_on(path: Path, host: Host) -> None:
    """The gateway gives it up after ten seconds; what a program has sent meanwhile arrives afterwards."""
    path.start("app")
    agent, near = path.programs["app"], path.programs["near"]
    with host.entered():
        program = socket.socket()
    with program:
        program.settimeout(40)
        program.connect(("1.1.1.1", 7))
        agent.process.send_signal(signal.SIGSTOP)
        try:
            program.sendall(b"hello")
            assert comes_true(lambda: "reason=keepalive leg=enta" in near.log(), 40), near.log()
        finally:
            agent.process.send_signal(signal.SIGCONT)
        assert program.recv(5, socket.MSG_WAITALL) == b"hello"
    assert agent.log().count("uplink_up") == 2


# ---- once


def test_once_it_ends_when_there_is_no_gateway(path: Path) -> None:
    code, lines = _end_of(path, *CLIENT, "--entg-connect", f"{GATEWAY_OF_APP}:1", "--once")
    assert (code, len(lines)) == (69, 1)
    assert f"cannot connect to {GATEWAY_OF_APP}" in lines[0]


def test_once_it_ends_when_its_gateway_goes(path: Path, host: Host, before: list[str]) -> None:
    """And leaves the host as it was: that it ends was asked for."""
    near = path.programs["near"]
    with path.running("app", *CLIENT, *GATEWAY, "--once") as agent:
        near.kill()
        assert agent.process.wait(FAR_BEYOND_S) == 69
        assert "Traceback" not in agent.log()
    assert difference(before, network_state(host)) == []
    path.start("near")


def test_once_it_ends_when_its_gateway_breaks_the_protocol(path: Path, host: Host, before: list[str]) -> None:
    with path.hosts["near"].entered():
        rude = socket.create_server((GATEWAY_OF_APP, 0))
    rude.settimeout(40)
    where = f"{GATEWAY_OF_APP}:{rude.getsockname()[1]}"
    with rude, path.running("app", *CLIENT, "--entg-connect", where, "--once", ready=None) as agent:
        with rude.accept()[0] as link:
            link.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            assert agent.process.wait(FAR_BEYOND_S) == 76
        assert "Traceback" not in agent.log()
    assert difference(before, network_state(host)) == []


# ---- a start that fails


OBSTACLES = {
    "the TUN's name": ("ip tuntap add eng0 mode tun", "ip link delete eng0", (), "eng0"),
    "the address": (
        "ip address add 192.168.0.7/32 dev lo",
        "ip address delete 192.168.0.7/32 dev lo",
        (),
        "192.168.0.7",
    ),
    "a route": ("ip route add 192.168.0.0/16 via 10.81.1.2", "ip route delete 192.168.0.0/16", (), "192.168.0.0/16"),
    "a default route": (
        "ip route add default via 10.81.1.2 table 6978",
        "ip route delete default table 6978",
        (),
        "--table 6978",
    ),
    "the table's name": (
        "nft add table inet eng_default_guard",
        "nft delete table inet eng_default_guard",
        (),
        "delete it",
    ),
    "the status socket": ("true", "true", ("--status-socket", "/dev/null"), "/dev/null"),
}


@pytest.mark.proves("F61", "F66", "G7", "D29")
@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_a_start_that_something_is_in_the_way_of_changes_nothing(path: Path, host: Host, obstacle: str) -> None:
    """Exit code 73 and one line that names what it is."""
    make, undo, options, name = OBSTACLES[obstacle]
    host.run(*make.split())
    try:
        before = network_state(host)
        code, lines = _end_of(path, *CLIENT, *GATEWAY, *options)
        assert (code, len(lines)) == (73, 1), lines
        assert name in lines[0]
        assert difference(before, network_state(host)) == []
    finally:
        host.run(*undo.split())


@pytest.mark.proves("F12", "F04")
@pytest.mark.parametrize(
    ("obstacle", "options", "code"),
    [
        ("ip tuntap add eng0 mode tun", GATEWAY, 73),
        ("ip address add 192.168.0.7/32 dev lo", GATEWAY, 73),
        ("true", ("--once", "--entg-connect", f"{GATEWAY_OF_APP}:1"), 69),
    ],
)
def test_after_a_crash_a_start_that_fails_opens_nothing(
    path: Path, host: Host, obstacle: str, options: tuple[str, ...], code: int
) -> None:
    """What a dead agent holds closed stays closed until another one works, or somebody says otherwise."""
    path.start("app")
    path.programs["app"].kill()
    host.run(*obstacle.split())
    try:
        assert _end_of(path, *CLIENT, *options)[0] == code
        assert "eng_default_guard" in host.run("nft", "list", "tables")
    finally:
        host.run("ip", "link", "delete", "eng0", check=False)
        host.run("ip", "address", "delete", "192.168.0.7/32", "dev", "lo", check=False)
        path.start("app")
        assert path.programs["app"].stop() == 0


# ---- cleaned up


@pytest.mark.proves("F05", "D30", "F13", "G7", "D29")
def test_cleanup_takes_what_a_dead_agent_left_once_and_nothing_of_a_living_one(
    path: Path, host: Host, before: list[str]
) -> None:
    """The second time there is nothing to say."""
    path.start("app")
    running = network_state(host)
    assert host.run(ENTA, "cleanup") == ""
    assert difference(running, network_state(host)) == []
    path.programs["app"].kill()
    removed = host.run(ENTA, "cleanup").splitlines()
    assert [line.split()[1] for line in removed] == ["rule"] * 6 + ["route", "guard"]
    assert host.run(ENTA, "cleanup") == ""
    assert difference(before, network_state(host)) == []


@pytest.mark.proves("F13", "D30")
def test_a_start_takes_what_a_dead_agent_with_other_options_left(path: Path, host: Host) -> None:
    """It says what it removed, keeps what it needs itself, and a strict stop leaves nothing of either."""
    path.start("app")
    path.programs["app"].kill()
    with path.running("app", "enta", "client", "--capture", "7", *GATEWAY) as agent:
        assert agent.log().count("leftover_removed") == 2
        assert agent.log().count("ipproto udp dport 53") == 2
        rules = [line for line in host.run("ip", "rule").splitlines() if "proto 78" in line]
        assert len(rules) == 4
        assert "dport 53" not in host.run("nft", "list", "ruleset")
        _echo(host)


def test_status_tells_all_of_a_running_agent_and_that_none_runs(path: Path, host: Host) -> None:
    """As JSON and for people."""
    path.start("app")
    _echo(host)
    status = json.loads(host.run(ENTA, "status", "--json"))
    assert (status["role"], status["capturing"], status["uplink"]["up"]) == ("client", True, True)
    assert status["counters"]["to_gateway"]["packets"] > 0
    assert status["counters"]["from_gateway"]["bytes"] > 0
    assert re.search(r"^ *gateway +tcp://10\.81\.1\.2:6980$", host.run(ENTA, "status"), re.MULTILINE)
    path.programs["app"].stop()
    code, lines = _end_of(path, "enta", "status")
    assert (code, lines) == (69, ["enta: no enta runs here: start one, or give its --status-socket"])


# ---- two of them


SECOND = ("--instance", "two", "--tun-name", "eng1", "--table", "6979", "--mark", "0x6979")


@pytest.fixture
def second(path: Path) -> Iterator[Program]:
    """A second agent on the app's host, with all that it needs on the way, for port 8."""
    app_side = ("--tun-addr", "192.168.1.1", "--peer-addr", "192.168.1.254", "--entg-connect", f"{GATEWAY_OF_APP}:6990")
    far_side = (
        "--tun-addr",
        "192.168.1.254",
        "--peer-addr",
        "192.168.1.1",
        "--entg-connect",
        f"{GATEWAY_OF_SERVER}:6990",
    )
    with (
        path.running("far", "entg", "--entg-listen", "6989", "--enta-listen", "6990"),
        path.running("near", "entg", "--entg-connect", f"{PEER_GATEWAY}:6989", "--enta-listen", "6990"),
        path.running("server", "enta", "server", "--replay", "8:6978", *SECOND, *far_side),
        path.running("server", "echosvr", "server", "--port", "8"),
        path.running("app", "enta", "client", "--capture", "8", *SECOND, *app_side) as agent,
    ):
        yield agent


@pytest.mark.proves("F15", "G7", "D30")
def test_two_agents_work_beside_each_other_and_one_dies_alone(path: Path, host: Host, second: Program) -> None:
    """Other names, numbers and addresses; what cleanup and the stop of one remove is nothing of the other's."""
    only_second = network_state(host)
    path.start("app")
    both = network_state(host)
    _echo(host, port=7)
    _echo(host, port=8)
    path.programs["app"].kill()
    _echo(host, port=8)
    removed = host.run(ENTA, "cleanup").splitlines()
    assert len(removed) == 8
    assert difference(only_second, network_state(host)) == []
    path.start("app")
    assert difference(both, network_state(host)) == []
    _echo(host, port=7)
    assert second.stop() == 0
    _echo(host, port=7)
    assert "eng_two" not in host.run("nft", "list", "ruleset")


@pytest.mark.proves("F15")
@pytest.mark.parametrize("options", [(), ("--tun-name", "eng7", "--capture", "9")])
def test_a_second_agent_of_the_same_name_is_refused_and_the_first_is_unaffected(
    path: Path, host: Host, options: tuple[str, ...]
) -> None:
    """Exit code 73; the line names the first one's process."""
    path.start("app")
    running = network_state(host)
    code, lines = _end_of(path, *CLIENT, *GATEWAY, *options)
    assert (code, len(lines)) == (73, 1)
    assert str(path.programs["app"].process.pid) in lines[0]
    assert difference(running, network_state(host)) == []
    _echo(host)
    assert path.programs["app"].stop() == 0


@pytest.mark.proves("F15")
@pytest.mark.parametrize(
    ("option", "value"), [("--tun-name", "eng0"), ("--table", "6978"), ("--mark", "0x6978"), ("--capture", "7")]
)
def test_a_second_agent_that_shares_a_name_or_number_is_refused(
    path: Path, host: Host, option: str, value: str
) -> None:
    """Exit code 73 with the option to change."""
    path.start("app")
    running = network_state(host)
    ports = () if option == "--capture" else ("--capture", "9")
    addresses = ("--tun-addr", "192.168.1.1", "--peer-addr", "192.168.1.254")
    code, lines = _end_of(path, "enta", "client", *SECOND, *addresses, *ports, *GATEWAY, option, value)
    assert (code, len(lines)) == (73, 1)
    assert (value if option != "--capture" else "dport 7") in lines[0]
    assert difference(running, network_state(host)) == []
    assert path.programs["app"].stop() == 0


# ---- left alone


def test_this_hosts_own_addresses_and_loopback_are_left_alone(path: Path, host: Host) -> None:
    """A local server on a captured port is reached by local programs, without the tunnel."""
    with host.entered():
        server = socket.create_server(("0.0.0.0", 7))
    server.settimeout(40)
    path.start("app")
    with server:
        for address in ("127.0.0.1", "10.81.1.1", "192.168.0.1"):
            with host.entered():
                program = socket.socket()
            with program:
                program.settimeout(40)
                program.connect((address, 7))
                with server.accept()[0] as accepted:
                    assert accepted.getpeername() == program.getsockname()
        _echo(host)
    assert path.programs["app"].stop() == 0


@pytest.mark.parametrize("reverse_path_filter", ["1", "2"])
def test_local_servers_keep_clients_whose_own_port_is_captured(
    path: Path, host: Host, reverse_path_filter: str
) -> None:
    """Their answers go back to the client and not into the tunnel, under strict reverse path filtering as well."""
    settings = [f"net.ipv4.conf.{name}.rp_filter" for name in ("all", path.outer_device)]
    before = [host.run("sysctl", "-n", name).strip() for name in settings]
    host.run("sysctl", "-qw", *(f"{name}={reverse_path_filter}" for name in settings))
    path.start("app")
    try:
        with host.entered():
            server = socket.create_server(("0.0.0.0", 5000))
            datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with path.hosts["near"].entered():
            client, asker = socket.socket(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with server, datagrams, client, asker:
            for each in (server, datagrams, client, asker):
                each.settimeout(40)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            client.bind((GATEWAY_OF_APP, 7))
            client.connect(("10.81.1.1", 5000))
            with server.accept()[0] as accepted:
                accepted.sendall(b"answer")
            assert client.recv(100) == b"answer"
            asker.bind((GATEWAY_OF_APP, 53))
            datagrams.bind(("10.81.1.1", 5000))
            asker.sendto(b"question", ("10.81.1.1", 5000))
            datagrams.sendto(b"answer", datagrams.recvfrom(100)[1])
            assert asker.recv(100) == b"answer"
    finally:
        path.programs["app"].stop()
        host.run("sysctl", "-qw", *(f"{name}={value}" for name, value in zip(settings, before, strict=True)))
