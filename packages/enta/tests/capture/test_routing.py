"""Addresses, policy rules and routes, by where a real kernel sends packets; every absence has its control."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path

import pytest
from enlink.errors import CannotCreate, NotPermitted, SystemFailure
from enlink.testing.hosts import Host
from enlink.testing.probe import Packet, Site, parse_packet, send
from enta.capture import routing as routing_module
from enta.capture.ip_rules import ip_commands, wanted_rules
from enta.capture.plan import Plan, parse_captures, parse_replays
from enta.capture.routing import Routing, purge_dead
from enta.tun import Tun, open_tun

FAR_BEYOND_S = 20.0
IP_PKTINFO = 8  # linux/in.h
CLIENT = Plan(
    "client",
    IPv4Interface("192.168.0.1/24"),
    IPv4Address("192.168.0.254"),
    parse_captures(["7", "udp/7", "10.1.0.0/16:8080", "10.1.0.0/16:7"]),
)
SERVER = Plan(
    "server", IPv4Interface("192.168.0.254/24"), IPv4Address("192.168.0.1"), replays=parse_replays(["5000", "udp/5000"])
)
TUNNEL_ROUTE = "route default dev eng0 src 192.168.0.1 table 6978 protocol 78 congctl reno features ecn"
FAILS_OPEN = replace(CLIENT, is_fail_closed=False)


@contextmanager
def routed(host: Host, plan: Plan) -> Iterator[Routing]:
    """Set a plan's routing up on a host whose TUN is open, and take it back."""
    with host.entered():
        routing = Routing(plan)
        routing.bring_up_tun()
        routing.add_rules()
    yield routing
    with host.entered():
        routing.delete_rules()


def state(host: Host) -> str:
    """Describe addresses, rules and routes, without the numbers of devices, which are never used twice."""
    commands = ("ip rule", "ip -6 rule", "ip -details route show table all", "ip -6 route show table all", "ip address")
    return re.sub(r"(?m)^\d+: (?=\w+:)", "", "".join(host.run(*command.split()) for command in commands))


def tagged(host: Host) -> list[str]:
    lines = (host.run("ip", "rule") + host.run("ip", "route", "show", "table", "all")).splitlines()
    return [line.strip() for line in lines if "proto 78" in line]


def tunnel_packets(host: Host, tun: Tun) -> list[Packet]:
    """Take what the host has sent into the tunnel until now: a packet of its own comes last."""
    send(host, "udp", str(CLIENT.peer), 9, payload=b"last")
    packets: list[Packet] = []
    while not packets or packets[-1].payload != b"last":
        assert select.select([tun], [], [], FAR_BEYOND_S)[0], f"no more than {packets}"
        packets.append(parse_packet(os.read(tun.fileno(), 65536)))
    return packets[:-1]


# ---- where packets go


def test_captured_traffic_enters_the_tunnel_from_its_address_and_nothing_else_does(site: Site, tun: Tun) -> None:
    captured = [("tcp", "1.1.1.1", 7), ("udp", "1.1.1.1", 7), ("tcp", "10.1.2.3", 8080), ("udp", "192.168.0.77", 1)]
    others = [("tcp", "1.1.1.1", 8), ("tcp", "10.2.2.3", 8080), ("udp", "10.1.2.3", 8080)]
    with routed(site.host, CLIENT):
        for protocol, address, port in captured + others:
            send(site.host, "tcp" if protocol == "tcp" else "udp", address, port)
        entered = [(p.protocol, str(p.destination), p.port) for p in tunnel_packets(site.host, tun)]
        assert entered == captured
        assert [(p.protocol, str(p.destination), p.port) for p in site.wire.packets()] == others
        send(site.host, "tcp", "1.1.1.1", 7)
        assert {str(packet.source) for packet in tunnel_packets(site.host, tun)} == {"192.168.0.1"}


def test_this_hosts_own_addresses_are_not_captured(site: Site, tun: Tun) -> None:
    with routed(site.host, CLIENT), site.host.entered():
        for address in ("127.0.0.1", "10.0.0.2", "192.168.0.1"):
            with socket.create_server((address, 7)) as server:
                socket.create_connection(server.getsockname(), timeout=FAR_BEYOND_S).close()
        assert tunnel_packets(site.host, tun) == []


def test_the_uplink_leaves_by_the_main_table_even_to_a_captured_port(site: Site, tun: Tun) -> None:
    with routed(site.host, CLIENT):
        send(site.host, "tcp", "1.1.1.1", 7, mark=CLIENT.mark)
        assert [str(packet.source) for packet in site.wire.packets()] == ["10.0.0.2"]
        assert tunnel_packets(site.host, tun) == []


def ask_from_port_7(site: Site, kind: socket.SocketKind, address: str) -> bytes:
    """Be a client elsewhere whose own port is one that the host captures."""
    with site.internet.entered():
        program = socket.socket(socket.AF_INET, kind)
    with program:
        program.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        program.bind(("10.0.0.9", 7))
        program.settimeout(0.2 if address == "nobody" else FAR_BEYOND_S)
        program.connect((address, 5000))
        program.send(b"canary")
        return program.recv(100)


@contextmanager
def echo_once(host: Host, kind: socket.SocketKind, address: str) -> Iterator[None]:
    with host.entered():
        server = socket.socket(socket.AF_INET, kind)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind((address, 5000))
    server.settimeout(FAR_BEYOND_S)

    def answer() -> None:
        if kind == socket.SOCK_DGRAM:
            server.sendto(*server.recvfrom(100))
        else:
            with server.accept()[0] as connection:
                connection.sendall(connection.recv(100))

    if kind == socket.SOCK_STREAM:
        server.listen()
    thread = threading.Thread(target=answer)
    thread.start()
    with server:
        yield
        thread.join()


@pytest.mark.parametrize(
    ("kind", "address"),
    [(socket.SOCK_STREAM, "0.0.0.0"), (socket.SOCK_STREAM, "10.0.0.2"), (socket.SOCK_DGRAM, "10.0.0.2")],
)
def test_local_servers_keep_the_clients_whose_own_port_is_captured(
    site: Site, tun: Tun, kind: socket.SocketKind, address: str
) -> None:
    """Reverse paths are checked strictly here."""
    with routed(site.host, CLIENT), echo_once(site.host, kind, address):
        assert ask_from_port_7(site, kind, "10.0.0.2") == b"canary"
        assert tunnel_packets(site.host, tun) == []


def test_a_udp_server_on_every_address_keeps_them_if_it_answers_from_the_address_asked(site: Site, tun: Tun) -> None:
    with site.host.entered():
        server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with server, routed(site.host, CLIENT):
        server.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
        server.bind(("0.0.0.0", 5000))
        server.settimeout(FAR_BEYOND_S)
        send(site.internet, "udp", "10.0.0.2", 5000, source=("10.0.0.9", 7))
        _, [(level, kind, information)], _, client = server.recvmsg(100, socket.CMSG_SPACE(12))
        _, asked = struct.unpack_from("=i4s", information)
        answer_from = [(level, kind, struct.pack("=i4s4x", 0, asked))]
        server.sendmsg([b"answer"], answer_from, 0, client)
        assert [packet.payload for packet in site.wire.packets()] == [b"answer"]


def test_rules_for_any_source_would_lose_them(site: Site, tun: Tun) -> None:
    """The control of the test above."""
    with routed(site.host, CLIENT), site.host.entered():
        rule = f"iif lo ipproto udp dport 7 lookup {CLIENT.table} priority 6978"
        site.host.run("ip", "rule", "add", *rule.split())
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
            server.bind(("10.0.0.2", 5000))
            server.sendto(b"answer", ("10.0.0.9", 7))
        assert [packet.payload for packet in tunnel_packets(site.host, tun)] == [b"answer"]


def test_the_answer_of_a_udp_server_on_every_address_to_such_a_client_enters_the_tunnel(site: Site, tun: Tun) -> None:
    """It names no source, as a new request does not, so the kernel cannot tell them apart. It never goes out bare."""
    with routed(site.host, CLIENT), echo_once(site.host, socket.SOCK_DGRAM, "0.0.0.0"):
        send(site.internet, "udp", "10.0.0.2", 5000, source=("10.0.0.9", 7))
        assert select.select([tun], [], [], FAR_BEYOND_S)[0]
        assert [packet.port for packet in tunnel_packets(site.host, tun)] == [7]
        assert site.wire.packets() == []


@pytest.mark.proves("D16")
def test_without_the_device_captured_traffic_fails_at_once(site: Site, tun: Tun) -> None:
    with routed(site.host, CLIENT):
        tun.close()
        for protocol, address, port in (("tcp", "1.1.1.1", 7), ("udp", "1.1.1.1", 7), ("udp", "192.168.0.254", 1)):
            error = send(site.host, "tcp" if protocol == "tcp" else "udp", address, port)
            assert error == errno.EHOSTUNREACH
        assert site.wire.packets() == []


def test_without_the_device_a_plan_that_fails_open_lets_it_out(site: Site, tun: Tun) -> None:
    with routed(site.host, FAILS_OPEN):
        tun.close()
        assert send(site.host, "tcp", "1.1.1.1", 7) == 0
        assert [str(packet.source) for packet in site.wire.packets()] == ["10.0.0.2"]


# ---- what changes, and back


@pytest.mark.parametrize("plan", [CLIENT, SERVER, FAILS_OPEN], ids=["client", "server", "fails open"])
def test_the_commands_of_a_dry_run_do_exactly_the_same(site: Site, tun: Tun, plan: Plan) -> None:
    def settings() -> str:
        directories = [f"/proc/sys/net/{family}/conf/eng0" for family in ("ipv4", "ipv6")]
        lines = site.host.run("grep", "--recursive", ".", *directories, check=False).splitlines()
        return "\n".join(sorted(line for line in lines if "stable_secret" not in line))

    before = state(site.host)
    with routed(site.host, plan):
        ours = state(site.host), settings()
    tun.close()
    with site.host.entered():
        again = open_tun("eng0")
    with again:
        for command in ip_commands(plan):
            site.host.run(*command.split())
        assert (state(site.host), settings()) == ours
        assert state(site.host) != before


@pytest.mark.proves("G7", "D29")
def test_strangers_rules_and_routes_are_the_same_before_and_after(site: Site, tun: Tun) -> None:
    host = site.host
    for line in (
        "rule add priority 6978 from 10.0.0.2 iif lo lookup 6978",
        "rule add priority 6978 from 10.0.0.2 iif lo sport 7 lookup 6978 protocol 78",
        "rule add priority 6977 fwmark 0x6978/0xffff lookup 7000",
        "rule add priority 100 fwmark 0x6978 goto 32766 protocol 78",
        "-6 rule add priority 6978 iif lo lookup 6978",
        "route add 10.7.0.0/16 via 10.0.0.9 table 6978",
        "route add 10.8.0.0/16 via 10.0.0.9 table 6978 protocol 78",
        "route add unreachable default metric 4294967295 table 7000",
        "route add unreachable default metric 7 table 7000 protocol 78",
        "-6 route add unreachable default table 6978",
    ):
        host.run("ip", *line.split())
    before = state(host)
    for _ in range(20):
        with host.entered():
            Routing(CLIENT).refuse_conflicts()
            again = open_tun("eng1")
        with again, routed(host, replace(CLIENT, tun_name="eng1")):
            pass
        with host.entered():
            assert Routing(CLIENT).purge_leftovers() == []
            assert purge_dead([]) == []
    assert state(host) == before


@pytest.mark.proves("D14")
def test_the_tun_is_configured_before_it_is_up(site: Site, tun: Tun) -> None:
    with site.host.entered():
        Routing(CLIENT).bring_up_tun()
    assert "inet6" not in site.host.run("ip", "address", "show", "dev", "eng0")
    assert site.host.run("sysctl", "-n", *(f"net.ipv4.conf.eng0.{name}" for name in ("rp_filter", "accept_local"))) == (
        "1\n0\n"
    )
    assert site.host.run("sysctl", "-n", "net.ipv6.conf.eng0.disable_ipv6") == "1\n"
    assert "mtu 65535" in site.host.run("ip", "link", "show", "dev", "eng0")


def test_settings_that_cannot_be_written_are_warned_of(
    site: Site, tun: Tun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As in most containers, where /proc/sys is read-only."""

    def refuse(path: Path, text: str) -> int:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "write_text", refuse)
    site.host.run("sysctl", "-qw", "net.ipv4.conf.eng0.rp_filter=2")
    with site.host.entered():
        Routing(CLIENT).bring_up_tun()
    assert [record.message for record in caplog.records] == [
        "cannot set /proc/sys/net/ipv6/conf/eng0/disable_ipv6 to 1 (Read-only file system)",
        "cannot set /proc/sys/net/ipv4/conf/eng0/rp_filter to 1 (Read-only file system)",
    ]
    assert "192.168.0.1/24" in site.host.run("ip", "address", "show", "dev", "eng0")


def test_a_kernel_without_ipv6_is_no_obstacle(site: Site, tun: Tun, monkeypatch: pytest.MonkeyPatch) -> None:
    read_text = Path.read_text

    def read(path: Path) -> str:
        if "ipv6" in path.parts:
            raise FileNotFoundError(path)
        return read_text(path)

    monkeypatch.setattr(Path, "read_text", read)
    with site.host.entered():
        Routing(CLIENT).bring_up_tun()
    assert "192.168.0.1/24" in site.host.run("ip", "address", "show", "dev", "eng0")


# ---- what others take away


@pytest.mark.proves("F64", "F62")
@pytest.mark.parametrize(
    ("damage", "missing"),
    [
        ("rule del priority 6977", ["rule priority 6977 fwmark 0x6978 lookup main protocol 78"]),
        ("rule flush protocol 78", [f"rule {rule}" for rule in wanted_rules(CLIENT)]),
        (
            "route flush table 6978",
            [
                "route unreachable default metric 4294967295 table 6978 protocol 78",
                TUNNEL_ROUTE,
            ],
        ),
        (
            "link set eng0 down",
            [
                "link eng0 mtu 65535 up",
                TUNNEL_ROUTE,
            ],
        ),
        ("link set eng0 mtu 1280", ["link eng0 mtu 65535 up"]),
        (
            "address del 192.168.0.1/24 dev eng0",
            [
                "address 192.168.0.1/24 dev eng0",
                TUNNEL_ROUTE,
            ],
        ),
    ],
)
def test_what_others_remove_is_missed_and_restored(site: Site, tun: Tun, damage: str, missing: list[str]) -> None:
    with routed(site.host, CLIENT) as routing, site.host.entered():
        before = state(site.host)
        assert routing.missing() == []
        site.host.run("ip", *damage.split())
        assert routing.missing() == missing
        for _ in range(2):
            routing.restore()
            assert routing.missing() == []
        assert sorted(state(site.host).splitlines()) == sorted(before.splitlines())


def test_nothing_is_missed_before_it_was_set_up_or_after_it_was_taken_back(site: Site, tun: Tun) -> None:
    with site.host.entered():
        routing = Routing(CLIENT)
        assert routing.missing() == []
        routing.restore()
        assert tagged(site.host) == []
        routing.bring_up_tun()
        routing.add_rules()
        routing.delete_rules()
        routing.delete_rules()
        assert routing.missing() == []


@pytest.mark.proves("F62")
def test_a_tun_that_is_taken_away_is_a_failure_of_the_system(site: Site, tun: Tun) -> None:
    with routed(site.host, CLIENT) as routing, site.host.entered():
        tun.close()
        for act in (routing.missing, routing.restore, routing.add_rules, routing.bring_up_tun):
            with pytest.raises(SystemFailure, match="the device eng0 is gone"):
                act()


# ---- what a crash leaves


@pytest.mark.proves("F04", "D30")
def test_a_crash_leaves_inert_rules_and_one_unreachable_route_which_the_next_start_adopts(site: Site, tun: Tun) -> None:
    with site.host.entered():
        crashed = Routing(CLIENT)
        crashed.bring_up_tun()
        crashed.add_rules()
        tun.close()
        assert len(tagged(site.host)) == len(wanted_rules(CLIENT)) + 1
        assert tagged(site.host)[-1].startswith("unreachable default table 6978")
        following = Routing(CLIENT)
        following.refuse_conflicts()
        assert following.purge_leftovers() == []
        with open_tun("eng0"):
            following.bring_up_tun()
            following.add_rules()
            assert len(tagged(site.host)) == len(wanted_rules(CLIENT)) + 2
            following.delete_rules()
        assert tagged(site.host) == []


@pytest.mark.proves("F13")
def test_the_next_start_removes_what_it_does_not_want(site: Site, tun: Tun) -> None:
    with site.host.entered():
        crashed = Routing(CLIENT)
        crashed.bring_up_tun()
        crashed.add_rules()
        tun.close()
        following = replace(CLIENT, captures=parse_captures(["udp/7", "9"]), is_fail_closed=False)
        unwanted = [f"rule {rule}" for rule in wanted_rules(CLIENT) if rule not in wanted_rules(following)]
        last = "route unreachable default metric 4294967295 table 6978 protocol 78"
        assert Routing(following).purge_leftovers() == [*unwanted, last]
        assert len(tagged(site.host)) == 4


@pytest.mark.proves("D30")
def test_clean_up_removes_what_is_dead_and_never_what_lives(site: Site, tun: Tun) -> None:
    host = site.host
    living = replace(
        CLIENT,
        instance="living",
        tun_name="eng1",
        table=7001,
        mark=1,
        address=IPv4Interface("192.168.1.1/24"),
        peer=IPv4Address("192.168.1.2"),
        captures=parse_captures(["9"]),
    )
    waiting = replace(living, instance="waiting", tun_name="eng2", table=7002, mark=2, captures=parse_captures(["10"]))
    with host.entered(), contextlib.ExitStack() as stack:
        with open_tun("eng2"):  # its device is gone for a moment, but it holds its table of nftables
            Routing(waiting).bring_up_tun()
            Routing(waiting).add_rules()
        stack.enter_context(open_tun("eng1"))
        stack.enter_context(routed(host, living))
        others = tagged(host)
        Routing(CLIENT).bring_up_tun()
        Routing(CLIENT).add_rules()
        tun.close()
        removed = purge_dead([waiting.identity, living.identity])
        assert len(removed) == len(wanted_rules(CLIENT)) + 1
        assert tagged(host) == others
        assert purge_dead([waiting.identity, living.identity]) == []
        assert len(purge_dead([living.identity])) == len(wanted_rules(waiting)) + 1
        # A table with a route by a device that exists is kept, even if nobody says whose it is.
        assert purge_dead([]) == ["rule priority 6977 fwmark 0x1 lookup main protocol 78"]


# ---- refusals


@pytest.mark.proves("F66")
@pytest.mark.parametrize(
    ("planted", "reason"),
    [
        ("route add default via 10.0.0.9 table 6978", "--table 6978 has a default route already (default dev wire1a"),
        ("address add 192.168.0.7/32 dev wire1a", "--tun-addr 192.168.0.1/24 overlaps 192.168.0.7/32 dev wire1a"),
        ("address add 192.168.0.7/24 dev wire1a", "overlaps a route (192.168.0.0/24 dev wire1a table 254)"),
        ("route add 192.168.0.128/25 via 10.0.0.9", "overlaps a route (192.168.0.128/25 dev wire1a table 254)"),
        ("route add 192.168.0.0/16 via 10.0.0.9", "overlaps a route (192.168.0.0/16 dev wire1a table 254)"),
        ("route add blackhole 192.168.0.3/32", "overlaps a route (192.168.0.3/32 dev none table 254)"),
        (
            "rule add priority 6978 from 0.0.0.0/32 iif lo ipproto tcp dport 7 lookup 7000 protocol 78",
            "another agent captures this (rule priority 6978 from 0.0.0.0/32 iif lo ipproto tcp dport 7 lookup 7000",
        ),
    ],
)
def test_a_conflict_is_refused_with_the_line_in_the_way(site: Site, planted: str, reason: str) -> None:
    site.host.run("ip", *planted.split())
    before = state(site.host)
    with site.host.entered(), pytest.raises(CannotCreate) as refusal:
        Routing(CLIENT).refuse_conflicts()
    assert reason in str(refusal.value)
    assert state(site.host) == before


@pytest.mark.parametrize(
    "planted",
    [
        "route add 128.0.0.0/1 via 10.0.0.9",
        "route add 192.168.1.0/24 via 10.0.0.9",
        "route add 192.168.0.0/24 via 10.0.0.9 table 7000",
        "route add 10.7.0.0/16 via 10.0.0.9 table 6978",
        "rule add priority 6978 from 0.0.0.0/32 iif lo ipproto tcp dport 9 lookup 7000 protocol 78",
        "rule add priority 6978 from 0.0.0.0/32 to 10.2.0.0/16 iif lo ipproto tcp dport 8080 lookup 7000 protocol 78",
    ],
)
def test_what_is_not_in_the_way_is_no_conflict(site: Site, planted: str) -> None:
    site.host.run("ip", *planted.split())
    with site.host.entered():
        Routing(CLIENT).refuse_conflicts()


@pytest.mark.proves("F66")
def test_a_default_route_that_a_stranger_adds_meanwhile_is_not_replaced(site: Site, tun: Tun) -> None:
    with site.host.entered():
        Routing(CLIENT).bring_up_tun()
        site.host.run("ip", "route", "add", "default", "via", "10.0.0.9", "table", "6978")
        with pytest.raises(CannotCreate, match="File exists"):
            Routing(CLIENT).add_rules()
    assert "default via 10.0.0.9" in site.host.run("ip", "route", "show", "table", "6978")


@pytest.mark.proves("F59")
def test_without_the_capability_nothing_changes(
    site: Site, tun: Tun, unprivileged: Callable[[], AbstractContextManager[None]]
) -> None:
    with site.host.entered():
        routing = Routing(CLIENT)
        site.host.run("ip", "rule", "add", *str(wanted_rules(CLIENT)[0]).split())
        before = state(site.host)
        with unprivileged():
            for act in (routing.bring_up_tun, routing.add_rules, routing.delete_rules):
                with pytest.raises(NotPermitted, match="CAP_NET_ADMIN"):
                    act()
    assert state(site.host) == before


def test_what_the_kernel_refuses_for_another_reason_is_told_as_it_is(site: Site, tun: Tun) -> None:
    with site.host.entered(), pytest.raises(SystemFailure, match=r"cannot add routes and rules \(Network is down\)"):
        Routing(CLIENT).add_rules()


def test_what_somebody_else_removes_meanwhile_is_removed_quietly(
    site: Site, tun: Tun, monkeypatch: pytest.MonkeyPatch
) -> None:
    with routed(site.host, CLIENT), site.host.entered():
        monkeypatch.setattr(routing_module, "_rules", lambda _: [*wanted_rules(CLIENT), *wanted_rules(SERVER)])
        assert len(Routing(CLIENT).purge_leftovers()) == 0
        site.host.run("ip", "rule", "flush", "protocol", "78")
        Routing(CLIENT).delete_rules()
        assert tagged(site.host) == []
