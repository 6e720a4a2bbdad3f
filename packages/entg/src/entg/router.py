"""Decide where packets go. With one ENTA and one peer that is simple: to the other leg."""

from __future__ import annotations

from typing import Protocol

from enlink.frame import Packets


class Destination(Protocol):
    """Where a router sends packets."""

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
