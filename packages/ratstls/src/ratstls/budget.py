"""Bound what failed handshakes may cost, of which the library never returns the memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import trio

from ratstls.errors import HandshakeError

LOST_BYTES: Final = 68_000  # about what the library keeps of one, on a server; measured


class FailureBudget:
    """How many handshakes of one listener, or one dialler, may fail.

    Up to *burst* are under way in the library, or failed, at once; one failure is forgiven every *recovery_s*. A
    listener that has spent its budget refuses everybody until then, since nobody can tell a good client from another
    before the handshake. Clients that do not even say a TLS hello cost nothing, and are not counted.

    Attributes:
        failed: so many handshakes have failed in the library.
        refused: so many were refused because the budget was spent.
    """

    def __init__(self, burst: int = 256, recovery_s: float = 60.0) -> None:
        self.failed = 0
        self.refused = 0
        self._burst = burst
        self._recovery_s = recovery_s
        self._left = float(burst)
        self._counted_at = 0.0

    @property
    def lost_bytes(self) -> int:
        """What the failures have cost this process, roughly, until it ends."""
        return self.failed * LOST_BYTES

    @contextmanager
    def one_handshake(self) -> Iterator[None]:
        """Count what is inside as one handshake in the library, failed if it raises.

        Raises:
            HandshakeError: the budget is spent (``too_many_failures``).
        """
        now = trio.current_time()
        self._left = min(self._burst, self._left + (now - self._counted_at) / self._recovery_s)
        self._counted_at = now
        if self._left < 1:
            self.refused += 1
            raise HandshakeError(
                f"{self.failed} handshakes have failed here and cost {self.lost_bytes // 1_000_000} MB:"
                f" one more is tried every {self._recovery_s:g} s, or restart this program",
                reason="too_many_failures",
            )
        self._left -= 1
        try:
            yield
        except BaseException:
            self.failed += 1
            raise
        self._left += 1
