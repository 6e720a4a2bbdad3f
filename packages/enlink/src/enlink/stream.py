"""Dial a TCP endpoint again and again, accept, and tune the connections for links. Knows nothing of frames."""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import trio

from enlink.attempt import connect_tcp
from enlink.connection import Unreachable, resolve
from enlink.endpoint import Tcp
from enlink.errors import NotPermitted
from enlink.program import RateLimitedLog

TCP_NOTSENT_LOWAT: Final = 25  # linux/tcp.h; Python's socket module lacks it

# Choices of ours.
DIAL_DEADLINE_S: Final = 5.0
RESOLVE_DEADLINE_S: Final = 5.0
_REFRESH_PATIENCE_S: Final = 1.0  # for a fresh answer, while there is an old one
# A link must not hide queue from its sender: at most this much waits unsent in the kernel...
UNSENT_LIMIT_BYTES: Final = 128 * 1024
# ...and bytes that nobody acknowledges for so long mean that the peer is gone, whatever the link carries.
ACKNOWLEDGE_DEADLINE_S: Final = 10
_ACCEPT_PAUSE_S: Final = 0.1

_log = logging.getLogger(__name__)


class Dialer:
    """Connects to one endpoint again and again, and survives a name service that comes and goes.

    The last good addresses are tried at once while a fresh answer is on its way, so that a captured or dead DNS
    server costs a reconnect nothing. At most one name look-up runs at a time.

    Args:
        mark: SO_MARK for the connections, so that the host's rules can tell them from captured traffic.
        addresses: good ones that are known already.

    Attributes:
        addresses: the last good answer of the name service.
    """

    def __init__(self, endpoint: Tcp, *, mark: int | None = None, addresses: Sequence[str] = ()) -> None:
        self.endpoint = endpoint
        self.addresses = list(addresses)
        self._mark = mark
        # getaddrinfo cannot be interrupted, only abandoned: the token comes back when its thread really ends.
        self._resolver_threads = trio.CapacityLimiter(1)

    async def resolve(self) -> None:
        """Look the name up now, and keep the last good answer if there is none.

        Raises:
            Unreachable: no answer within `RESOLVE_DEADLINE_S`, and none from before.
        """
        failure = Unreachable(f"cannot resolve {self.endpoint.host}: no answer within {RESOLVE_DEADLINE_S:.0f} s")
        with trio.move_on_after(RESOLVE_DEADLINE_S):
            try:
                self.addresses = await resolve(self.endpoint, limiter=self._resolver_threads)
            except Unreachable as error:
                failure = error
        if not self.addresses:
            raise failure

    async def dial(self) -> trio.SocketStream:
        """Connect, trying every known address, within `DIAL_DEADLINE_S` for each.

        Raises:
            Unreachable: none answered; the text has the last address's reason.
            NotPermitted: the mark needs CAP_NET_ADMIN.
        """
        if not self.addresses:
            await self.resolve()
            return await self._connect_any()
        tried = self.addresses
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._refresh)
            try:
                stream = await self._connect_any()
            except (Unreachable, NotPermitted) as error:
                failure = error
            else:
                nursery.cancel_scope.cancel()
                # Nobody has the stream yet who could close it, should the caller be cancelled at this moment.
                nursery.cancel_scope.shield = True
                return stream
        if isinstance(failure, Unreachable) and self.addresses != tried:
            return await self._connect_any()
        raise failure

    async def _refresh(self) -> None:
        with trio.move_on_after(_REFRESH_PATIENCE_S):
            # With an answer from before, resolving always succeeds.
            await self.resolve()

    async def _connect_any(self) -> trio.SocketStream:
        failure = Unreachable(f"cannot connect to {self.endpoint.host}: it has no address")
        for address in self.addresses:
            try:
                made = await connect_tcp(address, self.endpoint.port, DIAL_DEADLINE_S, mark=self._mark)
            except Unreachable as error:
                failure = error
            else:
                return tuned(trio.SocketStream(made.socket))
        raise failure


def tuned(stream: trio.SocketStream) -> trio.SocketStream:
    """Set what every link wants of TCP: no delay, little hidden queue, and an end to silence."""
    for level, option, value in (
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT, UNSENT_LIMIT_BYTES),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, ACKNOWLEDGE_DEADLINE_S * 1000),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    ):
        stream.setsockopt(level, option, value)
    return stream


async def serve(
    listeners: Sequence[trio.SocketListener],
    handler: Callable[[trio.SocketStream], Awaitable[object]],
    nursery: trio.Nursery,
) -> None:
    """Accept on every listener until cancelled and start *handler* in *nursery* for each connection.

    *handler* owns the stream. Out of descriptors or memory, accepting pauses and goes on by itself.
    """
    async with trio.open_nursery() as accepting:
        limited = RateLimitedLog(_log)
        for listener in listeners:
            accepting.start_soon(_accept_forever, listener, handler, nursery, limited)


async def _accept_forever(
    listener: trio.SocketListener,
    handler: Callable[[trio.SocketStream], Awaitable[object]],
    nursery: trio.Nursery,
    limited: RateLimitedLog,
) -> None:
    async with listener:
        while True:
            try:
                stream = await listener.accept()
            except OSError as error:
                limited.log("accept_paused", errno.errorcode.get(error.errno or 0, "unknown"), error=error)
                await trio.sleep(_ACCEPT_PAUSE_S)
            else:
                nursery.start_soon(handler, tuned(stream))
