"""The pump calls back whoever waits, and trio's tasks, timers and signals get their turn all the same."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
from enlink import pump as pump_module
from enlink.errors import leaves
from enlink.pump import current_pump, while_readable
from trio.testing import MockClock, trio_test, wait_all_tasks_blocked

DEADLINE_S = 20.0


@pytest.fixture(params=["nested", "task"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to run: on trio's own epoll, and as a task, where that is not to be found."""
    if request.param == "task":
        monkeypatch.setattr(pump_module, "_descriptor_of_trio", lambda: None)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    near, far = socket.socketpair()
    near.setblocking(False)
    far.setblocking(False)
    with near, far:
        yield near, far


async def until(condition: Callable[[], bool]) -> None:
    while True:
        if condition():
            return
        await trio.sleep(0.001)


@trio_test
async def test_this_version_of_trio_shows_its_epoll(request: pytest.FixtureRequest) -> None:
    """Otherwise everything works, and is slow: a new version of trio must not do that to us unnoticed."""
    is_nested = "nested" in request.node.name
    assert (pump_module._descriptor_of_trio() is not None) is is_nested


@trio_test
async def test_a_step_is_called_until_it_has_enough(pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair
    seen: list[bytes] = []

    def step() -> bool:
        seen.append(near.recv(1))
        return len(seen) < 3

    far.send(b"abcd")
    with trio.fail_after(DEADLINE_S):
        await while_readable(near.fileno(), step)
    assert seen == [b"a", b"b", b"c"]
    assert near.recv(10) == b"d"


@trio_test
async def test_what_a_step_raises_is_raised_where_somebody_waits(pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair

    def step() -> bool:
        raise ValueError("broken")

    far.send(b"x")
    with trio.fail_after(DEADLINE_S), pytest.raises(ValueError, match="broken"):
        await while_readable(near.fileno(), step)


@trio_test
async def test_the_end_of_a_stream_is_something_to_read(pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair
    far.close()
    with trio.fail_after(DEADLINE_S):
        await while_readable(near.fileno(), lambda: near.recv(1) != b"")


@trio_test
async def test_cancelled_waiting_takes_nothing(pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair
    with trio.move_on_after(0.01) as scope:
        await while_readable(near.fileno(), lambda: pytest.fail("called without anything to read"))
    assert scope.cancelled_caught
    far.send(b"x")
    await trio.sleep(0.01)
    assert near.recv(10) == b"x"


@trio_test
async def test_traffic_without_end_leaves_timers_and_tasks_their_turn(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    near, far = pair
    far.send(b"x")
    calls = 0

    def step() -> bool:  # level-triggered: what is not taken is offered again at once, for ever
        nonlocal calls
        calls += 1
        return True

    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(while_readable, near.fileno(), step)
            await trio.sleep(0.05)
            here, there = trio.socket.socketpair()
            nursery.start_soon(there.send, b"y")
            assert await here.recv(1) == b"y"
            assert await trio.to_thread.run_sync(lambda: 7) == 7
            before = calls
            await trio.sleep(0.05)
            assert calls > before
            nursery.cancel_scope.cancel()
        here.close()
        there.close()


@trio_test
async def test_timers_are_kept_between_steps(pair: tuple[socket.socket, socket.socket]) -> None:
    """Bytes now and then must not put off a deadline that passes between them."""
    near, far = pair
    began = trio.current_time()
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(while_readable, near.fileno(), lambda: bool(near.recv(1)))
            for _ in range(20):
                far.send(b"x")
                await trio.sleep(0.005)
            nursery.cancel_scope.cancel()
    assert 0.1 <= trio.current_time() - began < 8


@trio_test
async def test_a_forgotten_descriptor_is_never_called(pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair
    pump = current_pump()
    pump.on_readable(near.fileno(), lambda: pytest.fail("called after it was forgotten"))
    pump.on_writable(near.fileno(), lambda: pytest.fail("called after it was forgotten"))
    pump.forget(near.fileno())
    pump.forget(near.fileno())
    far.send(b"x")
    await trio.sleep(0.02)


@trio_test
async def test_both_directions_of_one_descriptor_are_told_apart(pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair
    pump = current_pump()
    seen: list[str] = []

    def on_writable() -> None:
        seen.append("write")
        pump.on_writable(near.fileno(), None)

    pump.on_readable(near.fileno(), lambda: seen.append("read" + near.recv(1).decode()))
    pump.on_writable(near.fileno(), on_writable)
    with trio.fail_after(DEADLINE_S):
        await until(lambda: bool(seen))
        assert seen == ["write"]
        far.send(b"x")
        await until(lambda: len(seen) == 2)
    assert seen == ["write", "readx"]
    pump.forget(near.fileno())


@trio_test
async def test_two_tasks_cannot_wait_for_one_descriptor(pair: tuple[socket.socket, socket.socket]) -> None:
    near, _ = pair
    async with trio.open_nursery() as nursery:
        nursery.start_soon(while_readable, near.fileno(), lambda: True)
        await wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await while_readable(near.fileno(), lambda: True)
        nursery.cancel_scope.cancel()


@trio_test
async def test_who_waits_is_told_when_the_descriptor_is_to_be_closed(pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def wait() -> None:
                with pytest.raises(trio.ClosedResourceError):
                    await while_readable(near.fileno(), lambda: pytest.fail("called after it was forgotten"))

            await wait_all_tasks_blocked()
            current_pump().forget(near.fileno())
            far.send(b"x")
            # Cancelled when the outcome is decided already: it stays what it is.
            nursery.cancel_scope.cancel()


def test_a_callback_that_raises_ends_the_run_and_not_only_the_traffic(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    near, far = pair

    async def main() -> None:
        current_pump().on_readable(near.fileno(), lambda: 1 // 0)
        far.send(b"x")
        await trio.sleep(DEADLINE_S)

    with pytest.raises(trio.TrioInternalError) as raised:
        trio.run(main)
    cause = raised.value.__cause__
    assert cause is not None
    assert any(isinstance(leaf, ZeroDivisionError) for leaf in leaves(cause))


def test_the_clock_of_a_test_jumps_over_waiting_and_not_over_traffic(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    near, far = pair
    far.send(b"abc")
    seen: list[float] = []

    def step() -> bool:
        seen.append(trio.current_time())
        return near.recv(1) != b""

    async def main() -> None:
        began = trio.current_time()
        with trio.move_on_after(1000):
            await while_readable(near.fileno(), step)
        assert [moment - began for moment in seen] == [0, 0, 0]
        assert trio.current_time() - began == 1000

    trio.run(main, clock=MockClock(autojump_threshold=0.05))


def test_signals_reach_a_program_that_only_moves_bytes() -> None:
    """The thread sits in our epoll when the signal comes; trio must see it nevertheless."""
    near, far = socket.socketpair()
    near.setblocking(False)

    async def main() -> int:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(while_readable, near.fileno(), lambda: bool(near.recv(1)))
            with trio.open_signal_receiver(10) as signals:
                nursery.start_soon(trio.to_thread.run_sync, os.kill, os.getpid(), 10)
                async for number in signals:
                    nursery.cancel_scope.cancel()
                    return number
        raise AssertionError("no signal")

    async def bounded() -> int:
        with trio.fail_after(DEADLINE_S):
            return await main()

    with near, far:
        assert trio.run(bounded) == 10


def test_a_run_that_ends_leaves_no_descriptor() -> None:
    near, far = socket.socketpair()
    near.setblocking(False)

    async def main() -> None:
        with trio.move_on_after(0.01):
            await while_readable(near.fileno(), lambda: True)

    with near, far:
        trio.run(main)
        before = len(list(Path("/proc/self/fd").iterdir()))
        for _ in range(3):
            trio.run(main)
        assert len(list(Path("/proc/self/fd").iterdir())) == before


@trio_test
async def test_a_pump_that_spins_finds_an_answer_before_it_sleeps(
    request: pytest.FixtureRequest, pair: tuple[socket.socket, socket.socket], caplog: pytest.LogCaptureFixture
) -> None:
    """As long as it takes: somebody else may have the processors. Where it cannot spin it says so."""
    near, far = pair
    pump = current_pump()
    pump.spin(0.01)
    is_nested = "nested" in request.node.name
    assert [record.message for record in caplog.records] == ([] if is_nested else ["spin_unavailable"])
    answers = 0

    def answer() -> None:
        nonlocal answers
        near.send(near.recv(1))
        answers += 1

    pump.on_readable(near.fileno(), answer)
    far.setblocking(True)
    with trio.fail_after(DEADLINE_S):
        # A callback asks the next question, so that it is there before the wait that follows.
        questions = 0

        def ask() -> None:
            nonlocal questions
            far.recv(1)
            far.send(b"q")
            questions += 1

        pump.on_readable(far.fileno(), ask)
        far.send(b"q")
        await until(lambda: answers >= 100)
    pump.forget(near.fileno())
    pump.forget(far.fileno())
    assert questions >= 99
    counts = pump.spin_counts()
    assert set(counts) == ({"found", "missed"} if is_nested else set())
    assert not is_nested or counts["found"] > 0
    pump.spin(0)
    assert pump.spin_counts() == {}


@trio_test
async def test_a_pump_that_spins_leaves_timers_and_threads_their_turn(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    near, far = pair
    pump = current_pump()
    pump.spin(0.01)
    pump.on_readable(near.fileno(), lambda: near.recv(1))
    far.send(b"x")
    with trio.fail_after(DEADLINE_S):
        before_s = trio.current_time()
        await trio.sleep(0.005)
        assert trio.current_time() - before_s >= 0.005
        for _ in range(20):
            far.send(b"x")
            assert await trio.to_thread.run_sync(lambda: 7) == 7
    pump.forget(near.fileno())
