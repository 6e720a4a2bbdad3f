"""What the kernel does with AF_VSOCK, as far as our programs rely on it. Runs in the guest: see cli.py."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Final

import pytest
import trio
from enlink.testing.programs import in_trio

from tests.vsock.streams import ABSENT, ANY, ANY_PORT, LOCAL, dial, listen, port_of, received

pytestmark = pytest.mark.vsock

BUFFER_BYTES: Final = 256 * 1024  # what the kernel gives each direction of a connection
MEGABYTE: Final = bytes(range(256)) * 4096


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[trio.SocketStream, trio.SocketStream]]:
    """Two ends of a connection, dialler first."""
    async with await listen() as listener:
        dialler = await dial(LOCAL, port_of(listener))
        accepted = await listener.accept()
    async with dialler, accepted:
        yield dialler, accepted


@contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    outlet, inlet = os.pipe()
    try:
        yield outlet, inlet
    finally:
        os.close(outlet)
        os.close(inlet)


@in_trio
async def test_a_peer_that_has_ended_its_side_still_gets_a_late_reply_whole() -> None:
    """Half-close: the reply may start after the end of the request, and be larger than any buffer."""
    async with connected() as (client, server):
        await client.send_all(b"request")
        await client.send_eof()
        assert await received(server) == b"request"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.send_all, MEGABYTE)
            answer = bytearray()
            while len(answer) < len(MEGABYTE):
                answer += await client.receive_some()
        assert answer == MEGABYTE
        await server.send_eof()
        assert await received(client) == b""


@in_trio
async def test_sending_after_the_end_of_sending_fails() -> None:
    """As over TCP: EPIPE."""
    async with connected() as (client, _):
        await client.send_eof()
        with pytest.raises(BrokenPipeError):
            await client.socket.send(b"more")


@in_trio
async def test_a_peer_loses_its_name_when_this_side_shuts_down() -> None:
    """Unlike TCP: so the name is taken when the connection is made, and kept."""
    async with connected() as (client, server):
        name = client.socket.getpeername()
        await client.send_eof()
        with pytest.raises(OSError, match="not connected") as caught:
            client.socket.getpeername()
        assert caught.value.errno == errno.ENOTCONN
        assert name[0] == LOCAL
        assert await received(server) == b""
        assert server.socket.getpeername()[0] == LOCAL


@in_trio
async def test_a_port_where_nobody_listens_resets() -> None:
    """ECONNRESET, and not ECONNREFUSED as over TCP."""
    async with await listen() as listener:
        port = port_of(listener)
    with pytest.raises(ConnectionResetError):
        await dial(LOCAL, port)


@in_trio
async def test_no_transport_leads_to_an_unknown_cid() -> None:
    """ENODEV at once, where the loopback is the only transport."""
    with pytest.raises(OSError, match="No such device") as caught:
        await dial(ABSENT, 5000)
    assert caught.value.errno == errno.ENODEV


@in_trio
async def test_a_full_backlog_resets_at_once() -> None:
    """Nobody tries again as TCP does, so that a backlog must be long. What was let in is served."""
    async with await listen(backlog=1) as listener:
        dialled = [await dial(LOCAL, port_of(listener)), await dial(LOCAL, port_of(listener))]
        with pytest.raises(ConnectionResetError):
            await dial(LOCAL, port_of(listener))
        for client in dialled:
            async with client, await listener.accept() as server:
                await client.send_all(b"in time")
                assert await server.receive_some() == b"in time"


def test_the_device_tells_the_cid() -> None:
    """1 where nothing but the loopback is there; the ioctl is one of the device, not of sockets."""
    with Path("/dev/vsock").open("rb") as device:
        answer = fcntl.ioctl(device, socket.IOCTL_VM_SOCKETS_GET_LOCAL_CID, bytes(4))
    assert struct.unpack("I", answer) == (LOCAL,)


def test_a_buffer_grows_only_as_far_as_its_limit_which_grows_first() -> None:
    """A size beyond the limit is cut to it without a word."""
    with socket.socket(socket.AF_VSOCK) as sock:
        sizes = []
        for option in (
            socket.SO_VM_SOCKETS_BUFFER_SIZE,
            socket.SO_VM_SOCKETS_BUFFER_MAX_SIZE,
            socket.SO_VM_SOCKETS_BUFFER_SIZE,
        ):
            sock.setsockopt(socket.AF_VSOCK, option, 4 * BUFFER_BYTES)
            sizes.append(sock.getsockopt(socket.AF_VSOCK, socket.SO_VM_SOCKETS_BUFFER_SIZE))
        assert sizes == [BUFFER_BYTES, BUFFER_BYTES, 4 * BUFFER_BYTES]


@in_trio
async def test_an_accepted_connection_has_the_buffer_of_its_listener() -> None:
    """So it is set once, before anybody dials."""
    async with await listen() as listener:
        for option in (socket.SO_VM_SOCKETS_BUFFER_MAX_SIZE, socket.SO_VM_SOCKETS_BUFFER_SIZE):
            listener.socket.setsockopt(socket.AF_VSOCK, option, 4 * BUFFER_BYTES)
        async with await dial(LOCAL, port_of(listener)), await listener.accept() as accepted:
            size = accepted.socket.getsockopt(socket.AF_VSOCK, socket.SO_VM_SOCKETS_BUFFER_SIZE)
    assert size == 4 * BUFFER_BYTES


@in_trio
async def test_a_sender_without_a_reader_stops_when_the_buffer_is_full() -> None:
    """Back-pressure: the kernel takes one buffer's worth and no more."""
    async with connected() as (client, server):
        assert os.write(client.socket.fileno(), bytes(2 * BUFFER_BYTES)) == BUFFER_BYTES
        with pytest.raises(BlockingIOError):
            os.write(client.socket.fileno(), b"more")
        await client.send_eof()
        assert len(await received(server)) == BUFFER_BYTES


@in_trio
async def test_a_larger_buffer_holds_more_only_if_both_sides_have_it() -> None:
    """A sender is also held to what its own buffer would take."""
    holds = []
    for sizes in ((1, 4), (4, 1), (4, 4)):
        sockets = [trio.socket.socket(socket.AF_VSOCK) for _ in sizes]
        for sock, size in zip(sockets, sizes, strict=True):
            for option in (socket.SO_VM_SOCKETS_BUFFER_MAX_SIZE, socket.SO_VM_SOCKETS_BUFFER_SIZE):
                sock.setsockopt(socket.AF_VSOCK, option, size * BUFFER_BYTES)
        with sockets[0] as client, sockets[1] as listener:
            await listener.bind((ANY, ANY_PORT))
            listener.listen(1)
            await client.connect((LOCAL, listener.getsockname()[1]))
            server, _ = await listener.accept()
            with server:
                holds.append(os.write(client.fileno(), bytes(8 * BUFFER_BYTES)) // BUFFER_BYTES)
    assert holds == [1, 1, 4]


@in_trio
async def test_bytes_are_spliced_into_a_connection_and_out_of_it() -> None:
    """Through a pipe: EAGAIN when there is nothing, 0 at the end."""
    flags = os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE
    async with connected() as (client, server):
        with pipe() as (outlet, inlet):
            with pytest.raises(BlockingIOError):
                os.splice(server.socket.fileno(), inlet, 65536, flags=flags)
            os.write(inlet, b"ping")
            assert os.splice(outlet, client.socket.fileno(), 65536, flags=flags) == 4
            await trio.lowlevel.wait_readable(server.socket)
            assert os.splice(server.socket.fileno(), inlet, 65536, flags=flags) == 4
            assert os.read(outlet, 65536) == b"ping"
            await client.send_eof()
            await trio.lowlevel.wait_readable(server.socket)
            assert os.splice(server.socket.fileno(), inlet, 65536, flags=flags) == 0


@in_trio
async def test_an_abrupt_end_looks_like_an_orderly_one() -> None:
    """No reset crosses vsock: a peer that closes without reading, lingering for no time, is an end, and then EPIPE."""
    async with connected() as (client, server):
        await server.send_all(b"never read")
        # Python takes no bytes for an option of this family, so it must not know the family.
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0, fileno=os.dup(client.socket.fileno())) as nameless:
            nameless.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await client.aclose()
        assert await received(server) == b""
        with pytest.raises(BrokenPipeError):
            await server.socket.send(b"anybody?")


@in_trio
async def test_what_was_sent_before_a_close_arrives() -> None:
    """Closing at once cuts nothing off."""
    async with connected() as (client, server), trio.open_nursery() as nursery:

        async def send_and_leave() -> None:
            await client.send_all(MEGABYTE)
            await client.aclose()

        nursery.start_soon(send_and_leave)
        assert await received(server) == MEGABYTE


@in_trio
async def test_a_receiver_that_was_cancelled_loses_nothing() -> None:
    """The next one gets what comes then."""
    async with connected() as (client, server):
        with trio.move_on_after(0.01):
            await server.receive_some()
        await client.send_all(b"later")
        assert await server.receive_some() == b"later"


@in_trio
async def test_a_port_is_free_as_soon_as_its_listener_is_closed() -> None:
    """There is no TIME_WAIT, and nothing to set against it."""
    async with await listen() as listener:
        port = port_of(listener)
        async with await dial(LOCAL, port), await listener.accept():
            pass
    with socket.socket(socket.AF_VSOCK) as sock:
        sock.bind((ANY, port))
        assert sock.getsockname() == (ANY, port)


def test_a_port_is_taken_on_every_cid_or_on_one() -> None:
    """EADDRINUSE; a CID of somebody else cannot be bound at all."""
    with socket.socket(socket.AF_VSOCK) as first, socket.socket(socket.AF_VSOCK) as second:
        first.bind((ANY, ANY_PORT))
        for address, reason in (
            ((LOCAL, first.getsockname()[1]), errno.EADDRINUSE),
            ((ABSENT, ANY_PORT), errno.EADDRNOTAVAIL),
        ):
            with pytest.raises(OSError, match=r"[Aa]ddress") as caught:
                second.bind(address)
            assert caught.value.errno == reason


def test_options_of_tcp_do_not_exist() -> None:
    """So they are set by family."""
    with socket.socket(socket.AF_VSOCK) as sock, pytest.raises(OSError, match="Protocol not available"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
