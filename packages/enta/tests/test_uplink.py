"""What an agent knows of its uplink, on streams in memory and a clock that jumps: the link, and the path behind it."""

from __future__ import annotations

import functools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from ipaddress import IPv4Interface
from typing import Any

import pytest
import trio
from enlink.control import Close, Hello, PathState, Role
from enlink.endpoint import Tcp
from enlink.frame import Packets, Wire
from enlink.status import Counters
from enlink.stream import Dialer
from enlink.testing.peers import Peer, ip_packet
from enta.uplink import Uplink
from trio.testing import MockClock, memory_stream_pair, wait_all_tasks_blocked

AGENT = Hello(Role.CLIENT_AGENT, tun=(IPv4Interface("192.168.0.1/24"),))
GATEWAY = Hello(Role.GATEWAY)
REPLY = ip_packet("192.168.0.254", "192.168.0.1", b"reply")


def jumping(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run a test in trio, on a clock that jumps to what is due next."""

    @functools.wraps(test)
    def run(**fixtures: object) -> None:
        trio.run(functools.partial(test, **fixtures), clock=MockClock(autojump_threshold=0))

    return run


class FakeDialer(Dialer):
    """Reaches a gateway of the test's own at every attempt."""

    def __init__(self) -> None:
        super().__init__(Tcp("near.example", 6980))
        self._arrive, self.arrivals = trio.open_memory_channel[Peer](10)

    async def dial(self) -> Any:
        ours, theirs = memory_stream_pair()
        await self._arrive.send(Peer(ours))
        return theirs

    async def accept(self) -> Peer:
        """Return the gateway that was reached, once it has greeted."""
        gateway = await self.arrivals.receive()
        assert await gateway.hear() == AGENT
        await gateway.say(GATEWAY)
        await wait_all_tasks_blocked()
        return gateway


class Rig:
    """An uplink, and what its owner has seen of the path whenever it was called."""

    def __init__(self, wire: Wire) -> None:
        self.dialer = FakeDialer()
        self.counters = Counters()
        self.delivered: list[bytes] = []
        self.seen: list[bool] = []
        self.uplink = Uplink(
            self.dialer, AGENT, self._deliver, self.counters, wire=wire, changed=lambda: self.seen.append(self.is_open)
        )

    @property
    def is_open(self) -> bool:
        assert self.uplink.snapshot()["path"] == ("open" if self.uplink.path_is_open else "closed")
        return self.uplink.path_is_open

    def _deliver(self, packets: Packets) -> None:
        self.delivered += map(bytes, packets)


@asynccontextmanager
async def running(wire: Wire = "auto") -> AsyncIterator[Rig]:
    rig = Rig(wire)
    with trio.fail_after(600):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rig.uplink.run)
            yield rig
            nursery.cancel_scope.cancel()


def lines(caplog: pytest.LogCaptureFixture) -> list[tuple[str, int]]:
    return [(each.message, each.levelno) for each in caplog.records if each.message.startswith("path_")]


@jumping
async def test_the_path_is_closed_until_the_gateway_has_answered_and_open_then() -> None:
    async with running() as rig:
        await wait_all_tasks_blocked()
        assert (rig.seen, rig.is_open) == ([], False)
        await rig.dialer.accept()
        assert (rig.seen, rig.is_open) == ([True], True)
        # Of an older gateway nothing more is heard.
        await trio.sleep(5)
        assert rig.seen == [True]


@jumping
async def test_what_the_gateway_says_of_the_path_is_known_told_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with running() as rig:
        gateway = await rig.dialer.accept()
        for is_open in (False, False, True, True, False):
            await gateway.say(PathState(is_open))
            await gateway.send(REPLY)
            await trio.sleep(1)
            assert rig.is_open == is_open
            assert rig.uplink.is_up
        assert rig.seen == [True, False, True, False]
        assert lines(caplog) == [
            ("path_closed", logging.WARNING),
            ("path_open", logging.INFO),
            ("path_closed", logging.WARNING),
        ]
        # It is news, not an order: packets come as before.
        assert rig.delivered == [REPLY] * 5
        assert rig.counters.snapshot().get("dropped", {}) == {}


@jumping
async def test_without_a_link_the_path_is_closed_and_with_a_new_one_open_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    async with running() as rig:
        for is_open in (True, False, True):
            gateway = await rig.dialer.accept()
            assert rig.is_open
            await gateway.say(PathState(is_open))
            await wait_all_tasks_blocked()
            assert rig.is_open == is_open
            await gateway.say(Close("enough"))
            await gateway.stream.aclose()
            await wait_all_tasks_blocked()
            assert rig.is_open is False
        assert rig.seen == [True, False, True, False, False, True, False]
        # Ends of links have lines of their own.
        assert lines(caplog) == [("path_closed", logging.WARNING)]


@pytest.mark.proves("D24")
@jumping
async def test_a_gateway_that_flips_the_path_cannot_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with running() as rig:
        gateway = await rig.dialer.accept()
        for number in range(5000):
            await gateway.say(PathState(is_open=bool(number % 2)))
            await trio.sleep(0.001)
        assert len(rig.seen) == 1 + 5000
        assert len(lines(caplog)) <= 2 * 6


@jumping
async def test_a_gateway_that_says_nonsense_of_the_path_ends_its_link() -> None:
    async with running() as rig:
        gateway = await rig.dialer.accept()
        await gateway.stream.send_all(b"\0\0\0\3\0\6\7")
        await rig.dialer.accept()
        assert rig.counters.snapshot()["uplink_ended"] == {"bad_control": 1}
        assert rig.seen == [True, False, True]


@jumping
async def test_of_an_original_gateway_the_path_is_open_as_long_as_there_is_a_link() -> None:
    async with running("original") as rig:
        gateway = await rig.dialer.arrivals.receive()
        await wait_all_tasks_blocked()
        assert rig.seen == [True]
        await gateway.stream.aclose()
        await wait_all_tasks_blocked()
        assert rig.seen == [True, False]
