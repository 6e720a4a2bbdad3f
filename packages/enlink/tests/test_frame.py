"""The codec, against the golden vectors of docs/wire-format.md and a slow oracle that shares no code with it."""

from __future__ import annotations

import random
import re
import struct
import tracemalloc
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface, ip_interface
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from enlink.control import (
    MAX_MTU_BYTES,
    VERSION,
    Close,
    ControlMessage,
    Error,
    Hello,
    Keepalive,
    PathState,
    Role,
    Unknown,
)
from enlink.frame import (
    BUFFER_BYTES,
    FLOOD_LIMIT,
    HEADER_BYTES,
    JUNK_LIMIT,
    LIMIT_BYTES,
    Discarded,
    Event,
    Fault,
    FrameDecoder,
    PacketBatch,
    Packets,
    encode_control,
    encode_packets,
)
from enlink.testing.frames import feed
from hypothesis import given, settings
from hypothesis import strategies as st

WIRE_FORMAT = Path(__file__).parents[3] / "docs" / "wire-format.md"
RAW_INPUTS = 250_000  # for each seed: 10^6 together
STRUCTURED_INPUTS = 25_000  # for each seed: 10^5 together


@cache
def golden_vectors() -> dict[str, bytes]:
    """Every vector of the page, by its name."""
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| `([0-9a-f ]+)` \|", WIRE_FORMAT.read_text(), re.MULTILINE)
    return {name: bytes.fromhex(text) for name, text in rows}


GOLDEN_MESSAGES: dict[str, ControlMessage] = {
    "hello-client": Hello(Role.CLIENT_AGENT, tun=(IPv4Interface("192.168.0.1/24"),)),
    "hello-server": Hello(
        Role.SERVER_AGENT, "blue", (IPv4Interface("192.168.0.254/24"), IPv6Interface("fd00::fe/64")), 1500
    ),
    "hello-gateway": Hello(Role.GATEWAY),
    "keepalive": Keepalive(),
    "close": Close(),
    "close-reason": Close("the agent is stopping"),
    "error": Error("Zertifikat ungültig"),
    "path-open": PathState(is_open=True),
    "path-closed": PathState(is_open=False),
}
GOLDEN_PACKETS = {
    "ipv4": struct.pack("!BBHHHBBH", 0x45, 0, 33, 1, 0x4000, 64, 17, 0xB87B)
    + IPv4Address("192.168.0.1").packed
    + IPv4Address("192.168.0.254").packed
    + struct.pack("!HHHH", 40000, 6978, 13, 0)
    + b"hello",
    "ipv6": struct.pack("!IHBB", 6 << 28, 0, 59, 64) + IPv6Address("fd00::1").packed + IPv6Address("fd00::fe").packed,
}
GOLDEN_RECEIVED: dict[str, list[Event]] = {
    "hello-version-2": [Hello(Role.GATEWAY, version=2)],
    "routes": [Unknown(2)],
    "path-longer": [PathState(is_open=True)],
    "path-nothing": [Fault("bad_control", "sent a malformed control message: PATH that says nothing")],
    "path-two": [Fault("bad_control", "sent a malformed control message: PATH that says 2, not 0 or 1")],
    "unknown": [Unknown(255)],
    "empty": [Discarded("empty")],
    "one-byte": [Discarded("not_ip")],
    "nineteen": [Discarded("too_short")],
    "arp": [Discarded("not_ip")],
    "too-long": [Fault("frame_len", "announced a frame of 65536 bytes, more than 65535")],
    "longest": [],
}


def ipv4(size: int = 20, fill: bytes = b"\0") -> bytes:
    return b"\x45" + fill * (size - 1)


def frame(payload: bytes) -> bytes:
    return len(payload).to_bytes(4, "big") + payload


def control(kind: int, body: bytes = b"") -> bytes:
    return frame(bytes((0, kind)) + body)


def hello(body: bytes) -> bytes:
    return control(1, body)


def feed_all(pieces: Iterable[bytes | memoryview]) -> tuple[list[Any], bool]:
    """Everything a fresh decoder makes of *pieces*, one entry for each packet, and whether it is between frames."""
    decoder = FrameDecoder()
    seen: list[Any] = []
    for piece in pieces:
        for event in feed(decoder, piece):
            if isinstance(event, Packets):
                packets = [bytes(packet) for packet in event]
                assert len(packets) == event.count > 0
                assert encode_packets(packets) == event.encoded
                seen += packets
            else:
                seen.append(event)
    return seen, decoder.is_between_frames


def cut(stream: bytes, places: Iterable[int]) -> list[bytes]:
    edges = [0, *sorted(places), len(stream)]
    return [stream[start:end] for start, end in pairwise(edges)]


# The golden vectors.


def test_every_vector_of_the_page_is_known_here_and_the_other_way_round() -> None:
    assert set(golden_vectors()) == {*GOLDEN_MESSAGES, *GOLDEN_PACKETS, *GOLDEN_RECEIVED}


@pytest.mark.proves("F16")
@pytest.mark.parametrize("name", GOLDEN_MESSAGES)
def test_a_golden_message_is_encoded_and_decoded_as_the_page_says(name: str) -> None:
    message = GOLDEN_MESSAGES[name]
    assert encode_control(message) == golden_vectors()[name]
    assert feed_all([golden_vectors()[name]]) == ([message], True)


@pytest.mark.parametrize("name", GOLDEN_PACKETS)
def test_a_golden_packet_is_encoded_and_decoded_as_the_page_says(name: str) -> None:
    packet = GOLDEN_PACKETS[name]
    assert encode_packets([packet]) == golden_vectors()[name]
    assert feed_all([golden_vectors()[name]]) == ([packet], True)


@pytest.mark.proves("D11", "F16", "F37", "F38", "F40")
@pytest.mark.parametrize("name", GOLDEN_RECEIVED)
def test_a_golden_frame_that_is_only_received_becomes_what_the_page_says(name: str) -> None:
    events, is_between_frames = feed_all([golden_vectors()[name]])
    assert events == GOLDEN_RECEIVED[name]
    assert is_between_frames == (name != "longest")


# Any sequence, any split.

IPV4 = st.binary(min_size=19, max_size=120).map(lambda rest: b"\x45" + rest)
IPV6 = st.binary(min_size=39, max_size=120).map(lambda rest: b"\x6f" + rest)
INTERFACES = st.ip_addresses(v=4).map(lambda address: IPv4Interface((address, 17))) | st.ip_addresses(v=6).map(
    lambda address: IPv6Interface((address, 128))
)
REASONS = st.text(max_size=63)  # at most 252 bytes: nothing is cut
NAMES = st.text(max_size=15)
MESSAGES = (
    st.just(Keepalive()) | st.builds(Close, REASONS) | st.builds(Error, REASONS) | st.builds(PathState, st.booleans())
)
HELLOS = st.builds(
    Hello,
    role=st.sampled_from(Role),
    instance=NAMES,
    tun=st.lists(INTERFACES, max_size=4).map(tuple),
    mtu=st.integers(1, LIMIT_BYTES),
    version=st.integers(1, 255),
)


def encode(said: bytes | ControlMessage) -> bytes:
    return encode_packets([said]) if isinstance(said, bytes) else encode_control(said)


@pytest.mark.proves("F22", "G3")
@settings(deadline=None)
@given(
    first=st.lists(HELLOS, max_size=1),
    rest=st.lists(IPV4 | IPV6 | MESSAGES, max_size=12),
    places=st.lists(st.integers(0, 2000), max_size=12),
)
def test_whatever_is_said_is_heard_however_it_is_cut(
    first: list[Hello], rest: list[bytes | ControlMessage], places: list[int]
) -> None:
    said = [*first, *rest]
    stream = b"".join(map(encode, said))
    pieces = cut(stream, [place % (len(stream) + 1) for place in places])
    assert feed_all([stream]) == (said, True)
    assert feed_all(pieces) == (said, True)
    assert feed_all(bytes([byte]) for byte in stream) == (said, True)


SESSION = [
    *("hello-client", "ipv4", "ipv6", "keepalive", "empty", "ipv4", "path-closed", "unknown", "nineteen", "ipv4"),
    *("path-longer", "close-reason"),
]


@pytest.mark.proves("G3")
def test_a_session_means_the_same_in_every_two_pieces() -> None:
    stream = b"".join(golden_vectors()[name] for name in SESSION)
    whole = feed_all([stream])
    assert whole == oracle(stream)
    for place in range(len(stream) + 1):
        assert feed_all(cut(stream, [place])) == whole, place


@pytest.mark.proves("F34", "F35")
def test_a_stream_that_ends_inside_a_frame_is_known_to_be_cut_at_every_byte() -> None:
    frames = [golden_vectors()[name] for name in SESSION]
    stream = b"".join(frames)
    ends = {sum(map(len, frames[:count])) for count in range(len(frames) + 1)}
    for place in range(len(stream) + 1):
        events, is_between_frames = feed_all([stream[:place]])
        assert is_between_frames == (place in ends), place
        # No part of a packet gets out before all of it is there.
        assert (events, is_between_frames) == oracle(stream[:place])


def receive(decoder: FrameDecoder, data: bytes) -> list[Event]:
    """One read of *data*, which must find room for all of it."""
    decoder.space()[: len(data)] = data
    return decoder.decode(len(data))


def test_a_run_of_packets_is_one_piece_where_it_was_received() -> None:
    stream, decoder = encode_packets([ipv4(20), ipv4(21), ipv4(22)]), FrameDecoder()
    room = decoder.space()
    (event,) = receive(decoder, stream)
    assert event == Packets(memoryview(stream), 3)
    assert isinstance(event, Packets)
    assert event.encoded.obj is room.obj


@given(st.data())
@settings(deadline=None)
def test_a_run_is_one_piece_wherever_the_frames_were_cut(data: st.DataObject) -> None:
    packets = [ipv4(20 + number) for number in range(6)]
    stream = encode_packets(packets)
    place = data.draw(st.integers(0, len(stream)))
    decoder = FrameDecoder()
    events = [receive(decoder, stream[:place]), receive(decoder, stream[place:])]
    assert [len(each) for each in events] == [place >= HEADER_BYTES + 20, place < len(stream)]


def test_there_is_always_room_and_more_where_it_was_used_up() -> None:
    decoder, longest = FrameDecoder(), encode_packets([ipv4(LIMIT_BYTES)] * 40)
    view, rooms, count = memoryview(longest), [], 0
    while view:
        room = decoder.space()
        assert len(room) > 0
        rooms.append(len(room))
        taken = min(len(room), len(view))
        room[:taken] = view[:taken]
        count += sum(event.count for event in decoder.decode(taken) if isinstance(event, Packets))
        view = view[taken:]
    assert count == 40
    assert rooms[0] <= 512 < BUFFER_BYTES // 2 < max(rooms) <= BUFFER_BYTES


def test_a_read_that_brings_nothing_changes_nothing() -> None:
    decoder, stream = FrameDecoder(), encode_packets([ipv4(100)])
    assert receive(decoder, stream[:50]) == []
    decoder.space()
    assert decoder.space().nbytes == 512 - 50
    assert receive(decoder, stream[50:]) == [Packets(memoryview(stream), 1)]


# Batches of packets that are to be sent.


@given(st.lists(IPV4 | IPV6, max_size=8))
def test_a_batch_frames_packets_where_they_are_received(packets: list[bytes]) -> None:
    batch = PacketBatch()
    for packet in packets:
        assert batch.has_room
        batch.space()[: len(packet)] = packet
        batch.append(len(packet))
    taken = batch.take()
    assert taken == Packets(memoryview(encode_packets(packets)), len(packets))
    assert batch.take().count == 0


def test_a_packet_that_is_received_and_not_appended_is_not_there() -> None:
    batch = PacketBatch()
    for packet in (ipv4(100, b"1"), ipv4(40, b"2"), ipv4(60, b"3")):
        batch.space()[: len(packet)] = packet
        if len(packet) != 40:
            batch.append(len(packet))
    assert batch.take().encoded == encode_packets([ipv4(100, b"1"), ipv4(60, b"3")])


def test_a_batch_has_room_as_long_as_the_longest_packet_fits() -> None:
    batch = PacketBatch(2 * (HEADER_BYTES + LIMIT_BYTES))
    for _ in range(2):
        assert batch.has_room
        assert len(batch.space()) == LIMIT_BYTES
        batch.append(LIMIT_BYTES)
    assert not batch.has_room
    assert batch.take().count == 2
    assert batch.has_room


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer_may_be_fed_and_framed(kind: type[bytes]) -> None:
    stream = encode_packets([kind(ipv4()), kind(ipv4(25))])
    assert feed_all([kind(stream)]) == ([ipv4(), ipv4(25)], True)


def test_nothing_fed_is_nothing_heard() -> None:
    assert feed(FrameDecoder(), b"") == []
    assert encode_packets([]) == b""


# Limits.


@pytest.mark.proves("D11", "F38")
@pytest.mark.parametrize("length", [65_536, 65_537, 8 * 1024 * 1024, 2**31 - 1, 2**31, 2**32 - 1])
@pytest.mark.parametrize("is_cut", [False, True])
def test_a_frame_that_is_too_long_is_refused_from_its_header(length: int, is_cut: bool) -> None:
    decoder = FrameDecoder()
    before = encode_packets([ipv4()])
    header = length.to_bytes(4, "big")
    tracemalloc.start()
    try:
        pieces = [before + header[:3], header[3:]] if is_cut else [before + header]
        events = [event for piece in pieces for event in feed(decoder, piece)]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert events[1:] == [Fault("frame_len", f"announced a frame of {length} bytes, more than 65535")]
    assert events[0] == Packets(memoryview(before), 1)
    assert peak < 16 * 1024


def test_the_longest_frame_is_taken() -> None:
    longest = ipv4(LIMIT_BYTES, b"\xa5")
    assert feed_all(cut(encode_packets([longest]), [1, 5, 40_000])) == ([longest], True)
    with pytest.raises(ValueError, match="65536 bytes does not fit a frame of 65535"):
        encode_packets([longest + b"!"])


@pytest.mark.proves("D11", "F39", "G14")
def test_ten_thousand_links_that_announce_the_longest_frame_cost_next_to_nothing() -> None:
    header = LIMIT_BYTES.to_bytes(4, "big") + b"\x45"
    tracemalloc.start()
    try:
        decoders = [FrameDecoder() for _ in range(10_000)]
        assert not any(feed(decoder, header) for decoder in decoders)
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert used / len(decoders) < 2048


@pytest.mark.proves("F36")
def test_a_frame_that_comes_slowly_costs_what_has_come_of_it() -> None:
    decoder = FrameDecoder()
    piece = bytes(1024)
    tracemalloc.start()
    try:
        feed(decoder, LIMIT_BYTES.to_bytes(4, "big"))
        for count in range(1, 64):
            feed(decoder, piece)
            used, _ = tracemalloc.get_traced_memory()
            assert used < 2 * count * len(piece) + 2048
        assert len(feed(decoder, piece)) == 1
    finally:
        tracemalloc.stop()


@pytest.mark.proves("D11", "F37", "F40")
@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"", "empty"),
        (b"\0", "not_ip"),
        (b"\x01\x03", "not_ip"),
        (b"\x0f" + bytes(40), "not_ip"),
        (b"\x55" + bytes(40), "not_ip"),
        (b"\xff" + bytes(40), "not_ip"),
        (b"\x4f", "too_short"),
        (ipv4(19), "too_short"),
        (b"\x60" + bytes(38), "too_short"),
    ],
)
def test_a_frame_without_a_packet_is_dropped_and_the_next_one_heard(payload: bytes, reason: Any) -> None:
    assert feed_all([frame(payload) + frame(ipv4())]) == ([Discarded(reason), ipv4()], True)


@pytest.mark.proves("D11", "F40")
@pytest.mark.parametrize("payload", [b"", b"\0", b"\x55" * 50, ipv4(19)])
def test_sixty_four_junk_frames_in_a_row_end_the_link(payload: bytes) -> None:
    events, _ = feed_all([frame(payload) * (JUNK_LIMIT + 1) + frame(ipv4())])
    assert events[JUNK_LIMIT:] == [Fault("junk", "sent 64 frames in a row that are no IP packets")]
    assert all(isinstance(event, Discarded) for event in events[:JUNK_LIMIT])


@pytest.mark.proves("D11", "F40")
@pytest.mark.parametrize("relief", [frame(ipv4()), encode_control(Keepalive()), control(200)])
def test_sixty_three_junk_frames_and_a_word_are_forgiven(relief: bytes) -> None:
    events, _ = feed_all([(frame(b"") * (JUNK_LIMIT - 1) + relief) * 3])
    assert len(events) == JUNK_LIMIT * 3
    assert not any(isinstance(event, Fault) for event in events)


@pytest.mark.proves("D11", "G14")
@pytest.mark.parametrize("flood", [encode_control(Keepalive()), control(200), frame(b"") + frame(ipv4())])
def test_a_flood_of_frames_without_a_packet_ends_the_link(flood: bytes) -> None:
    events, _ = feed_all([flood * (FLOOD_LIMIT + 1)])
    assert events[-1] == Fault("flood", "sent more than 1024 frames without a packet in a second")
    assert sum(not isinstance(event, bytes) for event in events) == FLOOD_LIMIT + 1


def test_a_second_later_as_many_frames_without_a_packet_are_taken_again() -> None:
    now_s = 0.0
    decoder = FrameDecoder(clock=lambda: now_s)
    for _ in range(3):
        assert feed(decoder, encode_control(Keepalive()) * FLOOD_LIMIT) == [Keepalive()] * FLOOD_LIMIT
        now_s += 1.0
    now_s -= 0.1
    assert isinstance(feed(decoder, encode_control(Keepalive()))[-1], Fault)


def test_packets_are_not_rationed() -> None:
    events, _ = feed_all([frame(ipv4()) * (3 * FLOOD_LIMIT)])
    assert len(events) == 3 * FLOOD_LIMIT


FAULTS = [
    (b"\0\1\0\0", "frame_len"),
    (frame(b"") * JUNK_LIMIT, "junk"),
    (encode_control(Keepalive()) * (FLOOD_LIMIT + 1), "flood"),
    (hello(b""), "bad_control"),
]


@pytest.mark.parametrize(("stream", "reason"), FAULTS, ids=[reason for _, reason in FAULTS])
def test_after_a_fault_nothing_is_heard_and_nothing_is_kept(stream: bytes, reason: str) -> None:
    decoder = FrameDecoder()
    events = feed(decoder, stream + frame(ipv4()))
    assert isinstance(events[-1], Fault)
    assert events[-1].reason == reason
    assert feed(decoder, frame(ipv4()) + b"\0\0") == []
    assert decoder.is_between_frames


# Control messages: what is in them is test_control.py's.


def test_a_malformed_message_ends_the_link_and_says_why() -> None:
    text = "sent a malformed control message: HELLO of 0 bytes"
    assert feed_all([hello(b"") + frame(ipv4())])[0] == [Fault("bad_control", text)]


def test_hello_is_said_once() -> None:
    events, _ = feed_all([encode_control(Hello(Role.GATEWAY)) * 2])
    assert events == [
        Hello(Role.GATEWAY),
        Fault("bad_control", "sent a malformed control message: HELLO for the second time"),
    ]


@pytest.mark.proves("F16")
def test_control_messages_of_later_versions_are_skipped() -> None:
    for kind in {*range(256)} - {1, 3, 4, 5, 6}:
        assert feed_all([control(kind, b"?" * (kind % 7)) + frame(ipv4())]) == ([Unknown(kind), ipv4()], True)


# Beside tokio-util.


def length_delimited(stream: bytes) -> Iterator[bytes]:
    """What the default of tokio-util's LengthDelimitedCodec reads: u32, big-endian, counts the payload alone."""
    while len(stream) >= 4:
        (length,) = struct.unpack(">I", stream[:4])
        yield stream[4 : 4 + length]
        stream = stream[4 + length :]


@settings(deadline=None)
@given(st.lists(IPV4 | IPV6, max_size=8))
def test_a_default_length_delimited_codec_reads_what_we_write(packets: list[bytes]) -> None:
    assert list(length_delimited(encode_packets(packets))) == packets
    assert encode_packets([b"hello world"]) == b"\x00\x00\x00\x0bhello world"


# Against the oracle.


def oracle(stream: bytes) -> tuple[list[Any], bool]:
    """What a whole stream means, read as the page is written."""
    heard: list[Any] = []
    place = junk = without_packet = 0
    has_hello = False
    while len(stream) - place >= 4:
        length = int.from_bytes(stream[place : place + 4], "big")
        if length > 65_535:
            return [*heard, Fault("frame_len", f"announced a frame of {length} bytes, more than 65535")], True
        payload = stream[place + 4 : place + 4 + length]
        if len(payload) < length:
            break
        place += 4 + length
        first = payload[:1].hex()
        if (first.startswith("4") and length >= 20) or (first.startswith("6") and length >= 40):
            heard.append(payload)
            junk = 0
            continue
        without_packet += 1
        if without_packet > 1024:
            return [*heard, Fault("flood", "sent more than 1024 frames without a packet in a second")], True
        if first == "00" and length >= 2:
            junk = 0
            problem, message = oracle_control(payload[1], payload[2:], has_hello)
            if problem:
                return [*heard, problem], True
            has_hello = has_hello or payload[1] == 1
            heard.append(message)
            continue
        reason: Any = "empty" if not length else "too_short" if first[0] in "46" else "not_ip"
        heard.append(Discarded(reason))
        junk += 1
        if junk == 64:
            return [*heard, Fault("junk", "sent 64 frames in a row that are no IP packets")], True
    return heard, place == len(stream)


ANY_TEXT = "the text is another matter"


class AnyFault(Fault):
    """A fault of the same reason, whatever its text."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Fault) and other.reason == self.reason

    __hash__ = Fault.__hash__


BAD_CONTROL = AnyFault("bad_control", ANY_TEXT)


def oracle_control(kind: int, body: bytes, has_hello: bool) -> tuple[Fault | None, ControlMessage | None]:
    if kind == 3:
        return None, Keepalive()
    if kind in (4, 5):
        text = body[:1020].decode("utf-8", "replace")
        return None, Close(text) if kind == 4 else Error(text)
    if kind == 6:
        return (None, PathState(body[:1] == b"\1")) if body[:1] in (b"\0", b"\1") else (BAD_CONTROL, None)
    if kind != 1:
        return None, Unknown(kind)
    if has_hello or not 4 <= len(body) <= 1024:
        return BAD_CONTROL, None
    version, role, mtu = body[0], body[1], body[2] * 256 + body[3]
    if version == 0 or role not in (1, 2, 3) or mtu == 0:
        return BAD_CONTROL, None
    name, rest = "default", body[4:]
    tun: list[IPv4Interface | IPv6Interface] = []
    while rest:
        if len(rest) < 3:
            return BAD_CONTROL, None
        tag, length, value = rest[0], rest[1] * 256 + rest[2], rest[3 : 3 + rest[1] * 256 + rest[2]]
        rest = rest[3 + length :]
        if len(value) < length:
            return BAD_CONTROL, None
        if tag == 1:
            try:
                name = value.decode("ascii") if value.isascii() else value.decode("utf-8")
            except UnicodeDecodeError:
                return BAD_CONTROL, None
            if length > 63:
                return BAD_CONTROL, None
        if tag == 2:
            if length == 5 and value[0] <= 32:
                tun.append(ip_interface(f"{'.'.join(map(str, value[1:]))}/{value[0]}"))
            elif length == 17 and value[0] <= 128:
                tun.append(ip_interface(f"{value[1:].hex(':', 2)}/{value[0]}"))
            else:
                return BAD_CONTROL, None
    return None, Hello(Role(role), name, tuple(tun), mtu, version)


def outcomes(heard: Sequence[Any]) -> Iterator[str]:
    for one in heard:
        match one:
            case bytes():
                yield "packet"
            case Discarded(reason) | Fault(reason):
                yield reason
            case _:
                yield type(one).__name__
    if not heard:
        yield "nothing"


EVERY_OUTCOME = {
    *("packet", "nothing", "empty", "not_ip", "too_short", "frame_len", "bad_control"),
    *("Hello", "Keepalive", "Close", "Error", "PathState", "Unknown"),
}


def raw_inputs(count: int, seed: int) -> Iterator[bytes]:
    """Noise; half of it behind a header that makes it one frame, or nearly so."""
    choice = random.Random(seed)
    for _ in range(count):
        noise = choice.randbytes(int(choice.random() ** 3 * 64))
        dice = choice.random()
        if dice < 0.25:
            yield noise
        elif dice < 0.4:
            yield len(noise).to_bytes(4, "big") + b"\0" + noise[1:] + noise[:3]
        elif dice < 0.6:
            yield (len(noise) + 2).to_bytes(4, "big") + b"\0" + bytes([int(choice.random() * 8)]) + noise
        else:
            yield (len(noise) + int(choice.random() * 1.1)).to_bytes(4, "big") + noise


def structured_inputs(count: int, seed: int) -> Iterator[bytes]:
    """Sessions of a few frames with up to three changes: a byte, a piece cut out, twice, or replaced by noise."""
    choice = random.Random(seed)
    templates = [
        *golden_vectors().values(),
        frame(b"") * (JUNK_LIMIT - 1),
        encode_control(Hello(Role.SERVER_AGENT, "ü", mtu=1)),
    ]
    for _ in range(count):
        stream = bytearray().join(choice.choices(templates, k=choice.randrange(1, 7)))
        for _ in range(choice.randrange(4)):
            start = choice.randrange(len(stream) or 1)
            end = min(start + choice.randrange(1, 9), len(stream))
            match choice.randrange(5):
                case 0 | 1:
                    stream[start:end] = bytes([choice.choice((0, 1, 2, 3, 5, 0x45, 0x60, 0xFF))])
                case 2:
                    stream[start:end] = b""
                case 3:
                    stream[start:start] = stream[start:end]
                case 4:
                    stream[start:end] = choice.randbytes(end - start)
        yield bytes(stream)


@pytest.mark.proves("D11", "D22", "G3")
@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_raw_inputs_mean_what_the_oracle_says(seed: int) -> None:
    reached: Counter[str] = Counter()
    for stream in raw_inputs(RAW_INPUTS, seed):
        heard = feed_all([stream])
        assert heard == oracle(stream), stream.hex()
        reached.update(outcomes(heard[0]))
    # The sample is worth something.
    assert min(reached[outcome] for outcome in EVERY_OUTCOME - {"Hello", "PathState"}) > 1000, reached


@pytest.mark.proves("D11", "D22", "G3")
@pytest.mark.parametrize("seed", [5, 6, 7, 8])
def test_mutated_sessions_mean_what_the_oracle_says_whole_and_in_pieces(seed: int) -> None:
    reached: Counter[str] = Counter()
    choice = random.Random(seed)
    for stream in structured_inputs(STRUCTURED_INPUTS, seed):
        expected = oracle(stream)
        assert feed_all([stream]) == expected, stream.hex()
        places = [choice.randrange(len(stream) + 1) for _ in range(choice.randrange(4))]
        assert feed_all(cut(stream, places)) == expected, (stream.hex(), places)
        reached.update(outcomes(expected[0]))
    assert min(reached[outcome] for outcome in EVERY_OUTCOME | {"junk"}) > 50, reached


@pytest.mark.proves("G3")
@settings(deadline=None)
@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=6))
def test_no_bytes_whatever_raise(noise: bytes, places: list[int]) -> None:
    for stream in (noise, frame(noise), hello(noise), encode_control(Keepalive()) + hello(b"\1\1\1\1" + noise)):
        heard = feed_all(cut(stream, [min(place, len(stream)) for place in places]))
        assert heard == oracle(stream)


def test_the_limits_of_the_page_are_those_of_the_code() -> None:
    rows = re.findall(r"^\| ([A-Za-z` ]+?) *\| ([0-9,]+) ", WIRE_FORMAT.read_text(), re.MULTILINE)
    limits = {name: int(number.replace(",", "")) for name, number in rows}
    assert limits["payload"] == LIMIT_BYTES == MAX_MTU_BYTES
    assert limits["memory for an unfinished frame"] == HEADER_BYTES + LIMIT_BYTES
    assert limits["junk frames in a row"] == JUNK_LIMIT
    assert limits["frames a second that carry no packet"] == FLOOD_LIMIT
    assert f"# Wire format, version {VERSION}\n" in WIRE_FORMAT.read_text()
