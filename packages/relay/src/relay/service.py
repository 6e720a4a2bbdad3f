"""All bridges of one process: binds what they listen on, runs them, and ends them in good order."""

from __future__ import annotations

import logging
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import trio
from enlink.activation import InheritedSockets, take_inherited_sockets
from enlink.endpoint import Tcp
from enlink.listener import listening
from enlink.program import RateLimitedLog, log_event
from enlink.splice import Mover
from enlink.supervise import Stopping

from relay.bridge import Bridge
from relay.config import RelayConfig
from relay.descriptors import fit, pipes_for, raise_limit
from relay.dial import Target, is_name
from relay.loopback import warn_if_unreachable
from relay.resets import Resets, watching_resets
from relay.resolver import Resolver, open_resolver

_logger = logging.getLogger(__name__)


@asynccontextmanager
async def listening_on(config: RelayConfig, stopping: Stopping) -> AsyncIterator[list[list[socket.socket]]]:
    """Listen on every bridge's endpoint for as long as the block runs; gives each bridge's sockets, non-blocking.

    Gives an empty list if the program is to stop before an address that is taken becomes free.

    Raises:
        EngError: as `enlink.listener.listening` does.
    """
    found: list[list[socket.socket]] = []
    inherited = take_inherited_sockets()
    async with AsyncExitStack() as stack:
        async with trio.open_nursery() as nursery:

            async def give_up() -> None:
                await stopping.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(give_up)
            for bridge in config.bridges:
                listeners = await stack.enter_async_context(
                    listening(bridge.listen, inherited=inherited, vsock_buffer_bytes=bridge.vsock_buffer_bytes)
                )
                found.append([stack.enter_context(_without_trio(listener)) for listener in listeners])
                warn_if_unreachable(bridge.listen, found[-1])
            nursery.cancel_scope.cancel()
        if not stopping.is_set:
            _close_unclaimed(inherited)
        yield [] if stopping.is_set else found


@asynccontextmanager
async def open_relay(config: RelayConfig) -> AsyncIterator[Relay]:
    """Make the relay of this process, with the name look-ups and the descriptors that it needs.

    Raises:
        ConfigError: a bridge's rules can never allow its target, or there are too few descriptors.
    """
    limit = raise_limit()
    config = fit(config, limit)
    max_pipes = 0 if config.no_splice else pipes_for(config, limit)
    targets = [bridge.target for bridge in config.bridges]
    if not any(isinstance(target, Tcp) and is_name(target.host or "") for target in targets):
        yield Relay(config, None, max_pipes)
        return
    async with open_resolver() as resolver:
        yield Relay(config, resolver, max_pipes)


def _close_unclaimed(inherited: InheritedSockets) -> None:
    """Close what systemd passes and no bridge listens on, with a warning: it has them too, and clients wait there."""
    for name, sockets in inherited.items():
        advice = f"listen on systemd:{name}, or take it out of the .socket unit"
        log_event(_logger, "socket_unclaimed", logging.WARNING, name=name, advice=advice)
        for sock in sockets:
            sock.close()


def _without_trio(listener: trio.SocketListener) -> socket.socket:
    """Take a listener's socket: accepting one by one, as trio does, is slow."""
    sock = listener.socket
    plain = socket.socket(sock.family, sock.type, sock.proto, sock.detach())
    plain.setblocking(False)
    return plain


class Relay:
    """The bridges of a configuration.

    Args:
        resolver: None, where no target is a name.

    Raises:
        ConfigError: a bridge's rules can never allow its target.
    """

    def __init__(self, config: RelayConfig, resolver: Resolver | None, max_pipes: int) -> None:
        self._config = config
        self._resolver = resolver
        self._mover = Mover(max_pipes)
        limited = RateLimitedLog(_logger)
        self._targets = [Target(bridge, resolver) for bridge in config.bridges]
        pairs = zip(config.bridges, self._targets, strict=True)
        self._bridges = [Bridge(bridge, target, self._mover, limited) for bridge, target in pairs]

    def snapshot(self) -> dict[str, object]:
        """Return every bridge's counters, for ``status``."""
        return {
            "bridges": [bridge.snapshot() for bridge in self._bridges],
            "spin": self._mover.pump.spin_counts(),
            "names": dict(sorted(self._resolver.counters.items())) if self._resolver else {},
        }

    async def run(self, listeners: Sequence[Sequence[socket.socket]], stopping: Stopping) -> None:
        """Carry connections until the wish to stop, and those that there are then for as long as the grace lasts.

        Args:
            listeners: for each bridge, its sockets. At the wish to stop nobody is left in their backlog.
        """
        self._mover.pump.spin(self._config.spin_s)
        with self._mover, watching_resets() as resets:
            async with trio.open_nursery() as looking_up:
                for target in self._targets:
                    looking_up.start_soon(target.look_up)
                try:
                    await self._carry(listeners, resets, stopping)
                finally:
                    for bridge in self._bridges:
                        bridge.close()
                        bridge.abort()
                looking_up.cancel_scope.cancel()

    async def _carry(self, listeners: Sequence[Sequence[socket.socket]], resets: Resets, stopping: Stopping) -> None:
        for bridge, sockets in zip(self._bridges, listeners, strict=True):
            bridge.open(sockets, resets)
        await stopping.wait()
        for bridge in self._bridges:
            bridge.close()
        with trio.move_on_after(self._config.grace_s) as grace:
            for bridge in self._bridges:
                await bridge.wait_until_idle()
        if grace.cancelled_caught:
            log_event(_logger, "grace_over", logging.WARNING, grace_s=self._config.grace_s)
