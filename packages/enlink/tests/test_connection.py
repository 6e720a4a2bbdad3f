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
from enlink.connection import HYBRID_ANSWER_LIMIT_BYTES, Connection, Unreachable, connect_tcp, name_of, open_connection
from enlink.connection import resolve as resolve_name
from enlink.endpoint import Endpoint, HybridVsock, Systemd, Tcp, Unix, Vsock
from enlink.errors import NotPermitted, UsageError
from enlink.testing.hosts import Network
from trio.testing import MockClock, trio_test, wait_all_tasks_blocked

Arguments = ParamSpec("Arguments")

NAME = "server.example"
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


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the name service says to whoever asks for the one name; an exception is raised."""
    answer: list[Any] = []
    real = socket.getaddrinfo

    def getaddrinfo(host: Any, port: Any, family: int = 0, **rest: Any) -> Any:
        if host != NAME:
            return real(host, port, family, **rest)
        for exception in (item for item in answer if isinstance(item, Exception)):
            raise exception
        families = {len(item): socket.AF_INET if len(item) == 2 else socket.AF_INET6 for item in answer}
        return [(families[len(item)], 1, 6, "", item) for item in answer if family in (0, families[len(item)])]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return answer


@in_trio
async def test_every_address_of_a_name_is_tried_and_the_one_that_answers_is_the_peer(names: list[Any]) -> None:
    names += [("127.0.0.2", 0), (LOCALHOST, 0)]
    with listening() as sock:
        port = sock.getsockname()[1]
        assert await reached(Tcp(NAME, port)) == Tcp(LOCALHOST, port)
    assert await failure(Tcp(NAME, port)) == f"cannot connect to 127.0.0.1 port {port}: Connection refused"


@pytest.mark.proves("F28")
@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ([socket.gaierror(socket.EAI_NONAME, "Name or service not known")], "[Errno -2] Name or service not known"),
        ([UnicodeError("label too long")], "label too long"),
        ([], "it has no address"),
    ],
)
@in_trio
async def test_a_name_without_an_address_is_told(names: list[Any], answer: list[Any], reason: str) -> None:
    names += answer
    assert await failure(Tcp(NAME, 80)) == f"cannot resolve {NAME}: {reason}"


@in_trio
async def test_addresses_come_once_of_the_wanted_family_and_with_their_scope(names: list[Any]) -> None:
    names += [
        ("192.0.2.1", 0),
        ("192.0.2.1", 0),
        ("2001:db8::1", 0, 0, 0),
        ("fe80::1", 0, 0, 7),
        ("fe80::2%x", 0, 0, 7),
    ]
    six = ["2001:db8::1", "fe80::1%7", "fe80::2%x"]
    assert await resolve_name(Tcp(NAME, 80)) == ["192.0.2.1", *six]
    assert await resolve_name(Tcp(NAME, 80, 4)) == ["192.0.2.1"]
    assert await resolve_name(Tcp(NAME, 80, 6)) == six
    assert await resolve_name(Tcp("fe80::1%eth0", 80)) == ["fe80::1%eth0"]


@pytest.mark.proves("F26")
def test_silent_addresses_leave_the_others_their_share_of_the_deadline(
    monkeypatch: pytest.MonkeyPatch, clock: MockClock
) -> None:
    addresses = ["192.0.2.3", "192.0.2.4"]

    async def resolve(endpoint: Tcp) -> list[str]:
        return addresses

    async def main() -> None:
        assert await failure(Tcp(NAME, 7), 4) == "cannot connect to 192.0.2.4 port 7: no answer within 2 s"
        assert 4 <= trio.current_time() < 4.1
        addresses.append(LOCALHOST)
        with listening() as sock:
            port = sock.getsockname()[1]
            assert await reached(Tcp(NAME, port), 6) == Tcp(LOCALHOST, port)

    monkeypatch.setattr("enlink.connection.resolve", resolve)
    with Network() as network:
        here, there = network.host("here"), network.host("there")
        device, _ = network.connect(here, "192.0.2.1/24", there, "192.0.2.2/24")
        for nobody in ("192.0.2.3", "192.0.2.4"):
            here.run("ip", "neighbour", "add", nobody, "lladdr", "02:00:00:00:00:03", "dev", device)
        with here.entered():
            trio.run(main, clock=clock)


@in_trio
async def test_a_name_service_that_hangs_is_given_up_at_the_deadline(
    clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hang(endpoint: Tcp) -> list[str]:
        await trio.sleep_forever()
        raise AssertionError

    monkeypatch.setattr("enlink.connection.resolve", hang)
    assert await failure(Tcp(NAME, 80), 3) == f"cannot resolve {NAME}: no answer within 3 s"
    assert trio.current_time() == 3


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
async def test_whoever_never_answers_is_given_up_at_the_deadline(tmp_path: Path, clock: MockClock) -> None:
    with listening(path := f"{tmp_path}/v.sock"):
        text = f"cannot connect to unix-vsock:{path}:8888: no answer within 3 s"
        assert await failure(HybridVsock(path, 8888), 3) == text
        assert trio.current_time() == 3


# Vsock, as far as it goes without a machine at the other end: see test_real_vsock.py.


@pytest.mark.proves("F26")
@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.ECONNRESET, "nobody listens there"),
        (errno.ENODEV, "no vsock transport leads to that cid: check the cid, and load vhost_vsock on a host of guests"),
        (errno.ETIMEDOUT, "no machine with that cid answers"),
        (errno.ENOBUFS, "No buffer space available"),
        (None, "no answer within 3 s"),
    ],
)
@in_trio
async def test_what_vsock_means_by_its_errors_is_told(
    clock: MockClock, monkeypatch: pytest.MonkeyPatch, number: int | None, reason: str
) -> None:
    asked = []

    async def connect(sock: trio.socket.SocketType, address: Any) -> None:
        asked.append((sock.family, address))
        await trio.sleep(1 if number else 100)
        if number:
            raise OSError(number, f"Error connecting to {address}")

    monkeypatch.setattr("trio._socket._SocketType.connect", connect)
    assert await failure(Vsock(16, 8888), 3) == f"cannot connect to vsock://16:8888: {reason}"
    assert asked == [(socket.AF_VSOCK, (16, 8888))]


@in_trio
async def test_whoever_answers_on_vsock_is_the_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    async def connect(sock: trio.socket.SocketType, address: Any) -> None:
        await trio.lowlevel.checkpoint()

    monkeypatch.setattr("trio._socket._SocketType.connect", connect)
    assert await reached(Vsock(3, 8443)) == Vsock(3, 8443)


@in_trio
async def test_a_process_that_may_not_use_vsock_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*arguments: Any) -> Any:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(trio.socket, "socket", forbidden)
    with pytest.raises(NotPermitted, match="a seccomp profile forbids it, as Docker's default one does"):
        await open_connection(Vsock(3, 8443), 5)


# Names.


@pytest.mark.parametrize("endpoint", [Tcp(None, 80), Vsock(None, 80), Systemd("web")])
@in_trio
async def test_what_can_only_be_listened_on_is_refused(endpoint: Endpoint) -> None:
    with pytest.raises(UsageError, match="can only be listened on"):
        await open_connection(endpoint, 1)


@pytest.mark.parametrize(
    ("family", "address", "endpoint"),
    [
        (socket.AF_INET, ("192.0.2.1", 80), Tcp("192.0.2.1", 80)),
        (socket.AF_INET6, ("2001:db8::1", 80, 0, 0), Tcp("2001:db8::1", 80)),
        (socket.AF_INET6, ("fe80::1", 80, 0, 2), Tcp("fe80::1%2", 80)),
        (socket.AF_VSOCK, (3, 1024), Vsock(3, 1024)),
        (socket.AF_UNIX, "/run/app", Unix("/run/app")),
        (socket.AF_UNIX, b"\0app", Unix("@app")),
        (socket.AF_UNIX, "", Unix("")),
        (socket.AF_UNIX, None, Unix("")),
    ],
)
def test_a_sockets_address_becomes_an_endpoint(family: int, address: Any, endpoint: Endpoint) -> None:
    assert name_of(family, address) == endpoint


@in_trio
async def test_a_mark_needs_a_right() -> None:
    with listening() as sock, pytest.MonkeyPatch.context() as patch:

        def setsockopt(*arguments: Any) -> None:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

        port = sock.getsockname()[1]
        patch.setattr("trio._socket._SocketType.setsockopt", setsockopt)
        with pytest.raises(
            NotPermitted, match=f"cannot mark the connection to 127.0.0.1 port {port}: needs CAP_NET_ADM"
        ):
            await connect_tcp(LOCALHOST, port, 5, mark=1)
