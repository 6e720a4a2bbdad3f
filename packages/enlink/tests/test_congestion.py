"""Which connections are taken off BBR, on the kernel's own sockets and with round trips that this machine has not."""

from __future__ import annotations

import socket
from contextlib import closing

import pytest
from enlink import congestion
from enlink.congestion import (
    PACED,
    SHORT_S,
    TCP_CONGESTION,
    UNPACED,
    pace_if_long,
    round_trip_s,
    unpace,
)


class FarSocket(socket.socket):
    """A connection whose kernel says what it is told to."""

    algorithm = PACED
    round_trip_us = 0
    peer = "192.0.2.1"

    def getsockopt(self, level: int, option: int, size: int = 0) -> bytes:  # type: ignore[override]  # of three, one
        assert level == socket.IPPROTO_TCP
        if option == TCP_CONGESTION:
            return self.algorithm.ljust(size, b"\0")
        assert option == socket.TCP_INFO
        return bytes(148) + self.round_trip_us.to_bytes(4, "little")

    def setsockopt(self, *arguments: object) -> None:
        assert arguments[:2] == (socket.IPPROTO_TCP, TCP_CONGESTION)
        assert isinstance(arguments[2], bytes)
        self.algorithm = arguments[2]

    def getpeername(self) -> tuple[str, int]:
        return self.peer, 7


def algorithm_of(sock: socket.socket) -> bytes:
    return sock.getsockopt(socket.IPPROTO_TCP, TCP_CONGESTION, 16).rstrip(b"\0")


@pytest.fixture
def usual() -> bytes:
    """Whatever this machine begins with."""
    with socket.socket() as sock:
        return algorithm_of(sock)


@pytest.mark.parametrize(("algorithm", "then"), [(PACED, UNPACED), (b"cubic", b"cubic"), (b"bbr2", b"bbr2")])
def test_nothing_begins_with_bbr_and_what_is_something_else_stays(algorithm: bytes, then: bytes) -> None:
    with FarSocket() as sock:
        sock.algorithm = algorithm
        assert unpace(sock) is (algorithm != then)
        assert sock.algorithm == then


@pytest.mark.parametrize(
    ("round_trip_us", "peer", "is_long"),
    [
        (30, "192.0.2.1", False),
        (1_999, "192.0.2.1", False),
        (2_000, "192.0.2.1", True),
        (80_000, "2001:db8::1", True),
        (80_000, "127.0.0.1", False),  # busy, not far
        (80_000, "::1", False),
    ],
)
def test_bbr_is_for_paths_of_some_length(
    monkeypatch: pytest.MonkeyPatch, usual: bytes, round_trip_us: int, peer: str, is_long: bool
) -> None:
    monkeypatch.setattr(congestion, "PACED", usual)
    with FarSocket() as sock:
        sock.algorithm, sock.round_trip_us, sock.peer = b"another", round_trip_us, peer
        assert pace_if_long(sock) is is_long
        assert sock.algorithm == (usual if is_long else b"another")
        assert not pace_if_long(sock)  # not twice


def test_where_bbr_is_not_usual_no_path_is_long_enough() -> None:
    with FarSocket() as sock, pytest.MonkeyPatch.context() as patch:
        patch.setattr(congestion, "PACED", b"not this machine's")
        sock.algorithm, sock.round_trip_us = UNPACED, 80_000
        assert not pace_if_long(sock)
        assert sock.algorithm == UNPACED


def test_the_kernel_takes_the_changes_on_both_ends(monkeypatch: pytest.MonkeyPatch, usual: bytes) -> None:
    monkeypatch.setattr(congestion, "PACED", usual)
    with closing(socket.create_server(("127.0.0.1", 0))) as listener, closing(socket.socket()) as dialled:
        assert unpace(listener)
        assert unpace(dialled)
        dialled.connect(listener.getsockname())
        with closing(listener.accept()[0]) as accepted:
            for sock in (dialled, accepted):
                assert algorithm_of(sock) == UNPACED
                assert 0 < round_trip_s(sock) < SHORT_S * 100
            monkeypatch.setattr(congestion, "PACED", b"reno")  # what every machine has
            monkeypatch.setattr(congestion, "SHORT_S", 0)
            assert not pace_if_long(accepted)  # on this host
            dialled.sendall(b"still there")
            assert accepted.recv(100) == b"still there"


def test_what_has_no_congestion_control_is_left_alone() -> None:
    left, right = socket.socketpair()
    with left, right:
        assert not unpace(left)
        assert not pace_if_long(left)
    assert not unpace(left)  # closed
    assert not pace_if_long(left)
