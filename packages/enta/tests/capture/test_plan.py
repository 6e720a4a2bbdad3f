"""The grammar of --capture and --replay, and what a plan refuses before anything on the host changes."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from typing import Any

import pytest
from enlink.errors import ConfigError, UsageError
from enta.capture.plan import Capture, Identity, Plan, Replay, parse_captures, parse_replays
from hypothesis import given
from hypothesis import strategies as st

CLIENT = Plan("client", IPv4Interface("192.168.0.1/24"), IPv4Address("192.168.0.254"), parse_captures(["7"]))
SERVER = Plan("server", IPv4Interface("192.168.0.254/24"), IPv4Address("192.168.0.1"), replays=parse_replays(["7"]))

ports = st.integers(1, 65535)
protocols = st.sampled_from(["tcp", "udp"])
networks = st.builds(
    lambda address, length: IPv4Network((int(address) >> (32 - length) << (32 - length), length)),
    st.ip_addresses(v=4).filter(lambda address: not address.is_loopback),
    st.integers(8, 32),
)


def test_one_port_on_each_side_is_exactly_the_originals_translation() -> None:
    assert parse_captures(["7"]) == (Capture("tcp", 7, 6978),)
    assert parse_replays(["7"]) == (Replay("tcp", 7, 6978),)


def test_options_without_a_transit_port_count_from_6978_whatever_the_others_say() -> None:
    captures = parse_captures(["80", "udp/53", "443:7000", "tcp/25"])
    assert [capture.transit for capture in captures] == [6978, 6979, 7000, 6980]
    assert [replay.transit for replay in parse_replays(["80", "443:9", "udp/53"])] == [6978, 9, 6979]


def test_a_bare_address_is_one_host_and_a_network_is_itself() -> None:
    (host, network) = parse_captures(["10.1.2.3:8080", "udp/10.1.0.0/16:8080:6990"])
    assert host == Capture("tcp", 8080, 6978, IPv4Network("10.1.2.3/32"))
    assert network == Capture("udp", 8080, 6990, IPv4Network("10.1.0.0/16"))


@given(st.lists(st.tuples(protocols, st.none() | networks, ports, st.none() | ports), unique_by=lambda item: item[:3]))
def test_what_is_written_by_the_grammar_is_read_back(
    options: list[tuple[str, IPv4Network | None, int, int | None]],
) -> None:
    texts = [
        f"{protocol}/{f'{network}:' if network else ''}{port}{f':{transit}' if transit else ''}"
        for protocol, network, port, transit in options
    ]
    captures = parse_captures(texts)
    read = [(capture.protocol, capture.destination, capture.port) for capture in captures]
    assert read == [option[:3] for option in options]
    assert all(option[3] in {None, capture.transit} for option, capture in zip(options, captures, strict=True))
    assert [str(capture) for capture in captures] == [
        text.rsplit(":", 1)[0] if transit else text for text, (*_, transit) in zip(texts, options, strict=True)
    ]


@given(st.text())
def test_any_text_is_read_or_refused_in_one_line_that_quotes_it(text: str) -> None:
    refusals: list[str] = []
    for parse in (parse_captures, parse_replays):
        try:
            parse([text])
        except (UsageError, ConfigError) as error:
            refusals.append(str(error))
    assert all(repr(text) in refusal and "\n" not in refusal for refusal in refusals)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "write [PROTO/][CIDR:]PORT[:TRANSIT]"),
        ("seven", "write [PROTO/][CIDR:]PORT[:TRANSIT]"),
        ("7:8:9", "write [PROTO/][CIDR:]PORT[:TRANSIT]"),
        ("-7", "write [PROTO/][CIDR:]PORT[:TRANSIT]"),
        ("7\n", "write [PROTO/][CIDR:]PORT[:TRANSIT]"),
        ("٧", "write [PROTO/][CIDR:]PORT[:TRANSIT]"),
        ("2001:db8::1:7", "write [PROTO/][CIDR:]PORT[:TRANSIT]"),
        ("sctp/7", "protocol 'sctp' is neither tcp nor udp"),
        ("0", "port 0 is not between 1 and 65535"),
        ("65536", "port 65536 is not between 1 and 65535"),
        ("7:0", "port 0 is not between 1 and 65535"),
        ("999999999999999999", "port 999999999999999999 is not between 1 and 65535"),
        ("10.1.0.1/16:7", "has host bits set"),
        ("10.1.0.0/33:7", "10.1.0.0/33"),
        ("300.1.0.0:7", "300.1.0.0"),
        ("[2001:db8::/129]:7", "2001:db8::/129"),
    ],
)
def test_a_malformed_option_is_wrong_usage(text: str, reason: str) -> None:
    with pytest.raises(UsageError) as refusal:
        parse_captures([text])
    assert repr(text) in str(refusal.value)
    assert reason in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [("[2001:db8::]:7", "IPv6 is not captured yet"), ("127.0.0.1:7", "this host's own addresses are never captured")],
)
def test_a_destination_that_cannot_be_captured_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        parse_captures([text])


def test_one_port_is_captured_once_unless_its_destinations_differ() -> None:
    with pytest.raises(UsageError, match="tcp/7 is captured already"):
        parse_captures(["7", "udp/7", "tcp/7:9000"])
    assert len(parse_captures(["7", "udp/7", "10.0.0.0/8:7", "10.0.0.0/9:7"])) == 4


def test_several_transit_ports_may_lead_to_one_server_but_never_from_an_address() -> None:
    assert parse_replays(["7", "7:9000"]) == (Replay("tcp", 7, 6978), Replay("tcp", 7, 9000))
    assert str(Replay("udp", 53, 6978)) == "udp/53"
    with pytest.raises(UsageError, match=r"10\.0\.0\.0/8:7': takes no address"):
        parse_replays(["10.0.0.0/8:7"])


def test_a_plan_puts_the_most_specific_destination_first() -> None:
    plan = replace(CLIENT, captures=parse_captures(["7", "10.0.0.0/8:7", "10.1.0.0/16:7", "udp/7"]))
    assert [str(capture) for capture in plan.captures] == ["tcp/10.1.0.0/16:7", "tcp/10.0.0.0/8:7", "tcp/7", "udp/7"]


def test_a_plan_is_known_by_its_names_and_numbers() -> None:
    plan = replace(CLIENT, instance="web", tun_name="web0", table=7, mark=8)
    assert plan.identity == Identity("web", "web0", 7, 8)
    assert (plan.identity.capture_table_name, plan.identity.guard_table_name) == ("eng_web", "eng_web_guard")


@pytest.mark.proves("D17")
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"instance": ""}, "--instance ''"),
        ({"instance": "a" * 16}, f"--instance '{'a' * 16}'"),
        ({"instance": "a;b"}, "--instance 'a;b'"),
        ({"instance": "Web"}, "--instance 'Web'"),
        ({"instance": "web_guard"}, "names that end in _guard"),
        ({"tun_name": ""}, "--tun-name ''"),
        ({"tun_name": "e" * 16}, f"--tun-name '{'e' * 16}'"),
        ({"tun_name": 'e"'}, "--tun-name 'e\"'"),
        ({"tun_name": "-e"}, "--tun-name '-e'"),
        ({"tun_name": "a/b"}, "--tun-name 'a/b'"),
        ({"tun_name": ".."}, "the kernel keeps this name"),
        ({"tun_name": "all"}, "the kernel keeps this name"),
        ({"mtu": 575}, "--mtu 575"),
        ({"mtu": 65536}, "--mtu 65536"),
        ({"table": 0}, "--table 0"),
        ({"table": 254}, "--table 254"),
        ({"table": 2**32}, "--table 4294967296"),
        ({"mark": 0}, "--mark 0x0"),
        ({"mark": 2**32}, "--mark 0x100000000"),
        ({"address": IPv4Interface("192.168.0.1/31")}, "--tun-mask 255.255.255.254"),
        ({"address": IPv4Interface("192.168.0.1/7")}, "--tun-mask 254.0.0.0"),
        ({"address": IPv4Interface("224.0.0.1/24")}, "--tun-addr 224.0.0.1: use an ordinary unicast address"),
        ({"peer": IPv4Address("127.0.0.1")}, "--peer-addr 127.0.0.1: use an ordinary unicast address"),
        ({"peer": IPv4Address("0.0.0.0")}, "--peer-addr 0.0.0.0: use an ordinary unicast address"),
        ({"peer": IPv4Address("169.254.0.1")}, "--peer-addr 169.254.0.1: use an ordinary unicast address"),
        ({"address": IPv4Interface("192.168.0.0/24")}, "--tun-addr 192.168.0.0: this is the network or broadcast"),
        ({"peer": IPv4Address("192.168.0.255")}, "--peer-addr 192.168.0.255: this is the network or broadcast"),
        ({"peer": IPv4Address("192.168.1.2")}, "--peer-addr 192.168.1.2 is not inside the TUN's network"),
        ({"peer": IPv4Address("192.168.0.1")}, "--peer-addr 192.168.0.1 is the same as --tun-addr"),
        ({"captures": parse_captures(["7", "8:6978"])}, "transit port 6978 is used twice"),
        ({"replays": SERVER.replays}, "--replay tcp/7: a client captures"),
    ],
)
def test_a_plan_with_an_unusable_value_is_wrong_usage(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError) as refusal:
        replace(CLIENT, **changes)
    assert reason in str(refusal.value)


def test_a_client_hears_its_peer_and_a_server_every_host_of_the_network() -> None:
    assert CLIENT.senders == (CLIENT.peer, CLIENT.peer)
    assert SERVER.senders == (IPv4Address("192.168.0.1"), IPv4Address("192.168.0.254"))


def test_a_server_captures_nothing() -> None:
    with pytest.raises(UsageError, match="--capture tcp/7: a server replays"):
        replace(SERVER, captures=CLIENT.captures)


@pytest.mark.parametrize(
    "changes",
    [
        {"instance": "a_-9", "tun_name": "e" * 15, "mtu": 576, "table": 1, "mark": 1},
        {"instance": "a" * 15, "tun_name": ".x", "mtu": 65535, "table": 2**32 - 1, "mark": 2**32 - 1},
        {"address": IPv4Interface("10.0.0.1/8"), "peer": IPv4Address("10.255.255.254")},
        {"address": IPv4Interface("10.0.0.1/30"), "peer": IPv4Address("10.0.0.2")},
    ],
)
def test_a_plan_takes_every_value_up_to_its_bounds(changes: dict[str, Any]) -> None:
    plan = replace(CLIENT, **changes)
    assert {name: getattr(plan, name) for name in changes} == changes
