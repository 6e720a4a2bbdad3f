"""Listening: on every kind of endpoint, in hosts made of namespaces, and against others who want the same place."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

import pytest
import trio
from enlink.attempt import connect_tcp, open_connection
from enlink.connection import Unreachable
from enlink.endpoint import Endpoint, HybridVsock, Systemd, Tcp, Unix, Vsock
from enlink.errors import CannotCreate, ConfigError, NotPermitted, Unavailable
from enlink.listener import BACKLOG, BIND_PATIENCE_S, accept, listen_tcp, listening
from enlink.testing.hosts import Host, Network
from trio.testing import MockClock, trio_test

Arguments = ParamSpec("Arguments")

OWN_NAME = Path("/proc/self/comm").read_text().strip()
NOT_OURS = "write an address that a device of this machine has, or :6980 for all"
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
def listener_at(address: str = LOCALHOST, port: int = 0) -> Iterator[int]:
    """Somebody listens, and the kernel accepts for it."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((address, port))
        sock.listen()
        yield sock.getsockname()[1]


def free_port() -> int:
    with listener_at() as port:
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
async def test_the_port_that_the_kernel_chooses_is_the_same_on_every_address() -> None:
    listeners = await listen_tcp(Tcp(None, 0))
    ports = [listener.socket.getsockname()[1] for listener in listeners]
    assert len(ports) == 2
    assert ports[0] == ports[1] != 0
    for listener in listeners:
        listener.socket.close()


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
    ("endpoint", "reason"),
    [
        (Tcp("192.0.2.77", 6980), f"Cannot assign requested address; {NOT_OURS}"),
        (Tcp("2001:db8::77", 6980), f"Cannot assign requested address; {NOT_OURS}"),
        (Tcp("gateway.example", 6980), "Name or service not known; write an address of this machine, or :6980 for all"),
        (Tcp("fe80::1%nodev", 6980), "there is no network device nodev here; write one that `ip link` shows"),
        (Tcp("fe80::1", 6980), "Invalid argument; write its network device too, as in fe80::1%eth0"),
    ],
)
@in_trio
async def test_an_address_that_is_not_ours_is_told_at_once(
    still_clock: MockClock, monkeypatch: pytest.MonkeyPatch, endpoint: Tcp, reason: str
) -> None:
    real = socket.getaddrinfo

    def without_names(host: Any, *rest: Any, **named: Any) -> Any:
        if host == "gateway.example":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return real(host, *rest, **named)

    monkeypatch.setattr(socket, "getaddrinfo", without_names)
    with pytest.raises(Unavailable) as raised:
        await listen_tcp(endpoint)
    where = str(endpoint).removeprefix("tcp://")
    assert (str(raised.value), raised.value.exit_code) == (f"cannot listen on {where}: {reason}", 69)
    assert trio.current_time() == 0


@pytest.mark.proves("F67")
@pytest.mark.parametrize(("address", "shown"), [(LOCALHOST, "127.0.0.1:{}"), ("::1", "[::1]:{}"), (None, "0.0.0.0:{}")])
@in_trio
async def test_who_has_the_port_is_named_after_some_patience(clock: MockClock, address: str | None, shown: str) -> None:
    before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208  # the names are all there is to it
    with listener_at(address or LOCALHOST) as port, pytest.raises(Unavailable) as raised:
        await listen_tcp(Tcp(address, port))
    holder = f"{OWN_NAME} (pid {os.getpid()})"
    assert (
        str(raised.value)
        == f"cannot listen on {shown.format(port)}: {holder} has the port; stop it, or write another port"
    )
    assert BIND_PATIENCE_S <= trio.current_time() <= BIND_PATIENCE_S + 1
    assert set(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


@pytest.mark.proves("F67")
@in_trio
async def test_whoever_has_the_second_of_two_addresses_gets_the_first_one_freed(clock: MockClock) -> None:
    with listener_at("::1") as port:
        with pytest.raises(Unavailable, match=r"cannot listen on \[::\]:\d+: .* has the port"):
            await listen_tcp(Tcp(None, port))
        with listener_at(LOCALHOST, port):
            pass


@pytest.mark.proves("F67")
def test_a_holder_that_proc_does_not_show_is_another_process(host: Host, clock: MockClock, monkeypatch: Any) -> None:
    # Bound but not listening: nobody can be found in the kernel's table of listeners.
    async def main() -> None:
        with socket.socket() as sock:
            sock.bind((LOCALHOST, 6980))
            with pytest.raises(Unavailable) as raised:
                await listen_tcp(Tcp(LOCALHOST, 6980))
        assert str(raised.value) == (
            "cannot listen on 127.0.0.1:6980: another process has the port; stop it, or write another port"
        )

    with host.entered():
        trio.run(main, clock=clock)


@pytest.mark.proves("F67")
@in_trio
async def test_waiting_for_a_port_can_be_cancelled(clock: MockClock) -> None:
    with listener_at() as port:
        async with trio.open_nursery() as nursery:
            listeners: list[trio.SocketListener] = []

            @nursery.start_soon
            async def start() -> None:
                listeners.extend(await listen_tcp(Tcp(LOCALHOST, port)))

            await trio.sleep(BIND_PATIENCE_S / 2)
            nursery.cancel_scope.cancel()
    assert not listeners
    with listener_at(LOCALHOST, port):
        pass


@pytest.mark.proves("F67")
@in_trio
async def test_a_port_that_becomes_free_is_taken(clock: MockClock) -> None:
    listeners: list[trio.SocketListener] = []
    async with trio.open_nursery() as nursery:
        with listener_at() as port:

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
    with listener_at() as port, pytest.raises(Unavailable, match=rf"pid {os.getpid()}\) has the port"):
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


@in_trio
async def test_a_family_is_kept_to(monkeypatch: pytest.MonkeyPatch) -> None:
    for family, address in ((4, "0.0.0.0"), (6, "::")):
        async with listening(Tcp(None, 0, family)) as listeners:  # type: ignore[arg-type]  # 4 and 6 are what it takes
            assert [there for there, _ in addresses_of(listeners)] == [address]


@in_trio
async def test_a_port_can_be_shared_by_several_who_say_so() -> None:
    async with listening(Tcp(LOCALHOST, 0), is_shared=True) as one:
        ((_, port),) = addresses_of(one)
        async with listening(Tcp(LOCALHOST, port), is_shared=True) as other:
            assert addresses_of(other) == addresses_of(one)
    for endpoint in (Vsock(None, 8888), Unix("@app"), HybridVsock("/run/v.sock", 1), Systemd("web")):
        with pytest.raises(ConfigError, match=f"several processes cannot share {endpoint}"):
            async with listening(endpoint, is_shared=True):
                pass


def test_the_loopback_of_an_enclave_is_told_from_an_address_that_is_not_ours() -> None:
    async def main() -> None:
        for host, hint in (("::1", True), ("192.0.2.1", False)):
            with pytest.raises(Unavailable) as raised:
                await listen_tcp(Tcp(host, 80))
            assert str(raised.value).endswith("as relay does with --setup-loopback") is hint

    with Network() as network:
        host = network.host("enclave")
        host.run("ip", "link", "set", "lo", "down")
        host.run("ip", "address", "flush", "dev", "lo")
        with host.entered():
            trio.run(main)


# Unix, and what a guest reaches through it.


async def greeted(listeners: list[trio.SocketListener], endpoint: Endpoint) -> Endpoint:
    """Send a word through each listener, and return who it came from."""
    (listener,) = listeners
    dialled = await open_connection(endpoint, PATIENCE_S)
    accepted = await accept(listener)
    with dialled.socket, accepted.socket:
        await dialled.socket.send(b"hello")
        assert await accepted.socket.recv(5) == b"hello"
        if isinstance(endpoint, Tcp):
            host, port = dialled.socket.getsockname()[:2]
            assert accepted.peer == Tcp(host, port)
    return accepted.peer


@in_trio
async def test_every_kind_is_listened_on_and_its_peers_are_named(tmp_path: Path) -> None:
    async with listening(Tcp("::1", 0)) as listeners:
        await greeted(listeners, Tcp("::1", addresses_of(listeners)[0][1]))
    for endpoint in (Unix(f"{tmp_path}/app"), Unix(f"@{tmp_path}")):
        async with listening(endpoint) as listeners:
            assert await greeted(listeners, endpoint) == Unix("")
        with pytest.raises(Unreachable):
            await open_connection(endpoint, PATIENCE_S)
    async with listening(HybridVsock(f"{tmp_path}/v.sock", 52)) as listeners:
        assert await greeted(listeners, Unix(f"{tmp_path}/v.sock_52")) == Unix("")
    assert [*await trio.Path(tmp_path).iterdir()] == []


@in_trio
async def test_a_name_is_kept_from_others_until_the_block_ends(tmp_path: Path, clock: MockClock) -> None:
    for endpoint in (Unix(f"{tmp_path}/app"), Unix(f"@{tmp_path}"), HybridVsock(f"{tmp_path}/v", 1)):
        async with listening(endpoint):
            began = trio.current_time()
            with pytest.raises(Unavailable, match=r"cannot listen on unix:.*: another program listens there; stop it"):
                async with listening(endpoint):
                    pass
            assert BIND_PATIENCE_S <= trio.current_time() - began <= BIND_PATIENCE_S + 1
        async with listening(endpoint):
            pass


@in_trio
async def test_a_name_that_becomes_free_is_taken(tmp_path: Path, clock: MockClock) -> None:
    endpoint = Unix(f"{tmp_path}/app")
    async with trio.open_nursery() as nursery, listening(endpoint):

        @nursery.start_soon
        async def start() -> None:
            async with listening(endpoint) as listeners:
                await greeted(listeners, endpoint)

        await trio.sleep(BIND_PATIENCE_S / 2)


@in_trio
async def test_who_may_connect_is_said_by_the_mode(tmp_path: Path) -> None:
    path = trio.Path(tmp_path / "app")
    for mode in (0o600, 0o660):
        async with listening(Unix(str(path)), unix_mode=mode):
            assert (await path.stat()).st_mode & 0o777 == mode


@in_trio
async def test_a_path_with_something_else_on_it_is_refused(tmp_path: Path, still_clock: MockClock) -> None:
    with pytest.raises(CannotCreate, match="which is no socket"):
        async with listening(Unix(str(tmp_path))):
            pass


@pytest.mark.proves("F53")
@in_trio
async def test_a_lack_of_descriptors_is_told() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    for endpoint in (Unix("@app"), Vsock(None, 8888)):
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
        try:
            with pytest.raises(Unavailable, match=f"cannot listen on {endpoint}: Too many open files"):
                async with listening(endpoint):
                    pass
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)


# Systemd.


@in_trio
async def test_what_systemd_listens_on_is_taken_over(tmp_path: Path) -> None:
    one, other = socket.create_server((LOCALHOST, 0)), socket.create_server(("::1", 0), family=socket.AF_INET6)
    where = [Tcp(*sock.getsockname()[:2]) for sock in (one, other)]
    inherited = {"web": [one, other]}
    async with listening(Systemd("web"), inherited=inherited) as listeners:
        for listener, endpoint in zip(listeners, where, strict=True):
            await greeted([listener], endpoint)
    assert inherited == {}
    assert addresses_of_closed(listeners) == [-1, -1]
    with pytest.raises(ConfigError, match="systemd passes no socket called web"):
        async with listening(Systemd("web"), inherited=inherited):
            pass
    with pytest.raises(ConfigError, match=r"start this by its \.socket unit"):
        async with listening(Systemd("web")):
            pass


def addresses_of_closed(listeners: list[trio.SocketListener]) -> list[int]:
    return [listener.socket.fileno() for listener in listeners]


# Vsock, as far as it goes without binding: see test_real_vsock.py.


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What sockets are bound to; a number in front is the error that meets them."""
    asked: list[Any] = []

    async def bind(sock: trio.socket.SocketType, address: Any) -> None:
        await trio.lowlevel.checkpoint()
        asked.append((sock.family, address))
        raise OSError(asked[0], os.strerror(asked[0]))

    monkeypatch.setattr("trio._socket._SocketType.bind", bind)
    return asked


@pytest.mark.proves("F67")
@pytest.mark.parametrize(
    ("number", "kind", "text", "attempts"),
    [
        (errno.EADDRINUSE, Unavailable, "another process has the port; stop it, or write another port", 50),
        (errno.EACCES, NotPermitted, "ports below 1024 need CAP_NET_BIND_SERVICE", 1),
        (errno.EADDRNOTAVAIL, Unavailable, "cid 16 is not this machine's, which is 3: write vsock://:888 to listen", 1),
    ],
)
@in_trio
async def test_why_a_vsock_port_is_not_listened_on_is_told(
    clock: MockClock,
    monkeypatch: pytest.MonkeyPatch,
    bound: list[Any],
    number: int,
    kind: Any,
    text: str,
    attempts: int,
) -> None:
    monkeypatch.setattr("enlink.vsock.local_cid", lambda: 3)
    bound.append(number)
    with pytest.raises(kind, match=f"cannot listen on vsock://16:888: {text}"):
        async with listening(Vsock(16, 888)):
            pass
    assert set(bound[1:]) == {(socket.AF_VSOCK, (16, 888))}
    assert attempts <= len(bound) - 1 <= attempts + 2


@in_trio
async def test_any_cid_is_the_kernels_word_for_it(bound: list[Any]) -> None:
    bound.append(errno.ENOMEM)
    with pytest.raises(Unavailable, match="cannot listen on vsock://:888: Cannot allocate memory"):
        async with listening(Vsock(None, 888)):
            pass
    assert bound[1:] == [(socket.AF_VSOCK, (0xFFFFFFFF, 888))]


def test_a_backlog_holds_what_a_burst_brings() -> None:
    """Of vsock, whoever finds it full is refused at once."""
    assert BACKLOG >= 128
