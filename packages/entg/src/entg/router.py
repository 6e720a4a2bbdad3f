"""Decide where packets go, and news of the path. With one ENTA and one peer that is simple: to the other leg."""

from __future__ import annotations

from typing import Protocol

from enlink.frame import Packets


class Destination(Protocol):
    """Where a router sends packets."""

    @property
    def path_is_open(self) -> bool:
        """Packets that are sent here go on, as far as is known, to the agent at the end."""

    def note_onward(self, *, is_open: bool) -> None:
        """Take note whether what comes from here goes on."""

    def send_at_once(self, packets: Packets) -> bool:
        """Pass packets on, or drop and count them; False, if that would mean to wait: then nothing was done."""

    async def send(self, packets: Packets) -> None:
        """Pass packets on, or drop and count them. Waits while the link has no room."""


class Router:
    """Passes what comes from one leg to the other, still encoded."""

    def __init__(self) -> None:
        self._other: dict[Destination, Destination] = {}

    def connect(self, left: Destination, right: Destination) -> None:
        """Make each leg the other's destination."""
        self._other = {left: right, right: left}

    def forward_at_once(self, source: Destination, packets: Packets) -> bool:
        """Pass on what came from *source*; False, if that would mean to wait: then use `forward`."""
        return self._other[source].send_at_once(packets)

    async def forward(self, source: Destination, packets: Packets) -> None:
        """Pass on what came from *source*, in order."""
        await self._other[source].send(packets)

    def note_path(self, source: Destination) -> None:
        """Let the other leg know whether the path beyond *source* is open."""
        self._other[source].note_onward(is_open=source.path_is_open)
