"""Judge each packet that crosses the TUN, in either direction, against the agent's plan. Does no I/O, keeps no state.

A peer may send anything, and the kernel takes whatever is written to a TUN, one byte or 70,000, without an error. So
nobody but this module stands between the link and the host. What needs memory of earlier packets (does this UDP
datagram answer one of ours?) is left to the kernel's connection tracking.

Sources: RFC 791 (IPv4), RFC 792 (ICMP), RFC 768 (UDP), RFC 9293 (TCP); the numbers are D12 and D13 of the fault list.
"""

from __future__ import annotations

import struct
from enum import StrEnum

from enta.capture.plan import Plan

# Protocol numbers and layouts, from the RFCs above.
_ICMP, _TCP, _UDP = 1, 6, 17
_IPV4_HEADER = struct.Struct("!BxHxxHxBxxII")  # version+IHL, total length, flags+offset, protocol, source, destination
_TCP_HEADER = struct.Struct("!HH8xBB6x")  # source port, destination port, data offset (upper four bits), flags
_UDP_HEADER = struct.Struct("!HHHxx")  # source port, destination port, length
_ICMP_HEADER = struct.Struct("!Bxxxxxxx")  # type
_PORTS = struct.Struct("!HH")
_IPV4_SIZE, _TCP_SIZE, _UDP_SIZE = _IPV4_HEADER.size, _TCP_HEADER.size, _UDP_HEADER.size
_EMBEDDED_AT = _IPV4_SIZE + _ICMP_HEADER.size  # where an ICMP error repeats the packet that it is about
_EMBEDDED_PORTS_AT = _EMBEDDED_AT + _IPV4_SIZE
_ICMP_ERROR_SIZE = _EMBEDDED_PORTS_AT + 8  # RFC 792: the header and the first 64 bits of the original
_PLAIN_IPV4 = 0x45  # version 4, five words of header: no options
_MORE_FRAGMENTS_OR_OFFSET = 0x3FFF
_DESTINATION_UNREACHABLE = 3
_SYN, _SYN_AND_ACK = 0x02, 0x12


class DropReason(StrEnum):
    """Why a packet is dropped: the stable names of the counters."""

    TOO_SHORT = "too_short"
    """Not even an IPv4 header."""
    NOT_IP = "not_ip"
    """A version that is neither 4 nor 6."""
    IPV6 = "ipv6"
    """Not carried yet."""
    BAD_HEADER_LENGTH = "bad_header_length"
    """An IPv4 header that says it is shorter than one."""
    OPTIONS = "options"
    """IPv4 options: source routes and the like, which no captured program needs."""
    BAD_TOTAL_LENGTH = "bad_total_length"
    """Shorter than the header, or longer than what arrived."""
    FRAGMENT = "fragment"
    """Any fragment, the first one included: ports cannot be judged on the others."""
    SPOOF_SRC = "spoof_src"
    """From the link, with a source that the peer may not use."""
    FOREIGN_SRC = "foreign_src"
    """From this host, with a source other than the TUN's address: a program that bound another one."""
    WRONG_DST = "wrong_dst"
    """Not for the TUN's address, or, from this host, not for a peer."""
    PROTOCOL = "protocol"
    """Neither TCP nor UDP nor ICMP."""
    BAD_TCP = "bad_tcp"
    """The TCP header is cut off, or lies about its length."""
    BAD_UDP = "bad_udp"
    """The UDP header is cut off, or lies about its length."""
    PORT = "port"
    """Not a transit port of this protocol, on the side where the plan has one."""
    UNSOLICITED = "unsolicited"
    """A TCP connection opened towards a client, which only ever opens its own."""
    ICMP = "icmp"
    """ICMP other than a whole "destination unreachable": echo, redirect, router advertisement."""
    ICMP_FLOW = "icmp_flow"
    """An ICMP error about a packet that this host cannot have sent through the tunnel, or not to this peer."""


class PacketFilter:
    """The rules of one plan, ready to be asked once per packet.

    A server takes packets from any host of the TUN's network to its own address and transit ports. A client takes
    what comes from its peer's address and transit ports, and no new connections. Either takes the ICMP errors about
    its own packets, without which a closed UDP port or a smaller MTU would look like silence.
    """

    def __init__(self, plan: Plan) -> None:
        network = plan.address.network
        self._own = int(plan.address.ip)
        self._is_server = plan.role == "server"
        if self._is_server:
            self._first_peer, self._last_peer = int(network.network_address) + 1, int(network.broadcast_address) - 1
        else:
            self._first_peer = self._last_peer = int(plan.peer)
        rules = plan.replays if self._is_server else plan.captures
        self._transits = {
            _TCP: frozenset(rule.transit for rule in rules if rule.protocol == "tcp"),
            _UDP: frozenset(rule.transit for rule in rules if rule.protocol == "udp"),
        }

    def judge(self, packet: bytes | memoryview) -> DropReason | None:
        """Say why *packet*, which came over the link, must not be injected into this host; None: inject it.

        What lies behind the packet's own total length is not looked at: inject ``trimmed(packet)``.
        """
        if len(packet) < _IPV4_SIZE:
            return DropReason.TOO_SHORT
        version_ihl, total, fragment, protocol, source, destination = _IPV4_HEADER.unpack_from(packet)
        if version_ihl != _PLAIN_IPV4:
            return _reason_not_plain(version_ihl)
        if not _IPV4_SIZE <= total <= len(packet):
            return DropReason.BAD_TOTAL_LENGTH
        if fragment & _MORE_FRAGMENTS_OR_OFFSET:
            return DropReason.FRAGMENT
        if destination != self._own:
            return DropReason.WRONG_DST
        if not self._first_peer <= source <= self._last_peer or source == self._own:
            return DropReason.SPOOF_SRC
        if protocol == _TCP:
            return self._judge_tcp(packet, total)
        if protocol == _UDP:
            return self._judge_udp(packet, total)
        if protocol == _ICMP:
            return self._judge_icmp(packet, total, source)
        return DropReason.PROTOCOL

    def judge_outbound(self, packet: bytes | memoryview) -> DropReason | None:
        """Say why *packet*, which this host's kernel put into the TUN, must not go onto the link; None: send it.

        The kernel's packets are well-formed; what is judged is whether they belong in the tunnel at all. Without the
        capture rules a packet still bears the address that the program asked for: that one stays here as well.
        """
        if len(packet) < _IPV4_SIZE:
            return DropReason.TOO_SHORT
        version_ihl, _, _, _, source, destination = _IPV4_HEADER.unpack_from(packet)
        if version_ihl >> 4 != 4:
            return _reason_not_plain(version_ihl)
        if source != self._own:
            return DropReason.FOREIGN_SRC
        if not self._first_peer <= destination <= self._last_peer or destination == self._own:
            return DropReason.WRONG_DST
        return None

    def _judge_tcp(self, packet: bytes | memoryview, total: int) -> DropReason | None:
        if total < _IPV4_SIZE + _TCP_SIZE:
            return DropReason.BAD_TCP
        source_port, destination_port, offset, flags = _TCP_HEADER.unpack_from(packet, _IPV4_SIZE)
        if not _TCP_SIZE <= offset >> 4 << 2 <= total - _IPV4_SIZE:
            return DropReason.BAD_TCP
        if self._is_server:
            return None if destination_port in self._transits[_TCP] else DropReason.PORT
        if source_port not in self._transits[_TCP]:
            return DropReason.PORT
        return DropReason.UNSOLICITED if flags & _SYN_AND_ACK == _SYN else None

    def _judge_udp(self, packet: bytes | memoryview, total: int) -> DropReason | None:
        if total < _IPV4_SIZE + _UDP_SIZE:
            return DropReason.BAD_UDP
        source_port, destination_port, length = _UDP_HEADER.unpack_from(packet, _IPV4_SIZE)
        if not _UDP_SIZE <= length <= total - _IPV4_SIZE:
            return DropReason.BAD_UDP
        port = destination_port if self._is_server else source_port
        return None if port in self._transits[_UDP] else DropReason.PORT

    def _judge_icmp(self, packet: bytes | memoryview, total: int, sender: int) -> DropReason | None:
        if total < _ICMP_ERROR_SIZE or packet[_IPV4_SIZE] != _DESTINATION_UNREACHABLE:
            return DropReason.ICMP
        version_ihl, _, fragment, protocol, source, destination = _IPV4_HEADER.unpack_from(packet, _EMBEDDED_AT)
        if version_ihl != _PLAIN_IPV4 or fragment & _MORE_FRAGMENTS_OR_OFFSET:
            return DropReason.ICMP_FLOW
        # Only the flow's other end may speak about it: no client can disturb the flows of another.
        if source != self._own or destination != sender:
            return DropReason.ICMP_FLOW
        source_port, destination_port = _PORTS.unpack_from(packet, _EMBEDDED_PORTS_AT)
        port = source_port if self._is_server else destination_port
        return None if port in self._transits.get(protocol, ()) else DropReason.ICMP_FLOW


def trimmed(packet: memoryview) -> memoryview:
    """Cut off what a frame carries behind the packet's own total length. Only for a packet that was judged good."""
    return packet[: packet[2] << 8 | packet[3]]


def _reason_not_plain(version_ihl: int) -> DropReason:
    version, words = version_ihl >> 4, version_ihl & 0x0F
    if version == 6:
        return DropReason.IPV6
    if version != 4:
        return DropReason.NOT_IP
    return DropReason.BAD_HEADER_LENGTH if words < 5 else DropReason.OPTIONS
