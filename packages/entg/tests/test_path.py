"""How a peer is told whether the path goes on: at once if not, a moment later if so, and never the same twice."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from itertools import pairwise

import pytest
import trio
from enlink.control import Hello, Role
from enlink.link import Link, LinkEnded
from enlink.testing.peers import Peer
from entg.path import PAUSE_S, Onward
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock, lockstep_stream_pair, memory_stream_pair, trio_test, wait_all_tasks_blocked


@pytest.fixture
def clock() -> MockClock:
    """Time that passes while everybody waits."""
    return MockClock(autojump_threshold=0)


class Ear(Peer):
    """A peer that notes when it is told what."""

    def __init__(self, stream: trio.abc.HalfCloseableStream) -> None:
        super().__init__(stream)
        self.told: list[tuple[float, bool]] = []

    async def listen(self) -> None:
        while True:
            is_open = await self.hear_path()
            self.told.append((trio.current_time(), is_open))


async def greeted(*, is_lockstep: bool = False) -> tuple[Link, Ear]:
    ours, theirs = lockstep_stream_pair() if is_lockstep else memory_stream_pair()
    link, ear = Link(theirs, Hello(Role.GATEWAY), lambda _: None), Ear(ours)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.hear_first_word)
        await ear.greet(Hello(Role.CLIENT_AGENT))
    return link, ear


@asynccontextmanager
async def telling(onward: Onward) -> AsyncIterator[Ear]:
    link, ear = await greeted()
    with trio.fail_after(1000):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(onward.tell, link, stall_limit_s=10))
            nursery.start_soon(ear.listen)
            await wait_all_tasks_blocked()
            yield ear
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("is_open", [False, True])
@trio_test
async def test_the_state_is_told_at_once_and_then_no_more_until_it_changes(is_open: bool, clock: MockClock) -> None:
    onward = Onward()
    onward.note(is_open=is_open)
    async with telling(onward) as ear:
        await trio.sleep(100)
        onward.note(is_open=is_open)
        await trio.sleep(100)
        assert ear.told == [(0, is_open)]


@trio_test
async def test_bad_news_is_told_at_once_and_good_news_a_moment_later(clock: MockClock) -> None:
    onward = Onward()
    async with telling(onward) as ear:
        for is_open in (True, False, True):
            await trio.sleep(1)
            onward.note(is_open=is_open)
        await trio.sleep(1)
        assert ear.told == [(0, False), (1 + PAUSE_S, True), (2, False), (3 + PAUSE_S, True)]


@trio_test
async def test_what_is_no_news_does_not_hold_up_bad_news(clock: MockClock) -> None:
    onward = Onward()
    onward.note(is_open=True)
    async with telling(onward) as ear:
        await trio.sleep(1)
        onward.note(is_open=True)
        await trio.sleep(PAUSE_S / 10)
        onward.note(is_open=False)
        await trio.sleep(1)
        assert ear.told == [(0, True), (1 + PAUSE_S / 10, False)]


@trio_test
async def test_good_news_that_turns_out_wrong_within_a_moment_is_not_told(clock: MockClock) -> None:
    onward = Onward()
    async with telling(onward) as ear:
        await trio.sleep(1)
        onward.note(is_open=True)
        await trio.sleep(PAUSE_S / 2)
        onward.note(is_open=False)
        await trio.sleep(10)
        assert ear.told == [(0, False)]


@pytest.mark.proves("G14")
@settings(deadline=None, max_examples=50)
@given(pauses_s=st.lists(st.sampled_from([0.0, 0.0001, 0.001, 0.03, 0.1, 0.25]), max_size=200))
def test_however_often_it_changes_it_is_told_ten_times_a_second_and_last_of_all_the_truth(
    pauses_s: list[float],
) -> None:
    async def main() -> None:
        onward = Onward()
        async with telling(onward) as ear:
            for pause_s in pauses_s:
                await trio.sleep(pause_s)
                onward.note(is_open=not onward.is_open)
            await trio.sleep(10)
            times_s, states = [when for when, _ in ear.told], [state for _, state in ear.told]
            assert states[-1] == onward.is_open
            assert all(after - before >= PAUSE_S - 1e-9 for before, after in pairwise(times_s))
            assert all(before != after for before, after in pairwise(states))

    trio.run(main, clock=MockClock(autojump_threshold=0))


@pytest.mark.proves("F48")
@trio_test
async def test_who_takes_nothing_is_told_the_latest_state_when_it_listens_and_holds_up_nobody_else(
    clock: MockClock,
) -> None:
    onward = Onward()
    link, slow = await greeted(is_lockstep=True)
    async with telling(onward) as ear, trio.open_nursery() as nursery:
        nursery.start_soon(partial(onward.tell, link, stall_limit_s=100))
        for _ in range(51):
            await trio.sleep(1)
            onward.note(is_open=not onward.is_open)
        await trio.sleep(1)
        assert len(ear.told) == 52
        # What was on its way when it stopped listening, and then what holds now.
        assert [await slow.hear_path(), await slow.hear_path()] == [False, True]
        nursery.cancel_scope.cancel()


@pytest.mark.proves("F48")
@trio_test
async def test_who_takes_nothing_for_as_long_as_the_limit_is_given_up(clock: MockClock) -> None:
    link, _ = await greeted(is_lockstep=True)
    with pytest.raises(LinkEnded) as raised, trio.fail_after(1000):
        await Onward().tell(link, stall_limit_s=10)
    assert (raised.value.reason, trio.current_time()) == ("stalled", 10)
