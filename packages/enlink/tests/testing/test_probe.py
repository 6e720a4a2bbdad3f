"""An ear at a wire hears what a host sends into it, or says that it missed something."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest
from enlink.testing.hosts import Network
from enlink.testing.probe import Site, canary, send, site


@pytest.fixture
def near() -> Iterator[Site]:
    with Network() as network, site(network, "near") as near:
        yield near


@pytest.mark.parametrize("address", ["1.1.1.1", "2001:db8::1"])
def test_what_leaves_is_heard_in_order_and_once(near: Site, address: str) -> None:
    """Of IPv4 and IPv6, with what is in it."""
    for number in range(3):
        send(near.host, "udp", address, 53, payload=b"%d" % number)
    send(near.host, "tcp", address, 7)
    heard = near.wire.packets()
    assert [packet.payload for packet in heard] == [b"0", b"1", b"2", b""]
    assert [str(packet).split(" > ")[1] for packet in heard] == [f"{address}:53"] * 3 + [f"{address}:7"]
    assert near.wire.packets() == []


def test_silence_on_a_broken_wire_means_nothing(near: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fence that ends each listing does not arrive, because it leaves by another way."""
    monkeypatch.setattr("enlink.testing.probe._FAR_BEYOND_S", 0.1)
    near.host.run("ip", "address", "add", "10.0.0.9/32", "dev", "lo")
    with pytest.raises(TimeoutError, match="no fence"):
        near.wire.packets()


def test_packets_that_found_no_room_are_no_silence(near: Site) -> None:
    """An ear that nobody empties says so, instead of leaving out what may have been the canary."""
    with near.host.entered(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as program:
        for _ in range(30_000):
            program.sendto(b"x", ("10.0.0.9", 53))
    with pytest.raises(BufferError, match="call this more often"):
        near.wire.packets()


def test_a_canary_is_heard_in_every_way_it_tries_until_it_is_taken_away(near: Site) -> None:
    """Connections and datagrams, by IPv4 and IPv6; then silence."""
    heard: set[tuple[str, int, str]] = set()
    with canary(near.host, tcp_port=7, udp_port=53):
        deadline_s = time.monotonic() + 20
        while len(heard) < 4 and time.monotonic() < deadline_s:
            heard |= {(each.protocol, each.port, str(each.destination)) for each in near.wire.packets()}
    assert heard == {(*way, address) for way in [("tcp", 7), ("udp", 53)] for address in ("1.1.1.1", "2001:db8::1")}
    near.wire.packets()
    assert near.wire.packets() == []


def test_a_canary_that_cannot_fly_is_no_silence(near: Site) -> None:
    """Its program ends at once, and a test that relies on it with it."""
    with pytest.raises(RuntimeError, match="has ended"), canary(near.host, tcp_port=7, udp_port=70_000):
        pass
