"""Spinning looks again before it sleeps, costs no more than it brings, and never waits longer than it was told."""

from __future__ import annotations

import pytest
from enlink.spin import Events, Spin
from hypothesis import given
from hypothesis import strategies as st

LIMIT_S = 0.0003
LOOK_S = 0.000_001
WORD: Events = [(7, 1)]


class Kernel:
    """A clock, and descriptors that become ready at known times. To look takes a microsecond."""

    def __init__(self, ready_at_s: list[float]) -> None:
        self.now_s = 0.0
        self.ready_at_s = sorted(ready_at_s)
        self.slept_s: list[float] = []
        self.gave_way = 0

    def clock(self) -> float:
        return self.now_s

    def give_way(self) -> None:
        self.gave_way += 1

    def poll(self, timeout_s: float, max_events: int) -> Events:
        assert max_events == 64
        self.now_s += LOOK_S
        if timeout_s > 0:
            until_s = min([self.now_s + timeout_s, *self.ready_at_s[:1]])
            self.slept_s.append(max(0.0, until_s - self.now_s))
            self.now_s = max(self.now_s, until_s)
        if self.ready_at_s and self.ready_at_s[0] <= self.now_s:
            self.ready_at_s.pop(0)
            return WORD
        return []

    def spin(self) -> Spin:
        return Spin(self.poll, LIMIT_S, self.clock, self.give_way)


def test_what_comes_within_the_moment_is_found_without_sleeping() -> None:
    kernel = Kernel([0.0002])
    spin = kernel.spin()
    assert spin.wait(5.0, 64) == WORD
    assert (spin.found, spin.missed, kernel.slept_s) == (1, 0, [])
    assert kernel.now_s == pytest.approx(0.0002, abs=2 * LOOK_S)


def test_others_get_the_processor_between_two_looks() -> None:
    kernel = Kernel([0.0001])
    kernel.spin().wait(5.0, 64)
    assert kernel.gave_way == pytest.approx(0.0001 / LOOK_S, rel=0.05)


def test_what_comes_later_is_waited_for_asleep() -> None:
    kernel = Kernel([1.0])
    spin = kernel.spin()
    assert spin.wait(5.0, 64) == WORD
    assert (spin.found, spin.missed) == (0, 1)
    assert kernel.slept_s == [pytest.approx(1.0 - LIMIT_S, abs=5 * LOOK_S)]


def test_moments_in_vain_become_rare_and_one_that_is_not_starts_anew() -> None:
    kernel = Kernel([second * 0.01 for second in range(1, 1001)])
    spin = kernel.spin()
    for _ in range(1000):
        assert spin.wait(5.0, 64) == WORD
    # One wait in 64, once it has become clear; before that 1, 3, 7, … others in between.
    assert spin.missed == 20
    kernel.ready_at_s = [kernel.now_s]
    while not spin.found:
        kernel.ready_at_s = [kernel.now_s + LIMIT_S / 2]
        spin.wait(5.0, 64)
    spin.missed = 0
    kernel.ready_at_s = [kernel.now_s + 1, kernel.now_s + 2, kernel.now_s + 3]
    for _ in range(3):
        spin.wait(5.0, 64)
    assert spin.missed == 2  # then one that slept at once, and again one in vain


@given(
    st.lists(st.floats(0, 0.5), max_size=50),
    st.lists(st.floats(0, 0.02), min_size=1, max_size=50),
)
def test_no_wait_is_too_long_and_no_event_is_lost(ready_at_s: list[float], waits_s: list[float]) -> None:
    kernel = Kernel(list(ready_at_s))
    spin = kernel.spin()
    found = 0
    for timeout_s in waits_s:
        began_s = kernel.now_s
        found += len(spin.wait(timeout_s, 64))
        # As exact as a look, of which it takes two more when it sleeps.
        assert kernel.now_s - began_s <= timeout_s + 5 * LOOK_S
    assert found + len(kernel.ready_at_s) == len(ready_at_s)
    assert spin.found + spin.missed <= len(waits_s)


@given(st.integers(1, 2000))
def test_in_vain_it_costs_a_small_part_of_what_passes(waits: int) -> None:
    kernel = Kernel([])
    spin = kernel.spin()
    for _ in range(waits):
        spin.wait(0.01, 64)
    assert spin.missed <= 6 + waits / 64
