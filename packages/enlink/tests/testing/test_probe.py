"""An ear at a wire hears what a host sends into it, or says that it missed something."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from enlink.testing.hosts import Network
from enlink.testing.probe import Site, send, site


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
