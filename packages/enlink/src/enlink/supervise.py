"""How a program is told to stop, and how long it waits before it tries again. What it does then is its own affair."""

from __future__ import annotations

import logging
import random
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import FrameType

import trio

from enlink.program import log_event, notify_supervisor

# Choices of ours.
FIRST_DELAY_S = 0.05
MAX_DELAY_S = 1.0

_logger = logging.getLogger(__name__)


class Backoff:
    """The delays between attempts at something that is to succeed in the end: up to 50 ms at first, doubling up to 1 s.

    Each delay is drawn from the upper half of its range: the lower bound keeps it to 25 attempts in any 10 s, the draw
    keeps clients that lost one server together from coming back together.

    Args:
        uniform: draws a number between two others, in place of `random.uniform`.
    """

    def __init__(self, uniform: Callable[[float, float], float] = random.uniform) -> None:
        self._uniform = uniform
        self._ceiling_s = FIRST_DELAY_S

    def next_delay_s(self) -> float:
        """Return the seconds to wait before the next attempt."""
        ceiling_s = self._ceiling_s
        self._ceiling_s = min(2 * ceiling_s, MAX_DELAY_S)
        return self._uniform(ceiling_s / 2, ceiling_s)

    def reset(self) -> None:
        """Start again at the first delay.

        Call it once an attempt has proved good, not merely begun: a peer that accepts and hangs up at once would
        otherwise be dialled twenty times a second for ever.
        """
        self._ceiling_s = FIRST_DELAY_S


class Stopping:
    """Whether this program is to stop. Made by `stop_signals`, or alone where a test takes the place of the signals."""

    def __init__(self) -> None:
        self._event = trio.Event()
        self.reason: str | None = None

    @property
    def is_set(self) -> bool:
        """The program is to stop."""
        return self._event.is_set()

    def set(self, reason: str) -> None:
        """Ask for an orderly stop, as a signal does. Only the first *reason* is kept; calling it again is harmless."""
        if not self._event.is_set():
            self.reason = reason
            self._event.set()

    async def wait(self) -> None:
        """Return once the program is to stop."""
        await self._event.wait()


@asynccontextmanager
async def stop_signals() -> AsyncIterator[Stopping]:
    """Turn signals into a wish to stop, for as long as the block runs; to be used once, in the main thread.

    The first SIGTERM or SIGINT sets the value given to the block, which then ends what it does in its own order, and
    tells systemd. The second one cancels the block, which then ends as if it had been done: only clean-up that is
    shielded still runs. SIGHUP is logged, since there is nothing to reload.

    A program that was to stop ignores all three from the end of the block on: what they ask for is as good as done, and
    one that came late would end it with an exit status of its own. After any other end they mean what they did before.
    """
    stopping = Stopping()
    token = trio.lowlevel.current_trio_token()
    with trio.CancelScope() as block:

        def heed(number: int) -> None:
            name = signal.Signals(number).name
            if number == signal.SIGHUP:
                log_event(_logger, "nothing_to_reload", signal=name)
            elif stopping.is_set:
                log_event(_logger, "stopping_at_once", logging.WARNING, signal=name)
                block.cancel()
            else:
                log_event(_logger, "stopping", signal=name)
                notify_supervisor("STOPPING=1")
                stopping.set(name)

        def receive(number: int, _: FrameType | None) -> None:
            token.run_sync_soon(heed, number, idempotent=True)

        before = {number: signal.signal(number, receive) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
        try:
            yield stopping
        finally:
            # Not with trio's receiver, which gives the old handlers back, if only for a moment.
            for number, handler in before.items():
                signal.signal(number, signal.SIG_IGN if stopping.is_set else handler)
