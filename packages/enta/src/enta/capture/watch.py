"""Wake up when anybody changes this host's devices, addresses, rules, routes or nftables. Says that, never what."""

from __future__ import annotations

import errno
import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager

import trio
from enlink.errors import NotPermitted

# linux/netlink.h, linux/rtnetlink.h, linux/netfilter/nfnetlink.h. Groups are counted from 1, their bits from 0.
_NETLINK_NETFILTER = 12
_ROUTE_GROUPS = sum(1 << (group - 1) for group in (1, 5, 7, 8))  # LINK, IPV4_IFADDR, IPV4_ROUTE, IPV4_RULE
_NETFILTER_GROUPS = 1 << (7 - 1)  # NFNLGRP_NFTABLES
_DATAGRAM_LIMIT_BYTES = 65536

FLOOR_S = 0.2  # five looks a second at most: well within the second that a restore may take


class HostChanges:
    """Made by `host_changes`."""

    def __init__(self, sockets: list[socket.socket], floor_s: float) -> None:
        self._sockets = sockets
        self._floor_s = floor_s
        self._earliest = trio.current_time()

    async def wait(self) -> None:
        """Return once something has changed since the last return, and *floor_s* after that at the earliest.

        Whoever looks and repairs after each return sees its own repairs as one more change, and then rests.
        Cancellation loses nothing.
        """
        async with trio.open_nursery() as nursery:
            for each in self._sockets:
                nursery.start_soon(_cancel_when_readable, each, nursery.cancel_scope)
        await trio.sleep_until(self._earliest)
        for each in self._sockets:
            _drain(each)
        self._earliest = trio.current_time() + self._floor_s


@asynccontextmanager
async def host_changes(floor_s: float = FLOOR_S) -> AsyncIterator[HostChanges]:
    """Listen to the network namespace that the calling thread is in.

    Changes made from now on count, also those made before the first `wait`.

    Raises:
        NotPermitted: no CAP_NET_ADMIN.
    """
    with ExitStack() as stack:
        sockets = []
        for protocol, groups in ((socket.NETLINK_ROUTE, _ROUTE_GROUPS), (_NETLINK_NETFILTER, _NETFILTER_GROUPS)):
            listening = stack.enter_context(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol))
            listening.setblocking(False)
            try:
                listening.bind((0, groups))
            except PermissionError as error:
                raise NotPermitted("cannot watch nftables: run as root or grant CAP_NET_ADMIN") from error
            sockets.append(listening)
        yield HostChanges(sockets, floor_s)


async def _cancel_when_readable(readable: socket.socket, scope: trio.CancelScope) -> None:
    await trio.lowlevel.wait_readable(readable)
    scope.cancel()


def _drain(readable: socket.socket) -> None:
    """Forget what is queued: there is no telling what it leaves out, so everything is looked at anyway."""
    while True:
        try:
            readable.recv(_DATAGRAM_LIMIT_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.ENOBUFS:  # the queue overflowed: changes, more than it could hold
                raise
