"""Delays between attempts, as numbers; stop signals, as real ones."""

from __future__ import annotations

import logging
import os
import random
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing
from enlink.errors import SystemFailure
from enlink.supervise import FIRST_DELAY_S, MAX_DELAY_S, Backoff, Stopping, stop_signals
from hypothesis import given
from hypothesis import strategies as st

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

PROGRAM = """
import argparse, logging, sys
from enlink.program import ProgramParser, announce_ready, run_program
from enlink.supervise import stop_signals

async def main(options):
    async with stop_signals() as stopping:
        announce_ready(logging.getLogger("test"))
        await stopping.wait()

sys.exit(run_program(ProgramParser("test"), main))
"""


def attempts_s(backoff: Backoff, until_s: float) -> list[float]:
    """When something that always fails at once is attempted, from 0 on."""
    times_s = [0.0]
    while times_s[-1] < until_s:
        times_s.append(times_s[-1] + backoff.next_delay_s())
    return times_s[:-1]


@given(st.floats(0, 1))
def test_delays_start_within_50_ms_and_double_up_to_a_second(draw: float) -> None:
    backoff = Backoff(lambda low, high: low + draw * (high - low))
    delays_s = [backoff.next_delay_s() for _ in range(8)]
    for delay_s, ceiling_s in zip(delays_s, (0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0, 1.0), strict=True):
        assert ceiling_s / 2 <= delay_s <= ceiling_s
    assert FIRST_DELAY_S == 0.05
    assert MAX_DELAY_S == 1


@pytest.mark.proves("G10")
@given(st.lists(st.floats(0, 1), min_size=40, max_size=40))
def test_no_draw_makes_more_than_25_attempts_in_any_10_s(draws: list[float]) -> None:
    remaining = iter(draws)
    times_s = attempts_s(Backoff(lambda low, high: low + next(remaining) * (high - low)), 15)
    for start_s in times_s:
        assert sum(start_s <= time_s < start_s + 10 for time_s in times_s) <= 25


def test_the_hastiest_draw_comes_near_the_limit_so_that_the_limit_means_something() -> None:
    assert len(attempts_s(Backoff(lambda low, _high: low), 10)) >= 23


def test_a_reset_starts_again_at_the_first_delay() -> None:
    backoff = Backoff(lambda _low, high: high)
    delays_s = [backoff.next_delay_s() for _ in range(3)]
    backoff.reset()
    assert [backoff.next_delay_s() for _ in range(3)] == delays_s


def peak_to_mean(uniform: Callable[[float, float], float]) -> float:
    """Of the attempts that 1,000 clients make, which lost their server together: the fullest 100 ms beside the mean."""
    busy: Counter[int] = Counter()
    for _ in range(1000):
        # After 2 s: nothing spreads the first attempts, which come within 50 ms of the loss by design.
        busy.update(int(time_s * 10) for time_s in attempts_s(Backoff(uniform), 12) if time_s >= 2)
    return max(busy.values()) / (sum(busy.values()) / 100)


@pytest.mark.proves("G10")
def test_a_thousand_clients_do_not_come_back_together() -> None:
    assert peak_to_mean(random.Random(6978).uniform) < 3
    assert peak_to_mean(lambda _low, high: high) > 3, "without a draw they do, so this measurement can tell"


def test_the_draws_of_two_clients_differ_without_being_told_to() -> None:
    one, other = Backoff(), Backoff()
    assert [one.next_delay_s() for _ in range(5)] != [other.next_delay_s() for _ in range(5)]


def test_the_first_reason_to_stop_is_kept() -> None:
    async def main() -> None:
        stopping = Stopping()
        assert (stopping.is_set, stopping.reason) == (False, None)
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stopping.wait)
                await trio.testing.wait_all_tasks_blocked()
                stopping.set("the first")
                stopping.set("the second")
        assert (stopping.is_set, stopping.reason) == (True, "the first")

    trio.run(main)


@pytest.mark.proves("F06")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_for_an_orderly_stop(number: signal.Signals, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with stop_signals() as stopping:
            assert not stopping.is_set
            os.kill(os.getpid(), number)
            with trio.fail_after(5):
                await stopping.wait()
            await trio.testing.wait_all_tasks_blocked()  # the block goes on: what to do now is its own affair
            assert stopping.reason == number.name

    with caplog.at_level(logging.INFO):
        trio.run(main)
    assert caplog.messages == ["stopping"]


@pytest.mark.proves("F06")
def test_a_hangup_is_answered_in_the_log_and_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with stop_signals() as stopping:
            os.kill(os.getpid(), signal.SIGHUP)
            await trio.testing.wait_all_tasks_blocked()
            assert not stopping.is_set

    with caplog.at_level(logging.INFO):
        trio.run(main)
    assert caplog.messages == ["nothing_to_reload"]


def test_the_second_signal_cancels_the_block_but_not_its_shielded_clean_up(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> list[str]:
        steps = []
        with trio.fail_after(5):
            async with stop_signals() as stopping:
                os.kill(os.getpid(), signal.SIGTERM)
                await stopping.wait()
                os.kill(os.getpid(), signal.SIGINT)
                try:
                    await trio.Event().wait()
                finally:
                    with trio.move_on_after(5, shield=True):
                        await trio.lowlevel.checkpoint()
                        steps.append("cleaned up")
            steps.append("went on")
        return steps

    assert trio.run(main) == ["cleaned up", "went on"]
    assert caplog.messages == ["stopping_at_once"]


def test_a_hangup_after_the_first_signal_is_no_second_one() -> None:
    async def main() -> None:
        async with stop_signals() as stopping:
            os.kill(os.getpid(), signal.SIGTERM)
            await stopping.wait()
            os.kill(os.getpid(), signal.SIGHUP)
            await trio.testing.wait_all_tasks_blocked()  # would be cancelled
            done.append(True)

    done: list[bool] = []
    trio.run(main)
    assert done


def test_systemd_learns_of_a_stop_that_it_did_not_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with stop_signals() as stopping:
            os.kill(os.getpid(), signal.SIGTERM)
            await stopping.wait()

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        trio.run(main)
        assert systemd.recv(100) == b"STOPPING=1"


def test_a_program_that_was_to_stop_ignores_what_comes_after_the_block(caplog: pytest.LogCaptureFixture) -> None:
    """Also as a failure: its own exit code tells more than that of a signal."""

    async def main(*, is_failing: bool) -> None:
        async with stop_signals() as stopping:
            os.kill(os.getpid(), signal.SIGTERM)
            await stopping.wait()
            if is_failing:
                raise SystemFailure("the device is gone")
        for number in SIGNALS:
            os.kill(os.getpid(), number)
        await trio.testing.wait_all_tasks_blocked()

    with caplog.at_level(logging.INFO):
        trio.run(lambda: main(is_failing=False))
        with pytest.raises(SystemFailure, match="the device is gone"):
            trio.run(lambda: main(is_failing=True))
    assert caplog.messages == ["stopping", "stopping"]
    assert [signal.getsignal(number) for number in SIGNALS] == [signal.SIG_IGN] * 3


def test_a_block_that_ends_or_fails_by_itself_needs_no_signal_and_leaves_no_handler() -> None:
    async def main(*, is_failing: bool) -> None:
        async with stop_signals():
            assert [signal.getsignal(number) for number in SIGNALS] != before
            if is_failing:
                raise SystemFailure("the device is gone")

    before = [signal.getsignal(number) for number in SIGNALS]
    trio.run(lambda: main(is_failing=False))
    with pytest.raises(SystemFailure, match="the device is gone"):
        trio.run(lambda: main(is_failing=True))
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.proves("F06")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_program_survives_a_hangup_and_ends_with_0_when_told_to_stop(number: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stderr=subprocess.PIPE, text=True) as program:
        try:
            assert program.stderr is not None
            assert " ready" in program.stderr.readline()
            program.send_signal(signal.SIGHUP)
            assert " nothing_to_reload signal=SIGHUP" in program.stderr.readline()
            program.send_signal(number)
            assert f" stopping signal={number.name}" in program.stderr.readline()
            assert program.wait(20) == 0
            assert program.stderr.read() == ""
        finally:
            program.kill()
