"""One side of a gateway: the connections it has, which of them holds the place, and what becomes of the others.

Original peers cannot say who they are, and an original server-side agent says nothing until it is sent something. So:

- who speaks first (HELLO, or an IP packet) takes the place;
- who says nothing for 300 ms gets packets as long as nobody has spoken, the oldest first: a port scanner takes
  nothing from a real agent;
- who speaks while another speaker has the place replaces it if it is the same one come back (same TUN address; on the
  leg to other gateways, anyone), and is refused otherwise: frames of two agents are never mixed;
- a raw peer that has shut down its sending side still gets its replies.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Final, Literal

import trio
from enlink.endpoint import Tcp
from enlink.frame import Close, Error, Hello, Packets, Role
from enlink.link import Link, LinkEnded, Wire, describe
from enlink.program import RateLimitedLog, log_event
from enlink.status import Counters
from enlink.stream import Dialer, LinkUnavailable, serve
from enlink.supervise import Backoff

from entg.router import Router

LegName = Literal["enta", "entg"]

# Choices of ours.
PROVISIONAL_AFTER_S: Final = 0.3
CONNECTION_LIMIT: Final = 256  # on a leg, speakers and silent ones together
STALL_LIMIT_S: Final = 10.0  # for a speaker that takes nothing more
SILENT_STALL_LIMIT_S: Final = 1.0  # for one that never said a word
HALF_CLOSED_LIMIT_S: Final = 60.0  # without a packet to deliver
_PROVED_GOOD_S: Final = 1.0

_logger = logging.getLogger(__name__)


class Connection:
    """A link on a leg, and what it takes to end it."""

    def __init__(self, link: Link, where: str) -> None:
        self.link = link
        self.where = where
        self.identity: str | None = None
        self.since_s = self.last_sent_s = trio.current_time()
        self.reading = trio.CancelScope()
        self.drained = trio.Event()
        self.farewell: Close | Error = Close("the gateway is stopping")
        self._scope = trio.CancelScope()
        self.ended_by: str | None = None

    def end(self, reason: str, farewell: Close | Error) -> None:
        """End this connection from outside; *reason* is the name under which that is counted."""
        if self.ended_by is None:
            self.ended_by, self.farewell = reason, farewell
        self._scope.cancel()

    @property
    def scope(self) -> trio.CancelScope:
        return self._scope


class Leg:
    """One side of a gateway.

    Args:
        name: what connects here: ``enta`` agents, or the peer ``entg``.
        wire: ``original`` if nobody here knows control messages.
    """

    def __init__(self, name: LegName, router: Router, counters: Counters, wire: Wire = "auto") -> None:
        self.name = name
        self._router = router
        self._counters = counters
        self._wire = wire
        self._connections: list[Connection] = []
        self._silent: list[Connection] = []
        self._speaker: Connection | None = None
        self._limited = RateLimitedLog(_logger)

    @property
    def holder(self) -> Connection | None:
        """Who gets the packets for this leg: the speaker, or else the oldest silent connection."""
        return self._speaker or (self._silent[0] if self._silent else None)

    def snapshot(self) -> Mapping[str, object]:
        """Describe this leg for ``status``."""
        holder = self.holder
        if holder is None:
            return {"connected": False, "connections": len(self._connections)}
        return {
            "connected": True,
            "address": holder.where,
            "peer": describe(holder.link.peer),
            "speech": holder.link.speech,
            "for_s": round(trio.current_time() - holder.since_s, 3),
            "connections": len(self._connections),
        }

    async def send(self, packets: Packets) -> None:
        """Pass packets to whoever holds the place; without one, or when it takes no more, drop and count them."""
        holder = self.holder
        if holder is None:
            self._drop("no_link", packets)
            return
        limit_s = STALL_LIMIT_S if holder is self._speaker else SILENT_STALL_LIMIT_S
        with trio.move_on_after(limit_s) as waiting:
            try:
                await holder.link.send(packets.encoded)
            except LinkEnded:
                self._drop("link_ended", packets)
                holder.end("reset", Close())
                return
        if waiting.cancelled_caught:
            self._drop("stalled", packets)
            holder.end("stalled", Close())
            return
        holder.last_sent_s = trio.current_time()
        self._counters.add(f"to_{self.name}", "packets", packets.count)
        self._counters.add(f"to_{self.name}", "bytes", len(packets.encoded))

    async def listen(self, listeners: list[trio.SocketListener], nursery: trio.Nursery) -> None:
        """Serve everyone who connects, until cancelled. The connections live in *nursery*."""
        await serve(listeners, self._accept, nursery)

    async def dial(self, dialer: Dialer) -> None:
        """Keep a link to *dialer*'s endpoint, for ever, until cancelled."""
        backoff, was_reachable = Backoff(), True
        while True:
            try:
                stream = await dialer.dial()
            except LinkUnavailable as error:
                if was_reachable:
                    log_event(_logger, "unreachable", logging.WARNING, leg=self.name, error=error)
                was_reachable = False
            else:
                connection = self._connection(stream)
                await self._run(connection, is_dialler=True)
                if connection.identity is not None:
                    was_reachable = True
                if trio.current_time() - connection.since_s >= _PROVED_GOOD_S:
                    backoff.reset()
            await trio.sleep(backoff.next_delay_s())

    async def drain(self) -> None:
        """Pass on what has arrived, and no more. Returns when that is done; the connections stay open for the other leg."""
        for connection in self._connections:
            connection.reading.cancel()
        for connection in list(self._connections):
            await connection.drained.wait()

    async def _accept(self, stream: trio.SocketStream) -> None:
        if len(self._connections) >= CONNECTION_LIMIT and not self._evict_one():
            self._counters.add("refused", "too_many")
            self._limited.log("refused", "too_many", leg=self.name)
            await trio.aclose_forcefully(stream)
            return
        await self._run(self._connection(stream), is_dialler=False)

    def _evict_one(self) -> bool:
        """Make room by ending the youngest connection that is silent and waits in line for nothing."""
        waiting = [connection for connection in self._silent if connection is not self.holder]
        if not waiting:
            return False
        waiting[-1].end("evicted", Error("too many connections"))
        self._silent.remove(waiting[-1])
        return True

    def _connection(self, stream: trio.SocketStream) -> Connection:
        hello = Hello(Role.GATEWAY)
        link = Link(stream, hello, lambda reason: self._counters.add("dropped", reason))
        return Connection(link, _peer_address(stream))

    async def _run(self, connection: Connection, *, is_dialler: bool) -> None:
        """Serve one connection from its first word to its last. Its faults end it, and nothing else."""
        self._connections.append(connection)
        reason, text = "stopped", "the gateway is stopping"
        try:
            with connection.scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(connection.link.keep_alive)
                    await self._introduce(connection, is_dialler=is_dialler)
                    await self._forward(connection)
        except* LinkEnded as group:
            ended = _first(group)
            reason, text = ended.reason, str(ended)
        finally:
            connection.drained.set()
            self._connections.remove(connection)
            if connection is self._speaker:
                self._speaker = None
            if connection.ended_by is not None:
                reason, text = connection.ended_by, connection.farewell.reason
            self._counters.add("ended", reason)
            event = "disconnected" if connection.identity is not None else "passed_by"
            self._limited.log(event, reason, logging.INFO, leg=self.name, address=connection.where, error=text)
            await connection.link.aclose(connection.farewell)

    async def _introduce(self, connection: Connection, *, is_dialler: bool) -> None:
        """Find out who this is and give it the place, or raise `LinkEnded`."""
        link, first = connection.link, None
        if self._wire == "original":
            link.skip_greeting()
        if is_dialler:
            # An original gateway says nothing either, until an agent behind it has something to say.
            identity = "dialled" if self._wire == "original" else _identity(await link.greet())
        else:
            with trio.move_on_after(0 if self._wire == "original" else PROVISIONAL_AFTER_S):
                first = await link.hear_first_word()
            if first is None:
                self._silent.append(connection)
                try:
                    first = await link.hear_first_word()
                finally:
                    if connection in self._silent:
                        self._silent.remove(connection)
            identity = _identity(first)
        incumbent = self._speaker
        if incumbent is not None:
            if self.name == "enta" and identity != incumbent.identity:
                connection.farewell = Error(f"another agent is connected: {incumbent.where}")
                raise LinkEnded("refused_busy", f"refused, because {incumbent.where} is connected")
            incumbent.end("replaced", Error(f"replaced by {connection.where}"))
        connection.identity = identity
        self._speaker = connection
        log_event(_logger, "connected", leg=self.name, address=connection.where, peer=describe(link.peer))

    async def _forward(self, connection: Connection) -> None:
        link, counters = connection.link, self._counters
        try:
            # The scope is about waiting only: once cancelled, what the kernel holds already is still read and passed on.
            with connection.reading:
                while True:
                    packets = await link.receive()
                    counters.add(f"from_{self.name}", "packets", packets.count)
                    counters.add(f"from_{self.name}", "bytes", len(packets.encoded))
                    with trio.CancelScope(shield=True):  # bounded by the stall limits of the leg it goes to
                        await self._router.forward(self, packets)
        except LinkEnded as ended:
            if ended.reason != "eof":
                raise
        finally:
            connection.drained.set()
        if not connection.reading.cancel_called:
            await self._deliver_to_half_closed(connection)
        else:
            await trio.sleep_forever()

    async def _deliver_to_half_closed(self, connection: Connection) -> None:
        """Keep a raw peer that has said all it will say, for its replies, until somebody else speaks."""
        if connection is self._speaker:
            self._speaker = None
        connection.last_sent_s = trio.current_time()
        self._silent.insert(0, connection)
        try:
            while trio.current_time() < connection.last_sent_s + HALF_CLOSED_LIMIT_S:
                await trio.sleep_until(connection.last_sent_s + HALF_CLOSED_LIMIT_S)
        finally:
            if connection in self._silent:
                self._silent.remove(connection)
        raise LinkEnded("eof", "the peer ended its side of the connection")

    def _drop(self, reason: str, packets: Packets) -> None:
        self._counters.add("dropped", reason, packets.count)
        self._limited.log("dropping", reason, leg=self.name)


def _identity(first: Hello | Packets) -> str:
    """Who a speaker is, as far as it can be told apart: by its TUN address, which is its packets' source."""
    if isinstance(first, Hello):
        return str(first.tun[0].ip) if first.tun else f"gateway {first.instance}"
    packet = bytes(next(iter(first)))
    return ".".join(map(str, packet[12:16])) if packet[0] >> 4 == 4 else packet[8:24].hex(":", 2)


def _peer_address(stream: trio.SocketStream) -> str:
    try:
        host, port, *_ = stream.socket.getpeername()
    except OSError:
        return "unknown"  # gone before we looked
    return str(Tcp(host, port)).removeprefix("tcp://")


def _first(group: BaseExceptionGroup[LinkEnded]) -> LinkEnded:
    for error in group.exceptions:
        return _first(error) if isinstance(error, BaseExceptionGroup) else error
    raise AssertionError("an exception group is never empty")
