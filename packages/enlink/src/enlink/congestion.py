"""Keep BBR from pacing connections that are too short for it to gain anything.

BBR sends what the path is thought to take, by a timer, in pieces of its own choosing. Across a continent that is its
strength. To the next host it is a timer and a handful of small packets where one large one would do: measured, three
times the processor time for each gigabyte. Reno is what every kernel has and lets everybody choose.
"""

from __future__ import annotations

import socket
import struct
from functools import lru_cache
from ipaddress import ip_address
from typing import Final, TypeAlias

import trio

Socket: TypeAlias = socket.socket | trio.socket.SocketType

TCP_CONGESTION: Final = 13  # linux/tcp.h, as all of these
_NAME_BYTES: Final = 16
_RTT_AT: Final = 68  # tcpi_rtt in struct tcp_info, u32, microseconds
_RTT: Final = struct.Struct("=I")

# Choices of ours.
PACED: Final = b"bbr"
UNPACED: Final = b"reno"
SHORT_S: Final = 0.002  # a data centre; busy machines take a millisecond to answer


def unpace_if_short(sock: Socket) -> bool:
    """Switch a TCP connection from BBR to Reno if its handshake took less than `SHORT_S`. Returns whether it did.

    What other algorithm an administrator has chosen stays. Never raises: a connection works either way.
    """
    try:
        return _is_paced(sock) and round_trip_s(sock) < SHORT_S and _unpace(sock)
    except OSError:  # no TCP, or gone
        return False


def unpace_if_local(sock: Socket, host: str) -> bool:
    """Switch a TCP socket from BBR to Reno if *host*, to connect to or to listen on, is an address of loopback.

    Best before it connects or listens: a connection that BBR has had keeps the timer, though it need not wait for it.
    Returns whether it did, and never raises, as `unpace_if_short`.
    """
    try:
        return _is_loopback(host) and _is_paced(sock) and _unpace(sock)
    except OSError:
        return False


def _is_paced(sock: Socket) -> bool:
    return sock.getsockopt(socket.IPPROTO_TCP, TCP_CONGESTION, _NAME_BYTES).rstrip(b"\0") == PACED


def _unpace(sock: Socket) -> bool:
    sock.setsockopt(socket.IPPROTO_TCP, TCP_CONGESTION, UNPACED)
    return True


@lru_cache
def _is_loopback(host: str) -> bool:
    return ip_address(host).is_loopback


def round_trip_s(sock: Socket) -> float:
    """Return the kernel's estimate of a TCP connection's round trip time.

    Raises:
        OSError: there is none.
    """
    information = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _RTT_AT + _RTT.size)
    return float(_RTT.unpack_from(information, _RTT_AT)[0]) / 1e6
