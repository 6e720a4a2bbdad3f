"""Streams over AF_VSOCK with nothing between trio and the kernel, for the tests that run in guests."""

from __future__ import annotations

import socket
from typing import Final

import trio

# linux/vm_sockets.h; Python 3.11 does not have the first.
LOCAL: Final = 1
ANY: Final = socket.VMADDR_CID_ANY
ABSENT: Final = 99  # nobody has this CID
ANY_PORT: Final = socket.VMADDR_PORT_ANY


async def listen(port: int = ANY_PORT, *, backlog: int = 128) -> trio.SocketListener:
    """Listen on any CID; without *port*, on one that the kernel chooses."""
    sock = trio.socket.socket(socket.AF_VSOCK)
    await sock.bind((ANY, port))
    sock.listen(backlog)
    return trio.SocketListener(sock)


def port_of(listener: trio.SocketListener) -> int:
    port = listener.socket.getsockname()[1]
    assert isinstance(port, int)
    return port


async def dial(cid: int, port: int) -> trio.SocketStream:
    """Connect, and leave no socket behind where that fails."""
    sock = trio.socket.socket(socket.AF_VSOCK)
    try:
        await sock.connect((cid, port))
    except BaseException:
        sock.close()
        raise
    return trio.SocketStream(sock)


async def received(stream: trio.SocketStream) -> bytes:
    """All that comes until the peer's end."""
    return b"".join([piece async for piece in stream])
