"""The handshakes under way on a leg, of which the oldest gives way to others. What one is, is up to enlink.attested."""

from __future__ import annotations

import trio
from enlink.attested import AttestedSide, AttestedStream
from enlink.link import LinkEnded


class Handshakes:
    """Makes attested streams of plain ones, several at a time. ``len`` says how many are under way."""

    def __init__(self, side: AttestedSide) -> None:
        self._side = side
        self._scopes: list[trio.CancelScope] = []

    def __len__(self) -> int:
        return len(self._scopes)

    async def shake_hands(self, stream: trio.abc.Stream) -> AttestedStream:
        """Do what `AttestedSide.shake_hands` does.

        Raises:
            LinkEnded: as there; with the reason ``too_many`` it had to give way. *stream* is closed.
        """
        with trio.CancelScope() as scope:
            self._scopes.append(scope)
            try:
                return await self._side.shake_hands(stream)
            finally:
                if scope in self._scopes:
                    self._scopes.remove(scope)
        raise LinkEnded("too_many", "this was the slowest of too many handshakes")

    def end_oldest(self) -> bool:
        """Give up the oldest: a real one takes milliseconds. Returns whether there was one."""
        if self._scopes:
            self._scopes.pop(0).cancel()
            return True
        return False
