"""Bound what failed handshakes may cost, of which the library never returns the memory, and share it out fairly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv6Address, ip_address, ip_network
from typing import Final

import trio

from ratstls.errors import HandshakeError

LOST_BYTES: Final = 68_000  # about what the library keeps of one, on a server; measured

# Choices of ours.
_REMEMBERED: Final = 64  # sources
_IPV6_PREFIX: Final = 64  # what one host commonly has for itself


class FailureBudget:
    """How many handshakes of one listener, or one dialler, may fail.

    Up to *burst* are under way in the library, or failed, at once; one failure is forgiven every *recovery_s*. Nobody
    can tell a good client from another before the handshake, so a stranger must not be able to spend it all:

    - one source, as `source_of` has it, spends *share* of them at most;
    - the last *reserve* are for sources of which a handshake has been a success here before.

    Clients that do not even say a TLS hello cost nothing, and are not counted.

    Attributes:
        failed: so many handshakes have failed in the library.
        refused: so many were refused because the budget, or a source's share, was spent.
    """

    def __init__(self, burst: int = 256, recovery_s: float = 60.0, *, reserve: int = 64, share: int = 32) -> None:
        self.failed = 0
        self.refused = 0
        self._burst = burst
        self._recovery_s = recovery_s
        self._reserve = reserve
        self._share = share
        self._owed = 0.0
        self._owed_by: dict[str, float] = {}
        self._proved: dict[str, None] = {}  # the latest last
        self._counted_at = 0.0
        self._last_failure = ""

    @property
    def lost_bytes(self) -> int:
        """What the failures have cost this process, roughly, until it ends."""
        return self.failed * LOST_BYTES

    @contextmanager
    def one_handshake(self, source: str | None = None) -> Iterator[None]:
        """Count what is inside as one handshake in the library, failed if it raises.

        Args:
            source: where the peer comes from; None for one that was dialled, which nobody else can keep from us.

        Raises:
            HandshakeError: the budget is spent (``too_many_failures``).
        """
        self._forgive()
        is_trusted = source is None or source in self._proved
        limit = self._burst if is_trusted else self._burst - self._reserve
        owed_by_source = 0.0 if source is None else self._owed_by.get(source, 0.0)
        if self._owed + 1 > limit or owed_by_source + 1 > self._share:
            self.refused += 1
            raise HandshakeError(
                f"{self.failed} handshakes have failed here and cost {self.lost_bytes // 1_000_000} MB:"
                f" one more is tried every {self._recovery_s:g} s, or restart this program{self._last_failure}",
                reason="too_many_failures",
            )
        self._owe(source, 1)
        try:
            yield
        except BaseException as error:
            self.failed += 1
            self._last_failure = f"; the last one: {error}"
            raise
        self._owe(source, -1)
        if source is not None:
            self._remember(source)

    def _forgive(self) -> None:
        now = trio.current_time()
        forgiven = (now - self._counted_at) / self._recovery_s
        self._counted_at = now
        self._owed = max(0.0, self._owed - forgiven)
        self._owed_by = {source: owed - forgiven for source, owed in self._owed_by.items() if owed > forgiven}

    def _owe(self, source: str | None, count: int) -> None:
        self._owed = max(0.0, self._owed + count)
        if source is not None:
            self._owed_by[source] = max(0.0, self._owed_by.get(source, 0.0) + count)

    def _remember(self, source: str) -> None:
        self._proved.pop(source, None)
        self._proved[source] = None
        if len(self._proved) > _REMEMBERED:
            del self._proved[next(iter(self._proved))]


def source_of(transport: trio.abc.Stream) -> str:
    """Return where a peer comes from: an IPv4 address, an IPv6 network, or "" for what has no address worth a name."""
    if not isinstance(transport, trio.SocketStream):
        return ""
    try:
        name = transport.socket.getpeername()
    except OSError:
        return ""  # gone already
    if not isinstance(name, tuple):
        return ""
    try:
        address = ip_address(str(name[0]).partition("%")[0])
    except ValueError:
        return str(name[0])
    if not isinstance(address, IPv6Address):
        return str(address)
    return str(address.ipv4_mapped or ip_network((address, _IPV6_PREFIX), strict=False))
