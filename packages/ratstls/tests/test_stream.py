"""The stream is one of trio's: its contracts, its bytes, and its cancellations. For bad ends see test_damage.py."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import random
from functools import partial
from pathlib import Path

import pytest
import trio
from enlink.testing.streams import reset, tcp_stream_pair
from in_child import in_child
from links import (
    ANYBODY,
    CancelledAtStep,
    Handles,
    Operation,
    both,
    client_of,
    inject,
    intercept,
    link,
    link_over,
    open_descriptors,
    read_to_end,
    records_in,
    server_of,
)
from ratstls._library import Library
from ratstls.errors import SessionBroken, Truncated
from ratstls.handshake import client_handshake, server_handshake
from ratstls.stream import PIECE_BYTES, RatsTlsStream
from trio.testing import check_two_way_stream, lockstep_stream_pair, memory_stream_pair, wait_all_tasks_blocked

TLS_1_2 = str(Path(__file__).parents[3] / "tests" / "native" / "tls_1_2.cnf")


async def tcp_link(library: Library, buffer_bytes: int | None = None) -> tuple[RatsTlsStream, RatsTlsStream]:
    return await link_over(library, await tcp_stream_pair(buffer_bytes=buffer_bytes))


async def close(*streams: RatsTlsStream) -> None:
    for stream in streams:
        await trio.aclose_forcefully(stream)


@in_child()
async def test_the_stream_conforms_to_trio(library: Library) -> None:
    """As trio's own suite for streams has it, also where sends wait until the other end receives."""
    await check_two_way_stream(partial(link, library), partial(link, library, lockstep_stream_pair))


# Bytes.


async def transfer(sender: RatsTlsStream, receiver: RatsTlsStream, total: int, seed: int) -> None:
    """Send pieces of all sizes, receive pieces of all sizes, and compare."""
    hashes, sizes = (hashlib.sha256(), hashlib.sha256()), random.Random(seed)
    stock = sizes.randbytes(300_000)

    async def send() -> None:
        left = total
        while left:
            size = min(left, int(math.exp(sizes.uniform(0, math.log(len(stock))))))
            start = sizes.randrange(len(stock) - size + 1)
            hashes[0].update(stock[start : start + size])
            await sender.send_all(memoryview(stock)[start : start + size])
            left -= size

    async def receive() -> None:
        left = total
        while left:
            data = await receiver.receive_some(min(left, random.Random(left).choice((1, 700, 16_384, 65_536, 1 << 20))))
            assert data
            hashes[1].update(data)
            left -= len(data)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        nursery.start_soon(receive)
    assert hashes[0].digest() == hashes[1].digest()


async def soak(library: Library, make: Operation, rounds: int, total: int) -> None:
    for seed in range(rounds):
        client, server = await make()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(transfer, client, server, total, seed)
            nursery.start_soon(transfer, server, client, total, seed + 1000)
        await both(client.aclose, partial(read_to_end, server))
        await server.aclose()


@in_child()
async def test_every_byte_arrives_in_both_directions_at_once(library: Library) -> None:
    """Over TCP and over memory, in pieces of all sizes."""
    await soak(library, partial(tcp_link, library), 4, 3_000_000)
    await soak(library, partial(link, library), 4, 1_000_000)


@in_child(OPENSSL_CONF=TLS_1_2)
async def test_every_byte_arrives_under_tls_1_2_too(library: Library) -> None:
    """Links refuse it, the stream would not."""
    await soak(library, partial(link, library, minimum_tls="1.2"), 4, 1_000_000)
    await check_two_way_stream(partial(link, library, minimum_tls="1.2"), None)


async def short_session(library: Library, number: int, transports: tuple[trio.abc.Stream, trio.abc.Stream]) -> None:
    """Both ends send as soon as their handshake is over, and say goodbye when they have heard the other."""
    words = b"from client %d" % number, b"from server %d" % number * 50

    async def use(shaking: Operation, says: bytes, hears: bytes) -> None:
        stream = await shaking()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, says)
            heard = b""
            while len(heard) < len(hears):
                heard += await stream.receive_some()
        assert heard == hears
        await stream.aclose()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(
            use, partial(client_handshake, transports[0], client_of(library), policy=ANYBODY), words[0], words[1]
        )
        nursery.start_soon(use, partial(server_handshake, transports[1], server_of(library)), words[1], words[0])


@in_child()
async def test_no_short_session_loses_anything_over_memory(library: Library) -> None:
    """1,500 of them, each in both directions at once right after the handshake: where two threads lost bytes."""
    for number in range(1500):
        await short_session(library, number, memory_stream_pair())


@in_child()
async def test_no_short_session_loses_anything_over_tcp(library: Library) -> None:
    """1,500 more, eight at a time."""
    numbers = iter(range(1500))

    async def work() -> None:
        for number in numbers:
            await short_session(library, number, await tcp_stream_pair())

    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(work)


@in_child()
async def test_both_directions_may_be_full(library: Library) -> None:
    """Nobody receives for a while, so that both senders wait; then everything arrives."""
    client, server = await tcp_link(library, buffer_bytes=20_000)
    sent = os.urandom(5_000_000)
    done = []

    async def send(stream: RatsTlsStream) -> None:
        await stream.send_all(sent)
        done.append(stream)

    async def receive(stream: RatsTlsStream) -> None:
        received = bytearray()
        while len(received) < len(sent):
            received += await stream.receive_some()
        assert received == sent

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send, client)
        nursery.start_soon(send, server)
        await wait_all_tasks_blocked(0.2)
        assert done == []
        nursery.start_soon(receive, client)
        nursery.start_soon(receive, server)
    await close(client, server)


@in_child()
async def test_a_send_goes_out_as_one_piece(library: Library) -> None:
    """Up to 64 KiB are handed to the transport at once, since what costs is the number of calls."""
    client, server = await link(library)
    sent: list[int] = []

    async def count(data: bytes) -> None:
        sent.append(len(data))

    client.transport.send_all = count  # type: ignore[method-assign, assignment]
    await client.send_all(bytes(PIECE_BYTES))
    await client.send_all(bytearray(2 * PIECE_BYTES + 1))
    assert sent == [PIECE_BYTES + 4 * 22] * 3 + [1 + 22]
    await close(client, server)


@in_child()
async def test_waiting_records_are_received_together(library: Library) -> None:
    """Up to 64 KiB at once, or as few as are asked for, and none is lost or out of turn."""
    client, server = await link(library)
    for number in range(200):
        await client.send_all(b"%3d " % number)
    assert await server.receive_some() == b"".join(b"%3d " % number for number in range(200))
    await client.send_all(b"one by one")
    assert [await server.receive_some(1) for _ in range(3)] == [b"o", b"n", b"e"]
    assert await server.receive_some() == b" by one"
    await close(client, server)


# Ends.


@in_child()
async def test_a_goodbye_is_a_clean_end(library: Library) -> None:
    """After everything that was sent before; and again when asked again. Nothing can be sent into it."""
    client, server = await link(library)
    await client.send_all(b"last words")
    await client.aclose()
    assert await read_to_end(server) == (b"last words", None)
    assert await server.receive_some() == b""
    with pytest.raises(SessionBroken, match="the peer has ended the session"):
        await server.send_all(b"anybody?")
    with pytest.raises(trio.BrokenResourceError, match="an earlier send was interrupted"):
        await server.send_all(b"anybody?")
    await server.aclose()
    await server.aclose()


@in_child()
async def test_a_goodbye_is_answered(library: Library) -> None:
    """One record each way, and none after the answer."""
    client, server = await link(library)
    from_client, from_server = intercept(client), intercept(server)
    await client.aclose()
    (goodbye,) = records_in(from_client())
    inject(server, goodbye)
    assert await server.receive_some() == b""
    await server.aclose()
    assert len(records_in(from_server())) == 1


@in_child()
async def test_a_closed_transport_is_no_clean_end(library: Library) -> None:
    """Whether the connection ends or is reset."""
    for end, text in ((trio.SocketStream.send_eof, "ended"), (reset, "broke")):
        transports = await tcp_stream_pair()
        client, server = await link_over(library, transports)
        await client.send_all(b"and then")
        assert await server.receive_some() == b"and then"
        if (closing := end(transports[0])) is not None:
            await closing
        for _ in range(2):
            with pytest.raises(Truncated, match=f"the connection {text} without the peer's goodbye"):
                await server.receive_some()
        await close(client, server)


@in_child()
async def test_a_transport_that_is_gone_breaks_sends(library: Library) -> None:
    """For good."""
    client, server = await link(library)
    await trio.aclose_forcefully(server.transport)
    for _ in range(2):
        with pytest.raises(trio.BrokenResourceError):
            await client.send_all(b"x")
    await close(client, server)


@in_child()
async def test_closing_while_another_task_sends_looks_truncated(library: Library) -> None:
    """The peer is not told that all is well when something was cut."""
    client, server = await link(library, lockstep_stream_pair)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_closed, partial(client.send_all, bytes(1000)))
        await wait_all_tasks_blocked()
        await client.aclose()
    assert isinstance((await read_to_end(server))[1], Truncated)
    await close(server)


async def _closed(operation: Operation) -> None:
    with pytest.raises(trio.ClosedResourceError):
        await operation()


@in_child()
async def test_a_goodbye_that_nobody_takes_is_given_up(library: Library) -> None:
    """After a second; the stream is closed all the same."""
    handles = Handles(library)
    client, server = await link(handles.library, lockstep_stream_pair)
    started = trio.current_time()
    await client.aclose()
    assert trio.current_time() - started < 8
    with pytest.raises(trio.ClosedResourceError):
        await client.transport.send_all(b"x")
    await close(server)
    assert handles.living == 0


# Cancellation.


@in_child()
async def test_a_cancelled_receive_loses_nothing(library: Library) -> None:
    """Wherever it is cancelled."""
    client, server = await link(library, lockstep_stream_pair)
    sent = os.urandom(200_000)
    received = bytearray()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.send_all, sent)
        for step in itertools.cycle(range(1, 8)):
            with CancelledAtStep(step):
                received += await server.receive_some(5000)
            if len(received) == len(sent):
                break
    assert received == sent
    await close(client, server)


@in_child()
async def test_a_cancelled_send_breaks_sending_and_nothing_else(library: Library) -> None:
    """What arrives is what was sent, up to some byte; unless nothing was sent, more may follow. Receiving goes on."""
    data = os.urandom(3 * PIECE_BYTES)
    for step in itertools.count(1):
        client, server = await link(library, lockstep_stream_pair)
        received: tuple[bytes, BaseException | None] = (b"", None)

        async def receive(stream: RatsTlsStream) -> None:
            nonlocal received
            received = await read_to_end(stream)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive, server)
            with CancelledAtStep(step) as scope:
                await client.send_all(data)
            if scope.cancelled_caught and client._is_cut:
                with pytest.raises(trio.BrokenResourceError):
                    await client.send_all(b"more")
            nursery.start_soon(server.send_all, b"to a sender")
            assert await client.receive_some() == b"to a sender"
            is_cut = client._is_cut
            await client.aclose()
        assert data.startswith(received[0])
        assert isinstance(received[1], Truncated) if is_cut else received[1] is None
        await close(server)
        if not scope.cancelled_caught:
            assert step > 5
            return


@in_child()
async def test_a_cancelled_close_closes(library: Library) -> None:
    """Wherever it is cancelled; the peer reads a goodbye or is told that there was none."""
    handles = Handles(library)
    for step in itertools.count(1):
        client, server = await link(handles.library, lockstep_stream_pair)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read_to_end, server)
            with CancelledAtStep(step) as scope:
                await client.aclose()
            with pytest.raises(trio.ClosedResourceError):
                await client.transport.receive_some()
            with pytest.raises(trio.ClosedResourceError):
                await client.receive_some()
        await close(server)
        assert handles.living == 0
        if not scope.cancelled_caught:
            assert step > 2
            return


@in_child()
async def test_a_cancelled_handshake_leaves_nothing_behind(library: Library) -> None:
    """At whichever step of either side: transports closed, handles and descriptors gone, the other side told."""
    handles = Handles(library)
    await close(*await link(handles.library))
    before = open_descriptors()
    for cancelled in ("client", "server"):
        for step in itertools.count(1):
            transports = memory_stream_pair()
            shaking: dict[str, Operation] = {
                "client": partial(client_handshake, transports[0], client_of(handles.library), policy=ANYBODY),
                "server": partial(server_handshake, transports[1], server_of(handles.library)),
            }
            cancelling = CancelledAtStep(step)

            async def shake(
                name: str,
                cancelling: CancelledAtStep = cancelling,
                cancelled: str = cancelled,
                ends: dict[str, Operation] = shaking,
            ) -> object:
                if name != cancelled:
                    return await ends[name]()
                with cancelling:
                    return await ends[name]()

            ends = await both(partial(shake, "client"), partial(shake, "server"))
            is_cancelled = cancelling.scope.cancelled_caught
            if is_cancelled:
                with pytest.raises(trio.ClosedResourceError):
                    await transports[cancelled == "server"].receive_some()
            for end in ends:
                if isinstance(end, RatsTlsStream):
                    if is_cancelled:
                        assert isinstance((await read_to_end(end))[1], Truncated)
                    await end.aclose()
            assert handles.living == 0
            if not is_cancelled:
                assert step > 10
                break
    assert open_descriptors() == before


# What is known of it.


@in_child()
async def test_a_stream_knows_its_age(library: Library) -> None:
    """In trio's time, from the beginning of the handshake."""
    client, server = await link(library)
    assert 0 < client.age_s < 45
    assert client.expires_at == pytest.approx(trio.current_time() - client.age_s + ANYBODY.max_link_age_s)
    assert server.expires_at == math.inf
    assert server.peer is None
    await close(client, server)
