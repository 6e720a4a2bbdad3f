"""The command line of ``enta``: wrong use is one line and its exit code, a dry run is the truth, every option works."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import pytest
from enlink.testing.hosts import Host, Network
from enlink.testing.probe import Wire, send
from enlink.testing.programs import as_nobody
from enlink.testing.state import difference, network_state
from enta.capture.libnftables import Nft
from enta.cli import main
from path import BIN, GATEWAY_OF_APP, PLACES, Path, Place

ENTA = str(BIN / "enta")
CLIENT = ("client", "--capture", "7")


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    """A host without an agent, and without a gateway."""
    with Network() as network:
        yield network.host("bare")


def _run(host: Host, *argv: str, environment: dict[str, str] | None = None) -> tuple[int, str, list[str]]:
    """Run a program on *host* to its end: exit code, standard output, lines on standard error."""
    done = subprocess.run(
        host.argv(argv),
        capture_output=True,
        text=True,
        timeout=40,
        env={**os.environ, **(environment or {})},
        check=False,
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr.splitlines()


# ---- wrong use: nothing is asked of the host, so the program's own main() is called, many times, on a host to be sure

WRONG_USE = [
    # nothing to do, or nothing known
    (64, "", "COMMAND"),
    (64, "nonsense", "nonsense"),
    (64, "client", "--capture 7"),
    (64, "server", "--replay 7"),
    (64, "client --capture 7 --nonsense", "--nonsense"),
    (64, "client --capture 7 --capt 8", "--capt"),
    (64, "client --capture 7 extra", "extra"),
    (64, "client --capture 7 --config file", "--config"),
    (64, "client --capture 7 --entg-connect", "--entg-connect"),
    (64, "cleanup --nonsense", "--nonsense"),
    (64, "doctor --capture 7 --replay 7", "not both"),
    # ports
    (64, "client --capture 0", "'0'"),
    (64, "client --capture 65536", "65536"),
    (64, "client --capture seven", "'seven'"),
    (64, "client --capture icmp/7", "'icmp'"),
    (64, "client --capture 10.0.0.1/8:7", "host bits"),
    (64, "client --capture 300.0.0.0/8:7", "300.0.0.0/8"),
    (64, "client --capture 7 --capture 7", "tcp/7 is captured already"),
    (64, "client --capture 7 --capture 8:6978", "6978 is used twice"),
    (64, "server --replay 7 --replay 8:6978", "6978 is used twice"),
    (64, "server --replay 10.0.0.0/8:7", "takes no address"),
    (64, "server --capture 7", "use --replay"),
    (64, "server --replay 8 --capture 7", "use --replay"),
    (64, "client --replay 7", "use --capture"),
    (78, "client --capture 127.0.0.0/8:7", "127.0.0.0/8"),
    (78, "client --capture [2001:db8::/32]:443", "IPv6"),
    # addresses
    (64, "client --capture 7 --tun-addr 300.1.1.1", "300.1.1.1"),
    (64, "client --capture 7 --tun-addr fd00::1", "fd00::1"),
    (64, "client --capture 7 --tun-addr 192.168.0.0", "network or broadcast"),
    (64, "client --capture 7 --tun-addr 127.0.0.1", "127.0.0.1"),
    (64, "client --capture 7 --tun-addr 192.168.0.254", "the same as --tun-addr"),
    (64, "client --capture 7 --peer-addr nonsense", "nonsense"),
    (64, "client --capture 7 --peer-addr 10.0.0.1", "not inside"),
    (64, "client --capture 7 --peer-addr 192.168.0.255", "network or broadcast"),
    (64, "client --capture 7 --tun-mask 255.0.255.0", "255.0.255.0"),
    (64, "client --capture 7 --tun-mask 255.255.255.255", "255.255.255.255"),
    (64, "client --capture 7 --tun-mask 0.0.0.0", "0.0.0.0"),
    # names and numbers
    (64, "client --capture 7 --mtu 575", "575"),
    (64, "client --capture 7 --mtu 65536", "65536"),
    (64, "client --capture 7 --mtu many", "'many'"),
    (64, "client --capture 7 --table 0", "--table 0"),
    (64, "client --capture 7 --table 254", "--table 254"),
    (64, "client --capture 7 --table 4294967296", "4294967296"),
    (64, "client --capture 7 --table main", "'main'"),
    (64, "client --capture 7 --mark 0", "--mark 0x0"),
    (64, "client --capture 7 --mark 0x100000000", "0x100000000"),
    (64, "client --capture 7 --instance UPPER", "'UPPER'"),
    (64, "client --capture 7 --instance 0123456789abcdef", "1 to 15"),
    (64, "client --capture 7 --instance a_guard", "'a_guard'"),
    (64, "client --capture 7 --tun-name lo", "'lo'"),
    (64, "client --capture 7 --tun-name 0123456789abcdef", "1 to 15"),
    (64, "client --capture 7 --tun-name a/b", "'a/b'"),
    (64, "client --capture 7 --wire x", "'original'"),
    (64, "client --capture 7 --firewall x", "'nftables'"),
    (64, "client --capture 7 --on-crash x", "'closed'"),
    # the gateway
    (64, "client --capture 7 --entg-connect nowhere", "HOST:PORT"),
    (64, "client --capture 7 --entg-connect :6980", ":6980"),
    (64, "client --capture 7 --entg-connect host:0", "port 0"),
    (64, "client --capture 7 --entg-connect host:65536", "65536"),
    (64, "client --capture 7 --entg-connect vsock://3:1", "vsock://"),
    (64, "client --capture 7 --entg-connect ::1:6980", "brackets"),
    (64, "client --capture 7 --entg-connect a:1 --entg-connect a:1", "tcp://a:1 is there twice"),
    (64, "client --capture 7 --entg-connect a:1 --entg-connect a:2 --once", "--once"),
    (64, "doctor --capture 7 --entg-connect a:1 --entg-connect a:1", "tcp://a:1 is there twice"),
    # attested links
    (78, "client --capture 7 --entg-rats-tls", "--policy FILE"),
    (78, "client --capture 7 --mutual", "--mutual"),
    (78, "client --capture 7 --attester x", "--attester"),
    (78, "client --capture 7 --verifier x", "--verifier"),
    (78, "client --capture 7 --tls x", "--tls"),
    (78, "client --capture 7 --crypto x", "--crypto"),
    (78, "client --capture 7 --policy x", "--policy"),
    (78, "server --replay 7 --entg-rats-tls --policy x --insecure-no-attestation", "contradict"),
    (78, "server --replay 7 --entg-rats-tls --policy x --mutual", "--attester"),
]


@pytest.mark.parametrize(("code", "line", "names"), WRONG_USE, ids=[line or "nothing" for _, line, _ in WRONG_USE])
def test_wrong_use_is_one_line_that_names_the_mistake(
    host: Host,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    code: int,
    line: str,
    names: str,
) -> None:
    """Nothing on standard output, and never a traceback; 78 is for what is well said but cannot be."""
    monkeypatch.setattr(sys, "argv", ["enta", *line.split()])
    with host.entered():
        assert main() == code
    output, complaint = capfd.readouterr()
    assert output == ""
    assert re.fullmatch(r"enta: [^\n]+\n", complaint)
    assert names in complaint


def test_the_program_ends_with_the_code_that_its_main_returns(host: Host) -> None:
    """As a process of its own, through the installed command."""
    code, output, lines = _run(host, ENTA, *CLIENT, "--nonsense")
    assert (code, output, lines) == (64, "", ["enta: unrecognized arguments: --nonsense; see enta --help"])


# ---- a host that will not do


@pytest.mark.proves("F59")
@pytest.mark.parametrize(
    "without",
    [
        ("setpriv", "--bounding-set=-all", "--inh-caps=-all"),
        as_nobody(),
    ],
    ids=["root without capabilities", "an ordinary user"],
)
@pytest.mark.parametrize("command", [CLIENT, ("server", "--replay", "7"), ("cleanup",)], ids=" ".join)
def test_without_privilege_nothing_is_done(host: Host, without: Sequence[str], command: Sequence[str]) -> None:
    """Exit code 77, and what to do about it; the host is as it was."""
    before = network_state(host)
    code, output, lines = _run(host, *without, ENTA, *command)
    assert (code, output, len(lines)) == (77, "", 1)
    assert "CAP_NET_ADMIN" in lines[0]
    assert network_state(host) == before


@pytest.mark.proves("F60")
@pytest.mark.parametrize("obstacle", ["mount -t tmpfs none /dev/net", "mount --bind /dev/null /dev/net/tun"])
def test_without_the_tun_driver_nothing_is_done(host: Host, obstacle: str) -> None:
    """Exit code 73 without the device; 71 if it is another one. The guard that was there for a moment is gone."""
    before = network_state(host)
    script = f"{obstacle} && exec {ENTA} client --capture 7"
    code, output, lines = _run(host, "unshare", "--mount", "sh", "-c", script)
    assert (code, output, len(lines)) == (73 if "tmpfs" in obstacle else 71, "", 1)
    assert "/dev/net/tun" in lines[0]
    assert network_state(host) == before


def test_once_a_gateway_that_has_no_address_is_the_end(host: Host) -> None:
    """Exit code 69; the name is in the line."""
    code, _, lines = _run(host, ENTA, *CLIENT, "--entg-connect", "gateway.invalid:6980", "--once")
    assert (code, len(lines)) == (69, 1)
    assert "gateway.invalid" in lines[0]


# ---- a dry run


@pytest.mark.parametrize("firewall", ["nftables", "iptables"])
@pytest.mark.parametrize("command", [CLIENT, ("server", "--replay", "7")], ids=" ".join)
def test_a_dry_run_changes_nothing_and_needs_nothing(host: Host, command: Sequence[str], firewall: str) -> None:
    """An ordinary user, who could change nothing, reads the same as root."""
    before = network_state(host)
    argv = (ENTA, *command, "--firewall", firewall, "--dry-run")
    printed = _run(host, *argv)
    assert printed[0::2] == (0, [])
    assert _run(host, *as_nobody(), *argv) == printed
    assert network_state(host) == before


def _dry_run(path: Path, place: Place) -> dict[str, str]:
    """What an agent would do, by its titles."""
    printed = path.hosts[place].run(*path.programs[place].argv, "--dry-run")
    return dict(re.findall(r"^# (.+)\n((?:(?!# ).*\n)+)", printed, re.MULTILINE))


@pytest.mark.parametrize(("firewall", "lanes"), [("nftables", 1), ("iptables", 1), ("nftables", 2)])
def test_what_a_dry_run_prints_gives_by_hand_what_the_agent_gives(firewall: str, lanes: int) -> None:
    """Rule by rule and route by route, on the hosts of client and server."""
    options = ("--firewall", firewall)
    ports: dict[str, Any] = {"capture": ["7", "udp/53", "10.1.0.0/16:80"], "replay": ["7", "udp/53"]}
    with Path(**ports, client=options, server=options, lanes=lanes) as path:
        path.start()
        for place in ("app", "server"):
            host, agent = path.hosts[place], path.programs[place]
            by_agent = network_state(host)
            parts = _dry_run(path, place)
            commands = parts.pop("ip commands")
            assert ("multi_queue" in commands) == (lanes > 1)
            assert agent.stop() == 0
            with host.entered():
                nft = Nft()
            with closing(nft):  # what has an owner goes with it
                if firewall == "nftables":
                    nft.run("".join(parts.values()))
                else:
                    host.run("sh", "-e", input="".join(parts.values()))
                host.run("sh", "-e", input=commands)
                assert _comparable(network_state(host)) == _comparable(by_agent)


def _comparable(state: list[str]) -> list[str]:
    """Leave out what differs by nature: a device made by hand has nobody who reads it, and an owner has a name."""
    lines = (re.sub(r" linkdown| # progname .*", "", line) for line in state)
    return sorted(line for line in lines if not line.startswith("eng0: <"))


def test_who_is_no_worker_of_an_agent_cannot_be_made_one(host: Host) -> None:
    before = network_state(host)
    for text in ("nonsense", "0", "999"):
        code, out, lines = _run(host, ENTA, *CLIENT, environment={"ENG_ENTA_LANE": text})
        assert (code, out, len(lines)) == (78, "", 1)
        assert f"ENG_ENTA_LANE={text!r}" in lines[0]
    assert network_state(host) == before


# ---- options that work


def _echo(path: Path, address: str = "1.1.1.1", port: int = 7, source: str | None = None) -> None:
    """Reach the echo server as a captured program."""
    with path.hosts["app"].entered():
        program = socket.socket()
    with program:
        program.settimeout(40)
        program.connect((address, port))
        program.sendall(b"hello")
        assert program.recv(5, socket.MSG_WAITALL) == b"hello"
        assert source is None or program.getsockname()[0] == source


def test_another_address_name_table_and_mark_work_as_well_as_the_defaults() -> None:
    """Nothing is hard-coded: all of it is other than the default, on both sides."""
    common = ("--tun-mask", "255.255.255.240", "--tun-name", "tunnel.7", "--table", "77", "--mark", "0x77")
    options = (*common, "--mtu", "1500", "--instance", "seven")
    with Path(
        client=(*options, "--tun-addr", "10.200.7.9", "--peer-addr", "10.200.7.10"),
        server=(*options, "--tun-addr", "10.200.7.10", "--peer-addr", "10.200.7.9"),
    ) as path:
        path.start()
        with path.running("server", "echosvr", "server", "--port", "7"):
            _echo(path, source="10.200.7.9")
        host = path.hosts["app"]
        state = "\n".join(network_state(host))
        assert re.search(r"^tunnel\.7: .* mtu 1500 ", state, re.MULTILINE)
        assert re.search(r"^tunnel\.7 +inet 10\.200\.7\.9/28 ", state, re.MULTILINE)
        assert "fwmark 0x77 lookup main" in state
        assert "lookup 77" in state
        assert not re.search(r"\beng0\b|6978 proto|lookup 6978|0x6978|0x00006978|192\.168\.0", state)


@pytest.mark.proves("G8")
def test_ports_networks_and_transits_lead_each_to_its_own_server() -> None:
    """What is captured in one network only leaves bare everywhere else, and the n-th port is for the n-th."""
    with Path(capture=["7", "10.50.0.0/16:8:7000", "udp/53"], replay=["17", "18:7000", "udp/19"]) as path:
        path.start()
        with (
            path.running("server", "echosvr", "server", "--port", "17"),
            path.running("server", "echosvr", "server", "--port", "18"),
            path.running("server", "echosvr", "server", "--port", "19", "--udp"),
            Wire(path.hosts["app"], path.hosts["near"], "wire1b", GATEWAY_OF_APP) as wire,
        ):
            _echo(path, port=7)
            _echo(path, "10.50.1.1", port=8)
            path.hosts["app"].run(str(BIN / "echosvr"), "client", "--host", "1.1.1.1", "--port", "53", "--udp")
            assert {packet.port for packet in wire.packets()} == {6980}
            assert send(path.hosts["app"], "tcp", "1.1.1.1", 8) == 0
            assert (8, "1.1.1.1") in {(packet.port, str(packet.destination)) for packet in wire.packets()}
        assert path.programs["app"].status()["ports"] == ["tcp/10.50.0.0/16:8:7000", "tcp/7:6978", "udp/53:6979"]


def test_the_uplinks_own_port_can_be_captured() -> None:
    """The link to the gateway is excluded; what programs send to the same port elsewhere is not."""
    with Path(capture=["6980"], replay=["6980"]) as path:
        path.start()
        with path.running("server", "echosvr", "server", "--port", "6980"):
            _echo(path, port=6980)
            path.programs["near"].kill()
            path.start("near")
            _echo(path, port=6980)


@pytest.mark.proves("F04", "D29", "D30")
def test_with_iptables_the_path_works_and_a_crash_is_cleaned_up() -> None:
    """A kill leaves the rules, which still hold captured traffic back; cleanup takes them, and strangers' stay."""
    with Path(client=("--firewall", "iptables"), server=("--firewall", "iptables")) as path:
        host, agent = path.hosts["app"], path.programs["app"]
        for rule in ("-t mangle -A OUTPUT -p tcp --dport 70 -j ACCEPT", "-t nat -A OUTPUT -p tcp --dport 9 -j ACCEPT"):
            host.run("iptables-legacy", *rule.split())
        host.run("ip6tables-legacy", "-A", "OUTPUT", "-p", "tcp", "--dport", "9", "-j", "ACCEPT")
        before = network_state(host)
        path.start()
        with path.running("server", "echosvr", "server", "--port", "7"):
            _echo(path)
            running = network_state(host)
            with Wire(host, path.hosts["near"], "wire1b", GATEWAY_OF_APP) as wire:
                agent.kill()
                wire.packets()
                send(host, "tcp", "1.1.1.1", 7)
                assert [packet for packet in wire.packets() if packet.port != 6980] == []
                assert "rules of instance 'default'" in host.run(ENTA, "cleanup")
                assert host.run(ENTA, "cleanup") == ""
                assert difference(before, network_state(host)) == []
                send(host, "tcp", "1.1.1.1", 7)
                assert [packet.port for packet in wire.packets()] == [7]
            path.start("app")
            assert difference(running, network_state(host)) == []
            _echo(path)
        assert agent.stop() == 0
        assert difference(before, network_state(host)) == []


@pytest.mark.parametrize("first", PLACES)
def test_the_programs_start_in_any_order(first: Place) -> None:
    """Each of the four may be the first; the others follow from the far end, one when the last has begun."""
    order = [first, *(place for place in reversed(PLACES) if place != first)]
    with Path() as path, path.running("server", "echosvr", "server", "--port", "7"):
        for place in order:
            path.programs[place].start()
            path.programs[place].wait_for("uplink_down|unreachable|ready|connected|uplink_up")
        for place in PLACES:
            path.programs[place].wait_for("ready")
        _echo(path)


@pytest.mark.proves("F26")
def test_a_gateway_that_refuses_is_tried_for_ever_and_told_of_once() -> None:
    """One line in the log for many attempts; status counts them and says why."""
    with Path() as path:
        agent = path.programs["app"]
        agent.start()
        agent.wait_for("uplink_down")
        deadline_s = time.monotonic() + 40
        while agent.status()["counters"]["uplink_ended"]["unreachable"] < 5:
            assert time.monotonic() < deadline_s
        assert "Connection refused" in agent.status()["uplink"]["last_error"]
        assert agent.log().count("uplink_down") == 1
        path.start("far", "near")
        agent.wait_for("uplink_up")
