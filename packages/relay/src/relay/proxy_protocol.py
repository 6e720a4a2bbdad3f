"""Encode the header that tells a server who connected to its proxy: PROXY protocol version 2. Does no I/O.

The specification has no address family for vsock. A connection that came over vsock is announced with the family
UNSPEC, with which a server that accepts it keeps to the address that it sees, and with a TLV of ours for the rest::

    0xE5  length 16   cid of the peer, its port, cid of the listening side, its port: four u32, big-endian

0xE5 is in the range that the specification leaves to applications, and not one of those known to be taken there (0xE0
Google Cloud, 0xEA AWS, 0xEE Azure). Where the listening side does not know its own cid, that is 4294967295
(VMADDR_CID_ANY). A TLV for an id of the connection (PP2_TYPE_UNIQUE_ID) can be added to each kind of header.

Source: proxy-protocol.txt of HAProxy, version 2, sections 2.2, 2.2.5 and 2.2.8.
"""

from __future__ import annotations

import struct
from dataclasses import astuple, dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Final, TypeAlias

from relay.addresses import Address, plain

SIGNATURE: Final = b"\r\n\r\n\0\r\nQUIT\n"
_LOCAL: Final = 0x20  # version 2 in the upper half
_PROXY: Final = 0x21
_UNSPEC: Final = 0x00
_TCP4: Final = 0x11
_TCP6: Final = 0x21
_UNIX_STREAM: Final = 0x31
_UNIX_ADDRESS_BYTES: Final = 108
_UNIQUE_ID: Final = 0x05
UNIQUE_ID_LIMIT_BYTES: Final = 128

# Choices of ours.
VSOCK_TLV: Final = 0xE5


@dataclass(frozen=True, slots=True)
class TcpConnection:
    """Who connected, and where it was accepted."""

    peer: Address
    peer_port: int
    local: Address
    local_port: int


@dataclass(frozen=True, slots=True)
class UnixConnection:
    """A path, ``@`` and an abstract name, or nothing for a socket without one, as peers mostly are."""

    peer: str
    local: str


@dataclass(frozen=True, slots=True)
class VsockConnection:
    """Who connected, and where it was accepted."""

    peer_cid: int
    peer_port: int
    local_cid: int
    local_port: int


Connection: TypeAlias = TcpConnection | UnixConnection | VsockConnection


def encode_header(connection: Connection | None, unique_id: bytes = b"") -> bytes:
    """Return the header for a connection; without one, that for the proxy's own, such as those that probe a server.

    Args:
        connection: what came in. Of IPv4 and IPv6 mixed, both become IPv6.
        unique_id: names the connection wherever it comes by; up to 128 bytes, none if empty.

    Raises:
        ValueError: *unique_id* or the path of a socket is too long, or a number is out of its range.
    """
    if len(unique_id) > UNIQUE_ID_LIMIT_BYTES:
        raise ValueError(f"a unique id has at most {UNIQUE_ID_LIMIT_BYTES} bytes, not {len(unique_id)}")
    command = _LOCAL if connection is None else _PROXY
    try:
        family, body = _addresses(connection)
    except struct.error as error:
        raise ValueError(f"{connection} has a number that is out of range") from error
    if unique_id:
        body += _tlv(_UNIQUE_ID, unique_id)
    return SIGNATURE + struct.pack(">BBH", command, family, len(body)) + body


def _addresses(connection: Connection | None) -> tuple[int, bytes]:
    """Return the byte for family and transport, and what it stands for."""
    if connection is None:
        return _UNSPEC, b""
    if isinstance(connection, UnixConnection):
        return _UNIX_STREAM, _unix_address(connection.peer) + _unix_address(connection.local)
    if isinstance(connection, VsockConnection):
        return _UNSPEC, _tlv(VSOCK_TLV, struct.pack(">4I", *astuple(connection)))
    peer, local = plain(connection.peer), plain(connection.local)
    ports = struct.pack(">HH", connection.peer_port, connection.local_port)
    if isinstance(peer, IPv4Address) and isinstance(local, IPv4Address):
        return _TCP4, peer.packed + local.packed + ports
    return _TCP6, _as_ipv6(peer) + _as_ipv6(local) + ports


def _as_ipv6(address: Address) -> bytes:
    return address.packed if isinstance(address, IPv6Address) else bytes(10) + b"\xff\xff" + address.packed


def _unix_address(path: str) -> bytes:
    encoded = path.encode("utf-8", "surrogateescape")  # as the os module decodes paths
    if encoded.startswith(b"@"):
        encoded = b"\0" + encoded[1:]
    if len(encoded) > _UNIX_ADDRESS_BYTES:
        raise ValueError(f"the path of a unix socket has at most {_UNIX_ADDRESS_BYTES} bytes: {path!r}")
    return encoded.ljust(_UNIX_ADDRESS_BYTES, b"\0")


def _tlv(kind: int, value: bytes) -> bytes:
    return struct.pack(">BH", kind, len(value)) + value
