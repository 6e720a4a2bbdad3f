"""How the bytes of an encrypted link get in and out of the socket below it, and which port any stream gets."""

from __future__ import annotations

import errno
import os
import weakref
from contextlib import suppress
from typing import Final, Protocol, runtime_checkable

import trio

from enlink.frame import Buffer
from enlink.pipes import USEFUL_BYTES, Pipe
from enlink.port import Digest, Port, SocketPort, Space, StreamPort

# Choices of ours.
BATCH_BYTES: Final = 132 * 1024  # of plain or ciphertext at a time: two of the longest frames

_SPLICE_FLAGS: Final = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK
_CANNOT_SPLICE: Final = (errno.EINVAL, errno.ENOSYS)


class Engine(Protocol):
    """Encryption as bytes in and bytes out, which waits for nothing: see ratstls._engine."""

    @property
    def is_starved(self) -> bool: ...
    @property
    def inlet(self) -> int: ...
    def note_moved(self) -> None: ...
    def feed(self, ciphertext: Buffer, /) -> None: ...
    def read(self, room: memoryview, /) -> int | None: ...
    def write(self, data: Buffer, /) -> None: ...
    def take(self) -> bytes: ...


@runtime_checkable
class Sealed(Protocol):
    """An encrypted stream that shows its parts."""

    transport: trio.abc.Stream
    engine: Engine


class Carrier:
    """Takes ciphertext from sockets to engines: inside the kernel where that can be, and else through a buffer.

    All ports share one, which holds nothing between two calls.
    """

    def __init__(self) -> None:
        self._room = memoryview(bytearray(BATCH_BYTES))
        self._pipe: Pipe | None = None
        with suppress(OSError):  # out of descriptors: copying needs none
            pipe = Pipe()
            weakref.finalize(self, pipe.close)
            if pipe.size_bytes >= USEFUL_BYTES:  # less than that is left to who has too many
                self._pipe = pipe

    def carry(self, descriptor: int, engine: Engine) -> int:
        """Take to *engine* what has come, or that it is the end, and return how many bytes that were.

        Raises:
            BlockingIOError: nothing has come.
            OSError: the connection broke.
        """
        pipe = self._pipe
        if pipe is None or not engine.is_starved:
            return self._copy(descriptor, engine)
        try:
            count = os.splice(descriptor, pipe.write_end, BATCH_BYTES, flags=_SPLICE_FLAGS)
        except OSError as error:
            if error.errno not in _CANNOT_SPLICE:
                raise
            self._pipe = None
            return self._copy(descriptor, engine)
        if count:
            self._pipe = None  # until it is empty again: nothing of one link may ever get into another
            _empty(pipe, count, engine)
            self._pipe = pipe
        else:
            engine.feed(b"")
        return count

    def _copy(self, descriptor: int, engine: Engine) -> int:
        count = os.readv(descriptor, [self._room])
        engine.feed(self._room[:count])
        return count


def _empty(pipe: Pipe, left: int, engine: Engine) -> None:
    engine.note_moved()
    try:
        while left:
            left -= os.splice(pipe.read_end, engine.inlet, left, flags=_SPLICE_FLAGS)
    except OSError:  # no room for more, or this end cannot splice
        engine.feed(os.read(pipe.read_end, left))


_carrier: trio.lowlevel.RunVar[Carrier] = trio.lowlevel.RunVar("enlink.sealed")


class SealedPort(SocketPort):
    """A socket below an encrypted stream: what `SocketPort` does, with the stream's engine in between.

    The stream itself is not to be used meanwhile, but to close it.
    """

    def __init__(self, stream: Sealed, transport: trio.SocketStream) -> None:
        super().__init__(transport)
        self._engine = stream.engine
        self._carrier = _shared_carrier()

    async def read(self, space: Space, digest: Digest) -> bool:
        engine, carrier, descriptor = self._engine, self._carrier, self._descriptor()
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
                count = carrier.carry(descriptor, engine)
            except BlockingIOError:
                return True
            try:
                return open_all()
            except trio.BrokenResourceError as error:
                if count:
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


def _shared_carrier() -> Carrier:
    try:
        return _carrier.get()
    except LookupError:
        carrier = Carrier()
        _carrier.set(carrier)
        return carrier


def port_of(stream: trio.abc.Stream) -> Port:
    """Return the fastest port that *stream* can have."""
    if isinstance(stream, trio.SocketStream):
        return SocketPort(stream)
    if isinstance(stream, Sealed) and isinstance(stream.transport, trio.SocketStream):
        return SealedPort(stream, stream.transport)
    return StreamPort(stream)
