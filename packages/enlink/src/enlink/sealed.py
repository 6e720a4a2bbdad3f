"""How the bytes of an encrypted link get in and out of the socket below it, and which port any stream gets."""

from __future__ import annotations

import os
from typing import Final, Protocol, runtime_checkable

import trio

from enlink.frame import Buffer
from enlink.port import Digest, Port, SocketPort, Space, StreamPort

# Choices of ours.
BATCH_BYTES: Final = 132 * 1024  # of plain or ciphertext at a time: two of the longest frames


class Engine(Protocol):
    """Encryption as bytes in and bytes out, which waits for nothing: see ratstls._engine."""

    @property
    def is_starved(self) -> bool: ...
    def feed(self, ciphertext: Buffer, /) -> None: ...
    def read(self, room: memoryview, /) -> int | None: ...
    def write(self, data: Buffer, /) -> None: ...
    def take(self) -> bytes: ...


@runtime_checkable
class Sealed(Protocol):
    """An encrypted stream that shows its parts."""

    transport: trio.abc.Stream
    engine: Engine


class SealedPort(SocketPort):
    """A socket below an encrypted stream: what `SocketPort` does, with the stream's engine in between.

    The stream itself is not to be used meanwhile, but to close it.
    """

    def __init__(self, stream: Sealed, transport: trio.SocketStream) -> None:
        super().__init__(transport)
        self._engine = stream.engine
        self._room = memoryview(bytearray(BATCH_BYTES))

    async def read(self, space: Space, digest: Digest) -> bool:
        engine, descriptor = self._engine, self._descriptor()
        is_open = True

        def open_all() -> bool:
            """Digest what the engine has; returns whether it wants more."""
            nonlocal is_open
            while (count := engine.read(space())) is not None:
                is_open = bool(count)
                if not is_open or not digest(count):
                    return False
            return True

        def step() -> bool:
            try:
                data = self._room[: os.readv(descriptor, (self._room,))]
            except BlockingIOError:
                return True
            engine.feed(data)
            try:
                return open_all()
            except trio.BrokenResourceError as error:
                if data:
                    raise
                raise EOFError(str(error)) from error

        # An earlier read may have left something there, of which the socket knows nothing.
        if engine.is_starved or open_all():
            await self._read_with(step)
        return is_open

    def _seal(self, data: Buffer) -> Buffer:
        view = memoryview(data)
        try:
            for start in range(0, len(view), BATCH_BYTES):
                self._engine.write(view[start : start + BATCH_BYTES])
        except trio.BrokenResourceError as error:
            self.failure = error
            raise
        return self._engine.take()


def port_of(stream: trio.abc.Stream) -> Port:
    """Return the fastest port that *stream* can have."""
    if isinstance(stream, trio.SocketStream):
        return SocketPort(stream)
    if isinstance(stream, Sealed) and isinstance(stream.transport, trio.SocketStream):
        return SealedPort(stream, stream.transport)
    return StreamPort(stream)
