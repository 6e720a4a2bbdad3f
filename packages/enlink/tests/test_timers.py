"""Whoever asks to be called later is called then, in order, once; and whoever does not want it any more is not."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from functools import partial

import pytest
import trio
from enlink import pump as pump_module
from enlink.pump import current_pump
from enlink.timers import Timer, current_timers
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock, trio_test

DEADLINE_S = 20.0


@pytest.fixture
def clock() -> MockClock:
    """Time that passes while everybody waits."""
    return MockClock(autojump_threshold=0)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    near, far = socket.socketpair()
    with near, far:
        yield near, far


class Calls:
    """Who was called, and when, since this was made."""

    def __init__(self) -> None:
        self.began = trio.current_time()
        self.seen: list[tuple[float | str, float]] = []

    def note(self, name: float | str) -> None:
        self.seen.append((name, trio.current_time() - self.began))

    def after(self, delay_s: float) -> Timer:
        return current_timers().after(delay_s, partial(self.note, delay_s))


@trio_test
async def test_callbacks_come_at_their_time_and_in_order(clock: MockClock) -> None:
    calls = Calls()
    for delay_s in (3, 1, 2, 0, 1):
        calls.after(delay_s)
    await trio.sleep(10)
    assert calls.seen == [(0, 0), (1, 1), (1, 1), (2, 2), (3, 3)]


@trio_test
async def test_one_that_is_set_while_a_later_one_is_waited_for_comes_first(clock: MockClock) -> None:
    calls = Calls()
    calls.after(100)
    await trio.sleep(1)
    calls.after(5)
    calls.after(4)
    await trio.sleep(200)
    assert calls.seen == [(4, 5), (5, 6), (100, 100)]


@trio_test
async def test_one_that_was_cancelled_is_not_called_and_may_be_cancelled_again(clock: MockClock) -> None:
    calls = Calls()
    one, other = calls.after(1), calls.after(2)
    one.cancel()
    one.cancel()
    await trio.sleep(3)
    assert calls.seen == [(2, 2)]
    other.cancel()


@trio_test
async def test_a_callback_may_set_and_cancel_others(clock: MockClock) -> None:
    calls = Calls()
    victim = calls.after(1)

    def again() -> None:
        victim.cancel()
        calls.note("again")
        if len(calls.seen) < 3:
            current_timers().after(0.5, again)

    current_timers().after(0.5, again)
    await trio.sleep(10)
    assert calls.seen == [("again", 0.5), ("again", 1), ("again", 1.5)]


@trio_test
async def test_thousands_that_are_cancelled_leave_no_more_than_a_few(clock: MockClock) -> None:
    """As the deadlines of connections do, which are cancelled long before their time."""
    calls = Calls()
    calls.after(5)
    for _ in range(10_000):
        calls.after(10).cancel()
        assert len(current_timers()._heap) <= 128
    await trio.sleep(20)
    assert calls.seen == [(5, 5)]
    assert not current_timers()._heap


@pytest.mark.parametrize("way", ["nested", "task"])
def test_a_timer_that_a_callback_of_the_pump_sets_is_not_forgotten(
    way: str, pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even the first one of all, while trio waits for ever."""
    if way == "task":
        monkeypatch.setattr(pump_module, "_descriptor_of_trio", lambda: None)
    near, far = pair

    async def main() -> None:
        token = trio.lowlevel.current_trio_token()

        def on_readable() -> None:
            os.read(near.fileno(), 1)
            current_timers().after(0.01, lambda: token.run_sync_soon(is_over.set))

        current_pump().on_readable(near.fileno(), on_readable)
        for _ in range(2):
            is_over = trio.Event()
            far.send(b"x")
            with trio.fail_after(DEADLINE_S):
                await is_over.wait()
        current_pump().forget(near.fileno())

    trio.run(main)


def test_what_a_callback_raises_ends_the_run() -> None:
    """It is a mistake of ours, which must not pass unnoticed."""

    async def main() -> None:
        current_timers().after(0, lambda: 1 // 0)
        await trio.sleep(DEADLINE_S)

    with pytest.raises(trio.TrioInternalError):
        trio.run(main)


STEPS = st.lists(st.tuples(st.sampled_from(["set", "cancel", "sleep"]), st.integers(0, 20)), max_size=60)


@settings(max_examples=200, deadline=None)
@given(steps=STEPS)
def test_every_timer_is_called_at_its_time_unless_it_was_cancelled_before(steps: list[tuple[str, int]]) -> None:
    async def main() -> None:
        calls = Calls()
        timers: list[Timer] = []
        due: list[float] = []
        for action, amount in steps:
            now = trio.current_time() - calls.began
            if action == "set":
                timers.append(current_timers().after(amount, partial(calls.note, len(timers))))
                due.append(now + amount)
            elif action == "cancel" and timers:
                number = amount % len(timers)
                timers[number].cancel()
                if due[number] >= now:
                    due[number] = -1  # never
            else:
                await trio.sleep(amount + 0.5)  # so that no timer is due at this very moment
        await trio.sleep(100)
        expected = [(number, when) for number, when in enumerate(due) if when >= 0]
        assert sorted(calls.seen, key=str) == sorted(expected, key=str)

    trio.run(main, clock=MockClock(autojump_threshold=0))
