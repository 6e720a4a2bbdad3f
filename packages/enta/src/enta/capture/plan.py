"""What an agent will do to this host, as a value: which packets, which addresses, which names and numbers.

The grammar of the options::

    --capture [PROTO/][CIDR:]PORT[:TRANSIT]      PROTO is tcp (default) or udp; a bare address is a /32;
    --replay  [PROTO/]PORT[:TRANSIT]             IPv6 is written in brackets: [2001:db8::/32]:443

The transit port is what a packet carries inside the tunnel. The n-th option that names none gets 6977 + n, whatever
the others say, so one port on each side is exactly the original's 7 -> 192.168.0.254:6978 -> 7.

Does no I/O and changes nothing: `nftables`, `iptables` and `routing` turn a plan into rules.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Network, ip_network
from typing import Literal

from enlink.errors import ConfigError, UsageError

TransportProtocol = Literal["tcp", "udp"]
Role = Literal["client", "server"]

# Linux limits.
MAX_INTERFACE_NAME_LENGTH = 15  # IFNAMSIZ - 1
MIN_MTU = 576  # RFC 791: what every IPv4 host must accept
RESERVED_DEVICE_NAMES = frozenset({".", "..", "all", "default", "lo"})  # taken in /sys/class/net, /proc/sys/net/*/conf
MAX_MTU = 65535  # IPv4 total length, and the most that a frame carries
RESERVED_TABLES = frozenset({0, 253, 254, 255})  # unspec, default, main, local: /etc/iproute2/rt_tables

MAX_TUN_PREFIX_LENGTH = 30  # the shortest network with two addresses besides its own and its broadcast address

# Choices of ours.
MIN_TUN_PREFIX_LENGTH = 8  # anything shorter is a default route in disguise
FIRST_TRANSIT_PORT = 6978  # the original's
ROUTE_PROTOCOL = 78  # marks rules and routes as ours; unassigned in /etc/iproute2/rt_protos
UPLINK_RULE_PRIORITY = 6977  # before the capture rules: the uplink itself is never captured
CAPTURE_RULE_PRIORITY = 6978

_PROTOCOLS: dict[str, TransportProtocol] = {"tcp": "tcp", "udp": "udp"}
_INSTANCE = re.compile(r"[a-z0-9_-]{1,15}")
_INTERFACE_NAME = re.compile(rf"[A-Za-z0-9_.][A-Za-z0-9_.-]{{0,{MAX_INTERFACE_NAME_LENGTH - 1}}}")
_SPEC = re.compile(
    r"(?:(?P<protocol>[a-z]+)/)?"
    r"(?:(?:\[(?P<v6>[^\]]*)\]|(?P<v4>[0-9./]+\.[0-9./]+)):)?"
    r"(?P<port>[0-9]+)"
    r"(?::(?P<transit>[0-9]+))?"
)


@dataclass(frozen=True, slots=True)
class Capture:
    """Packets of local programs to *port* (of any address, or of *destination*) enter the tunnel as *transit*."""

    protocol: TransportProtocol
    port: int
    transit: int
    destination: IPv4Network | None = None

    def __str__(self) -> str:
        where = f"{self.destination}:" if self.destination else ""
        return f"{self.protocol}/{where}{self.port}"

    @property
    def prefix_length(self) -> int:
        """How specific the destination is, 0 to 32."""
        return self.destination.prefixlen if self.destination else 0


@dataclass(frozen=True, slots=True)
class Replay:
    """Packets that leave the tunnel with *transit* are handed to the local server on *port*."""

    protocol: TransportProtocol
    port: int
    transit: int

    def __str__(self) -> str:
        return f"{self.protocol}/{self.port}"


@dataclass(frozen=True, slots=True)
class Identity:
    """The names and numbers that tell one agent's changes from another's: enough to undo them without its plan."""

    instance: str
    tun_name: str
    table: int
    mark: int

    @property
    def capture_table_name(self) -> str:
        """The nftables table that captures or replays; the kernel deletes it when its owner dies."""
        return f"eng_{self.instance}"

    @property
    def guard_table_name(self) -> str:
        """The nftables table that keeps captured traffic off every other device; it outlives a crash."""
        return f"eng_{self.instance}_guard"


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything an agent puts on a host. Two agents in one network namespace differ in each of the names and numbers.

    Attributes:
        address: the TUN's own address and prefix length.
        peer: the TUN address of the agent at the other end, inside the same prefix.
        captures: of a client only; most specific destination first, whatever order they are given in.
        replays: of a server only.
        table: routing table of the traffic for the tunnel.
        mark: packet mark of the agent's own uplink and of everything else that must not be captured.
        is_fail_closed: the guard and the unreachable route are installed, and outlive a crash.
    """

    role: Role
    address: IPv4Interface
    peer: IPv4Address
    captures: tuple[Capture, ...] = ()
    replays: tuple[Replay, ...] = ()
    instance: str = "default"
    tun_name: str = "eng0"
    mtu: int = MAX_MTU
    table: int = 6978
    mark: int = 0x6978
    is_fail_closed: bool = True

    def __post_init__(self) -> None:
        # A frozen value is set once, here. Firewalls take the first rule that matches, so 10.0.0.0/8:80 goes before 80.
        object.__setattr__(self, "captures", tuple(sorted(self.captures, key=lambda capture: -capture.prefix_length)))
        if not _INSTANCE.fullmatch(self.instance):
            raise UsageError(f"--instance {self.instance!r}: use 1 to 15 of a-z 0-9 _ -")
        if self.instance.endswith("_guard"):
            raise UsageError(f"--instance {self.instance!r}: names that end in _guard belong to guards, choose another")
        if not _INTERFACE_NAME.fullmatch(self.tun_name):
            raise UsageError(f"--tun-name {self.tun_name!r}: use 1 to 15 of A-Z a-z 0-9 _ . -, the first no -")
        if self.tun_name in RESERVED_DEVICE_NAMES:
            raise UsageError(f"--tun-name {self.tun_name!r}: the kernel keeps this name for itself, choose another")
        if not MIN_MTU <= self.mtu <= MAX_MTU:
            raise UsageError(f"--mtu {self.mtu}: use {MIN_MTU} to {MAX_MTU}")
        if not 0 < self.table < 2**32 or self.table in RESERVED_TABLES:
            raise UsageError(f"--table {self.table}: use a number from 1 to 4294967295 other than 253, 254 and 255")
        if not 0 < self.mark < 2**32:
            raise UsageError(f"--mark {self.mark:#x}: use a number from 1 to 0xffffffff")
        if self.captures and self.role == "server":
            raise UsageError(f"--capture {self.captures[0]}: a server replays, use --replay or enta client")
        if self.replays and self.role == "client":
            raise UsageError(f"--replay {self.replays[0]}: a client captures, use --capture or enta server")
        self._check_addresses()
        transits = [*(capture.transit for capture in self.captures), *(replay.transit for replay in self.replays)]
        for transit in transits:
            if transits.count(transit) > 1:
                raise UsageError(f"transit port {transit} is used twice: give each its own, as in 443:{transit + 1}")

    def _check_addresses(self) -> None:
        network = self.address.network
        if not MIN_TUN_PREFIX_LENGTH <= network.prefixlen <= MAX_TUN_PREFIX_LENGTH:
            raise UsageError(f"--tun-mask {network.netmask}: use 255.0.0.0 to 255.255.255.252, room for two addresses")
        for option, address in (("--tun-addr", self.address.ip), ("--peer-addr", self.peer)):
            if address.is_multicast or address.is_loopback or address.is_unspecified or address.is_link_local:
                raise UsageError(f"{option} {address}: use an ordinary unicast address")
            if address in (network.network_address, network.broadcast_address):
                raise UsageError(f"{option} {address}: this is the network or broadcast address of {network}")
        if self.peer not in network:
            raise UsageError(f"--peer-addr {self.peer} is not inside the TUN's network {network}")
        if self.peer == self.address.ip:
            raise UsageError(f"--peer-addr {self.peer} is the same as --tun-addr: give the other agent's address")

    @property
    def senders(self) -> tuple[IPv4Address, IPv4Address]:
        """The first and the last address that packets out of the tunnel may come from.

        A client hears its peer only; a server, every host of the TUN's network. The server's own address is among them:
        a range has no holes.
        """
        if self.role == "client":
            return self.peer, self.peer
        network = self.address.network
        return network.network_address + 1, network.broadcast_address - 1

    @property
    def identity(self) -> Identity:
        """What must be known to undo the plan after a crash."""
        return Identity(self.instance, self.tun_name, self.table, self.mark)


def parse_captures(texts: Sequence[str]) -> tuple[Capture, ...]:
    """Parse every ``--capture`` of a command line, in order.

    Raises:
        UsageError: malformed, out of range, or the same port captured twice.
        ConfigError: an IPv6 destination, which can be guarded but not captured yet.
    """
    captures: list[Capture] = []
    for text, (protocol, destination, port, transit) in _parse_all("--capture", texts):
        for other in captures:
            if (other.protocol, other.destination, other.port) == (protocol, destination, port):
                raise UsageError(f"--capture {text!r}: {other} is captured already")
        captures.append(Capture(protocol, port, transit, destination))
    return tuple(captures)


def parse_replays(texts: Sequence[str]) -> tuple[Replay, ...]:
    """Parse every ``--replay`` of a command line, in order.

    Several transit ports may lead to one server port.

    Raises:
        UsageError: malformed, out of range, or with a destination.
    """
    replays: list[Replay] = []
    for text, (protocol, destination, port, transit) in _parse_all("--replay", texts):
        if destination is not None:
            raise UsageError(f"--replay {text!r}: takes no address, write [PROTO/]PORT[:TRANSIT]")
        replays.append(Replay(protocol, port, transit))
    return tuple(replays)


_Parsed = tuple[TransportProtocol, IPv4Network | None, int, int]


def _parse_all(option: str, texts: Sequence[str]) -> list[tuple[str, _Parsed]]:
    parsed: list[tuple[str, _Parsed]] = []
    next_transit = FIRST_TRANSIT_PORT
    for text in texts:
        match = _SPEC.fullmatch(text)
        if match is None:
            raise UsageError(
                f"{option} {text!r}: write [PROTO/][CIDR:]PORT[:TRANSIT], as in 7 or udp/53 or 10.1.0.0/16:8080:6990"
            )
        protocol = _protocol(option, text, match["protocol"] or "tcp")
        port = _port(option, text, match["port"])
        if match["transit"] is None:
            transit, next_transit = next_transit, next_transit + 1
        else:
            transit = _port(option, text, match["transit"])
        destination = _network(option, text, match["v4"] if match["v6"] is None else match["v6"])
        if isinstance(destination, IPv6Network):
            raise ConfigError(
                f"{option} {text!r}: IPv6 is not captured yet; leave the address out, and IPv6 to this port is blocked"
            )
        if destination is not None and destination.is_loopback:
            raise ConfigError(f"{option} {text!r}: this host's own addresses are never captured, name another network")
        parsed.append((text, (protocol, destination, port, transit)))
    return parsed


def _protocol(option: str, text: str, name: str) -> TransportProtocol:
    protocol = _PROTOCOLS.get(name)
    if protocol is None:
        raise UsageError(f"{option} {text!r}: protocol {name!r} is neither tcp nor udp")
    return protocol


def _port(option: str, text: str, digits: str) -> int:
    port = int(digits) if len(digits) <= 5 else 0
    if not 0 < port < 65536:
        raise UsageError(f"{option} {text!r}: port {digits} is not between 1 and 65535")
    return port


def _network(option: str, text: str, network: str | None) -> IPv4Network | IPv6Network | None:
    if network is None:
        return None
    try:
        return ip_network(network)
    except ValueError as error:
        raise UsageError(f"{option} {text!r}: {error}") from error
