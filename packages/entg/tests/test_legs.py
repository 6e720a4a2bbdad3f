"""A gateway's legs, on streams in memory and a clock that jumps: who gets the place, how long, and what is counted."""

from __future__ import annotations

import functools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sized
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from ipaddress import IPv4Interface
from typing import Any

import pytest
import trio
from enlink.connection import Unreachable
from enlink.control import Close, ControlMessage, Error, Hello, Keepalive, PathState, Role, Unknown, decode_message
from enlink.endpoint import Tcp
from enlink.frame import Wire, encode_control, encode_packets
from enlink.link import SILENCE_LIMIT_S, Link
from enlink.status import Counters
from enlink.stream import Dialer
from enlink.testing.peers import Peer, ip_packet
from entg.connection import LAST_WORDS_S
from entg.legs import (
    CONNECTION_LIMIT,
    HALF_CLOSED_LIMIT_S,
    PROVISIONAL_AFTER_S,
    SILENT_STALL_LIMIT_S,
    STALL_LIMIT_S,
    Leg,
    LegName,
)
from entg.path import PAUSE_S
from entg.router import Router
from trio.testing import MockClock, lockstep_stream_pair, memory_stream_pair, wait_all_tasks_blocked

ALICE, BOB, FAR = "192.168.0.1", "192.168.0.2", "192.168.0.254"
REQUEST, REPLY = ip_packet(ALICE, FAR, b"request"), ip_packet(FAR, ALICE, b"reply")
AGENT = Hello(Role.CLIENT_AGENT, tun=(IPv4Interface(f"{ALICE}/24"),))
OTHER_AGENT = Hello(Role.CLIENT_AGENT, "other", tun=(IPv4Interface(f"{BOB}/24"),))
GATEWAY = Hello(Role.GATEWAY)
CHATTER = bytes((0x60, 0, 0, 0, 0, 0, 58, 255, 0xFE, 0x80)) + bytes(30)  # a router solicitation's header


def jumping(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run a test in trio, on a clock that jumps to what is due next."""

    @functools.wraps(test)
    def run(**fixtures: object) -> None:
        trio.run(functools.partial(test, **fixtures), clock=MockClock(autojump_threshold=0))

    return run


@dataclass
class Rig:
    """Both legs of a gateway, and what it takes to connect to them."""

    enta: Leg
    entg: Leg
    counters: Counters
    nursery: trio.Nursery

    def leg(self, name: LegName) -> Leg:
        return self.enta if name == "enta" else self.entg

    def connect(self, name: LegName, *, is_lockstep: bool = False) -> Peer:
        ours, theirs = lockstep_stream_pair() if is_lockstep else memory_stream_pair()
        self.nursery.start_soon(self.leg(name).accept, theirs)
        return Peer(ours)

    async def arrived(self, name: LegName) -> Peer:
        peer = self.connect(name)
        await trio.sleep(0.001)  # who comes at the same moment may be served in any order
        return peer

    async def greeted(self, name: LegName, hello: Hello) -> Peer:
        peer = self.connect(name)
        await peer.greet(hello)
        await wait_all_tasks_blocked()
        return peer

    async def spoken(self, name: LegName, packet: bytes) -> Peer:
        peer = self.connect(name)
        await peer.send(packet)
        await wait_all_tasks_blocked()
        return peer

    async def silent(self, name: LegName) -> Peer:
        peer = self.connect(name)
        await trio.sleep(PROVISIONAL_AFTER_S + 0.01)
        await wait_all_tasks_blocked()
        return peer

    def count(self, group: str, name: str) -> int:
        return self.counters.snapshot()[group].get(name, 0)


@asynccontextmanager
async def rig(wire: Wire = "auto") -> AsyncIterator[Rig]:
    router, counters = Router(), Counters()
    enta, entg = Leg("enta", router, counters, wire), Leg("entg", router, counters, wire)
    router.connect(enta, entg)
    with trio.fail_after(600):
        async with trio.open_nursery() as nursery:
            yield Rig(enta, entg, counters, nursery)
            nursery.cancel_scope.cancel()


async def until(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110  # a leg has no events for tests
        await trio.sleep(0.01)


async def until_longer(items: Sized, length: int) -> None:
    await until(lambda: len(items) > length)


def events(caplog: pytest.LogCaptureFixture, name: str) -> list[dict[str, Any]]:
    return [record.__dict__["fields"] for record in caplog.records if record.message == name]


# Who gets the place.


@jumping
async def test_packets_go_both_ways_between_eng_peers() -> None:
    async with rig() as legs:
        agent, gateway = await legs.greeted("enta", AGENT), await legs.greeted("entg", GATEWAY)
        await agent.send(REQUEST)
        assert await gateway.hear_packets(1) == [REQUEST]
        await gateway.send(REPLY, REQUEST)
        assert await agent.hear_packets(2) == [REPLY, REQUEST]
        assert legs.counters.snapshot()["from_enta"] == {"bytes": len(REQUEST) + 4, "packets": 1}
        assert legs.counters.snapshot()["to_enta"] == {"bytes": len(REPLY + REQUEST) + 8, "packets": 2}


@jumping
async def test_a_first_packet_is_forwarded_like_any_other() -> None:
    async with rig() as legs:
        gateway = await legs.greeted("entg", GATEWAY)
        await legs.spoken("enta", REQUEST)
        assert await gateway.hear_packets(1) == [REQUEST]


@jumping
async def test_control_messages_end_at_the_hop_and_no_raw_peer_ever_gets_one() -> None:
    async with rig() as legs:
        raw, gateway = await legs.spoken("enta", REQUEST), await legs.greeted("entg", GATEWAY)
        await gateway.say(Keepalive())
        await trio.sleep(3 * SILENCE_LIMIT_S / 4)
        await gateway.say(Keepalive())
        await gateway.send(REPLY)
        await gateway.stream.send_all(b"\0\0\0\x02\0\xff")  # a type of the future
        await gateway.say(Close("done"))
        assert await raw.hear_packets(1) == [REPLY]
        await raw.stream.aclose()
        assert legs.count("from_entg_dropped", "unknown_control") == 1


@jumping
async def test_a_silent_connection_is_nobody_for_300_ms_and_then_gets_packets_provisionally() -> None:
    async with rig() as legs:
        agent = legs.connect("enta")
        gateway = await legs.greeted("entg", GATEWAY)
        await trio.sleep(PROVISIONAL_AFTER_S - 0.01)
        await gateway.send(REQUEST)
        await wait_all_tasks_blocked()
        assert legs.count("to_enta_dropped", "no_link") == 1
        assert legs.enta.snapshot()["state"] == "waiting"
        await trio.sleep(0.02)
        assert (legs.enta.snapshot()["state"], legs.enta.snapshot()["connected"]) == ("silent", False)
        await gateway.send(REPLY)
        assert await agent.hear_packets(1) == [REPLY]


@jumping
async def test_a_provisional_connection_may_still_say_hello() -> None:
    async with rig() as legs:
        agent = await legs.silent("enta")
        await agent.greet(AGENT)
        await wait_all_tasks_blocked()
        assert (legs.enta.snapshot()["connected"], legs.enta.snapshot()["peer"]) == (
            True,
            f"enta client 'default' {ALICE}/24",
        )


@jumping
async def test_with_wire_original_a_listener_skips_the_wait_and_never_says_a_word() -> None:
    async with rig("original") as legs:
        agent = legs.connect("enta")
        await wait_all_tasks_blocked()
        gateway = await legs.spoken("entg", REPLY)
        assert await agent.hear_packets(1) == [REPLY]
        await trio.sleep(60)
        await agent.send(REQUEST)
        assert await gateway.hear_packets(1) == [REQUEST]
        hello = legs.connect("enta")
        await hello.say(AGENT)
        assert await hello.hear() is None


@jumping
async def test_speaking_displaces_silent_and_the_silent_one_stays_second_in_line() -> None:
    async with rig() as legs:
        scanner = await legs.silent("enta")
        agent, gateway = await legs.greeted("enta", AGENT), await legs.greeted("entg", GATEWAY)
        await gateway.send(REPLY)
        assert await agent.hear_packets(1) == [REPLY]
        await agent.say(Close())
        assert await agent.hear() == Close("the peer closed the link")
        await gateway.send(REQUEST)
        assert await scanner.hear_packets(1) == [REQUEST]


@jumping
async def test_a_second_silent_connection_waits_until_the_first_ends() -> None:
    async with rig() as legs:
        first, second = await legs.silent("enta"), await legs.silent("enta")
        gateway = await legs.greeted("entg", GATEWAY)
        await gateway.send(REQUEST)
        assert await first.hear_packets(1) == [REQUEST]
        await first.stream.aclose()
        await wait_all_tasks_blocked()
        await gateway.send(REPLY)
        assert await second.hear_packets(1) == [REPLY]


@jumping
async def test_an_agent_beside_a_server_stands_in_line_though_its_device_chatters() -> None:
    async with rig() as legs:
        agent = await legs.spoken("enta", CHATTER)
        gateway = await legs.greeted("entg", GATEWAY)
        await gateway.send(REQUEST)
        assert await agent.hear_packets(1) == [REQUEST]
        await agent.send(CHATTER, REPLY)
        assert await gateway.hear_packets(2) == [CHATTER, REPLY]
        assert legs.count("from_enta_dropped", "link_local") == 1
        assert legs.enta.snapshot()["connected"] is True


@pytest.mark.proves("F30")
@pytest.mark.parametrize("first_word", [encode_control(AGENT), encode_packets([REQUEST])], ids=["eng", "raw"])
@jumping
async def test_the_same_agent_come_back_replaces_its_old_link_at_once(first_word: bytes) -> None:
    async with rig() as legs:
        gateway = await legs.greeted("entg", GATEWAY)
        old = legs.connect("enta")
        await old.stream.send_all(first_word)
        await wait_all_tasks_blocked()
        new = legs.connect("enta")
        await new.stream.send_all(first_word)
        await wait_all_tasks_blocked()
        await gateway.send(REPLY)
        heard = [await new.hear()]
        while not isinstance(heard[-1], bytes):
            heard.append(await new.hear())
        assert heard[-1] == REPLY
        heard = [await old.hear()]
        while heard[-1] is not None:
            heard.append(await old.hear())
        assert REPLY not in heard
        assert legs.count("enta_ended", "replaced") == 1


@pytest.mark.proves("F30")
@jumping
async def test_another_agent_is_refused_with_an_error_it_can_read_and_the_first_is_unaffected() -> None:
    async with rig() as legs:
        gateway, agent = await legs.greeted("entg", GATEWAY), await legs.greeted("enta", AGENT)
        other = legs.connect("enta")
        await other.greet(OTHER_AGENT)
        answer = await other.hear()
        assert isinstance(answer, Error)
        assert answer.reason == "another agent is connected: memory:0"
        assert await other.hear() is None
        raw = await legs.spoken("enta", ip_packet(BOB, FAR, b"mine"))
        assert await raw.hear() is None
        await agent.send(REQUEST)
        assert await gateway.hear_packets(1) == [REQUEST]
        await gateway.send(REPLY)
        assert await agent.hear_packets(1) == [REPLY]
        assert legs.count("enta_ended", "busy") == 2


@jumping
async def test_a_raw_stranger_with_the_agents_address_does_not_replace_one_that_speaks_eng() -> None:
    async with rig() as legs:
        await legs.greeted("enta", AGENT)
        stranger = await legs.spoken("enta", REQUEST)
        assert await stranger.hear() is None
        assert legs.enta.snapshot()["connected"] is True
        assert legs.count("enta_ended", "busy") == 1


@jumping
async def test_of_peer_gateways_the_newest_wins() -> None:
    async with rig() as legs:
        agent = await legs.greeted("enta", AGENT)
        old, new = await legs.greeted("entg", GATEWAY), await legs.greeted("entg", Hello(Role.GATEWAY, "restarted"))
        assert await old.hear() == Error("replaced by memory:0")
        await agent.send(REQUEST)
        assert await new.hear_packets(1) == [REQUEST]


@pytest.mark.parametrize(
    ("leg", "hello", "expected"),
    [
        ("enta", GATEWAY, "this port is for agents, and you are entg 'default': connect to the other one"),
        ("entg", AGENT, "this port is for the peer gateway, and you are enta client 'default' 192.168.0.1/24: connect"),
    ],
)
@jumping
async def test_who_comes_to_the_wrong_port_is_told_so(leg: LegName, hello: Hello, expected: str) -> None:
    async with rig() as legs:
        peer = legs.connect(leg)
        await peer.greet(hello)
        answer = await peer.hear()
        assert isinstance(answer, Error)
        assert expected in answer.reason
        assert legs.leg(leg).snapshot()["state"] == "waiting"


# How long it is kept.


@pytest.mark.proves("F17")
@jumping
async def test_a_raw_peer_that_has_shut_down_its_sending_side_gets_its_replies() -> None:
    async with rig() as legs:
        gateway, agent = await legs.greeted("entg", GATEWAY), await legs.spoken("enta", REQUEST)
        await agent.stream.send_eof()
        await trio.sleep(2)
        assert legs.enta.snapshot()["state"] == "half_closed"
        await gateway.send(REPLY)
        assert await agent.hear_packets(1) == [REPLY]


@pytest.mark.proves("F24")
@jumping
async def test_without_replies_half_a_connection_is_kept_for_a_minute_and_with_them_longer() -> None:
    async with rig() as legs:
        gateway, agent = await legs.spoken("entg", REPLY), await legs.spoken("enta", REQUEST)
        await agent.stream.send_eof()
        for _ in range(3):
            await trio.sleep(HALF_CLOSED_LIMIT_S - 1)
            await gateway.send(REPLY)
            assert await agent.hear_packets(1) == [REPLY]
        began_s = trio.current_time()
        assert await agent.hear() is None
        assert trio.current_time() - began_s == pytest.approx(HALF_CLOSED_LIMIT_S, abs=0.1)
        assert legs.count("enta_ended", "eof") == 1


@jumping
async def test_half_a_connection_ends_when_somebody_else_speaks() -> None:
    async with rig() as legs:
        first = await legs.spoken("enta", REQUEST)
        await first.stream.send_eof()
        await wait_all_tasks_blocked()
        await legs.spoken("enta", ip_packet(BOB, FAR, b"mine"))
        assert await first.hear() is None
        assert legs.count("enta_ended", "replaced") == 1


@jumping
async def test_an_eng_peer_that_goes_silent_loses_its_place() -> None:
    async with rig() as legs:
        began_s = trio.current_time()
        await legs.greeted("enta", AGENT)
        await until(lambda: not legs.enta.snapshot()["connections"])
        assert SILENCE_LIMIT_S <= trio.current_time() - began_s <= SILENCE_LIMIT_S + 2
        assert legs.count("enta_ended", "keepalive") == 1


@pytest.mark.proves("F36")
@jumping
async def test_half_a_first_word_and_no_more_ends_the_connection() -> None:
    async with rig() as legs:
        half = legs.connect("enta")
        await half.stream.send_all(encode_control(AGENT)[:9])
        assert await half.hear() is None
        assert legs.count("enta_ended", "frame_deadline") == 1


@pytest.mark.proves("D20")
@jumping
async def test_a_first_word_of_one_byte_a_second_ends_the_connection_after_10_s() -> None:
    async with rig() as legs:
        drip = legs.connect("enta")
        began_s = trio.current_time()
        for byte in encode_packets([ip_packet(ALICE, FAR, bytes(1000))]):
            await trio.sleep(1)
            try:
                await drip.stream.send_all(bytes((byte,)))
            except trio.BrokenResourceError:
                break
        assert 10 <= trio.current_time() - began_s <= 13
        assert legs.count("enta_ended", "frame_deadline") == 1


@pytest.mark.proves("F48")
@pytest.mark.parametrize("speech", ["raw", "silent"])
@jumping
async def test_who_takes_nothing_more_ends_as_stalled(speech: str) -> None:
    async with rig() as legs:
        gateway = await legs.greeted("entg", GATEWAY)
        agent = legs.connect("enta", is_lockstep=True)
        if speech == "raw":
            await agent.send(REQUEST)
            assert await gateway.hear_packets(1) == [REQUEST]
        else:
            await trio.sleep(1)
        began_s = trio.current_time()
        await gateway.send(REPLY)
        await until(lambda: not legs.enta.snapshot()["connections"])
        limit_s = STALL_LIMIT_S if speech == "raw" else SILENT_STALL_LIMIT_S
        # Before it is let go, what it sends has a chance to arrive.
        assert limit_s <= trio.current_time() - began_s <= limit_s + LAST_WORDS_S + 0.2
        assert (legs.count("enta_ended", "stalled"), legs.count("to_enta_dropped", "stalled")) == (1, 1)


@jumping
async def test_a_peer_that_breaks_the_protocol_ends_alone() -> None:
    async with rig() as legs:
        gateway, agent = await legs.greeted("entg", GATEWAY), await legs.greeted("enta", AGENT)
        for bad in (
            b"\xff\xff\xff\xff",
            b"\0\1\0\0",
            b"\0\0\0\0" * 64,
            b"\0\0\0\x02\0\x03",
            encode_control(Keepalive()),
        ):
            stranger = legs.connect("enta")
            await stranger.stream.send_all(bad)
            assert await stranger.hear() is None
        await agent.send(REQUEST)
        assert await gateway.hear_packets(1) == [REQUEST]
        assert legs.counters.snapshot()["enta_ended"] == {"bad_control": 2, "frame_len": 2, "junk": 1}
        assert legs.count("from_enta_dropped", "empty") == 64


@jumping
async def test_whoever_is_there_already_makes_room_for_newcomers_unless_it_has_the_place() -> None:
    async with rig() as legs:
        holder = await legs.silent("enta")
        line = [await legs.arrived("enta") for _ in range(CONNECTION_LIMIT - 1)]
        await trio.sleep(1)
        agent = await legs.greeted("enta", AGENT)
        assert await line[-1].hear() is None
        assert legs.enta.snapshot()["connections"] == CONNECTION_LIMIT
        gateway = await legs.greeted("entg", GATEWAY)
        await gateway.send(REPLY)
        assert await agent.hear_packets(1) == [REPLY]
        await agent.say(Close())
        await trio.sleep(2)
        await gateway.say(Keepalive())
        await gateway.send(REQUEST)
        assert await holder.hear_packets(1) == [REQUEST]
        assert legs.count("enta_ended", "too_many") == 1


@jumping
async def test_a_flood_of_new_connections_ends_the_oldest_that_has_not_spoken_before_the_newest() -> None:
    async with rig() as legs:
        flood = [await legs.arrived("enta") for _ in range(CONNECTION_LIMIT)]
        agent = await legs.arrived("enta")
        flood += [await legs.arrived("enta") for _ in range(CONNECTION_LIMIT - 2)]
        await agent.greet(AGENT)
        await wait_all_tasks_blocked()
        assert legs.enta.snapshot()["connected"] is True
        assert legs.enta.snapshot()["connections"] == CONNECTION_LIMIT
        for peer in flood[: CONNECTION_LIMIT - 1]:
            assert await peer.hear() is None


@jumping
async def test_a_flood_of_new_connections_does_not_end_the_silent_one_that_holds_the_place() -> None:
    async with rig() as legs:
        holder = await legs.silent("enta")
        flood = [await legs.arrived("enta") for _ in range(CONNECTION_LIMIT)]
        assert await flood[0].hear() is None
        gateway = await legs.greeted("entg", GATEWAY)
        await gateway.send(REPLY)
        assert await holder.hear_packets(1) == [REPLY]


@jumping
async def test_whoever_had_to_make_room_before_it_stood_in_line_stands_there_no_more() -> None:
    async with rig() as legs:
        for _ in range(2 * CONNECTION_LIMIT):
            legs.connect("enta")
            await trio.lowlevel.checkpoint()
            assert legs.enta.snapshot()["connections"] in range(CONNECTION_LIMIT + 1)
        await wait_all_tasks_blocked()
        assert legs.count("enta_ended", "too_many") == CONNECTION_LIMIT
        assert legs.enta.snapshot()["connections"] == CONNECTION_LIMIT


@jumping
async def test_when_nobody_can_make_room_a_newcomer_is_refused() -> None:
    async with rig() as legs:
        gateway = legs.connect("entg", is_lockstep=True)
        await gateway.send(REPLY)
        # Each replaces the one before, which stays until its packet is passed on.
        for _ in range(CONNECTION_LIMIT):
            await legs.spoken("enta", REQUEST)
        assert await legs.connect("enta").hear() is None
        assert legs.count("enta_ended", "too_many") == 1
        assert await gateway.hear_packets(CONNECTION_LIMIT) == [REQUEST] * CONNECTION_LIMIT


# What peers hear of the path.


class Told:
    """What a peer hears of the path, as it hears it."""

    def __init__(self, legs: Rig, peer: Peer) -> None:
        self.states: list[bool] = []
        self._peer = peer
        legs.nursery.start_soon(self._listen)

    async def _listen(self) -> None:
        with suppress(AssertionError):  # the end
            while True:
                is_open = await self._peer.hear_path()
                self.states.append(is_open)

    async def since(self) -> list[bool]:
        """What it has heard since the last call."""
        await trio.sleep(3 * PAUSE_S)
        states, self.states = self.states, []
        return states

    @asynccontextmanager
    async def living(self) -> AsyncIterator[None]:
        """Have the peer say, meanwhile, that it lives."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(live, self._peer)
            yield
            nursery.cancel_scope.cancel()


async def live(peer: Peer) -> None:
    with suppress(trio.BrokenResourceError):
        while True:
            await peer.say(Keepalive())
            await trio.sleep(1)


def far_name(name: LegName) -> LegName:
    return "entg" if name == "enta" else "enta"


HELLOS: dict[LegName, Hello] = {"enta": AGENT, "entg": GATEWAY}
FIRST_PACKETS: dict[LegName, bytes] = {"enta": REQUEST, "entg": REPLY}
both_ways = pytest.mark.parametrize("name", ["enta", "entg"])


@both_ways
@jumping
async def test_who_comes_first_hears_that_the_path_is_closed_and_who_comes_second_that_it_is_open(
    name: LegName,
) -> None:
    async with rig() as legs:
        first = await legs.greeted(name, HELLOS[name])
        told_s = trio.current_time()
        assert await first.hear_path() is False
        second = await legs.greeted(far_name(name), HELLOS[far_name(name)])
        assert await second.hear_path() is True
        assert trio.current_time() == told_s
        assert await first.hear_path() is True
        paths = {leg.snapshot()["path"] for leg in (legs.enta, legs.entg)}
        assert paths == {"open"}


@both_ways
@jumping
async def test_whoever_comes_and_goes_and_however_the_other_side_hears_it(name: LegName) -> None:
    far = far_name(name)
    async with rig() as legs:
        told = Told(legs, await legs.greeted(name, HELLOS[name]))
        assert await told.since() == [False]
        # One that says HELLO and CLOSE, one that is cut, one that breaks the protocol.
        for last_words in (encode_control(Close()), b"", b"\xff\xff\xff\xff"):
            peer = await legs.greeted(far, HELLOS[far])
            assert await told.since() == [True]
            assert legs.leg(far).snapshot()["path"] == "open"
            await peer.stream.send_all(last_words)
            await peer.stream.aclose()
            assert await told.since() == [False]
            assert legs.leg(far).snapshot()["path"] == "closed"
        # One that falls silent.
        await legs.greeted(far, HELLOS[far])
        assert await told.since() == [True]
        async with told.living():
            await until(lambda: legs.leg(far).snapshot()["state"] == "waiting")
            assert await told.since() == [False]
        # One that never says a word.
        silent = await legs.silent(far)
        assert await told.since() == [True]
        await silent.stream.aclose()
        assert await told.since() == [False]
        # One that speaks raw, and then half-closes, until it is let go.
        raw = await legs.spoken(far, FIRST_PACKETS[far])
        assert await told.since() == [True]
        await raw.stream.send_eof()
        assert await told.since() == []
        assert legs.leg(far).snapshot()["path"] == "open"
        async with told.living():
            await until(lambda: legs.leg(far).snapshot()["state"] == "waiting")
            assert await told.since() == [False]


@jumping
async def test_what_the_peer_gateway_says_is_passed_on_and_forgotten_when_it_goes() -> None:
    async with rig() as legs:
        told = Told(legs, await legs.greeted("enta", AGENT))
        assert await told.since() == [False]
        gateway = await legs.greeted("entg", GATEWAY)
        assert await told.since() == [True]
        for is_open in (False, True, False):
            await gateway.say(PathState(is_open))
            assert await told.since() == [is_open]
            await gateway.say(PathState(is_open))
            assert await told.since() == []
        assert legs.entg.snapshot()["path"] == "closed"
        # One that is older, and says nothing of it, takes its place; and then one that has bad news at once.
        await legs.greeted("entg", Hello(Role.GATEWAY, "older"))
        assert await told.since() == [True]
        newer = legs.connect("entg")
        await newer.say(GATEWAY, PathState(is_open=False))
        assert await told.since() == [False]
        await newer.say(Close())
        assert await told.since() == []
        assert legs.count("from_entg_dropped", "unknown_control") == 0


@pytest.mark.proves("F16")
@jumping
async def test_an_older_peer_skips_what_it_is_told_of_the_path_and_packets_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def older(payload: memoryview) -> ControlMessage:
        return Unknown(6) if payload[1] == 6 else decode_message(payload)

    monkeypatch.setattr("enlink.frame.decode_message", older)
    async with rig() as legs:
        ours, theirs = memory_stream_pair()
        skipped: list[str] = []
        agent = Link(ours, AGENT, skipped.append)
        legs.nursery.start_soon(legs.enta.accept, theirs)
        await agent.greet()
        for count in range(1, 4):
            gateway = await legs.spoken("entg", REPLY)
            assert list(map(bytes, await agent.receive())) == [REPLY]
            await trio.sleep(1)
            await agent.send(encode_packets([REQUEST]))
            assert await gateway.hear_packets(1) == [REQUEST]
            await gateway.stream.aclose()
            await until(lambda: legs.entg.snapshot()["state"] == "half_closed")
            # It hears of the first only once, and then of no change: half of a raw peer still takes packets.
            assert len(skipped) == min(count, 2)
        assert set(skipped) == {"unknown_control"}
        assert agent.path_is_open


@jumping
async def test_a_gateway_that_comes_with_bad_news_is_no_good_news_before() -> None:
    async with rig() as legs:
        told = Told(legs, await legs.greeted("enta", AGENT))
        assert await told.since() == [False]
        for _ in range(3):
            gateway = await legs.greeted("entg", GATEWAY)
            await trio.sleep(PAUSE_S / 2)
            await gateway.say(PathState(is_open=False))
            assert await told.since() == []
            await gateway.say(Close())
            assert await told.since() == []


@jumping
async def test_a_gateway_never_hears_its_own_news_come_back() -> None:
    async with rig() as legs:
        gateway, agent = await legs.greeted("entg", GATEWAY), await legs.greeted("enta", AGENT)
        told, agent_told = Told(legs, gateway), Told(legs, agent)
        assert await told.since() == [False, True]
        await agent_told.since()
        for is_open in (False, True):
            await gateway.say(PathState(is_open))
            assert await told.since() == []
            assert await agent_told.since() == [is_open]


@jumping
async def test_the_same_agent_come_back_is_told_and_its_peer_hears_nothing_of_it() -> None:
    async with rig() as legs:
        told = Told(legs, await legs.greeted("entg", GATEWAY))
        await legs.greeted("enta", AGENT)
        assert await told.since() == [False, True]
        again = await legs.greeted("enta", AGENT)
        assert await again.hear_path() is True
        assert await told.since() == []


@jumping
async def test_who_is_refused_hears_nothing_of_the_path() -> None:
    async with rig() as legs:
        await legs.greeted("enta", AGENT)
        other = legs.connect("enta")
        await other.greet(OTHER_AGENT)
        with pytest.raises(AssertionError, match="ended"):
            await other.hear_path()


async def bytes_until_end(peer: Peer) -> bytes:
    heard = bytearray()
    while data := await peer.stream.receive_some():
        heard += data
    return bytes(heard)


@pytest.mark.parametrize("wire", ["auto", "original"])
@both_ways
@jumping
async def test_peers_that_have_not_said_hello_get_packets_and_not_a_byte_of_the_path(name: LegName, wire: Wire) -> None:
    far = far_name(name)
    async with rig(wire) as legs:
        silent, raw = await legs.silent(name), await legs.spoken(name, FIRST_PACKETS[name])
        for _ in range(3):
            other = await legs.spoken(far, FIRST_PACKETS[far])
            await trio.sleep(1)
            await other.stream.aclose()
            await trio.sleep(1)
            await other.stream.aclose()
            await until(lambda: legs.leg(far).snapshot()["state"] == "half_closed")
        await raw.stream.aclose()
        await until(lambda: legs.leg(name).snapshot()["state"] == "silent")
        await legs.spoken(far, FIRST_PACKETS[far])
        await trio.sleep(1)
        legs.nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            assert await bytes_until_end(silent) == encode_packets([FIRST_PACKETS[far]])


@pytest.mark.proves("D22", "G14")
@jumping
async def test_a_gateway_that_flips_its_path_a_thousand_times_a_second_is_worth_ten_words() -> None:
    async with rig() as legs:
        agent, gateway = await legs.greeted("enta", AGENT), await legs.greeted("entg", GATEWAY)
        told = Told(legs, agent)
        await told.since()
        began_s = trio.current_time()
        for number in range(3001):
            await gateway.say(PathState(is_open=bool(number % 2)))
            await trio.sleep(0.00113)
        lasted_s = trio.current_time() - began_s
        heard = await told.since()
        assert 2 <= len(heard) <= 10 * lasted_s + 2
        assert heard[-1] is False
        assert await told.since() == []
        await gateway.send(REPLY)
        await until(lambda: legs.count("to_enta", "packets"))


@pytest.mark.proves("F48")
@jumping
async def test_who_does_not_even_take_news_of_the_path_holds_up_nobody_and_is_given_up() -> None:
    async with rig() as legs:
        gateway = await legs.greeted("entg", GATEWAY)
        stuck = legs.connect("enta", is_lockstep=True)
        await stuck.greet(AGENT)
        began_s = trio.current_time()

        legs.nursery.start_soon(live, stuck)
        for number in range(8):
            await trio.sleep(1)
            await gateway.say(PathState(is_open=bool(number % 2)), Keepalive())
        assert legs.count("enta_ended", "stalled") == 0
        await until(lambda: legs.enta.snapshot()["state"] == "waiting")
        assert STALL_LIMIT_S <= trio.current_time() - began_s <= STALL_LIMIT_S + 0.2
        await until(lambda: legs.count("enta_ended", "stalled"))
        assert [await gateway.hear_path() for _ in range(3)] == [False, True, False]


# Dialling.


class FakeDialer(Dialer):
    """Answers each attempt as *attempts* says, and then never again."""

    def __init__(self, *attempts: Callable[[], trio.abc.Stream]) -> None:
        super().__init__(Tcp("far.example", 6979))
        self._attempts = list(attempts)
        self.times_s: list[float] = []

    async def dial(self) -> Any:
        await trio.lowlevel.checkpoint()
        self.times_s.append(trio.current_time())
        if not self._attempts:
            await trio.sleep_forever()
        return self._attempts.pop(0)()


def refuse() -> trio.abc.Stream:
    raise Unreachable("cannot connect to 192.0.2.1 port 6979: Connection refused")


def reached(peers: list[Peer]) -> Callable[[], trio.abc.Stream]:
    def connect() -> trio.abc.Stream:
        ours, theirs = memory_stream_pair()
        peers.append(Peer(ours))
        return theirs

    return connect


@asynccontextmanager
async def dialling(legs: Rig, *attempts: Callable[[], trio.abc.Stream]) -> AsyncIterator[FakeDialer]:
    dialer = FakeDialer(*attempts)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(legs.entg.dial, dialer, legs.nursery)
        yield dialer
        nursery.cancel_scope.cancel()


@pytest.mark.proves("F26")
@jumping
async def test_an_unreachable_peer_is_dialled_for_ever_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    peers: list[Peer] = []
    async with rig() as legs, dialling(legs, *[refuse] * 40, reached(peers)) as dialer:
        await until(lambda: len(dialer.times_s) == 40)
        assert len(events(caplog, "unreachable")) == 1
        problem = "cannot connect to 192.0.2.1 port 6979: Connection refused; does the peer gateway listen there"
        assert problem in str(legs.entg.snapshot()["problem"])
        assert legs.entg.snapshot()["dialling"] == "far.example:6979"
        pauses_s = [after - before for before, after in zip(dialer.times_s, dialer.times_s[1:], strict=False)]
        assert pauses_s[0] <= 0.05
        assert max(pauses_s) <= 1
        await until(lambda: peers)
        await peers[0].greet(GATEWAY)
        await until(lambda: legs.entg.snapshot()["connected"])
        assert legs.entg.snapshot()["problem"] is None
        assert len(events(caplog, "connected")) == 1


@pytest.mark.proves("F26")
@jumping
async def test_each_outage_is_logged_once_and_dialled_at_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    peers: list[Peer] = []
    attempts = [reached(peers), refuse, refuse, reached(peers), refuse, refuse]
    async with rig() as legs, dialling(legs, *attempts) as dialer:
        for outage in range(2):
            await until_longer(peers, outage)
            await peers[outage].greet(GATEWAY)
            await trio.sleep(5)
            ended_s = trio.current_time()
            await peers[outage].stream.aclose()
            await until_longer(dialer.times_s, 3 * outage + 1)
            assert trio.current_time() - ended_s <= 0.07
        await until(lambda: len(dialer.times_s) == 7)
        assert len(events(caplog, "unreachable")) == 2
        assert len(events(caplog, "disconnected")) == 2


@jumping
async def test_a_peer_that_hangs_up_at_once_is_not_dialled_in_a_hurry(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    def hang_up() -> trio.abc.Stream:
        ours, theirs = memory_stream_pair()
        ours.send_stream.close()
        return theirs

    async with rig() as legs, dialling(legs, *[hang_up] * 20) as dialer:
        await until(lambda: len(dialer.times_s) == 21)
        assert dialer.times_s[-1] - dialer.times_s[-2] >= 0.5
        (told,) = events(caplog, "unreachable")
        assert "--wire original" in told["error"]
        assert legs.count("entg_ended", "truncated") == 20


@jumping
async def test_a_dialled_peer_that_refuses_is_logged_once_with_its_words(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    peers: list[Peer] = []
    async with rig() as legs, dialling(legs, *[reached(peers)] * 3) as dialer:
        for number in range(3):
            await until_longer(peers, number)
            await peers[number].say(Error("this port is for agents"))
        await until(lambda: len(dialer.times_s) == 4)
        (told,) = events(caplog, "unreachable")
        assert told["error"] == "the peer refused the link: this port is for agents"
        assert legs.entg.snapshot()["problem"] == told["error"]


@jumping
async def test_with_wire_original_a_dialler_says_nothing_but_packets() -> None:
    peers: list[Peer] = []
    async with rig("original") as legs, dialling(legs, reached(peers)):
        await until(lambda: peers)
        await trio.sleep(60)
        await legs.spoken("enta", REQUEST)
        assert await peers[0].hear_packets(1) == [REQUEST]
        await peers[0].send(REPLY)
        await wait_all_tasks_blocked()
        assert legs.entg.snapshot()["connected"] is True


@pytest.mark.proves("F17")
@jumping
async def test_a_dialled_raw_peer_that_half_closes_gets_its_replies_and_is_dialled_again() -> None:
    peers: list[Peer] = []
    async with rig("original") as legs, dialling(legs, reached(peers), reached(peers)):
        await until(lambda: peers)
        agent = await legs.spoken("enta", REQUEST)
        await peers[0].send(REPLY)
        assert await agent.hear_packets(1) == [REPLY]
        await peers[0].stream.send_eof()
        await until(lambda: len(peers) == 2)
        await agent.send(REQUEST)
        assert await peers[0].hear_packets(2) == [REQUEST, REQUEST]
        await peers[1].send(REPLY)
        assert await agent.hear_packets(1) == [REPLY]
        await agent.send(REQUEST)
        assert await peers[1].hear_packets(1) == [REQUEST]
        assert await peers[0].hear() is None


# The end.


async def heard_until_end(peer: Peer) -> list[object]:
    heard: list[object] = []
    while (event := await peer.hear()) is not None:
        heard.append(event)
    return heard


@jumping
async def test_what_came_before_one_side_ended_is_delivered() -> None:
    async with rig() as legs:
        gateway, agent = await legs.greeted("entg", GATEWAY), await legs.greeted("enta", AGENT)
        await agent.send(*[REQUEST] * 1000)
        await agent.say(Close())
        await agent.stream.aclose()
        assert await gateway.hear_packets(1000) == [REQUEST] * 1000


@jumping
async def test_draining_passes_on_what_has_come_and_then_closes_everything_in_good_order() -> None:
    router, counters = Router(), Counters()
    enta, entg = Leg("enta", router, counters), Leg("entg", router, counters)
    router.connect(enta, entg)
    with trio.fail_after(600):
        async with trio.open_nursery() as nursery:
            legs = Rig(enta, entg, counters, nursery)
            gateway, agent = await legs.greeted("entg", GATEWAY), await legs.greeted("enta", AGENT)
            scanner, fresh = await legs.silent("enta"), legs.connect("enta")
            await agent.send(*[REQUEST] * 1000)
            await gateway.send(*[REPLY] * 1000)
            began_s = trio.current_time()
            async with trio.open_nursery() as draining:
                draining.start_soon(enta.drain)
                draining.start_soon(entg.drain)
            nursery.cancel_scope.cancel()
            assert trio.current_time() - began_s < 0.2
    assert await heard_until_end(gateway) == [*[REQUEST] * 1000, Close("the gateway is stopping")]
    assert await heard_until_end(agent) == [*[REPLY] * 1000, Close("the gateway is stopping")]
    assert await heard_until_end(scanner) == await heard_until_end(fresh) == []
    assert counters.snapshot()["enta_ended"] == {"stopped": 3}


@jumping
async def test_draining_ends_within_a_second_though_a_peer_goes_on_sending() -> None:
    async with rig() as legs:
        agent = await legs.greeted("enta", AGENT)

        async def send_for_ever() -> None:
            while True:
                await agent.send(REQUEST)
                await trio.sleep(0.01)

        legs.nursery.start_soon(send_for_ever)
        await trio.sleep(1)
        began_s = trio.current_time()
        await legs.enta.drain()
        assert LAST_WORDS_S <= trio.current_time() - began_s <= LAST_WORDS_S + 0.1


# What people see.


@pytest.mark.proves("D24")
@jumping
async def test_strangers_cannot_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with rig() as legs:
        for number in range(300):
            stranger = await legs.spoken("enta", ip_packet(f"10.0.0.{number % 250}", FAR, b""))
            await stranger.stream.aclose()
            await stranger.stream.aclose()
            silent = legs.connect("enta")
            await silent.stream.aclose()
            junk = legs.connect("enta")
            await junk.stream.send_all(b"\xff" * 4)
            assert await junk.hear() is None
    by_reason: dict[tuple[str, str], int] = {}
    for record in caplog.records:
        key = (record.message, str(record.__dict__["fields"].get("reason")))
        by_reason[key] = by_reason.get(key, 0) + 1
    assert set(by_reason.values()) == {1}, by_reason


@pytest.mark.proves("D24")
@jumping
async def test_dropping_is_logged_once_an_outage(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with rig() as legs:
        agent = await legs.greeted("enta", AGENT)
        for outage in range(1, 4):
            for _ in range(100):
                await trio.sleep(0.05)
                await agent.send(REQUEST)
            await wait_all_tasks_blocked()
            assert events(caplog, "dropping") == [{"leg": "entg", "reason": "no_link"}] * outage
            gateway = await legs.greeted("entg", GATEWAY)
            await gateway.say(Close())
            await gateway.stream.aclose()
            await until(lambda: not legs.entg.snapshot()["connected"])
        assert legs.count("to_entg_dropped", "no_link") == 300


@jumping
async def test_status_says_what_a_leg_waits_for_and_who_is_there() -> None:
    async with rig() as legs:
        waiting = dict(legs.enta.snapshot())
        assert waiting == {
            "connected": False,
            "state": "waiting",
            "for_s": 0.0,
            "address": None,
            "peer": None,
            "path": "closed",
            "problem": None,
            "marked": 0,
            "connections": 0,
        }
        await legs.greeted("enta", AGENT)
        await trio.sleep(7)
        assert dict(legs.enta.snapshot()) == waiting | {
            "connected": True,
            "state": "connected",
            "for_s": 7.0,
            "address": "memory:0",
            "peer": f"enta client 'default' {ALICE}/24",
            "path": "open",
            "connections": 1,
        }
