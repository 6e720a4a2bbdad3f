"""What a port takes at once is sent in full, in order, before anything else; how `Link` uses it is in test_link.py."""

from __future__ import annotations

import pytest
import trio
from enlink.port import SocketPort, StreamPort
from enlink.testing.streams import reset, tcp_stream_pair
from trio.testing import lockstep_stream_pair, trio_test

DEADLINE_S = 50
MORE_THAN_FITS = bytes(range(256)) * 16_384  # 4 MiB


async def hear(stream: trio.abc.ReceiveStream, count: int) -> bytes:
    heard = bytearray()
    with trio.fail_after(DEADLINE_S):
        while len(heard) < count:
            heard += await stream.receive_some(count - len(heard))
    return bytes(heard)


@trio_test
async def test_what_the_kernel_has_room_for_is_gone_at_once() -> None:
    peer, here = await tcp_stream_pair()
    port = SocketPort(here)
    assert port.offer(b"hello")
    assert not port.has_unsent
    assert await hear(peer, 5) == b"hello"
    await peer.aclose()
    await here.aclose()


@trio_test
async def test_what_it_has_no_room_for_follows_without_a_task() -> None:
    peer, here = await tcp_stream_pair(buffer_bytes=65_536)
    port = SocketPort(here)
    assert port.offer(MORE_THAN_FITS)
    unsent = [port.has_unsent]
    assert await hear(peer, len(MORE_THAN_FITS)) == MORE_THAN_FITS
    unsent.append(port.has_unsent)
    assert unsent == [True, False]
    assert port.offer(b"again")
    assert await hear(peer, 5) == b"again"
    await peer.aclose()
    await here.aclose()


@trio_test
async def test_what_is_written_comes_after_what_was_offered() -> None:
    peer, here = await tcp_stream_pair(buffer_bytes=65_536)
    port = SocketPort(here)
    assert port.offer(MORE_THAN_FITS)
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(port.write, b"the end", 30.0)
            assert await hear(peer, len(MORE_THAN_FITS) + 7) == MORE_THAN_FITS + b"the end"
    assert not port.has_unsent
    await peer.aclose()
    await here.aclose()


@trio_test
async def test_a_peer_that_is_gone_is_told_of_to_whoever_writes_next() -> None:
    peer, here = await tcp_stream_pair(buffer_bytes=65_536)
    port = SocketPort(here)
    assert port.offer(MORE_THAN_FITS)
    reset(peer)
    with trio.fail_after(DEADLINE_S):
        while port.failure is None:  # noqa: ASYNC110  # the kernel tells, and nobody else
            await trio.sleep(0.001)
    assert not port.has_unsent
    with pytest.raises(OSError, match=r"reset|pipe"):
        port.offer(b"x")
    with pytest.raises(OSError, match=r"reset|pipe"):
        await port.write(b"x", 1.0)
    await here.aclose()


@trio_test
async def test_who_offers_to_a_closed_socket_is_told() -> None:
    peer, here = await tcp_stream_pair()
    port = SocketPort(here)
    port.close()
    await here.aclose()
    port.close()
    with pytest.raises(trio.ClosedResourceError):
        port.offer(b"x")
    await peer.aclose()


@trio_test
async def test_streams_that_are_no_sockets_take_no_offers() -> None:
    peer, here = lockstep_stream_pair()
    port = StreamPort(here)
    assert not port.takes_offers
    assert not port.offer(b"x")
    await peer.aclose()
    with pytest.raises(trio.BrokenResourceError):
        await port.write(b"x", 1.0)
    assert isinstance(port.failure, trio.BrokenResourceError)
