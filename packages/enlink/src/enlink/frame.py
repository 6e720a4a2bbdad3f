"""Cut a byte stream into ENPacket frames and back. Does no I/O: see link.py for that.

A frame is ``length: u32 big-endian`` and *length* bytes, which are one of:

- an IP packet (first nibble 4 or 6), passed on as it is;
- a control message, for the neighbour only: see control.py;
- anything else, which is dropped and counted.

``docs/wire-format.md`` shows every byte; `tests/test_frame.py` holds its golden vectors.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final, Literal

from enlink.control import ControlMessage, Hello, decode_message, encode_message

Buffer = bytes | bytearray | memoryview
DiscardReason = Literal["empty", "not_ip", "too_short"]
FaultReason = Literal["frame_len", "junk", "flood", "bad_control"]
Wire = Literal["auto", "original"]  # with control messages where the peer knows them, or packets only

# The wire format.
HEADER_BYTES: Final = 4
LIMIT_BYTES: Final = 65_535  # the largest IPv4 packet
_MIN_IPV4_BYTES: Final = 20  # RFC 791
_MIN_IPV6_BYTES: Final = 40  # RFC 8200

# Choices of ours.
JUNK_LIMIT: Final = 64  # frames in a row that are neither packet nor message: this is no peer of ours
FLOOD_LIMIT: Final = 1024  # frames a second that carry no packet: each costs us more than it costs the peer

_LENGTH = struct.Struct("!I")


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
        message = decode_message(payload)
        if isinstance(message, Hello):
            if self._has_hello:
                raise ValueError("HELLO for the second time")
            self._has_hello = True
        return message

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
    payload = encode_message(message)
    return _LENGTH.pack(len(payload)) + payload
