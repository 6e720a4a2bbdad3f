"""Listening: on every kind of endpoint, in hosts made of namespaces, and against others who want the same place."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

import pytest
import trio
from enlink.connection import Unreachable, connect_tcp
from enlink.endpoint import Tcp
from enlink.errors import NotPermitted, Unavailable
from enlink.listener import BIND_PATIENCE_S, listen_tcp
from enlink.testing.hosts import Host, Network
from trio.testing import MockClock, trio_test

Arguments = ParamSpec("Arguments")

OWN_NAME = Path("/proc/self/comm").read_text().strip()
PATIENCE_S = 50  # for what takes a moment on a machine with nothing else to do
CAP_NET_BIND_SERVICE = 10  # linux/capability.h
LOCALHOST, ELSEWHERE = "127.0.0.1", "127.0.0.2"


def in_trio(test: Callable[Arguments, Awaitable[None]]) -> Callable[Arguments, None]:
    """Run a test in trio, by the clock among its arguments, and fail if everybody in it waits for ever."""

    @trio_test
    @wraps(test)
    async def bounded(*arguments: Arguments.args, **named: Arguments.kwargs) -> None:
        with trio.fail_after(100_000 if {"clock", "still_clock"} & set(named) else PATIENCE_S):
            await test(*arguments, **named)

    return bounded


@pytest.fixture
def clock() -> MockClock:
    """Time that passes while everybody waits."""
    return MockClock(autojump_threshold=0)


@pytest.fixture
def still_clock() -> MockClock:
    """Time that passes only when a test says so, however long threads and the kernel take."""
    return MockClock()


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Network() as network:
        yield network.host("one")


@contextmanager
def listening(address: str = LOCALHOST, port: int = 0) -> Iterator[int]:
    """Somebody listens, and the kernel accepts for it."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((address, port))
        sock.listen()
        yield sock.getsockname()[1]


def free_port() -> int:
    with listening() as port:
        return port


@contextmanager
def without_capabilities(*numbers: int) -> Iterator[None]:
    """Take effective capabilities from the calling thread for a while."""

    class Header(ctypes.Structure):
        _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]

    libc = ctypes.CDLL(None, use_errno=True)
    header, before, after = Header(0x20080522, 0), (ctypes.c_uint32 * 6)(), (ctypes.c_uint32 * 6)()
    assert libc.capget(ctypes.byref(header), before) == 0
    for index, word in enumerate(before):
        after[index] = word
    after[0] &= ~sum(1 << number for number in numbers)  # the first word is the effective set
    assert libc.capset(ctypes.byref(header), after) == 0
    try:
        yield
    finally:
        assert libc.capset(ctypes.byref(header), before) == 0


async def dial(address: str, port: int) -> trio.SocketStream:
    return trio.SocketStream((await connect_tcp(address, port, PATIENCE_S)).socket)


async def peer_of(stream: trio.SocketStream) -> str:
    """The address that was dialled. Closes the stream."""
    async with stream:
        return str(stream.socket.getpeername()[0])


# TCP.


async def close_all(listeners: list[trio.SocketListener]) -> None:
    for listener in listeners:
        await listener.aclose()


def addresses_of(listeners: list[trio.SocketListener]) -> list[tuple[str, int]]:
    return [listener.socket.getsockname()[:2] for listener in listeners]


@in_trio
async def test_without_a_host_every_address_is_listened_on() -> None:
    port = free_port()
    listeners = await listen_tcp(Tcp(None, port))
    assert addresses_of(listeners) == [("0.0.0.0", port), ("::", port)]
    for address in (LOCALHOST, ELSEWHERE, "::1"):
        assert await peer_of(await dial(address, port)) == address
    await close_all(listeners)


@pytest.mark.parametrize(("address", "other"), [(LOCALHOST, ELSEWHERE), ("::1", LOCALHOST)])
@in_trio
async def test_with_a_host_only_that_one_is_listened_on(address: str, other: str) -> None:
    listeners = await listen_tcp(Tcp(address, 0))
    ((_, port),) = addresses_of(listeners)
    assert await peer_of(await dial(address, port)) == address
    with pytest.raises(Unreachable, match="refused"):
        await dial(other, port)
    await close_all(listeners)


def test_a_host_whose_ipv6_is_switched_off_is_listened_on_all_the_same() -> None:
    async def main() -> None:
        listeners = await listen_tcp(Tcp(None, 6980))
        assert await peer_of(await dial(LOCALHOST, 6980)) == LOCALHOST
        await close_all(listeners)

    with Network() as network:
        host = network.host("old")
        host.run("sysctl", "-q", "-w", "net.ipv6.conf.all.disable_ipv6=1")
        with host.entered():
            trio.run(main)


@pytest.mark.parametrize("number", [errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL])
@in_trio
async def test_a_kernel_without_ipv6_is_listened_on_all_the_same(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    real = trio.socket.socket

    def without_ipv6(family: int, *rest: Any) -> trio.socket.SocketType:
        if family == socket.AF_INET6:
            raise OSError(number, os.strerror(number))
        return real(family, *rest)

    monkeypatch.setattr(trio.socket, "socket", without_ipv6)
    listeners = await listen_tcp(Tcp(None, 0))
    assert [address for address, _ in addresses_of(listeners)] == ["0.0.0.0"]
    await close_all(listeners)
    # Asked for by name, it is missed.
    with pytest.raises(Unavailable, match=r"cannot listen on \[::1\]:6980: "):
        await listen_tcp(Tcp("::1", 6980))


@pytest.mark.parametrize(
    ("endpoint", "text"),
    [
        (Tcp("192.0.2.77", 6980), "cannot listen on 192.0.2.77:6980: Cannot assign requested address"),
        (Tcp("2001:db8::77", 6980), "cannot listen on [2001:db8::77]:6980: Cannot assign requested address"),
        (Tcp("gateway.example", 6980), "cannot listen on gateway.example:6980: Name or service not known"),
    ],
)
@in_trio
async def test_an_address_that_is_not_ours_is_told_at_once(
    still_clock: MockClock, monkeypatch: pytest.MonkeyPatch, endpoint: Tcp, text: str
) -> None:
    real = socket.getaddrinfo

    def without_names(host: Any, *rest: Any, **named: Any) -> Any:
        if host == "gateway.example":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return real(host, *rest, **named)

    monkeypatch.setattr(socket, "getaddrinfo", without_names)
    with pytest.raises(Unavailable) as raised:
        await listen_tcp(endpoint)
    assert (str(raised.value), raised.value.exit_code) == (text, 69)
    assert trio.current_time() == 0


@pytest.mark.proves("F67")
@pytest.mark.parametrize(("address", "shown"), [(LOCALHOST, "127.0.0.1:{}"), ("::1", "[::1]:{}"), (None, "0.0.0.0:{}")])
@in_trio
async def test_who_has_the_port_is_named_after_some_patience(clock: MockClock, address: str | None, shown: str) -> None:
    before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208  # the names are all there is to it
    with listening(address or LOCALHOST) as port, pytest.raises(Unavailable) as raised:
        await listen_tcp(Tcp(address, port))
    holder = f"{OWN_NAME} (pid {os.getpid()})"
    assert str(raised.value) == f"cannot listen on {shown.format(port)}: {holder} has the port"
    assert BIND_PATIENCE_S <= trio.current_time() <= BIND_PATIENCE_S + 1
    assert set(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


@pytest.mark.proves("F67")
@in_trio
async def test_whoever_has_the_second_of_two_addresses_gets_the_first_one_freed(clock: MockClock) -> None:
    with listening("::1") as port:
        with pytest.raises(Unavailable, match=r"cannot listen on \[::\]:\d+: .* has the port"):
            await listen_tcp(Tcp(None, port))
        with listening(LOCALHOST, port):
            pass


@pytest.mark.proves("F67")
def test_a_holder_that_proc_does_not_show_is_another_process(host: Host, clock: MockClock, monkeypatch: Any) -> None:
    # Bound but not listening: nobody can be found in the kernel's table of listeners.
    async def main() -> None:
        with socket.socket() as sock:
            sock.bind((LOCALHOST, 6980))
            with pytest.raises(Unavailable) as raised:
                await listen_tcp(Tcp(LOCALHOST, 6980))
        assert str(raised.value) == "cannot listen on 127.0.0.1:6980: another process has the port"

    with host.entered():
        trio.run(main, clock=clock)


@pytest.mark.proves("F67")
@in_trio
async def test_waiting_for_a_port_can_be_cancelled(clock: MockClock) -> None:
    with listening() as port:
        async with trio.open_nursery() as nursery:
            listeners: list[trio.SocketListener] = []

            @nursery.start_soon
            async def start() -> None:
                listeners.extend(await listen_tcp(Tcp(LOCALHOST, port)))

            await trio.sleep(BIND_PATIENCE_S / 2)
            nursery.cancel_scope.cancel()
    assert not listeners
    with listening(LOCALHOST, port):
        pass


@pytest.mark.proves("F67")
@in_trio
async def test_a_port_that_becomes_free_is_taken(clock: MockClock) -> None:
    listeners: list[trio.SocketListener] = []
    async with trio.open_nursery() as nursery:
        with listening() as port:

            @nursery.start_soon
            async def start() -> None:
                listeners.extend(await listen_tcp(Tcp(LOCALHOST, port)))

            await trio.sleep(BIND_PATIENCE_S / 2)
            assert not listeners
    assert addresses_of(listeners) == [(LOCALHOST, port)]
    await close_all(listeners)


@pytest.mark.proves("F67")
@in_trio
async def test_a_restart_does_not_wait_for_old_connections(still_clock: MockClock) -> None:
    """Connections of before may be in TIME_WAIT for a minute, and in FIN_WAIT for as long as their peers like."""
    port = free_port()
    ends = []
    for _ in range(3):
        (listener,) = await listen_tcp(Tcp(LOCALHOST, port))
        ends.append(await dial(LOCALHOST, port))
        accepted = await listener.accept()
        await listener.aclose()
        await accepted.aclose()  # the first to close is the one that waits
    for end in ends[:-1]:
        await end.aclose()
    states = [line.split()[3] for line in connection_table() if f":{port:04X} " in line]
    assert "06" in states  # TIME_WAIT
    await close_all(await listen_tcp(Tcp(LOCALHOST, port)))
    assert trio.current_time() == 0
    await ends[-1].aclose()


def connection_table() -> list[str]:
    return Path("/proc/thread-self/net/tcp").read_text().splitlines()


@pytest.mark.proves("F67")
@in_trio
async def test_the_holder_is_named_on_a_kernel_without_ipv6_too(
    clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.read_text

    def without_ipv6(path: Path) -> str:
        if path.name == "tcp6":
            raise FileNotFoundError
        return real(path)

    monkeypatch.setattr(Path, "read_text", without_ipv6)
    with listening() as port, pytest.raises(Unavailable, match=rf"pid {os.getpid()}\) has the port"):
        await listen_tcp(Tcp(LOCALHOST, port))


def test_a_low_port_needs_a_right(host: Host) -> None:
    async def main() -> None:
        with pytest.raises(NotPermitted) as raised, without_capabilities(CAP_NET_BIND_SERVICE):
            await listen_tcp(Tcp(LOCALHOST, 7))
        assert str(raised.value) == "cannot listen on 127.0.0.1:7: ports below 1024 need CAP_NET_BIND_SERVICE"
        assert raised.value.exit_code == 77
        await close_all(await listen_tcp(Tcp(LOCALHOST, 7)))

    with host.entered():
        trio.run(main)
