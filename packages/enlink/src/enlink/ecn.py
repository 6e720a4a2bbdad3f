"""Tell the ends of TCP connections that a queue builds up, as routers do: RFC 3168. Reads no queue: see link.py.

A TCP that loses nothing sends until its buffers are full, and all of that waits somewhere on the way, ahead of every
small packet. Whoever agreed to ECN halves what it has under way when it learns of a mark.
"""

from __future__ import annotations

from typing import Final

from enlink.frame import Packets

_IPV4: Final = 4
_MIN_IPV4_BYTES: Final = 20
_TYPE_OF_SERVICE_AT: Final = 1
_CHECKSUM_AT: Final = 10
_EXPERIENCED: Final = 0b11  # "congestion experienced"; 0 means that the ends know nothing of this


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
