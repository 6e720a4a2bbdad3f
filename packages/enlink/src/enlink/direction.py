"""One way through a connection: takes bytes from one socket to another. What becomes of the whole is in splice.py."""

from __future__ import annotations

import errno
import os
import socket
import struct
from contextlib import suppress
from time import monotonic
from typing import Final, Literal, Protocol

from enlink.pipes import PIPE_BYTES, Pipe, PipePool
from enlink.pump import Pump

# Choices of ours.
BUFFER_BYTES: Final = 64 * 1024
_THIN_BYTES: Final = 16 * 1024  # below it a copy is cheaper than two splices

_SPLICE_FLAGS: Final = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK
_ABORT: Final = struct.pack("ii", 1, 0)  # struct linger: close(2) sends RST and drops what is unsent


class Owner(Protocol):
    """The connection of which a direction is one half."""

    last_moved_s: float

    def finish(self, ending: Literal["reset"]) -> None:
        """End both directions."""

    def direction_ended(self) -> bool:
        """Take note that this one is over; return whether that was all, and both sockets are closed."""

    def direction_stuck(self) -> None:
        """Take note that this one waits for its sink, or has lost it."""


def abort(sock: socket.socket) -> None:
    """Close a socket so that its peer takes what it has for torn, not for whole, if the family can tell."""
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        with suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
    sock.close()


class Direction:
    """One way through a connection. It either reads its source, or holds bytes and waits for its sink, or is over."""

    __slots__ = (
        *("_buffer", "_exchange", "_held", "_is_bulk", "_may_splice", "_pipe", "_pipes", "_pump"),
        *("_sink", "_sink_fd", "_source", "_source_fd", "is_broken", "is_over", "moved_bytes", "spliced_bytes"),
    )

    def __init__(
        self,
        exchange: Owner,
        source: socket.socket,
        sink: socket.socket,
        pump: Pump,
        buffer: memoryview,
        pipes: PipePool,
    ) -> None:
        self._exchange = exchange
        self._pump, self._buffer, self._pipes = pump, buffer, pipes
        self._source, self._source_fd = source, source.fileno()
        self._sink, self._sink_fd = sink, sink.fileno()
        self._held: memoryview | None = None
        self._pipe: Pipe | None = None
        self._is_bulk = False
        self._may_splice = True
        self.is_over = False
        self.is_broken = False
        self.moved_bytes = 0
        self.spliced_bytes = 0

    @property
    def is_held(self) -> bool:
        """Bytes wait here, because the sink takes none."""
        return self._held is not None or self._pipe is not None

    def start(self) -> None:
        """Begin to read when there is something to be read."""
        self._pump.on_readable(self._source_fd, self.move)

    def stop(self) -> None:
        """Move nothing any more; what is held is lost."""
        if self.is_over:
            return
        self.is_over = True
        self._pump.on_readable(self._source_fd, None)
        self._pump.on_writable(self._sink_fd, None)
        self._held = None
        if self._pipe is not None:
            self._pipes.give_back(self._pipe)
            self._pipe = None

    def close_source(self, *, aborts: bool) -> None:
        """Close the socket that is read, which is the other direction's sink."""
        if aborts:
            abort(self._source)
        else:
            self._source.close()

    def move(self) -> None:
        """Read, and pass on what is there."""
        # Once: others get their turn, and the pump calls again. More rounds at a time proved no faster.
        pipe = self._pipes.take() if self._is_bulk and self._may_splice else None
        if pipe is None:
            self._copy()
        else:
            self._splice(pipe)

    def _copy(self) -> None:
        buffer = self._buffer
        try:
            count = self._source.recv_into(buffer)
        except BlockingIOError:
            return
        except OSError:
            self._exchange.finish("reset")
            return
        if not count:
            self._end()
            return
        self._is_bulk = count == BUFFER_BYTES
        try:
            sent = self._sink.send(buffer[:count])
        except BlockingIOError:
            sent = 0
        except OSError:
            self._break()
            return
        self._moved(sent)
        if sent < count:
            self._held = memoryview(bytes(buffer[sent:count]))
            self._wait_for_sink()

    def _splice(self, pipe: Pipe) -> None:
        try:
            count = os.splice(self._source_fd, pipe.write_end, PIPE_BYTES, flags=_SPLICE_FLAGS)
        except OSError as error:
            self._pipes.give_back(pipe)
            if isinstance(error, BlockingIOError):
                self._is_bulk = False
            elif error.errno == errno.EINVAL:  # a family that knows no splice
                self._may_splice = False
            else:
                self._exchange.finish("reset")
            return
        if not count:
            self._pipes.give_back(pipe)
            self._end()
            return
        self._is_bulk = count >= _THIN_BYTES
        self._pipe = pipe
        pipe.held_bytes = count
        if not self._empty_pipe(pipe) and not self.is_over:
            self._wait_for_sink()

    def _empty_pipe(self, pipe: Pipe) -> bool:
        """Pass on what the pipe holds, as much as goes; returns whether that was all, and the pipe given back."""
        while pipe.held_bytes:
            try:
                # It may take less than the sink would: a pipe holds pieces.
                sent = os.splice(pipe.read_end, self._sink_fd, pipe.held_bytes, flags=_SPLICE_FLAGS)
            except BlockingIOError:
                return False
            except OSError:
                self._break()
                return False
            pipe.held_bytes -= sent
            self._moved(sent)
            self.spliced_bytes += sent
        self._pipe = None
        self._pipes.give_back(pipe)
        return True

    def _on_writable(self) -> None:
        if self._pipe is not None:
            if not self._empty_pipe(self._pipe):
                return
        elif self._held is not None:
            try:
                sent = self._sink.send(self._held)
            except BlockingIOError:
                return
            except OSError:
                self._break()
                return
            self._moved(sent)
            if sent < len(self._held):
                self._held = self._held[sent:]
                return
            self._held = None
        self._pump.on_writable(self._sink_fd, None)
        self._pump.on_readable(self._source_fd, self.move)

    def _wait_for_sink(self) -> None:
        self._pump.on_readable(self._source_fd, None)
        self._pump.on_writable(self._sink_fd, self._on_writable)
        self._exchange.direction_stuck()

    def _moved(self, count: int) -> None:
        self.moved_bytes += count
        self._exchange.last_moved_s = monotonic()

    def _end(self) -> None:
        """Pass on the end of the source: all its bytes have gone before."""
        self.is_over = True
        self._pump.on_readable(self._source_fd, None)
        self._exchange.last_moved_s = monotonic()
        if not self._exchange.direction_ended():
            with suppress(OSError):  # it has gone already, which the other direction finds out
                self._sink.shutdown(socket.SHUT_WR)

    def _break(self) -> None:
        """Stop, because the sink takes no more for ever; what it has said before may still be on its way back."""
        self.is_broken = True
        self.stop()
        self._exchange.direction_ended()
        self._exchange.direction_stuck()
