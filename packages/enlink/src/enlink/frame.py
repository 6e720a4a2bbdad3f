"""Cut a byte stream into ENPacket frames and back. Does no I/O: see link.py for that.

A frame is ``length: u32 big-endian`` and *length* bytes, which are one of:

- an IP packet (first nibble 4 or 6), passed on as it is;
- a control message: ``0x00, type: u8, body``, for the neighbour only;
- anything else, which is dropped and counted.

``docs/wire-format.md`` shows every byte; `tests/test_frame.py` holds its golden vectors.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface
from typing import Final, Literal

Buffer = bytes | bytearray | memoryview
Interface = IPv4Interface | IPv6Interface
DiscardReason = Literal["empty", "not_ip", "too_short"]
FaultReason = Literal["frame_len", "junk", "flood", "bad_control"]
Wire = Literal["auto", "original"]  # with control messages where the peer knows them, or packets only

# The wire format.
HEADER_BYTES: Final = 4
LIMIT_BYTES: Final = 65_535  # the largest IPv4 packet
VERSION: Final = 1
_MIN_IPV4_BYTES: Final = 20  # RFC 791
_MIN_IPV6_BYTES: Final = 40  # RFC 8200

# Choices of ours.
JUNK_LIMIT: Final = 64  # frames in a row that are neither packet nor message: this is no peer of ours
FLOOD_LIMIT: Final = 1024  # frames a second that carry no packet: each costs us more than it costs the peer
_MAX_HELLO_BYTES: Final = 1024
_MAX_TEXT_BYTES: Final = 255

_LENGTH = struct.Struct("!I")
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
    mtu: int = LIMIT_BYTES
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
class Unknown:
    """A control message of a type that this version does not know; skipped."""

    type: int


ControlMessage = Hello | Keepalive | Close | Error | Unknown


@dataclass(frozen=True, slots=True)
class Packets:
    """One or more whole frames that carry IP packets, still encoded, in the order they came.

    Attributes:
        encoded: the frames, headers included; views of the bytes that were fed.
        count: how many frames that is.
    """

    encoded: memoryview
    count: int

    def __iter__(self) -> Iterator[memoryview]:
        """Yield each IP packet, without its frame header."""
        encoded, start, end = self.encoded, 0, len(self.encoded)
        while start < end:
            (length,) = _LENGTH.unpack_from(encoded, start)
            start += HEADER_BYTES
            yield encoded[start : start + length]
            start += length


@dataclass(frozen=True, slots=True)
class Discarded:
    """One frame was dropped, for this reason."""

    reason: DiscardReason


@dataclass(frozen=True, slots=True)
class Fault:
    """The stream cannot be followed any further: end the link. Always the last event.

    Attributes:
        reason: the name under which it is counted.
        text: what the peer did, for a person to read.
    """

    reason: FaultReason
    text: str


Event = Packets | ControlMessage | Discarded | Fault


@dataclass(slots=True)
class FrameDecoder:
    """Turns the bytes of one link into events. Feed it whatever arrives; it keeps at most one unfinished frame.

    A frame's length is judged from its header, before anything is allocated for it. Frames without a packet are
    rationed: call `refill` once a second.
    """

    limit_bytes: int = LIMIT_BYTES
    _partial: bytearray = field(default_factory=bytearray)
    _junk_in_a_row: int = 0
    _ration: int = FLOOD_LIMIT
    _has_hello: bool = False
    _is_broken: bool = False

    @property
    def is_between_frames(self) -> bool:
        """No frame is unfinished: the stream may end here without having been cut."""
        return not self._partial

    def refill(self) -> None:
        """Allow `FLOOD_LIMIT` more frames without a packet: a second has passed."""
        self._ration = FLOOD_LIMIT

    def feed(self, data: Buffer) -> list[Event]:
        """Take the next bytes of the stream and return what they complete, in order.

        `Packets` refer to *data*: do not change it while they are in use. After a `Fault` everything is ignored.
        """
        events: list[Event] = []
        if self._is_broken:
            return events
        view = memoryview(data)
        start = self._finish_partial(view, events) if self._partial else 0
        if not self._partial:
            self._scan(view, start, events)
        return events

    def _finish_partial(self, view: memoryview, events: list[Event]) -> int:
        """Complete the unfinished frame alone, so that the rest of *view* need no copy. Returns where to go on."""
        partial, taken = self._partial, 0
        if len(partial) < HEADER_BYTES:
            taken = min(HEADER_BYTES - len(partial), len(view))
            partial += view[:taken]
            if len(partial) < HEADER_BYTES:
                return taken
        length: int = _LENGTH.unpack_from(partial)[0]
        if length <= self.limit_bytes:
            rest = min(HEADER_BYTES + length - len(partial), len(view) - taken)
            partial += view[taken : taken + rest]
            taken += rest
            if len(partial) < HEADER_BYTES + length:
                return taken
        self._partial = bytearray()
        self._scan(memoryview(partial), 0, events)
        return len(view) if self._is_broken else taken

    def _scan(self, view: memoryview, start: int, events: list[Event]) -> None:
        """Append the events of every whole frame from *start* on, and keep what is left over."""
        limit, end, unpack = self.limit_bytes, len(view), _LENGTH.unpack_from
        run_start, run_count = start, 0
        while end - start >= HEADER_BYTES:
            length: int = unpack(view, start)[0]
            if length > limit:
                self._append_run(events, view[run_start:start], run_count)
                self._break(events, "frame_len", f"announced a frame of {length} bytes, more than {limit}")
                return
            body, following = start + HEADER_BYTES, start + HEADER_BYTES + length
            if following > end:
                break
            version = view[body] >> 4 if length else -1
            if (version == 4 and length >= _MIN_IPV4_BYTES) or (version == 6 and length >= _MIN_IPV6_BYTES):
                run_count += 1
            else:
                self._append_run(events, view[run_start:start], run_count)
                if not self._append_other(events, view[body:following], version):
                    return
                run_start, run_count = following, 0
            start = following
        self._append_run(events, view[run_start:start], run_count)
        self._partial += view[start:]

    def _append_run(self, events: list[Event], encoded: memoryview, count: int) -> None:
        if count:
            self._junk_in_a_row = 0
            events.append(Packets(encoded, count))

    def _append_other(self, events: list[Event], payload: memoryview, version: int) -> bool:
        """Append the event of a frame that carries no IP packet. Returns whether the link may go on."""
        if not self._ration:
            self._break(events, "flood", f"sent more than {FLOOD_LIMIT} frames without a packet in a second")
            return False
        self._ration -= 1
        if len(payload) >= 2 and payload[0] == 0:
            try:
                events.append(self._decode_control(payload))
            except ValueError as error:
                self._break(events, "bad_control", f"sent a malformed control message: {error}")
                return False
            self._junk_in_a_row = 0
            return True
        reason: DiscardReason = "too_short" if version in (4, 6) else "not_ip" if payload else "empty"
        events.append(Discarded(reason))
        self._junk_in_a_row += 1
        if self._junk_in_a_row >= JUNK_LIMIT:
            self._break(events, "junk", f"sent {JUNK_LIMIT} frames in a row that are no IP packets")
            return False
        return True

    def _decode_control(self, payload: memoryview) -> ControlMessage:
        kind, body = payload[1], bytes(payload[2:])
        match kind:
            case ControlType.HELLO:
                if self._has_hello:
                    raise ValueError("HELLO for the second time")
                self._has_hello = True
                return _decode_hello(body)
            case ControlType.KEEPALIVE:
                return Keepalive()
            case ControlType.CLOSE:
                return Close(_decode_text(body))
            case ControlType.ERROR:
                return Error(_decode_text(body))
            case _:
                return Unknown(kind)

    def _break(self, events: list[Event], reason: FaultReason, text: str) -> None:
        self._is_broken = True
        events.append(Fault(reason, text))


def encode_packets(packets: Iterable[Buffer]) -> bytes:
    """Frame IP packets into one piece, ready for one write. Each is at most `LIMIT_BYTES` long.

    Raises:
        ValueError: a packet is too long for a frame.
    """
    parts: list[Buffer] = []
    for packet in packets:
        length = len(packet)
        if length > LIMIT_BYTES:
            raise ValueError(f"a packet of {length} bytes does not fit a frame of {LIMIT_BYTES}")
        parts.append(_LENGTH.pack(length))
        parts.append(packet)
    return b"".join(parts)


def encode_control(message: ControlMessage) -> bytes:
    """Encode one control message as a whole frame. Texts longer than 255 bytes are cut.

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
        case _:
            raise ValueError("an unknown message cannot be encoded")
    return _LENGTH.pack(2 + len(body)) + bytes((0, kind)) + body


def _encode_hello(hello: Hello) -> bytes:
    if not (0 < hello.version < 256 and 0 < hello.mtu <= LIMIT_BYTES):
        raise ValueError(f"version {hello.version} or MTU {hello.mtu} is out of range")
    instance = hello.instance.encode()
    if len(instance) > 63:
        raise ValueError(f"the instance name has {len(instance)} bytes, more than 63")
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
            if length > 63:
                raise ValueError("HELLO with an instance name of more than 63 bytes")
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


def _encode_text(text: str) -> bytes:
    # Cut at a character, not inside one.
    return text.encode(errors="replace")[:_MAX_TEXT_BYTES].decode(errors="ignore").encode()


def _decode_text(body: bytes) -> str:
    # A reason is for people: a badly encoded one is better shown with marks than not at all.
    return body[: 4 * _MAX_TEXT_BYTES].decode(errors="replace")
