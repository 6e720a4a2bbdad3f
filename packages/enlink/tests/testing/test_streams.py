"""Streams for tests behave like any trio stream, apart from what a test asks of them."""

from __future__ import annotations

import pytest
import trio
from enlink.testing.streams import ImpairedStream, reset, tcp_stream_pair
from trio.testing import MockClock, check_half_closeable_stream, memory_stream_pair, trio_test

Pair = tuple[trio.abc.HalfCloseableStream, trio.abc.HalfCloseableStream]


@pytest.fixture
def autojump_clock() -> MockClock:
    return MockClock(autojump_threshold=0)


async def impaired_pair() -> Pair:
    left, right = memory_stream_pair()
    return ImpairedStream(left, slice_bytes=3000), ImpairedStream(right)


@trio_test
async def test_an_impaired_stream_keeps_trios_rules_for_streams() -> None:
    await check_half_closeable_stream(impaired_pair, None)


@trio_test
async def test_a_tcp_pair_keeps_trios_rules_for_streams() -> None:
    await check_half_closeable_stream(tcp_stream_pair, None)


@trio_test
async def test_pieces_are_small_and_take_their_time(autojump_clock: MockClock) -> None:
    left, right = memory_stream_pair()
    slow = ImpairedStream(right, slice_bytes=2, delay_s=10)
    await left.send_all(b"hello")
    began = trio.current_time()
    assert [await slow.receive_some() for _ in range(3)] == [b"he", b"ll", b"o"]
    assert trio.current_time() - began == 30


@trio_test
async def test_a_cancelled_receive_loses_nothing(autojump_clock: MockClock) -> None:
    left, right = memory_stream_pair()
    slow = ImpairedStream(right, delay_s=10)
    await left.send_all(b"hello")
    with trio.move_on_after(1) as waiting:
        await slow.receive_some()
    assert waiting.cancelled_caught
    assert await slow.receive_some() == b"hello"


@trio_test
async def test_a_cut_looks_like_an_end_and_leaves_the_other_direction_alone() -> None:
    left, right = memory_stream_pair()
    cut = ImpairedStream(right, limit_bytes=3)
    await left.send_all(b"hello")
    assert [await cut.receive_some(2) for _ in range(4)] == [b"he", b"l", b"", b""]
    await cut.send_all(b"still here")
    assert await left.receive_some() == b"still here"


@trio_test
async def test_a_reset_breaks_both_directions() -> None:
    left, right = memory_stream_pair()
    broken = ImpairedStream(right, limit_bytes=3, cut="reset")
    await broken.send_all(b"not yet")
    await left.send_all(b"hello")
    assert await broken.receive_some() == b"hel"
    with pytest.raises(trio.BrokenResourceError):
        await broken.receive_some()
    with pytest.raises(trio.BrokenResourceError):
        await broken.send_all(b"!")


@trio_test
async def test_a_small_buffer_makes_a_sender_wait() -> None:
    left, right = await tcp_stream_pair(buffer_bytes=4096)
    async with left, right:
        with trio.move_on_after(0.2) as waiting:
            await left.send_all(bytes(100_000))
        assert waiting.cancelled_caught


@trio_test
async def test_a_reset_connection_is_broken_at_the_other_end() -> None:
    left, right = await tcp_stream_pair()
    async with right:
        reset(left)
        with pytest.raises(trio.BrokenResourceError), trio.fail_after(10):
            await right.receive_some()
