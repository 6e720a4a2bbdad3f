"""Decide what may be dialled: rules and their spellings, and verdicts with reasons. Does no I/O: see resolver.py.

The grammar of a rule::

    RULE     [tcp://]HOST:PORTS | [vsock://]CID:PORTS
    HOST     a name | *.DOMAIN | 192.0.2.0/24 | 192.0.2.1 | [2001:db8::/32] | [2001:db8::1]
    CID      a number | vsock://hypervisor, vsock://local, vsock://host, vsock://parent, vsock://* (any)
    PORTS    443 | 8000-8010 | *

A number alone is a CID, since no name and no address is spelt so; the words for CIDs need ``vsock://``, since they
could be names. ``*.DOMAIN`` matches every name below DOMAIN, at any depth, and not DOMAIN itself. What no rule matches
is refused. Sockets of the unix family are guarded by the file system, not here.

A name says nothing about where it leads, which is for whoever answers for it in the DNS to say. So each address that it
resolves to is judged as well: an ordinary one passes, one with a special purpose (see addresses.py) does not, and
once a name has led to a public address, private ones are refused too, for good. Rules for addresses open these, but
only when they mean them: ``0.0.0.0/0`` does not open 169.254.169.254; a network inside the special range does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Final, Literal, TypeAlias

from enlink.endpoint import VSOCK_PORT_ANY, Vsock, parse_dial
from enlink.errors import UsageError

from relay.addresses import MAPPED, Address, Network, Purpose, plain, purpose_of

Reason: TypeAlias = Literal["by_name", "by_address", "by_cid", "not_listed", "rebind"] | Purpose

_TCP_PORTS: Final = (1, 65535)
_VSOCK_PORTS: Final = (0, VSOCK_PORT_ANY - 1)

_DIGITS = re.compile(r"[0-9]{1,10}")
_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME = re.compile(rf"(?=.{{1,253}}\Z)(?:{_LABEL}\.)*{_LABEL}")
_NUMERIC_END = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)")  # what inet_aton(3) might take for an address


@dataclass(frozen=True, slots=True)
class Ports:
    """The ports from ``first`` to ``last``, both included."""

    first: int
    last: int

    def __contains__(self, port: int) -> bool:
        return self.first <= port <= self.last

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


@dataclass(frozen=True, slots=True)
class NameRule:
    """Allows a name as `canonical_name` gives it or, with ``is_wildcard``, every name below it."""

    name: str
    ports: Ports
    is_wildcard: bool = False

    def matches(self, name: str, port: int) -> bool:
        """Tell whether the rule allows this canonical name at this port."""
        return port in self.ports and (name.endswith(f".{self.name}") if self.is_wildcard else name == self.name)

    def __str__(self) -> str:
        return f"{'*.' if self.is_wildcard else ''}{self.name}:{self.ports}"


@dataclass(frozen=True, slots=True)
class NetworkRule:
    """Allows the addresses of a network."""

    network: Network
    ports: Ports

    def matches(self, address: Address, port: int) -> bool:
        """Tell whether the rule covers this address at this port."""
        return port in self.ports and address in self.network

    def __str__(self) -> str:
        is_one = self.network.num_addresses == 1
        network = str(self.network.network_address if is_one else self.network)
        return f"[{network}]:{self.ports}" if self.network.version == 6 else f"{network}:{self.ports}"


@dataclass(frozen=True, slots=True)
class VsockRule:
    """Allows vsock ports of one CID; of every CID where it is None."""

    cid: int | None
    ports: Ports

    def matches(self, cid: int, port: int) -> bool:
        """Tell whether the rule allows this vsock address."""
        return port in self.ports and self.cid in (None, cid)

    def __str__(self) -> str:
        return f"vsock://{'*' if self.cid is None else self.cid}:{self.ports}"


Rule: TypeAlias = NameRule | NetworkRule | VsockRule

_WORDS: Final[dict[Purpose, str]] = {
    "metadata": "a cloud's metadata service",
    "loopback": "this machine itself",
    "link_local": "a link-local address",
    "unspecified": "no machine's address",
    "multicast": "the address of a group",
    "reserved": "a reserved address",
    "translated": "an address that hides another",
    "private": "a private address, where the name has public ones",
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether something may be dialled, why as a word for counters, and in a sentence for people."""

    is_allowed: bool
    reason: Reason
    text: str


def parse_rule(text: str) -> Rule:
    """Parse one rule of the grammar above.

    Raises:
        UsageError: any other spelling.
    """
    scheme, separator, rest = text.rpartition("://")
    if separator and scheme not in ("tcp", "vsock"):
        raise UsageError(f"{text!r}: {scheme}:// is not known here, write HOST:PORT or vsock://CID:PORT")
    host, colon, ports = rest.rpartition(":")
    if not colon or rest.endswith("]"):
        raise UsageError(
            f"{text!r} names no port: write it as in {rest or 'example.com'}:443, or {rest or '*'}:* for any"
        )
    if scheme == "vsock" or (not scheme and _DIGITS.fullmatch(host)):
        return VsockRule(_parse_cid(text, host), _parse_ports(text, ports, *_VSOCK_PORTS))
    return _rule(text, host, _parse_ports(text, ports, *_TCP_PORTS))


def rule_for(host: str, port: int) -> Rule:
    """Return the rule that allows exactly one TCP target, given as a name or as an address without brackets.

    Raises:
        UsageError: *host* is neither.
    """
    return _rule(host, f"[{host.partition('%')[0]}]" if ":" in host else host, Ports(port, port), is_exact=True)


def canonical_name(name: str) -> str:
    """Return the one spelling of a host name by which names are compared: ASCII, lower case, no dot at the end.

    Raises:
        UsageError: it is no host name.
    """
    canonical = name.lower().removesuffix(".")
    if not name.isascii():
        import idna  # its tables take 10 ms to load, and few names need them

        try:
            canonical = idna.encode(canonical, uts46=True).decode().lower().removesuffix(".")
        except idna.IDNAError as error:
            raise UsageError(f"{name!r} is no host name: {error}") from error
    if not _NAME.fullmatch(canonical) or _NUMERIC_END.fullmatch(canonical):
        raise UsageError(f"{name!r} is neither a host name nor an address")
    return canonical


class AllowList:
    """What may be dialled, and which names have ever led to a public address."""

    def __init__(self, rules: Iterable[Rule]) -> None:
        rules = list(rules)
        self._names = [rule for rule in rules if isinstance(rule, NameRule)]
        self._networks = [rule for rule in rules if isinstance(rule, NetworkRule)]
        self._vsock = [rule for rule in rules if isinstance(rule, VsockRule)]
        self._public: set[str] = set()

    def judge_host(self, host: str, port: int) -> Verdict:
        """Judge a TCP target as it is written; if it is a name, before it is resolved.

        A name that no rule lists passes where a rule for addresses has the port: `judge_answer` decides then.

        Raises:
            UsageError: *host* is neither a name nor an address.
        """
        try:
            address = plain(ip_address(host))
        except ValueError:
            name = canonical_name(host)
        else:
            return self._judge(address, port, None)
        if self._lists(name, port):
            return Verdict(True, "by_name", f"{name} port {port} is allowed")
        if any(port in rule.ports for rule in self._networks):
            return Verdict(True, "by_address", f"{name} port {port} is allowed where its addresses are")
        return _not_listed(f"{name} port {port}", rule_for(name, port))

    def judge_answer(self, host: str, port: int, addresses: Sequence[Address]) -> list[Verdict]:
        """Judge each of the addresses to which the name *host* has been resolved now.

        From the first ordinary address on, which may be among these, the name is a public one, for good.

        Raises:
            UsageError: *host* is no name.
        """
        name = canonical_name(host)
        addresses = [plain(address) for address in addresses]
        if None in map(purpose_of, addresses):
            self._public.add(name)
        return [self._judge(address, port, name) for address in addresses]

    def judge_vsock(self, cid: int, port: int) -> Verdict:
        """Judge a vsock target."""
        if any(rule.matches(cid, port) for rule in self._vsock):
            return Verdict(True, "by_cid", f"CID {cid} port {port} is allowed")
        return _not_listed(f"CID {cid} port {port}", VsockRule(cid, Ports(port, port)))

    def _lists(self, name: str, port: int) -> bool:
        return any(rule.matches(name, port) for rule in self._names)

    def _judge(self, address: Address, port: int, name: str | None) -> Verdict:
        what = f"{address} port {port}" if name is None else f"{name} port {port} at {address}"
        is_listed = name is not None and self._lists(name, port)
        covering = [rule.network.prefixlen for rule in self._networks if rule.matches(address, port)]
        if not is_listed and not covering:
            return _not_listed(what, rule_for(str(address), port))
        special = purpose_of(address)
        if special is None or (special[0] == "private" and name not in self._public):
            return Verdict(True, "by_address" if covering else "by_name", f"{what} is allowed")
        purpose, length = special
        # Networks that share an address lie one in the other: a longer prefix means the special range, or a part of it.
        if max(covering, default=0) >= length:
            return Verdict(True, "by_address", f"{what} is allowed")
        # RFC 6761, 6.3: these names can lead nowhere else.
        if purpose == "loopback" and is_listed and f".{name}".endswith(".localhost"):
            return Verdict(True, "by_name", f"{what} is allowed")
        reason: Reason = "rebind" if name in self._public else purpose
        rule = rule_for(str(address), port)
        return Verdict(False, reason, f"{what} is refused: it is {_WORDS[purpose]}; if it is meant, allow {rule}")


def _not_listed(what: str, rule: Rule) -> Verdict:
    return Verdict(False, "not_listed", f"{what} is not allowed: no rule covers it, as {rule} would")


def _rule(text: str, host: str, ports: Ports, *, is_exact: bool = False) -> NameRule | NetworkRule:
    network = _parse_network(text, host)
    if network is not None:
        return NetworkRule(network, ports)
    is_wildcard = not is_exact and host.startswith("*.")
    try:
        return NameRule(canonical_name(host[2:] if is_wildcard else host), ports, is_wildcard)
    except UsageError as error:
        if "*" in host and not is_wildcard:
            raise UsageError(f"{text!r}: * stands for whole names below a domain only, as in *.example.com") from error
        raise UsageError(f"{text!r}: {error}, as in example.com, 192.0.2.0/24 or [2001:db8::/32]") from error


def _parse_network(text: str, host: str) -> Network | None:
    """Return the network that *host* is; None if it has the look of a name."""
    if "[" in host or ":" in host:
        if not (host.startswith("[") and host.endswith("]") and ":" in host):
            raise UsageError(f"{text!r}: an IPv6 network and its port are written as in [2001:db8::/32]:443")
        host = host[1:-1]
    elif "/" not in host and not re.fullmatch(r"[0-9]+(?:\.[0-9]+){3}", host):
        return None
    address, slash, prefix = host.partition("/")
    if "%" in host:
        raise UsageError(f"{text!r}: rules are for every network device, leave out the % and what follows")
    if slash and not _DIGITS.fullmatch(prefix):
        raise UsageError(f"{text!r}: {prefix!r} after the slash is no number of bits, as in 192.0.2.0/24")
    try:
        loose = ip_network(host, strict=False)
        is_whole = ip_address(address) == loose.network_address
    except ValueError as error:
        raise UsageError(f"{text!r}: {error}, as in 192.0.2.0/24 or [2001:db8::/32]") from error
    if not is_whole:
        raise UsageError(f"{text!r}: {host} is no whole network, write {loose} or the address alone")
    if isinstance(loose, IPv6Network) and loose.subnet_of(MAPPED):
        low = int(loose.network_address) & 0xFFFFFFFF
        return IPv4Network((low, loose.prefixlen - MAPPED.prefixlen))
    return loose


def _parse_cid(text: str, cid: str) -> int | None:
    if cid == "*":
        return None
    try:
        return parse_dial(f"vsock://{cid}:0", Vsock).cid
    except UsageError as error:
        raise UsageError(f"{text!r}: {cid!r} is neither a CID to dial nor * for any, as in vsock://16:8888") from error


def _parse_ports(text: str, ports: str, least: int, most: int) -> Ports:
    if ports == "*":
        return Ports(least, most)
    first, dash, last = ports.partition("-")
    numbers = [first, last] if dash else [first]
    if not all(_DIGITS.fullmatch(number) and least <= int(number) <= most for number in numbers):
        raise UsageError(
            f"{text!r}: {ports!r} is neither a port from {least} to {most}, nor a range as in 8000-8010, nor *"
        )
    if int(numbers[-1]) < int(first):
        raise UsageError(f"{text!r}: the range ends before it begins, write {last}-{first}")
    return Ports(int(first), int(numbers[-1]))
