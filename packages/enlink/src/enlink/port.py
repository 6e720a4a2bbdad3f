"""How the bytes of a link get in and out of a stream: the fast way where a socket is below, else the usual one."""

from __future__ import annotations

import fcntl
import os
import struct
import termios
from collections.abc import Callable
from contextlib import suppress
from typing import Final, Protocol

import trio

from enlink.congestion import pace_if_long
from enlink.frame import Buffer
from enlink.pump import current_pump, while_readable

# Choices of ours.
_BURST: Final = 16  # operations that find the kernel ready before other tasks get their turn

_INT: Final = struct.Struct("i")

Space = Callable[[], memoryview]  # where to receive
Digest = Callable[[int], bool]  # takes in so many bytes, which were received there


class Port(Protocol):
    """How bytes get in and out of a stream.

    Before either, `take_turn`: the one place where a cancellation that is due already is noticed in time.

    Attributes:
        failure: why a write failed. The kernel tells that once, and who reads sees no more than an end.
        has_unsent: what `offer` took waits for room.
        takes_offers: `offer` is of use here.
    """

    failure: Exception | None
    takes_offers: bool

    @property
    def has_unsent(self) -> bool: ...
    async def take_turn(self) -> None: ...
    async def read(self, space: Space, digest: Digest) -> bool:
        """Read into *space* and *digest* until that returns False, or the stream has ended. Returns whether it goes on.

        Raises:
            EOFError: what is below an encrypted stream has ended before it.
            OSError, trio.BrokenResourceError: it broke, or what came was not what the peer sent.
        """

    async def write(self, data: Buffer, stall_limit_s: float) -> None:
        """Write all of *data*, after what is unsent.

        Raises:
            OSError, trio.BrokenResourceError: it cannot be written, now or ever.
            trio.TooSlowError: nothing at all was taken for *stall_limit_s*.
        """

    def offer(self, data: Buffer, /) -> bool:
        """Take *data* without waiting, or return False; not to be called while there is `unsent`.

        What the kernel has no room for is copied, and follows as soon as it has, before anything else.
        """

    def unread_bytes(self) -> int:
        """Return how much has arrived in the kernel and was not read yet; 0 where nobody knows."""

    def settle(self) -> None:
        """Choose the congestion control, as far as it is known by now how long the way is: see congestion.py."""

    def close(self) -> None:
        """Let go of the stream, which is about to be closed."""


class StreamPort:
    """Any trio stream, by its public methods."""

    takes_offers: bool = False
    has_unsent = False

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self.failure: Exception | None = None

    async def take_turn(self) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()

    async def read(self, space: Space, digest: Digest) -> bool:
        while data := await self._stream.receive_some(len(room := space())):
            room[: len(data)] = data
            if not digest(len(data)):
                return True
        return False

    async def write(self, data: Buffer, stall_limit_s: float) -> None:
        try:
            with trio.fail_after(stall_limit_s):  # how much of it the peer has taken, a stream does not tell
                await self._stream.send_all(data)
        except (trio.BrokenResourceError, OSError) as error:
            self.failure = error
            raise

    def offer(self, _: Buffer, /) -> bool:
        return False

    def unread_bytes(self) -> int:
        return 0

    def settle(self) -> None: ...
    def close(self) -> None: ...


class SocketPort:
    """A socket by its descriptor: try first, wait only if the kernel has nothing to give or no room.

    trio's own methods visit the scheduler on every call, which costs several times the system call itself. Here other
    tasks get their turn whenever there is something to wait for, and at least once in `_BURST` calls.
    """

    takes_offers: bool = True

    def __init__(self, stream: trio.SocketStream) -> None:
        self.failure: Exception | None = None
        self._socket = stream.socket
        self._unsent: Buffer = b""
        self._in_a_row = 0

    @property
    def has_unsent(self) -> bool:
        return bool(self._unsent)

    async def take_turn(self) -> None:
        self._in_a_row += 1
        if self._in_a_row >= _BURST:
            self._in_a_row = 0
            await trio.lowlevel.checkpoint()

    async def read(self, space: Space, digest: Digest) -> bool:
        descriptor = self._descriptor()
        is_open = True

        def step() -> bool:
            nonlocal is_open
            try:
                count = os.readv(descriptor, [space()])
            except BlockingIOError:
                return True
            is_open = bool(count)
            return is_open and digest(count)

        await self._read_with(step)
        return is_open

    async def _read_with(self, step: Callable[[], bool]) -> None:
        if step():
            self._in_a_row = 0
            await while_readable(self._descriptor(), step)

    async def write(self, data: Buffer, stall_limit_s: float) -> None:
        if self._unsent:
            current_pump().on_writable(self._descriptor(), None)
        for rest in (self._unsent, self._seal(data)):
            self._unsent = b""
            while rest := self._write(rest):
                self._in_a_row = 0
                with trio.fail_after(stall_limit_s):
                    await trio.lowlevel.wait_writable(self._socket)

    def offer(self, data: Buffer, /) -> bool:
        if rest := self._write(self._seal(data)):
            self._unsent = bytes(rest)  # *data* is of a buffer that will be used again
            current_pump().on_writable(self._descriptor(), self._write_unsent)
        return True

    def unread_bytes(self) -> int:
        with suppress(OSError, trio.ClosedResourceError):
            unread: int = _INT.unpack(fcntl.ioctl(self._descriptor(), termios.FIONREAD, bytes(_INT.size)))[0]
            return unread
        return 0

    def settle(self) -> None:
        pace_if_long(self._socket)

    def _seal(self, data: Buffer) -> Buffer:
        """Return what *data* is on the wire."""
        return data

    def close(self) -> None:
        if self._socket.fileno() >= 0:
            current_pump().forget(self._socket.fileno())

    def _write(self, data: Buffer) -> Buffer:
        """Write what there is room for, and return the rest."""
        if self.failure is not None:
            raise self.failure
        try:
            count = os.write(self._descriptor(), data)
        except BlockingIOError:
            return data
        except OSError as error:
            self.failure = error
            raise
        return memoryview(data)[count:] if count < len(data) else b""

    def _write_unsent(self) -> None:
        with suppress(OSError):  # whoever writes next is told
            self._unsent = self._write(self._unsent)
            if self._unsent:
                return
        self._unsent = b""
        current_pump().on_writable(self._descriptor(), None)

    def _descriptor(self) -> int:
        descriptor = self._socket.fileno()
        if descriptor < 0:
            raise trio.ClosedResourceError("the link was closed here")
        return descriptor
