"""Tell the peer on a leg whether the path goes on beyond the gateway. Whether it does is for legs.py to know."""

from __future__ import annotations

from typing import Final, NoReturn

import trio
from enlink.link import Link

# Choices of ours.
PAUSE_S: Final = 0.1  # between two messages to the same peer, however often the state changes


class Onward:
    """Whether the path goes on, and the telling of it: the latest state, so that nothing queues up.

    Attributes:
        is_open: the latest state.
    """

    def __init__(self) -> None:
        self.is_open = False
        self._has_changed = trio.Event()

    def note(self, *, is_open: bool) -> None:
        """Take note of the state."""
        if is_open != self.is_open:
            self.is_open = is_open
            self._has_changed.set()
            self._has_changed = trio.Event()

    async def tell(self, link: Link, *, stall_limit_s: float) -> NoReturn:
        """Tell the peer of *link* now and at every change, until cancelled; never the same twice.

        Raises:
            LinkEnded: as `Link.send`.
        """
        told: bool | None = None
        while True:
            while told == self.is_open:
                await self._has_changed.wait()
                if self.is_open:
                    # Good news may wait: a gateway that has just come may say next that nobody is behind it.
                    await trio.sleep(PAUSE_S)
            told = self.is_open
            await link.tell_path(is_open=told, stall_limit_s=stall_limit_s)
            await trio.sleep(PAUSE_S)
