"""Bytes get from one socket to the other: all of them, once and in order, however either side behaves. So do ends."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Literal

import pytest
import trio
from enlink import splice
from enlink.direction import BUFFER_BYTES
from enlink.pipes import PIPE_BYTES
from enlink.splice import Exchange, Limits, Mover, Outcome
from enlink.testing.programs import in_trio, until
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

Kind = Literal["tcp", "unix"]
KINDS: list[Kind] = ["tcp", "unix"]
MEGABYTE = random.Random(7).randbytes(1 << 20)


def socket_pair(kind: Kind) -> tuple[socket.socket, socket.socket]:
    if kind == "unix":
        return socket.socketpair()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    return near, far


class Bridged:
    """A bridge under test: what is said to `left` is to be heard at `right`, and the other way round."""

    def __init__(self, left: socket.socket, right: socket.socket) -> None:
        self.left_outer, self.right_outer = left, right
        self.left, self.right = trio.socket.from_stdlib_socket(left), trio.socket.from_stdlib_socket(right)
        self.outcome: Outcome | None = None

    def ended(self, outcome: Outcome) -> None:
        assert self.outcome is None  # told once
        self.outcome = outcome

    async def end(self) -> Outcome:
        await until(lambda: self.outcome is not None)
        assert self.outcome is not None
        return self.outcome


@contextmanager
def two_pairs(left_kind: Kind, right_kind: Kind, buffer_bytes: int | None = None) -> Iterator[list[socket.socket]]:
    """The outer and the inner end on the left, the inner and the outer end on the right."""
    ends = [*socket_pair(left_kind), *reversed(socket_pair(right_kind))]
    with ExitStack() as stack:
        for end in ends:
            stack.enter_context(end)
            end.setblocking(False)
            if buffer_bytes is not None:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
                end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        yield ends


async def bridged(
    use: Callable[[Bridged], Awaitable[object]],
    kinds: tuple[Kind, Kind] = ("tcp", "tcp"),
    *,
    limits: Limits = splice.NO_LIMITS,
    max_pipes: int = 64,
    buffer_bytes: int | None = None,
) -> None:
    """Use a bridge, which is ended then if it is still there; it leaves no descriptor."""
    with (
        two_pairs(*kinds, buffer_bytes) as (outer_left, inner_left, inner_right, outer_right),
        Mover(max_pipes) as mover,
    ):
        here = Bridged(outer_left, outer_right)
        exchange = Exchange(mover, inner_left, inner_right, here.ended, limits)
        exchange.start()
        await use(here)
        exchange.abort()
        assert inner_left.fileno() == inner_right.fileno() == -1


async def send_all(sock: trio.socket.SocketType, data: bytes) -> None:
    with memoryview(data) as rest:
        sent = 0
        while sent < len(data):
            sent += await sock.send(rest[sent:])


async def receive_exactly(sock: trio.socket.SocketType, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        some = await sock.recv(count - len(data))
        assert some, "ended too early"
        data += some
    return bytes(data)


async def receive_to_end(sock: trio.socket.SocketType) -> bytes:
    data = bytearray()
    while some := await sock.recv(1 << 20):
        data += some
    return bytes(data)


async def pass_on(source: trio.socket.SocketType, sink: trio.socket.SocketType, data: bytes) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send_all, source, data)
        assert await receive_exactly(sink, len(data)) == data


async def send_for_ever(sock: trio.socket.SocketType, data: bytes, pause_s: float = 0) -> None:
    while True:
        await send_all(sock, data)
        await trio.sleep(pause_s)


def finish(sock: trio.socket.SocketType) -> None:
    sock.shutdown(socket.SHUT_WR)


@pytest.fixture(params=[0, 64], ids=["copy", "splice"])
def max_pipes(request: pytest.FixtureRequest) -> int:
    count: int = request.param
    return count


@pytest.fixture(autouse=True)
def no_descriptor_is_left() -> Iterator[None]:
    before = len(list(Path("/proc/self/fd").iterdir()))
    yield
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize("left_kind", KINDS)
@pytest.mark.parametrize("right_kind", KINDS)
def test_megabytes_arrive_whole_in_both_directions_at_once(left_kind: Kind, right_kind: Kind, max_pipes: int) -> None:
    """Bulk goes through pipes where it may, and nowhere else."""
    data = MEGABYTE * 16

    async def use(bridge: Bridged) -> None:
        got: dict[str, str] = {}

        async def read(name: str, sock: trio.socket.SocketType) -> None:
            got[name] = hashlib.sha256(await receive_to_end(sock)).hexdigest()

        async def write(sock: trio.socket.SocketType) -> None:
            await send_all(sock, data)
            finish(sock)

        async with trio.open_nursery() as nursery:
            for name, sock in (("left", bridge.left), ("right", bridge.right)):
                nursery.start_soon(read, name, sock)
                nursery.start_soon(write, sock)
        assert set(got.values()) == {hashlib.sha256(data).hexdigest()}
        outcome = await bridge.end()
        assert (outcome.ending, outcome.left_to_right_bytes, outcome.right_to_left_bytes) == (
            "eof",
            len(data),
            len(data),
        )
        assert (outcome.spliced_bytes > len(data)) is (max_pipes > 0)

    in_trio(lambda: bridged(use, (left_kind, right_kind), max_pipes=max_pipes))()


@pytest.mark.parametrize("size", [1, BUFFER_BYTES - 1, BUFFER_BYTES, BUFFER_BYTES + 1, PIPE_BYTES, PIPE_BYTES + 1])
def test_a_message_of_any_size_comes_back_as_it_went(size: int, max_pipes: int) -> None:
    async def use(bridge: Bridged) -> None:
        data = (MEGABYTE * 2)[:size]
        for _ in range(3):
            await pass_on(bridge.left, bridge.right, data)
            await pass_on(bridge.right, bridge.left, data)

    in_trio(lambda: bridged(use, max_pipes=max_pipes))()


@pytest.mark.proves("F17")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_left_first", [True, False], ids=["left", "right"])
def test_one_side_may_finish_long_before_the_other(kind: Kind, is_left_first: bool) -> None:
    async def use(bridge: Bridged) -> None:
        first, second = (bridge.left, bridge.right) if is_left_first else (bridge.right, bridge.left)
        await send_all(first, b"question")
        finish(first)
        assert await receive_to_end(second) == b"question"
        for _ in range(3):
            await trio.sleep(0.02)
            await pass_on(second, first, MEGABYTE)
        assert bridge.outcome is None
        finish(second)
        assert await receive_to_end(first) == b""
        assert (await bridge.end()).ending == "eof"

    in_trio(lambda: bridged(use, (kind, kind)))()


@pytest.mark.parametrize("kind", KINDS)
def test_an_end_comes_after_the_bytes_before_it_even_if_the_sink_is_slow(kind: Kind, max_pipes: int) -> None:
    async def use(bridge: Bridged) -> None:
        async with trio.open_nursery() as nursery:

            async def write() -> None:
                await send_all(bridge.left, MEGABYTE * 8)
                finish(bridge.left)

            nursery.start_soon(write)
            got = bytearray()
            while some := await bridge.right.recv(100_000):
                got += some
                await trio.sleep(0.001)
        assert got == MEGABYTE * 8

    in_trio(lambda: bridged(use, (kind, kind), max_pipes=max_pipes))()


@pytest.mark.proves("D21")
def test_a_source_is_not_read_while_the_sink_takes_nothing(max_pipes: int) -> None:
    """What is held back is a buffer or a pipe, and what the kernel has room for; then the source has to wait."""

    async def use(bridge: Bridged) -> None:
        sent = 0
        while True:
            with trio.move_on_after(0.3) as waiting:
                sent += await bridge.left.send(MEGABYTE)
            if waiting.cancelled_caught:
                break
        assert sent < PIPE_BYTES + 16 * BUFFER_BYTES
        # The other direction goes on meanwhile.
        await send_all(bridge.right, b"still here")
        assert await receive_exactly(bridge.left, 10) == b"still here"
        finish(bridge.left)
        assert len(await receive_to_end(bridge.right)) == sent

    in_trio(lambda: bridged(use, max_pipes=max_pipes, buffer_bytes=BUFFER_BYTES))()


@pytest.mark.proves("F18")
@pytest.mark.parametrize("is_left", [True, False], ids=["left", "right"])
def test_a_reset_is_passed_on_as_one(is_left: bool) -> None:
    async def use(bridge: Bridged) -> None:
        one, other = (bridge.left, bridge.right) if is_left else (bridge.right, bridge.left)
        await send_all(one, b"half a")
        assert await receive_exactly(other, 6) == b"half a"
        reset(one)
        with pytest.raises(ConnectionResetError):
            await other.recv(1)
        assert (await bridge.end()).ending == "reset"

    in_trio(lambda: bridged(use))()


def reset(sock: trio.socket.SocketType) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    sock.close()


def test_a_reset_during_bulk_traffic_is_passed_on_and_frees_the_pipe() -> None:
    async def use(bridge: Bridged) -> None:
        async with trio.open_nursery() as nursery:

            async def write() -> None:
                with pytest.raises(ConnectionError):
                    await send_for_ever(bridge.left, MEGABYTE)

            nursery.start_soon(write)
            await receive_exactly(bridge.right, len(MEGABYTE))
            reset(bridge.right)
        assert (await bridge.end()).ending == "reset"

    in_trio(lambda: bridged(use, max_pipes=1))()


def test_an_answer_arrives_though_its_sender_has_left_without_reading_everything(max_pipes: int) -> None:
    """As from a web server that refuses a long upload. What it said before it left must not get lost with the reset."""

    async def use(bridge: Bridged) -> None:
        await send_all(bridge.left, b"x" * 1000)
        await send_all(bridge.right, b"too long")
        bridge.right.close()  # which resets the connection, because of the unread bytes
        with pytest.raises(ConnectionError):
            await send_for_ever(bridge.left, b"y", 0.01)
        assert (await bridge.end()).ending == "reset"

    async def answer_first(bridge: Bridged) -> None:
        await send_all(bridge.left, b"x" * 1000)
        await send_all(bridge.right, b"too long")
        bridge.right.close()
        assert await bridge.left.recv(100) == b"too long"

    in_trio(lambda: bridged(use, max_pipes=max_pipes))()
    in_trio(lambda: bridged(answer_first, max_pipes=max_pipes))()


def test_a_connection_that_leads_nowhere_ends_though_its_other_side_never_reads(max_pipes: int) -> None:
    """One side has gone; what it said before waits for the other side, which says something and reads nothing."""

    async def use(bridge: Bridged) -> None:
        with trio.move_on_after(0.3):
            await send_for_ever(bridge.right, MEGABYTE)
        reset(bridge.right)
        with suppress(ConnectionError):
            while bridge.outcome is None:
                await send_all(bridge.left, b"x")
                await trio.sleep(0.01)
        assert (await bridge.end()).ending == "reset"

    in_trio(lambda: bridged(use, max_pipes=max_pipes, buffer_bytes=BUFFER_BYTES))()


def test_a_sink_that_breaks_while_bytes_wait_for_it_ends_its_direction(max_pipes: int) -> None:
    async def use(bridge: Bridged) -> None:
        with trio.move_on_after(0.3):
            await send_for_ever(bridge.left, MEGABYTE)
        reset(bridge.right)
        assert (await bridge.end()).ending == "reset"

    in_trio(lambda: bridged(use, max_pipes=max_pipes, buffer_bytes=BUFFER_BYTES))()


def test_a_reset_is_no_reset_on_a_unix_socket_but_an_end() -> None:
    """The family has none; what must not happen is that the connection stays."""

    async def use(bridge: Bridged) -> None:
        reset(bridge.left)
        assert await bridge.right.recv(1) == b""
        assert (await bridge.end()).ending == "reset"

    in_trio(lambda: bridged(use, ("tcp", "unix")))()


def test_a_connection_on_which_nothing_moves_ends_and_one_on_which_something_does_stays() -> None:
    async def use(bridge: Bridged) -> None:
        began = trio.current_time()
        for _ in range(6):
            await trio.sleep(0.1)
            await send_all(bridge.right, b"x")
            await receive_exactly(bridge.left, 1)
        assert bridge.outcome is None
        assert (await bridge.end()).ending == "idle"
        assert trio.current_time() - began >= 0.6 + 0.3 - 0.05
        with pytest.raises(ConnectionResetError):  # not the look of a whole stream
            await bridge.left.recv(1)

    in_trio(lambda: bridged(use, limits=Limits(idle_s=0.3)))()


def test_a_connection_ends_when_its_life_is_over_though_it_is_busy() -> None:
    async def use(bridge: Bridged) -> None:
        with pytest.raises(ConnectionError):
            await send_for_ever(bridge.right, b"x", 0.01)
        assert (await bridge.end()).ending == "lifetime"

    in_trio(lambda: bridged(use, limits=Limits(idle_s=10, lifetime_s=0.3)))()


@pytest.mark.proves("F24")
def test_a_peer_that_never_finishes_is_waited_for_only_so_long_after_the_last_byte() -> None:
    async def use(bridge: Bridged) -> None:
        await trio.sleep(0.5)  # the limit does not hold before
        assert bridge.outcome is None
        finish(bridge.left)
        assert await receive_to_end(bridge.right) == b""
        for _ in range(5):
            await trio.sleep(0.1)
            await send_all(bridge.right, b"x")
            await receive_exactly(bridge.left, 1)
        assert (await bridge.end()).ending == "half_close_timeout"

    in_trio(lambda: bridged(use, limits=Limits(half_close_s=0.3)))()


def test_a_whole_exchange_within_all_limits_ends_as_one() -> None:
    async def use(bridge: Bridged) -> None:
        finish(bridge.left)
        finish(bridge.right)
        assert (await bridge.end()).ending == "eof"

    in_trio(lambda: bridged(use, limits=Limits(idle_s=30, lifetime_s=30, half_close_s=30)))()


def test_an_exchange_that_is_aborted_closes_both_sides_at_once_and_tells_nobody_of_an_end() -> None:
    async def use(bridge: Bridged) -> None:
        with trio.move_on_after(0.3):
            await send_for_ever(bridge.left, MEGABYTE)
        bridges.append(bridge)

    bridges: list[Bridged] = []
    in_trio(lambda: bridged(use, max_pipes=1))()  # which looks that both are closed
    assert [bridge.outcome for bridge in bridges] == [None]


def test_bytes_that_find_no_pipe_free_are_copied() -> None:
    """Those that wait for a slow sink keep theirs; everybody else must get on."""

    async def use(bridge: Bridged) -> None:
        for sock in (bridge.left, bridge.right):
            with trio.move_on_after(0.3):
                await send_for_ever(sock, MEGABYTE)
        async with trio.open_nursery() as nursery:
            for sock in (bridge.left, bridge.right):
                finish(sock)
                nursery.start_soon(receive_to_end, sock)
        outcome = await bridge.end()
        assert outcome.ending == "eof"
        assert 0 < outcome.spliced_bytes < outcome.left_to_right_bytes + outcome.right_to_left_bytes

    in_trio(lambda: bridged(use, max_pipes=1, buffer_bytes=BUFFER_BYTES))()


def test_a_family_that_knows_no_splice_is_served_by_copying(monkeypatch: pytest.MonkeyPatch) -> None:
    def splice_unknown(*_: object, **__: object) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "splice", splice_unknown)

    async def use(bridge: Bridged) -> None:
        await pass_on(bridge.left, bridge.right, MEGABYTE * 4)

    in_trio(lambda: bridged(use))()


# Whatever the two sides do, and in whatever order.

SIZES = [1, 100, BUFFER_BYTES - 1, BUFFER_BYTES, BUFFER_BYTES + 1, 300_000, PIPE_BYTES + 1]
ACTIONS = st.tuples(
    st.sampled_from(["left", "right"]), st.sampled_from(["send", "receive", "finish", "pause"]), st.sampled_from(SIZES)
)
Action = tuple[str, str, int]


class Side:
    """One side of the conversation: what it has said, and what it has heard."""

    def __init__(self, sock: socket.socket, seed: int) -> None:
        self.sock = sock
        self.noise = random.Random(seed)
        self.said = bytearray()
        self.heard = bytearray()
        self.has_finished = False

    def act(self, action: str, size: int) -> None:
        """Do as much as can be done at once."""
        with suppress(BlockingIOError):
            if action == "send" and not self.has_finished:
                data = self.noise.randbytes(size)
                self.said += data[: self.sock.send(data)]
            elif action == "receive":
                self.heard += self.sock.recv(size)
            elif action == "finish" and not self.has_finished:
                self.has_finished = True
                self.sock.shutdown(socket.SHUT_WR)

    async def hear_all(self) -> None:
        self.act("finish", 0)
        self.heard += await receive_to_end(trio.socket.from_stdlib_socket(self.sock))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=st.lists(ACTIONS, max_size=30), kinds=st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS)))
@example(actions=[("left", "send", PIPE_BYTES + 1)] * 8 + [("left", "finish", 1)], kinds=("tcp", "tcp"))
@example(
    actions=[("left", "send", 300_000), ("right", "finish", 1), ("left", "send", 300_000), ("right", "receive", 1)],
    kinds=("unix", "tcp"),
)
def test_no_order_of_events_loses_or_doubles_a_byte(
    actions: list[Action], kinds: tuple[Kind, Kind], max_pipes: int
) -> None:
    async def use(bridge: Bridged) -> None:
        sides = {"left": Side(bridge.left_outer, 1), "right": Side(bridge.right_outer, 2)}
        for name, action, size in actions:
            sides[name].act(action, size)
            for _ in range(3):
                await trio.lowlevel.checkpoint()
            if action == "pause":
                await trio.sleep(0.002)
        async with trio.open_nursery() as nursery:
            for side in sides.values():
                nursery.start_soon(side.hear_all)
        assert sides["right"].heard == sides["left"].said
        assert sides["left"].heard == sides["right"].said
        outcome = await bridge.end()
        assert outcome.ending == "eof"
        assert outcome.left_to_right_bytes == len(sides["left"].said)
        assert outcome.right_to_left_bytes == len(sides["right"].said)

    in_trio(lambda: bridged(use, kinds, max_pipes=max_pipes, buffer_bytes=BUFFER_BYTES))()
