"""The messages that neighbours on a link have for each other, as values and as bytes. Does no I/O.

A message is the payload of a frame of its own (see frame.py): ``0x00, type: u8, body``. Every byte is in
``docs/wire-format.md``.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface
from typing import Final

Interface = IPv4Interface | IPv6Interface

# The wire format.
VERSION: Final = 1
MAX_MTU_BYTES: Final = 65_535  # of 16 bits

# Choices of ours.
_MAX_HELLO_BYTES: Final = 1024
_MAX_NAME_BYTES: Final = 63
_MAX_TEXT_BYTES: Final = 255

_HELLO = struct.Struct("!BBH")  # version, role, MTU
_FIELD = struct.Struct("!BH")  # tag, length


class Role(IntEnum):
    """Who is speaking, as HELLO says it."""

    CLIENT_AGENT = 1
    SERVER_AGENT = 2
    GATEWAY = 3


class ControlType(IntEnum):
    """The second byte of a control message."""

    HELLO = 1
    ROUTES = 2  # reserved: who is where. Comes with the many-party router; skipped until then.
    KEEPALIVE = 3
    CLOSE = 4
    ERROR = 5
    PATH = 6


class _HelloTag(IntEnum):
    INSTANCE = 1
    TUN = 2


@dataclass(frozen=True, slots=True)
class Hello:
    """The first message on a link, both ways.

    Attributes:
        instance: the sender's instance name, at most 63 bytes of UTF-8.
        tun: the sender's TUN addresses with their prefix lengths; none for a gateway.
        mtu: the largest IP packet the sender takes, in bytes.
        version: of the wire format. A peer with a higher one still understands version 1.
    """

    role: Role
    instance: str = "default"
    tun: tuple[Interface, ...] = ()
    mtu: int = MAX_MTU_BYTES
    version: int = VERSION


@dataclass(frozen=True, slots=True)
class Keepalive:
    """I am alive; nothing else to say."""


@dataclass(frozen=True, slots=True)
class Close:
    """An orderly end: nothing follows. An end of stream without it is a truncation."""

    reason: str = ""


@dataclass(frozen=True, slots=True)
class Error:
    """Why the sender ends this link, for a person to read."""

    reason: str


@dataclass(frozen=True, slots=True)
class PathState:
    """Whether the path goes on beyond the sender, to the other agent. Until a peer says so, it is taken to be open.

    Attributes:
        is_open: otherwise packets that the sender gets now are dropped somewhere.
    """

    is_open: bool


@dataclass(frozen=True, slots=True)
class Unknown:
    """A control message of a type that this version does not know; skipped."""

    type: int


ControlMessage = Hello | Keepalive | Close | Error | PathState | Unknown


def encode_message(message: ControlMessage) -> bytes:
    """Encode one message as the payload of a frame. Texts longer than 255 bytes are cut.

    Raises:
        ValueError: a field is out of its range, or *message* is `Unknown`.
    """
    body: bytes
    match message:
        case Hello():
            kind, body = ControlType.HELLO, _encode_hello(message)
        case Keepalive():
            kind, body = ControlType.KEEPALIVE, b""
        case Close(reason):
            kind, body = ControlType.CLOSE, _encode_text(reason)
        case Error(reason):
            kind, body = ControlType.ERROR, _encode_text(reason)
        case PathState(is_open):
            kind, body = ControlType.PATH, bytes((is_open,))
        case _:
            raise ValueError("an unknown message cannot be encoded")
    return bytes((0, kind)) + body


def decode_message(payload: bytes | memoryview) -> ControlMessage:
    """Decode the payload of a frame whose first byte is 0 and that has a second one.

    Raises:
        ValueError: it is malformed.
    """
    kind, body = payload[1], bytes(payload[2:])
    match kind:
        case ControlType.HELLO:
            return _decode_hello(body)
        case ControlType.KEEPALIVE:
            return Keepalive()
        case ControlType.CLOSE:
            return Close(_decode_text(body))
        case ControlType.ERROR:
            return Error(_decode_text(body))
        case ControlType.PATH:
            return _decode_path(body)
        case _:
            return Unknown(kind)


def _encode_hello(hello: Hello) -> bytes:
    if not (0 < hello.version < 256 and 0 < hello.mtu <= MAX_MTU_BYTES):
        raise ValueError(f"version {hello.version} or MTU {hello.mtu} is out of range")
    instance = hello.instance.encode()
    if len(instance) > _MAX_NAME_BYTES:
        raise ValueError(f"the instance name has {len(instance)} bytes, more than {_MAX_NAME_BYTES}")
    parts = [
        _HELLO.pack(hello.version, hello.role, hello.mtu),
        _FIELD.pack(_HelloTag.INSTANCE, len(instance)),
        instance,
    ]
    for interface in hello.tun:
        value = bytes((interface.network.prefixlen,)) + interface.packed
        parts += (_FIELD.pack(_HelloTag.TUN, len(value)), value)
    body = b"".join(parts)
    if len(body) > _MAX_HELLO_BYTES:
        raise ValueError(f"HELLO of {len(body)} bytes, more than {_MAX_HELLO_BYTES}: too many TUN addresses")
    return body


def _decode_hello(body: bytes) -> Hello:
    if not _HELLO.size <= len(body) <= _MAX_HELLO_BYTES:
        raise ValueError(f"HELLO of {len(body)} bytes")
    version, role, mtu = _HELLO.unpack_from(body)
    if not version:
        raise ValueError("HELLO of version 0")
    if not mtu:
        raise ValueError("HELLO with an MTU of 0")
    instance, tun, start = "default", [], _HELLO.size
    while start < len(body):
        if len(body) - start < _FIELD.size:
            raise ValueError("HELLO with a cut field")
        tag, length = _FIELD.unpack_from(body, start)
        start += _FIELD.size
        value = body[start : start + length]
        if len(value) != length:
            raise ValueError("HELLO with a cut field")
        start += length
        if tag == _HelloTag.INSTANCE:
            if length > _MAX_NAME_BYTES:
                raise ValueError(f"HELLO with an instance name of more than {_MAX_NAME_BYTES} bytes")
            instance = value.decode()  # UnicodeDecodeError is a ValueError
        elif tag == _HelloTag.TUN:
            tun.append(_decode_interface(value))
    return Hello(Role(role), instance, tuple(tun), mtu, version)


def _decode_interface(value: bytes) -> Interface:
    match len(value):
        case 5:
            return IPv4Interface((IPv4Address(value[1:]), value[0]))
        case 17:
            return IPv6Interface((IPv6Address(value[1:]), value[0]))
        case length:
            raise ValueError(f"HELLO with a TUN address of {length} bytes")


def _decode_path(body: bytes) -> PathState:
    # What may follow the first byte is for later versions.
    if body[:1] not in (b"\0", b"\1"):
        raise ValueError(f"PATH that says {body[0]}, not 0 or 1" if body else "PATH that says nothing")
    return PathState(body[0] == 1)


def _encode_text(text: str) -> bytes:
    # Cut at a character, not inside one.
    return text.encode(errors="replace")[:_MAX_TEXT_BYTES].decode(errors="ignore").encode()


def _decode_text(body: bytes) -> str:
    # A reason is for people: a badly encoded one is better shown with marks than not at all.
    return body[: 4 * _MAX_TEXT_BYTES].decode(errors="replace")
