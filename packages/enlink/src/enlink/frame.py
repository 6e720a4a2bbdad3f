"""Cut a byte stream into ENPacket frames and back. Does no I/O: see link.py for that.

A frame is ``length: u32 big-endian`` and *length* bytes, which are one of:

- an IP packet (first nibble 4 or 6), passed on as it is;
- a control message, for the neighbour only: see control.py;
- anything else, which is dropped and counted.

``docs/wire-format.md`` shows every byte; `tests/test_frame.py` holds its golden vectors.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
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
_FLOOD_WINDOW_S: Final = 1.0
FLOOD_LIMIT: Final = 1024  # frames a second that carry no packet: each costs us more than it costs the peer

BUFFER_BYTES: Final = 192 * 1024  # of a link that is busy: two of the longest frames, and more
_FIRST_BUFFER_BYTES: Final = 512  # for those who have said next to nothing

_LENGTH = struct.Struct("!I")


@dataclass(slots=True)  # frozen ones take a microsecond to make
class Packets:
    """One or more whole frames that carry IP packets, still encoded, in the order they came.

    Attributes:
        encoded: the frames, headers included, where they were received: see who made this for how long it is good.
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


class FrameDecoder:
    """Turns the bytes of one link into events. Receive into `space`, then `decode` what came.

    The bytes stay where they were received: packets are passed on from there, and an unfinished frame waits in front
    of what comes next, so that a run of packets is always one piece. A frame's length is judged from its header; the
    buffer grows with what really comes, up to `BUFFER_BYTES`. Frames without a packet are rationed, so many a second of
    *clock*; without one no second ever passes.
    """

    def __init__(self, limit_bytes: int = LIMIT_BYTES, clock: Callable[[], float] = lambda: 0.0) -> None:
        self._limit_bytes = limit_bytes
        self._clock = clock
        self._buffer = memoryview(bytearray(_FIRST_BUFFER_BYTES))
        self._start = self._end = 0  # of the unfinished frame
        self._junk_in_a_row = 0
        self._ration = FLOOD_LIMIT
        self._rationed_since_s = clock()
        self._has_hello = False
        self._is_broken = False

    @property
    def is_between_frames(self) -> bool:
        """No frame is unfinished: the stream may end here without having been cut."""
        return self._start == self._end

    def space(self) -> memoryview:
        """Return where the next bytes of the stream are to be received: some room, and all of it may be used.

        What `decode` returned before is overwritten.
        """
        buffer, start, end = self._buffer, self._start, self._end
        if end == len(buffer) < BUFFER_BYTES:
            self._buffer = memoryview(bytearray(min(2 * end, BUFFER_BYTES)))
        if start == end:
            self._start = self._end = 0
            return self._buffer
        if start or buffer is not self._buffer:
            self._buffer[: end - start] = buffer[start:end]
            self._start, self._end = 0, end - start
        return self._buffer[self._end :]

    def decode(self, count: int) -> list[Event]:
        """Take in the *count* bytes that were received into `space`, and return what they complete, in order.

        `Packets` refer to the buffer: they are good until `space` is called again. After a `Fault` everything is
        ignored.
        """
        events: list[Event] = []
        if self._is_broken:
            return events
        self._end += count
        self._start = self._scan(self._buffer[: self._end], events)
        return events

    def _scan(self, view: memoryview, events: list[Event]) -> int:
        """Append the events of every whole frame, and return where the unfinished one begins."""
        limit, start, end, unpack = self._limit_bytes, 0, len(view), _LENGTH.unpack_from
        run_start, run_count = 0, 0
        while end - start >= HEADER_BYTES:
            length: int = unpack(view, start)[0]
            if length > limit:
                self._append_run(events, view[run_start:start], run_count)
                self._break(events, "frame_len", f"announced a frame of {length} bytes, more than {limit}")
                return end
            body, following = start + HEADER_BYTES, start + HEADER_BYTES + length
            if following > end:
                break
            version = view[body] >> 4 if length else -1
            if (version == 4 and length >= _MIN_IPV4_BYTES) or (version == 6 and length >= _MIN_IPV6_BYTES):
                run_count += 1
            else:
                self._append_run(events, view[run_start:start], run_count)
                if not self._append_other(events, view[body:following], version):
                    return end
                run_start, run_count = following, 0
            start = following
        if run_count:
            self._junk_in_a_row = 0
            events.append(Packets(view[run_start:start], run_count))
        return start

    def _append_run(self, events: list[Event], encoded: memoryview, count: int) -> None:
        if count:
            self._junk_in_a_row = 0
            events.append(Packets(encoded, count))

    def _append_other(self, events: list[Event], payload: memoryview, version: int) -> bool:
        """Append the event of a frame that carries no IP packet. Returns whether the link may go on."""
        if (now_s := self._clock()) - self._rationed_since_s >= _FLOOD_WINDOW_S:
            self._ration, self._rationed_since_s = FLOOD_LIMIT, now_s
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


class PacketBatch:
    """Frames packets where they are received: each behind room for its header, so that none is copied to be sent."""

    def __init__(self, size_bytes: int = 4 * (HEADER_BYTES + LIMIT_BYTES)) -> None:
        self._buffer = memoryview(bytearray(size_bytes))
        self._end = 0
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def has_room(self) -> bool:
        """The longest packet would fit."""
        return len(self._buffer) - self._end >= HEADER_BYTES + LIMIT_BYTES

    def space(self) -> memoryview:
        """Return where the next packet is to be received, as long as there is room."""
        start = self._end + HEADER_BYTES
        return self._buffer[start : start + LIMIT_BYTES]

    def append(self, length: int) -> None:
        """Frame the packet of *length* bytes that was received into `space`."""
        _LENGTH.pack_into(self._buffer, self._end, length)
        self._end += HEADER_BYTES + length
        self._count += 1

    def take(self) -> Packets:
        """Return the packets, and begin anew: they are good until `space` is called again."""
        packets = Packets(self._buffer[: self._end], self._count)
        self._end = self._count = 0
        return packets


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
