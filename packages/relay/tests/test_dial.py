"""A target is reached wherever its name leads, as far as it may be dialled, and nobody waits for ever."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import closing
from ipaddress import ip_address
from typing import Any

import pytest
import trio
from enlink.attempt import Found
from enlink.connection import Unreachable
from enlink.endpoint import Tcp, Unix
from enlink.errors import EngError
from enlink.testing.hosts import Host, Network
from enlink.testing.programs import in_trio, until
from relay.addresses import Address
from relay.config import BridgeConfig
from relay.dial import Dial, NotAllowed, Target
from relay.resolver import NameNotResolved

NAME = "server.example"
PUBLIC = "93.184.215.14"  # on a host of the test's own, like all of these
SILENT = ("93.184.215.15", "93.184.215.16")


class Names:
    """A resolver that knows one name, and tells when it is let."""

    def __init__(self, *addresses: str) -> None:
        self.addresses: tuple[Address, ...] = tuple(map(ip_address, addresses))
        self.is_known = False
        self.may_answer = trio.Event()
        self.asked = 0

    def known(self, host: str, family: int | None) -> Sequence[Address] | None:
        assert (host, family) == (NAME, None)
        return self.addresses if self.is_known else None

    async def resolve(self, host: str, family: int | None) -> Sequence[Address]:
        assert family is None
        self.asked += 1
        await self.may_answer.wait()
        if not self.addresses:
            raise NameNotResolved(f"cannot resolve {host}: there is no such name")
        return self.addresses


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    """A host with a public address, and a neighbour that is never there."""
    with Network() as network:
        here, there = network.host("here"), network.host("there")
        device, _ = network.connect(here, "93.184.215.1/24", there, "93.184.215.2/24")
        here.run("ip", "address", "add", f"{PUBLIC}/32", "dev", "lo")
        for nobody in SILENT:
            here.run("ip", "neighbour", "add", nobody, "lladdr", "02:00:00:00:00:03", "dev", device)
        yield here


@pytest.fixture
def server(host: Host) -> Iterator[socket.socket]:
    with host.entered(), socket.create_server((PUBLIC, 0)) as server:
        server.setblocking(False)
        yield server


class Caller:
    """Dials, and keeps what comes of it."""

    def __init__(self, target: Target) -> None:
        self.found: list[Found] = []
        self.dial: Dial = target.dial(self.found.append)
        self.dial.start()

    async def socket(self) -> socket.socket:
        await until(lambda: bool(self.found))
        (found,) = self.found
        assert isinstance(found, socket.socket)
        return found

    async def failure(self) -> EngError:
        await until(lambda: bool(self.found))
        (found,) = self.found
        assert isinstance(found, EngError)
        return found


def target_of(names: Names, port: int, **settings: Any) -> Target:
    resolver: Any = names
    return Target(BridgeConfig(listen=Tcp(None, 1), target=Tcp(NAME, port), **settings), resolver)


def test_a_name_is_looked_up_once_for_all_who_wait(host: Host, server: socket.socket) -> None:
    async def test() -> None:
        names = Names(PUBLIC)
        target = target_of(names, server.getsockname()[1])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(target.look_up)
            callers = [Caller(target) for _ in range(5)]
            callers[0].dial.abort()
            await until(lambda: names.asked == 1)
            names.may_answer.set()
            for caller in callers[1:]:
                (await caller.socket()).close()
            assert not callers[0].found
            names.is_known = True  # until its time to live is over
            (await Caller(target).socket()).close()
            assert names.asked == 1
            nursery.cancel_scope.cancel()

    with host.entered():
        in_trio(test)()


@pytest.mark.proves("F28")
def test_a_name_without_an_answer_is_told_at_once_or_at_the_deadline() -> None:
    async def test() -> None:
        names = Names()
        target = target_of(names, 80, connect_timeout_s=0.2)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(target.look_up)
            began = trio.current_time()
            assert str(await Caller(target).failure()) == f"cannot resolve {NAME}: no answer within 0.2 s"
            assert 0.2 <= trio.current_time() - began < 8
            caller = Caller(target)
            names.may_answer.set()
            failure = await caller.failure()
            assert isinstance(failure, Unreachable)
            assert str(failure) == f"cannot resolve {NAME}: there is no such name"
            nursery.cancel_scope.cancel()

    in_trio(test)()


@pytest.mark.proves("F26")
def test_silent_addresses_leave_the_others_their_share_of_the_deadline(host: Host, server: socket.socket) -> None:
    async def test() -> None:
        port = server.getsockname()[1]
        names = Names(*SILENT, PUBLIC)
        names.is_known = True
        began = trio.current_time()
        (await Caller(target_of(names, port, connect_timeout_s=0.6)).socket()).close()
        assert 0.4 <= trio.current_time() - began < 8
        names.addresses = names.addresses[:2]
        failure = await Caller(target_of(names, port, connect_timeout_s=0.2)).failure()
        assert str(failure).startswith(f"cannot connect to {SILENT[1]} port {port}: no answer within 0.")

    with host.entered():
        in_trio(test)()


def test_an_address_that_refuses_is_followed_by_the_next_at_once(host: Host, server: socket.socket) -> None:
    async def test() -> None:
        names = Names("93.184.215.1", PUBLIC)
        names.is_known = True
        (await Caller(target_of(names, server.getsockname()[1])).socket()).close()

    with host.entered():
        in_trio(test)()


@pytest.mark.proves("D23", "F29")
@pytest.mark.parametrize("way", ["known", "looked up"])
def test_a_name_that_leads_elsewhere_is_dialled_only_where_it_may_be(
    host: Host, server: socket.socket, way: str
) -> None:
    """Whether its answer is an old one or has just come: of several addresses the ordinary ones, of none nothing."""

    async def test() -> None:
        names = Names("169.254.169.254", PUBLIC)
        names.is_known = way == "known"
        names.may_answer.set()
        target = target_of(names, server.getsockname()[1])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(target.look_up)
            with closing(await Caller(target).socket()) as sock:
                assert sock.getpeername()[0] == PUBLIC
            for address in ("169.254.169.254", "127.0.0.1", "10.0.0.1"):
                names.addresses = (ip_address(address),)
                failure = await Caller(target).failure()
                assert isinstance(failure, NotAllowed)
                assert failure.reason == "rebind"
            nursery.cancel_scope.cancel()

    with host.entered():
        in_trio(test)()


@pytest.mark.proves("F53")
def test_what_the_system_lacks_for_a_moment_is_waited_for_within_the_deadline(
    monkeypatch: pytest.MonkeyPatch, host: Host, server: socket.socket
) -> None:
    failures: list[int] = []
    really = socket.socket.__init__

    def scarce(sock: socket.socket, *arguments: Any, **named: Any) -> None:
        if failures:
            raise OSError(failures[0], os.strerror(failures.pop(0)))
        really(sock, *arguments, **named)

    async def test() -> None:
        names = Names(PUBLIC)
        names.is_known = True
        target = target_of(names, server.getsockname()[1])
        failures.extend([errno.EMFILE, errno.ENOBUFS])
        caller, aborted = Caller(target), Caller(target)
        aborted.dial.abort()
        (await caller.socket()).close()
        assert not aborted.found
        failures.extend([errno.EMFILE] * 1000)
        failure = await Caller(target_of(names, 1, connect_timeout_s=0.3)).failure()
        assert str(failure) == f"cannot connect to {PUBLIC} port 1: Too many open files"
        assert len(failures) >= 997
        failures.clear()

    monkeypatch.setattr(socket.socket, "__init__", scarce)
    with host.entered():
        in_trio(test)()


def test_a_dial_that_is_aborted_leaves_nothing_and_tells_nobody(host: Host, tmp_path: Any) -> None:
    async def test() -> None:
        names = Names(SILENT[0])
        names.is_known = True
        silent = Caller(target_of(names, 80))
        with socket.socket(socket.AF_UNIX) as listener:  # with a full backlog, after one
            listener.bind(f"{tmp_path}/app")
            listener.listen(0)
            target = Target(BridgeConfig(listen=Tcp(None, 1), target=Unix(f"{tmp_path}/app")), None)
            (await Caller(target).socket()).close()
            full = Caller(target)
            before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208  # how many is all that counts
            for caller in (silent, full):
                caller.dial.abort()
                caller.dial.abort()
            assert len(os.listdir("/proc/self/fd")) == before - 2  # noqa: PTH208
            assert not silent.found
            assert not full.found

    with host.entered():
        in_trio(test)()
