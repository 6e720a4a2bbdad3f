"""Each stream gets the fastest port there is; an encrypted one that shows its parts is read and written by them."""

from __future__ import annotations

import errno
import itertools
import os
import socket
from collections.abc import Callable
from contextlib import suppress

import pytest
import trio
from enlink.frame import Buffer
from enlink.port import Port, SocketPort, StreamPort
from enlink.sealed import SealedPort, port_of
from enlink.testing.streams import reset, tcp_stream_pair
from trio.testing import lockstep_stream_pair, trio_test

DEADLINE_S = 50
MORE_THAN_FITS = bytes(range(256)) * 16_384  # 4 MiB
INLET_BYTES = 16_384  # less than what is moved at a time


class ToyEngine:
    """Encryption as an engine sees it: records of a length and bytes that are turned round; an empty one is goodbye."""

    def __init__(self) -> None:
        self._inlet, self._moved = socket.socketpair()
        self._inlet.setblocking(False)
        self._moved.setblocking(False)
        self._inlet.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, INLET_BYTES)
        self.was_fed = self.was_moved = False
        self.arrived = bytearray()
        self.plain = bytearray()
        self.sealed = bytearray()
        self.is_at_end = self.has_goodbye = self.is_broken = False

    @property
    def is_starved(self) -> bool:
        return not self.plain and not self.has_goodbye

    @property
    def inlet(self) -> int:
        return self._inlet.fileno()

    def note_moved(self) -> None:
        self.was_moved = True

    def feed(self, ciphertext: Buffer, /) -> None:
        self._take_what_was_moved()
        self.was_fed = True
        self.is_at_end = not ciphertext
        self.arrived += ciphertext

    def _take_what_was_moved(self) -> None:
        with suppress(BlockingIOError):
            while True:
                self.arrived += self._moved.recv(65_536)

    def close(self) -> None:
        self._inlet.close()
        self._moved.close()

    def read(self, room: memoryview, /) -> int | None:
        self._take_what_was_moved()
        while len(self.arrived) >= 2:
            length = int.from_bytes(self.arrived[:2], "big")
            if len(self.arrived) < 2 + length:
                break
            self.plain += self.arrived[2 : 2 + length][::-1]
            self.has_goodbye = self.has_goodbye or not length
            del self.arrived[: 2 + length]
        if self.plain:
            count = min(len(self.plain), len(room))
            room[:count] = self.plain[:count]
            del self.plain[:count]
            return count
        if self.has_goodbye:
            return 0
        if self.is_at_end or self.is_broken:
            raise trio.BrokenResourceError("no goodbye")
        return None

    def write(self, data: Buffer, /) -> None:
        if self.is_broken:
            raise trio.BrokenResourceError("over")
        for start in range(0, len(data), 1000):
            record = bytes(data[start : start + 1000])[::-1]
            self.sealed += len(record).to_bytes(2, "big") + record

    def take(self) -> bytes:
        data = bytes(self.sealed)
        self.sealed.clear()
        return data


class ToyStream(trio.abc.Stream):
    """An encrypted stream, of which a port takes the parts."""

    def __init__(self, transport: trio.abc.Stream) -> None:
        self.transport = transport
        self.engine = ToyEngine()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:  # noqa: ARG002  # the interface
        raise AssertionError("the port uses the parts")

    async def wait_send_all_might_not_block(self) -> None:
        raise AssertionError("the port uses the parts")

    async def receive_some(self, max_bytes: int | None = None) -> bytes:  # noqa: ARG002  # the interface
        raise AssertionError("the port uses the parts")

    async def aclose(self) -> None:
        self.engine.close()
        await self.transport.aclose()


class Hearer:
    """Keeps what a port reads, into rooms of any size; *wants_more* says after which of it to go on."""

    def __init__(self, wants_more: Callable[[bytes], bool] = lambda _: True) -> None:
        self.heard = bytearray()
        self._wants_more = wants_more
        self._sizes = itertools.cycle((1, 100, 65_536))
        self._room = memoryview(b"")

    def space(self) -> memoryview:
        self._room = memoryview(bytearray(next(self._sizes)))
        return self._room

    def digest(self, count: int) -> bool:
        self.heard += self._room[:count]
        return self._wants_more(bytes(self.heard))


async def sealed_ports() -> tuple[Port, Port, ToyStream, ToyStream]:
    left, right = map(ToyStream, await tcp_stream_pair(buffer_bytes=65_536))
    near, far = port_of(left), port_of(right)
    assert isinstance(near, SealedPort)
    return near, far, left, right


@trio_test
async def test_each_stream_gets_the_fastest_port_there_is() -> None:
    left, right = await tcp_stream_pair()
    here, there = lockstep_stream_pair()
    sealed = ToyStream(right), ToyStream(there)
    assert [type(port_of(stream)) for stream in (left, sealed[0], here, sealed[1])] == [
        SocketPort,
        SealedPort,
        StreamPort,
        StreamPort,
    ]
    for stream in (left, *sealed):
        await stream.aclose()


async def send_much(near: Port, far: Port) -> None:
    """Let more than fits go from one to the other, and see that it arrives."""
    # Now and then it is enough for this time.
    hearer = Hearer(lambda heard: len(heard) % 3 != 0 and len(heard) < len(MORE_THAN_FITS) + 7)

    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def speak() -> None:
                assert near.offer(MORE_THAN_FITS)
                assert near.has_unsent
                await near.write(b"the end", 30.0)

            while len(hearer.heard) < len(MORE_THAN_FITS) + 7:
                assert await far.read(hearer.space, hearer.digest)
    assert bytes(hearer.heard) == MORE_THAN_FITS + b"the end"


@trio_test
async def test_sealed_bytes_arrive_whole_and_in_order_in_pieces_of_any_size() -> None:
    """They are moved as far as there is room, and what is left over is copied."""
    near, far, left, right = await sealed_ports()
    await send_much(near, far)
    assert right.engine.was_moved
    assert right.engine.was_fed
    await left.aclose()
    await right.aclose()


@trio_test
async def test_what_the_kernel_cannot_move_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels inside enclaves cannot."""

    def refuse(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("os.splice", refuse)
    near, far, left, right = await sealed_ports()
    await send_much(near, far)
    assert not right.engine.was_moved
    await left.aclose()
    await right.aclose()


@trio_test
async def test_bytes_are_copied_where_there_is_no_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of descriptors, links go on."""

    def refuse() -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr("enlink.sealed.Pipe", refuse)
    near, far, left, right = await sealed_ports()
    await send_much(near, far)
    assert not right.engine.was_moved
    await left.aclose()
    await right.aclose()


@trio_test
async def test_bytes_are_copied_where_there_is_but_a_small_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """As users get who have too many: a page at a time would take longer."""
    monkeypatch.setattr("enlink.pipes.PIPE_BYTES", 4096)
    near, far, left, right = await sealed_ports()
    await send_much(near, far)
    assert not right.engine.was_moved
    await left.aclose()
    await right.aclose()


@pytest.mark.proves("D22")
@trio_test
async def test_what_one_link_leaves_behind_gets_into_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipe is everybody's: where it could not be emptied, nobody uses it again."""

    def refuse(*_: int) -> bytes:
        raise MemoryError

    near, far, left, right = await sealed_ports()
    with trio.fail_after(DEADLINE_S), monkeypatch.context() as context:
        context.setattr("os.read", refuse)
        assert near.offer(MORE_THAN_FITS)
        with pytest.raises(MemoryError):
            await far.read(Hearer().space, lambda _: True)
    others = await sealed_ports()
    await send_much(*others[:2])
    for stream in (left, right, *others[2:]):
        await stream.aclose()


@trio_test
async def test_a_connection_that_breaks_is_told_of() -> None:
    """To who reads."""
    near, _, left, right = await sealed_ports()
    assert isinstance(right.transport, trio.SocketStream)
    reset(right.transport)
    with trio.fail_after(DEADLINE_S), pytest.raises(ConnectionResetError):
        await near.read(Hearer().space, lambda _: True)
    await left.aclose()
    right.engine.close()


@trio_test
async def test_a_goodbye_is_told_from_a_cut() -> None:
    near, far, left, right = await sealed_ports()
    await left.transport.send_all(b"\0\2ba\0\0")
    there, here = Hearer(), Hearer()
    with trio.fail_after(DEADLINE_S):
        assert not await far.read(there.space, there.digest)
        assert there.heard == b"ab"
        await right.transport.send_all(b"\0\2ba\0")
        await right.aclose()
        with pytest.raises(EOFError, match="no goodbye"):
            await near.read(here.space, here.digest)
    assert here.heard == b"ab"
    await left.aclose()


@trio_test
async def test_a_broken_session_is_told_to_who_reads_and_who_writes() -> None:
    near, _, left, right = await sealed_ports()
    left.engine.is_broken = True
    await right.transport.send_all(b"x")
    with trio.fail_after(DEADLINE_S):
        with pytest.raises(trio.BrokenResourceError):
            await near.read(Hearer().space, lambda _: True)
        with pytest.raises(trio.BrokenResourceError):
            near.offer(b"x")
        assert isinstance(near.failure, trio.BrokenResourceError)
        with pytest.raises(trio.BrokenResourceError):
            await near.write(b"x", 1.0)
    await left.aclose()
    await right.aclose()
