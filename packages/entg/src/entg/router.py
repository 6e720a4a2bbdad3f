"""Decide where packets go. With one ENTA and one peer that is simple: to the other leg."""

from __future__ import annotations

from typing import Protocol

from enlink.frame import Packets


class Destination(Protocol):
    """Where a router sends packets."""

    async def send(self, packets: Packets) -> None:
        """Pass packets on, or drop and count them. Waits while the link has no room."""


class Router:
    """Passes what comes from one leg to the other, still encoded."""

    def __init__(self) -> None:
        self._other: dict[Destination, Destination] = {}

    def connect(self, left: Destination, right: Destination) -> None:
        """Make each leg the other's destination."""
        self._other = {left: right, right: left}

    async def forward(self, source: Destination, packets: Packets) -> None:
        """Pass on what came from *source*, in order."""
        await self._other[source].send(packets)
