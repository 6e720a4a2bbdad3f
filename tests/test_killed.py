"""Kill -9 of ``enta client`` at any moment, on the whole path: what stays, what a start finds, what never leaves."""

from __future__ import annotations

import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator

import pytest
from enlink.testing.hosts import Host
from enlink.testing.probe import Packet, Wire, canary
from enlink.testing.programs import comes_true
from enlink.testing.state import difference, network_state
from enta.cleanup import clean_up
from path import GATEWAY_OF_APP, Path, Program

# A run takes half a second, nearly all of it the interpreter's; on a busy machine, several times as long.
pytestmark = pytest.mark.timeout(300)

FAR_BEYOND_S = 8 * 0.25  # what a kill leaves behind is gone within a quarter of a second
CLIENT = ["client", "--capture", "7", "--entg-connect", f"{GATEWAY_OF_APP}:6980"]

CANARIES = {("udp", 4), ("udp", 6), ("tcp", 4), ("tcp", 6)}

# The agent, with a count of its changes to the host: after so many it is killed.
COUNTED = """
import os, signal, sys
import enta.agent, enta.capture.routing, enta.cli
from enta.capture.nftables import NftablesFirewall
from enta.tun import Tun

left = int(sys.argv.pop(1))
def counted(name, change):
    def changed(*arguments, **options):
        global left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        os.write(1, f"change {name}\\n".encode())
        return change(*arguments, **options)
    return changed

class Kernel(enta.capture.routing.IPRoute):
    def __getattr__(self, name):
        found = super().__getattr__(name)
        return counted(name, found) if name in ("addr", "link", "route", "rule") else found

enta.capture.routing.IPRoute = Kernel
enta.agent.open_tun = counted("open_tun", enta.agent.open_tun)
Tun.close = counted("close", Tun.close)
for name in ("add_guard", "add_capture", "delete_capture", "delete_guard"):
    setattr(NftablesFirewall, name, counted(name, getattr(NftablesFirewall, name)))
sys.exit(enta.cli.main())
"""


@pytest.fixture(scope="module")
def path() -> Iterator[Path]:
    """The path, but for the client's agent, whose host has rules of strangers, and IPv6 to lead packets astray."""
    with Path(capture=["7", "udp/53"], replay=["7", "udp/5353"]) as made:
        app, device = made.hosts["app"], made.outer_device
        app.run("ip", "address", "add", "2001:db8:1::1/64", "dev", device, "nodad")
        app.run("ip", "neighbour", "add", "2001:db8:1::9", "lladdr", "02:00:00:00:00:09", "dev", device)
        for command in (
            "ip -6 route add default via 2001:db8:1::9",
            "ip route add 10.99.0.0/16 via 10.81.1.2 table 6978",
            "ip rule add priority 6978 to 10.98.0.0/16 lookup 6978",
            "ip rule add priority 6979 fwmark 0x1/0xff lookup main protocol 99",
            "nft add table inet eng_stranger",
            "nft add chain inet eng_stranger output { type filter hook output priority 0; }",
            "nft add rule inet eng_stranger output tcp dport 7 accept",
        ):
            app.run(*command.split())
        made.start("far", "near", "server")
        with made.running("server", "echosvr", "server", "--port", "7"):
            yield made


@pytest.fixture(scope="module")
def wire(path: Path) -> Iterator[Wire]:
    with Wire(path.hosts["app"], path.hosts["near"], "wire1b", GATEWAY_OF_APP) as wire:
        yield wire


class Crash:
    """What a first run looked like, and what it left when it was killed."""

    def __init__(self, path: Path) -> None:
        self.host, self.agent = path.hosts["app"], path.programs["app"]
        self.before = network_state(self.host)
        began_s = time.monotonic()
        self.agent.start()
        self.agent.wait_for("ready")
        self.ready_s = time.monotonic() - began_s
        self.running = network_state(self.host)
        self.agent.kill()
        self.left = difference(self.before, network_state(self.host))

    def residue(self) -> list[str]:
        """What is there now and was not, or the reverse, before the first run."""
        return difference(self.before, network_state(self.host))

    def has_settled(self) -> bool:
        """Nothing is there but what the first run left, or some of it, and nothing has gone."""
        return Counter(self.residue()) <= Counter(self.left)


@pytest.fixture
def crash(path: Path) -> Iterator[Crash]:
    crash = Crash(path)
    yield crash
    crash.agent.end()
    _clean_up(crash.host)
    assert crash.residue() == []


def _clean_up(host: Host) -> list[str]:
    with host.entered():
        return clean_up()


def _strays(wire: Wire) -> list[Packet]:
    """What has left but the agent's own link to its gateway."""
    return [packet for packet in wire.packets() if (str(packet.destination), packet.port) != (GATEWAY_OF_APP, 6980)]


@pytest.mark.proves("F04", "G5")
def test_exactly_the_tagged_rules_the_unreachable_route_and_the_guard_stay(crash: Crash) -> None:
    """What the other tests allow to be left is what the design names, line by line."""
    policy = [line for line in crash.left if "proto 78" in line]
    assert policy == [
        "+ 6977:\tfrom all fwmark 0x6978 lookup main proto 78",
        "+ 6978:\tfrom all to 192.168.0.0/24 iif lo lookup 6978 proto 78",
        "+ 6978:\tfrom 0.0.0.0 iif lo ipproto tcp dport 7 lookup 6978 proto 78",
        "+ 6978:\tfrom 192.168.0.1 iif lo ipproto tcp dport 7 lookup 6978 proto 78",
        "+ 6978:\tfrom 0.0.0.0 iif lo ipproto udp dport 53 lookup 6978 proto 78",
        "+ 6978:\tfrom 192.168.0.1 iif lo ipproto udp dport 53 lookup 6978 proto 78",
        "+ unreachable default table 6978 proto 78 metric 4294967295",
    ]
    guard = crash.host.run("nft", "--stateless", "list", "table", "inet", "eng_default_guard")
    rest = Counter(line[2:] for line in crash.left if line not in policy)
    assert rest == Counter(line.strip() for line in guard.splitlines() if line.strip())


# 100 kills in all, with those of the next test.
@pytest.mark.proves("F04", "G5", "G7", "G8", "D16", "D29")
@pytest.mark.parametrize(("moment", "kills"), [("starting", 50), ("running", 25)])
def test_killed_at_random_moments_it_leaves_no_more_and_nothing_captured_leaves(
    path: Path, wire: Wire, crash: Crash, moment: str, kills: int
) -> None:
    """A program keeps trying from before the first kill to after the last, with and without connections.

    The control is at the end: with the same program still running, what holds it back is removed.
    """
    agent = crash.agent
    with canary(crash.host, tcp_port=7, udp_port=53):
        wire.packets()
        for _ in range(kills):
            agent.start()
            if moment == "running":
                agent.wait_for("ready")
            _kill_within(agent, 0.1 if moment == "running" else crash.ready_s)
            assert comes_true(crash.has_settled, FAR_BEYOND_S), (
                f"{difference(crash.left, crash.residue())}\n{agent.log()}"
            )
            assert _strays(wire) == []
        _run_once_more(crash)
        assert _strays(wire) == []

        _clean_up(crash.host)
        seen: set[tuple[str, int]] = set()

        def has_seen_all() -> bool:
            seen.update((packet.protocol, packet.destination.version) for packet in _strays(wire))
            return seen >= CANARIES

        assert comes_true(has_seen_all, 20), f"the probe is blind: it has seen only {seen}"


@pytest.mark.proves("F05", "G5", "D29")
def test_killed_at_random_moments_of_its_end_it_leaves_no_more(crash: Crash) -> None:
    """It has been told to stop, and is about to take everything back."""
    for _ in range(25):
        crash.agent.start()
        crash.agent.wait_for("ready")
        crash.agent.process.send_signal(signal.SIGTERM)
        _kill_within(crash.agent, 0.1)
        assert comes_true(crash.has_settled, FAR_BEYOND_S), (
            f"{difference(crash.left, crash.residue())}\n{crash.agent.log()}"
        )
    _run_once_more(crash)


def _kill_within(agent: Program, seconds: float) -> None:
    try:
        agent.process.wait(random.uniform(0, seconds))
    except subprocess.TimeoutExpired:
        agent.kill()


def _run_once_more(crash: Crash) -> None:
    """Start and kill it: what it sets up and what it leaves is what the first run did, once."""
    crash.agent.start()
    crash.agent.wait_for("ready")
    assert difference(crash.running, network_state(crash.host)) == []
    crash.agent.kill()
    assert comes_true(lambda: crash.residue() == crash.left, FAR_BEYOND_S)


@pytest.mark.proves("F01", "F02", "F03", "F05", "D30", "G5")
@pytest.mark.parametrize("half", ["start", "stop"])
def test_killed_after_any_of_its_changes_it_leaves_no_more_and_cleanup_takes_it(
    path: Path, crash: Crash, half: str
) -> None:
    """One run for each change, from before the first to before the last: rules are never there without the guard."""
    _clean_up(crash.host)
    all_changes = _changes_of_run(path, 1000)
    start, stop = all_changes[:11], all_changes[11:]
    assert start == ["add_guard", "open_tun", "addr", "link", "add_capture", *["route"] * 2, *["rule"] * 4]
    assert stop == [*["rule"] * 4, *["route"] * 2, "delete_capture", "close", "delete_guard"]
    assert crash.residue() == []
    for count in range(len(start)) if half == "start" else range(len(start), len(all_changes)):
        changes = _changes_of_run(path, count)
        assert changes == all_changes[:count]
        assert comes_true(crash.has_settled, FAR_BEYOND_S), f"{changes}: {difference(crash.left, crash.residue())}"
        left = crash.residue()
        is_guarded = "+ table inet eng_default_guard {" in left
        assert is_guarded == (count > 0), changes
        assert any("proto 78" in line for line in left) == (len(start) - 6 < count < len(start) + 6), changes
        assert bool(_clean_up(crash.host)) == is_guarded
        assert _clean_up(crash.host) == []
        assert crash.residue() == []


def _changes_of_run(path: Path, count: int) -> list[str]:
    """Start the agent, stop it when it is ready, and kill it once it has changed its host so many times."""
    agent = path.program("app", [sys.executable, "-c", COUNTED, str(count), *CLIENT], f"counted-{count}")
    agent.start()
    try:
        assert comes_true(lambda: "ready" in agent.log() or agent.process.poll() is not None, 20)
        agent.stop()
    finally:
        agent.end()
    changes = re.findall(r"^change (\w+)$", agent.log(), re.MULTILINE)
    assert agent.process.returncode == (-signal.SIGKILL if len(changes) == count else 0), agent.log()
    return changes
