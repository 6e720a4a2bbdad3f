"""A link, read as the conversation that it has: over streams in memory and over real TCP, with good and bad peers."""

from __future__ import annotations

import math
import os
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial, wraps
from ipaddress import IPv4Interface
from pathlib import Path
from typing import Any, ParamSpec

import pytest
import trio
from enlink.control import Close, ControlMessage, Error, Hello, Keepalive, PathState, Role
from enlink.frame import FLOOD_LIMIT, JUNK_LIMIT, FrameDecoder, Packets, encode_control, encode_packets
from enlink.link import (
    GREETING_DEADLINE_S,
    KEEPALIVE_INTERVAL_S,
    SILENCE_LIMIT_S,
    Link,
    LinkEnded,
    PeerFault,
    Refused,
    describe,
)
from enlink.pump import current_pump
from enlink.testing.frames import feed
from enlink.testing.streams import ImpairedStream, reset, tcp_stream_pair
from trio.testing import MockClock, lockstep_stream_pair, memory_stream_pair, trio_test, wait_all_tasks_blocked

Stream = trio.abc.HalfCloseableStream
Arguments = ParamSpec("Arguments")
MakePair = Callable[[], Awaitable[tuple[Stream, Stream]]]

CLIENT = Hello(Role.CLIENT_AGENT, tun=(IPv4Interface("192.168.0.1/24"),))
GATEWAY = Hello(Role.GATEWAY)
PACKET = b"\x45" + bytes(range(1, 100))
FRAME = encode_packets([PACKET])
KEEPALIVE, CLOSE = encode_control(Keepalive()), encode_control(Close("bye"))
UNKNOWN = b"\0\0\0\2\0\xee"
JUNK = b"\0\0\0\0"
WATCH_S = 1.0
PATIENCE_S = 50  # for what takes a moment on a machine with nothing else to do


def in_trio(test: Callable[Arguments, Awaitable[None]]) -> Callable[Arguments, None]:
    """Run a test in trio, by the clock among its arguments, and fail if everybody in it waits for ever."""

    @trio_test
    @wraps(test)
    async def bounded(*arguments: Arguments.args, **named: Arguments.kwargs) -> None:
        with trio.fail_after(100_000 if "clock" in named else PATIENCE_S):
            await test(*arguments, **named)

    return bounded


async def memory_pair() -> tuple[Stream, Stream]:
    return memory_stream_pair()


async def lockstep_pair() -> tuple[Stream, Stream]:
    return lockstep_stream_pair()


async def small_tcp_pair() -> tuple[Stream, Stream]:
    return await tcp_stream_pair(buffer_bytes=4096)


@pytest.fixture(params=[memory_pair, tcp_stream_pair], ids=["memory", "tcp"])
def make_pair(request: pytest.FixtureRequest) -> Any:
    """Makes two ends of a connection; what is sent fits in between."""
    return request.param


@pytest.fixture(params=[lockstep_pair, small_tcp_pair], ids=["memory", "tcp"])
def make_tight_pair(request: pytest.FixtureRequest) -> Any:
    """Makes two ends of a connection that takes next to nothing which the other end does not read."""
    return request.param


@pytest.fixture
def clock(request: pytest.FixtureRequest) -> MockClock:
    """Time that passes while everybody waits, after a moment for the kernel where it has a part in it."""
    # The name, because it is the parameters of the test that tell.
    return MockClock(autojump_threshold=0.05 if "tcp" in request.node.name else 0)


class Side:
    """A link, and what it has counted."""

    def __init__(self, stream: trio.abc.Stream, hello: Hello = GATEWAY) -> None:
        self.counts: Counter[str] = Counter()
        self.link = Link(stream, hello, self._count)

    def _count(self, reason: str) -> None:
        self.counts[reason] += 1


async def hear_all(stream: Stream) -> list[Any]:
    """Everything that comes until the stream ends: packets as bytes, and other events; ``half`` if it ends inside."""
    decoder = FrameDecoder()
    heard: list[Any] = []
    while data := await stream.receive_some():
        for event in feed(decoder, data):
            heard += map(bytes, event) if isinstance(event, Packets) else [event]
    return heard if decoder.is_between_frames else [*heard, "half"]


async def greeted(make: MakePair, clock: MockClock | None = None) -> tuple[Side, Side]:
    """Two links that have greeted each other, the dialler first."""
    left, right = await make()
    dialler, listener = Side(left, CLIENT), Side(right)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(dialler.link.greet)
        nursery.start_soon(listener.link.hear_first_word)
    return dialler, listener


async def greeted_by_hand(make: MakePair) -> tuple[Side, Stream]:
    """A link that takes its peer for an ENG one, and the peer's end, with nothing left in between."""
    peer, here = await make()
    side = Side(here)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(side.link.hear_first_word)
        await peer.send_all(encode_control(CLIENT))
        answer = encode_control(GATEWAY)
        heard = b""
        while len(heard) < len(answer):
            heard += await peer.receive_some(len(answer))
        assert heard == answer
    return side, peer


async def take_packets(link: Link, count: int) -> list[bytes]:
    """The next *count* packets."""
    packets: list[bytes] = []
    while len(packets) < count:
        packets += map(bytes, await link.receive())
    assert len(packets) == count
    return packets


async def end_of(link: Link, *, is_dialler: bool = False, heard: list[bytes] | None = None) -> LinkEnded:
    """What `receive` raises in the end, or the greeting before."""
    try:
        if is_dialler:
            await link.greet()
        while True:
            packets = await link.receive()
            if heard is not None:
                heard += map(bytes, packets)
    except LinkEnded as ended:
        return ended


async def send_for_ever(stream: Stream, data: bytes) -> None:
    """Send the same again and again, until the other end breaks the connection."""
    with suppress(trio.BrokenResourceError):
        while True:
            await stream.send_all(data)


async def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for what no event tells of, because no task has a part in it."""
    while True:
        if condition():
            return
        await trio.sleep(0.001)


def open_descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))  # noqa: PTH208  # the names are all there is to it


# The greeting.


@pytest.mark.proves("F16")
@in_trio
async def test_both_ends_learn_who_the_other_is(make_pair: MakePair, clock: MockClock) -> None:
    dialler, listener = await greeted(make_pair)
    assert (dialler.link.peer, dialler.link.speech) == (GATEWAY, "eng")
    assert (listener.link.peer, listener.link.speech) == (CLIENT, "eng")
    await dialler.link.aclose()
    await listener.link.aclose()


@pytest.mark.proves("F16")
@in_trio
async def test_a_peer_of_a_later_version_is_greeted_like_any_other() -> None:
    peer, here = memory_stream_pair()
    side = Side(here)
    await peer.send_all(encode_control(Hello(Role.CLIENT_AGENT, version=7)) + UNKNOWN + FRAME)
    assert await side.link.hear_first_word() == Hello(Role.CLIENT_AGENT, version=7)
    assert await take_packets(side.link, 1) == [PACKET]
    assert side.counts == {"unknown_control": 1}


@pytest.mark.proves("D20")
@in_trio
async def test_a_dialler_gives_up_when_nobody_answers_its_hello(make_pair: MakePair, clock: MockClock) -> None:
    peer, here = await make_pair()
    side = Side(here, CLIENT)
    began = trio.current_time()
    with pytest.raises(LinkEnded, match="--wire original") as raised:
        await side.link.greet()
    assert raised.value.reason == "no_hello"
    assert trio.current_time() - began == pytest.approx(GREETING_DEADLINE_S)
    await side.link.aclose(Close("enough"))
    # A peer that knows no control messages has got one too many already.
    assert await hear_all(peer) == [CLIENT]
    await peer.aclose()


@pytest.mark.proves("D20")
@in_trio
async def test_one_byte_a_second_buys_no_time(clock: MockClock) -> None:
    peer, here = memory_stream_pair()
    side = Side(ImpairedStream(here, slice_bytes=1, delay_s=1), CLIENT)
    await peer.send_all(encode_control(Hello(Role.GATEWAY, "a-name-that-takes-its-time")))
    began = trio.current_time()
    with pytest.raises(LinkEnded) as raised:
        await side.link.greet()
    assert raised.value.reason == "no_hello"
    assert trio.current_time() - began == GREETING_DEADLINE_S


@in_trio
async def test_a_peer_that_hangs_up_on_our_hello_is_told_from_one_that_ends(
    make_pair: MakePair, clock: MockClock
) -> None:
    peer, here = await make_pair()
    side = Side(here, CLIENT)
    await peer.send_eof()
    with pytest.raises(LinkEnded, match="--wire original") as raised:
        await side.link.greet()
    assert raised.value.reason == "truncated"
    await side.link.aclose()
    await peer.aclose()


@in_trio
async def test_packets_before_the_answer_are_dropped_and_counted_one_by_one() -> None:
    peer, here = memory_stream_pair()
    side = Side(here, CLIENT)
    await peer.send_all(FRAME * 3 + JUNK + FRAME + encode_control(GATEWAY) + FRAME * 2)
    assert await side.link.greet() == GATEWAY
    assert side.counts == {"before_hello": 4, "empty": 1}
    assert await take_packets(side.link, 2) == [PACKET] * 2


@in_trio
async def test_who_sends_a_packet_first_is_raw_for_good(make_pair: MakePair, clock: MockClock) -> None:
    peer, here = await make_pair()
    side = Side(here)
    assert side.link.speech == "silent"
    await peer.send_all(FRAME)
    first = await side.link.hear_first_word()
    assert isinstance(first, Packets)
    assert list(map(bytes, first)) == [PACKET]
    assert (side.link.speech, side.link.peer) == ("raw", None)
    # The packet that told is received like any other.
    assert await take_packets(side.link, 1) == [PACKET]
    await peer.send_all(encode_control(CLIENT))
    ended = await end_of(side.link)
    assert isinstance(ended, PeerFault)
    assert (ended.reason, ended.exit_code, str(ended)) == ("bad_control", 76, "the peer said HELLO out of turn")
    await side.link.aclose(Close("never said"))
    assert await hear_all(peer) == []
    await peer.aclose()


@in_trio
async def test_who_only_receives_learns_that_a_peer_is_raw() -> None:
    peer, here = memory_stream_pair()
    side = Side(here)
    await peer.send_all(FRAME)
    await side.link.receive()
    assert side.link.speech == "raw"


@in_trio
async def test_a_hello_may_come_while_packets_are_expected() -> None:
    peer, here = memory_stream_pair()
    side = Side(here)
    await peer.send_all(encode_control(CLIENT) + FRAME)
    assert await take_packets(side.link, 1) == [PACKET]
    assert side.link.peer == CLIENT


@in_trio
async def test_with_the_original_wire_no_control_message_leaves_and_no_hello_is_taken(clock: MockClock) -> None:
    peer, here = memory_stream_pair()
    side = Side(here)
    side.link.skip_greeting()
    with trio.move_on_after(60):
        await side.link.keep_alive()
    await side.link.send(FRAME)
    await peer.send_all(encode_control(CLIENT))
    ended = await end_of(side.link)
    assert (ended.reason, str(ended)) == ("bad_control", "the peer said HELLO out of turn")
    await side.link.aclose(Error("never said"))
    assert await hear_all(peer) == [PACKET]


SAID_BEFORE_HELLO = [
    (Keepalive(), "bad_control", "the peer said KEEPALIVE out of turn"),
    (PathState(is_open=True), "bad_control", "the peer said PATH out of turn"),
    (Close("changed my mind"), "closed", "the peer closed the link: changed my mind"),
    (Close(), "closed", "the peer closed the link"),
    (Error("too many connections"), "refused", "the peer refused the link: too many connections"),
]


@pytest.mark.parametrize(("message", "reason", "text"), SAID_BEFORE_HELLO)
@in_trio
async def test_before_hello_only_an_end_makes_sense(message: ControlMessage, reason: str, text: str) -> None:
    peer, here = memory_stream_pair()
    side = Side(here)
    await peer.send_all(UNKNOWN + encode_control(message))
    with pytest.raises(LinkEnded) as raised:
        await side.link.hear_first_word()
    assert (raised.value.reason, str(raised.value)) == (reason, text)
    assert isinstance(raised.value, Refused) == isinstance(message, Error)
    assert side.counts == {"unknown_control": 1}


@in_trio
async def test_a_second_hello_ends_the_link_and_its_sender_is_told(make_pair: MakePair, clock: MockClock) -> None:
    side, peer = await greeted_by_hand(make_pair)
    await peer.send_all(encode_control(CLIENT))
    ended = await end_of(side.link)
    assert isinstance(ended, PeerFault)
    assert ended.reason == "bad_control"
    await side.link.aclose()
    assert await hear_all(peer) == [Error("you sent a malformed control message: HELLO for the second time")]
    await peer.aclose()


@in_trio
async def test_a_hello_is_answered_although_the_first_attempt_was_cancelled() -> None:
    """A deadline that passes while HELLO is at hand must not swallow it: the peer would wait for the answer in vain."""
    peer, here = memory_stream_pair()
    impatience = trio.CancelScope()
    link = Link(here, GATEWAY, lambda _: impatience.cancel())  # what is counted is the frame before HELLO
    await peer.send_all(JUNK + encode_control(CLIENT))
    with impatience:
        await link.hear_first_word()
    assert impatience.cancelled_caught
    assert link.speech == "silent"
    assert await link.hear_first_word() == CLIENT
    await link.aclose()
    assert await hear_all(peer) == [GATEWAY]


@in_trio
async def test_a_hello_that_was_answered_by_half_is_not_answered_again(clock: MockClock) -> None:
    peer, here = lockstep_stream_pair()
    side = Side(here)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(peer.send_all, encode_control(CLIENT))
        with trio.move_on_after(1):
            await side.link.hear_first_word()
    with pytest.raises(LinkEnded) as raised:
        await side.link.hear_first_word()
    assert raised.value.reason == "cut"


# Beyond the peer.


@in_trio
async def test_who_hears_that_the_path_is_closed_or_open_tells_its_owner_of_changes_only(
    make_pair: MakePair, clock: MockClock
) -> None:
    side, peer = await greeted_by_hand(make_pair)
    link = side.link
    heard = [link.path_is_open]
    link.path_changed = lambda: heard.append(link.path_is_open)
    states = (True, False, False, True, True, False)
    await peer.send_all(b"".join(encode_control(PathState(state)) for state in states) + FRAME)
    assert await take_packets(link, 1) == [PACKET]
    assert heard == [True, False, True, False]
    assert side.counts == {}
    await link.aclose()
    await peer.aclose()


@in_trio
async def test_news_of_the_path_is_heard_though_nobody_asked_to_be_told() -> None:
    side, peer = await greeted_by_hand(memory_pair)
    await peer.send_all(encode_control(PathState(is_open=False)) + FRAME)
    await take_packets(side.link, 1)
    assert side.link.path_is_open is False


@pytest.mark.proves("D11")
@pytest.mark.parametrize("body", [b"", b"\2", b"\xff\1"])
@in_trio
async def test_who_says_something_else_of_the_path_is_told_and_its_link_ends(body: bytes) -> None:
    side, peer = await greeted_by_hand(memory_pair)
    await peer.send_all((2 + len(body)).to_bytes(4, "big") + b"\0\6" + body)
    ended = await end_of(side.link)
    assert (type(ended), ended.reason) == (PeerFault, "bad_control")
    assert side.link.path_is_open
    await side.link.aclose()
    (told,) = await hear_all(peer)
    assert "malformed control message: PATH that says" in told.reason


@pytest.mark.parametrize("first_word", [b"", FRAME, None], ids=["silent", "raw", "original"])
@in_trio
async def test_who_has_not_said_hello_is_told_nothing_of_the_path(first_word: bytes | None) -> None:
    peer, here = memory_stream_pair()
    side = Side(here)
    if first_word is None:
        side.link.skip_greeting()
    elif first_word:
        await peer.send_all(first_word)
        await side.link.hear_first_word()
    await side.link.tell_path(is_open=True)
    await side.link.tell_path(is_open=False)
    await side.link.aclose()
    assert await hear_all(peer) == []


@in_trio
async def test_an_eng_peer_is_told_of_the_path_byte_for_byte() -> None:
    side, peer = await greeted_by_hand(memory_pair)
    await side.link.tell_path(is_open=True)
    await side.link.tell_path(is_open=False)
    assert await peer.receive_some() == bytes.fromhex("00000003000601 00000003000600")


@in_trio
async def test_a_peer_that_takes_nothing_is_not_told_of_the_path_for_ever(clock: MockClock) -> None:
    side, peer = await greeted_by_hand(lockstep_pair)
    with pytest.raises(LinkEnded) as raised:
        await side.link.tell_path(is_open=True, stall_limit_s=3)
    assert (raised.value.reason, trio.current_time()) == ("stalled", 3)
    await peer.aclose()


@pytest.mark.proves("G14")
@in_trio
async def test_a_thousand_words_on_the_path_are_taken_and_more_in_a_second_are_a_flood() -> None:
    side, peer = await greeted_by_hand(memory_pair)
    changes = list[None]()
    side.link.path_changed = lambda: changes.append(None)
    flips = encode_control(PathState(is_open=False)) + encode_control(PathState(is_open=True))
    await peer.send_all(flips * FLOOD_LIMIT)
    assert (await end_of(side.link)).reason == "flood"
    assert len(changes) == FLOOD_LIMIT - 1  # HELLO was one, too


# Packets.


@pytest.mark.proves("F22")
@in_trio
async def test_packets_arrive_whole_and_in_order_however_they_are_sliced(clock: MockClock) -> None:
    peer, here = memory_stream_pair()
    side = Side(ImpairedStream(here, slice_bytes=1, delay_s=0.001))
    packets = [b"\x45" + bytes([number]) * size for number, size in enumerate((19, 40, 600, 3, 1500))]
    await peer.send_all(encode_control(CLIENT) + encode_packets(packets) + KEEPALIVE + UNKNOWN + FRAME + CLOSE)
    expected = [packet for packet in packets if len(packet) >= 20] + [PACKET]
    assert await side.link.hear_first_word() == CLIENT
    assert await take_packets(side.link, len(expected)) == expected
    assert (await end_of(side.link)).reason == "closed"
    assert side.counts == {"too_short": 1, "unknown_control": 1}


@pytest.mark.parametrize("interval_s", [0.0, 3600.0])
@in_trio
async def test_packets_in_front_of_a_queue_that_stays_are_marked_and_no_others(
    interval_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of twenty that are there at once, the first are found at once, and the last have next to nothing behind them."""
    monkeypatch.setattr("enlink.link.QUEUE_INTERVAL_S", interval_s)
    here, there = await tcp_stream_pair(buffer_bytes=2 * 1024 * 1024)
    side = Side(here)
    await there.send_all(encode_control(CLIENT))
    await side.link.hear_first_word()
    knows_ecn, knows_not = ecn_packet(2), ecn_packet(0)
    await there.send_all(encode_packets([knows_ecn, knows_not] * 10))
    while side.link.unread_bytes() < 20 * len(knows_ecn):  # noqa: ASYNC110  # the kernel tells nobody
        await trio.sleep(0.01)
    heard = await take_packets(side.link, 20)
    assert {packet[1] for packet in heard[1::2]} == {0}
    assert side.link.marked == sum(packet[1] == 3 for packet in heard)
    assert heard[0][1] == heard[-2][1] == 2
    assert 2 <= side.link.marked <= 8 if interval_s == 0 else side.link.marked == 0
    # Of small packets nobody asks what waits behind them.
    before, small = side.link.marked, knows_ecn[:100]
    await there.send_all(encode_packets([small] * 10_000))
    assert {packet[1] for packet in await take_packets(side.link, 10_000)} == {2}
    assert side.link.marked == before
    await there.send_all(encode_packets([knows_ecn[:100]]))
    assert (await take_packets(side.link, 1))[0][1] == 2
    assert side.link.unread_bytes() == 0
    await there.aclose()
    await side.link.aclose()
    assert side.link.unread_bytes() == 0


def ecn_packet(service: int) -> bytes:
    return bytes((0x45, service)) + bytes(60_000)


@pytest.mark.proves("F21", "F23", "F30")
@in_trio
async def test_many_senders_never_cut_into_each_others_frames(make_tight_pair: MakePair) -> None:
    dialler, listener = await greeted(make_tight_pair)
    senders, rounds = 6, 25

    async def send(number: int) -> None:
        choice = random.Random(number)
        for count in range(rounds):
            size = choice.randrange(20, 12_000)
            run = [b"\x45" + bytes([number, count]) + bytes([number]) * size for _ in range(choice.randrange(1, 3))]
            await dialler.link.send(encode_packets(run))
        await dialler.link.send(encode_packets([b"\x60" + bytes([number]) * 39]))

    seen: Counter[int] = Counter()
    done = 0
    async with trio.open_nursery() as nursery:
        for number in range(senders):
            nursery.start_soon(send, number)
        while done < senders:
            for packet in map(bytes, await listener.link.receive()):
                number = packet[1]
                if packet[0] == 0x60:
                    done += 1
                    assert seen[number] == rounds - 1
                else:
                    assert packet[3:] == bytes([number]) * len(packet[3:])
                    assert packet[2] in (seen[number], seen[number] + 1)  # a run is one or two packets
                    seen[number] = packet[2]
    await dialler.link.aclose()
    await listener.link.aclose()


@in_trio
async def test_both_directions_run_at_once(make_tight_pair: MakePair) -> None:
    sides = await greeted(make_tight_pair)
    packets = [b"\x45" + bytes([count % 251]) * (997 * count % 30_000 + 19) for count in range(100)]

    async def send(link: Link) -> None:
        for packet in packets:
            await link.send(encode_packets([packet]))

    async def receive(link: Link) -> None:
        assert await take_packets(link, len(packets)) == packets

    async with trio.open_nursery() as nursery:
        for side in sides:
            nursery.start_soon(send, side.link)
            nursery.start_soon(receive, side.link)
    for side in sides:
        await side.link.aclose()


@pytest.mark.proves("G27")
@pytest.mark.parametrize("task", ["sends", "receives"])
@in_trio
async def test_a_link_that_always_finds_work_gives_others_their_turn(task: str) -> None:
    left, right = await tcp_stream_pair()
    side, turns, count = Side(right), 0, 320

    async def take_turns() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(take_turns)
        await wait_for_turn()
        turns = 0
        for _ in range(count):
            if task == "sends":
                await side.link.send(FRAME)
            else:
                os.write(left.socket.fileno(), FRAME)  # without a checkpoint of its own
                await take_packets(side.link, 1)
        assert count // 16 - 1 <= turns <= count // 4
        nursery.cancel_scope.cancel()
    await side.link.aclose()
    await left.aclose()


async def wait_for_turn() -> None:
    for _ in range(3):
        await trio.lowlevel.checkpoint()


@in_trio
async def test_a_send_waits_for_its_peer_as_long_as_it_takes(make_tight_pair: MakePair, clock: MockClock) -> None:
    side, peer = await greeted_by_hand(make_tight_pair)
    packets = [b"\x45" + bytes(50_000)] * 40
    heard: list[Any] = []

    async def read_later() -> None:
        await trio.sleep(3600)
        heard.extend(await hear_all(peer))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read_later)
        await side.link.send(encode_packets(packets))
        assert trio.current_time() >= 3600
        nursery.start_soon(side.link.aclose)
    assert heard == packets
    await peer.aclose()


# Without a task for each run.


@in_trio
async def test_what_is_taken_at_once_is_not_returned() -> None:
    side, peer = await greeted_by_hand(tcp_stream_pair)
    taken: list[bytes] = []

    def take(packets: Packets) -> bool:
        if len(taken) == 3:
            return False
        taken.extend(map(bytes, packets))
        return True

    def has_taken(count: int) -> bool:
        return len(taken) == count

    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def speak() -> None:
            for number in range(4):
                await peer.send_all(encode_packets([PACKET + bytes([number])]))
                await wait_until(partial(has_taken, min(number + 1, 3)))

        assert [bytes(packet) for packet in await side.link.receive(take)] == [PACKET + b"\3"]
    assert taken == [PACKET + bytes([number]) for number in range(3)]
    # And without, everything is returned again.
    await peer.send_all(FRAME)
    assert await take_packets(side.link, 1) == [PACKET]
    await side.link.aclose()
    await peer.aclose()


@in_trio
async def test_other_messages_among_what_is_taken_are_heard() -> None:
    side, peer = await greeted_by_hand(tcp_stream_pair)
    taken: list[bytes] = []

    def take(packets: Packets) -> bool:
        taken.extend(map(bytes, packets))
        return True

    for message in (FRAME, encode_control(Keepalive()) + FRAME, FRAME + b"\0\0\0\0" + FRAME, FRAME[:9]):
        await peer.send_all(message)
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def hear() -> None:
            with pytest.raises(LinkEnded, match="enough"):
                await side.link.receive(take)

        await wait_until(lambda: len(taken) == 4)
        await peer.send_all(FRAME[9:] + encode_control(Close("enough")))
    assert taken == [PACKET] * 5
    assert side.counts == {"empty": 1}
    await side.link.aclose()
    await peer.aclose()


@in_trio
async def test_what_was_sent_at_once_is_whole_when_the_link_is_closed(clock: MockClock) -> None:
    run = encode_packets([b"\x45" + bytes(60_000)] * 40)
    for is_eng in (True, False):
        if is_eng:
            side, peer = await greeted_by_hand(tcp_stream_pair)
        else:
            peer, here = await tcp_stream_pair(buffer_bytes=65_536)
            side = Side(here)
            side.link.skip_greeting()
        assert side.link.send_at_once(run)
        assert not side.link.can_send_at_once
        assert not side.link.send_at_once(FRAME), "the kernel has no room, and one run waits already"
        heard: list[Any] = []

        async def listen(peer: Stream = peer, heard: list[Any] = heard) -> None:
            heard.extend(await hear_all(peer))
            await peer.aclose()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(listen)
            await side.link.aclose(Close("bye"))
        assert heard == [b"\x45" + bytes(60_000)] * 40 + ([Close("bye")] if is_eng else [])


@in_trio
async def test_sending_at_once_to_a_peer_that_is_gone_leaves_the_telling_to_send() -> None:
    peer, here = await tcp_stream_pair()
    side = Side(here)
    side.link.skip_greeting()
    reset(peer)
    with trio.fail_after(PATIENCE_S):
        while side.link.send_at_once(FRAME):
            await trio.lowlevel.checkpoint()
    with pytest.raises(LinkEnded) as raised:
        await side.link.send(FRAME)
    assert raised.value.reason == "reset"
    assert (await end_of(side.link)).reason == "reset"
    await side.link.aclose()
    assert not side.link.send_at_once(FRAME)


@pytest.mark.proves("F23")
@in_trio
async def test_a_tcp_peer_that_takes_nothing_is_told_from_one_that_is_slow(clock: MockClock) -> None:
    slow, here = await tcp_stream_pair(buffer_bytes=65_536)
    side = Side(here)
    run = encode_packets([b"\x45" + bytes(60_000)] * 20)

    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def read_slowly() -> None:
            while True:
                await trio.sleep(5)
                await slow.receive_some(1_000_000)

        await side.link.send(run, stall_limit_s=10)
        assert trio.current_time() > 20
        nursery.cancel_scope.cancel()
    began = trio.current_time()
    with pytest.raises(LinkEnded, match="taken nothing for 10 s") as raised:
        await side.link.send(run, stall_limit_s=10)
    assert raised.value.reason == "stalled"
    assert trio.current_time() - began == pytest.approx(10)
    await side.link.aclose()
    await slow.aclose()


@in_trio
async def test_a_stream_that_takes_nothing_is_stalled_too(clock: MockClock) -> None:
    _, here = lockstep_stream_pair()
    side = Side(here)
    with pytest.raises(LinkEnded) as raised:
        await side.link.send(FRAME, stall_limit_s=2)
    assert (raised.value.reason, trio.current_time()) == ("stalled", 2)


# The end.

SESSION = [encode_control(CLIENT), FRAME, CLOSE]
CUTS = range(sum(map(len, SESSION)) + 1)


@pytest.mark.proves("D10", "F25", "F34", "F35", "G18")
@pytest.mark.parametrize("is_dialler", [False, True], ids=["listener", "dialler"])
@in_trio
async def test_a_cut_is_told_from_an_end_at_every_byte(make_pair: MakePair, is_dialler: bool, clock: MockClock) -> None:
    stream = b"".join(SESSION)
    frame_ends = {sum(map(len, SESSION[:count])) for count in range(4)}
    for cut in CUTS:
        peer, here = await make_pair()
        side = Side(here)
        await peer.send_all(stream[:cut])
        await peer.send_eof()
        heard: list[bytes] = []
        ended = await end_of(side.link, is_dialler=is_dialler, heard=heard)
        # Who connects and goes without a word has cut nothing; a dialler's HELLO is a word as well.
        expected = "closed" if cut == len(stream) else "eof" if cut == 0 and not is_dialler else "truncated"
        assert ended.reason == expected, cut
        assert heard == [PACKET] * (cut >= len(SESSION[0]) + len(FRAME)), cut
        assert side.link.is_between_frames == (cut in frame_ends)
        await side.link.aclose()
        await peer.aclose()


@pytest.mark.proves("F17", "F34", "F35")
@in_trio
async def test_of_a_raw_peer_a_cut_inside_a_frame_is_known(make_pair: MakePair, clock: MockClock) -> None:
    for cut in range(2 * len(FRAME) + 1):
        peer, here = await make_pair()
        side = Side(here)
        await peer.send_all((FRAME * 2)[:cut])
        await peer.send_eof()
        ended = await end_of(side.link)
        assert ended.reason == ("truncated" if cut % len(FRAME) else "eof"), cut
        if ended.reason == "eof":  # its sending side only: replies still get there
            await side.link.send(FRAME)
            await side.link.aclose()
            assert await hear_all(peer) == [PACKET]
        await side.link.aclose()
        await peer.aclose()


@pytest.mark.proves("F18", "F25")
@in_trio
async def test_a_reset_is_told_from_an_end_at_every_byte() -> None:
    stream = b"".join(SESSION)
    for cut in CUTS[:-1]:
        peer, here = memory_stream_pair()
        side = Side(ImpairedStream(here, limit_bytes=cut, cut="reset"))
        await peer.send_all(stream)
        ended = await end_of(side.link)
        assert (ended.reason, ended.exit_code) == ("reset", 69), cut


@pytest.mark.proves("F18")
@in_trio
async def test_a_tcp_reset_inside_a_frame_gives_no_part_of_a_packet() -> None:
    peer, here = await tcp_stream_pair()
    side = Side(here)
    await peer.send_all(FRAME + FRAME[:50])
    assert await take_packets(side.link, 1) == [PACKET]
    reset(peer)
    with trio.fail_after(PATIENCE_S):
        ended = await end_of(side.link)
    assert ended.reason == "reset"
    assert "Connection reset by peer" in str(ended)
    with pytest.raises(LinkEnded, match="the connection broke") as raised:
        await side.link.send(FRAME)
    assert raised.value.reason == "reset"
    await side.link.aclose(Close("nobody there"))
    assert here.socket.fileno() == -1


@pytest.mark.proves("F18")
@in_trio
async def test_a_reset_that_a_sender_met_first_is_no_end_to_who_receives() -> None:
    """The kernel tells it once, whoever asks first."""
    peer, here = await tcp_stream_pair()
    side = Side(here)
    reset(peer)
    with pytest.raises(LinkEnded, match="Connection reset by peer"):
        await side.link.send(FRAME)
    ended = await end_of(side.link)
    assert (ended.reason, str(ended)) == ("reset", "the connection broke: [Errno 104] Connection reset by peer")
    await side.link.aclose()


@in_trio
async def test_a_broken_connection_is_closed_without_a_word() -> None:
    peer, here = await tcp_stream_pair()
    side = Side(here)
    side.link.skip_greeting()
    await here.send_all(FRAME)
    reset(peer)
    await side.link.aclose(Close("nobody there"))
    assert here.socket.fileno() == -1


@in_trio
async def test_the_reason_of_an_orderly_end_reaches_the_peer(make_pair: MakePair, clock: MockClock) -> None:
    dialler, listener = await greeted(make_pair)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(dialler.link.aclose, Close("the agent is stopping"))
        ended = await end_of(listener.link)
        await listener.link.aclose()
    assert (ended.reason, str(ended)) == ("closed", "the peer closed the link: the agent is stopping")
    assert not isinstance(ended, PeerFault)


@in_trio
async def test_the_reason_of_a_refusal_reaches_the_peer(make_pair: MakePair, clock: MockClock) -> None:
    dialler, listener = await greeted(make_pair)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(listener.link.aclose, Error("another agent is connected: 192.0.2.7:40312"))
        ended = await end_of(dialler.link)
        await dialler.link.aclose()
    assert isinstance(ended, Refused)
    assert str(ended) == "the peer refused the link: another agent is connected: 192.0.2.7:40312"


@in_trio
async def test_an_end_without_a_word_is_a_cut_to_the_peer(make_pair: MakePair, clock: MockClock) -> None:
    dialler, listener = await greeted(make_pair)
    await dialler.link.aclose()
    assert (await end_of(listener.link)).reason == "truncated"
    await listener.link.aclose()


BAD_BYTES = [
    (b"\0\1\0\0", "frame_len", "you announced a frame of 65536 bytes, more than 65535"),
    (b"\xff\xff\xff\xff", "frame_len", "you announced a frame of 4294967295 bytes, more than 65535"),
    (JUNK * JUNK_LIMIT, "junk", "you sent 64 frames in a row that are no IP packets"),
    (KEEPALIVE * (FLOOD_LIMIT + 1), "flood", "you sent more than 1024 frames without a packet in a second"),
]


@pytest.mark.proves("D11", "D22", "F38", "F40")
@pytest.mark.parametrize(("data", "reason", "told"), BAD_BYTES, ids=["too-long", "much-too-long", "junk", "flood"])
@in_trio
async def test_who_breaks_the_protocol_is_told_and_its_link_ends(
    make_pair: MakePair, data: bytes, reason: str, told: str, clock: MockClock
) -> None:
    side, peer = await greeted_by_hand(make_pair)
    await peer.send_all(FRAME + data + FRAME)
    assert await take_packets(side.link, 1) == [PACKET]
    for _ in range(2):  # whoever asks again hears the same
        with pytest.raises(PeerFault) as raised:
            await side.link.receive()
        assert (raised.value.reason, raised.value.exit_code) == (reason, 76)
        assert str(raised.value) == told.replace("you", "the peer", 1)
    await side.link.aclose()
    heard = await hear_all(peer)
    assert heard[0] == Error(told)
    await peer.aclose()


@pytest.mark.proves("D11", "D22", "F38", "F40")
@pytest.mark.parametrize(("data", "reason", "text"), BAD_BYTES[:3], ids=["too-long", "much-too-long", "junk"])
@in_trio
async def test_a_raw_peer_that_breaks_the_protocol_is_told_nothing(data: bytes, reason: str, text: str) -> None:
    peer, here = memory_stream_pair()
    side = Side(here)
    await peer.send_all(FRAME + data)
    ended = await end_of(side.link)
    assert isinstance(ended, PeerFault)
    assert ended.reason == reason
    await side.link.aclose(Error("never said"))
    assert await hear_all(peer) == []


@in_trio
async def test_a_fault_is_reported_although_the_peer_takes_no_more(make_tight_pair: MakePair, clock: MockClock) -> None:
    side, peer = await greeted_by_hand(make_tight_pair)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(side.link.send, encode_packets([b"\x45" + bytes(60_000)] * 20)))
        await wait_all_tasks_blocked()
        nursery.start_soon(peer.send_all, b"\xff\xff\xff\xff")
        began = trio.current_time()
        with pytest.raises(PeerFault) as raised:
            await side.link.receive()
        assert raised.value.reason == "frame_len"
        assert trio.current_time() - began <= 1.1
        nursery.cancel_scope.cancel()
    await side.link.aclose()
    await peer.aclose()


@in_trio
async def test_a_fault_is_reported_although_the_peer_is_gone() -> None:
    peer, here = await tcp_stream_pair()
    side = Side(here)
    await peer.send_all(encode_control(CLIENT))
    await side.link.hear_first_word()
    await peer.send_all(b"\xff\xff\xff\xff")
    await trio.lowlevel.wait_readable(here.socket)
    data = os.read(here.socket.fileno(), 100)
    side.link._events.extend(feed(side.link._decoder, data))  # it has been read when the reset comes
    reset(peer)
    assert (await end_of(side.link)).reason == "frame_len"
    await side.link.aclose()


@in_trio
async def test_a_link_that_was_closed_stays_closed() -> None:
    side, peer = await greeted_by_hand(memory_pair)
    await peer.send_all(CLOSE + FRAME)
    assert [(await end_of(side.link)).reason for _ in range(2)] == ["closed", "closed"]


@in_trio
async def test_closing_waits_a_second_for_a_peer_that_takes_nothing(
    make_tight_pair: MakePair, clock: MockClock
) -> None:
    side, peer = await greeted_by_hand(make_tight_pair)
    with trio.move_on_after(1):
        await side.link.send(encode_packets([b"\x45" + bytes(60_000)] * 20))
    began = trio.current_time()
    await side.link.aclose(Close("bye"))
    assert trio.current_time() == began  # the send was cut: there is nothing left to say
    assert Close("bye") not in await hear_all(peer)
    await peer.aclose()

    side, peer = await greeted_by_hand(make_tight_pair)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(expect_end, side.link.send, encode_packets([b"\x45" + bytes(60_000)] * 20)))
        await wait_all_tasks_blocked()
        began = trio.current_time()
        await side.link.aclose(Close("bye"))
        assert trio.current_time() - began == pytest.approx(1)
    await peer.aclose()


async def expect_end(function: Callable[..., Awaitable[object]], *arguments: Any) -> None:
    with pytest.raises(LinkEnded):
        await function(*arguments)


@in_trio
async def test_closing_waits_a_second_for_a_peer_that_does_not_close(make_pair: MakePair, clock: MockClock) -> None:
    side, peer = await greeted_by_hand(make_pair)
    began = trio.current_time()
    await side.link.aclose(Close("bye"))
    assert trio.current_time() - began == pytest.approx(1)
    assert await hear_all(peer) == [Close("bye")]
    await peer.aclose()


@in_trio
async def test_closing_takes_no_time_when_the_peer_answers_the_end_with_its_own(
    make_pair: MakePair, clock: MockClock
) -> None:
    side, peer = await greeted_by_hand(make_pair)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(side.link.aclose, Close("bye"))
        assert await hear_all(peer) == [Close("bye")]
        await peer.aclose()
    assert trio.current_time() == 0


@in_trio
async def test_closing_takes_no_time_when_the_peer_closes_too(make_pair: MakePair, clock: MockClock) -> None:
    side, peer = await greeted_by_hand(make_pair)
    await peer.send_eof()
    began = trio.current_time()
    await side.link.aclose(Close("bye"))
    assert trio.current_time() == began
    await peer.aclose()


@pytest.mark.proves("F46")
@in_trio
async def test_closing_takes_a_moment_even_if_the_peer_never_stops_sending() -> None:
    side, peer = await greeted_by_hand(tcp_stream_pair)

    with trio.fail_after(8):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_for_ever, peer, FRAME * 1000)
            await side.link.aclose(Close("bye"))
    await peer.aclose()


@in_trio
async def test_last_words_arrive_although_nobody_reads_what_the_peer_sent() -> None:
    """Closing a socket with bytes unread resets the connection, and the peer would lose what it has not read yet."""
    side, peer = await greeted_by_hand(tcp_stream_pair)
    await peer.send_all(FRAME * 500)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(side.link.aclose, Close("bye"))
        assert await hear_all(peer) == [Close("bye")]
        await peer.aclose()


@in_trio
async def test_closing_lets_a_send_finish_that_is_under_way(clock: MockClock) -> None:
    side, peer = await greeted_by_hand(lockstep_pair)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(side.link.send, FRAME))
        await wait_all_tasks_blocked()
        nursery.start_soon(side.link.aclose, Close("bye"))
        await wait_all_tasks_blocked()
        # Once closing has begun, nobody gets in any more.
        with pytest.raises(LinkEnded, match="closed here"):
            await side.link.send(FRAME)
        assert await hear_all(peer) == [PACKET, Close("bye")]


@in_trio
async def test_closing_twice_and_from_a_cancelled_scope_is_fine(make_pair: MakePair, clock: MockClock) -> None:
    side, peer = await greeted_by_hand(make_pair)
    with trio.CancelScope() as scope:
        scope.cancel()
        await side.link.aclose(Close("cancelled"))
    await side.link.aclose(Close("not said twice"))
    assert await hear_all(peer) == [Close("cancelled")]
    for use in (side.link.receive, partial(side.link.send, FRAME), side.link.hear_first_word):
        with pytest.raises(LinkEnded, match="closed here") as raised:
            await use()
        assert raised.value.reason == "closed"
    await peer.aclose()


@in_trio
async def test_who_receives_and_who_sends_meanwhile_learn_that_the_link_was_closed_here(
    make_tight_pair: MakePair, clock: MockClock
) -> None:
    side, peer = await greeted_by_hand(make_tight_pair)
    reasons = []

    async def until_the_end(use: Callable[[], Awaitable[object]]) -> None:
        with pytest.raises(LinkEnded) as raised:
            await use()
        reasons.append(raised.value.reason)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(until_the_end, side.link.receive)
        for _ in range(2):  # one sends, and the other waits for it
            nursery.start_soon(until_the_end, partial(side.link.send, encode_packets([b"\x45" + bytes(60_000)] * 20)))
        await wait_all_tasks_blocked()
        await side.link.aclose()
    assert sorted(reasons) == ["closed", "closed", "cut"]
    await peer.aclose()


@in_trio
async def test_a_stream_that_is_closed_under_the_link_is_a_closed_link(make_pair: MakePair, clock: MockClock) -> None:
    side, peer = await greeted_by_hand(make_pair)
    await side.link._stream.aclose()
    for use in (side.link.receive, partial(side.link.send, FRAME)):
        with pytest.raises(LinkEnded, match="closed here") as raised:
            await use()
        assert raised.value.reason == "closed"
    await side.link.aclose(Close("too late"))
    await peer.aclose()


@in_trio
async def test_closing_with_a_word_while_another_task_receives(make_pair: MakePair, clock: MockClock) -> None:
    side, peer = await greeted_by_hand(make_pair)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(expect_end, side.link.receive)
        await wait_all_tasks_blocked()
        await side.link.aclose(Close("bye"))
    assert await hear_all(peer) == [Close("bye")]
    await peer.aclose()


@in_trio
async def test_closing_at_any_moment_of_a_receive_ends_it_as_closed() -> None:
    for count in range(16):
        side, peer = await greeted_by_hand(tcp_stream_pair)
        port: Any = side.link._port
        port._in_a_row = 15  # so that it lets others go first, and `aclose` may be one of them
        async with trio.open_nursery() as nursery:
            nursery.start_soon(expect_end, side.link.receive)
            nursery.start_soon(side.link.aclose, Close("bye"))
            assert await hear_all(peer) == [Close("bye")], count
            await peer.aclose()


@in_trio
async def test_a_stream_that_cannot_be_closed_by_half_is_closed_whole() -> None:
    left, right = memory_stream_pair()

    class WholeOnly(trio.abc.Stream):
        async def receive_some(self, max_bytes: int | None = None) -> bytes:
            return bytes(await left.receive_some(max_bytes))

        async def send_all(self, data: bytes | bytearray | memoryview) -> None:
            await left.send_all(data)

        async def wait_send_all_might_not_block(self) -> None:
            await left.wait_send_all_might_not_block()

        async def aclose(self) -> None:
            await left.aclose()

    side = Side(WholeOnly())
    await right.send_all(encode_control(CLIENT))
    await side.link.hear_first_word()
    await side.link.aclose(Close("bye"))
    assert await hear_all(right) == [GATEWAY, Close("bye")]


# Cancellation.


class CancelAtStep(trio.abc.Instrument):
    """Cancels a task as it is about to make its n-th step, which is between two of its awaits."""

    def __init__(self, step: int) -> None:
        self.scope = trio.CancelScope()
        self._left = step
        self._task: trio.lowlevel.Task | None = None

    def watch(self) -> None:
        self._task = trio.lowlevel.current_task()

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self._task:
            self._left -= 1
            if not self._left:
                self.scope.cancel()


@pytest.mark.proves("F25")
@pytest.mark.parametrize("make", [memory_pair, lockstep_pair, small_tcp_pair])
def test_a_link_that_is_cancelled_at_any_step_is_closed_or_cut_and_never_garbled(make: MakePair) -> None:
    """What the peer hears is a part of what was to be said, and it ends with CLOSE, or inside a frame, or truncated."""
    packets = [b"\x45" + bytes([count]) * size for count, size in enumerate((30, 5000, 60_000, 40))]
    finished, step, ends = False, 0, Counter[str]()

    async def scenario(instrument: CancelAtStep) -> None:
        left, right = await make()
        dialler, listener = Side(left, CLIENT), Side(right)

        async def dial() -> None:
            nonlocal finished
            instrument.watch()
            with instrument.scope:
                await dialler.link.greet()
                for packet in packets:
                    await dialler.link.send(encode_packets([packet]))
                await take_packets(dialler.link, 1)
            finished = not instrument.scope.cancelled_caught
            await dialler.link.aclose(Close("bye"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(dial)
            heard: list[bytes] = []
            try:
                while True:
                    heard += map(bytes, await listener.link.receive())
                    if len(heard) == len(packets):
                        await listener.link.send(FRAME)
            except LinkEnded as ended:
                ends[ended.reason] += 1
            await listener.link.aclose()
        assert heard == packets[: len(heard)]

    descriptors = open_descriptors()
    while not finished:
        step += 1
        assert step < 1000
        instrument = CancelAtStep(step)
        trio.run(scenario, instrument, instruments=[instrument])
    assert step > 5
    assert set(ends) <= {"closed", "truncated", "eof", "reset"}
    assert ends["closed"] > 0
    assert open_descriptors() == descriptors


@in_trio
async def test_a_send_that_was_cut_is_the_last_one(make_tight_pair: MakePair, clock: MockClock) -> None:
    side, peer = await greeted_by_hand(make_tight_pair)
    big = b"\x45" + bytes(65_000)
    with trio.move_on_after(1):
        await side.link.send(encode_packets([PACKET] + [big] * 20))
    with pytest.raises(LinkEnded, match="cut short") as raised:
        await side.link.send(FRAME)
    assert raised.value.reason == "cut"
    await side.link.aclose(Close("bye"))
    heard = await hear_all(peer)
    assert heard[0] == PACKET
    assert set(heard[1:]) <= {big, "half"}  # in memory, what was to be sent may arrive all the same
    await peer.aclose()


@in_trio
async def test_a_send_that_was_cancelled_before_its_first_byte_spoils_nothing(clock: MockClock) -> None:
    side, peer = await greeted_by_hand(lockstep_pair)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(side.link.send, FRAME))
        await wait_all_tasks_blocked()
        with trio.move_on_after(1):
            await side.link.send(FRAME)  # waits for the first one
        nursery.start_soon(side.link.aclose, Close("bye"))
        assert await hear_all(peer) == [PACKET, Close("bye")]
    side, peer = await greeted_by_hand(memory_pair)
    with trio.CancelScope() as scope:
        scope.cancel()
        await side.link.send(FRAME)
    await peer.send_eof()
    await side.link.aclose(Close("bye"))
    assert await hear_all(peer) == [Close("bye")]


@in_trio
async def test_a_receive_that_is_cancelled_loses_nothing(make_pair: MakePair, clock: MockClock) -> None:
    peer, here = await make_pair()
    side = Side(ImpairedStream(here, slice_bytes=7, delay_s=0.03) if make_pair is memory_pair else here)
    packets = [b"\x45" + bytes([count]) * (count % 50 + 19) for count in range(30)]
    choice = random.Random(1)

    async def send() -> None:
        stream = encode_packets(packets)
        for start in range(0, len(stream), 23):
            await peer.send_all(stream[start : start + 23])
            await trio.sleep(choice.random() / 20)
        await peer.send_eof()

    received: list[bytes] = []
    cancelled = 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        while len(received) < len(packets):
            with trio.move_on_after(choice.random() / 10) as scope:
                received += map(bytes, await side.link.receive())
            cancelled += scope.cancelled_caught
    assert received == packets
    assert cancelled > 5
    await side.link.aclose()
    await peer.aclose()


# Liveness.


@pytest.mark.proves("F19")
@in_trio
async def test_a_peer_that_falls_silent_is_noticed_in_time(make_pair: MakePair, clock: MockClock) -> None:
    side, peer = await greeted_by_hand(make_pair)
    began = trio.current_time()
    with pytest.RaisesGroup(LinkEnded) as raised:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(side.link.receive)
            nursery.start_soon(side.link.keep_alive)
    (ended,) = raised.value.exceptions
    assert isinstance(ended, LinkEnded)
    assert ended.reason == "keepalive"
    assert "said nothing for 1" in str(ended)
    assert SILENCE_LIMIT_S <= trio.current_time() - began <= SILENCE_LIMIT_S + 2 * WATCH_S
    await side.link.aclose()
    await peer.aclose()


@in_trio
async def test_two_idle_links_keep_each_other_alive(make_pair: MakePair, clock: MockClock) -> None:
    sides = await greeted(make_pair)
    with trio.move_on_after(4 * SILENCE_LIMIT_S) as idle:
        async with trio.open_nursery() as nursery:
            for side in sides:
                nursery.start_soon(side.link.receive)
                nursery.start_soon(side.link.keep_alive)
    assert idle.cancelled_caught
    for side in sides:
        await side.link.aclose()


@in_trio
async def test_an_idle_link_says_that_it_lives_and_a_busy_one_need_not(clock: MockClock) -> None:
    side, peer = await greeted_by_hand(memory_pair)
    with trio.move_on_after(100):
        await side.link.keep_alive()
    with trio.move_on_after(100):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(side.link.keep_alive)
            while True:
                await side.link.send(FRAME)
                await trio.sleep(KEEPALIVE_INTERVAL_S - WATCH_S)
    await side.link.aclose()
    heard = await hear_all(peer)
    keepalives, others = heard.count(Keepalive()), heard.count(PACKET)
    assert keepalives + others == len(heard)
    assert others == 100 / (KEEPALIVE_INTERVAL_S - WATCH_S)
    assert 100 / (KEEPALIVE_INTERVAL_S + WATCH_S) <= keepalives <= 100 / KEEPALIVE_INTERVAL_S


@in_trio
async def test_silence_does_not_count_while_nobody_listens(make_pair: MakePair, clock: MockClock) -> None:
    """A link that is not read, because what it leads to is slow, is not dead."""
    side, peer = await greeted_by_hand(make_pair)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(side.link.keep_alive)
        await trio.sleep(3 * SILENCE_LIMIT_S)
        await peer.send_all(FRAME)
        assert await take_packets(side.link, 1) == [PACKET]
        nursery.cancel_scope.cancel()
    await side.link.aclose()
    await peer.aclose()


@pytest.mark.proves("F07", "F56")
@in_trio
async def test_time_in_which_we_were_stopped_does_not_count_against_the_peer(clock: MockClock) -> None:
    side, peer = await greeted_by_hand(memory_pair)
    received = 0

    async def receive() -> None:
        nonlocal received
        while True:
            received += (await side.link.receive()).count

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        nursery.start_soon(side.link.keep_alive)
        for _ in range(3):
            await trio.sleep(WATCH_S / 2)
            clock.jump(30)  # as after SIGSTOP and SIGCONT: whatever the peer said meanwhile has still to be read
            await trio.sleep(WATCH_S / 2)
            await peer.send_all(FRAME)
        nursery.cancel_scope.cancel()
    assert received >= 2


@in_trio
async def test_a_raw_peer_may_be_silent_for_ever(make_pair: MakePair, clock: MockClock) -> None:
    peer, here = await make_pair()
    side = Side(here)
    await peer.send_all(FRAME)
    with trio.move_on_after(4 * SILENCE_LIMIT_S) as idle:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(side.link.keep_alive)
            while True:
                await side.link.receive()
    assert idle.cancelled_caught
    await side.link.aclose()
    assert await hear_all(peer) == []
    await peer.aclose()


@pytest.mark.proves("F36")
@pytest.mark.parametrize("before", [b"", FRAME], ids=["silent", "raw"])
@pytest.mark.parametrize("part", [1, 4, 50])
@in_trio
async def test_half_a_frame_and_silence_ends_any_link(before: bytes, part: int, clock: MockClock) -> None:
    peer, here = memory_stream_pair()
    side = Side(here)
    await peer.send_all(before + FRAME[:part])
    with pytest.RaisesGroup(PeerFault) as raised:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(end_of_forever, side.link)
            nursery.start_soon(side.link.keep_alive)
    (ended,) = raised.value.exceptions
    assert isinstance(ended, PeerFault)
    assert ended.reason == "frame_deadline"
    assert SILENCE_LIMIT_S <= trio.current_time() <= SILENCE_LIMIT_S + 2 * WATCH_S


@pytest.mark.proves("D20")
@in_trio
async def test_a_first_word_that_is_spread_over_time_is_not_waited_for(clock: MockClock) -> None:
    peer, here = memory_stream_pair()
    side = Side(ImpairedStream(here, slice_bytes=1, delay_s=1))
    await trio.sleep(100)  # a connection may be silent for ever; it is the first byte that counts
    await peer.send_all(FRAME)
    with pytest.RaisesGroup(PeerFault) as raised:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(side.link.receive)
            nursery.start_soon(side.link.keep_alive)
    (ended,) = raised.value.exceptions
    assert isinstance(ended, PeerFault)
    assert (ended.reason, str(ended)) == ("frame_deadline", "not a word within 10 s of the first byte")
    assert 100 + GREETING_DEADLINE_S < trio.current_time() <= 100 + GREETING_DEADLINE_S + 2 * WATCH_S


@in_trio
async def test_an_original_peer_whose_packets_are_taken_at_once_has_spoken(
    make_pair: MakePair, clock: MockClock
) -> None:
    here, there = await make_pair()
    link, count = Side(here).link, 0
    link.skip_greeting()

    def take(packets: Packets) -> bool:
        nonlocal count
        count += packets.count
        return True

    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.keep_alive)
        nursery.start_soon(link.receive, take)
        for number in range(1, 4):
            await there.send_all(FRAME)
            await trio.sleep(GREETING_DEADLINE_S)
            assert count == number
        nursery.cancel_scope.cancel()
    await link.aclose()
    await there.aclose()


@pytest.mark.proves("D20")
@in_trio
async def test_who_has_said_its_first_word_in_time_may_go_on_slowly(clock: MockClock) -> None:
    peer, here = memory_stream_pair()
    side = Side(ImpairedStream(here, slice_bytes=15, delay_s=4))
    await peer.send_all(encode_packets([PACKET[:20]]) + FRAME)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(side.link.keep_alive)
        assert await take_packets(side.link, 2) == [PACKET[:20], PACKET]
        nursery.cancel_scope.cancel()
    assert trio.current_time() > 30


@pytest.mark.proves("F19")
@in_trio
async def test_silence_is_noticed_while_a_send_waits(make_tight_pair: MakePair, clock: MockClock) -> None:
    side, peer = await greeted_by_hand(make_tight_pair)
    began = trio.current_time()
    with pytest.RaisesGroup(LinkEnded):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(side.link.send, encode_packets([b"\x45" + bytes(60_000)] * 20)))
            nursery.start_soon(side.link.receive)
            nursery.start_soon(side.link.keep_alive)
    assert trio.current_time() - began <= SILENCE_LIMIT_S + 2 * WATCH_S
    await side.link.aclose()
    await peer.aclose()


# Hostile peers.

FLOODS = {
    "hello": encode_control(CLIENT),
    "keepalive": KEEPALIVE,
    "unknown": UNKNOWN,
    "junk": JUNK,
    "junk-and-packets": JUNK + FRAME[:3] + b"\x14\x45" + bytes(19),
    "close": CLOSE,
    "header": b"\0\0\xff\xff",
}


@pytest.mark.proves("D11", "D22", "F46", "G14")
@pytest.mark.parametrize("flood", FLOODS)
def test_a_flood_ends_its_own_link_and_holds_up_no_other(flood: str) -> None:
    """The longest pause of another task is 8 times what it may be, for the sake of busy machines."""
    longest_s = 0.0

    async def watch() -> None:
        nonlocal longest_s
        while True:
            before = time.monotonic()
            await trio.sleep(0.005)
            longest_s = max(longest_s, time.monotonic() - before)

    async def hostile() -> None:
        peer, here = await tcp_stream_pair()
        side = Side(here)

        await peer.send_all(encode_control(CLIENT))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_for_ever, peer, FLOODS[flood] * 50_000)
            with trio.fail_after(PATIENCE_S):
                ended = await end_of(side.link)
            assert ended.reason in ("bad_control", "flood", "junk", "closed", "frame_len")
            await side.link.aclose()
        await peer.aclose()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            for _ in range(5):
                await hostile()
            nursery.cancel_scope.cancel()

    trio.run(main)
    assert longest_s < 8 * 0.05


@pytest.mark.proves("G14")
@in_trio
async def test_a_flood_is_one_in_whatever_pieces_it_comes(clock: MockClock) -> None:
    side, peer = await greeted_by_hand(memory_pair)
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def send() -> None:
            await trio.sleep(1.5)
            for _ in range(20):
                await peer.send_all(UNKNOWN * 100)
                await trio.sleep(0.05)

        assert (await end_of(side.link)).reason == "flood"
    assert side.counts == {"unknown_control": FLOOD_LIMIT}


@in_trio
async def test_a_thousand_messages_a_second_are_no_flood(clock: MockClock) -> None:
    side, peer = await greeted_by_hand(memory_pair)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(expect_end, end_of_forever, side.link)
        for _ in range(5):
            await peer.send_all(UNKNOWN * 1000)
            await trio.sleep(1)
        await peer.send_eof()
    assert side.counts == {"unknown_control": 5000}


async def end_of_forever(link: Link) -> None:
    raise await end_of(link)


@pytest.mark.proves("G2")
@in_trio
async def test_a_hundred_links_leave_nothing_behind() -> None:
    current_pump()  # which there is one of for each run
    await trio.lowlevel.checkpoint()
    tasks = trio.lowlevel.current_statistics().tasks_living
    descriptors = open_descriptors()
    for count in range(100):
        dialler, listener = await greeted(tcp_stream_pair)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(dialler.link.keep_alive)
            nursery.start_soon(listener.link.keep_alive)
            nursery.start_soon(expect_end, dialler.link.receive)
            await dialler.link.send(FRAME)
            await take_packets(listener.link, 1)
            nursery.start_soon(listener.link.aclose, [None, Close("bye"), Error("no")][count % 3])
            await dialler.link.aclose(Close("bye too"))
            nursery.cancel_scope.cancel()
    assert open_descriptors() == descriptors
    assert trio.lowlevel.current_statistics().tasks_living == tasks


# Words for people.


@pytest.mark.parametrize(
    ("hello", "words"),
    [
        (None, "raw peer"),
        (CLIENT, "enta client 'default' 192.168.0.1/24"),
        (Hello(Role.SERVER_AGENT, "b\x1b[2J"), r"enta server 'b\x1b[2J'"),
        (GATEWAY, "entg 'default'"),
    ],
)
def test_a_peer_is_described_in_a_few_printable_words(hello: Hello | None, words: str) -> None:
    assert describe(hello) == words


def test_the_page_gives_the_limits_that_hold() -> None:
    page = (Path(__file__).parents[3] / "docs" / "wire-format.md").read_text()
    assert f"for {GREETING_DEADLINE_S:.0f} s at most" in page
    assert f"something at least every {KEEPALIVE_INTERVAL_S:.0f} s" in page
    assert math.isclose(SILENCE_LIMIT_S, 10)
    assert f"Who hears nothing for\n{SILENCE_LIMIT_S:.0f} s" in page
