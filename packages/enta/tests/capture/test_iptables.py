"""The iptables backend on the real kernel: what becomes of packets, of strangers' rules, of its own after a crash."""

from __future__ import annotations

import os
import select
import shlex
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Interface, ip_address
from pathlib import Path

import pytest
from enlink.errors import SystemFailure, Unavailable
from enlink.testing.hosts import Host, Network
from enlink.testing.programs import as_nobody
from enta.capture import iptables, legacy
from enta.capture.ip_rules import ip_commands
from enta.capture.iptables import (
    IptablesFirewall,
    capture_rules,
    delete_leftovers,
    guard_rules,
    iptables_commands,
    leftovers,
)
from enta.capture.plan import CAPTURE_RULE_PRIORITY, Plan, parse_captures, parse_replays
from enta.tun import Tun, open_tun

SO_RCVBUFFORCE, SO_MARK = 33, 36  # asm-generic/socket.h
ETH_P_ALL = 3  # linux/if_ether.h
LIMIT_S = 8.0  # what is waited for takes milliseconds

CLIENT = Plan(
    "client",
    IPv4Interface("192.168.0.1/24"),
    IPv4Address("192.168.0.254"),
    captures=parse_captures(["7", "udp/53", "10.9.0.0/16:8080:6990", "8080:6991", "10.8.0.0/16:9090"]),
)
SERVER = Plan(
    "server",
    IPv4Interface("192.168.0.254/24"),
    IPv4Address("192.168.0.1"),
    replays=parse_replays(["7", "udp/53"]),
)


@dataclass(frozen=True)
class Packet:
    """What of a packet these tests look at."""

    destination: str
    protocol: int
    port: int
    payload: bytes


def parsed(packet: bytes) -> Packet:
    if packet[0] >> 4 == 4:
        header, protocol, destination = (packet[0] & 15) * 4, packet[9], packet[16:20]
    else:
        header, protocol, destination = 40, packet[6], packet[24:40]
    if protocol not in (socket.IPPROTO_TCP, socket.IPPROTO_UDP):
        return Packet(str(ip_address(destination)), protocol, 0, packet[header:])
    (port,) = struct.unpack_from("!2xH", packet, header)
    return Packet(str(ip_address(destination)), protocol, port, packet[header + 8 :])


class Scene:
    """A host under test with a TUN, and a neighbour to which its default routes lead and who sees what leaves."""

    def __init__(self, network: Network, plan: Plan) -> None:
        self.plan = plan
        self.host, self.neighbour = network.host("host"), network.host("neighbour")
        self.wire, far_end = network.connect(self.host, "10.0.0.1/24", self.neighbour, "10.0.0.2/24")
        for host, device, address in ((self.host, self.wire, "fd00::1/64"), (self.neighbour, far_end, "fd00::2/64")):
            host.run("ip", "address", "add", address, "dev", device, "nodad")
        self.host.run("ip", "route", "add", "default", "via", "10.0.0.2")
        self.host.run("ip", "-6", "route", "add", "default", "via", "fd00::2")
        self.firewall = IptablesFirewall(plan)
        with self.neighbour.entered():
            self._probe = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        self._probe.bind((far_end, ETH_P_ALL))
        self._probe.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 1 << 24)  # what overflows it is lost
        self._tun: Tun | None = None

    def close(self) -> None:
        self._probe.close()
        if self._tun is not None:
            self._tun.close()

    @property
    def tun(self) -> Tun:
        assert self._tun is not None
        return self._tun

    def open_tun(self) -> None:
        """Make the TUN, and send to it what is for the tunnel."""
        with self.host.entered():
            self._tun = open_tun(self.plan.tun_name)
        for command in ip_commands(self.plan):
            self.host.run(*command.split())

    def close_tun(self) -> None:
        """Take away the TUN and what else keeps packets for the tunnel at home."""
        self.tun.close()
        self.host.run("ip", "rule", "delete", "priority", str(CAPTURE_RULE_PRIORITY))

    def add(self) -> None:
        with self.host.entered():
            self.firewall.add_guard()
            self.firewall.add_capture()

    def socket(
        self,
        kind: socket.SocketKind,
        family: socket.AddressFamily = socket.AF_INET,
        *,
        host: Host | None = None,
    ) -> socket.socket:
        with (host or self.host).entered():
            return socket.socket(family, kind)

    def leaves(self, send: Callable[[], object], is_it: Callable[[Packet], bool], *, host: Host | None = None) -> bool:
        """Tell whether what *send* sends from a host reaches the neighbour before a last packet from there does."""
        with suppress(OSError):
            send()
        token = os.urandom(16)
        with self.socket(socket.SOCK_DGRAM, host=host) as last:
            last.sendto(token, ("10.0.0.2", 9))
        seen = False
        self._probe.settimeout(LIMIT_S)
        while True:
            frame = self._probe.recv(65536)
            if frame[12:14] in (b"\x08\x00", b"\x86\xdd"):
                packet = parsed(frame[14:])
                if packet.payload.endswith(token):
                    return seen
                seen = seen or is_it(packet)

    def datagram_leaves(self, address: str, port: int, *, mark: int = 0, host: Host | None = None) -> bool:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with self.socket(socket.SOCK_DGRAM, family, host=host) as canary:
            canary.setsockopt(socket.SOL_SOCKET, SO_MARK, mark)
            payload = os.urandom(16)
            return self.leaves(
                lambda: canary.sendto(payload, (address, port)), lambda p: payload in p.payload, host=host
            )

    def connection_leaves(self, address: str, port: int, *, mark: int = 0) -> bool:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with self.socket(socket.SOCK_STREAM, family) as canary:
            canary.setsockopt(socket.SOL_SOCKET, SO_MARK, mark)
            canary.setblocking(False)
            return self.leaves(
                lambda: canary.connect_ex((address, port)),
                lambda p: (p.destination, p.protocol, p.port) == (address, socket.IPPROTO_TCP, port),
            )

    def packet_in_tun(self) -> Packet | None:
        """Return the next packet that the kernel gives to the TUN, None when there is none at once."""
        if select.select([self.tun], [], [], 0)[0]:
            return parsed(os.read(self.tun.fileno(), 65536))
        return None


@contextmanager
def scene(plan: Plan, *, has_tun: bool = True, has_rules: bool = True) -> Iterator[Scene]:
    with Network() as network, ExitStack() as stack:
        made = Scene(network, plan)
        stack.callback(made.close)
        if has_rules:
            made.add()
        if has_tun:
            made.open_tun()
        yield made


@pytest.fixture(scope="module")
def tunnelled() -> Iterator[Scene]:
    """A client as it is in service."""
    with scene(CLIENT) as made:
        yield made


@pytest.fixture(scope="module")
def crashed() -> Iterator[Scene]:
    """A client whose TUN and policy rules are gone, and whose iptables rules are not."""
    with scene(CLIENT, has_tun=False) as made:
        yield made


@pytest.fixture(scope="module")
def unguarded() -> Iterator[Scene]:
    """The control: the same host with no rules at all."""
    with scene(CLIENT, has_tun=False, has_rules=False) as made:
        yield made


@pytest.mark.parametrize(
    ("kind", "address", "port", "transit"),
    [
        (socket.SOCK_STREAM, "1.1.1.1", 7, 6978),
        (socket.SOCK_DGRAM, "1.1.1.1", 53, 6979),
        (socket.SOCK_STREAM, "10.9.1.2", 8080, 6990),
        (socket.SOCK_STREAM, "10.8.1.2", 8080, 6991),
        (socket.SOCK_STREAM, "10.8.1.2", 9090, 6980),
    ],
)
def test_captured_packets_enter_the_tunnel_for_the_peer_and_their_transit_port(
    tunnelled: Scene, kind: socket.SocketKind, address: str, port: int, transit: int
) -> None:
    with tunnelled.socket(kind) as program:
        program.setblocking(False)
        program.connect_ex((address, port))
        if kind == socket.SOCK_DGRAM:
            program.send(b"query")
        packet = tunnelled.packet_in_tun()
    assert packet is not None
    assert (packet.destination, packet.port) == ("192.168.0.254", transit)


@pytest.mark.parametrize(
    ("address", "port", "mark"), [("1.1.1.1", 7, CLIENT.mark), ("1.1.1.1", 8, 0), ("1.1.1.1", 9090, 0)]
)
def test_what_is_not_captured_leaves_as_it_is(tunnelled: Scene, address: str, port: int, mark: int) -> None:
    """The agent's own uplink, another port, and a captured port of another network."""
    assert tunnelled.connection_leaves(address, port, mark=mark)
    assert tunnelled.packet_in_tun() is None


def test_the_hosts_own_addresses_are_neither_captured_nor_guarded(tunnelled: Scene) -> None:
    for address in ("127.0.0.1", "10.0.0.1", "192.168.0.1"):
        with tunnelled.socket(socket.SOCK_STREAM) as listener, tunnelled.socket(socket.SOCK_STREAM) as program:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((address, 7))
            listener.listen()
            program.settimeout(LIMIT_S)
            program.connect((address, 7))
            assert program.getpeername() == (address, 7)
    with tunnelled.socket(socket.SOCK_STREAM, socket.AF_INET6) as listener:
        listener.bind(("::1", 7))
        listener.listen()
        with tunnelled.socket(socket.SOCK_STREAM, socket.AF_INET6) as program:
            program.settimeout(LIMIT_S)
            program.connect(("::1", 7))


@pytest.mark.proves("D16")
@pytest.mark.parametrize(
    ("kind", "address", "port"),
    [
        ("tcp", "1.1.1.1", 7),
        ("udp", "1.1.1.1", 53),
        ("tcp", "10.9.1.2", 8080),
        ("tcp", "10.8.1.2", 9090),
        ("udp", "192.168.0.254", 1234),
        ("tcp", "192.168.0.254", 6978),
        ("tcp", "fd99::1", 7),
        ("udp", "fd99::1", 53),
    ],
)
def test_nothing_for_the_tunnel_leaves_another_way(
    crashed: Scene, unguarded: Scene, kind: str, address: str, port: int
) -> None:
    """The probe sees each of these packets where there is no guard."""
    leaves = {"tcp": Scene.connection_leaves, "udp": Scene.datagram_leaves}[kind]
    assert leaves(unguarded, address, port)
    assert not leaves(crashed, address, port)


@pytest.mark.parametrize(
    ("kind", "address", "port", "mark"),
    [
        ("tcp", "1.1.1.1", 7, CLIENT.mark),
        ("tcp", "1.1.1.1", 8, 0),
        ("udp", "1.1.1.1", 7, 0),
        ("tcp", "1.1.1.1", 9090, 0),
        ("tcp", "1.1.1.1", 6978, 0),
        ("tcp", "fd99::1", 9090, 0),
        ("tcp", "fd99::1", 7, CLIENT.mark),
    ],
)
def test_the_guard_lets_pass_what_is_not_for_the_tunnel(
    crashed: Scene, kind: str, address: str, port: int, mark: int
) -> None:
    """The uplink, other ports and protocols, captured ports of other networks, strangers' use of a transit port."""
    leaves = {"tcp": Scene.connection_leaves, "udp": Scene.datagram_leaves}[kind]
    assert leaves(crashed, address, port, mark=mark)


def test_ipv6_to_a_captured_port_is_refused_at_once(crashed: Scene) -> None:
    """A program that tries IPv6 first goes on to IPv4 instead of waiting for minutes."""
    with crashed.socket(socket.SOCK_STREAM, socket.AF_INET6) as program:
        program.settimeout(LIMIT_S)
        with pytest.raises(ConnectionRefusedError):
            program.connect(("fd99::1", 7))
    with crashed.socket(socket.SOCK_DGRAM, socket.AF_INET6) as program:
        program.connect(("fd99::1", 53))
        with pytest.raises(PermissionError):
            program.send(b"query")


def test_the_refusal_of_ipv6_stays_on_this_host_when_the_source_address_has_left_it() -> None:
    """It quotes what the program sent."""
    with scene(CLIENT, has_tun=False) as made, made.socket(socket.SOCK_DGRAM, socket.AF_INET6) as canary:
        made.host.run("ip", "address", "add", "fd77::1/128", "dev", "lo")
        canary.bind(("fd77::1", 0))
        made.host.run("ip", "address", "delete", "fd77::1/128", "dev", "lo")

        def is_quoted() -> bool:
            return made.leaves(lambda: canary.sendto(b"canary", ("fd99::1", 53)), lambda p: b"canary" in p.payload)

        assert not is_quoted()
        drop = "eng_default_guard -p udp -m udp --dport 53 -m addrtype ! --src-type LOCAL -j DROP"
        made.host.run("ip6tables-legacy", "-D", *drop.split())
        assert is_quoted()


def test_a_local_server_answers_a_client_whose_port_is_captured(crashed: Scene) -> None:
    for family, address in ((socket.AF_INET, "10.0.0.1"), (socket.AF_INET6, "fd00::1")):
        with crashed.socket(socket.SOCK_STREAM, family) as server, crashed.neighbour.entered():
            server.bind(("", 4321))
            server.listen()
            with socket.socket(family, socket.SOCK_STREAM) as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                client.bind(("", 7))
                client.settimeout(LIMIT_S)
                client.connect((address, 4321))


def test_packets_that_the_host_forwards_for_others_are_not_guarded(crashed: Scene) -> None:
    crashed.host.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
    with Network() as network:
        behind = network.host("behind")
        network.connect(behind, "10.1.0.2/24", crashed.host, "10.1.0.1/24")
        behind.run("ip", "route", "add", "default", "via", "10.1.0.1")
        for address in ("1.1.1.1", "192.168.0.254"):
            assert crashed.datagram_leaves(address, 53, host=behind)


def test_a_captured_packet_that_the_dnat_routes_elsewhere_is_dropped() -> None:
    """Nothing shows it before: the packet is for another address until then, and leaves by the TUN."""

    def is_it(packet: Packet) -> bool:
        return (packet.destination, packet.port) == ("192.168.0.254", 6978)

    with scene(CLIENT) as made:
        way = ["192.168.0.254/32", "via", "10.0.0.2", "dev", made.wire, "table", str(CLIENT.table)]
        made.host.run("ip", "route", "add", *way)

        def connect() -> None:
            with made.socket(socket.SOCK_STREAM) as program:
                program.setblocking(False)
                program.connect_ex(("1.1.1.1", 7))

        assert not made.leaves(connect, is_it)
        with made.host.entered():
            made.firewall.delete_guard()
        assert made.leaves(connect, is_it)


@pytest.mark.proves("D16")
def test_a_servers_answer_does_not_leave_elsewhere_when_the_tun_is_gone() -> None:
    with scene(SERVER) as made, made.socket(socket.SOCK_DGRAM) as server:
        server.bind(("", 53))
        server.settimeout(LIMIT_S)
        made.tun.write_packet(udp_packet("192.168.0.1", "192.168.0.254", 6979, b"query"))
        assert server.recvfrom(100) == (b"query", ("192.168.0.1", 40000))
        made.close_tun()

        def answer() -> None:
            server.sendto(b"answer", ("192.168.0.1", 40000))

        assert not made.leaves(answer, lambda packet: packet.payload == b"answer")
        with made.host.entered():
            made.firewall.delete_guard()
        assert made.leaves(answer, lambda packet: packet.payload == b"answer")


def udp_packet(source: str, destination: str, port: int, payload: bytes) -> bytes:
    """Return an IPv4 packet from port 40000; its checksums are right, or absent where UDP allows that."""
    addresses = socket.inet_aton(source) + socket.inet_aton(destination)
    header = struct.pack("!BBHHHBBH", 0x45, 0, 28 + len(payload), 0, 0, 64, socket.IPPROTO_UDP, 0) + addresses
    total = sum(struct.unpack("!10H", header))
    total = (total & 0xFFFF) + (total >> 16)
    checksum = struct.pack("!H", ~(total + (total >> 16)) & 0xFFFF)
    return header[:10] + checksum + header[12:] + struct.pack("!HHHH", 40000, port, 8 + len(payload), 0) + payload


@pytest.fixture(scope="module")
def serving() -> Iterator[Scene]:
    """A server as it is in service."""
    with scene(SERVER) as made:
        made.host.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
        yield made


@pytest.fixture(scope="module")
def trusting() -> Iterator[Scene]:
    """The control: the same host with the same TUN, and no rules."""
    with scene(SERVER, has_rules=False) as made:
        made.host.run("sysctl", "-qw", "net.ipv4.ip_forward=1", f"net.ipv4.conf.{SERVER.tun_name}.rp_filter=0")
        yield made


def arrivals(made: Scene, send: Callable[[], object]) -> set[bytes]:
    """Return what the servers of the host have received when the first of it is there."""
    with ExitStack() as stack:
        servers = [stack.enter_context(made.socket(socket.SOCK_DGRAM)) for _ in range(3)]
        for server, port in zip(servers, (53, 6979, 4444), strict=True):
            server.bind(("", port))
        send()
        return {server.recv(100) for server in select.select(servers, [], [], LIMIT_S)[0]}


@pytest.mark.proves("D14")
@pytest.mark.parametrize(
    ("source", "destination", "port"),
    [("8.8.8.8", "192.168.0.254", 6979), ("192.168.0.1", "10.0.0.1", 6979), ("192.168.0.1", "192.168.0.254", 4444)],
    ids=["a source outside the tunnel", "another address of the host", "a port that is not replayed"],
)
def test_the_tunnels_packets_reach_the_replayed_ports_only(
    serving: Scene, trusting: Scene, source: str, destination: str, port: int
) -> None:
    """Whatever the agent's own filter lets through."""

    def write(made: Scene) -> None:
        made.tun.write_packet(udp_packet(source, destination, port, b"stray"))
        made.tun.write_packet(udp_packet("192.168.0.1", "192.168.0.254", 6979, b"query"))

    assert b"stray" in arrivals(trusting, lambda: write(trusting))
    assert arrivals(serving, lambda: write(serving)) == {b"query"}


@pytest.mark.proves("D15")
def test_packets_for_the_tunnels_address_that_arrive_elsewhere_are_dropped(serving: Scene, trusting: Scene) -> None:
    def send(made: Scene) -> None:
        with made.socket(socket.SOCK_DGRAM, host=made.neighbour) as stranger:
            stranger.sendto(b"stray", ("192.168.0.254", 4444))
            stranger.sendto(b"query", ("10.0.0.1", 53))

    for made in (serving, trusting):
        made.neighbour.run("ip", "route", "replace", "192.168.0.0/24", "via", "10.0.0.1")
    assert b"stray" in arrivals(trusting, lambda: send(trusting))
    assert arrivals(serving, lambda: send(serving)) == {b"query"}


@pytest.mark.proves("D14")
def test_strangers_packets_are_not_forwarded_into_the_tunnel(serving: Scene, trusting: Scene) -> None:
    def forwarded(made: Scene) -> Packet | None:
        made.neighbour.run("ip", "route", "replace", "192.168.0.0/24", "via", "10.0.0.1")
        with made.socket(socket.SOCK_DGRAM, host=made.neighbour) as stranger:
            stranger.sendto(b"stray", ("192.168.0.1", 4444))
            assert arrivals(made, lambda: stranger.sendto(b"query", ("10.0.0.1", 53))) == {b"query"}
        return made.packet_in_tun()

    assert forwarded(trusting) == Packet("192.168.0.1", socket.IPPROTO_UDP, 4444, b"stray")
    assert forwarded(serving) is None


@pytest.fixture
def tunnel() -> Iterator[tuple[Scene, Scene]]:
    """A client and a server, whose TUNs a thread joins."""
    with scene(CLIENT) as client, scene(SERVER) as server, ExitStack() as stack:
        stopping, stop = os.pipe()
        other_end = {client.tun.fileno(): server.tun, server.tun.fileno(): client.tun}

        def carry() -> None:
            while stopping not in (ready := select.select([stopping, *other_end], [], [])[0]):
                for descriptor in ready:
                    other_end[descriptor].write_packet(os.read(descriptor, 65536))

        thread = threading.Thread(target=carry)
        thread.start()
        stack.callback(os.close, stopping)
        stack.callback(thread.join)
        stack.callback(os.close, stop)
        yield client, server


def test_a_captured_connection_ends_at_the_servers_own_port(tunnel: tuple[Scene, Scene]) -> None:
    client, server = tunnel
    with server.socket(socket.SOCK_STREAM) as listener, client.socket(socket.SOCK_STREAM) as program:
        listener.bind(("", 7))
        listener.listen()
        listener.settimeout(LIMIT_S)
        program.settimeout(LIMIT_S)
        program.connect(("1.1.1.1", 7))
        accepted, (address, _) = listener.accept()
        with accepted:
            program.sendall(bytes(1_000_000))
            program.shutdown(socket.SHUT_WR)
            received = sum(iter(lambda: len(accepted.recv(1 << 20)), 0))
    assert (address, received) == ("192.168.0.1", 1_000_000)


def test_a_captured_query_is_answered(tunnel: tuple[Scene, Scene]) -> None:
    client, server = tunnel
    with server.socket(socket.SOCK_DGRAM) as listener, client.socket(socket.SOCK_DGRAM) as program:
        listener.bind(("", 53))
        listener.settimeout(LIMIT_S)
        program.settimeout(LIMIT_S)
        program.sendto(b"query", ("1.1.1.1", 53))
        query, address = listener.recvfrom(100)
        listener.sendto(query + b" answered", address)
        assert program.recvfrom(100) == (b"query answered", ("1.1.1.1", 53))


# What a firewall of somebody else may look like, in the chains that we use and with matches that we do not read.
FOREIGN_RULES = """
*mangle
:theirs - [0:0]
-A PREROUTING -i lo -m u32 --u32 "0x0=0x45" -j MARK --set-xmark 0x1/0x1
-A OUTPUT -p tcp -m string --string "canary" --algo bm --to 65535 -j theirs
-A OUTPUT -p udp -m comment --comment "it's theirs" -j theirs
-A OUTPUT -p icmp
-A OUTPUT -p gre -g theirs
-A POSTROUTING -o nothing+ -p tcp -m tcp --tcp-flags SYN,RST SYN -j TCPMSS --clamp-mss-to-pmtu
-A theirs -m hashlimit --hashlimit-upto 5/sec --hashlimit-name theirs -j RETURN
-A theirs -j DROP
COMMIT
*nat
:theirs - [0:0]
-A PREROUTING -d 203.0.113.9/32 -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.0.0.9:8080
-A OUTPUT -m addrtype --dst-type LOCAL -j theirs
-A POSTROUTING -s 10.7.0.0/16 -j MASQUERADE
COMMIT
*filter
:INPUT DROP [0:0]
-A INPUT -i lo -j ACCEPT
-A OUTPUT -m owner --uid-owner 12345 -j REJECT --reject-with icmp-port-unreachable
COMMIT
"""
FOREIGN_RULES6 = """
*filter
:FORWARD DROP [0:0]
-A OUTPUT -p ipv6-icmp -j ACCEPT
COMMIT
"""


@pytest.mark.proves("D29", "G7")
@pytest.mark.parametrize("cycles", [3, pytest.param(100, marks=[pytest.mark.soak, pytest.mark.timeout(600)])])
def test_strangers_rules_are_byte_identical_afterwards(cycles: int) -> None:
    with Network() as network:
        host = network.host("host")
        host.run("iptables-legacy-restore", input=FOREIGN_RULES)
        host.run("ip6tables-legacy-restore", input=FOREIGN_RULES6)
        before = [saved(host, "iptables"), saved(host, "ip6tables")]
        with host.entered():
            for _ in range(cycles):
                firewall = IptablesFirewall(CLIENT)
                firewall.add_guard()
                firewall.add_capture()
                during = "\n".join([saved(host, "iptables"), saved(host, "ip6tables")])
                assert all(line in during for table in before for line in table.splitlines())
                firewall.delete_capture()
                firewall.delete_guard()
        assert [saved(host, "iptables"), saved(host, "ip6tables")] == before


def saved(host: Host, program: str) -> str:
    """Return the legacy rules of a host without counters and remarks."""
    lines = host.run(f"{program}-legacy-save").splitlines()
    return "\n".join(line.partition(" [")[0] for line in lines if not line.startswith("#"))


@pytest.mark.parametrize(
    "plan",
    [
        CLIENT,
        SERVER,
        replace(CLIENT, is_fail_closed=False),
        replace(CLIENT, captures=CLIENT.captures[:1], instance="other-one", tun_name="tun_7", mark=1, table=99),
    ],
    ids=["client", "server", "open", "other names"],
)
def test_the_commands_of_the_dry_run_make_the_same_rules(plan: Plan) -> None:
    with Network() as network:
        by_hand, by_library = network.host("hand"), network.host("library")
        for command in iptables_commands(plan):
            by_hand.run(*shlex.split(command))
        with by_library.entered():
            firewall = IptablesFirewall(plan)
            firewall.add_guard()
            firewall.add_capture()
        for program in ("iptables", "ip6tables"):
            assert saved(by_library, program) == saved(by_hand, program)
            assert "eng_" in saved(by_library, program) or program == "ip6tables"


def test_no_table_is_brought_into_being_that_has_no_rule_of_ours() -> None:
    with Network() as network:
        host = network.host("host")
        with host.entered():
            assert leftovers() == []
            IptablesFirewall(CLIENT).delete_guard()
            assert legacy.used_tables() == []
            firewall = IptablesFirewall(CLIENT)
            firewall.add_guard()
            firewall.add_capture()
            assert sorted(legacy.used_tables()) == ["ip mangle", "ip nat", "ip6 filter"]


@pytest.fixture
def host() -> Iterator[Host]:
    """A host, entered."""
    with Network() as network:
        made = network.host("host")
        with made.entered():
            yield made


@pytest.fixture
def firewall(host: Host) -> IptablesFirewall:
    """The rules of a client on *host*."""
    made = IptablesFirewall(CLIENT)
    made.add_guard()
    made.add_capture()
    return made


@pytest.mark.proves("F64")
@pytest.mark.parametrize(
    ("command", "missing"),
    [
        ("iptables-legacy -t mangle -F", ["guard", "capture"]),
        ("iptables-legacy -t nat -F", ["capture"]),
        ("iptables-legacy -t mangle -F OUTPUT", ["guard"]),
        ("iptables-legacy -t mangle -D eng_default_guard 1", ["guard"]),
        ("iptables-legacy -t mangle -I eng_default_guard -j RETURN", ["guard"]),
        ("ip6tables-legacy -F", ["guard"]),
        ("iptables-legacy -t nat -I OUTPUT -j eng_default", ["capture"]),
    ],
)
def test_what_somebody_removes_or_alters_is_named_and_restored(
    host: Host, firewall: IptablesFirewall, command: str, missing: list[str]
) -> None:
    before = [saved(host, "iptables"), saved(host, "ip6tables")]
    assert firewall.missing() == []
    host.run(*command.split())
    assert firewall.missing() == missing
    firewall.add_guard()
    firewall.add_capture()
    assert firewall.missing() == []
    assert [saved(host, "iptables"), saved(host, "ip6tables")] == before


def test_looking_for_what_is_missing_starts_no_process_unless_somebody_changed_a_table(
    host: Host, firewall: IptablesFirewall, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.run("iptables-legacy", "-t", "mangle", "-A", "OUTPUT", "-j", "ACCEPT")
    assert firewall.missing() == []
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert firewall.missing() == []
    firewall.close()
    host.run("iptables-legacy", "-t", "mangle", "-A", "OUTPUT", "-j", "ACCEPT")
    with pytest.raises(OSError, match="/nowhere/python"):
        firewall.missing()


def test_nothing_is_missing_that_was_not_added_or_was_deleted(host: Host) -> None:
    firewall = IptablesFirewall(CLIENT)
    assert firewall.missing() == []
    firewall.add_guard()
    firewall.add_capture()
    firewall.delete_capture()
    firewall.delete_guard()
    firewall.delete_guard()
    assert firewall.missing() == []
    assert "eng_" not in saved(host, "iptables") + saved(host, "ip6tables")


def test_the_next_start_replaces_what_a_crash_left(host: Host, firewall: IptablesFirewall) -> None:
    """Whatever its options are now; and an agent that fails open leaves no guard behind."""
    changed = replace(CLIENT, captures=parse_captures(["10.9.0.0/16:9"]), tun_name="other")
    for plan in (changed, replace(changed, is_fail_closed=False)):
        after_crash = IptablesFirewall(plan)
        after_crash.add_guard()
        after_crash.add_capture()
        rules = saved(host, "iptables") + saved(host, "ip6tables")
        assert "eng0" not in rules
        assert ("eng_default_guard" in rules) is plan.is_fail_closed
        assert after_crash.missing() == []


@pytest.mark.proves("D16")
def test_the_guard_is_replaced_without_a_gap() -> None:
    """Canaries run against it all the while. They do leave between a deletion and an addition, which is the control."""
    with scene(CLIENT, has_tun=False) as made:
        assert not leaks_during(made, made.firewall.add_guard)

        def replace_badly() -> None:
            made.firewall.delete_guard()
            made.firewall.add_guard()

        assert leaks_during(made, replace_badly)


def leaks_during(made: Scene, change: Callable[[], None]) -> bool:
    """Tell whether any of the packets leaves that are sent for as long as *change* goes on."""
    is_done = threading.Event()

    def send() -> None:
        with made.socket(socket.SOCK_DGRAM) as canary:
            while not is_done.wait(0.0005):
                with suppress(OSError):
                    canary.sendto(b"leak", ("1.1.1.1", 53))

    thread = threading.Thread(target=send)
    thread.start()
    try:
        with made.host.entered():
            change()
    finally:
        is_done.set()
        thread.join()
    return made.leaves(lambda: None, lambda packet: packet.payload == b"leak")


def test_what_a_crash_leaves_of_the_capture_rules_does_nothing_without_the_tun() -> None:
    """So an agent that fails open does: its programs go out as if it had never been there."""
    with scene(replace(CLIENT, is_fail_closed=False), has_tun=False) as made:
        assert made.connection_leaves("1.1.1.1", 7)
        assert made.datagram_leaves("1.1.1.1", 53)


@pytest.mark.proves("D30")
def test_clean_up_removes_one_instance_and_may_be_repeated(host: Host, firewall: IptablesFirewall) -> None:
    other = replace(CLIENT, instance="other", tun_name="eng1", table=7000, mark=0x7000)
    IptablesFirewall(other).add_guard()
    host.run("iptables-legacy", "-t", "nat", "-N", "eng_theirs")  # looks like one of ours, and says nothing of itself
    assert leftovers() == [CLIENT.identity, other.identity]
    for _ in range(2):
        delete_leftovers(CLIENT.identity)
        assert leftovers() == [other.identity]
    assert IptablesFirewall(other).missing() == []
    delete_leftovers(other.identity)
    rules = saved(host, "iptables") + saved(host, "ip6tables")
    assert [line for line in rules.splitlines() if "eng" in line] == [":eng_theirs -"]


def test_a_kernel_without_ipv6_gets_the_rest(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iptables, "has_ipv6", lambda: False)
    firewall = IptablesFirewall(CLIENT)
    firewall.add_guard()
    assert firewall.missing() == []
    assert legacy.used_tables() == ["ip mangle"]


def test_the_rules_of_a_client_that_captures_by_network_only_leave_ipv6_alone() -> None:
    plan = replace(CLIENT, captures=parse_captures(["10.0.0.0/8:7"]))
    assert list(guard_rules(plan)) == ["ip mangle"]
    assert list(capture_rules(plan)) == ["ip mangle", "ip nat"]


def test_this_process_never_loads_python_iptables(firewall: IptablesFirewall) -> None:
    assert firewall.missing() == []
    assert "iptc" not in sys.modules


def test_no_compiler_is_started(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library would run them at import to find other libraries."""
    for name in ("gcc", "cc", "ld", "objdump"):
        (tmp_path / name).write_text(f"#!/bin/sh\ntouch {tmp_path}/ran-{name}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    environment = {**os.environ, "PYTHONPATH": ""}
    subprocess.run([sys.executable, "-c", "import iptc"], env=environment, check=True)
    assert list(tmp_path.glob("ran-*"))  # the control
    for path in tmp_path.glob("ran-*"):
        path.unlink()
    IptablesFirewall(CLIENT).add_guard()
    assert not list(tmp_path.glob("ran-*"))


def without_privilege(*under: str) -> tuple[str, str]:
    """Add a guard in a process with fewer privileges; return the class and the text of its error."""
    program = (
        "from enta.capture.iptables import IptablesFirewall\n"
        "from enta.capture.plan import *\n"
        "from ipaddress import *\n"
        "plan = Plan('client', IPv4Interface('192.168.0.1/24'), IPv4Address('192.168.0.254'), parse_captures(['7']))\n"
        "try: IptablesFirewall(plan).add_guard()\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    done = subprocess.run([*under, sys.executable, "-c", program], capture_output=True, text=True, check=True)
    kind, _, text = done.stdout.strip().partition(" ")
    assert "\n" not in text
    return kind, text


@pytest.mark.parametrize("capability", ["net_admin", "net_raw"])
def test_a_missing_capability_is_named(host: Host, capability: str) -> None:
    kind, text = without_privilege("setpriv", f"--bounding-set=-{capability}", f"--inh-caps=-{capability}")
    assert kind == "NotPermitted"
    assert "CAP_NET_ADMIN and CAP_NET_RAW" in text


def test_a_user_who_may_not_see_the_tables_is_told_to_be_root(host: Host) -> None:
    kind, text = without_privilege(*as_nobody())
    assert kind == "NotPermitted"
    assert text.endswith("run as root")


def test_an_error_of_the_process_is_raised_here(firewall: IptablesFirewall, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iptables, "capture_rules", lambda _: {"ip nat": {"OUTPUT": [["-j", "no_such_chain"]]}})
    with pytest.raises(Unavailable, match="this host lacks an extension"):
        firewall.add_capture()


def test_rules_that_come_back_altered_are_an_error(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a rule which the library writes wrongly never passes for the one that was meant."""
    wide = {"ip mangle": {"eng_default": [["-d", "10.9.8.7/8", "-j", "DROP"]]}}
    monkeypatch.setattr(iptables, "capture_rules", lambda _: wide)
    with pytest.raises(SystemFailure, match="altered the capture rules of instance default"):
        IptablesFirewall(CLIENT).add_capture()


def as_interpreter(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_a_process_that_dies_or_hangs_is_an_error_of_one_line(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        sys, "executable", as_interpreter(tmp_path / "dies", "echo first >&2; echo last >&2; kill -SEGV $$")
    )
    with pytest.raises(SystemFailure, match=r"ended with status -11: last$"):
        IptablesFirewall(CLIENT).add_guard()
    monkeypatch.setattr(sys, "executable", as_interpreter(tmp_path / "hangs", "exec tail -f /dev/null"))
    monkeypatch.setattr(iptables, "_PROCESS_LIMIT_S", 0.1)
    with pytest.raises(SystemFailure, match="did not end within"):
        IptablesFirewall(CLIENT).add_guard()
