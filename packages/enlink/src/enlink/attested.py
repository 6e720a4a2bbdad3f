"""Makes attested streams of plain ones for a program's links. The one place that knows the package ratstls.

The package is imported when somebody asks for attestation: without that, everything works without it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import trio

from enlink.attestation import Attestation, Side
from enlink.errors import ConfigError
from enlink.link import LinkEnded


@dataclass(frozen=True, slots=True)
class AttestedStream:
    """A stream over which nothing has been said yet, and what its other end has proved, in a line for people."""

    stream: trio.abc.Stream
    evidence: str


class AttestedSide:
    """One side of the handshakes of a program. Made by `prepare`."""

    max_link_age_s: float = math.inf

    async def shake_hands(self, _: trio.abc.Stream, /) -> AttestedStream:
        """Not there yet."""
        raise LinkEnded("handshake", "attested links are not built yet")

    async def warn_for_ever(self) -> None:
        """Not there yet."""


async def prepare(attestation: Attestation | None, _: Side, /) -> AttestedSide | None:
    """Not there yet."""
    if attestation is None:
        return None
    raise ConfigError("RATS-TLS links are not built yet, and there is no fallback to plain ones: leave it out")
