"""What IP addresses are for: which are ordinary, and which have a special purpose that a name must not lead to."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network
from typing import Final, Literal, TypeAlias

Address: TypeAlias = IPv4Address | IPv6Address
Network: TypeAlias = IPv4Network | IPv6Network
Purpose: TypeAlias = Literal[
    "metadata", "loopback", "link_local", "unspecified", "multicast", "reserved", "translated", "private"
]

MAPPED: Final = IPv6Network("::ffff:0:0/96")  # RFC 4291, 2.5.5.2: IPv4 written as IPv6

# RFC 6890 and its registries. 64:ff9b:1::/48 (RFC 8215) and Teredo hide IPv4 addresses where nobody else can tell. The
# metadata services are in the documentation of AWS (EC2, ECS, EKS), Alibaba, Azure, Oracle and Google Cloud.
_SPECIAL: Final[dict[Purpose, tuple[str, ...]]] = {
    "metadata": (
        *("169.254.169.254", "169.254.170.2", "169.254.170.23", "fd00:ec2::254", "fd00:ec2::23"),
        *("100.100.100.200", "168.63.129.16", "192.0.0.192", "fd20:ce::254"),
    ),
    "loopback": ("127.0.0.0/8", "::1"),
    "link_local": ("169.254.0.0/16", "fe80::/10"),
    "unspecified": ("0.0.0.0/8", "::"),
    "multicast": ("224.0.0.0/4", "ff00::/8"),
    "reserved": ("240.0.0.0/4",),
    "translated": ("64:ff9b:1::/48", "2001::/32"),
    "private": (
        *("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "192.0.0.0/24"),
        *("fc00::/7", "fec0::/10"),
    ),
}
# Where IPv6 carries an IPv4 address, and how far from the right: IPv4-compatible, NAT64 (RFC 6052) and 6to4 (RFC 3056).
_CARRIERS: Final = ((IPv6Network("::/96"), 0), (IPv6Network("64:ff9b::/96"), 0), (IPv6Network("2002::/16"), 80))


def _forms(network: Network) -> Iterator[Network]:
    yield network
    if isinstance(network, IPv4Network):
        for carrier, shift in _CARRIERS:
            bits = int(carrier.network_address) | int(network.network_address) << shift
            yield IPv6Network((bits, carrier.prefixlen + network.prefixlen))


# The longest prefix decides, so it comes first: ::1 is loopback before it is a form of 0.0.0.0/8.
_RANGES: Final[list[tuple[Network, Purpose]]] = sorted(
    (
        (form, purpose)
        for purpose, networks in _SPECIAL.items()
        for network in networks
        for form in _forms(ip_network(network))
    ),
    key=lambda entry: -entry[0].prefixlen,
)


def plain(address: Address) -> Address:
    """Return the address itself: without a zone, and as IPv4 if it is IPv4 written as IPv6."""
    if isinstance(address, IPv4Address):
        return address
    return address.ipv4_mapped or IPv6Address(int(address))


def purpose_of(address: Address) -> tuple[Purpose, int] | None:
    """Return the special purpose of a `plain` address and the length of the prefix that has it; None for others."""
    return next(((purpose, network.prefixlen) for network, purpose in _RANGES if address in network), None)
