"""A listing that stays the same as long as nobody configures anything, and shows whatever anybody does."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from enlink.testing import state
from enlink.testing.hosts import Host, Network
from enlink.testing.state import difference, network_state


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Network() as network:
        host, other = network.host("host"), network.host("other")
        network.connect(host, "10.0.0.1/24", other, "10.0.0.2/24")
        yield host


@pytest.mark.parametrize(
    ("command", "undo", "line"),
    [
        ("ip link add one type veth peer two", "ip link delete one", "two@one: <BROADCAST,MULTICAST"),
        ("ip address add 10.7.0.1/24 dev lo", "ip address delete 10.7.0.1/24 dev lo", "lo    inet 10.7.0.1/24"),
        ("ip rule add fwmark 7 lookup 7", "ip rule delete fwmark 7", "32765:\tfrom all fwmark 0x7 lookup 7"),
        ("ip -6 rule add fwmark 7 lookup 7", "ip -6 rule delete fwmark 7", "32765:\tfrom all fwmark 0x7 lookup 7"),
        ("ip route add 10.8.0.0/16 dev lo table 7", "ip route flush table 7", "10.8.0.0/16 dev lo table 7"),
        ("ip -6 route add fd08::/16 dev lo table 7", "ip -6 route flush table 7", "fd08::/16 dev lo table 7"),
        ("nft add table inet seven", "nft delete table inet seven", "table inet seven {"),
        ("sysctl -qw net.ipv4.ip_forward=1", "sysctl -qw net.ipv4.ip_forward=0", "net.ipv4.ip_forward = 1"),
    ],
)
def test_every_change_is_seen_and_so_is_that_it_was_undone(host: Host, command: str, undo: str, line: str) -> None:
    before = network_state(host)
    host.run(*command.split())
    assert any(change.startswith(f"+ {line}") for change in difference(before, network_state(host)))
    host.run(*undo.split())
    assert difference(before, network_state(host)) == []


@pytest.mark.parametrize("command", ["iptables-legacy", "ip6tables-legacy"])
def test_a_rule_of_legacy_iptables_is_seen(host: Host, command: str) -> None:
    """The rest of its table as well, which stays behind."""
    before = network_state(host)
    host.run(command, "-t", "mangle", "-A", "OUTPUT", "-j", "MARK", "--set-mark", "7")
    assert "+ -A OUTPUT -j MARK --set-xmark 0x7/0xffffffff" in difference(before, network_state(host))


def test_traffic_changes_nothing(host: Host) -> None:
    """Neither the counters of rules nor the number of connections tell of a configuration."""
    host.run("nft", "add table inet seven; add chain inet seven out { type filter hook output priority 0; }")
    host.run("nft", "add rule inet seven out ct state new counter accept")
    host.run("iptables-legacy", "-A", "OUTPUT", "-j", "ACCEPT")
    before = network_state(host)
    with host.entered(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as program:
        program.sendto(b"x", ("10.0.0.2", 7))
    assert network_state(host) == before


def test_what_went_is_told_from_what_came() -> None:
    """As often as it did, in whatever order the lines are."""
    assert difference(["a", "b", "b", "c"], ["c", "b", "d"]) == ["- a", "- b", "+ d"]
    assert difference(["a", "b"], ["b", "a"]) == []


def test_an_address_that_stays_tentative_is_no_state(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """IPv6 makes sure that an address is unique, and nothing can be compared before that."""
    monkeypatch.setattr(state, "_FAR_BEYOND_S", 0.0)
    monkeypatch.setattr(state, "_COMMANDS", ("echo an address that is tentative",))
    with pytest.raises(TimeoutError, match="stays tentative"):
        network_state(host)
