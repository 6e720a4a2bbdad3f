"""One bridge: accepts where it listens, dials its target for each connection, and lets `enlink.splice` move the bytes.

At its limit it accepts no more, and the backlog keeps whoever comes. Nothing that one connection does ends another.
"""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Sequence
from ipaddress import ip_address
from typing import Any, Final

import trio
from enlink.connection import name_of
from enlink.direction import abort
from enlink.endpoint import CID_ANY, Tcp, Unix, Vsock
from enlink.errors import EngError
from enlink.program import RateLimitedLog, log_event
from enlink.splice import Limits, Mover
from enlink.status import Counters

from relay.config import BridgeConfig
from relay.dial import NotAllowed, Target
from relay.proxy_protocol import TcpConnection, UnixConnection, VsockConnection, encode_header

# Choices of ours.
_ACCEPT_PAUSE_S: Final = 0.1
_ACCEPT_BATCH: Final = 64  # connections that one listener takes before other tasks get their turn
_TCP_OPTIONS: Final = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 6),
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
)

_INTERNET: Final = (socket.AF_INET, socket.AF_INET6)
_logger = logging.getLogger(__name__)


class Bridge:
    """Carries connections from one endpoint to another. Counts in *counters*, under its endpoints' names."""

    def __init__(self, config: BridgeConfig, target: Target, mover: Mover, limited: RateLimitedLog) -> None:
        self._config = config
        self._target = target
        self._mover = mover
        self._limited = limited
        self._limits = Limits(config.idle_timeout_s, config.max_lifetime_s, config.half_close_timeout_s)
        self._counters = Counters()
        self._connections = self._counters.group("connections")
        self._bytes = self._counters.group("bytes")
        self._ended = self._counters.group("ended")
        self._active = 0
        self._freed = trio.Event()

    def snapshot(self) -> dict[str, object]:
        """Return what it is, how many connections it has, and its counters, for ``status``."""
        return {
            "listen": str(self._config.listen),
            "target": str(self._config.target),
            "active": self._active,
            "max_concurrent_connections": self._config.max_connections,
            **self._counters.snapshot(),
        }

    async def accept(self, listeners: Sequence[socket.socket], nursery: trio.Nursery) -> None:
        """Accept until cancelled, and carry each connection by a task of *nursery*."""
        async with trio.open_nursery() as accepting:
            for listener in listeners:
                accepting.start_soon(self._accept_forever, listener, nursery)

    async def _accept_forever(self, listener: socket.socket, nursery: trio.Nursery) -> None:
        while True:
            while self._active >= self._config.max_connections:
                if self._freed.is_set():
                    self._freed = trio.Event()
                await self._freed.wait()
            await trio.lowlevel.wait_readable(listener)
            try:
                self._accept_batch(listener, nursery)
            except OSError as error:
                # Of descriptors or memory there will be some again; a connection that is gone already is no matter.
                reason = errno.errorcode.get(error.errno or 0, "unknown")
                self._connections["accept_paused"] += 1
                self._limited.log("accept_paused", reason, listen=self._config.listen, error=error.strerror)
                await trio.sleep(_ACCEPT_PAUSE_S)

    def _accept_batch(self, listener: socket.socket, nursery: trio.Nursery) -> None:
        for _ in range(_ACCEPT_BATCH):
            # Another listener of this bridge may have taken the last place while this one waited.
            if self._active >= self._config.max_connections:
                return
            try:
                client, peer = listener.accept()
            except BlockingIOError:
                return
            self._active += 1
            self._connections["accepted"] += 1
            nursery.start_soon(self._carry, client, peer)

    async def _carry(self, client: socket.socket, peer: Any) -> None:
        try:
            target = await self._reach(client, peer)
            outcome = await self._mover.bridge(client, target, self._limits)
        except NotAllowed as error:
            self._ended[error.reason] += 1
            self._limited.log("target_refused", error.reason, target=self._config.target, error=error)
        except (EngError, OSError) as error:
            self._ended["unreachable"] += 1
            self._limited.log("target_unreachable", str(self._config.target), error=error)
        else:
            self._bytes["to_target"] += outcome.left_to_right_bytes
            self._bytes["from_target"] += outcome.right_to_left_bytes
            self._bytes["spliced"] += outcome.spliced_bytes
            self._ended[outcome.ending] += 1
            log_event(_logger, "connection_ended", logging.DEBUG, peer=peer, how=outcome.ending)
        finally:
            self._active -= 1
            self._freed.set()

    async def _reach(self, client: socket.socket, peer: Any) -> socket.socket:
        """Connect to the target for *client*, which is closed if that fails."""
        try:
            tune(client)
            target = await self._target.connect()
            try:
                tune(target)
                if self._config.proxy_protocol:
                    # Nothing has been sent before, so there is room for all of it.
                    target.send(encode_header(_as_announced(client, peer)))
            except BaseException:
                target.close()
                raise
        except BaseException:
            abort(client)
            raise
        return target


def _as_announced(client: socket.socket, peer: Any) -> TcpConnection | VsockConnection | UnixConnection:
    """Say who connected, and where, for the PROXY protocol."""
    match name_of(client.family, peer), name_of(client.family, client.getsockname()):
        case Tcp(str(host), port), Tcp(str(local_host), local_port):
            return TcpConnection(ip_address(host), port, ip_address(local_host), local_port)
        case Vsock(cid, port), Vsock(local_cid, local_port):
            return VsockConnection(_number(cid), port, _number(local_cid), local_port)
        case Unix(path), Unix(local_path):
            return UnixConnection(path, local_path)
    raise AssertionError(client.family)


def _number(cid: int | None) -> int:
    return CID_ANY if cid is None else cid


def tune(sock: socket.socket) -> None:
    """Set what every connection wants: no waiting, no delay, and an end to a peer that is silent for two minutes."""
    sock.setblocking(False)
    if sock.family in _INTERNET:
        for level, option, value in _TCP_OPTIONS:
            sock.setsockopt(level, option, value)
