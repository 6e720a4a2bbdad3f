"""How a connection is ended in good order: what has arrived is received, and no more than a second of the rest."""

from __future__ import annotations

from contextlib import aclosing

import pytest
import trio
from enlink.control import Close, Error, Hello, Role
from enlink.endpoint import Tcp
from enlink.frame import encode_packets
from enlink.link import Link
from enlink.testing.peers import ip_packets
from enlink.testing.streams import reset, tcp_stream_pair
from entg.connection import LAST_WORDS_S, PAUSE_S, Connection, spell
from trio.testing import MockClock, memory_stream_pair, trio_test

PACKETS = ip_packets("192.168.0.1", "192.168.0.254", size_bytes=60_000, payload_bytes=(500, 1500))


@pytest.fixture
def autojump_clock() -> MockClock:
    return MockClock(autojump_threshold=0.02)  # real sockets need a moment


def connection_on(stream: trio.abc.HalfCloseableStream) -> Connection:
    return Connection(stream, Link(stream, Hello(Role.GATEWAY), lambda _: None))


async def receive_all(connection: Connection, pause_s: float = 0) -> list[bytes]:
    received: list[bytes] = []
    while packets := await connection.receive():
        received.extend(map(bytes, packets))
        await trio.sleep(pause_s)
    return received


@trio_test
async def test_what_has_arrived_is_received_however_long_it_takes(autojump_clock: MockClock) -> None:
    theirs, ours = await tcp_stream_pair()
    async with aclosing(theirs), aclosing(ours):
        connection = connection_on(ours)
        await theirs.send_all(encode_packets(PACKETS))
        connection.stop_reading()
        assert await receive_all(connection, pause_s=3 * LAST_WORDS_S) == PACKETS


@trio_test
async def test_what_comes_after_a_second_is_not_received_though_there_is_no_pause(autojump_clock: MockClock) -> None:
    theirs, ours = memory_stream_pair()
    connection = connection_on(ours)
    connection.stop_reading()
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:

            async def send() -> None:
                while True:
                    await theirs.send_all(encode_packets(PACKETS[:1]))
                    await trio.sleep(0.01)

            nursery.start_soon(send)
            began_s = trio.current_time()
            assert set(await receive_all(connection)) == set(PACKETS[:1])
            assert LAST_WORDS_S <= trio.current_time() - began_s < LAST_WORDS_S + 0.1
            nursery.cancel_scope.cancel()


@trio_test
async def test_a_wait_is_over_when_reading_is_to_stop_or_patience_ends(autojump_clock: MockClock) -> None:
    _, ours = memory_stream_pair()
    connection = connection_on(ours)
    assert await connection.unless_stopped(connection.link.hear_first_word, 0.3) is None
    assert trio.current_time() == pytest.approx(0.3)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive_all, connection)
        await trio.sleep(5)
        connection.end("replaced", "replaced by another", Error("replaced"))
    assert trio.current_time() == pytest.approx(0.3 + 5 + PAUSE_S)
    assert await connection.unless_stopped(connection.link.receive) is None


@trio_test
async def test_the_first_reason_for_an_end_counts() -> None:
    _, ours = memory_stream_pair()
    connection = connection_on(ours)
    assert (connection.reason, connection.farewell) == ("stopped", Close("the gateway is stopping"))
    connection.end("stalled", "the peer takes nothing")
    connection.end("reset", "the connection broke", Error("broken"))
    assert (connection.reason, connection.text) == ("stalled", "the peer takes nothing")
    assert connection.farewell == Close("the peer takes nothing")


@trio_test
async def test_an_address_is_spelled_for_people_and_unknown_of_who_has_gone() -> None:
    theirs, ours = await tcp_stream_pair()
    async with aclosing(ours):
        port = theirs.socket.getsockname()[1]
        assert connection_on(ours).address == f"127.0.0.1:{port}"
        reset(theirs)
        while True:
            try:
                ours.socket.getpeername()
            except OSError:
                break
            await trio.lowlevel.checkpoint()
        assert connection_on(ours).address == "unknown"
    assert spell(Tcp("fd00::1", 6979)) == "[fd00::1]:6979"
