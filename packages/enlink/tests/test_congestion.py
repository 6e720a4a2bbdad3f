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
    round_trip_s,
    unpace_if_local,
    unpace_if_short,
)


class FarSocket(socket.socket):
    """A connection whose kernel says what it is told to."""

    algorithm = PACED
    round_trip_us = 0

    def getsockopt(self, level: int, option: int, size: int = 0) -> bytes:  # type: ignore[override]  # of three, one
        assert level == socket.IPPROTO_TCP
        if option == TCP_CONGESTION:
            return self.algorithm.ljust(size, b"\0")
        assert option == socket.TCP_INFO
        return bytes(68) + self.round_trip_us.to_bytes(4, "little")

    def setsockopt(self, *arguments: object) -> None:
        assert arguments[:2] == (socket.IPPROTO_TCP, TCP_CONGESTION)
        assert isinstance(arguments[2], bytes)
        self.algorithm = arguments[2]


@pytest.mark.parametrize(
    ("algorithm", "round_trip_us", "then"),
    [
        (PACED, 30, UNPACED),
        (PACED, 1_999, UNPACED),
        (PACED, 2_000, PACED),
        (PACED, 80_000, PACED),
        (b"cubic", 30, b"cubic"),
        (b"bbr2", 30, b"bbr2"),
    ],
)
def test_bbr_is_for_paths_of_some_length(algorithm: bytes, round_trip_us: int, then: bytes) -> None:
    with FarSocket() as sock:
        sock.algorithm, sock.round_trip_us = algorithm, round_trip_us
        assert unpace_if_short(sock) is (algorithm != then)
        assert sock.algorithm == then


def test_the_kernel_takes_the_change_on_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        closing(socket.create_server(("127.0.0.1", 0))) as listener,
        closing(socket.create_connection(listener.getsockname())) as dialled,
        closing(listener.accept()[0]) as accepted,
    ):
        default = dialled.getsockopt(socket.IPPROTO_TCP, TCP_CONGESTION, 16).rstrip(b"\0")
        # Whatever this machine has as its default.
        monkeypatch.setattr(congestion, "PACED", default)
        for sock in (dialled, accepted):
            assert 0 < round_trip_s(sock) < SHORT_S * 100
            monkeypatch.setattr(congestion, "SHORT_S", round_trip_s(sock) + 1)
            assert unpace_if_short(sock)
            assert sock.getsockopt(socket.IPPROTO_TCP, TCP_CONGESTION, 16).rstrip(b"\0") == UNPACED
        dialled.sendall(b"still there")
        assert accepted.recv(100) == b"still there"


def test_what_has_no_congestion_control_is_left_alone() -> None:
    left, right = socket.socketpair()
    with left, right:
        assert not unpace_if_short(left)
        assert not unpace_if_local(left, "127.0.0.1")
    assert not unpace_if_short(left)  # closed


@pytest.mark.parametrize(
    ("host", "algorithm", "then"),
    [
        ("127.0.0.1", PACED, UNPACED),
        ("127.9.9.9", PACED, UNPACED),
        ("::1", PACED, UNPACED),
        ("127.0.0.1", b"cubic", b"cubic"),
        ("192.0.2.1", PACED, PACED),
        ("0.0.0.0", PACED, PACED),
        ("fe80::1%eth0", PACED, PACED),
    ],
)
def test_on_loopback_bbr_is_taken_off_before_it_begins(host: str, algorithm: bytes, then: bytes) -> None:
    with FarSocket() as sock:
        sock.algorithm = algorithm
        assert unpace_if_local(sock, host) is (algorithm != then)
        assert sock.algorithm == then


def test_what_a_listener_accepts_has_its_algorithm(monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        default = listener.getsockopt(socket.IPPROTO_TCP, TCP_CONGESTION, 16).rstrip(b"\0")
        monkeypatch.setattr(congestion, "PACED", default)
        assert unpace_if_local(listener, "127.0.0.1")
        with closing(socket.create_connection(listener.getsockname())), closing(listener.accept()[0]) as accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, TCP_CONGESTION, 16).rstrip(b"\0") == UNPACED
