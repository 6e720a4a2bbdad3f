"""Waiting for traffic without sleeping, for a moment: to wake a processor takes longer than to move a packet."""

from __future__ import annotations

import os
from collections.abc import Callable
from time import monotonic
from typing import Final

# Choices of ours.
_MOST_SKIPPED: Final = 63  # waits that sleep at once, after spinning has been in vain again and again

Events = list[tuple[int, int]]  # descriptors and what they are ready for, as epoll has them
Poll = Callable[[float, int], Events]  # waits for so many seconds at most, for so many events at most


class Spin:
    """A way to wait for events: looks again and again for a moment, and sleeps then.

    It pays where one message follows another, and costs a processor's time where none does. So what it costs is
    bounded by what it has brought: after a moment in vain the next wait sleeps at once, after another the next three,
    seven, and so on; the first moment that brings something begins anew. Between two looks whoever else wants the
    processor gets it, by sched_yield(2): without that it would take from its own peers what it gains.

    Args:
        poll: what it looks with, and sleeps with.
        limit_s: how long the moment is.

    Attributes:
        found: how many waits ended within the moment.
        missed: how many moments were in vain.
    """

    def __init__(
        self,
        poll: Poll,
        limit_s: float,
        clock: Callable[[], float] = monotonic,
        give_way: Callable[[], object] = os.sched_yield,
    ) -> None:
        self._poll = poll
        self._limit_s = limit_s
        self._clock = clock
        self._give_way = give_way
        self._to_skip = self._skipped_last = 0
        self.found = self.missed = 0

    def wait(self, timeout_s: float, max_events: int) -> Events:
        """Wait as *poll* does, in sum for no longer than it would."""
        poll = self._poll
        if self._to_skip:
            self._to_skip -= 1
            return poll(timeout_s, max_events)
        clock, give_way = self._clock, self._give_way
        began_s = clock()
        until_s = began_s + min(self._limit_s, timeout_s)
        while not (events := poll(0, max_events)):
            give_way()
            if clock() >= until_s:
                self.missed += 1
                self._to_skip = self._skipped_last = min(2 * self._skipped_last + 1, _MOST_SKIPPED)
                return poll(max(0.0, timeout_s - (clock() - began_s)), max_events)
        self.found += 1
        self._skipped_last = 0
        return events
