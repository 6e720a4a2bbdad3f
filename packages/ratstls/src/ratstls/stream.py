"""A trio stream over an attested session. handshake.py makes one; the session itself is _engine.py's."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Final

import trio

from ratstls._engine import CIPHERTEXT_BYTES, Engine
from ratstls.errors import Truncated
from ratstls.peer import Peer

# Choices of ours.
PIECE_BYTES: Final = 1 << 16  # what is encrypted, and sent, at a time
FAREWELL_S: Final = 1.0  # how long a goodbye may take


class RatsTlsStream(trio.abc.Stream):
    """One attested, encrypted connection, with the contracts of trio's streams.

    One task sends and another receives; all of them are on trio's thread, and so are all calls of the library. A call
    of the program's `send_all` costs the same for one byte and for thousands: send what is queued as one piece.

    There is no half-close: `aclose` says goodbye for both directions, and what the peer still sends is lost. A program
    that wants to hear the peer out needs an end marker of its own.

    Attributes:
        transport: the stream below, which this one owns.
        engine: the session, for who moves ciphertext itself and leaves this stream nothing but `aclose`.
        peer: who the other end is; None if this side does not verify.
        expires_at: in trio's time, when the policy wants the link to be made anew; a program's business.
    """

    def __init__(
        self,
        transport: trio.abc.Stream,
        engine: Engine,
        *,
        peer: Peer | None = None,
        began_at: float = 0.0,
        max_age_s: float = math.inf,
    ) -> None:
        self.transport = transport
        self.peer = peer
        self.expires_at = began_at + max_age_s
        self._began_at = began_at
        self.engine = engine
        self._room = memoryview(b"")  # as much as was ever asked for
        self._is_closed = False
        # Part of a record may be on its way: whatever followed would be taken for the rest of it.
        self._is_cut = False
        self._sending = _OneTask("another task is sending on this stream")
        self._receiving = _OneTask("another task is receiving from this stream")

    @property
    def age_s(self) -> float:
        """Seconds since the handshake began, in which the peer was verified."""
        return trio.current_time() - self._began_at

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of *data*.

        Raises:
            trio.BrokenResourceError: the connection broke, the session has ended, or an earlier send was interrupted.
            trio.BusyResourceError, trio.ClosedResourceError: as for any stream of trio's.

        Cancellation, unless it comes before anything is sent, breaks the sending side; receiving goes on.
        """
        with self._sending:
            await trio.lowlevel.checkpoint_if_cancelled()
            self._check_open()
            if not data:
                await trio.lowlevel.cancel_shielded_checkpoint()
                return
            if self._is_cut:
                raise trio.BrokenResourceError("an earlier send was interrupted: make a new link")
            self._is_cut = True
            view = memoryview(data).cast("B")
            for start in range(0, len(view), PIECE_BYTES):
                await self._send_piece(view[start : start + PIECE_BYTES])
            self._is_cut = False

    async def _send_piece(self, piece: memoryview) -> None:
        self.engine.write(piece)
        await self.transport.send_all(self.engine.take())
        self._check_open()

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until the transport may have room; raises what `send_all` does."""
        with self._sending:
            self._check_open()
            await self.transport.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Return 1 to *max_bytes* (64 KiB without it) that the peer has sent; b"" only after the peer's goodbye.

        Raises:
            Truncated: the connection ended without a goodbye. It is a trio.BrokenResourceError, as is the next.
            SessionBroken: damaged, forged or repeated bytes came; none after them is returned.
            trio.BusyResourceError, trio.ClosedResourceError: as for any stream of trio's.

        Cancellation loses nothing.
        """
        limit_bytes = _limit(max_bytes)
        if len(self._room) < limit_bytes:
            self._room = memoryview(bytearray(limit_bytes))
        room = self._room[:limit_bytes]
        with self._receiving:
            await trio.lowlevel.checkpoint_if_cancelled()
            self._check_open()
            if (count := self.engine.read(room)) is not None:
                await trio.lowlevel.cancel_shielded_checkpoint()
            while count is None:
                try:
                    ciphertext = await self.transport.receive_some(CIPHERTEXT_BYTES)
                except trio.BrokenResourceError as error:
                    self._check_open()
                    truncated = Truncated("the connection broke without the peer's goodbye: bytes may be missing")
                    truncated.__cause__ = error
                    self.engine.end(truncated)
                else:
                    self._check_open()
                    self.engine.feed(ciphertext)
                count = self.engine.read(room)
            return bytes(room[:count])

    async def aclose(self) -> None:
        """Say goodbye, close the transport and free the session. Takes `FAREWELL_S` at most.

        The peer hears no goodbye, and so reads a truncated stream, if a send was interrupted, or is under way in
        another task. Cancelled, this closes all the same. Safe to call twice.
        """
        if self._is_closed:
            await trio.lowlevel.checkpoint()
            return
        self._is_closed = True
        self.engine.free()
        last_words = b"" if self._is_cut else self.engine.take()
        try:
            if last_words:
                with (
                    trio.move_on_after(FAREWELL_S),
                    suppress(trio.BrokenResourceError, trio.ClosedResourceError, trio.BusyResourceError),
                ):
                    await self.transport.send_all(last_words)
        finally:
            await self.transport.aclose()

    def _check_open(self) -> None:
        if self._is_closed:
            raise trio.ClosedResourceError("this stream was closed here")


def _limit(max_bytes: int | None) -> int:
    if max_bytes is None:
        return PIECE_BYTES
    if not isinstance(max_bytes, int):
        raise TypeError(f"max_bytes must be a whole number, not {max_bytes!r}")
    if max_bytes < 1:
        raise ValueError(f"max_bytes must be 1 or more, not {max_bytes}")
    return min(max_bytes, PIECE_BYTES)


class _OneTask:
    """Lets one task in at a time."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._is_taken = False

    def __enter__(self) -> None:
        if self._is_taken:
            raise trio.BusyResourceError(self._text)
        self._is_taken = True

    def __exit__(self, *_: object) -> None:
        self._is_taken = False
