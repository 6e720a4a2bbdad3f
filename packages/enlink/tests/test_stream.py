"""Dialling and listening: against a name service with moods, hosts made of namespaces, and a lack of everything."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import resource
import socket
import subprocess
import sys
import textwrap
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

import pytest
import trio
from enlink.attempt import SO_MARK
from enlink.connection import Unreachable
from enlink.endpoint import Tcp
from enlink.errors import NotPermitted, Unavailable
from enlink.listener import listen_tcp
from enlink.stream import (
    ACKNOWLEDGE_DEADLINE_S,
    DIAL_DEADLINE_S,
    RESOLVE_DEADLINE_S,
    TCP_NOTSENT_LOWAT,
    UNSENT_LIMIT_BYTES,
    Dialer,
    serve,
    tuned,
)
from enlink.testing.hosts import Host, Network
from enlink.testing.streams import reset, tcp_stream_pair
from trio.testing import MockClock, trio_test, wait_all_tasks_blocked

Arguments = ParamSpec("Arguments")

NAME = "gateway.example"
OF_ONE_TEST, OF_ANOTHER = f"hanging.{NAME}", f"slow.{NAME}"  # whose look-ups are counted
OWN_NAME = Path("/proc/self/comm").read_text().strip()
PATIENCE_S = 50  # for what takes a moment on a machine with nothing else to do
CAP_NET_BIND_SERVICE, CAP_NET_ADMIN, CAP_NET_RAW = 10, 12, 13  # linux/capability.h
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


async def jump_when_blocked(clock: MockClock, seconds: float) -> None:
    """Let time pass once everybody waits."""
    await wait_all_tasks_blocked()
    clock.jump(seconds)


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Network() as network:
        yield network.host("one")


class Resolver:
    """A name service for one name, and those below it, in place of the real one, which still has to read numbers.

    Attributes:
        answer: addresses, or what to raise.
        is_hanging: look-ups do not end until `release`.
        asked: how many look-ups there were, by name: one that an earlier test has given up may still come.
        at_once: how many there are now, and `at_once_most` how many there were at most.
    """

    def __init__(self) -> None:
        self.answer: list[str] | OSError | UnicodeError = [LOCALHOST]
        self.is_hanging = False
        self.asked: Counter[str] = Counter()
        self.at_once: Counter[str] = Counter()
        self.at_once_most = 0
        self._released = threading.Event()
        self._lock = threading.Lock()
        self._real = socket.getaddrinfo

    def getaddrinfo(self, host: Any, port: Any, *rest: Any, **named: Any) -> Any:
        if not (isinstance(host, str) and host.endswith(NAME)):
            return self._real(host, port, *rest, **named)
        with self._lock:
            self.asked[host] += 1
            self.at_once[host] += 1
            self.at_once_most = max(self.at_once_most, self.at_once[host])
        try:
            if self.is_hanging:
                self._released.wait(PATIENCE_S)
            if isinstance(self.answer, Exception):
                raise self.answer
            return [
                (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (address, port)) for address in self.answer
            ]
        finally:
            with self._lock:
                self.at_once[host] -= 1

    def release(self) -> None:
        self.is_hanging = False
        self._released.set()


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Resolver]:
    resolver = Resolver()
    monkeypatch.setattr(socket, "getaddrinfo", resolver.getaddrinfo)
    yield resolver
    resolver.release()


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


async def peer_of(stream: trio.SocketStream) -> str:
    """The address that was dialled. Closes the stream."""
    async with stream:
        return str(stream.socket.getpeername()[0])


# Dialling.


@in_trio
async def test_a_dialler_reaches_a_listener() -> None:
    with listening() as port:
        assert await peer_of(await Dialer(Tcp(LOCALHOST, port)).dial()) == LOCALHOST


@in_trio
async def test_a_dialler_reaches_a_listener_on_ipv6() -> None:
    with listening("::1") as port:
        assert await peer_of(await Dialer(Tcp("::1", port)).dial()) == "::1"


@pytest.mark.proves("F26")
@in_trio
async def test_a_refused_connection_is_told_with_the_address_and_the_reason() -> None:
    port = free_port()
    with pytest.raises(Unreachable) as raised:
        await Dialer(Tcp(LOCALHOST, port)).dial()
    assert str(raised.value) == f"cannot connect to 127.0.0.1 port {port}: Connection refused"
    assert raised.value.exit_code == 69


@in_trio
async def test_every_address_of_a_name_is_tried(resolver: Resolver) -> None:
    with listening() as port:
        resolver.answer = [ELSEWHERE, "127.0.0.3", LOCALHOST]
        assert await peer_of(await Dialer(Tcp(NAME, port)).dial()) == LOCALHOST
        resolver.answer = [ELSEWHERE, "127.0.0.3"]
        with pytest.raises(Unreachable, match=r"cannot connect to 127\.0\.0\.3 port \d+: Connection refused"):
            await Dialer(Tcp(NAME, port)).dial()


GAI_FAILURE = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
NO_SUCH_NAME = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
BAD_NAME = UnicodeError("label too long")


@pytest.mark.proves("F28")
@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (GAI_FAILURE, r"\[Errno -3\] Temporary failure in name resolution"),
        (NO_SUCH_NAME, r"\[Errno -2\] Name or service not known"),
        (BAD_NAME, "label too long"),
        ([], "it has no address"),
    ],
)
@in_trio
async def test_at_first_a_name_without_an_answer_can_be_tried_again(resolver: Resolver, answer: Any, text: str) -> None:
    with listening() as port:
        dialer = Dialer(Tcp(NAME, port))
        resolver.answer = answer
        with pytest.raises(Unreachable, match=f"cannot resolve {NAME}: {text}"):
            await dialer.dial()
        resolver.answer = [LOCALHOST]
        assert await peer_of(await dialer.dial()) == LOCALHOST


@pytest.mark.proves("F28", "G28")
@pytest.mark.parametrize("answer", [GAI_FAILURE, NO_SUCH_NAME, BAD_NAME, []], ids=["again", "noname", "bad", "empty"])
@in_trio
async def test_the_last_good_answer_is_kept_when_the_name_service_fails(resolver: Resolver, answer: Any) -> None:
    with listening() as port:
        dialer = Dialer(Tcp(NAME, port))
        await dialer.resolve()
        resolver.answer = answer
        for _ in range(3):
            await dialer.resolve()
            assert await peer_of(await dialer.dial()) == LOCALHOST


@pytest.mark.proves("F28", "G28")
@in_trio
async def test_a_name_service_that_hangs_costs_a_reconnect_nothing(resolver: Resolver, still_clock: MockClock) -> None:
    with listening() as port:
        dialer = Dialer(Tcp(NAME, port))
        await dialer.resolve()
        resolver.is_hanging = True
        began = trio.current_time()
        for _ in range(10):
            assert await peer_of(await dialer.dial()) == LOCALHOST
        assert trio.current_time() == began
        assert resolver.at_once_most == 1
        resolver.release()


@pytest.mark.proves("F28", "G28")
@in_trio
async def test_at_first_a_name_service_that_hangs_is_given_up_and_asked_one_question_at_a_time(
    resolver: Resolver, still_clock: MockClock
) -> None:
    with listening() as port:
        dialer = Dialer(Tcp(OF_ONE_TEST, port))
        resolver.is_hanging = True
        for _ in range(3):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(jump_when_blocked, still_clock, RESOLVE_DEADLINE_S)
                with pytest.raises(Unreachable, match=f"cannot resolve {OF_ONE_TEST}: no answer within 5 s"):
                    await dialer.dial()
        resolver.release()
        assert await peer_of(await dialer.dial()) == LOCALHOST
        # A thread that hangs cannot be ended, so there must never be a second one.
        assert (resolver.asked[OF_ONE_TEST], resolver.at_once_most) == (2, 1)


@pytest.mark.proves("F28", "G28")
@in_trio
async def test_nobody_else_waits_for_a_name_service(resolver: Resolver) -> None:
    resolver.is_hanging = True
    turns = 0
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def resolve() -> None:
            await Dialer(Tcp(OF_ANOTHER, 1)).resolve()

        while resolver.at_once[OF_ANOTHER] == 0 or turns < 1000:
            await trio.lowlevel.checkpoint()
            turns += 1
        resolver.release()
    assert resolver.asked[OF_ANOTHER] == 1


@pytest.mark.proves("F27")
@in_trio
async def test_a_changed_address_is_used_as_soon_as_the_old_one_fails(
    resolver: Resolver, still_clock: MockClock
) -> None:
    dialer = Dialer(Tcp(NAME, 0))
    with listening() as port:
        dialer.endpoint = Tcp(NAME, port)
        assert await peer_of(await dialer.dial()) == LOCALHOST
    with listening(ELSEWHERE, port):
        resolver.answer = [ELSEWHERE]
        assert await peer_of(await dialer.dial()) == ELSEWHERE
    with pytest.raises(Unreachable, match=r"127\.0\.0\.2 .*refused"):
        await dialer.dial()


@pytest.mark.proves("F27")
@in_trio
async def test_a_changed_address_is_learned_even_if_the_old_one_answers(resolver: Resolver) -> None:
    with listening() as port, listening(ELSEWHERE, port):
        dialer = Dialer(Tcp(NAME, port))
        await dialer.resolve()
        resolver.answer = [ELSEWHERE]
        await dialer.resolve()
        assert await peer_of(await dialer.dial()) == ELSEWHERE


@pytest.mark.proves("F28")
@in_trio
async def test_the_old_address_is_not_waited_on_for_longer_than_a_fresh_answer_may_take(
    resolver: Resolver, still_clock: MockClock
) -> None:
    dialer = Dialer(Tcp(NAME, free_port()))
    await dialer.resolve()
    resolver.is_hanging = True
    async with trio.open_nursery() as nursery:
        nursery.start_soon(jump_when_blocked, still_clock, 1)
        with pytest.raises(Unreachable, match="refused"):
            await dialer.dial()
    resolver.release()


@pytest.mark.proves("F26")
def test_a_host_that_does_not_answer_and_a_network_that_is_not_there_are_told_apart(still_clock: MockClock) -> None:
    async def failure(address: str) -> str:
        with pytest.raises(Unreachable) as raised:
            await Dialer(Tcp(address, 7)).dial()
        return str(raised.value)

    async def main() -> None:
        assert await failure("203.0.113.1") == "cannot connect to 203.0.113.1 port 7: Network is unreachable"
        assert await failure("198.51.100.2") == "cannot connect to 198.51.100.2 port 7: No route to host"
        # EACCES, which is no lack of rights here: a route may change, and dialling goes on.
        assert await failure("198.51.100.1") == "cannot connect to 198.51.100.1 port 7: Permission denied"
        silent = Dialer(Tcp("192.0.2.3", 7))
        await silent.resolve()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(jump_when_blocked, still_clock, DIAL_DEADLINE_S)
            with pytest.raises(Unreachable, match=r"cannot connect to 192\.0\.2\.3 port 7: no answer within 5 s"):
                await silent.dial()

    with Network() as network:
        here, there = network.host("here"), network.host("there")
        device, _ = network.connect(here, "192.0.2.1/24", there, "192.0.2.2/24")
        here.run("ip", "neighbour", "add", "192.0.2.3", "lladdr", "02:00:00:00:00:03", "dev", device)  # nobody's
        here.run("ip", "route", "add", "prohibit", "198.51.100.1/32")
        here.run("ip", "route", "add", "unreachable", "198.51.100.2/32")
        with here.entered():
            trio.run(main, clock=still_clock)


def test_connections_are_marked_so_that_rules_can_tell_them(host: Host) -> None:
    async def main() -> None:
        with listening() as port:
            for mark in (None, 0x6978):
                async with await Dialer(Tcp(LOCALHOST, port), mark=mark).dial() as stream:
                    assert stream.getsockopt(socket.SOL_SOCKET, SO_MARK) == (mark or 0)

    with host.entered():
        trio.run(main)


@pytest.mark.proves("F59")
def test_marking_without_the_right_to_is_told_at_once(host: Host) -> None:
    async def main() -> None:
        with listening() as port:
            dialer = Dialer(Tcp(LOCALHOST, port), mark=0x6978)
            # Since Linux 5.17 CAP_NET_RAW is enough; who has neither may not.
            for _ in range(2):  # the second time, a fresh answer is on its way
                with pytest.raises(NotPermitted) as raised, without_capabilities(CAP_NET_ADMIN, CAP_NET_RAW):
                    await dialer.dial()
                assert str(raised.value) == (
                    f"cannot mark the connection to 127.0.0.1 port {port}: needs CAP_NET_ADMIN"
                )
            assert await peer_of(await dialer.dial()) == LOCALHOST

    with host.entered():
        trio.run(main)


@pytest.mark.proves("F53")
@in_trio
async def test_a_dialler_without_descriptors_may_try_again(monkeypatch: pytest.MonkeyPatch) -> None:
    dialer = Dialer(Tcp(LOCALHOST, free_port()))
    await dialer.resolve()
    failure = pytest.raises(Unreachable, match=r"cannot connect to 127\.0\.0\.1 port \d+: Too many open files")
    with failure, no_more_descriptors():
        await dialer.dial()
    with pytest.raises(Unreachable, match="Connection refused"):
        await dialer.dial()


@contextmanager
def no_more_descriptors() -> Iterator[None]:
    """Let this process open nothing more for a while."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@in_trio
async def test_dialling_that_is_cancelled_leaves_no_socket_open(resolver: Resolver, still_clock: MockClock) -> None:
    with listening() as port:
        dialer = Dialer(Tcp(NAME, port))
        await dialer.resolve()
        before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208  # the names are all there is to it
        for _ in range(3):
            with trio.CancelScope() as scope:
                scope.cancel()
                await dialer.dial()
            assert scope.cancelled_caught
        assert set(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


@in_trio
async def test_a_connection_that_is_made_as_the_dialler_is_cancelled_is_handed_over(
    resolver: Resolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody else could close it."""

    def cancelling(stream: trio.SocketStream) -> trio.SocketStream:
        scope.cancel()
        return tuned(stream)

    with listening() as port:
        dialer = Dialer(Tcp(NAME, port))
        await dialer.resolve()
        resolver.is_hanging = True
        monkeypatch.setattr("enlink.stream.tuned", cancelling)
        with trio.CancelScope() as scope:
            stream = await dialer.dial()
            stream.socket.close()
        assert not scope.cancelled_caught
        resolver.release()


@in_trio
async def test_a_link_wants_no_delay_little_queue_and_an_end_to_silence() -> None:
    with listening() as port:
        async with await Dialer(Tcp(LOCALHOST, port)).dial() as stream:
            assert options_of(stream) == TUNED
    left, right = await tcp_stream_pair()
    async with left, right:
        assert options_of(left) != TUNED
        assert tuned(left) is left
        assert options_of(left) == TUNED


def options_of(stream: trio.SocketStream) -> dict[str, int]:
    tcp = socket.IPPROTO_TCP
    names = {
        "no delay": (tcp, socket.TCP_NODELAY),
        "unsent bytes": (tcp, TCP_NOTSENT_LOWAT),
        "unacknowledged ms": (tcp, socket.TCP_USER_TIMEOUT),
        "keepalive": (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
        "keepalive after s": (tcp, socket.TCP_KEEPIDLE),
        "keepalive every s": (tcp, socket.TCP_KEEPINTVL),
        "keepalive count": (tcp, socket.TCP_KEEPCNT),
    }
    return {name: int(stream.getsockopt(level, option)) for name, (level, option) in names.items()}


TUNED = {
    "no delay": 1,
    "unsent bytes": UNSENT_LIMIT_BYTES,
    "unacknowledged ms": ACKNOWLEDGE_DEADLINE_S * 1000,
    "keepalive": 1,
    "keepalive after s": 5,
    "keepalive every s": 2,
    "keepalive count": 3,
}


# Serving.


def addresses_of(listeners: list[trio.SocketListener]) -> list[tuple[str, int]]:
    return [listener.socket.getsockname()[:2] for listener in listeners]


@in_trio
async def test_everyone_who_connects_is_served_at_once_on_a_tuned_stream() -> None:
    listeners = await listen_tcp(Tcp(LOCALHOST, 0)) + await listen_tcp(Tcp("::1", 0))
    served: list[dict[str, int]] = []

    async def echo(stream: trio.SocketStream) -> None:
        async with stream:
            served.append(options_of(stream))
            async for data in stream:
                await stream.send_all(data)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve, listeners, echo, nursery)
        ends = [await Dialer(Tcp(*address)).dial() for address in addresses_of(listeners) * 3]
        for end in reversed(ends):
            await end.send_all(b"hello")
            assert await end.receive_some() == b"hello"
            await end.aclose()
        nursery.cancel_scope.cancel()
    assert served == [TUNED] * 6
    # A gateway that has stopped holds no port.
    for address in addresses_of_closed(listeners):
        assert address == -1


def addresses_of_closed(listeners: list[trio.SocketListener]) -> list[int]:
    return [listener.socket.fileno() for listener in listeners]


@pytest.mark.proves("F52", "F54")
@in_trio
async def test_connections_that_are_reset_before_they_are_accepted_disturb_nobody() -> None:
    (listener,) = await listen_tcp(Tcp(LOCALHOST, 0))
    ((_, port),) = addresses_of([listener])
    served = trio.Event()

    async def handle(stream: trio.SocketStream) -> None:
        async with stream:
            with trio.move_on_after(PATIENCE_S):
                try:
                    if await stream.receive_some() == b"hello":
                        served.set()
                except trio.BrokenResourceError:
                    pass

    dialer = Dialer(Tcp(LOCALHOST, port))
    for _ in range(200):
        reset(await dialer.dial())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve, [listener], handle, nursery)
        for _ in range(200):
            reset(await dialer.dial())
        async with await dialer.dial() as stream:
            await stream.send_all(b"hello")
            await served.wait()
        nursery.cancel_scope.cancel()


@pytest.mark.proves("F54", "D24")
@pytest.mark.parametrize(
    "number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ECONNABORTED, errno.EPROTO]
)
@in_trio
async def test_accepting_pauses_and_goes_on_whatever_is_missing(
    clock: MockClock, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    left, right = await tcp_stream_pair()
    (listener,) = await listen_tcp(Tcp(LOCALHOST, 0))
    attempts = 0

    async def accept(self: trio.SocketListener) -> trio.SocketStream:
        nonlocal attempts
        await trio.lowlevel.checkpoint()
        attempts += 1
        if attempts < 20:
            raise OSError(number, os.strerror(number))
        if attempts > 20:
            await trio.sleep_forever()
        return right

    async def handle(stream: trio.SocketStream) -> None:
        await stream.aclose()
        nursery.cancel_scope.cancel()

    monkeypatch.setattr(trio.SocketListener, "accept", accept)
    with caplog.at_level(logging.WARNING):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, [listener], handle, nursery)
    assert 1.5 < trio.current_time() < 3
    # By the real clock hardly any time has passed, so that is one line.
    (record,) = caplog.records
    assert record.getMessage() == "accept_paused"
    assert vars(record)["fields"]["reason"] == errno.errorcode[number]
    await left.aclose()


OUT_OF_DESCRIPTORS = textwrap.dedent(
    """
    import resource, trio
    from contextlib import suppress
    from enlink.endpoint import Tcp
    from enlink.log import log_to_standard_error
    from enlink.listener import listen_tcp
    from enlink.stream import serve

    async def echo(stream):
        async with stream:
            with suppress(trio.BrokenResourceError):
                async for data in stream:
                    await stream.send_all(data)

    async def main():
        listeners = await listen_tcp(Tcp("127.0.0.1", 0))
        print(listeners[0].socket.getsockname()[1], flush=True)
        resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, listeners, echo, nursery)

    with log_to_standard_error():
        trio.run(main)
    """
)


@pytest.fixture
def short_of_descriptors(tmp_path: Path) -> Iterator[tuple[int, int, Path]]:
    """The port of an echo server that may have 32 descriptors, its process id, and its log."""
    log = tmp_path / "log"
    command = [sys.executable, "-c", OUT_OF_DESCRIPTORS]
    with log.open("wb") as stderr, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline()), process.pid, log
        finally:
            process.kill()


@pytest.mark.proves("F53", "G15")
@in_trio
async def test_out_of_descriptors_a_listener_serves_whom_it_has_and_recovers(
    short_of_descriptors: tuple[int, int, Path],
) -> None:
    port, _, log = short_of_descriptors
    dialer = Dialer(Tcp(LOCALHOST, port))
    began = trio.current_time()
    ends = [await dialer.dial() for _ in range(60)]  # the kernel accepts them all
    for end in ends:
        await end.send_all(b"first")
    while not log.read_bytes():  # noqa: ASYNC110  # another process writes it
        await trio.sleep(0.05)
    # Some are served and some are not, for as long as one cares to look.
    served = 0
    with trio.move_on_after(5) as waiting:
        for end in ends:
            assert await end.receive_some() == b"first"
            served += 1
            waiting.deadline = trio.current_time() + 5
    assert 10 < served < 32
    for end in ends[:served]:
        await end.send_all(b"again")
        assert await end.receive_some() == b"again"
    # Room for the others.
    recovering = trio.current_time()
    for end in ends[:served]:
        await end.aclose()
    assert await ends[served].receive_some() == b"first"
    assert trio.current_time() - recovering < 8 * 1.5
    for end in ends[served:-served]:
        await end.aclose()
    for end in ends[-served:]:
        assert await end.receive_some() == b"first"
        await end.aclose()
    lines = log.read_text().splitlines()
    assert 1 <= len(lines) <= 2 + (trio.current_time() - began)
    assert all("accept_paused" in line and "EMFILE" in line for line in lines)


@pytest.mark.proves("F67")
@in_trio
async def test_among_several_listeners_the_one_with_the_port_is_named(
    clock: MockClock, short_of_descriptors: tuple[int, int, Path]
) -> None:
    port, pid, _ = short_of_descriptors
    with listening(), pytest.raises(Unavailable, match=rf"\(pid {pid}\) has the port"):
        await listen_tcp(Tcp(LOCALHOST, port))


@in_trio
async def test_serving_ends_with_its_nursery() -> None:
    listeners = await listen_tcp(Tcp(LOCALHOST, 0))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve, listeners, trio.aclose_forcefully, nursery)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert addresses_of_closed(listeners) == [-1]
