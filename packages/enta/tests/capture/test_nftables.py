"""The guard and the capture rules, by what they do to packets of a real kernel; every absence has its control."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from typing import Any, Literal

import pytest
from enlink.errors import CannotCreate, NotPermitted
from enlink.testing.hosts import Host, Network
from enlink.testing.probe import Packet, Site, Wire, parse_packet, send
from enta.capture.libnftables import NftFailure
from enta.capture.nftables import (
    NftablesFirewall,
    capture_ruleset,
    delete_guard_named,
    guard_ruleset,
    leftover_guards,
    living_agents,
)
from enta.capture.plan import Plan, parse_captures, parse_replays
from enta.capture.routing import Routing
from enta.tun import Tun
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ELSEWHERE, ELSEWHERE_6 = "1.1.1.1", "2001:db8::1"  # no host of these tests has them
FAR_BEYOND_S = 20.0
IP_TRANSPARENT = 19  # linux/in.h
Carry = Callable[[Tun, Tun], AbstractContextManager[None]]

CLIENT = Plan(
    "client",
    IPv4Interface("192.168.0.1/24"),
    IPv4Address("192.168.0.254"),
    parse_captures(["7", "udp/7", "10.1.0.0/16:8080"]),
)
SERVER = Plan(
    "server",
    IPv4Interface("192.168.0.254/24"),
    IPv4Address("192.168.0.1"),
    replays=parse_replays(["5000", "udp/5000"]),
)


@contextmanager
def firewall_of(host: Host, plan: Plan) -> Iterator[NftablesFirewall]:
    with host.entered():
        firewall = NftablesFirewall(plan)
    with closing(firewall):
        yield firewall


def seen(wire: Wire) -> set[str]:
    return {f"{packet.protocol} {packet.destination}:{packet.port}" for packet in wire.packets()}


# ---- the text


def test_the_guard_reads_as_what_it_keeps_off_the_wire() -> None:
    assert guard_ruleset(CLIENT) == (
        "table inet eng_default {\n"
        "    flags owner;\n"
        '    comment "eng agent: instance=default tun=eng0 table=6978 mark=0x6978"\n'
        "}\n"
        "table inet eng_default_guard {\n"
        '    comment "eng guard: instance=default tun=eng0 table=6978 mark=0x6978"\n'
        "}\n"
        "delete table inet eng_default_guard\n"
        "table inet eng_default_guard {\n"
        '    comment "eng guard: instance=default tun=eng0 table=6978 mark=0x6978"\n'
        "    chain refuse {\n"
        "        tcp flags & (syn | ack) == syn fib saddr type local reject with tcp reset\n"
        "        drop\n"
        "    }\n"
        "    chain outgoing {\n"
        "        type filter hook output priority -150; policy accept;\n"
        '        oifname "eng0" accept\n'
        "        meta mark 0x6978 accept\n"
        "        ct direction reply accept\n"
        "        fib daddr type local accept\n"
        "        ip daddr 10.1.0.0/16 tcp dport 8080 goto refuse\n"
        "        tcp dport 7 goto refuse\n"
        "        udp dport 7 goto refuse\n"
        "    }\n"
        "    chain leaving {\n"
        "        type filter hook postrouting priority 300; policy accept;\n"
        '        iif 0 oifname != { "lo", "eng0" } ip daddr 192.168.0.0/24 drop\n'
        "    }\n"
        "    chain tracking {\n"
        "        type filter hook prerouting priority -150; policy accept;\n"
        "        ct state established accept\n"
        "    }\n"
        "}\n"
    )


def test_a_plan_that_fails_open_claims_its_instance_and_removes_an_older_guard() -> None:
    text = guard_ruleset(replace(CLIENT, is_fail_closed=False))
    assert "flags owner" in text
    assert text.endswith("delete table inet eng_default_guard\n")


def test_a_server_needs_no_chain_for_captured_ports() -> None:
    assert "hook output" not in guard_ruleset(SERVER)
    assert "hook postrouting" in guard_ruleset(SERVER)


def test_the_server_replays_only_what_comes_out_of_the_tunnel() -> None:
    text = capture_ruleset(SERVER)
    assert 'iifname "eng0" meta nfproto ipv4 tcp dport 6978 redirect to :5000' in text
    assert 'iifname "eng0" meta nfproto ipv4 udp dport 6979 redirect to :5000' in text


@pytest.fixture(scope="module")
def bare_host() -> Iterator[Host]:
    with Network() as network:
        yield network.host("bare")


destinations = st.none() | st.sampled_from(["10.0.0.0/8", "10.1.0.0/16", "10.1.2.3/32", "0.0.0.0/0"]).map(IPv4Network)
ports = st.integers(1, 65535)
names = st.text("abcdefghijklmnopqrstuvwxyz0123456789_-", min_size=1, max_size=15)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    role: Literal["client", "server"] = draw(st.sampled_from(["client", "server"]))
    options = [
        f"{protocol}/{f'{destination}:' if destination and role == 'client' else ''}{port}"
        for protocol, port, destination in draw(
            st.lists(
                st.tuples(st.sampled_from(["tcp", "udp"]), ports, destinations), max_size=8, unique_by=lambda t: t[:2]
            )
        )
    ]
    address, peer = draw(st.permutations(["10.9.8.1", "10.9.8.2"]))
    return Plan(
        role,
        IPv4Interface(f"{address}/{draw(st.integers(8, 30))}"),
        IPv4Address(peer),
        captures=parse_captures(options) if role == "client" else (),
        replays=parse_replays(options) if role == "server" else (),
        instance=draw(names.filter(lambda name: not name.endswith("_guard"))),
        tun_name=draw(names.filter(lambda name: not name.startswith("-") and name not in {"all", "default", "lo"})),
        table=draw(st.integers(1, 252)),
        mark=draw(st.integers(1, 2**32 - 1)),
        is_fail_closed=draw(st.booleans()),
    )


@given(plan=plans())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_kernel_takes_every_plan_and_afterwards_holds_nothing(bare_host: Host, plan: Plan) -> None:
    with firewall_of(bare_host, plan) as firewall:
        for _ in range(2):
            firewall.add_guard()
            firewall.add_capture()
            assert firewall.missing() == []
        with bare_host.entered():
            assert living_agents() == [plan.identity]
        firewall.delete_capture()
        firewall.delete_guard()
    assert bare_host.run("nft", "list", "ruleset") == ""


# ---- the guard


ATTEMPTS: list[tuple[str, dict[str, Any]]] = [
    ("tcp 1.1.1.1:7", {}),
    ("udp 1.1.1.1:7", {}),
    ("tcp 2001:db8::1:7", {}),
    ("udp 2001:db8::1:7", {}),
    ("tcp 10.1.2.3:8080", {}),
    ("tcp 1.1.1.1:7", {"source": ("10.0.0.2", 0)}),
    ("udp 1.1.1.1:7", {"source": ("10.0.0.2", 0)}),
    ("tcp 192.168.0.254:80", {}),
    ("udp 192.168.0.7:6978", {}),
]
NOT_GUARDED: list[tuple[str, dict[str, Any]]] = [
    ("tcp 1.1.1.1:7", {"mark": CLIENT.mark}),
    ("tcp 10.2.2.3:8080", {}),
    ("tcp 2001:db8::1:8080", {}),
    ("udp 10.1.2.3:8080", {}),
    ("tcp 1.1.1.1:8", {}),
    ("tcp 1.1.1.1:6978", {}),
    ("udp 192.168.1.254:6978", {}),
]


def attempt(host: Host, what: str, options: dict[str, Any]) -> None:
    protocol, _, rest = what.partition(" ")
    address, _, port = rest.rpartition(":")
    send(host, "tcp" if protocol == "tcp" else "udp", address, int(port), **options)


@pytest.mark.proves("D16")
def test_captured_ports_and_the_tunnels_addresses_never_leave_by_another_device(site: Site) -> None:
    for what, options in ATTEMPTS + NOT_GUARDED:
        attempt(site.host, what, options)
        assert seen(site.wire) == {what}, "the control: without a guard the wire carries it"
    with firewall_of(site.host, CLIENT) as firewall:
        firewall.add_guard()
        for what, options in ATTEMPTS:
            attempt(site.host, what, options)
            assert seen(site.wire) == set(), f"{what} {options} passed the guard"
        for what, options in NOT_GUARDED:
            attempt(site.host, what, options)
            assert seen(site.wire) == {what}, f"{what} {options} is none of the guard's business"


def test_a_program_learns_at_once_that_the_guard_refuses_it(site: Site) -> None:
    """Else a program that tries IPv6 first would wait for its own time limit."""
    with firewall_of(site.host, CLIENT) as firewall, site.host.entered():
        firewall.add_guard()
        for family, address in ((socket.AF_INET, ELSEWHERE), (socket.AF_INET6, ELSEWHERE_6)):
            with socket.socket(family) as program:
                program.settimeout(FAR_BEYOND_S)
                with pytest.raises(ConnectionRefusedError):
                    program.connect((address, 7))
            with socket.socket(family, socket.SOCK_DGRAM) as program, pytest.raises(PermissionError):
                program.sendto(b"canary", (address, 7))
    assert seen(site.wire) == set()


def test_a_refusal_for_an_address_that_this_host_has_not_never_leaves(site: Site) -> None:
    """Nor would the packet that it answers: transparent proxies send from addresses of others."""

    def connect_from_a_lost_address() -> set[str]:
        with site.host.entered():
            program = socket.socket()
        with program:
            program.setsockopt(socket.IPPROTO_IP, IP_TRANSPARENT, 1)
            program.bind(("172.16.0.1", 4000))
            program.setblocking(False)
            program.connect_ex((ELSEWHERE, 7))
        return seen(site.wire)

    refuse = "type filter hook output priority -150; tcp dport 7 reject with tcp reset"
    site.host.run("nft", f"table inet plain {{ chain output {{ {refuse}; }}; }}")
    assert connect_from_a_lost_address() == {"tcp 172.16.0.1:4000"}, "the control: a plain refusal leaves"
    site.host.run("nft", "delete", "table", "inet", "plain")
    with firewall_of(site.host, CLIENT) as firewall:
        firewall.add_guard()
        assert connect_from_a_lost_address() == set()


def test_this_hosts_own_addresses_are_neither_guarded_nor_captured(site: Site) -> None:
    with firewall_of(site.host, CLIENT) as firewall, site.host.entered():
        firewall.add_guard()
        firewall.add_capture()
        for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET, "10.0.0.2"), (socket.AF_INET6, "::1")):
            with socket.create_server((address, 7), family=family) as server:
                socket.create_connection(server.getsockname()[:2], timeout=FAR_BEYOND_S).close()


def test_local_servers_may_answer_clients_whose_own_port_is_captured(site: Site) -> None:
    with firewall_of(site.host, CLIENT) as firewall:
        firewall.add_guard()
        firewall.add_capture()
        with echo_servers(site.host, "10.0.0.2", 5000):
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                assert ask(site.internet, kind, "10.0.0.2", 5000, ("10.0.0.9", 7))[0] == b"canary"


@pytest.mark.parametrize("plan", [CLIENT, SERVER], ids=["client", "server"])
def test_the_guard_keeps_the_kernel_tracking_connections(site: Site, plan: Plan) -> None:
    """Without a rule that asks, the kernel stops, and connections would not survive an agent's crash."""

    def tracked() -> int:
        return int(site.host.run("sysctl", "-n", "net.netfilter.nf_conntrack_count"))

    send(site.host, "udp", "10.0.0.9", 1000)
    assert tracked() == 0, "the control"
    with firewall_of(site.host, plan) as firewall:
        firewall.add_guard()
        send(site.host, "udp", "10.0.0.9", 1000)
        assert tracked() == 1


def test_what_the_host_forwards_for_others_is_not_guarded(network: Network, site: Site) -> None:
    behind = network.host("behind")
    network.connect(behind, "10.5.0.2/24", site.host, "10.5.0.1/24")
    behind.run("ip", "route", "add", "default", "via", "10.5.0.1")
    site.host.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
    with firewall_of(site.host, CLIENT) as firewall:
        firewall.add_guard()
        firewall.add_capture()
        for what in ("tcp 1.1.1.1:7", "udp 192.168.0.7:9000"):
            attempt(behind, what, {})
            assert seen(site.wire) == {what}


@pytest.mark.proves("D16")
def test_a_connection_from_before_the_guard_is_held_back(site: Site) -> None:
    with site.internet.entered():
        listening = socket.create_server(("10.0.0.9", 7))
    with contextlib.ExitStack() as stack:
        stack.enter_context(listening)
        with site.host.entered():
            program = stack.enter_context(socket.create_connection(("10.0.0.9", 7), timeout=FAR_BEYOND_S))
        server = stack.enter_context(listening.accept()[0])
        firewall = stack.enter_context(firewall_of(site.host, CLIENT))
        site.wire.packets()
        firewall.add_guard()
        program.send(b"canary")
        assert site.wire.packets() == []
        firewall.delete_guard()
        server.settimeout(FAR_BEYOND_S)
        assert server.recv(100) == b"canary", "the control: once the guard has gone, TCP sends it again"


@pytest.mark.proves("F64")
def test_a_guard_that_is_flushed_or_altered_is_missed_and_restored(site: Site) -> None:
    with firewall_of(site.host, CLIENT) as firewall:
        firewall.add_guard()
        firewall.add_capture()
        for damage in (
            "flush ruleset",
            "delete table inet eng_default_guard",
            "flush chain inet eng_default_guard outgoing",
            "insert rule inet eng_default_guard outgoing accept",
        ):
            site.host.run("nft", damage)
            assert firewall.missing() == ["guard"], damage
            firewall.add_guard()
            assert firewall.missing() == []
            attempt(site.host, "tcp 2001:db8::1:7", {})
            assert seen(site.wire) == set()


@pytest.mark.proves("D16")
def test_a_guard_is_replaced_without_a_moment_in_between(site: Site) -> None:
    """Two CPUs: one sends canaries to a captured port without a pause, the other replaces the guard."""
    with site.host.entered():
        program = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    stopping = threading.Event()

    def send_canaries() -> None:
        while not stopping.is_set():
            with contextlib.suppress(OSError):  # refused, and told so
                program.sendto(b"canary", (ELSEWHERE, 7))

    sender = threading.Thread(target=send_canaries)
    with program, firewall_of(site.host, CLIENT) as firewall:
        firewall.add_guard()
        sender.start()
        try:
            for _ in range(200):
                firewall.add_guard()
            assert seen(site.wire) == set()
            deadline = time.monotonic() + FAR_BEYOND_S
            while not seen(site.wire):
                assert time.monotonic() < deadline, "the control: a guard that is removed and added again has a gap"
                firewall.delete_guard()
                firewall.add_guard()
        finally:
            stopping.set()
            sender.join()


# ---- capture and replay


@contextmanager
def host_changed(site: Site, plan: Plan) -> Iterator[None]:
    """Do to a host, whose TUN is open, all that an agent does."""
    with firewall_of(site.host, plan) as firewall:
        firewall.add_guard()
        with site.host.entered():
            routing = Routing(plan)
            routing.bring_up_tun()
            firewall.add_capture()
            routing.add_rules()
        yield


@contextmanager
def echo_servers(host: Host, address: str, port: int) -> Iterator[None]:
    """Answer one UDP packet or one TCP connection at a time with what it said."""
    with host.entered():
        stream = socket.create_server((address, port))
        datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    datagrams.bind((address, port))
    stop_here, stop_there = socket.socketpair()

    def serve() -> None:
        while stop_there not in (ready := select.select([stream, datagrams, stop_there], [], [])[0]):
            if datagrams in ready:
                datagrams.sendto(*datagrams.recvfrom(65536))
            if stream in ready:
                with stream.accept()[0] as connection:
                    connection.sendall(connection.recv(65536))

    thread = threading.Thread(target=serve)
    with stream, datagrams, stop_here, stop_there:
        thread.start()
        try:
            yield
        finally:
            stop_here.send(b"x")
            thread.join()


def ask(
    host: Host, kind: socket.SocketKind, address: str, port: int, source: tuple[str, int] | None = None
) -> tuple[bytes, str]:
    """Ask an echo server, and return its answer and the address that the question came from."""
    with host.entered():
        program = socket.socket(socket.AF_INET, kind)
    with program:
        program.settimeout(FAR_BEYOND_S)
        if source:
            program.bind(source)
        program.connect((address, port))
        program.sendall(b"canary")
        return program.recv(65536), program.getsockname()[0]


def test_a_program_reaches_a_server_through_the_tunnel_and_nothing_goes_by_the_wires(
    site: Site, far_site: Site, tun: Tun, far_tun: Tun, tunnel: Carry
) -> None:
    with host_changed(site, CLIENT), host_changed(far_site, SERVER), tunnel(tun, far_tun):
        with echo_servers(far_site.host, "0.0.0.0", 5000):
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                assert ask(site.host, kind, ELSEWHERE, 7) == (b"canary", "192.168.0.1")
        assert seen(site.wire) | seen(far_site.wire) == set()


def test_the_most_specific_destination_decides_the_transit_port(site: Site, tun: Tun) -> None:
    plan = replace(CLIENT, captures=parse_captures(["7", "10.0.0.0/8:7", "10.1.0.0/16:7"]))
    with host_changed(site, plan):
        for address in (ELSEWHERE, "10.7.0.1", "10.1.2.3"):
            send(site.host, "tcp", address, 7)
        assert [str(packet).split(" > ")[1] for packet in tunnel_packets(tun, 3)] == [
            "192.168.0.254:6978",
            "192.168.0.254:6979",
            "192.168.0.254:6980",
        ]


def tunnel_packets(tun: Tun, count: int) -> list[Packet]:
    """Take *count* packets that the host sends into the tunnel."""
    packets: list[Packet] = []
    while len(packets) < count:
        assert select.select([tun], [], [], FAR_BEYOND_S)[0], f"only {len(packets)} packets came"
        packets.append(parse_packet(os.read(tun.fileno(), 65536)))
    return packets


def test_the_uplink_is_not_captured_even_when_its_port_is(site: Site, tun: Tun) -> None:
    with host_changed(site, CLIENT):
        send(site.host, "tcp", ELSEWHERE, 7, mark=CLIENT.mark)
        assert seen(site.wire) == {"tcp 1.1.1.1:7"}


def test_a_server_on_the_loopback_address_only_is_not_reached(
    site: Site, far_site: Site, tun: Tun, far_tun: Tun, tunnel: Carry
) -> None:
    """REDIRECT leads to the TUN's address; docs/operations.md says what to do."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(host_changed(site, CLIENT))
        stack.enter_context(host_changed(far_site, SERVER))
        stack.enter_context(tunnel(tun, far_tun))
        stack.enter_context(echo_servers(far_site.host, "127.0.0.1", 5000))
        with pytest.raises(ConnectionRefusedError):
            ask(site.host, socket.SOCK_STREAM, ELSEWHERE, 7)


# ---- what comes out of the tunnel


def checksum(data: bytes) -> bytes:
    """The Internet checksum, RFC 1071."""
    total = sum(struct.unpack(f"!{len(data) // 2}H", data[: len(data) // 2 * 2])) + (data[-1] << 8) * (len(data) % 2)
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return struct.pack("!H", ~total & 0xFFFF)


def packet_of(protocol: int, source: str, destination: str, body: bytes) -> bytes:
    """Make an IP packet of the family that the addresses have, with valid checksums."""
    where = {socket.IPPROTO_TCP: 16, socket.IPPROTO_UDP: 6}[protocol]
    family = socket.AF_INET6 if ":" in source else socket.AF_INET
    addresses = socket.inet_pton(family, source) + socket.inet_pton(family, destination)
    body = body[:where] + checksum(addresses + struct.pack("!HH", protocol, len(body)) + body) + body[where + 2 :]
    if family == socket.AF_INET6:
        return struct.pack("!IHBB", 6 << 28, len(body), protocol, 64) + addresses + body
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 0, 0, 64, protocol, 0) + addresses
    return header[:10] + checksum(header) + header[12:] + body


def udp_packet(source: str, destination: str, port: int, payload: bytes, source_port: int = 4000) -> bytes:
    body = struct.pack("!HHHH", source_port, port, 8 + len(payload), 0) + payload
    return packet_of(socket.IPPROTO_UDP, source, destination, body)


HOSTILE = [
    ("172.16.0.9", "192.168.0.254", 6979),  # a source outside the tunnel
    ("192.168.0.0", "192.168.0.254", 6979),  # its network's address, which is nobody's
    ("192.168.0.254", "192.168.0.254", 6979),  # the server's own
    ("192.168.0.1", "10.0.0.2", 6979),  # another address of this host
    ("192.168.0.1", "10.0.0.9", 6979),  # a third host
    ("192.168.0.1", "127.0.0.1", 6979),
    ("192.168.0.1", "192.168.0.254", 5000),  # the server's own port, not the transit port
    ("192.168.0.1", "192.168.0.254", 22),
]


@pytest.mark.proves("D14", "F43")
def test_the_kernel_lets_nothing_out_of_the_tunnel_but_replayed_ports(site: Site, tun: Tun) -> None:
    """With loose checks of reverse paths and forwarding on: the chains have to do it alone."""
    for setting in ("all.rp_filter=2", "all.accept_local=1", "all.route_localnet=1", "all.forwarding=1"):
        site.host.run("sysctl", "-qw", f"net.ipv4.conf.{setting}")
    with site.host.entered():
        Routing(SERVER).bring_up_tun()
        ear = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP)

    def delivered(last: tuple[str, str, int]) -> set[tuple[str, int, bytes]]:
        """Write every packet and then *last*; return what arrives until then, and where on this host."""
        for packet in (*HOSTILE, last):
            os.write(tun.fileno(), udp_packet(*packet, b"last" if packet is last else b"hostile"))
        arrived = [parse_packet(ear.recv(65536))]
        while arrived[-1].payload != b"last":
            arrived.append(parse_packet(ear.recv(65536)))
        return {(str(packet.destination), packet.port, packet.payload) for packet in arrived}

    ear.settimeout(FAR_BEYOND_S)
    with ear:
        control = delivered(("192.168.0.1", "192.168.0.254", 1))
        places = {("192.168.0.254", 6979), ("10.0.0.2", 6979), ("127.0.0.1", 6979), ("192.168.0.254", 22)}
        assert {(*place, b"hostile") for place in places} <= control
        assert "udp 10.0.0.9:6979" in seen(site.wire)
        with host_changed(site, SERVER):
            assert delivered(("192.168.0.1", "192.168.0.254", 6979)) == {("192.168.0.254", 5000, b"last")}
            assert seen(site.wire) == set()


@pytest.mark.proves("D14", "F44")
def test_neither_options_nor_fragments_come_out_of_the_tunnel_and_others_are_left_alone(site: Site, tun: Tun) -> None:
    plain = udp_packet("192.168.0.1", "192.168.0.254", 6979, b"hostile")
    padding = bytes((1, 1, 1, 0))  # options that ask for nothing
    with_options = with_header(plain, options=padding)
    fragments = [with_header(plain[:28], more=True), with_header(plain[:20] + plain[28:], offset_bytes=8)]

    def out_of_the_tunnel(*packets: bytes) -> list[bytes]:
        for packet in (*packets, udp_packet("192.168.0.1", "192.168.0.254", 6979, b"last")):
            os.write(tun.fileno(), packet)
        return received_until_last()

    def by_the_wire() -> list[bytes]:
        program.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, padding)
        program.sendto(bytes(2000), ("10.0.0.2", 6979))
        program.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, b"")
        program.sendto(b"last", ("10.0.0.2", 6979))
        return received_until_last()

    def received_until_last() -> list[bytes]:
        received = [server.recv(4000)]
        while received[-1] != b"last":
            received.append(server.recv(4000))
        return received[:-1]

    with site.host.entered():
        server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        Routing(SERVER).bring_up_tun()
    with site.internet.entered():
        program = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind(("0.0.0.0", 6979))
    server.settimeout(FAR_BEYOND_S)
    with server, program:
        assert out_of_the_tunnel(with_options, *fragments) == [b"hostile"] * 2, "the control"
        with host_changed(site, replace(SERVER, replays=parse_replays(["udp/6979:6979"]))):
            for hostile in ([with_options], fragments):
                assert out_of_the_tunnel(*hostile) == []
            assert by_the_wire() == [bytes(2000)]


def with_header(packet: bytes, *, options: bytes = b"", more: bool = False, offset_bytes: int = 0) -> bytes:
    """Write an IPv4 packet's header anew: with options, or as that of a fragment."""
    words, total = 5 + len(options) // 4, len(packet) + len(options)
    fragment = (0x2000 if more else 0) | offset_bytes // 8
    header = struct.pack("!BBHHHBBH", 0x40 | words, 0, total, 9, fragment, *packet[8:10], 0) + packet[12:20] + options
    return header[:10] + checksum(header) + header[12:] + packet[20:]


@pytest.mark.proves("D14")
def test_nothing_but_answers_comes_out_of_the_tunnel_on_a_clients_host(site: Site, tun: Tun) -> None:
    """Not even to the TUN's own address, where the host's other servers listen as well."""
    with site.host.entered():
        server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        program = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        Routing(CLIENT).bring_up_tun()
    probing = udp_packet("192.168.0.254", "192.168.0.1", 22, b"hostile")
    server.bind(("0.0.0.0", 22))
    server.settimeout(FAR_BEYOND_S)
    program.settimeout(FAR_BEYOND_S)
    with server, program:
        os.write(tun.fileno(), probing)
        assert server.recv(100) == b"hostile", "the control"
        with host_changed(site, CLIENT):
            program.sendto(b"question", (ELSEWHERE, 7))
            (question,) = tunnel_packets(tun, 1)
            os.write(tun.fileno(), probing)
            os.write(tun.fileno(), udp_packet("192.168.0.254", "192.168.0.1", question.source_port, b"answer", 6979))
            assert program.recvfrom(100) == (b"answer", (ELSEWHERE, 7))
            assert select.select([server], [], [], 0)[0] == []


@pytest.mark.proves("D14", "F44")
def test_no_ipv6_comes_out_of_the_tunnel_even_where_somebody_enables_it(site: Site, tun: Tun) -> None:
    def arrives() -> bool:
        site.host.run("sysctl", "-qw", "net.ipv6.conf.eng0.disable_ipv6=0")
        os.write(tun.fileno(), udp_packet("fd00::7", "fd00::2", 6979, b"hostile"))
        send(site.internet, "udp", "fd00::2", 6979, payload=b"last")
        payloads = [server.recv(100)]
        while payloads[-1] != b"last":
            payloads.append(server.recv(100))
        return b"hostile" in payloads

    with site.host.entered():
        server = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        Routing(SERVER).bring_up_tun()
    server.bind(("::", 6979))
    server.settimeout(FAR_BEYOND_S)
    with server:
        assert arrives(), "the control"
        with host_changed(site, SERVER):
            assert not arrives()


def test_a_packet_that_connection_tracking_disowns_gets_no_answer(site: Site, tun: Tun) -> None:
    """NAT leaves it alone, so it would meet no socket, and the answer would reset the connection that it is of."""
    without_flags = packet_of(
        socket.IPPROTO_TCP,
        "192.168.0.1",
        "192.168.0.254",
        struct.pack("!HHIIBBHHH", 4000, 6978, 1, 1, 0x50, 0, 99, 0, 0),
    )
    with site.host.entered():
        Routing(SERVER).bring_up_tun()

    def answers() -> list[str]:
        os.write(tun.fileno(), without_flags)
        send(site.host, "udp", "192.168.0.1", 9, payload=b"last")
        answers = tunnel_packets(tun, 1)
        while answers[-1].payload != b"last":
            answers += tunnel_packets(tun, 1)
        return [answer.protocol for answer in answers[:-1]]

    assert answers() == ["tcp"], "the control: the kernel resets"
    with host_changed(site, SERVER):
        assert answers() == []


@pytest.mark.proves("D15")
def test_a_packet_for_the_tunnels_address_from_elsewhere_gets_no_answer(site: Site, tun: Tun) -> None:
    site.internet.run("ip", "route", "add", "192.168.0.0/24", "via", "10.0.0.2")
    with site.host.entered():
        Routing(CLIENT).bring_up_tun()
    for protocol, answer in (("tcp", "tcp 10.0.0.9:4000"), ("udp", "icmp 10.0.0.9:0")):
        attempt(site.internet, f"{protocol} 192.168.0.1:80", {"source": ("10.0.0.9", 4000)})
        assert seen(site.wire) == {answer}, "the control: the host answers"
    with host_changed(site, CLIENT):
        for protocol in ("tcp", "udp"):
            attempt(site.internet, f"{protocol} 192.168.0.1:80", {"source": ("10.0.0.9", 4001)})
        assert seen(site.wire) == set()


@pytest.mark.proves("D14")
def test_nothing_is_forwarded_into_the_tunnel(site: Site, tun: Tun) -> None:
    site.host.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
    site.internet.run("ip", "route", "add", "192.168.0.0/24", "via", "10.0.0.2")
    with host_changed(site, CLIENT):
        send(site.internet, "udp", "192.168.0.254", 80, payload=b"forwarded")
        send(site.host, "udp", "192.168.0.254", 80, payload=b"local")
        assert [packet.payload for packet in tunnel_packets(tun, 1)] == [b"local"]
    send(site.internet, "udp", "192.168.0.254", 80, payload=b"forwarded")
    assert [packet.payload for packet in tunnel_packets(tun, 1)] == [b"forwarded"], "the control"


# ---- whose tables


@pytest.mark.proves("F15")
def test_a_second_instance_of_the_same_name_is_refused_and_the_first_is_unaffected(bare_host: Host) -> None:
    with firewall_of(bare_host, CLIENT) as first, firewall_of(bare_host, CLIENT) as second:
        first.add_guard()
        first.add_capture()
        for change in (second.add_guard, second.add_capture):
            with pytest.raises(CannotCreate, match="instance 'default' is running here already"):
                change()
        assert first.missing() == []
        first.delete_guard()


@pytest.mark.proves("F15")
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, "--tun-name eng0 is in use by instance 'default'"),
        ({"tun_name": "eng1"}, "--table 6978 is in use by instance 'default'"),
        ({"tun_name": "eng1", "table": 7}, "--mark 0x6978 is in use by instance 'default'"),
    ],
)
def test_another_instance_needs_names_and_numbers_of_its_own(
    bare_host: Host, changes: dict[str, Any], reason: str
) -> None:
    other = replace(CLIENT, instance="other", **changes)
    with (
        firewall_of(bare_host, replace(CLIENT, is_fail_closed=False)) as first,
        firewall_of(bare_host, other) as second,
    ):
        first.add_guard()
        with pytest.raises(CannotCreate, match=reason):
            second.add_guard()
        assert bare_host.run("nft", "list", "tables") == "table inet eng_default\n"


def test_a_saved_ruleset_with_our_tables_cannot_be_loaded_while_the_agent_lives(bare_host: Host) -> None:
    with firewall_of(bare_host, CLIENT) as firewall:
        firewall.add_guard()
        firewall.add_capture()
        saved = "flush ruleset\n" + bare_host.run("nft", "list", "ruleset")
        with pytest.raises(RuntimeError, match="Operation not permitted"):
            bare_host.run("nft", "-f", "-", input=saved)
        assert firewall.missing() == []
        firewall.delete_guard()


def test_two_instances_live_side_by_side(bare_host: Host) -> None:
    other = replace(CLIENT, instance="other", tun_name="eng1", table=7, mark=7)
    with firewall_of(bare_host, CLIENT) as first, firewall_of(bare_host, other) as second:
        for firewall in (first, second):
            firewall.add_guard()
            firewall.add_capture()
        assert (first.missing(), second.missing()) == ([], [])
        with bare_host.entered():
            assert living_agents() == [CLIENT.identity, other.identity]
        for firewall in (first, second):
            firewall.delete_guard()


@pytest.mark.proves("F13", "D29")
@pytest.mark.parametrize("name", ["eng_default", "eng_default_guard"])
def test_a_strangers_table_of_our_name_is_refused_and_left_as_it_is(bare_host: Host, name: str) -> None:
    bare_host.run("nft", f'table inet {name} {{ comment "mine"; chain c {{ tcp dport 7 accept; }}; }}')
    before = bare_host.run("nft", "list", "ruleset")
    with firewall_of(bare_host, CLIENT) as firewall:
        with pytest.raises(CannotCreate, match=f"'inet {name}' is not ours"):
            firewall.add_guard()
        firewall.delete_guard()
        with bare_host.entered():
            assert (living_agents(), leftover_guards(), delete_guard_named("default")) == ([], [], False)
    assert bare_host.run("nft", "list", "ruleset") == before
    bare_host.run("nft", "delete", "table", "inet", name)


@pytest.mark.proves("D29", "G7")
def test_strangers_tables_are_the_same_before_and_after(bare_host: Host) -> None:
    bare_host.run(
        "nft",
        "table inet eng_other { chain c { type filter hook output priority 0; tcp dport 7 counter; }; };"
        "table ip nat { chain o { type nat hook output priority -100; tcp dport 9 dnat to 10.0.0.1; }; }",
    )
    before = bare_host.run("nft", "list", "ruleset")
    for _ in range(20):
        with firewall_of(bare_host, CLIENT) as firewall:
            firewall.add_guard()
            firewall.add_capture()
            firewall.delete_capture()
            firewall.delete_guard()
    assert bare_host.run("nft", "list", "ruleset") == before
    bare_host.run("nft", "flush", "ruleset")


def test_deleting_what_is_not_there_is_quiet(bare_host: Host) -> None:
    with firewall_of(bare_host, CLIENT) as firewall:
        firewall.delete_capture()
        firewall.delete_guard()
        assert firewall.missing() == []


@pytest.mark.proves("D30")
def test_a_dead_instances_guard_is_told_from_a_living_ones_and_removed_once(bare_host: Host) -> None:
    dead = replace(CLIENT, instance="x", tun_name="x0", table=7, mark=0xFFFFFFFF)
    with firewall_of(bare_host, dead) as firewall:
        firewall.add_guard()
    with firewall_of(bare_host, CLIENT) as living, bare_host.entered():
        living.add_guard()
        assert (living_agents(), leftover_guards()) == ([CLIENT.identity], [dead.identity])
        assert (delete_guard_named("x"), delete_guard_named("x")) == (True, False)
        with pytest.raises(CannotCreate, match="instance 'default' is running here already"):
            delete_guard_named("default")
        assert living.missing() == []
        living.delete_guard()


# ---- refusals


@pytest.mark.proves("F59")
def test_without_the_capability_nothing_is_tried(
    bare_host: Host, unprivileged: Callable[[], AbstractContextManager[None]]
) -> None:
    with bare_host.entered(), unprivileged(), pytest.raises(NotPermitted, match="CAP_NET_ADMIN"):
        NftablesFirewall(CLIENT)


def test_what_the_kernel_refuses_for_another_reason_is_told_as_it_is(
    bare_host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("enta.capture.nftables.capture_ruleset", lambda _: "add rule inet nowhere c accept\n")
    with firewall_of(bare_host, CLIENT) as firewall, pytest.raises(NftFailure, match="nftables refused 'add rule"):
        firewall.add_capture()
