"""What a killed agent leaves on its host, and that captured traffic stays off the wire whatever else is removed."""

from __future__ import annotations

import base64
import contextlib
import itertools
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from ipaddress import IPv4Address, IPv4Interface

import pytest
from enlink.testing.hosts import Host
from enlink.testing.probe import Site, send
from enta.capture.ip_rules import wanted_rules
from enta.capture.nftables import NftablesFirewall, delete_guard_named, leftover_guards, living_agents
from enta.capture.plan import Plan, parse_captures, parse_replays
from enta.capture.routing import Routing, purge_dead
from enta.tun import Tun, open_tun

FAR_BEYOND_S = 20.0
Carry = Callable[[Tun, Tun], AbstractContextManager[None]]

CLIENT = Plan("client", IPv4Interface("192.168.0.1/24"), IPv4Address("192.168.0.254"), parse_captures(["7", "udp/7"]))
SERVER = Plan(
    "server", IPv4Interface("192.168.0.254/24"), IPv4Address("192.168.0.1"), replays=parse_replays(["5000", "udp/5000"])
)

# An agent as far as its host can tell. Its argument holds the plan.
AGENT = """
import base64, pickle, signal, sys
from enta.capture.nftables import NftablesFirewall
from enta.capture.routing import Routing
from enta.tun import open_tun

plan = pickle.loads(base64.b64decode(sys.argv[1]))
firewall, routing = NftablesFirewall(plan), Routing(plan)
firewall.add_guard()
routing.purge_leftovers()
tun = open_tun(plan.tun_name)
routing.bring_up_tun()
firewall.add_capture()
routing.add_rules()
print("ready", flush=True)
signal.pause()
"""

# What holds captured traffic back once its agent is dead, and how a stranger would remove it.
LAYERS = {
    "guard": ["nft flush ruleset"],
    "rules": ["ip rule flush protocol 78"],
    "unreachable route": ["ip route flush table 6978"],
}
REMOVALS = [removed for count in range(4) for removed in itertools.combinations(LAYERS, count)]


def remove(host: Host, layers: tuple[str, ...]) -> None:
    for layer in layers:
        for command in LAYERS[layer]:
            host.run(*command.split())


def is_held_back(removed: tuple[str, ...]) -> bool:
    """Either the guard or, together, the rules and the route that they lead to are enough."""
    return "guard" not in removed or not {"rules", "unreachable route"} & {*removed}


@contextmanager
def killed_agent(host: Host, plan: Plan) -> Iterator[None]:
    """Run an agent until it is ready; the block runs after SIGKILL has ended it."""
    argument = base64.b64encode(pickle.dumps(plan)).decode()
    with host.popen(sys.executable, "-c", AGENT, argument, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"ready\n"
        finally:
            process.kill()
    yield


class Changes:
    """What an agent does to its host, with a TUN that the test holds; `die` leaves what SIGKILL leaves."""

    def __init__(self, host: Host, plan: Plan, tun: Tun) -> None:
        self._tun = tun
        with host.entered():
            self._firewall, routing = NftablesFirewall(plan), Routing(plan)
            self._firewall.add_guard()
            routing.bring_up_tun()
            self._firewall.add_capture()
            routing.add_rules()

    def die(self) -> None:
        self._firewall.close()
        self._tun.close()

    def lift_the_living_guard(self) -> None:
        """Empty the copy of the guard in the agent's own table, which nobody else can."""
        self._firewall._nft.run("".join(f"flush chain inet eng_default {name}\n" for name in ("outgoing", "leaving")))


@dataclass
class Path:
    """A client's and a server's host, with a tunnel in between that can be carried or not."""

    near: Site
    far: Site
    client: Changes
    server: Changes
    carried: Callable[[], AbstractContextManager[None]]

    @contextmanager
    def connection(self) -> Iterator[tuple[socket.socket, socket.socket]]:
        """Connect a captured program to a server; give both sockets. Nothing carries the tunnel afterwards."""
        with self.far.host.entered():
            listening = socket.create_server(("0.0.0.0", 5000))
        with self.near.host.entered():
            program = socket.socket()
        program.settimeout(FAR_BEYOND_S)
        listening.settimeout(FAR_BEYOND_S)
        with listening, program:
            with self.carried():
                program.connect(("1.1.1.1", 7))
                server = listening.accept()[0]
            server.settimeout(FAR_BEYOND_S)
            with server:
                yield program, server


@pytest.fixture
def path(site: Site, far_site: Site, tun: Tun, far_tun: Tun, tunnel: Carry) -> Iterator[Path]:
    client, server = Changes(site.host, CLIENT, tun), Changes(far_site.host, SERVER, far_tun)
    try:
        yield Path(site, far_site, client, server, partial(tunnel, tun, far_tun))
    finally:
        client.die()
        server.die()


def foreign_state(host: Host) -> list[str]:
    """Describe all that is not tagged as ours."""
    commands = ("ip rule", "ip route show table all", "nft list ruleset")
    lines = [line.strip() for command in commands for line in host.run(*command.split()).splitlines()]
    return [line for line in lines if "proto 78" not in line]


# ---- what stays


@pytest.mark.proves("F04", "F13", "G5")
@pytest.mark.parametrize("plan", [CLIENT, SERVER], ids=["client", "server"])
def test_exactly_the_tagged_rules_the_unreachable_route_and_the_guard_stay(site: Site, plan: Plan) -> None:
    host = site.host
    before = foreign_state(host)
    with killed_agent(host, plan):
        rules = [line for line in host.run("ip", "rule").splitlines() if "proto 78" in line]
        assert len(rules) == len(wanted_rules(plan))
        routes = [line for line in host.run("ip", "route", "show", "table", "all").splitlines() if "proto 78" in line]
        assert [route.split() for route in routes] == [
            ["unreachable", "default", "table", "6978", "proto", "78", "metric", "4294967295"]
        ]
        assert host.run("nft", "list", "tables") == "table inet eng_default_guard\n"
        assert " eng0:" not in host.run("ip", "link")
        with host.entered():
            assert (living_agents(), leftover_guards()) == ([], [plan.identity])
            assert len(purge_dead([])) == len(rules) + 1
            assert purge_dead([]) == []
            assert (delete_guard_named("default"), delete_guard_named("default")) == (True, False)
        assert foreign_state(host) == before


@pytest.mark.proves("F04")
def test_with_on_crash_open_only_inert_rules_stay(site: Site) -> None:
    with killed_agent(site.host, replace(CLIENT, is_fail_closed=False)):
        assert site.host.run("nft", "list", "tables") == ""
        assert "proto 78" not in site.host.run("ip", "route", "show", "table", "all")
        assert send(site.host, "tcp", "1.1.1.1", 7) == 0
        assert [packet.port for packet in site.wire.packets()] == [7]


@pytest.mark.proves("F04", "F13")
def test_the_next_start_leaves_one_set_of_rules_not_two(site: Site) -> None:
    def ours() -> list[str]:
        lines = [line for line in site.host.run("ip", "rule").splitlines() if "proto 78" in line]
        return [*lines, site.host.run("nft", "list", "ruleset")]

    with killed_agent(site.host, CLIENT):
        once = ours()
    with killed_agent(site.host, CLIENT):
        assert ours() == once


# ---- what never leaves


@pytest.mark.proves("D16", "G8")
@pytest.mark.parametrize("removed", REMOVALS, ids=" and ".join)
def test_new_connections_stay_off_the_wire_as_long_as_one_barrier_stands(
    site: Site, tun: Tun, removed: tuple[str, ...]
) -> None:
    Changes(site.host, CLIENT, tun).die()
    remove(site.host, removed)
    for protocol, address, port in (("tcp", "1.1.1.1", 7), ("udp", "1.1.1.1", 7), ("udp", "192.168.0.254", 6978)):
        send(site.host, "tcp" if protocol == "tcp" else "udp", address, port)
        assert (site.wire.packets() == []) == is_held_back(removed)


@pytest.mark.proves("D16", "G8")
@pytest.mark.parametrize("removed", REMOVALS, ids=" and ".join)
def test_the_answers_of_a_server_stay_off_the_wire_as_long_as_one_barrier_stands(
    path: Path, removed: tuple[str, ...]
) -> None:
    with path.far.host.entered():
        server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind(("0.0.0.0", 5000))
    server.settimeout(FAR_BEYOND_S)
    with server:
        with path.carried():
            send(path.near.host, "udp", "1.1.1.1", 7, payload=b"question")
            question, client = server.recvfrom(100)
        assert (question, client[0]) == (b"question", "192.168.0.1")
        path.server.die()
        remove(path.far.host, removed)
        with contextlib.suppress(OSError):
            server.sendto(b"answer", client)
        assert (path.far.wire.packets() == []) == is_held_back(removed)


@pytest.mark.proves("D16", "G8")
@pytest.mark.parametrize("is_guarded", [True, False], ids=["guarded", "the control"])
@pytest.mark.parametrize("is_connected_route_gone", [False, True])
def test_an_established_connection_stays_off_the_wire_when_its_way_into_the_tunnel_is_removed(
    path: Path, is_guarded: bool, is_connected_route_gone: bool
) -> None:
    """The agent lives, and so does the mapping of connection tracking: a packet is routed once more after it."""
    host = path.near.host
    with path.connection() as (program, _):
        remove(host, ("rules", "unreachable route"))
        if not is_guarded:
            remove(host, ("guard",))
            path.client.lift_the_living_guard()
        if is_connected_route_gone:
            host.run("ip", "route", "delete", "192.168.0.0/24", "dev", "eng0")
        program.send(b"canary")
        leaked = [packet.payload for packet in path.near.wire.packets()]
        assert leaked == ([b"canary"] if is_connected_route_gone and not is_guarded else [])


@pytest.mark.proves("D16", "G8")
@pytest.mark.parametrize("removed", [(), tuple(LAYERS)], ids=["nothing removed", "everything removed"])
def test_an_established_connection_stays_off_the_wire_after_a_crash(path: Path, removed: tuple[str, ...]) -> None:
    """If nothing else is left, the kernel itself refuses to send from an address that has gone with its device."""
    with path.connection() as (program, _):
        path.client.die()
        remove(path.near.host, removed)
        with contextlib.suppress(OSError):
            program.send(b"canary")
        assert path.near.wire.packets() == []


@pytest.mark.proves("F04", "G8")
def test_a_connection_survives_the_crash_and_restart_of_the_clients_agent(
    path: Path, far_tun: Tun, tunnel: Carry
) -> None:
    with path.connection() as (program, server):
        path.client.die()
        program.send(b"sent meanwhile")
        with restarted(path.near.host, CLIENT) as tun, tunnel(tun, far_tun):
            assert server.recv(100) == b"sent meanwhile"
        assert path.near.wire.packets() == []


@pytest.mark.proves("F04", "G8")
def test_a_connection_survives_the_crash_and_restart_of_the_servers_agent(path: Path, tun: Tun, tunnel: Carry) -> None:
    with path.connection() as (program, server):
        path.server.die()
        server.send(b"sent meanwhile")
        with restarted(path.far.host, SERVER) as far_tun, tunnel(tun, far_tun):
            assert program.recv(100) == b"sent meanwhile"
        assert path.far.wire.packets() == []


@contextmanager
def restarted(host: Host, plan: Plan) -> Iterator[Tun]:
    with host.entered():
        tun = open_tun("eng0")
    changes = Changes(host, plan, tun)
    try:
        yield tun
    finally:
        changes.die()
