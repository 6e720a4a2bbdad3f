"""A gateway sends running agents whatever it likes: they stay up and count it, and nobody on their hosts hears it."""

from __future__ import annotations

import re
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv4Address, IPv6Address
from types import TracebackType
from typing import Any, Literal, Self

import pytest
from enlink.testing.gateways import HELLO, AgentSide, Between, Connection, framed, split_frames
from enlink.testing.hosts import Host
from enlink.testing.probe import Packet, Wire
from enlink.testing.programs import Program, comes_true, started
from enta.tun import open_tun
from path import BIN, GATEWAY_OF_APP, GATEWAY_OF_SERVER, Path
from path import Program as PathProgram

Role = Literal["client", "server"]

FAR_BEYOND_S = 40.0
MIB = 1 << 20
ICMP, IGMP, IP_IN_IP, TCP, UDP, GRE, EXPERIMENT = 1, 2, 4, 6, 17, 47, 253
SYN, ACK = 0x02, 0x10
TCP_TRANSIT, UDP_TRANSIT = 6978, 6979
PROGRAM_PORT = 40000  # of a captured program
OUR_OWN_LINK = struct.pack("!H", 6980)  # as the source port of what comes from the gateway
CLIENT, SERVER, STRANGER = "192.168.0.1", "192.168.0.254", "192.168.0.77"
GROUP = "239.78.69.1"
OUTER_IPV6 = "fd00::99"

# The agent as it is, but that it tries again sooner, so that hundreds of links pass in seconds.
HASTY = """
import sys
import enlink.supervise
import enta.cli
enlink.supervise.MAX_DELAY_S = 0.05
del sys.argv[0]
sys.exit(enta.cli.main())
"""
# The agent without its filter: every packet reaches the kernel, whole.
UNFILTERED = """
import sys
import enta.cli, enta.lane
enta.lane.PacketFilter.judge = lambda self, packet: None
enta.lane.trimmed = lambda packet: packet
del sys.argv[0]
sys.exit(enta.cli.main())
"""


def checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{(len(data) + 1) // 2}H", data + bytes(len(data) % 2)))
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF


def ipv4(
    source: str,
    destination: str,
    protocol: int,
    body: bytes,
    *,
    options: bytes = b"",
    words: int | None = None,
    total: int | None = None,
    fragment: int = 0,
    identity: int = 1,
) -> bytes:
    """A packet that a kernel takes, except for what a test asks."""
    size = 20 + len(options)
    words = size // 4 if words is None else words
    total = size + len(body) if total is None else total
    fixed = struct.pack("!BBHHHBB", 0x40 | words, 0, total, identity, fragment, 64, protocol)
    addresses = IPv4Address(source).packed + IPv4Address(destination).packed
    return fixed + struct.pack("!H", checksum(fixed + addresses + options)) + addresses + options + body


def udp(source: int, destination: int, data: bytes, *, length: int | None = None) -> bytes:
    return struct.pack("!HHHH", source, destination, 8 + len(data) if length is None else length, 0) + data


def tcp(addresses: tuple[str, str], ports: tuple[int, int], flags: int, data: bytes, *, words: int = 5) -> bytes:
    segment = struct.pack("!HHIIBBHHH", *ports, 1, 2, words << 4, flags, 500, 0, 0) + data
    pseudo = b"".join(IPv4Address(address).packed for address in addresses) + struct.pack("!HH", TCP, len(segment))
    return segment[:16] + struct.pack("!H", checksum(pseudo + segment)) + segment[18:]


def icmp(kind: int, code: int, rest: bytes) -> bytes:
    message = struct.pack("!BBH", kind, code, 0) + rest
    return message[:2] + struct.pack("!H", checksum(message)) + message[4:]


def canary(name: str) -> bytes:
    return f"<canary {name}>".encode()


@dataclass(frozen=True)
class Victim:
    """What a hostile gateway knows of an agent and its host."""

    role: Role
    own: str
    peer: str
    outer: str
    gateway: str

    def ports(self, transit: int) -> tuple[int, int]:
        """Source and destination port of what the agent takes: from a transit port to a program, or the reverse."""
        return (transit, PROGRAM_PORT) if self.role == "client" else (PROGRAM_PORT, transit)

    def datagram(self, name: str) -> bytes:
        return udp(*self.ports(UDP_TRANSIT), canary(name))

    def segment(self, name: str, flags: int = SYN, *, transit: int = TCP_TRANSIT, words: int = 5) -> bytes:
        return tcp((self.peer, self.own), self.ports(transit), flags, canary(name), words=words)

    def good(self, name: str) -> bytes:
        """A datagram that is to be delivered: an answer to a program, or a question to a server."""
        return ipv4(self.peer, self.own, UDP, self.datagram(name))

    def hostile(self) -> list[tuple[str, str, bytes]]:
        """Every packet that must reach nobody: its name, the reason under which it is counted, and its bytes."""
        return [*self._with_other_addresses(), *self._with_other_ports(), *self._misshapen(), *self._of_other_kinds()]

    def _with_other_addresses(self) -> Iterator[tuple[str, str, bytes]]:
        broadcast = ("192.168.0.255", "255.255.255.255")
        special = ("127.0.0.1", "127.0.0.2", "169.254.169.254", "0.0.0.0")
        elsewhere = (self.outer, self.gateway, "8.8.8.8", GROUP)
        for destination in (*broadcast, *special, *elsewhere, "224.0.0.1", STRANGER, self.peer):
            name = f"to {destination}"
            yield name, "wrong_dst", ipv4(self.peer, destination, UDP, self.datagram(name))
        # A server takes packets from every host of the TUN's network, and a client from its peer only.
        outside = ("192.168.1.1", "192.168.0.0", self.own, *((STRANGER,) if self.role == "client" else ()))
        for source in (*broadcast, *special, *elsewhere, *outside):
            name = f"from {source}"
            yield name, "spoof_src", ipv4(source, self.own, UDP, self.datagram(name))

    def _with_other_ports(self) -> Iterator[tuple[str, str, bytes]]:
        # What others listen on, what is replayed by its own port, and what is a transit port of the other protocol.
        for port in (22, 53, 4444, TCP_TRANSIT):
            name = f"udp port {port}"
            yield name, "port", ipv4(self.peer, self.own, UDP, udp(*self.ports(port), canary(name)))
        for port in (7, 22, UDP_TRANSIT):
            name = f"tcp port {port}"
            yield name, "port", ipv4(self.peer, self.own, TCP, self.segment(name, transit=port))
        if self.role == "client":
            yield "syn to a client", "unsolicited", ipv4(self.peer, self.own, TCP, self.segment("syn to a client"))

    def _misshapen(self) -> Iterator[tuple[str, str, bytes]]:
        route = bytes((131, 7, 4)) + IPv4Address(self.gateway).packed + b"\0"
        lies: tuple[tuple[str, str, dict[str, Any]], ...] = (
            ("option", "options", {"options": bytes((1, 1, 1, 0))}),
            ("source route", "options", {"options": route}),
            ("header of 15 words", "options", {"words": 15}),
            ("header of four words", "bad_header_length", {"words": 4}),
            ("total of 0", "bad_total_length", {"total": 0}),
            ("total of 19", "bad_total_length", {"total": 19}),
            ("total of 65535", "bad_total_length", {"total": 65535}),
            ("total without the data", "bad_udp", {"total": 28}),
            ("first fragment", "fragment", {"fragment": 0x2000, "identity": 2}),
            ("last fragment", "fragment", {"fragment": 4, "identity": 3}),
        )
        for name, reason, lie in lies:
            yield name, reason, ipv4(self.peer, self.own, UDP, self.datagram(name), **lie)
        name = "one byte short"
        yield name, "bad_total_length", ipv4(self.peer, self.own, UDP, self.datagram(name))[:-1]
        both = self.datagram("two fragments")
        for name, body, fragment in (("two fragments", both[:24], 0x2000), ("the second", both[24:], 3)):
            yield name, "fragment", ipv4(self.peer, self.own, UDP, body, fragment=fragment, identity=4)
        for name, length in (("udp of 7 bytes", 7), ("udp beyond its packet", 65535)):
            datagram = udp(*self.ports(UDP_TRANSIT), canary(name), length=length)
            yield name, "bad_udp", ipv4(self.peer, self.own, UDP, datagram)
        for name, words in (("tcp header of 4 words", 4), ("tcp header beyond its packet", 15)):
            yield name, "bad_tcp", ipv4(self.peer, self.own, TCP, self.segment(name, words=words))

    def _of_other_kinds(self) -> Iterator[tuple[str, str, bytes]]:
        inside = ipv4(self.peer, self.gateway, UDP, self.datagram("ip in ip"))
        stranger = ipv4(self.outer, "8.8.8.8", UDP, udp(1, 53, b""))
        redirect = IPv4Address(self.gateway).packed + self.good("redirect")
        for name, reason, protocol, body in (
            ("gre", "protocol", GRE, bytes(4) + canary("gre")),
            ("igmp", "protocol", IGMP, canary("igmp")),
            ("experiment", "protocol", EXPERIMENT, canary("experiment")),
            ("ip in ip", "protocol", IP_IN_IP, inside),
            ("ping", "icmp", ICMP, icmp(8, 0, bytes(4) + canary("ping"))),
            ("redirect", "icmp", ICMP, icmp(5, 1, redirect)),
            ("of a strange flow", "icmp_flow", ICMP, icmp(3, 3, bytes(4) + stranger + canary("of a strange flow"))),
        ):
            yield name, reason, ipv4(self.peer, self.own, protocol, body)
        datagram = udp(1, 22, canary("ipv6"))
        addresses = IPv6Address("fd00::1").packed + IPv6Address(OUTER_IPV6).packed
        yield "ipv6", "ipv6", struct.pack("!IHBB", 6 << 28, len(datagram), UDP, 64) + addresses + datagram
        # No packets at all: here the link's own rules speak.
        yield "arp", "not_ip", bytes.fromhex("ffffffffffff0200000000010806") + canary("arp")
        for version in (0x55, 0xF5):
            yield f"version {version >> 4}", "not_ip", bytes((version,)) + self.good("version")[1:]
        yield "nothing", "empty", b""
        yield "one byte", "too_short", b"\x45"
        yield "19 bytes", "too_short", self.good("19 bytes")[:19]


VICTIMS: dict[Role, Victim] = {
    "client": Victim("client", CLIENT, SERVER, "10.81.1.1", GATEWAY_OF_APP),
    "server": Victim("server", SERVER, CLIENT, "10.81.3.2", GATEWAY_OF_SERVER),
}
PORTS_OF_RECEIVERS: dict[Role, int] = {"client": PROGRAM_PORT, "server": 53}


class Ears:
    """Hears what reaches anybody on a host, whatever its address and port, and what leaves it by its wire."""

    def __init__(self, host: Host, wire: Wire, tun_name: str = "eng0") -> None:
        self._wire = wire
        self._ears: list[socket.socket] = []
        with host.entered():
            for protocol in (ICMP, IGMP, IP_IN_IP, TCP, UDP, GRE, EXPERIMENT):
                self._ears.append(socket.socket(socket.AF_INET, socket.SOCK_RAW, protocol))
            self._ears.append(socket.socket(socket.AF_INET6, socket.SOCK_RAW, UDP))
            membership = struct.pack("4s4si", IPv4Address(GROUP).packed, bytes(4), socket.if_nametoindex(tun_name))
            self._ears[3].setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)
        for ear in self._ears:
            ear.setblocking(False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for ear in self._ears:
            ear.close()

    def heard(self) -> set[str]:
        """The names of the canaries that somebody has heard since the last call."""
        heard = [packet.payload for packet in self._wire.packets()]
        for ear in self._ears:
            while True:
                try:
                    packet = ear.recv(65535)
                except BlockingIOError:
                    break
                if packet[20:22] != OUR_OWN_LINK:
                    heard.append(packet)
        return {name.decode() for data in heard for name in re.findall(rb"<canary (.*?)>", data)}


class Rig:
    """Both agents with a gateway of the test's own between them, on hosts that forward, and programs beside them."""

    def __init__(self, stack: ExitStack, script: str, *options: str) -> None:
        self.hosts: dict[Role, Host] = {}
        self.agents: dict[Role, Program] = {}
        self.wires: dict[Role, Wire] = {}
        self.ears: dict[Role, Ears] = {}
        path = stack.enter_context(Path())
        near, far = path.hosts["near"], path.hosts["far"]
        gateway = stack.enter_context(Between(near, far, greeting=HELLO))
        self.sides: dict[Role, AgentSide] = {"client": gateway.client, "server": gateway.server}
        self.gateways: dict[Role, Host] = {"client": near, "server": far}
        client, server = ((f"--{what}", "7", f"--{what}", "udp/53", *options) for what in ("capture", "replay"))
        self._add(stack, "client", path.hosts["app"], "wire1b", script, *client)
        self._add(stack, "server", path.hosts["server"], "wire3a", script, *server)
        stack.enter_context(path.running("server", "echosvr", "server", "--port", "7"))
        self.receivers: dict[Role, socket.socket] = {}
        for role, port in PORTS_OF_RECEIVERS.items():
            with self.hosts[role].entered():
                self.receivers[role] = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            self.receivers[role].bind(("", port))
            self.receivers[role].settimeout(FAR_BEYOND_S)
        # A question, so that what the client's gateway says is an answer.
        self.receivers["client"].sendto(b"question", ("1.1.1.1", 53))
        assert self.receivers["server"].recv(100) == b"question"

    def _add(self, stack: ExitStack, role: Role, host: Host, device: str, script: str, *ports_and_more: str) -> None:
        host.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
        host.run("ip", "address", "add", OUTER_IPV6, "dev", "lo")
        options = (*ports_and_more, "--entg-connect", f"{VICTIMS[role].gateway}:6980")
        agent = stack.enter_context(started(host, "enta", role, *options, under=(sys.executable, "-c", script)))
        agent.wait_until_ready()
        self.hosts[role], self.agents[role] = host, agent
        self.wires[role] = stack.enter_context(Wire(host, self.gateways[role], device, VICTIMS[role].gateway))
        self.ears[role] = stack.enter_context(Ears(host, self.wires[role]))

    def link(self, role: Role) -> Connection:
        """Return the agent's link as soon as it is greeted."""
        side = self.sides[role]
        self.agents[role].wait_until(lambda: side.agent is not None and side.agent.is_greeted, "greeted")
        assert side.agent is not None
        return side.agent

    def deliver_good(self, role: Role, name: str) -> None:
        """Show that packets are delivered, and that everything before this one has been dealt with."""
        self.link(role).say(framed(VICTIMS[role].good(name)))
        while self.receivers[role].recv(100) != canary(name):
            pass

    def echo(self) -> None:
        """Let an ordinary program exchange 300 kB with an ordinary server, through both agents."""
        self.hosts["client"].run(str(BIN / "echosvr"), "client", "--host", "1.1.1.1", "--bytes", "300000")

    def counted(self, role: Role, group: str) -> Counter[str]:
        return Counter(self.agents[role].status()["counters"].get(group, {}))

    def wait_for_end(self, role: Role, link: Connection, reason: str, before: Counter[str]) -> None:
        """Wait until the link has ended, for that reason and no other."""
        count = Counter[str]()

        def has_ended() -> bool:
            count.update(self.counted(role, "uplink_ended") - before - count)
            return bool(count)

        self.agents[role].wait_until(has_ended, reason)
        self.agents[role].wait_until(lambda: link.has_ended, "hung up")
        assert count == {reason: 1}


def packets_heard(stream: bytes | bytearray) -> list[bytes]:
    return [payload for payload in split_frames(stream)[0] if not payload.startswith(b"\0")]


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with ExitStack() as stack:
        yield Rig(stack, HASTY)


@pytest.fixture(params=["client", "server"])
def role(request: pytest.FixtureRequest, rig: Rig) -> Iterator[Role]:
    """Each agent in turn. Whatever a test does to it: it is the same process, no bigger, idle, and works."""
    role: Role = request.param
    agent = rig.agents[role]
    rig.echo()
    resident_bytes = agent.resident_bytes
    yield role
    assert agent.process.poll() is None
    rig.echo()
    assert agent.resident_bytes - resident_bytes < 4 * MIB
    agent.wait_until(lambda: cpu_share(agent) < 0.1, "idle again")


def cpu_share(agent: Program) -> float:
    """How much of half a second it works."""
    began_s, worked_s = time.monotonic(), agent.cpu_s
    time.sleep(0.5)
    return (agent.cpu_s - worked_s) / (time.monotonic() - began_s)


# Packets.


@pytest.mark.proves("D12", "D13", "D22", "F40", "F41", "F42", "F43", "F44")
def test_no_hostile_packet_reaches_anybody_and_each_is_counted(rig: Rig, role: Role) -> None:
    """On a host that forwards, with an ear for every protocol, address and port, and on its wire."""
    hostile, link = VICTIMS[role].hostile(), rig.link(role)
    rig.deliver_good(role, "before")
    assert rig.ears[role].heard() >= {"before"}
    dropped, said_bytes = rig.counted(role, "dropped"), len(link.heard)
    for _, _, packet in hostile:
        link.say(framed(packet))
    rig.deliver_good(role, "after")
    assert rig.ears[role].heard() == {"after"}
    assert rig.counted(role, "dropped") - dropped == Counter(reason for _, reason, _ in hostile)
    assert packets_heard(link.heard[said_bytes:]) == [], "somebody answered"
    assert rig.link(role) is link


BEYOND_IPTABLES = {"option", "two fragments"}


@pytest.mark.proves("D14")
@pytest.mark.parametrize(("firewall", "left_to_the_filter"), [("nftables", set()), ("iptables", BEYOND_IPTABLES)])
def test_the_kernel_alone_stops_them_as_well(firewall: str, left_to_the_filter: set[str]) -> None:
    """The same packets, and agents that have lost their filter: the rules in the kernel are a barrier of their own."""
    with ExitStack() as stack:
        rig = Rig(stack, UNFILTERED, "--firewall", firewall)
        for role, victim in VICTIMS.items():
            link = rig.link(role)
            rig.ears[role].heard()
            said_bytes = len(link.heard)
            for _, _, packet in victim.hostile():
                link.say(framed(packet))
            rig.deliver_good(role, "good")
            assert rig.ears[role].heard() == {"good", *left_to_the_filter}
            assert set(rig.counted(role, "dropped")) <= {"empty", "not_ip", "too_short", "wrong_dst"}
            assert packets_heard(link.heard[said_bytes:]) == []


# Those of the packets that every kernel takes if nobody tells it otherwise; the rest it refuses for their shape.
TAKEN_BY_A_TRUSTING_KERNEL = {
    *("to 192.168.0.255", "to 255.255.255.255", "to 127.0.0.1", "to 127.0.0.2", "to 169.254.169.254"),
    *("to 10.81.3.1", "to 10.81.3.2", "to 8.8.8.8", f"to {GROUP}", "to 224.0.0.1"),
    *("from 10.81.3.1", "from 8.8.8.8", "from 192.168.1.1", "from 169.254.169.254", "from 192.168.0.0"),
    *("udp port 22", "udp port 4444", "tcp port 7", "tcp port 22", "option", "source route", "two fragments"),
    *("udp of 7 bytes", "udp beyond its packet", "tcp header of 4 words", "gre", "igmp", "experiment", "ip in ip"),
    *("ping", "redirect", "of a strange flow", "ipv6"),
}
PROBE_PORTS = (7, 22, TCP_TRANSIT, PROGRAM_PORT)


def probe(gateway: Host, victim: Victim) -> None:
    """Say SYN and SYN-ACK for the TUN's address on the outer wire, as its neighbour and as the agent's peer."""
    with gateway.entered(), socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        for source in (victim.gateway, victim.peer):
            for ports in [(TCP_TRANSIT, port) for port in PROBE_PORTS] + [(PROGRAM_PORT, port) for port in PROBE_PORTS]:
                for flags in (SYN, SYN | ACK, ACK):
                    segment = tcp((source, victim.own), ports, flags, b"")
                    raw.sendto(ipv4(source, victim.own, TCP, segment), (victim.own, 0))


def answers(wire: Wire, victim: Victim) -> list[Packet]:
    """What the host has said of its TUN's address on its wire."""
    return [packet for packet in wire.packets() if str(packet.source) == victim.own]


def test_ears_and_probes_find_what_they_look_for_where_nothing_stops_it() -> None:
    """The control: a TUN with the server's address and no agent behind it, on a host that trusts everybody."""
    victim = VICTIMS["server"]
    with Path() as path:
        host, gateway = path.hosts["server"], path.hosts["far"]
        trust = ("forwarding=1", "rp_filter=0", "route_localnet=1", "accept_local=1", "accept_source_route=1")
        settings = [f"net.ipv4.conf.{where}.{setting}" for where in ("all", "default") for setting in trust]
        host.run("sysctl", "-qw", *settings)
        host.run("ip", "address", "add", OUTER_IPV6, "dev", "lo")
        with host.entered():
            tun = open_tun("eng0")
        with tun:
            host.run("ip", "address", "add", f"{victim.own}/24", "dev", "eng0")
            host.run("ip", "link", "set", "eng0", "up")
            with Wire(host, gateway, "wire3a", victim.gateway) as wire, Ears(host, wire) as ears:
                for _, _, packet in victim.hostile():
                    tun.write_packet(packet)
                assert ears.heard() >= TAKEN_BY_A_TRUSTING_KERNEL
                gateway.run("ip", "route", "add", f"{victim.own}/32", "via", victim.outer)
                probe(gateway, victim)
                assert len(answers(wire, victim)) >= len(PROBE_PORTS)


@pytest.mark.proves("D15")
def test_nobody_on_the_outer_wire_learns_what_the_tun_is_used_for(rig: Rig, role: Role) -> None:
    """CVE-2019-14899: a neighbour tries addresses and ports, and gets no answer, neither there nor through the tunnel.

    A program's connection is open meanwhile, with one of the ports that the neighbour tries.
    """
    victim, gateway, link = VICTIMS[role], rig.gateways[role], rig.link(role)
    rig.wires[role].packets()
    with rig.hosts["client"].entered(), socket.socket() as program:
        program.bind(("", PROGRAM_PORT))
        # Closed by a reset, so that the port is free for the next one.
        program.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        program.settimeout(FAR_BEYOND_S)
        program.connect(("1.1.1.1", 7))
        program.sendall(b"hello")
        assert program.recv(100) == b"hello"
        gateway.run("ip", "route", "add", f"{victim.own}/32", "via", victim.outer)
        try:
            rig.deliver_good(role, "before")
            said_bytes = len(link.heard)
            probe(gateway, victim)
            assert answers(rig.wires[role], victim) == []
            rig.deliver_good(role, "after")
            assert packets_heard(link.heard[said_bytes:]) == []
        finally:
            gateway.run("ip", "route", "delete", f"{victim.own}/32")
        program.sendall(b"still there")
        assert program.recv(100) == b"still there"


# Frames.

ARP = framed(bytes.fromhex("ffffffffffff0200000000010806"))
LAST_WORDS = [
    ("frame_len", bytes.fromhex("00010000")),
    ("frame_len", bytes.fromhex("80000000")),
    ("frame_len", bytes.fromhex("ffffffff") + bytes(1_000_000)),
    ("junk", framed(b"") * 64),
    ("junk", ARP * 64),
    ("flood", framed(b"\0\xff") * 2000),
    ("flood", (ARP * 63 + framed(b"\0\3")) * 100),
    ("bad_control", HELLO),
    ("flood", (framed(b"\0\6\0") + framed(b"\0\6\1")) * 1000),
    ("bad_control", framed(b"\0\1")),
    ("bad_control", framed(b"\0\6")),
    ("bad_control", framed(b"\0\6\2")),
    ("closed", framed(b"\0\4enough")),
    ("refused", framed(b"\0\5go away")),
]


@pytest.mark.proves("D11", "D22", "F37", "F38", "F40")
def test_bytes_that_end_a_link_end_nothing_else_and_are_counted(rig: Rig, role: Role) -> None:
    """Lengths out of all proportion, junk, floods, messages out of turn, CLOSE and ERROR: then a new link, at once."""
    for reason, words in LAST_WORDS:
        link, before = rig.link(role), rig.counted(role, "uplink_ended")
        with suppress(OSError):  # it may have hung up before it has heard everything
            link.say(words)
        rig.wait_for_end(role, link, reason, before)
    rig.deliver_good(role, "good")


@pytest.mark.proves("D22", "D24")
def test_news_of_the_path_changes_what_status_says_and_stops_no_packet(rig: Rig, role: Role) -> None:
    """However often it comes, too; and a new link begins anew."""
    link, agent = rig.link(role), rig.agents[role]
    told_before = len(agent.events("path_closed")) + len(agent.events("path_open"))
    for _ in range(200):
        link.say(framed(b"\0\6\0") + framed(b"\0\6\1and more"))
    link.say(framed(b"\0\6\0"))
    agent.wait_until(lambda: agent.status()["uplink"]["path"] == "closed", "told that the path is closed")
    rig.deliver_good(role, "good")
    assert agent.status()["uplink"]["up"] is True
    link.say(framed(b"\0\6\1"))
    agent.wait_until(lambda: agent.status()["uplink"]["path"] == "open", "told that the path is open")
    link.say(framed(b"\0\6\0"))
    link.close()
    agent.wait_until(lambda: link.has_ended, "hung up")
    rig.deliver_good(role, "good")
    assert agent.status()["uplink"]["path"] == "open"
    assert len(agent.events("path_closed")) + len(agent.events("path_open")) - told_before < 20


@pytest.mark.proves("D10", "F18", "F25", "F34", "F35", "G18")
def test_a_link_cut_anywhere_in_a_frame_is_truncated_and_delivers_nothing(rig: Rig, role: Role) -> None:
    """At every offset of a valid frame, the end of the last one included; and by a reset."""
    frame = framed(VICTIMS[role].good("cut"))
    rig.ears[role].heard()
    for cut in range(len(frame)):
        link, before = rig.link(role), rig.counted(role, "uplink_ended")
        link.say(frame[:cut])
        link.hang_up()
        rig.wait_for_end(role, link, "truncated", before)
    link, before = rig.link(role), rig.counted(role, "uplink_ended")
    link.say(frame[:30])
    link.reset()
    rig.wait_for_end(role, link, "reset", before)
    rig.deliver_good(role, "good")
    assert rig.ears[role].heard() == {"good"}


BODIES_OF_HELLO = {
    "nothing": "",
    "no MTU": "01 03 ff",
    "version 0": "00 03 ffff",
    "a role that nobody has": "01 09 ffff",
    "an MTU of 0": "01 03 0000",
    "half a field": "01 03 ffff 01 00",
    "half a name": "01 03 ffff 01 0005 6162",
    "a name that is no text": "01 03 ffff 01 0002 fffe",
    "a name of 64 bytes": "01 03 ffff 01 0040" + "61" * 64,
    "a prefix length of 33": "01 03 ffff 02 0005 21 c0a80001",
    "an address of two bytes": "01 03 ffff 02 0003 18 c0a8",
    "more than 1,024 bytes": "01 03 ffff 07 0400" + "00" * 1024,
}


@pytest.mark.proves("D22")
def test_rubbish_in_the_answer_to_hello_is_tried_again_until_it_is_sense(rig: Rig, role: Role) -> None:
    """Nothing of it is believed, and no packet that comes before the answer, either."""
    side, agent = rig.sides[role], rig.agents[role]
    rig.ears[role].heard()
    dropped = rig.counted(role, "dropped")
    for what, body in BODIES_OF_HELLO.items():
        before = rig.counted(role, "uplink_ended")
        side.greeting = framed(VICTIMS[role].good("early")) + framed(b"\0\1" + bytes.fromhex(body))
        rig.link(role).close()
        agent.wait_until(partial(_is_counted, rig, role, "bad_control", before, times=2), f"refused {what}")
    side.greeting = framed(VICTIMS[role].good("early")) + HELLO
    agent.wait_until(lambda: agent.status()["uplink"]["up"], "up again")
    side.greeting = HELLO
    rig.deliver_good(role, "good")
    assert rig.ears[role].heard() == {"good"}
    assert (rig.counted(role, "dropped") - dropped)["before_hello"] > 2 * len(BODIES_OF_HELLO)


def _is_counted(rig: Rig, role: Role, reason: str, before: Counter[str], times: int) -> bool:
    return (rig.counted(role, "uplink_ended") - before)[reason] >= times


@pytest.mark.proves("F46", "D21", "D24")
def test_a_million_hostile_packets_hold_up_nobody(rig: Rig, role: Role) -> None:
    """Each is counted; the agent answers others meanwhile, logs a line a second, and keeps nothing."""
    agent, link = rig.agents[role], rig.link(role)
    dropped, lines = rig.counted(role, "dropped"), len(agent.events("dropping"))
    block = framed(ipv4(VICTIMS[role].peer, "8.8.8.8", UDP, b"")) * 10_000

    def flood() -> None:
        for _ in range(100):
            link.say(block)

    flooding = threading.Thread(target=flood)
    began_s, answered = time.monotonic(), 0
    flooding.start()
    while flooding.is_alive():
        agent.status()
        answered += 1
        assert time.monotonic() - began_s < FAR_BEYOND_S
    rig.deliver_good(role, "good")
    assert answered >= 5
    assert rig.counted(role, "dropped") - dropped == {"wrong_dst": 1_000_000}
    assert len(agent.events("dropping")) - lines <= time.monotonic() - began_s + 1


# Words.

EVIL = "a\r\nb\n2026-01-01T00:00:00.000Z info enta ready\t\x1b[2J\x1b]0;x\x07\x00\x08\x7f\x9b31m\u202e\u2028é"


@pytest.mark.proves("D24", "F47")
@pytest.mark.parametrize("log_format", ["text", "json"])
def test_what_a_gateway_says_reaches_no_terminal_unescaped_and_what_it_carries_no_log(log_format: str) -> None:
    """Its name, its reasons to CLOSE and its ERROR are printable lines in log, status and last words; packets, none."""
    name = EVIL.encode()[:63]
    greeting = framed(b"\0\1\1\3\xff\xff\1\0" + bytes((len(name),)) + name)
    options = ("--log-level", "debug", "--log-format", log_format)
    with (
        Path(client=options) as path,
        AgentSide(path.hosts["near"], greeting=greeting) as gateway,
    ):
        agent = path.programs["app"]
        path.start("app")
        for kind, told in ((b"\0\4", "closed the link: a"), (b"\0\5", "refused the link: a")):
            assert comes_true(lambda: gateway.agent is not None and gateway.agent.is_greeted, FAR_BEYOND_S), "greeted"
            assert gateway.agent is not None
            gateway.agent.say(framed(VICTIMS["client"].good("secret")) + framed(kind + EVIL.encode()))
            assert comes_true(partial(is_told, agent, told), FAR_BEYOND_S), f"told that the gateway {told}"
            assert is_printable(status(agent))
            assert "u202e" in status(agent)
        assert agent.stop() == 0
        agent.argv += ["--once"]
        agent.start()
        agent.wait_for("ready")
        gateway.connections[-1].say(framed(b"\0\5" + EVIL.encode()))
        assert agent.process.wait(FAR_BEYOND_S) == 69
        for log in path.directory.glob("*.log"):
            text = log.read_text(encoding="utf-8")
            assert "u202e" in text
            assert is_printable(text)
            assert text.isascii()
            assert "canary" not in text
            # A line that it made up would stand alone.
            assert re.search(r"^2026-01-01T00:00:00.000Z", text, re.MULTILINE) is None


def status(agent: PathProgram) -> str:
    return agent.host.run(agent.argv[0], "status")


def is_told(agent: PathProgram, text: str) -> bool:
    return text in status(agent)


def is_printable(text: str) -> bool:
    return all(line.isprintable() for line in text.split("\n"))
