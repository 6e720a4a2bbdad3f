"""Waking up when the host changes: for every kind of change, not for nothing, and not more often than told."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, AsyncExitStack
from functools import partial

import pytest
import trio
from enlink.errors import NotPermitted
from enlink.testing.hosts import Host, Network
from enta.capture.watch import HostChanges, host_changes

FAR_BEYOND_S = 8.0  # a change is heard within milliseconds, and acted upon within a second


@pytest.fixture
def host(network: Network) -> Host:
    host = network.host("watched")
    host.run("ip", "link", "add", "first", "type", "veth", "peer", "name", "second")
    return host


def watching(host: Host, act: Callable[[HostChanges], Awaitable[None]], floor_s: float = 0) -> None:
    """Run *act* while the host is watched, once what led to it has been heard."""

    async def main() -> None:
        with trio.fail_after(5 * FAR_BEYOND_S):
            async with AsyncExitStack() as stack:
                with host.entered():
                    changes = await stack.enter_async_context(host_changes(floor_s))
                await act(changes)

    trio.run(main)


async def is_quiet(changes: HostChanges) -> bool:
    """Whether nothing is queued. What a command has changed is queued before it returns."""
    with trio.move_on_after(0.05):
        await changes.wait()
        return False
    return True


@pytest.mark.proves("F64")
@pytest.mark.parametrize(
    "change",
    [
        "nft add table inet t",
        "ip link set first up",
        "ip address add 10.0.0.1/24 dev lo",
        "ip rule add priority 6978 lookup 6978",
        "ip route add unreachable 10.0.0.0/8",
    ],
)
def test_every_kind_of_change_is_heard_once(host: Host, change: str) -> None:
    async def act(changes: HostChanges) -> None:
        assert await is_quiet(changes)
        host.run(*change.split())
        with trio.fail_after(FAR_BEYOND_S):
            await changes.wait()
        assert await is_quiet(changes)

    watching(host, act)


def test_removal_is_heard_as_well(host: Host) -> None:
    host.run("nft", "add table inet t")
    host.run("ip", "rule", "add", "priority", "6978", "lookup", "6978")

    async def act(changes: HostChanges) -> None:
        for removal in ("nft flush ruleset", "ip rule del priority 6978", "ip link del first"):
            host.run(*removal.split())
            with trio.fail_after(FAR_BEYOND_S):
                await changes.wait()

    watching(host, act)


def test_a_change_is_heard_even_if_nobody_waited_for_it_yet(host: Host) -> None:
    async def act(changes: HostChanges) -> None:
        for _ in range(10):
            host.run("nft", "add table inet t; delete table inet t")
        with trio.fail_after(FAR_BEYOND_S):
            await changes.wait()
        assert await is_quiet(changes)

    watching(host, act)


def test_more_changes_than_the_kernel_queues_are_a_change(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel then says ENOBUFS, once, and drops what does not fit."""
    bind = socket.socket.bind

    def bind_a_short_queue(self: socket.socket, address: tuple[int, int]) -> None:
        self.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        bind(self, address)

    monkeypatch.setattr(socket.socket, "bind", bind_a_short_queue)

    async def act(changes: HostChanges) -> None:
        host.run("nft", "-f", "-", input="".join(f"add table inet t{number}\n" for number in range(100)))
        with trio.fail_after(FAR_BEYOND_S):
            await changes.wait()
        assert await is_quiet(changes)
        host.run("nft", "flush ruleset")
        with trio.fail_after(FAR_BEYOND_S):
            await changes.wait()

    watching(host, act)


def test_cancellation_loses_no_change(host: Host) -> None:
    async def act(changes: HostChanges) -> None:
        host.run("nft", "add table inet t")
        with trio.CancelScope() as scope:
            scope.cancel()
            await changes.wait()
        assert scope.cancelled_caught
        with trio.fail_after(FAR_BEYOND_S):
            await changes.wait()

    watching(host, act)


@pytest.mark.proves("F64")
def test_a_stranger_who_never_stops_is_answered_at_the_agreed_rate(host: Host) -> None:
    floor_s, rounds = 0.1, 4

    async def act(changes: HostChanges) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_change_for_ever, host)
            await changes.wait()
            started = trio.current_time()
            for _ in range(rounds):
                await changes.wait()
            assert trio.current_time() - started >= rounds * floor_s
            nursery.cancel_scope.cancel()

    watching(host, act, floor_s)


def test_the_watchers_own_repairs_come_to_rest(host: Host) -> None:
    """Look, repair, look again, rest: as the agent does."""
    host.run("nft", "add table inet t")

    async def act(changes: HostChanges) -> None:
        looks = 0
        host.run("nft", "delete table inet t")
        while not await is_quiet(changes):
            looks += 1
            if "inet t" not in host.run("nft", "list tables"):
                host.run("nft", "add table inet t")
        assert looks == 2

    watching(host, act)


def test_any_other_failure_is_not_taken_for_a_change(host: Host) -> None:
    async def main() -> None:
        with host.entered():
            broken = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with broken, trio.fail_after(FAR_BEYOND_S):
            broken.setblocking(False)
            broken.connect(("127.0.0.1", 9))
            broken.send(b"nobody listens")
            await HostChanges([broken], 0).wait()

    with pytest.raises(ConnectionRefusedError):
        trio.run(main)


@pytest.mark.proves("F59")
def test_without_the_capability_nobody_may_watch(
    host: Host, unprivileged: Callable[[], AbstractContextManager[None]]
) -> None:
    async def main() -> None:
        async with host_changes():
            raise AssertionError("unreachable")

    with unprivileged(), pytest.raises(NotPermitted, match="CAP_NET_ADMIN"):
        trio.run(main)


async def _change_for_ever(host: Host) -> None:
    while True:
        change = partial(host.run, "nft", "add table inet t; delete table inet t")
        await trio.to_thread.run_sync(change)
