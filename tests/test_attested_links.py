"""Attested links that live: judged again in time, mutual, ended in order or not, and in spite of strangers.

Real programs over the stand-in. For links that must not come up see test_attested.py.
"""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path as FilePath

import pytest
import standin
from attested import POLICY as DEMO_POLICY
from attested import attested_path
from attested_pair import GATEWAY, PORT, Pair, attested_pair, client_hello, counted
from enlink.testing.hosts import Host
from enlink.testing.programs import Program
from entg.legs import ATTESTED_LIMIT

NOWHERE = "1.1.1.1"
SHARE = 32  # handshakes that one address may fail
MIB = 1 << 20


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    directory = tmp_path_factory.mktemp("attested")
    with attested_pair(standin.build(directory / "rats-tls"), directory) as made:
        yield made


def is_connected(gateway: Program) -> bool:
    return bool(gateway.status()["legs"]["enta"]["connected"])


# Judged again.


@pytest.mark.proves("D5", "G1")
def test_a_transfer_of_100_megabytes_outlives_links_that_are_judged_again_every_second(
    tmp_path: FilePath,
) -> None:
    """On one connection of an application's, from which nothing is lost: all three links are made again and again."""
    library = standin.build(tmp_path / "rats-tls")
    policy = 'max_link_age = "1s"\n' + DEMO_POLICY
    with (
        attested_path(library, tmp_path, policy=policy) as path,
        path.running("server", "echosvr", "server", "--port", "7"),
    ):
        path.start()
        began_s = time.monotonic()
        with path.hosts["app"].entered():
            connection = socket.create_connection((NOWHERE, 7), 30)
        with connection:
            assert echo(connection, 100 * MIB, pace_bps=25e6)
        lasted_s = time.monotonic() - began_s
        for place in ("app", "server"):
            counters = path.programs[place].status()["counters"]
            assert counters["uplink_ended"]["reattest"] >= 3
            assert counters["uplink_ended"]["reattest"] <= lasted_s + 2, "links end before they are due"
            assert set(counters["uplink_ended"]) == {"reattest"}
            # At this moment the last one may be about to be replaced.
            assert counters["uplinks"]["made"] - counters["uplink_ended"]["reattest"] in (0, 1)
        assert path.programs["near"].status()["counters"]["entg_ended"]["reattest"] >= 3
        assert path.programs["app"].log().count(" uplink_due ") >= 3


def echo(connection: socket.socket, total: int, pace_bps: float) -> bool:
    """Send, and tell whether the same came back."""
    sent, got = hashlib.sha256(), hashlib.sha256()
    connection.settimeout(40)

    def receive() -> None:
        while piece := connection.recv(1 << 18):
            got.update(piece)

    reader = threading.Thread(target=receive)
    reader.start()
    stock, began_s = os.urandom(1 << 16), time.monotonic()
    for done in range(0, total, len(stock)):
        piece = done.to_bytes(8, "big") + stock[8:]
        connection.sendall(piece)
        sent.update(piece)
        time.sleep(max(0, done / pace_bps - (time.monotonic() - began_s)))
    connection.shutdown(socket.SHUT_WR)
    reader.join(40)
    return got.digest() == sent.digest()


# Both judge.


@pytest.mark.proves("D1")
def test_in_mutual_mode_each_judges_the_other(pair: Pair) -> None:
    mutual = ("--mutual", "--policy", str(pair.policy))
    with pair.gateway(*mutual) as gateway, pair.agent("--mutual", "--attester", "sgx_ecdsa") as agent:
        agent.wait_until_ready()
        assert "(accepted, sgx_ecdsa, 20" in agent.status()["uplink"]["attested"]["peer"]
        assert "(accepted, sgx_ecdsa, 20" in gateway.status()["legs"]["enta"]["attested"]["peer"]


@pytest.mark.proves("D1", "D9")
@pytest.mark.parametrize(
    ("options", "says", "reason"),
    [
        (("--mutual", "--attester", "sgx_ecdsa"), {"STANDIN_MR_ENCLAVE": "66" * 32}, "mrenclave"),
        (("--mutual", "--attester", "sgx_ecdsa"), {"STANDIN_ATTRIBUTES": "07" + "00" * 15}, "debug"),
        ((), {}, "handshake"),  # it shows nothing
    ],
    ids=["another build", "debug", "no evidence"],
)
def test_in_mutual_mode_a_gateway_refuses_an_agent_and_the_agent_learns_of_it(
    pair: Pair, options: tuple[str, ...], says: dict[str, str], reason: str
) -> None:
    """The agent's own handshake is over by then: without the gateway's yes it would take the link for good."""
    with pair.gateway("--mutual", "--policy", str(pair.policy)) as gateway, pair.agent(*options, **says) as agent:
        agent.wait_until(lambda: counted(agent, "uplink_ended").get("refused", 0) >= 2, "refused")
        assert reason in {event["reason"] for event in gateway.events("refused")}
        assert counted(gateway, "enta_ended")[reason] >= 2
        assert agent.status()["uplink"]["up"] is False
        assert "evidence" in agent.status()["uplink"]["last_error"]
        assert not agent.events("ready")
        assert not counted(gateway, "from_enta")


# Ends.


@pytest.mark.proves("D10")
def test_a_gateway_that_stops_in_order_is_told_from_one_that_is_cut_off(pair: Pair) -> None:
    """The first says CLOSE; a connection that ends without it is truncated."""
    with pair.agent() as agent:
        with pair.gateway() as gateway:
            agent.wait_until_ready()
            assert gateway.stop() == 0
            agent.wait_until(lambda: counted(agent, "uplink_ended").get("closed", 0) == 1, "told")
            assert "truncated" not in counted(agent, "uplink_ended")
        with pair.gateway() as gateway:
            agent.wait_until(lambda: counted(agent, "uplinks")["made"] == 2, "back")
            gateway.kill()
            agent.wait_until(lambda: counted(agent, "uplink_ended").get("truncated", 0) == 1, "noticed")
            assert counted(agent, "uplink_ended")["closed"] == 1


def test_a_gateway_that_dies_in_a_handshake_is_found_again(pair: Pair) -> None:
    with pair.agent() as agent:
        # It takes so long to make its evidence that it dies meanwhile.
        with pair.gateway(STANDIN_ATTESTER_DELAY_MS="1500") as gateway:
            gateway.wait_until_ready()
            gateway.wait_until(lambda: connections(gateway) > 0, "asked")
            gateway.kill()
        agent.wait_until(lambda: counted(agent, "uplink_ended").get("hung_up", 0) >= 1, "noticed")
        with pair.gateway():
            agent.wait_until_ready()


def test_an_agent_that_dies_in_a_handshake_leaves_its_gateway_to_the_next(pair: Pair) -> None:
    with pair.gateway() as gateway:
        with pair.agent(STANDIN_VERIFIER_DELAY_MS="30000") as agent:
            gateway.wait_until(lambda: connections(gateway) > 0, "asked")
            agent.kill()
        gateway.wait_until(lambda: sum(counted(gateway, "enta_ended").values()) > 0, "noticed")
        with pair.agent() as agent:
            agent.wait_until_ready()


def connections(gateway: Program) -> int:
    """How many TCP connections a gateway's host has with agents."""
    listing = gateway.host.run("ss", "--tcp", "--numeric", "--no-header", "state", "established", f"sport = {PORT}")
    return len(listing.splitlines())


# Strangers.


@contextmanager
def strangers(host: Host, words: Sequence[bytes]) -> Iterator[None]:
    """Connect to the gateway from *host*, say one of these on each connection, and stay."""
    with ExitStack() as stack, host.entered():
        for said in words:
            stack.enter_context(socket.create_connection((GATEWAY, PORT), 20)).sendall(said)
        yield


@pytest.mark.proves("D20", "F49")
def test_port_scanners_and_slow_handshakes_take_nothing_from_an_agent(pair: Pair) -> None:
    """200 of them, some silent, some slow, some that stop in the middle: the agent stays, goes and comes back."""
    hello = client_hello()
    words = [b"", hello[:1], hello[:100], hello]
    with pair.gateway() as gateway, pair.agent() as agent:
        agent.wait_until_ready()
        with strangers(pair.near, [words[number % len(words)] for number in range(200)]):
            agent.kill()
            with pair.agent() as another:
                another.wait_until_ready()
                assert is_connected(gateway)
                assert counted(another, "uplink_ended") == {}
        ended = counted(gateway, "enta_ended")
        assert ended["too_many"] > 0
        assert sum(ended.values()) >= 200 - ATTESTED_LIMIT


@pytest.mark.proves("D20", "F58", "G16")
def test_ten_thousand_failed_handshakes_cost_little_and_lock_nobody_out(pair: Pair) -> None:
    """A stranger spends its own share of what may fail: the agent comes and goes meanwhile, and a new one is let in."""
    hello = client_hello()
    with pair.gateway() as gateway:
        with pair.agent() as agent:
            agent.wait_until_ready()
            with pair.near.entered():
                fail_handshakes(hello, 100)
                resident_bytes, descriptors = gateway.resident_bytes, gateway.descriptors
                fail_handshakes(hello, 9_900)
            ended = counted(gateway, "enta_ended")
            assert ended["too_many_failures"] >= 10_000 - SHARE - 30
            gateway.wait_until(lambda: gateway.descriptors <= descriptors, "closed them")
            assert gateway.resident_bytes - resident_bytes < 5_000_000
            assert is_connected(gateway)
            assert counted(agent, "uplinks") == {"made": 1}
        with pair.agent() as another:
            another.wait_until_ready()
            assert counted(another, "uplink_ended") == {}
        assert "one more is tried every 60 s" in gateway.log()


def fail_handshakes(hello: bytes, count: int) -> None:
    """Begin handshakes, and hang up once the gateway has answered, or refused."""
    for _ in range(count):
        with socket.create_connection((GATEWAY, PORT), 20) as stranger:
            stranger.sendall(hello)
            try:
                stranger.recv(1)
            except ConnectionResetError:
                continue


def test_an_interrupt_ends_programs_with_attested_links_in_order(pair: Pair) -> None:
    with pair.gateway() as gateway, pair.agent() as agent:
        agent.wait_until_ready()
        agent.signal(signal.SIGINT)
        assert agent.wait() == 0
        gateway.wait_until(lambda: counted(gateway, "enta_ended") == {"closed": 1}, "told")
        assert gateway.stop() == 0
