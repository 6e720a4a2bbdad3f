"""One bridge: accepts where it listens, dials its target for each connection, and lets `enlink.splice` move the bytes.

At its limit it accepts no more, and the backlog keeps whoever comes. Nothing that one connection does ends another.
No connection has a task: callbacks lead from accepting to dialling, moving and closing.
"""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from ipaddress import ip_address
from typing import Any, Final

import trio
from enlink.attempt import Found
from enlink.congestion import pace_if_long, unpace
from enlink.connection import name_of
from enlink.direction import abort
from enlink.endpoint import CID_ANY, Endpoint, Tcp, Unix, Vsock
from enlink.errors import EngError
from enlink.program import RateLimitedLog, log_event
from enlink.pump import current_pump
from enlink.splice import Exchange, Limits, Mover, Outcome
from enlink.status import Counters
from enlink.timers import Timer, current_timers

from relay.config import BridgeConfig
from relay.dial import Dial, NotAllowed, Target
from relay.proxy_protocol import TcpConnection, UnixConnection, VsockConnection, encode_header
from relay.resets import Resets

# Choices of ours.
_ACCEPT_PAUSE_S: Final = 0.1
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
    """Carries connections from one endpoint to another, between `open` and `close`.

    Attributes:
        target: where its connections lead.
        mover: moves their bytes.
        limits: when they end.
        leads_to_tcp: the target is a TCP endpoint.
        announces: the target is told who connects, by the PROXY protocol.
        resets: tells of clients that break off while the target is dialled.
    """

    resets: Resets

    def __init__(self, config: BridgeConfig, target: Target, mover: Mover, limited: RateLimitedLog) -> None:
        self._config = config
        self._listen = config.listen
        self.target = target
        self.mover = mover
        self.limits = Limits(config.idle_timeout_s, config.max_lifetime_s, config.half_close_timeout_s)
        self.leads_to_tcp = isinstance(config.target, Tcp)
        self.announces = config.proxy_protocol
        self._limited = limited
        self._counters = Counters()
        self._connections = self._counters.group("connections")
        self._bytes = self._counters.group("bytes")
        self._ended = self._counters.group("ended")
        self._passages: set[Passage] = set()
        self._is_idle: trio.Event | None = None
        self._token = trio.lowlevel.current_trio_token()
        self._listeners: Sequence[socket.socket] = ()
        self._pause: Timer | None = None
        self._pump = current_pump()

    def snapshot(self) -> dict[str, object]:
        """Return what it is, how many connections it has, and its counters, for ``status``."""
        return {
            "listen": str(self._listen),
            "target": str(self._config.target),
            "active": len(self._passages),
            "max_concurrent_connections": self._config.max_connections,
            **self._counters.snapshot(),
        }

    def open(self, listeners: Sequence[socket.socket], resets: Resets) -> None:
        """Begin to accept; takes over the sockets, which listen and are non-blocking."""
        self._listen = where_bound(self._config.listen, listeners)
        self._listeners = listeners
        self.resets = resets
        for listener in listeners:
            if listener.family in _INTERNET:
                # Whatever it accepts has these too.
                _set_options(listener)
                unpace(listener)  # also one that systemd has made
        self._accept_again()

    def close(self) -> None:
        """Accept no more. Nobody is left in the backlog."""
        self._stop_listening()
        for listener in self._listeners:
            listener.close()
        self._listeners = ()

    async def wait_until_idle(self) -> None:
        """Wait until the last connection has ended, after `close`."""
        if self._passages:
            self._is_idle = trio.Event()
            await self._is_idle.wait()

    def abort(self) -> None:
        """End all connections at once, with a reset."""
        for passage in list(self._passages):
            passage.abort()

    def _accept_again(self) -> None:
        self._pause = None
        for listener in self._listeners:
            self._pump.on_readable(listener.fileno(), partial(self._accept, listener))

    def _stop_listening(self) -> None:
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None
        for listener in self._listeners:
            self._pump.on_readable(listener.fileno(), None)

    def _accept(self, listener: socket.socket) -> None:
        """Take one connection; the pump calls again if there are more."""
        if self._is_full:
            self._stop_listening()
            return
        try:
            client, peer = listener.accept()
        except BlockingIOError:  # another worker was faster
            return
        except OSError as error:
            # Of descriptors or memory there will be some again; a connection that is gone already is no matter.
            reason = errno.errorcode.get(error.errno or 0, "unknown")
            self._connections["accept_paused"] += 1
            self._limited.log("accept_paused", reason, listen=self._listen, error=error.strerror)
            self._stop_listening()
            self._pause = current_timers().after(_ACCEPT_PAUSE_S, self._accept_again)
            return
        self._connections["accepted"] += 1
        passage = Passage(self, client, peer)
        self._passages.add(passage)
        passage.start()

    @property
    def _is_full(self) -> bool:
        return len(self._passages) >= self._config.max_connections

    def carried(self, passage: Passage, outcome: Outcome) -> None:
        """Take note of what it was, and that it is over."""
        self._bytes["to_target"] += outcome.left_to_right_bytes
        self._bytes["from_target"] += outcome.right_to_left_bytes
        self._bytes["spliced"] += outcome.spliced_bytes
        self._ended[outcome.ending] += 1
        log_event(_logger, "connection_ended", logging.DEBUG, peer=passage.peer, how=outcome.ending)
        self.forget(passage)

    def failed(self, passage: Passage, error: EngError | OSError) -> None:
        """Take note that it led nowhere."""
        if isinstance(error, NotAllowed):
            self._ended[error.reason] += 1
            self._limited.log("target_refused", error.reason, target=self._config.target, error=error)
        else:
            self._ended["unreachable"] += 1
            self._limited.log("target_unreachable", str(self._config.target), error=error)
        self.forget(passage)

    def broken_off(self, passage: Passage) -> None:
        """Take note that its client has gone before the target was reached."""
        self._ended["reset"] += 1
        self.forget(passage)

    def forget(self, passage: Passage) -> None:
        """Give its place to another one."""
        was_full = self._is_full
        self._passages.discard(passage)
        if was_full and self._pause is None:
            self._accept_again()
        if self._is_idle is not None and not self._passages:
            self._token.run_sync_soon(self._is_idle.set)


class Passage:
    """One connection that was accepted, through dialling the target, to its end. `start` begins it."""

    __slots__ = ("_bridge", "_client", "_stage", "peer")

    def __init__(self, bridge: Bridge, client: socket.socket, peer: Any) -> None:
        self._bridge = bridge
        self._client = client
        self._stage: Dial | Exchange = bridge.target.dial(self._reached)
        self.peer = peer

    def start(self) -> None:
        """Dial the target; the bridge is told of the end."""
        self._client.setblocking(False)
        if self._client.family in _INTERNET:
            pace_if_long(self._client)
        self._stage.start()
        if isinstance(self._stage, Dial) and self._client.fileno() >= 0:  # over loopback it is over by now
            self._bridge.resets.watch(self._client.fileno(), self._broken_off)

    def abort(self) -> None:
        """Close both sides at once, with a reset."""
        self._leave()
        self._bridge.forget(self)

    def _broken_off(self) -> None:
        self._leave()
        self._bridge.broken_off(self)

    def _leave(self) -> None:
        self._stage.abort()
        self._bridge.resets.forget(self._client.fileno())
        abort(self._client)

    def _reached(self, found: Found) -> None:
        self._bridge.resets.forget(self._client.fileno())
        if isinstance(found, EngError):
            self._fail(found)
            return
        try:
            self._introduce(found)
        except OSError as error:
            found.close()
            self._fail(error)
            return
        bridge = self._bridge
        self._stage = Exchange(bridge.mover, self._client, found, self._ended, bridge.limits)
        self._stage.start()

    def _introduce(self, target: socket.socket) -> None:
        if self._bridge.leads_to_tcp:
            _set_options(target)
            pace_if_long(target)
        if self._bridge.announces:
            # Nothing has been sent before, so there is room for all of it.
            target.send(encode_header(_as_announced(self._client, self.peer)))

    def _fail(self, error: EngError | OSError) -> None:
        abort(self._client)
        self._bridge.failed(self, error)

    def _ended(self, outcome: Outcome) -> None:
        self._bridge.carried(self, outcome)


def where_bound(endpoint: Endpoint, listeners: Sequence[socket.socket]) -> Endpoint:
    """Return the endpoint on which the sockets listen: *endpoint*, with the port that the kernel chose for port 0."""
    if isinstance(endpoint, Tcp) and endpoint.port == 0:
        return replace(endpoint, port=listeners[0].getsockname()[1])
    return endpoint


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


def _set_options(sock: socket.socket) -> None:
    """Set what every TCP connection wants: no delay, and an end to a peer that is silent for two minutes."""
    for level, option, value in _TCP_OPTIONS:
        sock.setsockopt(level, option, value)
