"""What a leg counts and logs: how much it carried and dropped, who came and went, and why nobody is there."""

from __future__ import annotations

import logging
from typing import Final

import trio
from enlink.control import Hello
from enlink.frame import Packets
from enlink.link import LinkEnded, describe
from enlink.program import RateLimitedLog, log_event
from enlink.status import Counters

from entg.connection import Connection

_REFUSALS: Final = ("busy", "wrong_port", "too_many")

_logger = logging.getLogger(__name__)


class Ledger:
    """The counters of one leg, and its lines in the log, of which strangers cannot cause more than one a second.

    Attributes:
        received, sent: packets and bytes, to count in directly.
        received_dropped: packets by reason, to count in directly.
        trouble: why there is no connection, as reason and text; None since there was one.
    """

    def __init__(self, leg: str, counters: Counters) -> None:
        self._leg = leg
        self.received = counters.group(f"from_{leg}")
        self.received_dropped = counters.group(f"from_{leg}_dropped")
        self.sent = counters.group(f"to_{leg}")
        self._sent_dropped = counters.group(f"to_{leg}_dropped")
        self._ended = counters.group(f"{leg}_ended")
        self._limited = RateLimitedLog(_logger, trio.current_time)
        self._told_drops: set[str] = set()  # since the place changed hands
        self.trouble: tuple[str, str] | None = None

    def note_received_dropped(self, reason: str) -> None:
        """A link has dropped or skipped something."""
        self.received_dropped[reason] += 1

    def note_sent_dropped(self, reason: str, packets: Packets) -> None:
        """Packets for this leg went nowhere."""
        self._sent_dropped[reason] += packets.count
        if reason not in self._told_drops:
            self._told_drops.add(reason)
            self._limited.log("dropping", reason, leg=self._leg)

    def note_vacancy(self) -> None:
        """Whoever had the place has gone: what is dropped from now on is told once more."""
        self._told_drops.clear()

    def note_trouble(self, reason: str, text: str) -> None:
        """Log why there is no connection when the reason has changed, which is not at every attempt."""
        if self.trouble is None or self.trouble[0] != reason:
            log_event(_logger, "unreachable", logging.WARNING, leg=self._leg, reason=reason, error=text)
        self.trouble = reason, text

    def note_failed_attempt(self, ended: LinkEnded) -> None:
        """One that was dialled ended before it was a connection."""
        self._ended[ended.reason] += 1
        self.note_trouble(ended.reason, str(ended))

    def note_refused(self, reason: str, level: int = logging.INFO, /, **fields: object) -> None:
        """One that has connected was turned away before it was a connection."""
        self._ended[reason] += 1
        self._limited.log("refused", reason, level, leg=self._leg, **fields)

    def note_silent(self, connection: Connection, reason: str) -> None:
        """One stands in line for the place without having said who it is."""
        self._log("provisional", reason, connection)

    def note_connected(self, connection: Connection, peer: Hello | None) -> None:
        """One has got the place."""
        self.trouble = None
        attested = {"attested": connection.evidence} if connection.evidence else {}
        self._log("connected", connection.link.speech, connection, peer=describe(peer), **attested)

    def note_end(self, connection: Connection, *, is_dialler: bool) -> None:
        """A connection has ended, for the reason that it knows."""
        reason, text = connection.reason, connection.text
        self._ended[reason] += 1
        if connection.identity:
            self._log("disconnected", reason, connection, error=text)
        elif is_dialler:
            self.note_trouble(reason, text)
        elif reason in _REFUSALS:
            self._log("refused", reason, connection, logging.WARNING, error=text)
        else:
            self._log("stray", reason, connection, error=text)

    def _log(
        self, event: str, reason: str, connection: Connection, level: int = logging.INFO, /, **fields: object
    ) -> None:
        self._limited.log(event, reason, level, leg=self._leg, address=connection.address, **fields)
