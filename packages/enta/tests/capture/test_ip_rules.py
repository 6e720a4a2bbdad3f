"""The rules and routes of a plan, in the words of `ip`; what a kernel makes of them is in test_routing.py."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address, IPv4Interface

from enta.capture.ip_rules import ip_commands, wanted_routes, wanted_rules
from enta.capture.plan import Plan, parse_captures, parse_replays

CLIENT = Plan(
    "client",
    IPv4Interface("192.168.0.1/24"),
    IPv4Address("192.168.0.254"),
    parse_captures(["7", "udp/10.1.0.0/16:53"]),
)
SERVER = Plan("server", IPv4Interface("192.168.0.254/24"), IPv4Address("192.168.0.1"), replays=parse_replays(["7"]))


def test_a_client_routes_captured_ports_its_tunnel_and_not_its_uplink() -> None:
    assert ip_commands(CLIENT) == [
        "sysctl -w net/ipv6/conf/eng0/disable_ipv6=1",
        "sysctl -w net/ipv4/conf/eng0/rp_filter=1",
        "sysctl -w net/ipv4/conf/eng0/accept_local=0",
        "sysctl -w net/ipv4/conf/eng0/route_localnet=0",
        "ip address add 192.168.0.1/24 dev eng0",
        "ip link set dev eng0 mtu 65535 txqueuelen 2000 up",
        "ip route add unreachable default metric 4294967295 table 6978 protocol 78",
        "ip route add default dev eng0 src 192.168.0.1 table 6978 protocol 78 congctl reno features ecn",
        "ip rule add priority 6977 fwmark 0x6978 lookup main protocol 78",
        "ip rule add priority 6978 to 192.168.0.0/24 iif lo lookup 6978 protocol 78",
        "ip rule add priority 6978 from 0.0.0.0/32 to 10.1.0.0/16 iif lo ipproto udp dport 53 lookup 6978 protocol 78",
        (
            "ip rule add priority 6978 from 192.168.0.1/32 to 10.1.0.0/16 iif lo ipproto udp dport 53"
            " lookup 6978 protocol 78"
        ),
        "ip rule add priority 6978 from 0.0.0.0/32 iif lo ipproto tcp dport 7 lookup 6978 protocol 78",
        "ip rule add priority 6978 from 192.168.0.1/32 iif lo ipproto tcp dport 7 lookup 6978 protocol 78",
    ]


def test_a_server_routes_its_tunnel_only() -> None:
    assert [str(rule) for rule in wanted_rules(SERVER)] == [
        "priority 6978 to 192.168.0.0/24 iif lo lookup 6978 protocol 78"
    ]


def test_a_plan_that_fails_open_has_no_unreachable_route() -> None:
    open_plan = replace(CLIENT, is_fail_closed=False)
    assert [str(route) for route in wanted_routes(open_plan)] == [
        "default dev eng0 src 192.168.0.1 table 6978 protocol 78 congctl reno features ecn"
    ]
    assert wanted_rules(open_plan) == wanted_rules(CLIENT)


def test_a_port_captured_everywhere_needs_no_rule_for_one_network() -> None:
    """The kernel would take the general rule for a duplicate of the specific one."""
    both = replace(CLIENT, captures=parse_captures(["10.0.0.0/8:7", "7", "udp/10.0.0.0/8:7"]))
    general = replace(CLIENT, captures=parse_captures(["0.0.0.0/0:7", "udp/10.0.0.0/8:7"]))
    assert sorted(map(str, wanted_rules(both))) == sorted(map(str, wanted_rules(general)))
