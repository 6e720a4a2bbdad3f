"""The packet filter, against one packet per rule and against a slow oracle that shares no code with it."""

from __future__ import annotations

import random
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv4Interface

import pytest
from enta.capture.plan import Plan, TransportProtocol, parse_captures, parse_replays
from enta.filter import DropReason, PacketFilter, trimmed
from hypothesis import given
from hypothesis import strategies as st

CLIENT_ADDRESS, SERVER_ADDRESS = "192.168.0.1", "192.168.0.254"
OTHER_CLIENT = "192.168.0.77"
TCP_PORT, UDP_PORT = 6978, 6979  # the transit ports of both plans
PROGRAM_PORT = 40000
ICMP, TCP, UDP, GRE = 1, 6, 17, 47
SYN, ACK, SYN_ACK = 0x02, 0x10, 0x12
MORE_FRAGMENTS, DO_NOT_FRAGMENT, RESERVED_FLAG = 0x2000, 0x4000, 0x8000
RANDOM_PACKETS = 500_000  # for each role: 10^6 together

Judge = Callable[[bytes | memoryview], DropReason | None]

CLIENT = Plan(
    role="client",
    address=IPv4Interface(f"{CLIENT_ADDRESS}/24"),
    peer=IPv4Address(SERVER_ADDRESS),
    captures=parse_captures(["7", "udp/53"]),
)
SERVER = Plan(
    role="server",
    address=IPv4Interface(f"{SERVER_ADDRESS}/24"),
    peer=IPv4Address(CLIENT_ADDRESS),
    replays=parse_replays(["7", "udp/53"]),
)
ON_CLIENT, ON_SERVER = PacketFilter(CLIENT), PacketFilter(SERVER)


def ipv4(
    source: str,
    destination: str,
    protocol: int,
    body: bytes = b"",
    *,
    version_ihl: int = 0x45,
    total: int | None = None,
    fragment: int = DO_NOT_FRAGMENT,
) -> bytes:
    """A packet as the kernel makes it, except for what a test asks."""
    total = 20 + len(body) if total is None else total
    fixed = struct.pack("!BBHHHBBH", version_ihl, 0, total, 1, fragment, 64, protocol, 0)
    return fixed + IPv4Address(source).packed + IPv4Address(destination).packed + body


def tcp(source: int, destination: int, *, flags: int = ACK, words: int = 5, data: bytes = b"") -> bytes:
    return struct.pack("!HHIIBBHHH", source, destination, 1, 2, words << 4, flags, 500, 0, 0) + data


def udp(source: int, destination: int, *, length: int | None = None, data: bytes = b"") -> bytes:
    return struct.pack("!HHHH", source, destination, 8 + len(data) if length is None else length, 0) + data


def unreachable(about: bytes, *, icmp_type: int = 3) -> bytes:
    """The ICMP error that a kernel sends *about* a packet, with as much of it as RFC 792 demands."""
    return struct.pack("!BBHI", icmp_type, 3, 0, 0) + about[:28]


REQUEST = ipv4(CLIENT_ADDRESS, SERVER_ADDRESS, TCP, tcp(PROGRAM_PORT, TCP_PORT, data=b"hello"))
OPENING = ipv4(CLIENT_ADDRESS, SERVER_ADDRESS, TCP, tcp(PROGRAM_PORT, TCP_PORT, flags=SYN, words=6, data=b"\2\4\5\264"))
QUERY = ipv4(CLIENT_ADDRESS, SERVER_ADDRESS, UDP, udp(PROGRAM_PORT, UDP_PORT, data=b"who?"))
REPLY = ipv4(SERVER_ADDRESS, CLIENT_ADDRESS, TCP, tcp(TCP_PORT, PROGRAM_PORT, data=b"hello yourself"))
ACCEPTANCE = ipv4(SERVER_ADDRESS, CLIENT_ADDRESS, TCP, tcp(TCP_PORT, PROGRAM_PORT, flags=SYN_ACK))
ANSWER = ipv4(SERVER_ADDRESS, CLIENT_ADDRESS, UDP, udp(UDP_PORT, PROGRAM_PORT, data=b"me"))
QUERY_FAILED = ipv4(SERVER_ADDRESS, CLIENT_ADDRESS, ICMP, unreachable(QUERY))
REQUEST_FAILED = ipv4(SERVER_ADDRESS, CLIENT_ADDRESS, ICMP, unreachable(REQUEST))
ANSWER_FAILED = ipv4(CLIENT_ADDRESS, SERVER_ADDRESS, ICMP, unreachable(ANSWER))
REPLY_FAILED = ipv4(CLIENT_ADDRESS, SERVER_ADDRESS, ICMP, unreachable(REPLY))

TO_SERVER = [REQUEST, OPENING, QUERY, ANSWER_FAILED, REPLY_FAILED]
TO_CLIENT = [REPLY, ACCEPTANCE, ANSWER, QUERY_FAILED, REQUEST_FAILED]
KINDS = ["segment", "opening", "datagram", "udp-unreachable", "tcp-unreachable"]
GOOD = [
    *(pytest.param(ON_SERVER, packet, id=f"{kind}-to-server") for kind, packet in zip(KINDS, TO_SERVER, strict=True)),
    *(pytest.param(ON_CLIENT, packet, id=f"{kind}-to-client") for kind, packet in zip(KINDS, TO_CLIENT, strict=True)),
]


# One packet a rule.


@pytest.mark.parametrize(("asked", "packet"), GOOD)
def test_every_kind_of_packet_of_a_captured_flow_is_injected(asked: PacketFilter, packet: bytes) -> None:
    assert asked.judge(packet) is None
    assert asked.judge(memoryview(packet)) is None


@pytest.mark.parametrize("packet", TO_SERVER, ids=KINDS)
def test_what_a_client_sends_is_what_its_own_filter_lets_out(packet: bytes) -> None:
    assert ON_CLIENT.judge_outbound(packet) is None


@pytest.mark.parametrize("packet", TO_CLIENT, ids=KINDS)
def test_what_a_server_sends_is_what_its_own_filter_lets_out(packet: bytes) -> None:
    assert ON_SERVER.judge_outbound(packet) is None


BODY = tcp(PROGRAM_PORT, TCP_PORT)
THERE = (CLIENT_ADDRESS, SERVER_ADDRESS)
DROPPED = [  # each documented reason once, by a packet with no other fault
    (DropReason.TOO_SHORT, ON_SERVER.judge, REQUEST[:19]),
    (DropReason.NOT_IP, ON_SERVER.judge, ipv4(*THERE, TCP, BODY, version_ihl=0x55)),
    (DropReason.IPV6, ON_SERVER.judge, b"\x60" + bytes(39)),
    (DropReason.BAD_HEADER_LENGTH, ON_SERVER.judge, ipv4(*THERE, TCP, BODY, version_ihl=0x44)),
    (DropReason.OPTIONS, ON_SERVER.judge, ipv4(*THERE, TCP, bytes(4) + BODY, version_ihl=0x46)),
    (DropReason.BAD_TOTAL_LENGTH, ON_SERVER.judge, ipv4(*THERE, TCP, BODY, total=41)),
    (DropReason.FRAGMENT, ON_SERVER.judge, ipv4(*THERE, TCP, BODY, fragment=MORE_FRAGMENTS)),
    (DropReason.SPOOF_SRC, ON_SERVER.judge, ipv4("10.0.0.1", SERVER_ADDRESS, TCP, BODY)),
    (DropReason.FOREIGN_SRC, ON_CLIENT.judge_outbound, ipv4("10.0.0.1", SERVER_ADDRESS, TCP, BODY)),
    (DropReason.WRONG_DST, ON_SERVER.judge, ipv4(CLIENT_ADDRESS, "127.0.0.1", TCP, BODY)),
    (DropReason.PROTOCOL, ON_SERVER.judge, ipv4(*THERE, GRE, BODY)),
    (DropReason.BAD_TCP, ON_SERVER.judge, ipv4(*THERE, TCP, tcp(PROGRAM_PORT, TCP_PORT, words=6))),
    (DropReason.BAD_UDP, ON_SERVER.judge, ipv4(*THERE, UDP, udp(PROGRAM_PORT, UDP_PORT, length=9))),
    (DropReason.PORT, ON_SERVER.judge, ipv4(*THERE, TCP, tcp(PROGRAM_PORT, 22))),
    (DropReason.UNSOLICITED, ON_CLIENT.judge, ipv4(SERVER_ADDRESS, CLIENT_ADDRESS, TCP, tcp(TCP_PORT, 22, flags=SYN))),
    (DropReason.ICMP, ON_SERVER.judge, ipv4(*THERE, ICMP, unreachable(ANSWER, icmp_type=5))),
    (DropReason.ICMP_FLOW, ON_SERVER.judge, ipv4(*THERE, ICMP, unreachable(QUERY))),
]


@pytest.mark.proves("D12", "D13", "F40", "F41", "F42", "F43", "F44")
@pytest.mark.parametrize(("reason", "judge", "packet"), DROPPED, ids=[reason for reason, _, _ in DROPPED])
def test_each_broken_rule_is_named(reason: DropReason, judge: Judge, packet: bytes) -> None:
    assert judge(packet) is reason
    assert judge(memoryview(packet)) is reason


def test_no_reason_goes_unproved() -> None:
    assert [reason for reason, _, _ in DROPPED] == list(DropReason)


@pytest.mark.proves("F40")
@pytest.mark.parametrize("version", [0, 1, 2, 3, 5, 7, 8, 15])
def test_what_is_no_ip_at_all_is_called_so(version: int) -> None:
    assert ON_SERVER.judge(bytes([version << 4]) + REQUEST[1:]) is DropReason.NOT_IP
    assert ON_SERVER.judge_outbound(bytes([version << 4]) + REPLY[1:]) is DropReason.NOT_IP


@pytest.mark.proves("F41")
@pytest.mark.parametrize(("asked", "packet"), GOOD)
def test_a_packet_cut_off_anywhere_is_dropped(asked: PacketFilter, packet: bytes) -> None:
    for size in range(len(packet)):
        expected = DropReason.TOO_SHORT if size < 20 else DropReason.BAD_TOTAL_LENGTH
        assert asked.judge(packet[:size]) is expected
        assert asked.judge(memoryview(packet)[:size]) is expected


@pytest.mark.proves("F41")
@pytest.mark.parametrize(("asked", "packet"), GOOD)
def test_a_packet_that_says_it_is_shorter_is_judged_by_what_it_says(asked: PacketFilter, packet: bytes) -> None:
    """A header that the stated length cuts off is not there, whatever bytes follow it in the frame."""
    reason = {ICMP: DropReason.ICMP, TCP: DropReason.BAD_TCP, UDP: DropReason.BAD_UDP}[packet[9]]
    enough = {ICMP: 56, TCP: 44 if packet == OPENING else 40, UDP: len(packet)}[packet[9]]
    for total in range(len(packet)):
        claimed = packet[:2] + struct.pack("!H", total) + packet[4:]
        expected = DropReason.BAD_TOTAL_LENGTH if total < 20 else reason if total < enough else None
        assert asked.judge(claimed) is expected


@pytest.mark.proves("D12", "F41")
@pytest.mark.parametrize(("asked", "packet"), GOOD)
@pytest.mark.parametrize("trailer", [b"", b"\0", bytes(1500)], ids=len)
def test_bytes_behind_a_packet_are_cut_off(asked: PacketFilter, packet: bytes, trailer: bytes) -> None:
    frame = memoryview(packet + trailer)
    assert asked.judge(frame) is None
    assert trimmed(frame) == packet


def test_a_packet_of_the_largest_size_is_injected_whole() -> None:
    packet = ipv4(CLIENT_ADDRESS, SERVER_ADDRESS, TCP, tcp(PROGRAM_PORT, TCP_PORT, data=bytes(65535 - 40)))
    assert ON_SERVER.judge(packet) is None
    assert trimmed(memoryview(packet + bytes(9))) == packet


@pytest.mark.proves("F44")
@pytest.mark.parametrize(
    ("field", "expected"),
    [
        (0, None),
        (DO_NOT_FRAGMENT, None),
        (RESERVED_FLAG, None),
        (MORE_FRAGMENTS, DropReason.FRAGMENT),
        (1, DropReason.FRAGMENT),
        (0x1FFF, DropReason.FRAGMENT),
        (0x1000, DropReason.FRAGMENT),
        (DO_NOT_FRAGMENT | MORE_FRAGMENTS | 185, DropReason.FRAGMENT),
    ],
)
def test_a_packet_is_a_fragment_when_it_has_an_offset_or_more_to_come(field: int, expected: DropReason | None) -> None:
    body = tcp(PROGRAM_PORT, TCP_PORT)
    assert ON_SERVER.judge(ipv4(CLIENT_ADDRESS, SERVER_ADDRESS, TCP, body, fragment=field)) is expected


@pytest.mark.proves("D13", "F42")
@pytest.mark.parametrize(
    ("source", "is_taken"),
    [
        ("192.168.0.0", False),  # the network
        ("192.168.0.1", True),
        (OTHER_CLIENT, True),
        ("192.168.0.253", True),
        (SERVER_ADDRESS, False),  # our own: the LAND attack
        ("192.168.0.255", False),  # broadcast
        ("192.167.255.255", False),
        ("192.168.1.0", False),
        ("0.0.0.0", False),
        ("127.0.0.1", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
    ],
)
def test_a_server_takes_packets_from_any_host_of_the_tuns_network_only(source: str, is_taken: bool) -> None:
    packet = ipv4(source, SERVER_ADDRESS, TCP, tcp(PROGRAM_PORT, TCP_PORT))
    assert ON_SERVER.judge(packet) is (None if is_taken else DropReason.SPOOF_SRC)


def test_a_server_may_have_any_address_of_its_network() -> None:
    plan = Plan("server", IPv4Interface("192.168.0.100/24"), SERVER.peer, replays=SERVER.replays)
    taken = {f"192.168.0.{host}" for host in range(256)} - {"192.168.0.0", "192.168.0.100", "192.168.0.255"}
    for source in [f"192.168.{block}.{host}" for block in (0, 1) for host in range(256)]:
        judged = PacketFilter(plan).judge(ipv4(source, "192.168.0.100", TCP, BODY))
        assert judged is (None if source in taken else DropReason.SPOOF_SRC)
        judged = PacketFilter(plan).judge_outbound(ipv4("192.168.0.100", source, TCP, BODY))
        assert judged is (None if source in taken else DropReason.WRONG_DST)


@pytest.mark.proves("D13", "F42")
@pytest.mark.parametrize(
    "source", [CLIENT_ADDRESS, OTHER_CLIENT, "192.168.0.253", "192.168.0.255", "0.0.0.0", "1.1.1.1"]
)
def test_a_client_takes_packets_from_its_peer_only(source: str) -> None:
    assert ON_CLIENT.judge(ipv4(source, CLIENT_ADDRESS, TCP, tcp(TCP_PORT, PROGRAM_PORT))) is DropReason.SPOOF_SRC


@pytest.mark.proves("D13", "F43")
@pytest.mark.parametrize(
    "destination",
    [
        "192.168.0.253",
        "192.168.0.255",
        "255.255.255.255",
        "127.0.0.1",
        "169.254.169.254",
        "224.0.0.1",
        "10.0.0.1",
        "0.0.0.0",
    ],
)
def test_nothing_is_injected_for_another_destination(destination: str) -> None:
    packet = ipv4(OTHER_CLIENT, destination, TCP, tcp(PROGRAM_PORT, TCP_PORT))
    assert ON_SERVER.judge(packet) is DropReason.WRONG_DST
    packet = ipv4(SERVER_ADDRESS, destination, TCP, tcp(TCP_PORT, PROGRAM_PORT))
    assert ON_CLIENT.judge(packet) is DropReason.WRONG_DST


def test_a_transit_port_counts_for_its_own_protocol_and_side_only() -> None:
    there, back = (CLIENT_ADDRESS, SERVER_ADDRESS), (SERVER_ADDRESS, CLIENT_ADDRESS)
    assert ON_SERVER.judge(ipv4(*there, TCP, tcp(PROGRAM_PORT, UDP_PORT))) is DropReason.PORT
    assert ON_SERVER.judge(ipv4(*there, UDP, udp(PROGRAM_PORT, TCP_PORT))) is DropReason.PORT
    assert ON_SERVER.judge(ipv4(*there, TCP, tcp(TCP_PORT, PROGRAM_PORT))) is DropReason.PORT
    assert ON_SERVER.judge(ipv4(*there, UDP, udp(UDP_PORT, PROGRAM_PORT))) is DropReason.PORT
    assert ON_CLIENT.judge(ipv4(*back, TCP, tcp(UDP_PORT, PROGRAM_PORT))) is DropReason.PORT
    assert ON_CLIENT.judge(ipv4(*back, UDP, udp(TCP_PORT, PROGRAM_PORT))) is DropReason.PORT
    assert ON_CLIENT.judge(ipv4(*back, TCP, tcp(PROGRAM_PORT, TCP_PORT))) is DropReason.PORT
    assert ON_CLIENT.judge(ipv4(*back, UDP, udp(PROGRAM_PORT, UDP_PORT))) is DropReason.PORT


@pytest.mark.proves("D13")
def test_no_peer_opens_a_connection_to_a_client() -> None:
    """From its transit port a peer could otherwise reach every service that listens on the client's TUN address."""
    for flags in range(256):
        packet = ipv4(SERVER_ADDRESS, CLIENT_ADDRESS, TCP, tcp(TCP_PORT, 22, flags=flags))
        is_opening = bool(flags & SYN) and not flags & ACK
        assert ON_CLIENT.judge(packet) is (DropReason.UNSOLICITED if is_opening else None)


@pytest.mark.parametrize("words", range(16))
def test_a_tcp_header_lies_inside_its_packet(words: int) -> None:
    packet = ipv4(CLIENT_ADDRESS, SERVER_ADDRESS, TCP, tcp(PROGRAM_PORT, TCP_PORT, words=words, data=bytes(32)))
    assert ON_SERVER.judge(packet) is (None if 5 <= words <= 13 else DropReason.BAD_TCP)


@pytest.mark.parametrize(
    ("length", "is_taken"), [(0, False), (7, False), (8, True), (9, True), (12, True), (13, False)]
)
def test_a_udp_datagram_lies_inside_its_packet(length: int, is_taken: bool) -> None:
    packet = ipv4(CLIENT_ADDRESS, SERVER_ADDRESS, UDP, udp(PROGRAM_PORT, UDP_PORT, length=length, data=b"abcd"))
    assert ON_SERVER.judge(packet) is (None if is_taken else DropReason.BAD_UDP)


@pytest.mark.proves("F44")
def test_of_icmp_only_unreachable_is_taken() -> None:
    """Redirects, echoes, advertisements and the rest change or reveal what is none of the peer's business."""
    for icmp_type in range(256):
        expected = None if icmp_type == 3 else DropReason.ICMP
        to_client = ipv4(SERVER_ADDRESS, CLIENT_ADDRESS, ICMP, unreachable(QUERY, icmp_type=icmp_type))
        to_server = ipv4(CLIENT_ADDRESS, SERVER_ADDRESS, ICMP, unreachable(ANSWER, icmp_type=icmp_type))
        assert ON_CLIENT.judge(to_client) is expected
        assert ON_SERVER.judge(to_server) is expected


@pytest.mark.proves("D13", "F44")
@pytest.mark.parametrize(
    "about",
    [
        pytest.param(ipv4(OTHER_CLIENT, SERVER_ADDRESS, TCP, BODY), id="another hosts flow"),
        pytest.param(ipv4(CLIENT_ADDRESS, "1.1.1.1", TCP, BODY), id="not through the tunnel"),
        pytest.param(ipv4(*THERE, TCP, tcp(PROGRAM_PORT, 22)), id="no transit port"),
        pytest.param(ipv4(*THERE, TCP, tcp(TCP_PORT, PROGRAM_PORT)), id="transit port on the wrong side"),
        pytest.param(ipv4(*THERE, TCP, tcp(PROGRAM_PORT, UDP_PORT)), id="transit port of udp"),
        pytest.param(ipv4(*THERE, UDP, udp(PROGRAM_PORT, TCP_PORT)), id="transit port of tcp"),
        pytest.param(ipv4(*THERE, GRE, BODY), id="another protocol"),
        pytest.param(ipv4(*THERE, TCP, BODY, fragment=1), id="a later fragment"),
        pytest.param(ipv4(*THERE, TCP, BODY, version_ihl=0x46), id="options"),
    ],
)
def test_an_icmp_error_is_about_a_packet_of_our_own(about: bytes) -> None:
    assert ON_CLIENT.judge(ipv4(SERVER_ADDRESS, CLIENT_ADDRESS, ICMP, unreachable(about))) is DropReason.ICMP_FLOW


@pytest.mark.proves("D13")
def test_one_client_cannot_end_the_flow_of_another() -> None:
    packet = ipv4(OTHER_CLIENT, SERVER_ADDRESS, ICMP, unreachable(REPLY))
    assert ON_SERVER.judge(packet) is DropReason.ICMP_FLOW


def test_a_plan_without_udp_takes_no_udp() -> None:
    plan = Plan("server", SERVER.address, SERVER.peer, replays=parse_replays(["7"]))
    assert PacketFilter(plan).judge(QUERY) is DropReason.PORT
    assert PacketFilter(plan).judge(REQUEST) is None


# What this host's kernel puts into the TUN.


@pytest.mark.parametrize("size", range(20))
def test_what_is_too_short_for_a_header_stays_here(size: int) -> None:
    assert ON_CLIENT.judge_outbound(REQUEST[:size]) is DropReason.TOO_SHORT


@pytest.mark.proves("F44")
def test_router_solicitations_and_other_ipv6_noise_stay_here() -> None:
    assert ON_CLIENT.judge_outbound(b"\x60" + bytes(47)) is DropReason.IPV6


@pytest.mark.parametrize("source", ["10.0.0.7", "192.168.0.2", "192.168.0.0", SERVER_ADDRESS])
def test_a_program_that_bound_another_address_does_not_reach_the_link(source: str) -> None:
    assert ON_CLIENT.judge_outbound(ipv4(source, SERVER_ADDRESS, TCP, REQUEST[20:])) is DropReason.FOREIGN_SRC


@pytest.mark.parametrize("destination", ["1.1.1.1", "192.168.0.253", "192.168.0.255", "224.0.0.22", CLIENT_ADDRESS])
def test_a_client_sends_to_its_peer_only(destination: str) -> None:
    """1.1.1.1 is what a captured program asked for: it shows here when the rule that rewrites it has gone."""
    assert ON_CLIENT.judge_outbound(ipv4(CLIENT_ADDRESS, destination, TCP, REQUEST[20:])) is DropReason.WRONG_DST


@pytest.mark.parametrize(
    ("destination", "is_sent"),
    [
        ("192.168.0.0", False),
        ("192.168.0.1", True),
        (OTHER_CLIENT, True),
        ("192.168.0.253", True),
        (SERVER_ADDRESS, False),
        ("192.168.0.255", False),
        ("192.168.1.0", False),
        ("8.8.8.8", False),
    ],
)
def test_a_server_sends_to_any_host_of_the_tuns_network(destination: str, is_sent: bool) -> None:
    packet = ipv4(SERVER_ADDRESS, destination, TCP, REPLY[20:])
    assert ON_SERVER.judge_outbound(packet) is (None if is_sent else DropReason.WRONG_DST)


# Against the oracle.


def broken_rules(plan: Plan, packet: bytes) -> set[str]:
    """Every rule that *packet* breaks on its way from the link, by reading it as the RFCs are written."""
    if len(packet) < 20:
        return {"too_short"}
    version, words = divmod(packet[0], 16)
    if version == 6:
        return {"ipv6"}
    if version != 4:
        return {"not_ip"}
    if words != 5:
        return {"options" if words > 5 else "bad_header_length"}
    broken = set()
    source, destination = IPv4Address(packet[12:16]), IPv4Address(packet[16:20])
    if source not in peers(plan):
        broken.add("spoof_src")
    if destination != plan.address.ip:
        broken.add("wrong_dst")
    if packet[6] & 0b0011_1111 or packet[7]:
        broken.add("fragment")
    total = int.from_bytes(packet[2:4], "big")
    if total < 20 or total > len(packet):
        return broken | {"bad_total_length"}
    body = packet[20:total]
    if packet[9] == 6:
        broken |= broken_tcp_rules(plan, body)
    elif packet[9] == 17:
        if len(body) < 8 or int.from_bytes(body[4:6], "big") not in range(8, len(body) + 1):
            broken.add("bad_udp")
        elif not has_transit_port(plan, "udp", body, is_from_here=False):
            broken.add("port")
    elif packet[9] == 1:
        if len(body) < 8 + 20 + 8 or body[0] != 3:
            broken.add("icmp")
        elif not is_own_packet(plan, body[8:], source):
            broken.add("icmp_flow")
    else:
        broken.add("protocol")
    return broken


def broken_tcp_rules(plan: Plan, segment: bytes) -> set[str]:
    if len(segment) < 20 or not 20 <= 4 * (segment[12] // 16) <= len(segment):
        return {"bad_tcp"}
    broken = set()
    if not has_transit_port(plan, "tcp", segment, is_from_here=False):
        broken.add("port")
    is_syn, is_ack = bool(segment[13] & 2), bool(segment[13] & 16)
    if plan.role == "client" and is_syn and not is_ack:
        broken.add("unsolicited")
    return broken


def is_own_packet(plan: Plan, packet: bytes, sender: IPv4Address) -> bool:
    """Whether this host can have sent the *packet* that an ICMP error of *sender* repeats."""
    return (
        packet[0] == 0x45
        and not packet[6] & 0b0011_1111
        and packet[7] == 0
        and IPv4Address(packet[12:16]) == plan.address.ip
        and IPv4Address(packet[16:20]) == sender
        and packet[9] in (6, 17)
        and has_transit_port(plan, {6: "tcp", 17: "udp"}[packet[9]], packet[20:], is_from_here=True)
    )


def has_transit_port(plan: Plan, protocol: str, ports: bytes, *, is_from_here: bool) -> bool:
    """A transit port is the server's: the destination of what the client sends, the source of what comes back."""
    is_from_client = (plan.role == "client") == is_from_here
    port = int.from_bytes(ports[2:4] if is_from_client else ports[0:2], "big")
    return (protocol, port) in transits(plan)


def transits(plan: Plan) -> list[tuple[TransportProtocol, int]]:
    captures = [(rule.protocol, rule.transit) for rule in plan.captures]
    return captures + [(rule.protocol, rule.transit) for rule in plan.replays]


class peers:  # noqa: N801  # reads as a set: `address in peers(plan)`
    """The addresses that may be at the other end of a plan's tunnel."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def __contains__(self, address: IPv4Address) -> bool:
        if self._plan.role == "client":
            return address == self._plan.peer
        network = self._plan.address.network
        nobody = (network.network_address, network.broadcast_address, self._plan.address.ip)
        return address in network and address not in nobody


def broken_rules_outbound(plan: Plan, packet: bytes) -> set[str]:
    """Every rule that *packet* breaks on its way to the link."""
    if len(packet) < 20:
        return {"too_short"}
    version = packet[0] // 16
    if version != 4:
        return {"ipv6" if version == 6 else "not_ip"}
    broken = set()
    if IPv4Address(packet[12:16]) != plan.address.ip:
        broken.add("foreign_src")
    if IPv4Address(packet[16:20]) not in peers(plan):
        broken.add("wrong_dst")
    return broken


def is_agreed(reason: DropReason | None, broken: set[str]) -> bool:
    """The filter may stop at any broken rule; it may not invent one, nor miss the only one."""
    return reason in broken if broken else reason is None


ADDRESSES = [
    IPv4Address(text).packed
    for text in (CLIENT_ADDRESS, SERVER_ADDRESS, OTHER_CLIENT, "192.168.0.0", "192.168.0.255", "127.0.0.1", "0.0.0.0")
]
NUMBERS = [
    struct.pack("!H", number) for number in (0, 7, 8, 20, 28, 40, 56, 6977, 6978, 6979, 6980, 0x2000, 0x4000, 65535)
]
FIELDS = [  # where a packet or the one inside an ICMP error has a field, and what to put there
    ((0, 28), [bytes([value]) for value in (0x00, 0x44, 0x45, 0x46, 0x4F, 0x55, 0x60, 0xF5)]),
    ((2, 6, 20, 22, 24, 34, 48, 50), NUMBERS),
    ((9, 37), [bytes([value]) for value in (ICMP, TCP, UDP, GRE)]),
    ((12, 16, 40, 44), ADDRESSES),
    ((20,), [bytes([value]) for value in (0, 3, 5, 11)]),
    ((32,), [bytes([value << 4]) for value in range(16)]),
    ((33,), [bytes([value]) for value in (0, SYN, ACK, SYN_ACK, 0xFF)]),
]
FIELD_VALUES = [(offset, value) for offsets, values in FIELDS for offset in offsets for value in values]


def mutated_packets(role: str, count: int, seed: int) -> Iterator[bytes]:
    """Packets of captured flows with up to three changes, and a tenth of plain noise; the same ones for one *seed*."""
    choice = random.Random(seed)
    templates = (TO_CLIENT + TO_SERVER[:2]) if role == "client" else (TO_SERVER + TO_CLIENT[:2])
    for _ in range(count):
        dice = choice.random()
        if dice < 0.1:
            yield choice.randbytes(int(dice * 1000))
            continue
        packet = bytearray(templates[int(choice.random() * len(templates))])
        for _ in range(int(dice * 4)):
            offset, value = FIELD_VALUES[int(choice.random() * len(FIELD_VALUES))]
            if offset + len(value) <= len(packet):
                packet[offset : offset + len(value)] = value
        if dice > 0.9:  # noise in one byte, or another length
            packet[int(choice.random() * len(packet))] = int(choice.random() * 256)
        elif dice > 0.8:
            packet = packet[: int(choice.random() * len(packet))]
        elif dice > 0.75:
            packet += bytes(9)
        yield bytes(packet)


@pytest.mark.proves("D12", "D13", "F40", "F41", "F42", "F43", "F44", "G4")
@pytest.mark.parametrize(("plan", "asked"), [(CLIENT, ON_CLIENT), (SERVER, ON_SERVER)], ids=["client", "server"])
def test_a_million_packets_are_judged_as_the_oracle_judges_them(plan: Plan, asked: PacketFilter) -> None:
    inbound: Counter[str | None] = Counter()
    outbound: Counter[str | None] = Counter()
    for packet in mutated_packets(plan.role, RANDOM_PACKETS, seed=6978):
        reason = asked.judge(packet)
        assert is_agreed(reason, broken_rules(plan, packet)), (reason, packet.hex())
        inbound[reason] += 1
        reason = asked.judge_outbound(packet)
        assert is_agreed(reason, broken_rules_outbound(plan, packet)), (reason, packet.hex())
        outbound[reason] += 1
    # The sample is worth something: it reaches every rule, and a good part of it is let through.
    not_here = {DropReason.FOREIGN_SRC} | ({DropReason.UNSOLICITED} if plan.role == "server" else set())
    assert min(inbound[reason] for reason in set(DropReason) - not_here) > 100
    assert inbound[None] > RANDOM_PACKETS / 10
    assert min(outbound[reason] for reason in (None, *set(DropReason) & set(outbound))) > 100


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Plans of either role on networks of any size up to /30, with transit ports at the edges too."""
    prefix = draw(st.integers(8, 30))
    block = int(IPv4Address("10.0.0.0")) + (draw(st.integers(0, 2**22 - 1)) << 2)
    network = IPv4Interface((block, prefix)).network
    offsets = st.integers(1, network.num_addresses - 2) | st.sampled_from([1, network.num_addresses - 2])
    own, peer = draw(st.lists(offsets, min_size=2, max_size=2, unique=True))
    first, second = draw(st.lists(st.sampled_from([1, 255, 256, 6978, 65535]), min_size=2, max_size=2, unique=True))
    specs = [f"7:{first}", f"udp/7:{second}"]
    role = draw(st.sampled_from(["client", "server"]))
    return Plan(
        role=role,  # type: ignore[arg-type]  # sampled_from loses the literals
        address=IPv4Interface((int(network.network_address) + own, prefix)),
        peer=network[peer],
        captures=parse_captures(specs) if role == "client" else (),
        replays=parse_replays(specs) if role == "server" else (),
    )


@pytest.mark.proves("D12", "D13", "G4")
@given(plan=plans(), data=st.data())
def test_any_plan_is_kept_to_at_the_edges_of_its_network(plan: Plan, data: st.DataObject) -> None:
    network = plan.address.network
    near = [int(network.network_address), int(network.broadcast_address), int(plan.address.ip), int(plan.peer)]
    addresses = st.builds(lambda base, step: str(IPv4Address(base + step)), st.sampled_from(near), st.integers(-2, 2))
    ports = st.sampled_from([*(port for _, port in transits(plan)), PROGRAM_PORT])
    body = data.draw(
        st.tuples(st.just(TCP), st.builds(tcp, ports, ports)) | st.tuples(st.just(UDP), st.builds(udp, ports, ports)),
    )
    packet = ipv4(data.draw(addresses), data.draw(addresses), *body)
    asked = PacketFilter(plan)
    assert is_agreed(asked.judge(packet), broken_rules(plan, packet))
    assert is_agreed(asked.judge_outbound(packet), broken_rules_outbound(plan, packet))


@pytest.mark.proves("D12")
@given(st.binary(max_size=120))
def test_no_bytes_whatever_raise(packet: bytes) -> None:
    for plan, asked in ((CLIENT, ON_CLIENT), (SERVER, ON_SERVER)):
        assert is_agreed(asked.judge(packet), broken_rules(plan, packet))
        assert is_agreed(asked.judge(b"\x45" + packet), broken_rules(plan, b"\x45" + packet))
        assert is_agreed(asked.judge_outbound(packet), broken_rules_outbound(plan, packet))
