"""Connecting to every kind of endpoint: who answers, who does not, and what is said of it."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

import pytest
import trio
from enlink.attempt import HYBRID_ANSWER_LIMIT_BYTES, Attempt, Found, connect_tcp, open_connection
from enlink.connection import Connection, Unreachable
from enlink.endpoint import Endpoint, HybridVsock, Systemd, Tcp, Unix, Vsock
from enlink.errors import NotPermitted, UsageError
from enlink.pump import Pump
from enlink.testing.hosts import Network
from enlink.testing.programs import until
from trio.testing import MockClock, trio_test, wait_all_tasks_blocked

Arguments = ParamSpec("Arguments")

PATIENCE_S = 50  # for what takes a moment on a machine with nothing else to do
LOCALHOST = "127.0.0.1"


def in_trio(test: Callable[Arguments, Awaitable[None]]) -> Callable[Arguments, None]:
    """Run a test in trio, by the clock among its arguments, and fail if everybody in it waits for ever."""

    @trio_test
    @wraps(test)
    async def bounded(*arguments: Arguments.args, **named: Arguments.kwargs) -> None:
        with trio.fail_after(100_000 if "clock" in named else PATIENCE_S):
            await test(*arguments, **named)

    return bounded


@pytest.fixture
def clock() -> MockClock:
    """Time that passes while everybody waits."""
    return MockClock(autojump_threshold=0)


@pytest.fixture(autouse=True)
def descriptors() -> Iterator[None]:
    """Whatever a test does, it leaves open what was open before."""
    before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208  # the names are all there is to it
    yield
    assert set(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


@contextmanager
def listening(where: Any = (LOCALHOST, 0), backlog: int = 16) -> Iterator[socket.socket]:
    family = socket.AF_UNIX if isinstance(where, str) else socket.AF_INET6 if ":" in where[0] else socket.AF_INET
    with socket.socket(family) as sock:
        sock.bind(where)
        sock.listen(backlog)
        yield sock


async def reached(endpoint: Endpoint, deadline_s: float = PATIENCE_S) -> Endpoint:
    """The peer that answers. Closes the connection."""
    connection = await open_connection(endpoint, deadline_s)
    with connection.socket:
        return connection.peer


async def failure(endpoint: Endpoint, deadline_s: float = PATIENCE_S) -> str:
    with pytest.raises(Unreachable) as raised:
        await open_connection(endpoint, deadline_s)
    assert raised.value.exit_code == 69
    return str(raised.value)


# TCP.


@pytest.mark.parametrize("address", [LOCALHOST, "::1"])
@in_trio
async def test_an_address_is_reached(address: str) -> None:
    with listening((address, 0)) as sock:
        endpoint = Tcp(address, sock.getsockname()[1])
        assert await reached(endpoint) == endpoint


@pytest.mark.proves("F26")
@in_trio
async def test_an_address_that_is_silent_is_given_up_at_the_deadline() -> None:
    """Its backlog is full, so that it answers nobody."""
    with listening(backlog=0) as sock, socket.create_connection(sock.getsockname()):
        port = sock.getsockname()[1]
        text = f"cannot connect to 127.0.0.1 port {port}: no answer within 0.1 s"
        assert await failure(Tcp(LOCALHOST, port), 0.1) == text
        with trio.move_on_after(0.1) as scope:
            await open_connection(Tcp(LOCALHOST, port), PATIENCE_S)
        assert scope.cancelled_caught


@in_trio
async def test_an_address_may_name_the_device_that_leads_to_it() -> None:
    assert (await failure(Tcp("fe80::1%lo", 80))).startswith("cannot connect to fe80::1%lo port 80: ")
    missing = "cannot connect to fe80::1%nodev port 80: there is no network device nodev here"
    assert await failure(Tcp("fe80::1%nodev", 80)) == missing


def test_the_loopback_of_an_enclave_is_told_from_a_network_that_is_not_there() -> None:
    async def main() -> None:
        for address in (LOCALHOST, "::1"):
            text = await failure(Tcp(address, 80))
            assert text.startswith(f"cannot connect to {address} port 80: ")
            assert text.endswith("the loopback device is down: bring lo up, as relay does with --setup-loopback")
        assert await failure(Tcp("192.0.2.1", 80)) == "cannot connect to 192.0.2.1 port 80: Network is unreachable"

    with Network() as network:
        host = network.host("enclave")
        host.run("ip", "link", "set", "lo", "down")
        host.run("ip", "address", "flush", "dev", "lo")
        with host.entered():
            trio.run(main)


@in_trio
async def test_connecting_that_is_cancelled_leaves_nothing_open(tmp_path: Path) -> None:
    with listening() as sock, listening(path := f"{tmp_path}/v.sock"):
        for endpoint in (Tcp(*sock.getsockname()), Unix(path), HybridVsock(path, 1)):
            with trio.CancelScope() as scope:
                scope.cancel()
                await open_connection(endpoint, PATIENCE_S)
            assert scope.cancelled_caught


@in_trio
async def test_a_connection_that_was_made_before_the_cancellation_is_not_lost(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its task has been woken for it, and gets it."""
    scope = trio.CancelScope()
    really = Pump.wake

    def wake(pump: Pump, *arguments: Any) -> None:
        really(pump, *arguments)
        scope.cancel()

    with listening(path := f"{tmp_path}/app", backlog=0) as sock, socket.socket(socket.AF_UNIX) as first:
        first.connect(path)
        with monkeypatch.context() as patch, scope:
            patch.setattr(Pump, "wake", wake)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(accept_soon, sock)
                connection = await open_connection(Unix(path), PATIENCE_S)
        connection.socket.close()
        assert scope.cancel_called


async def accept_soon(sock: socket.socket) -> None:
    await trio.sleep(0.05)
    sock.accept()[0].close()


# Unix.


@pytest.mark.parametrize("is_abstract", [False, True])
@in_trio
async def test_a_unix_socket_is_reached_at_its_path_or_by_its_name(tmp_path: Path, is_abstract: bool) -> None:
    endpoint = Unix(f"@{tmp_path}" if is_abstract else f"{tmp_path}/app")
    with listening(endpoint.address):
        assert await reached(endpoint) == endpoint


@pytest.mark.proves("F26")
@in_trio
async def test_why_a_unix_socket_is_not_reached_is_told(tmp_path: Path) -> None:
    path = f"{tmp_path}/app"
    where = f"cannot connect to unix:{path}: "
    assert await failure(Unix(path)) == f"{where}there is no such socket: start the program that listens on it"
    with listening(path):
        pass
    assert await failure(Unix(path)) == f"{where}nobody listens there any more: start the program that does"
    path = f"{tmp_path}/datagrams"
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as datagrams:
        datagrams.bind(path)
        assert (await failure(Unix(path))).endswith("/datagrams: Protocol wrong type for socket")


@in_trio
async def test_a_full_backlog_is_waited_for_and_never_taken_for_a_connection(tmp_path: Path, clock: MockClock) -> None:
    """Unlike TCP, a unix socket then answers EAGAIN, which looks like a connection under way."""
    path = f"{tmp_path}/app"
    with listening(path, backlog=0) as sock:
        first = await open_connection(Unix(path), 1)
        assert await failure(Unix(path), 3) == f"cannot connect to unix:{path}: no answer within 3 s"
        assert trio.current_time() == 3
        connections: list[Connection] = []
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def dial() -> None:
                connections.append(await open_connection(Unix(path), 5))

            await trio.sleep(1)
            assert not connections
            sock.accept()[0].close()
        second = sock.accept()[0]
        await connections[0].socket.send(b"hello")
        assert second.recv(5) == b"hello"
        for opened in (first.socket, second, connections[0].socket):
            opened.close()


# Hybrid vsock.


class Firecracker:
    """The host's end of a guest's vsock, as far as the greeting goes.

    Attributes:
        ports: who listens in the guest.
        pieces: what is answered to those who ask for such a port, one by one, each once the one before was read.
        asked: what was asked for.
    """

    def __init__(self) -> None:
        self.ports = {8888}
        self.pieces = [b"OK 1073741824\n"]
        self.asked: list[bytes] = []

    async def serve(self, stream: trio.SocketStream) -> None:
        async with stream:
            line = b""
            while not line.endswith(b"\n"):
                line += await stream.receive_some()
            self.asked.append(line)
            if line not in {b"CONNECT %d\n" % port for port in self.ports}:
                return
            for piece in self.pieces:
                await stream.send_all(piece)
                await wait_all_tasks_blocked()
            async for data in stream:
                await stream.send_all(data)


@asynccontextmanager
async def firecracker(path: str) -> AsyncIterator[Firecracker]:
    peer = Firecracker()
    with trio.socket.socket(socket.AF_UNIX) as sock:
        await sock.bind(path)
        sock.listen(16)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, peer.serve, [trio.SocketListener(sock)])
            yield peer
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "pieces",
    [
        [b"OK 1073741824\n"],
        [b"OK 8888\n"],
        [bytes([byte]) for byte in b"OK 1073741824\n"],
        [b"OK", b" 5\n"],
    ],
    ids=["whole", "short", "byte by byte", "in two"],
)
@in_trio
async def test_a_port_of_the_guest_is_asked_for_and_what_follows_is_the_guests(
    tmp_path: Path, pieces: list[bytes]
) -> None:
    async with firecracker(path := f"{tmp_path}/v.sock") as peer:
        peer.pieces = [*pieces[:-1], pieces[-1] + b"\nOK greetings"]
        connection = await open_connection(HybridVsock(path, 8888), PATIENCE_S)
        assert connection.peer == HybridVsock(path, 8888)
        assert peer.asked == [b"CONNECT 8888\n"]
        async with trio.SocketStream(connection.socket) as stream:
            assert await stream.receive_some(100) == b"\nOK greetings"
            await stream.send_all(b"hello")
            assert await stream.receive_some(100) == b"hello"


@pytest.mark.proves("F26")
@in_trio
async def test_a_port_that_nobody_listens_on_is_refused_without_a_word(tmp_path: Path) -> None:
    async with firecracker(path := f"{tmp_path}/v.sock") as peer:
        text = await failure(HybridVsock(path, 4294967294))
        assert (
            text == f"cannot connect to unix-vsock:{path}:4294967294: refused: nobody listens on that port of the guest"
        )
        assert peer.asked == [b"CONNECT 4294967294\n"]
    assert "nobody listens there any more" in await failure(HybridVsock(path, 8888))


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n", b"HTTP/1.1 400 Bad Request\r\n"),
        (b"OK\n", b"OK\n"),
        (b"OK -1\n", b"OK -1\n"),
        (b"ok 5\n", b"ok 5\n"),
        (b"\n", b"\n"),
        (b"\0\xff\n", b"\0\xff\n"),
        (b"OK " + b"1" * 100, (b"OK " + b"1" * 100)[:HYBRID_ANSWER_LIMIT_BYTES]),
        (b"x" * 32, b"x" * 32),
    ],
)
@in_trio
async def test_whoever_answers_something_else_is_no_guests_vsock(tmp_path: Path, answer: bytes, shown: bytes) -> None:
    async with firecracker(path := f"{tmp_path}/v.sock") as peer:
        peer.pieces = [answer]
        assert await failure(HybridVsock(path, 8888)) == (
            f"cannot connect to unix-vsock:{path}:8888: the answer is {shown!r}, not OK:"
            " is this the socket of a guest's vsock?"
        )


@in_trio
async def test_an_answer_that_is_cut_off_is_none(tmp_path: Path) -> None:
    path = f"{tmp_path}/v.sock"
    with listening(path) as sock:
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def answer_half() -> None:
                accepted, _ = await trio.to_thread.run_sync(sock.accept)
                with accepted:
                    accepted.recv(100)
                    accepted.send(b"OK 5")

            assert "the answer is b'OK 5', not OK" in await failure(HybridVsock(path, 8888))


@in_trio
async def test_whoever_leaves_without_reading_has_refused(tmp_path: Path) -> None:
    with listening(path := f"{tmp_path}/v.sock") as sock:

        def leave() -> None:
            accepted, _ = sock.accept()
            with accepted:
                accepted.recv(1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, leave)
            text = await failure(HybridVsock(path, 8888))
    assert text == f"cannot connect to unix-vsock:{path}:8888: refused: nobody listens on that port of the guest"


@in_trio
async def test_whoever_never_answers_is_given_up_at_the_deadline(tmp_path: Path, clock: MockClock) -> None:
    with listening(path := f"{tmp_path}/v.sock"):
        text = f"cannot connect to unix-vsock:{path}:8888: no answer within 3 s"
        assert await failure(HybridVsock(path, 8888), 3) == text
        assert trio.current_time() == 3


# Vsock, as far as it goes without a machine at the other end: see test_real_vsock.py.


class FakeVsock(socket.socket):
    """A socket that passes for one of vsock, whose connect(2) answers as it is told, and under way before that."""

    codes: list[int]
    asked: list[tuple[int, Any]]

    def connect_ex(self, address: Any) -> int:
        self.asked.append((self.family, address))
        return self.codes.pop(0)


@pytest.fixture
def fake_vsock(monkeypatch: pytest.MonkeyPatch) -> type[FakeVsock]:
    """Whatever is opened for vsock is a FakeVsock, of a family that may wait for ever."""
    FakeVsock.asked = []

    def open_socket(buffer_bytes: int | None) -> socket.socket:
        fake = FakeVsock(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        fake.bind("")
        return fake

    monkeypatch.setattr("enlink.vsock.open_socket", open_socket)
    monkeypatch.setattr("enlink.vsock.outlast", lambda *_: None)
    return FakeVsock


@pytest.mark.proves("F26")
@pytest.mark.parametrize(
    ("codes", "reason"),
    [
        ([errno.ECONNRESET], "nobody listens there"),
        ([errno.EINPROGRESS, errno.EALREADY, errno.ECONNRESET], "nobody listens there"),
        (
            [errno.ENODEV],
            "no vsock transport leads to that cid: check the cid, and load vhost_vsock on a host of guests",
        ),
        ([errno.EINPROGRESS, errno.ETIMEDOUT], "no machine with that cid answers"),
        ([errno.ENOBUFS], "No buffer space available"),
        ([errno.EINPROGRESS] + [errno.EALREADY] * 1_000_000, "no answer within 0.1 s"),
    ],
)
@in_trio
async def test_what_vsock_means_by_its_errors_is_told(
    fake_vsock: type[FakeVsock], codes: list[int], reason: str
) -> None:
    fake_vsock.codes = list(codes)
    assert await failure(Vsock(16, 8888), 0.1) == f"cannot connect to vsock://16:8888: {reason}"
    assert set(fake_vsock.asked) == {(socket.AF_UNIX, (16, 8888))}


@pytest.mark.parametrize("codes", [[0], [errno.EINPROGRESS, errno.EALREADY, errno.EALREADY, errno.EISCONN]])
@in_trio
async def test_whoever_answers_on_vsock_is_connected_however_often_one_has_to_look(
    fake_vsock: type[FakeVsock], codes: list[int]
) -> None:
    fake_vsock.codes = list(codes)
    found: list[Found] = []
    Attempt(Vsock(3, 8443), PATIENCE_S, found.append).start()
    await until(lambda: bool(found))
    (sock,) = found
    assert isinstance(sock, FakeVsock)
    sock.close()


@in_trio
async def test_a_process_that_may_not_use_vsock_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "__init__", refuse)
    with pytest.raises(NotPermitted, match="a seccomp profile forbids it, as Docker's default one does"):
        await open_connection(Vsock(3, 8443), 5)
    monkeypatch.undo()


# What is no address.


@pytest.mark.parametrize("endpoint", [Tcp(None, 80), Vsock(None, 80), Systemd("web")])
@in_trio
async def test_what_can_only_be_listened_on_is_refused(endpoint: Endpoint) -> None:
    with pytest.raises(UsageError, match="can only be listened on"):
        await open_connection(endpoint, 1)


@in_trio
async def test_a_name_is_not_looked_up_in_passing() -> None:
    with pytest.raises(UsageError, match=r"server\.example is no address: look the name up before"):
        await open_connection(Tcp("server.example", 80), 1)


@in_trio
async def test_a_mark_needs_a_right(monkeypatch: pytest.MonkeyPatch) -> None:
    with listening() as sock:
        port = sock.getsockname()[1]
        monkeypatch.setattr(socket.socket, "setsockopt", refuse)
        with pytest.raises(
            NotPermitted, match=f"cannot mark the connection to 127.0.0.1 port {port}: needs CAP_NET_ADM"
        ):
            await connect_tcp(LOCALHOST, port, 5, mark=1)
        monkeypatch.undo()


def refuse(*_: Any) -> Any:
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
