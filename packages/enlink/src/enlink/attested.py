"""Makes attested streams of plain ones for a program's links. The one place that knows the package ratstls.

The package is imported when somebody asks for attestation: without that, everything works without it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

import trio

from enlink.attestation import Attestation, Side
from enlink.errors import ConfigError, EngError, Unavailable
from enlink.link import LinkEnded
from enlink.program import log_event

if TYPE_CHECKING:
    from ratstls.policy import Policy
    from ratstls.stream import RatsTlsStream, Settings

# Choices of ours.
HANDSHAKE_DEADLINE_S: Final = 10.0  # absolute: evidence may take seconds to make and to confirm
_WARN_INTERVAL_S: Final = 60.0

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class AttestedStream:
    """A stream over which nothing has been said yet, and what its other end has proved, in a line for people."""

    stream: trio.abc.Stream
    evidence: str


class AttestedSide:
    """One side of the handshakes of a program. Made by `prepare`."""

    max_link_age_s: float = math.inf

    async def shake_hands(self, stream: trio.abc.Stream) -> AttestedStream:
        """Not there yet."""
        raise LinkEnded("handshake", "attested links are not built yet")

    async def warn_for_ever(self) -> None:
        """Nothing yet."""


async def prepare(attestation: Attestation | None, side: Side) -> AttestedSide | None:
    """Not there yet."""
    if attestation is None:
        return None
    raise ConfigError("RATS-TLS links are not built yet, and there is no fallback to plain ones: leave it out")
