"""The server: send back what comes, on TCP until the client has shut down its side, on UDP datagram by datagram."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from functools import partial

import trio

from echosvr.errors import Unavailable

MAX_DATAGRAM_LENGTH = 65535  # RFC 768: what the length field can say

logger = logging.getLogger(__name__)


async def serve_tcp(
    host: str | None, port: int, reply_delay_s: float | None = None, *, ready: Callable[[str], None]
) -> None:
    """Echo on every address of *host* (None: of this machine) until cancelled.

    With a delay, a connection is answered only that many seconds after its client has shut down its sending side;
    what it sent is held in memory until then. *ready* is called with the addresses once all of them listen.

    Raises:
        Unavailable: the port cannot be listened on.
    """
    try:
        listeners = await trio.open_tcp_listeners(port, host=host)
    except OSError as error:
        raise _cannot_listen("tcp", host, port, error) from error
    ready(" ".join(_name("tcp", listener.socket) for listener in listeners))
    await trio.serve_listeners(partial(_echo_stream, reply_delay_s=reply_delay_s), listeners)


async def serve_udp(host: str | None, port: int, *, ready: Callable[[str], None]) -> None:
    """Echo datagrams on the first address of *host* (None: every IPv4 address of this machine) until cancelled.

    Raises:
        Unavailable: the port cannot be bound.
    """
    try:
        (family, kind, protocol, _, address), *_ = await trio.socket.getaddrinfo(
            host or "0.0.0.0", port, type=socket.SOCK_DGRAM
        )
        bound = trio.socket.socket(family, kind, protocol)
        await bound.bind(address)
    except OSError as error:
        raise _cannot_listen("udp", host, port, error) from error
    with bound:
        ready(_name("udp", bound))
        while True:
            data, client = await bound.recvfrom(MAX_DATAGRAM_LENGTH)
            try:
                await bound.sendto(data, client)
            except OSError as error:
                logger.warning("no answer to %s: %s", client, error)


async def _echo_stream(stream: trio.SocketStream, reply_delay_s: float | None) -> None:
    try:
        if reply_delay_s is None:
            async for data in stream:
                await stream.send_all(data)
        else:
            held = b"".join([data async for data in stream])
            await trio.sleep(reply_delay_s)
            await stream.send_all(held)
        await stream.send_eof()
    except trio.BrokenResourceError as error:
        logger.warning("a client went before it had its echo: %s", error.__cause__)


def _name(protocol: str, bound: trio.socket.SocketType) -> str:
    host, port = bound.getsockname()[:2]
    return f"{protocol}/[{host}]:{port}" if ":" in host else f"{protocol}/{host}:{port}"


def _cannot_listen(protocol: str, host: str | None, port: int, error: OSError) -> Unavailable:
    reason = error.strerror or str(error)
    return Unavailable(f"cannot listen on {protocol} {host or '*'}:{port} ({reason}): choose another --host or --port")
