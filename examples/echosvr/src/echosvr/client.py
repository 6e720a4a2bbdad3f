"""The client: send bytes, read the echo meanwhile, and check that it is the same bytes, all of them and no more."""

from __future__ import annotations

import hashlib
import math
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field

import trio

from echosvr.errors import Unavailable, WrongEcho

MESSAGE = b"Hello, is there an echo?\n"
CHUNK_LENGTH = 65536
DATAGRAM_LENGTH = 1200  # fits one packet on any path
DATAGRAM_DEADLINE_S = 5.0


@dataclass
class Echo:
    """What went out and what came back, over all connections so far, without the bytes themselves."""

    sent_bytes: int = 0
    received_bytes: int = 0
    sent_hash: hashlib._Hash = field(default_factory=hashlib.sha256)
    received_hash: hashlib._Hash = field(default_factory=hashlib.sha256)

    def sent(self, data: bytes) -> None:
        self.sent_bytes += len(data)
        self.sent_hash.update(data)

    def received(self, data: bytes | bytearray) -> None:
        self.received_bytes += len(data)
        self.received_hash.update(data)

    def check(self, expected_bytes: int) -> None:
        """Raise WrongEcho unless *expected_bytes* went out and the same came back."""
        if self.received_bytes != expected_bytes:
            comparison = "more than" if self.received_bytes > expected_bytes else f"only {self.received_bytes} of"
            raise WrongEcho(f"{comparison} {expected_bytes} bytes came back: is that an echo server?")
        if self.received_hash.digest() != self.sent_hash.digest():
            raise WrongEcho(
                f"{expected_bytes} bytes came back, but not those that were sent (sha256 "
                f"{self.received_hash.hexdigest()}, not {self.sent_hash.hexdigest()}): is that an echo server?"
            )


async def exchange_tcp(host: str, port: int, size: int | None, echo: Echo) -> None:
    """Open a connection, send *size* random bytes (None: a greeting), shut down sending, and read the echo to its end.

    Raises:
        Unavailable: no connection, or it broke.
        WrongEcho: other bytes came back, or fewer, or more.
    """
    expected_bytes = echo.received_bytes + _length(size)
    try:
        stream = await trio.open_tcp_stream(host, port)
    except OSError as error:
        raise Unavailable(f"cannot connect to {host}:{port} ({_reason(error)}): is the server running?") from error
    # Of the two directions only the first to notice a reset is told of it; the other sees an ordinary end.
    broken: list[trio.BrokenResourceError] = []
    async with stream, trio.open_nursery() as nursery:
        nursery.start_soon(_send, stream, size, echo, broken)
        try:
            async for data in stream:
                echo.received(data)
                if echo.received_bytes > expected_bytes:
                    break
        except trio.BrokenResourceError as error:
            broken.append(error)
        nursery.cancel_scope.cancel()
    if broken:
        raise Unavailable(
            f"the connection to {host}:{port} broke ({broken[0].__cause__}) when {echo.received_bytes} of "
            f"{expected_bytes} bytes had come back: try again"
        ) from broken[0]
    echo.check(expected_bytes)


async def exchange_udp(host: str, port: int, size: int | None, echo: Echo) -> None:
    """Send *size* random bytes (None: a greeting) in datagrams, each after the echo of the one before.

    Raises:
        Unavailable: a datagram was not answered within 5 seconds, or nobody has that port.
        WrongEcho: another datagram came back.
    """
    expected_bytes = echo.received_bytes + _length(size)
    try:
        (family, kind, protocol, _, address), *_ = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
        with trio.socket.socket(family, kind, protocol) as connected, trio.fail_after(math.inf) as deadline:
            await connected.connect(address)
            for data in _pieces(size, DATAGRAM_LENGTH):
                deadline.deadline = trio.current_time() + DATAGRAM_DEADLINE_S
                await connected.send(data)
                echo.sent(data)
                echo.received(await connected.recv(2 * DATAGRAM_LENGTH))
    except trio.TooSlowError as error:
        raise Unavailable(
            f"no answer from udp {host}:{port} within {DATAGRAM_DEADLINE_S:g} s: is the server running with --udp?"
        ) from error
    except OSError as error:
        raise Unavailable(
            f"cannot reach udp {host}:{port} ({_reason(error)}): is the server running with --udp?"
        ) from error
    echo.check(expected_bytes)


async def _send(
    stream: trio.SocketStream, size: int | None, echo: Echo, broken: list[trio.BrokenResourceError]
) -> None:
    try:
        for data in _pieces(size, CHUNK_LENGTH):
            echo.sent(data)
            await stream.send_all(data)
        await stream.send_eof()
    except trio.BrokenResourceError as error:
        broken.append(error)


def _length(size: int | None) -> int:
    return len(MESSAGE) if size is None else size


def _pieces(size: int | None, limit: int) -> Iterator[bytes]:
    if size is None:
        yield MESSAGE
        return
    for start in range(0, size, limit):
        yield os.urandom(min(limit, size - start))


def _reason(error: OSError) -> str:
    # trio raises one error for all addresses of a host, from the errors of each.
    cause = error.__cause__
    if isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    first = cause if isinstance(cause, OSError) else error
    if first.errno is None or isinstance(first, socket.gaierror):
        return first.strerror or str(first)
    return os.strerror(first.errno)
