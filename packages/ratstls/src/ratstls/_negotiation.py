"""Carry one handshake between the library, which blocks in a worker thread, and a trio stream."""

from __future__ import annotations

import math
import threading
from contextlib import suppress
from enum import Enum
from typing import Final

import trio

from ratstls._engine import CIPHERTEXT_BYTES, Engine
from ratstls._hello import SERVER_HELLO, TlsVersion, is_hello
from ratstls.errors import HandshakeError

# Choices of ours.
HANDSHAKE_THREADS: Final = 256  # a peer may hold each as long as the deadline lets it, so that few would be too few
ALERT_S: Final = 1.0  # how long it may take to tell the peer why we give up
PATIENCE_S: Final = 1.0  # for the library to notice that nobody waits for it any more
_GLANCE_S: Final = 0.01

_threads: trio.lowlevel.RunVar[trio.CapacityLimiter | None] = trio.lowlevel.RunVar("ratstls_handshake_threads")


class _Place(Enum):
    WAITING = "for a thread"
    INSIDE = "the library"
    DONE = "with it"
    ABANDONED = "by its owner: whoever is inside frees the engine"


def bound_threads(count: int) -> trio.CapacityLimiter:
    """Let at most *count* handshakes of this trio run be inside the library at once; call it before the first one."""
    limiter = trio.CapacityLimiter(count)
    _threads.set(limiter)
    return limiter


class Negotiation:
    """One handshake of an engine's session over *transport*; `run` it once.

    Attributes:
        is_abandoned: the engine belongs to the worker thread now, which frees it. Leave it alone.
    """

    def __init__(self, transport: trio.abc.Stream, engine: Engine, *, is_server: bool, minimum_tls: TlsVersion) -> None:
        self.is_abandoned = False
        self._transport = transport
        self._engine = engine
        self._is_server = is_server
        self._minimum_tls = minimum_tls
        self._place = _Place.WAITING
        self._placing = threading.Lock()
        self._has_ended = trio.Event()
        self._thread = trio.CancelScope(shield=True)
        self._wait_in = trio.CancelScope()
        self._wait_out = trio.CancelScope()
        self._failure: BaseException | None = None
        self._unread_hello: bytearray | None = bytearray()
        self._has_transport_ended = False
        self._has_answered = False  # the library, what it heard last

    async def run(self) -> None:
        """Shake hands; afterwards nothing is left to be sent.

        Raises:
            RatsTlsError: it failed. What the library wrote to tell the peer is sent, if `ALERT_S` is enough for it.

        Cancelled, the library sees the end of the connection and gives up. If it does not within `PATIENCE_S`, since it
        waits for something else, such as a service that verifies evidence, the engine is left to its thread.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._work)
            nursery.start_soon(self._carry_in)
            nursery.start_soon(self._carry_out)
            try:
                await self._has_ended.wait()
            except trio.Cancelled:
                await self._give_up()
                raise
            # Never cancel sending because the handshake is over: the peer would miss a record.
            self._wait_in.cancel()
            self._wait_out.cancel()
            nursery.cancel_scope.deadline = trio.current_time() + (math.inf if self._failure is None else ALERT_S)
        if self._failure is not None:
            raise self._failure
        self._engine.open()

    async def _work(self) -> None:
        limiter = _threads.get(None)
        if limiter is None:
            limiter = bound_threads(HANDSHAKE_THREADS)
        with self._thread:
            try:
                failure = await trio.to_thread.run_sync(self._shake_hands, abandon_on_cancel=True, limiter=limiter)
            except RuntimeError as error:
                self._failure = HandshakeError(f"no thread for a handshake: {error}", reason="resources")
            else:
                self._fail(failure)
        self._has_ended.set()

    def _shake_hands(self) -> BaseException | None:
        """Run in the worker thread."""
        with self._placing:
            if self._place is _Place.ABANDONED:
                return None
            self._place = _Place.INSIDE
        try:
            self._engine.session.init()
            self._engine.session.negotiate(self._engine.library_fd)
        except BaseException as error:  # noqa: BLE001 - raised by the task that waits for this thread
            return error
        finally:
            with self._placing:
                if self._place is _Place.ABANDONED:
                    self._engine.free()
                self._place = _Place.DONE
        return None

    async def _give_up(self) -> None:
        self._engine.hang_up()
        with trio.move_on_after(PATIENCE_S, shield=True):
            while not self._has_ended.is_set():
                # Until it notices, the library may wait for room to write.
                self._engine.collect()
                with trio.move_on_after(_GLANCE_S):
                    await self._has_ended.wait()
        if not self._has_ended.is_set():
            with self._placing:
                self.is_abandoned = self._place is _Place.INSIDE
                self._place = _Place.ABANDONED
            self._thread.cancel()

    def _fail(self, failure: BaseException | None) -> None:
        """Note why there will be no session; what was found out first says most."""
        if type(failure) is HandshakeError and (found := self._find_reason()):
            reason, text = found
            failure = HandshakeError(text, reason=reason, code=failure.code, function=failure.function)
        self._failure = self._failure or failure

    def _find_reason(self) -> tuple[str, str] | None:
        """Tell from outside why the library has failed, if the peer is the reason."""
        if self._engine.has_hung_up:
            return "hung_up", "the peer ended the connection during the handshake: it may have refused us, or stopped"
        if not (self._engine.collect() or self._has_answered):
            # What the library finds wrong it tells the peer; it is silent if it was told.
            return "refused", "the peer ended the handshake with an alert: it may have refused this side's evidence"
        return None

    async def _carry_in(self) -> None:
        with self._wait_in:
            while not self._has_transport_ended:
                while self._engine.has_unfed:
                    await trio.lowlevel.wait_writable(self._engine.ours)
                    self._engine.push()
                try:
                    data = bytes(await self._transport.receive_some(CIPHERTEXT_BYTES))
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    data = b""
                if not data:
                    await self._end_of_transport()
                elif self._is_server or (data := self._inspected(data)):
                    if not self._engine.has_unread:
                        self._has_answered = False
                    self._engine.feed(data)

    async def _carry_out(self) -> None:
        while True:
            if not self._has_ended.is_set():
                with trio.CancelScope() as self._wait_out:
                    await trio.lowlevel.wait_readable(self._engine.ours)
            has_ended = self._has_ended.is_set()
            if self._engine.collect():
                self._has_answered = True
            data = self._engine.take()
            if self._is_server:
                data = self._inspected(data)
            if data:
                # What cannot be sent any more is dropped, so that the library is not held up: it will hear of the end.
                with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    await self._transport.send_all(data)
            if has_ended:
                return

    async def _end_of_transport(self) -> None:
        self._has_transport_ended = True
        self._engine.feed(b"")
        # The handshake may go well all the same: the end may follow what completes it, and even a goodbye.
        await trio.sleep(_GLANCE_S)
        while self._engine.has_unread:  # noqa: ASYNC110 - no event tells when the library reads
            await trio.sleep(_GLANCE_S)
        self._engine.hang_up()

    def _inspected(self, data: bytes) -> bytes:
        """Hold back what the server says until it is known to be a hello of a version that will do."""
        if self._unread_hello is None:
            return data
        self._unread_hello += data
        if not self._unread_hello:
            return b""
        hello = bytes(self._unread_hello)
        try:
            if not is_hello(hello, SERVER_HELLO, self._minimum_tls):
                return b""
        except HandshakeError as error:
            self._failure = self._failure or error
            self._engine.hang_up()
            return b""
        self._unread_hello = None
        return hello
