"""Links that fall silent, crawl or go away: noticed in time, made again at once, and no more kept than was promised."""

from __future__ import annotations

import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path as FilePath
from typing import Any

import pytest
from enlink.link import SILENCE_LIMIT_S
from enlink.stream import ACKNOWLEDGE_DEADLINE_S
from enlink.testing.gateways import HELLO, AgentSide, Between, split_frames
from enlink.testing.hosts import Host
from enlink.testing.programs import Program, started
from enlink.testing.transfer import MIB, NOWHERE, Transfer, until
from enta.uplink import QUEUE_LIMIT_BYTES
from path import BIN, GATEWAY_OF_APP, Path

TUN_QUEUE = 2000  # packets, the device's txqueuelen


@pytest.fixture
def path() -> Iterator[Path]:
    """The path with its four programs, and an echo server."""
    with Path() as made, made.running("server", "echosvr", "server", "--port", "7"):
        made.start()
        yield made


@contextmanager
def losing(host: Host, what: str) -> Iterator[Callable[[], int]]:
    """Lose *what*, in nft's words, of all that comes to a host. Yields what counts the packets that were lost."""
    rule = f"type filter hook prerouting priority -300; {what} counter drop;"
    host.run("nft", "-f", "-", input=f"table inet outage {{ chain arriving {{ {rule} }}; }}\n")

    def lost() -> int:
        listing = host.run("nft", "list", "table", "inet", "outage")
        return int(listing.partition("counter packets ")[2].partition(" ")[0])

    try:
        yield lost
    finally:
        host.run("nft", "delete", "table", "inet", "outage")


def links(path: Path) -> int:
    return path.programs["app"].log().count(" uplink_up ")


def losses(path: Path) -> int:
    return path.programs["app"].log().count(" uplink_down ")


def ends(path: Path) -> set[str]:
    """The reasons for which the client's links have ended, but for attempts in vain."""
    return set(path.programs["app"].status()["counters"]["uplink_ended"]) - {"unreachable", "no_hello"}


# Silence.


@pytest.mark.proves("F07", "F18", "F19", "F20", "G9")
def test_a_gateway_that_stops_without_a_word_is_noticed_and_found_again_at_once(path: Path) -> None:
    """Its host still takes what is sent to it: only the lack of a word tells. The transfer across it completes."""
    gateway = path.programs["near"].process
    with Transfer(path.hosts["app"]) as transfer:
        gateway.send_signal(signal.SIGSTOP)
        try:
            noticed_s = until(lambda: losses(path) == 1, "noticed")
        finally:
            gateway.send_signal(signal.SIGCONT)
        back_s = until(lambda: links(path) == 2, "back")
        transfer.goes_on()
    assert noticed_s < 2 * SILENCE_LIMIT_S
    assert back_s < 8
    assert ends(path) <= {"keepalive", "reset"}


@pytest.mark.proves("F19", "F20", "F26")
def test_a_wire_that_is_cut_without_a_word_is_noticed_and_used_again_when_it_is_mended(path: Path) -> None:
    """Nothing arrives any more, and nothing says so; attempts time out, too."""
    with Transfer(path.hosts["app"]) as transfer:
        with losing(path.hosts["near"], "iifname wire1b"), losing(path.hosts["app"], "iifname wire1a"):
            noticed_s = until(lambda: losses(path) == 1, "noticed")
        back_s = until(lambda: links(path) == 2, "back")
        transfer.goes_on()
    assert noticed_s < 2 * max(SILENCE_LIMIT_S, ACKNOWLEDGE_DEADLINE_S)
    assert back_s < 8
    assert ends(path) <= {"keepalive", "reset"}


@pytest.mark.proves("F07", "F63")
def test_an_agent_that_was_stopped_goes_on_where_it_was(path: Path) -> None:
    """Its gateway gives it up meanwhile; awake, it dials again, without a loop that does not end."""
    agent = path.programs["app"].process
    with Transfer(path.hosts["app"]) as transfer:
        agent.send_signal(signal.SIGSTOP)
        try:
            until(lambda: "disconnected" in path.programs["near"].log(), "given up")
        finally:
            agent.send_signal(signal.SIGCONT)
        back_s = until(lambda: links(path) == 2, "back")
        transfer.goes_on()
    assert back_s < 8
    assert losses(path) == 1


@pytest.mark.proves("F20")
def test_a_second_without_the_wire_and_a_lossy_one_cost_time_and_nothing_else(path: Path) -> None:
    """The link is the same one afterwards, and the program's connection as well."""
    near = path.hosts["near"]
    with Transfer(path.hosts["app"]) as transfer:
        with losing(near, "iifname wire1b numgen random mod 100 < 20") as lost:
            until(lambda: lost() >= 20, "lossy")
        transfer.goes_on()
        with losing(near, "iifname wire1b"):
            gone_s = time.monotonic()
            until(lambda: time.monotonic() - gone_s > 1, "gone for a second")
        transfer.goes_on()
    assert (links(path), losses(path)) == (1, 0)


@pytest.mark.proves("F21")
def test_a_slow_way_times_nothing_out() -> None:
    """A fifth of a second each way, give or take a tenth."""
    with (
        Path() as path,
        Between(path.hosts["near"], path.hosts["far"], greeting=HELLO) as gateway,
        path.running("server", "echosvr", "server", "--port", "7"),
    ):
        path.start("app", "server")
        gateway.client.delay_s = gateway.server.delay_s = (0.1, 0.3)
        path.hosts["app"].run(str(BIN / "echosvr"), "client", "--host", NOWHERE, "--bytes", "300000")
        assert [len(side.connections) for side in (gateway.client, gateway.server)] == [1, 1]


# Queues.


class Captured:
    """A client's agent, its gateway, and a program that sends it numbered datagrams."""

    def __init__(self, agent: Program, gateway: AgentSide, program: socket.socket) -> None:
        self.agent = agent
        self.gateway = gateway
        self._program = program
        self._next = 0

    def send(self, count: int) -> None:
        """Send datagrams as fast as possible, each with the next number."""
        for number in range(self._next, self._next + count):
            self._program.sendto(struct.pack("!I", number) + bytes(196), (NOWHERE, 53))
        self._next += count

    def heard(self) -> list[int]:
        """The numbers of those that have reached the gateway on its newest link, in order."""
        payloads, _ = split_frames(self.gateway.connections[-1].heard)
        return [struct.unpack_from("!I", payload, 28)[0] for payload in payloads if payload[0] == 0x45]

    def status(self) -> dict[str, Any]:
        return self.agent.status()


@pytest.fixture
def captured() -> Iterator[Captured]:
    with Path() as path, AgentSide(path.hosts["near"], greeting=HELLO) as gateway:
        host = path.hosts["app"]
        options = ("--capture", "udp/53", "--entg-connect", f"{GATEWAY_OF_APP}:6980")
        with started(host, "enta", "client", *options) as agent:
            agent.wait_until_ready()
            with host.entered():
                program = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            with program:
                yield Captured(agent, gateway, program)


@pytest.mark.proves("D21", "F23")
def test_without_a_gateway_the_newest_packets_are_kept_and_the_oldest_counted(captured: Captured) -> None:
    """Of 20,000 datagrams as many as fit into a mebibyte arrive when the gateway is back, in order, to the last."""
    agent, gateway = captured.agent, captured.gateway
    captured.send(10)
    until(lambda: len(captured.heard()) == 10, "heard")
    gateway.close()
    agent.wait_until(lambda: not captured.status()["uplink"]["up"], "noticed")
    resident_bytes = agent.resident_bytes
    gone = lost = 0
    kept: dict[str, int] = {}
    for total in range(100, 20_001, 100):
        captured.send(100)
        while gone < total:
            status = captured.status()
            kept, lost = status["uplink"]["queued"], status["counters"].get("dropped", {}).get("queue_full", 0)
            gone = kept["packets"] + lost
            assert kept["bytes"] <= QUEUE_LIMIT_BYTES == MIB
    assert gone == 20_000
    assert lost > 10_000
    assert kept["bytes"] > 0.99 * MIB
    assert captured.status()["tun"]["queue_dropped"] == 0
    assert agent.resident_bytes - resident_bytes < 4 * MIB
    gateway.open()
    until(lambda: len(gateway.connections) == 2 and len(captured.heard()) >= kept["packets"], "back")
    assert captured.heard() == list(range(20_010 - kept["packets"], 20_010))


def is_stopped(agent: Program) -> bool:
    return ") T " in FilePath(f"/proc/{agent.process.pid}/stat").read_text()


@pytest.mark.proves("F63")
def test_what_a_stopped_agent_does_not_read_in_time_is_counted(captured: Captured) -> None:
    """The kernel keeps 2,000 packets for it and drops the rest without a word to the sender: status tells."""
    agent = captured.agent
    agent.signal(signal.SIGSTOP)
    until(lambda: is_stopped(agent), "stopped")
    captured.send(5000)
    agent.signal(signal.SIGCONT)
    agent.wait_until(lambda: len(captured.heard()) == TUN_QUEUE, "went on")
    assert captured.status()["tun"]["queue_dropped"] == 5000 - TUN_QUEUE
    assert captured.heard() == list(range(TUN_QUEUE))
    captured.send(1)
    agent.wait_until(lambda: captured.heard()[-1] == 5000, "works")


@pytest.mark.proves("D21", "F23")
def test_a_link_that_crawls_holds_up_a_bounded_queue_and_what_does_not_fit_is_counted(captured: Captured) -> None:
    """At 10 kB a second: memory stays flat, the link stays up, and every datagram is sent or counted."""
    agent, host = captured.agent, captured.agent.host
    resident_bytes = agent.resident_bytes
    slow = ("dev", "wire1a", "root", "tbf", "rate", "80kbit", "burst", "5kb", "limit", "20kb")
    host.run("tc", "qdisc", "add", *slow)
    for _ in range(20):
        captured.send(1000)
        status = captured.status()
        assert status["uplink"]["up"]
        assert status["uplink"]["queued"] == {"packets": 0, "bytes": 0}
    assert captured.status()["tun"]["queue_dropped"] > 10_000
    assert agent.resident_bytes - resident_bytes < 4 * MIB
    host.run("tc", "qdisc", "delete", "dev", "wire1a", "root")
    agent.wait_until(
        lambda: len(captured.heard()) + captured.status()["tun"]["queue_dropped"] == 20_000, "all accounted for"
    )
    assert captured.heard() == sorted(set(captured.heard()))
    assert len(captured.gateway.connections) == 1
