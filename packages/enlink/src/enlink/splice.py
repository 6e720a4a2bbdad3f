"""Moves bytes between two connected stream sockets of any family, both ways, until both have ended. Dials nobody.

Callbacks do all the work: a connection has no task. Small pieces are copied through one buffer that all connections
share. A direction that fills the buffer is bulk: its bytes go through a pipe inside the kernel instead, which it
borrows and gives back as soon as it is empty. So an idle connection has neither buffer nor pipe, and what one direction
may hold back is a buffer or a pipe, never more.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from time import monotonic
from types import TracebackType
from typing import Final, Literal, Self, TypeAlias

from enlink.direction import BUFFER_BYTES, Direction
from enlink.pipes import MAX_PIPES, PipePool
from enlink.pump import current_pump
from enlink.timers import Timer, current_timers

Ending: TypeAlias = Literal["eof", "reset", "idle", "lifetime", "half_close_timeout"]


@dataclass(frozen=True, slots=True)
class Limits:
    """When to end a connection that does not end by itself; None: never.

    Attributes:
        idle_s: nothing has moved in either direction for so long.
        lifetime_s: so long after its start.
        half_close_s: one side has finished, and nothing has moved for so long.
    """

    idle_s: float | None = None
    lifetime_s: float | None = None
    half_close_s: float | None = None


NO_LIMITS: Final = Limits()


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a connection ended, and what it carried: bytes that the other side's socket took.

    ``eof`` means that both sides have finished and every byte was passed on. Any other end is passed on as a reset
    where the family has one, so that nobody takes what arrived for the whole.
    """

    ending: Ending
    left_to_right_bytes: int
    right_to_left_bytes: int
    spliced_bytes: int


class Mover:
    """What the exchanges of one trio run share: a buffer and pipes. Use it in a ``with`` block around them all.

    Args:
        max_pipes: how many directions may have bytes in a pipe at a time; others copy. Each pipe is two descriptors.
    """

    def __init__(self, max_pipes: int = MAX_PIPES) -> None:
        self.buffer = memoryview(bytearray(BUFFER_BYTES))
        self.pipes = PipePool(max_pipes)
        self.pump = current_pump()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.pipes.close()


class Exchange:
    """Both ways between two sockets, until both have ended or a limit is reached. `start` begins it.

    Takes over both sockets, which must be connected and non-blocking, and closes them at the end. An end of one
    direction is passed on when all its bytes have been; the other goes on. Within a direction no more than a pipe's
    megabyte waits here; then its source is not read.

    Args:
        done: called once, when both sockets are closed; perhaps before `start` returns, and not after `abort`.
    """

    __slots__ = ("_directions", "_done", "_is_over", "_limits", "_start_s", "_timer", "last_moved_s")

    def __init__(
        self,
        mover: Mover,
        left: socket.socket,
        right: socket.socket,
        done: Callable[[Outcome], object],
        limits: Limits = NO_LIMITS,
    ) -> None:
        self._directions = (
            Direction(self, left, right, mover.pump, mover.buffer, mover.pipes),
            Direction(self, right, left, mover.pump, mover.buffer, mover.pipes),
        )
        self._done = done
        self._limits = limits
        self._timer: Timer | None = None
        self._is_over = False
        self._start_s = self.last_moved_s = monotonic()

    def start(self) -> None:
        """Begin to move bytes, with those that the left side may have said already."""
        one, other = self._directions
        one.start()
        other.start()
        if self._limits != NO_LIMITS:
            self._look_at_limits()
        one.move()

    def abort(self) -> None:
        """Close both sockets at once, with a reset, and call nobody. It may be over already."""
        if not self._is_over:
            self._close(aborts=True)

    def finish(self, ending: Ending) -> None:
        """Close both sockets: as they are after a whole exchange, with a reset after any other."""
        if self._is_over:
            return
        self._close(aborts=ending != "eof")
        one, other = self._directions
        self._done(Outcome(ending, one.moved_bytes, other.moved_bytes, one.spliced_bytes + other.spliced_bytes))

    def direction_ended(self) -> bool:
        """Finish, if that was all, and return whether it was; a deadline may begin otherwise."""
        one, other = self._directions
        if one.is_over and other.is_over:
            self.finish("reset" if one.is_broken or other.is_broken else "eof")
        elif self._limits.half_close_s is not None:
            self._look_at_limits()
        return self._is_over

    def direction_stuck(self) -> None:
        """End a connection of which one direction leads nowhere and the other waits: nobody may ever notice."""
        one, other = self._directions
        if (one.is_broken and other.is_held) or (other.is_broken and one.is_held):
            self.finish("reset")

    def _close(self, *, aborts: bool) -> None:
        self._is_over = True
        if self._timer is not None:
            self._timer.cancel()
        for direction in self._directions:
            direction.stop()
        for direction in self._directions:
            direction.close_source(aborts=aborts)

    def _look_at_limits(self) -> None:
        """Finish if one is reached, and look again when the next one may be."""
        if self._timer is not None:
            self._timer.cancel()
        limits = self._limits
        deadlines: list[tuple[float, Ending]] = [(inf, "idle")]
        if limits.lifetime_s is not None:
            deadlines.append((self._start_s + limits.lifetime_s, "lifetime"))
        if limits.half_close_s is not None and any(direction.is_over for direction in self._directions):
            deadlines.append((self.last_moved_s + limits.half_close_s, "half_close_timeout"))
        if limits.idle_s is not None:
            deadlines.append((self.last_moved_s + limits.idle_s, "idle"))
        deadline_s, ending = min(deadlines)
        left_s = deadline_s - monotonic()
        if left_s <= 0:
            self.finish(ending)
        elif left_s < inf:
            self._timer = current_timers().after(left_s, self._look_at_limits)
