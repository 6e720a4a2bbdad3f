"""Dial and listen on an Endpoint, with deadlines, and with sockets tuned for links. Knows nothing of frames."""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn, TypeAlias

import trio

from enlink.endpoint import Tcp
from enlink.errors import NotPermitted, Unavailable
from enlink.program import RateLimitedLog

# Linux numbers that Python's socket module lacks.
SO_MARK: Final = 36  # asm-generic/socket.h
TCP_NOTSENT_LOWAT: Final = 25  # linux/tcp.h

# Choices of ours.
DIAL_DEADLINE_S: Final = 5.0
RESOLVE_DEADLINE_S: Final = 5.0
_REFRESH_PATIENCE_S: Final = 1.0  # for a fresh answer, while there is an old one
BIND_PATIENCE_S: Final = 5.0  # a predecessor may still be going
BACKLOG: Final = 1024
# A link must not hide queue from its sender: at most this much waits unsent in the kernel...
UNSENT_LIMIT_BYTES: Final = 128 * 1024
# ...and bytes that nobody acknowledges for so long mean that the peer is gone, whatever the link carries.
ACKNOWLEDGE_DEADLINE_S: Final = 10
_BIND_PAUSE_S: Final = 0.1
_ACCEPT_PAUSE_S: Final = 0.1

_SocketAddress: TypeAlias = tuple[Any, ...]  # as getaddrinfo gives it: host and port, then what only IPv6 has
_log = logging.getLogger(__name__)


class LinkUnavailable(Unavailable):
    """A peer could not be reached this time; trying again may help."""


class Dialer:
    """Connects to one endpoint again and again, and survives a name service that comes and goes.

    The last good addresses are tried at once while a fresh answer is on its way, so that a captured or dead DNS
    server costs a reconnect nothing. At most one name look-up runs at a time.

    Args:
        mark: SO_MARK for the connections, so that the host's rules can tell them from captured traffic.
    """

    def __init__(self, endpoint: Tcp, *, mark: int | None = None) -> None:
        self.endpoint = endpoint
        self._mark = mark
        self._addresses: list[tuple[socket.AddressFamily, _SocketAddress]] = []
        # getaddrinfo cannot be interrupted, only abandoned: the token comes back when its thread really ends.
        self._resolver_threads = trio.CapacityLimiter(1)

    async def resolve(self) -> None:
        """Look the name up now, and keep the last good answer if there is none.

        Raises:
            LinkUnavailable: no answer within `RESOLVE_DEADLINE_S`, and none from before.
        """
        host, port = self.endpoint.host, self.endpoint.port
        reason = f"no answer within {RESOLVE_DEADLINE_S:.0f} s"
        with trio.move_on_after(RESOLVE_DEADLINE_S):
            try:
                found = await trio.to_thread.run_sync(
                    lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM),
                    abandon_on_cancel=True,
                    limiter=self._resolver_threads,
                )
                self._addresses = [(family, address) for family, _, _, _, address in found] or self._addresses
                reason = "it has no address"
            except (OSError, UnicodeError) as error:
                reason = str(error)
        if not self._addresses:
            raise LinkUnavailable(f"cannot resolve {host}: {reason}")

    async def dial(self) -> trio.SocketStream:
        """Connect, trying every known address, within `DIAL_DEADLINE_S` for each.

        Raises:
            LinkUnavailable: none answered; the text has the last address's reason.
            NotPermitted: the mark needs CAP_NET_ADMIN.
        """
        if not self._addresses:
            await self.resolve()
            return await self._connect_any()
        tried = self._addresses
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._refresh)
            try:
                stream = await self._connect_any()
            except (LinkUnavailable, NotPermitted) as error:
                failure = error
            else:
                nursery.cancel_scope.cancel()
                # Nobody has the stream yet who could close it, should the caller be cancelled at this moment.
                nursery.cancel_scope.shield = True
                return stream
        if isinstance(failure, LinkUnavailable) and self._addresses != tried:
            return await self._connect_any()
        raise failure

    async def _refresh(self) -> None:
        with trio.move_on_after(_REFRESH_PATIENCE_S):
            # With an answer from before, resolving always succeeds.
            await self.resolve()

    async def _connect_any(self) -> trio.SocketStream:
        failure = LinkUnavailable(f"cannot connect to {self.endpoint.host}: it has no address")
        for family, address in self._addresses:
            try:
                return await self._connect(family, address)
            except LinkUnavailable as error:
                failure = error
        raise failure

    async def _connect(self, family: socket.AddressFamily, address: _SocketAddress) -> trio.SocketStream:
        where = f"{address[0]} port {address[1]}"
        try:
            sock = trio.socket.socket(family, socket.SOCK_STREAM)
        except OSError as error:
            raise LinkUnavailable(f"cannot connect to {where}: {error.strerror}") from error
        with trio.move_on_after(DIAL_DEADLINE_S):
            try:
                self._set_mark(sock, where)
                await sock.connect(address)
                return tuned(trio.SocketStream(sock))
            except OSError as error:
                sock.close()
                raise LinkUnavailable(f"cannot connect to {where}: {os.strerror(error.errno or 0)}") from error
            except BaseException:
                sock.close()
                raise
        raise LinkUnavailable(f"cannot connect to {where}: no answer within {DIAL_DEADLINE_S:.0f} s")

    def _set_mark(self, sock: trio.socket.SocketType, where: str) -> None:
        if self._mark is None:
            return
        try:
            sock.setsockopt(socket.SOL_SOCKET, SO_MARK, self._mark)
        except PermissionError as error:
            # Not to be mistaken for the EACCES of a prohibited route, which may be gone a moment later.
            raise NotPermitted(f"cannot mark the connection to {where}: needs CAP_NET_ADMIN") from error


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


async def listen(endpoint: Tcp) -> list[trio.SocketListener]:
    """Listen on an endpoint; without a host on every address, IPv4 and, where there is IPv6, IPv6.

    A port that is taken is tried again for `BIND_PATIENCE_S`.

    Raises:
        Unavailable: the port is taken (the text names who has it) or the address is not this host's.
        NotPermitted: the port needs CAP_NET_BIND_SERVICE.
    """
    hosts = [endpoint.host] if endpoint.host is not None else ["0.0.0.0", "::"]
    listeners: list[trio.SocketListener] = []
    deadline = trio.current_time() + BIND_PATIENCE_S
    try:
        for host in hosts:
            try:
                listeners.append(await _bind(host, endpoint.port, deadline))
            except OSError as error:
                # Every address was asked for: a host without IPv6 has fewer of them.
                if endpoint.host is None and host == "::" and error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                    continue
                _raise_bind_failure(host, endpoint.port, error)
    except BaseException:
        for listener in listeners:
            listener.socket.close()
        raise
    return listeners


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


async def _bind(host: str, port: int, deadline: float) -> trio.SocketListener:
    ((family, _, _, _, address), *_) = await trio.socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    while True:
        sock = trio.socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            await sock.bind(address)
            sock.listen(BACKLOG)
            return trio.SocketListener(sock)
        except BaseException as error:
            sock.close()
            is_taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
            if not is_taken or trio.current_time() >= deadline:
                raise
        await trio.sleep(_BIND_PAUSE_S)


def _raise_bind_failure(host: str, port: int, error: OSError) -> NoReturn:
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if error.errno == errno.EADDRINUSE:
        holder = _holder_of(port)
        raise Unavailable(f"cannot listen on {where}: {holder or 'another process'} has the port") from error
    if error.errno == errno.EACCES:
        raise NotPermitted(f"cannot listen on {where}: ports below 1024 need CAP_NET_BIND_SERVICE") from error
    raise Unavailable(f"cannot listen on {where}: {error.strerror}") from error


def _holder_of(port: int) -> str | None:
    """Name the process that listens on a TCP port of this namespace, as far as /proc shows it to us."""
    inodes = set()
    for table in ("/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"):
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for columns in map(str.split, lines):
            if columns[3] == "0A" and int(columns[1].rpartition(":")[2], 16) == port:  # 0A: LISTEN
                inodes.add(f"socket:[{columns[9]}]")
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            if any(str(entry.readlink()) in inodes for entry in (process / "fd").iterdir()):
                return f"{(process / 'comm').read_text().strip()} (pid {process.name})"
        except OSError:
            continue
    return None
