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
_RTT_AT: Final = 148  # tcpi_min_rtt in struct tcp_info, u32, microseconds
_RTT: Final = struct.Struct("=I")

# Choices of ours.
PACED: Final = b"bbr"
UNPACED: Final = b"reno"
SHORT_S: Final = 0.002  # a data centre


def unpace(sock: Socket) -> bool:
    """Let a TCP socket that is to connect or to listen begin with Reno in place of BBR. Returns whether it does.

    It must be before: a connection that BBR has had keeps the timer. What other algorithm an administrator has chosen
    stays. Never raises: a connection works either way.
    """
    try:
        return _is_paced(sock) and _unpace(sock)
    except OSError:  # no TCP
        return False


def pace_if_long(sock: Socket) -> bool:
    """Give a connection that began with Reno to BBR after all, if that is this host's choice and the other end is far.

    Far is who has never answered within `SHORT_S`, and is not on this host. The more has been said, the better that is
    known: a busy machine may take long for a handshake. Returns whether it did; never raises.
    """
    try:
        if round_trip_s(sock) < SHORT_S or _is_paced(sock) or _is_loopback(sock.getpeername()[0]):
            return False
        with socket.socket(sock.family) as usual:
            if not _is_paced(usual):
                return False
        sock.setsockopt(socket.IPPROTO_TCP, TCP_CONGESTION, PACED)
    except OSError:  # no TCP, or gone
        return False
    return True


def _is_paced(sock: Socket) -> bool:
    return sock.getsockopt(socket.IPPROTO_TCP, TCP_CONGESTION, _NAME_BYTES).rstrip(b"\0") == PACED


def _unpace(sock: Socket) -> bool:
    sock.setsockopt(socket.IPPROTO_TCP, TCP_CONGESTION, UNPACED)
    return True


@lru_cache
def _is_loopback(host: str) -> bool:
    return ip_address(host).is_loopback


def round_trip_s(sock: Socket) -> float:
    """Return the shortest round trip of a TCP connection that the kernel has seen.

    Raises:
        OSError: there is none.
    """
    information = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _RTT_AT + _RTT.size)
    return float(_RTT.unpack_from(information, _RTT_AT)[0]) / 1e6
