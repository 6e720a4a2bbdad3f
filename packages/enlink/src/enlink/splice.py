"""Moves bytes between two connected stream sockets of any family, both ways, until both have ended. Dials nobody.

Callbacks of the pump do the work; the task that waits for the end wakes for deadlines only. Small pieces are copied
through one buffer that all connections share. A direction that fills the buffer is bulk: its bytes go through a pipe
inside the kernel instead, which it borrows and gives back as soon as it is empty. So an idle connection has neither
buffer nor pipe, and what one direction may hold back is a buffer or a pipe, never more.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from math import inf
from time import monotonic
from types import TracebackType
from typing import Final, Literal, Self, TypeAlias

import outcome as trio_outcome
import trio

from enlink.direction import BUFFER_BYTES, Direction
from enlink.pipes import MAX_PIPES, PipePool
from enlink.pump import current_pump

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
    """What the connections of one trio run share: a buffer and pipes. Use it in a ``with`` block around them all.

    Args:
        max_pipes: how many directions may have bytes in a pipe at a time; others copy. Each pipe is two descriptors.
    """

    def __init__(self, max_pipes: int = MAX_PIPES) -> None:
        self.buffer = memoryview(bytearray(BUFFER_BYTES))
        self.pipes = PipePool(max_pipes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.pipes.close()

    async def bridge(self, left: socket.socket, right: socket.socket, limits: Limits = NO_LIMITS) -> Outcome:
        """Pass on what each socket says to the other, until both have finished or a limit is reached.

        Takes over both sockets, which must be connected and non-blocking, and closes them, also when cancelled. An
        end of one direction is passed on when all its bytes have been; the other goes on. Within a direction no more
        than a pipe's megabyte waits here; then its source is not read.
        """
        connection = _Connection(self, left, right)
        try:
            return connection.outcome(await connection.run(limits))
        finally:
            connection.close()


class _Connection:
    """Two directions, and the task that waits for their end."""

    __slots__ = ("_directions", "_ending", "_is_waiting", "_pump", "_task", "_wakes_on_half_close", "last_moved_s")

    def __init__(self, mover: Mover, left: socket.socket, right: socket.socket) -> None:
        self._pump = current_pump()
        self._task = trio.lowlevel.current_task()
        self._ending: Ending | None = None
        self._is_waiting = False
        self._wakes_on_half_close = False
        self.last_moved_s = monotonic()
        self._directions = (
            Direction(self, left, right, self._pump, mover.buffer, mover.pipes),
            Direction(self, right, left, self._pump, mover.buffer, mover.pipes),
        )

    async def run(self, limits: Limits) -> Ending:
        start_s = self.last_moved_s
        self._wakes_on_half_close = limits.half_close_s is not None
        for direction in self._directions:
            direction.start()
        while self._ending is None:
            timeout_s, reason = self._next_deadline(limits, start_s)
            if timeout_s <= 0:
                self._ending = reason
                break
            self._is_waiting = True
            with trio.move_on_after(timeout_s):
                await trio.lowlevel.wait_task_rescheduled(self._stop_waiting)
        return self._ending

    def close(self) -> None:
        """Close both sockets: as they are after a whole exchange, with a reset after any other."""
        for direction in self._directions:
            direction.stop()
        for direction in self._directions:
            direction.close_source(aborts=self._ending != "eof")

    def outcome(self, ending: Ending) -> Outcome:
        one, other = self._directions
        return Outcome(ending, one.moved_bytes, other.moved_bytes, one.spliced_bytes + other.spliced_bytes)

    def direction_ended(self) -> None:
        """Look whether that was all, or a deadline begins."""
        one, other = self._directions
        if one.is_over and other.is_over:
            self.finish("reset" if one.is_broken or other.is_broken else "eof")
        elif self._wakes_on_half_close:
            self._wake()

    def direction_stuck(self) -> None:
        """End a connection of which one direction leads nowhere and the other waits: nobody may ever notice."""
        one, other = self._directions
        if (one.is_broken and other.is_held) or (other.is_broken and one.is_held):
            self.finish("reset")

    def finish(self, ending: Ending) -> None:
        """End the wait of the task. For callbacks."""
        self._ending = ending
        for direction in self._directions:
            direction.stop()
        self._wake()

    def _next_deadline(self, limits: Limits, start_s: float) -> tuple[float, Ending]:
        deadlines: list[tuple[float, Ending]] = [(inf, "idle")]
        if limits.lifetime_s is not None:
            deadlines.append((start_s + limits.lifetime_s, "lifetime"))
        if limits.half_close_s is not None and any(direction.is_over for direction in self._directions):
            deadlines.append((self.last_moved_s + limits.half_close_s, "half_close_timeout"))
        if limits.idle_s is not None:
            deadlines.append((self.last_moved_s + limits.idle_s, "idle"))
        deadline_s, reason = min(deadlines)
        return deadline_s - monotonic(), reason

    def _wake(self) -> None:
        if self._is_waiting:
            self._is_waiting = False
            self._pump.wake(self._task, trio_outcome.Value(None))

    def _stop_waiting(self, _: object) -> trio.lowlevel.Abort:
        if not self._is_waiting:  # a callback has woken the task, which comes to that in a moment
            return trio.lowlevel.Abort.FAILED
        self._is_waiting = False
        return trio.lowlevel.Abort.SUCCEEDED
