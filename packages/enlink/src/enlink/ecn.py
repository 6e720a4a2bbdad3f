"""Tell the ends of TCP connections that a queue stays, as routers do: RFC 3168. Reads no queue: see link.py.

A TCP that loses nothing sends until its buffers are full, and all of that waits somewhere on the way, ahead of every
small packet. Whoever agreed to ECN halves what it has under way when it learns of a mark.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from enlink.frame import Packets

_IPV4: Final = 4
_MIN_IPV4_BYTES: Final = 20
_TYPE_OF_SERVICE_AT: Final = 1
_CHECKSUM_AT: Final = 10
_EXPERIENCED: Final = 0b11  # "congestion experienced"; 0 means that the ends know nothing of this


class StandingQueue:
    """Tells a queue that stays from one that will be gone in a moment.

    Whoever has had to wait for a processor finds a queue, and works it off: to mark for that halves what is under way
    for nothing. One that is there at every look for a while is of packets that do nothing but wait. The idea is
    CoDel's, RFC 8289.

    Args:
        limit_bytes: what may wait.
        interval_s: how long more may, before there is something to be told, and how often that is told.
    """

    def __init__(self, limit_bytes: int, interval_s: float, clock: Callable[[], float]) -> None:
        self._limit_bytes = limit_bytes
        self._interval_s = interval_s
        self._clock = clock
        self._due_s: float | None = None

    def stands(self, queued_bytes: int) -> bool:
        """Take note of how much waits just now. Returns whether it is time to tell the senders."""
        if queued_bytes <= self._limit_bytes:
            self._due_s = None
            return False
        now_s = self._clock()
        is_due = self._due_s is not None and now_s >= self._due_s
        if is_due or self._due_s is None:
            self._due_s = now_s + self._interval_s
        return is_due


def mark_congested(packets: Packets) -> int:
    """Mark every IPv4 packet whose ends know ECN, where it is. Returns how many there were to mark."""
    count = 0
    for packet in packets:
        if packet[0] >> 4 != _IPV4 or len(packet) < _MIN_IPV4_BYTES:
            continue
        added = _EXPERIENCED - (packet[_TYPE_OF_SERVICE_AT] & _EXPERIENCED)
        if 0 < added < _EXPERIENCED:
            packet[_TYPE_OF_SERVICE_AT] |= _EXPERIENCED
            # In ones' complement the checksum loses what the header gains.
            checksum = (packet[_CHECKSUM_AT] << 8 | packet[_CHECKSUM_AT + 1]) - added
            checksum += 0xFFFF if checksum < 0 else 0
            packet[_CHECKSUM_AT], packet[_CHECKSUM_AT + 1] = checksum >> 8, checksum & 0xFF
            count += 1
    return count
