"""Calls plain functions when their time has come: deadlines of what goes on in callbacks. Waits for no descriptor.

One task of the trio run sleeps until the first deadline, whoever has set it. Most deadlines never come, since what they
are for is done before. So setting one and cancelling it costs no turn of the scheduler, unless it is the first of all.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count
from math import inf
from typing import Final

import trio

# Choices of ours.
_FEW: Final = 64  # timers that are cancelled may stay until their time, up to so many or half of all

_current: trio.lowlevel.RunVar[Timers] = trio.lowlevel.RunVar("enlink.timers")


class Timer:
    """Something to be called later, once; made by `Timers.after`."""

    __slots__ = ("_callback", "_timers")

    def __init__(self, timers: Timers, callback: Callable[[], object]) -> None:
        self._timers = timers
        self._callback: Callable[[], object] | None = callback

    def cancel(self) -> None:
        """Do not call it. It may have been called or cancelled already."""
        if self._callback is not None:
            self._callback = None
            self._timers.forget_one()

    def expire(self) -> bool:
        """Call it, and return True; False if it was cancelled."""
        callback, self._callback = self._callback, None
        if callback is not None:
            callback()
        return callback is not None

    @property
    def is_cancelled(self) -> bool:
        """It will not be called, or not again."""
        return self._callback is None


class Timers:
    """The timers of one trio run; `current_timers` makes them when they are first asked for.

    Callbacks run in trio's thread, as those of the pump do, and must neither block nor raise.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Timer]] = []
        self._numbers = count()
        self._cancelled = 0
        self._wakes_at = inf
        self._is_sooner = trio.Event()
        self._token = trio.lowlevel.current_trio_token()

    def after(self, delay_s: float, callback: Callable[[], object]) -> Timer:
        """Call *callback* after *delay_s*, unless the timer is cancelled before. For tasks and for callbacks."""
        timer = Timer(self, callback)
        deadline = trio.current_time() + delay_s
        heapq.heappush(self._heap, (deadline, next(self._numbers), timer))
        if deadline < self._wakes_at:
            self._wakes_at = -inf  # once is enough
            self._token.run_sync_soon(self._is_sooner.set)
        return timer

    def forget_one(self) -> None:
        """Note that a timer was cancelled, and clear away those that are when they are many."""
        self._cancelled += 1
        if self._cancelled > max(_FEW, len(self._heap) // 2):
            self._heap = [entry for entry in self._heap if not entry[2].is_cancelled]
            heapq.heapify(self._heap)
            self._cancelled = 0

    async def serve(self) -> None:
        """Call whoever's time has come until trio's run ends: a system task.

        Raises:
            BaseException: what a callback raised, which must not. It ends the run.
        """
        while True:
            self._is_sooner = trio.Event()
            self._call_due()
            self._wakes_at = self._heap[0][0] if self._heap else inf
            with trio.move_on_at(self._wakes_at):
                await self._is_sooner.wait()

    def _call_due(self) -> None:
        now = trio.current_time()
        while self._heap and self._heap[0][0] <= now:
            _, _, timer = heapq.heappop(self._heap)
            if not timer.expire():
                self._cancelled -= 1


def current_timers() -> Timers:
    """Return the timers of this trio run."""
    try:
        return _current.get()
    except LookupError:
        timers = Timers()
        _current.set(timers)
        trio.lowlevel.spawn_system_task(timers.serve)
        return timers
