"""Streams for tests of links: real TCP pairs on loopback, resets, and streams that slice, crawl and are cut.

Two ends in memory are `trio.testing.memory_stream_pair`, which never blocks a sender, and
`trio.testing.lockstep_stream_pair`, which blocks it until its bytes are received.
"""

from __future__ import annotations

import math
import socket
import struct
import sys
from typing import Literal

import trio


async def tcp_stream_pair(*, buffer_bytes: int | None = None) -> tuple[trio.SocketStream, trio.SocketStream]:
    """Connect two TCP sockets over loopback and return both ends, dialler first.

    Args:
        buffer_bytes: for each of the kernel's buffers, which it doubles; its own choice where this is missing.
    """
    with trio.socket.socket() as listener:
        if buffer_bytes is not None:
            # Inherited by what is accepted, and on time for the window scale, which the handshake settles.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
        await listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        dialler = trio.socket.socket()
        if buffer_bytes is not None:
            dialler.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
            dialler.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
        await dialler.connect(listener.getsockname())
        accepted, _ = await listener.accept()
    return trio.SocketStream(dialler), trio.SocketStream(accepted)


def reset(stream: trio.SocketStream) -> None:
    """Close a TCP connection with a reset, as a host does that has forgotten it."""
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    stream.socket.close()


class ImpairedStream(trio.abc.HalfCloseableStream):
    """A stream whose receiving side suffers; what is sent goes through as it is.

    Receiving is for one task; its cancellation loses nothing.

    Args:
        slice_bytes: nothing longer is received at a time...
        delay_s: ...and every piece takes so long to come.
        limit_bytes: after so many the connection is cut...
        cut: ...which looks like an end of the stream, or like a reset, then for the sender too.
    """

    def __init__(
        self,
        stream: trio.abc.HalfCloseableStream,
        *,
        slice_bytes: int = 64 * 1024,
        delay_s: float = 0,
        limit_bytes: int = sys.maxsize,
        cut: Literal["end", "reset"] = "end",
    ) -> None:
        self._stream = stream
        self._slice_bytes = slice_bytes
        self._delay_s = delay_s
        self._left_bytes = limit_bytes
        self._cut = cut
        self._piece = b""
        self._due_s = -math.inf

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if not self._piece:
            if not self._left_bytes:
                await trio.lowlevel.checkpoint()
                self._break_if_reset()
                return b""
            limit = min(self._slice_bytes, self._left_bytes, sys.maxsize if max_bytes is None else max_bytes)
            self._piece = bytes(await self._stream.receive_some(limit))
            self._left_bytes -= len(self._piece)
            self._due_s = trio.current_time() + self._delay_s
        await trio.sleep_until(self._due_s)
        piece, self._piece = self._piece, b""
        return piece

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if not self._left_bytes:
            await trio.lowlevel.checkpoint()
            self._break_if_reset()
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def aclose(self) -> None:
        await self._stream.aclose()

    def _break_if_reset(self) -> None:
        if self._cut == "reset":
            raise trio.BrokenResourceError("the connection was reset")
