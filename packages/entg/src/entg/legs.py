"""One side of a gateway: accept or dial, find out who is there, move packets. Who gets them is decided in place.py."""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Final, Literal

import trio
from enlink.attested import AttestedSide, AttestedStream
from enlink.connection import Unreachable
from enlink.control import Close, Error, Hello, Role
from enlink.errors import leaves
from enlink.frame import Packets, Wire
from enlink.link import Link, LinkEnded, describe
from enlink.status import Counters
from enlink.stream import Dialer, serve
from enlink.supervise import Backoff
from enlink.timers import Timer, current_timers

from entg.connection import Connection, address_of, spell, spell_listeners
from entg.handshakes import Handshakes
from entg.ledger import Ledger
from entg.path import Onward
from entg.place import Identity, Place, identify_agent, identify_gateway
from entg.router import Router

LegName = Literal["enta", "entg"]

# Choices of ours.
PROVISIONAL_AFTER_S: Final = 0.3
# On a leg; all of this on both stays below half of the usual 1,024 descriptors.
CONNECTION_LIMIT: Final = 200
ATTESTED_LIMIT: Final = 80  # of three descriptors each; handshakes that are under way count
FAREWELL_LIMIT: Final = 32
STALL_LIMIT_S: Final = 10.0  # for one that has spoken and takes nothing more
SILENT_STALL_LIMIT_S: Final = 1.0  # for one that never said a word
HALF_CLOSED_LIMIT_S: Final = 60.0  # without a packet to deliver
PROVED_GOOD_S: Final = 1.0
LONG_RUN: Final = 256  # packets

_HELLO: Final = Hello(Role.GATEWAY)


class Leg:
    """One side of a gateway.

    Args:
        name: what connects here: ``enta`` agents, or the peer ``entg``.
        wire: ``original`` if nobody here knows control messages.
        attested: makes attested links of plain ones; without it they stay plain.
    """

    def __init__(
        self,
        name: LegName,
        router: Router,
        counters: Counters,
        wire: Wire = "auto",
        attested: AttestedSide | None = None,
    ) -> None:
        self.name = name
        self._attested = attested
        self._router = router
        self._wire = wire
        self._place: Place[Connection] = Place()
        self._connections: list[Connection] = []
        self._onward = Onward()
        self._way: Mapping[str, object] = {}
        self._changed_s = trio.current_time()
        self._ledger = Ledger(name, counters)
        self._sent = self._ledger.sent
        self._leaving = 0
        self._handshakes = Handshakes(attested) if attested else None
        self._limit = ATTESTED_LIMIT if attested else CONNECTION_LIMIT

    def snapshot(self) -> Mapping[str, object]:
        """Describe this leg for ``status``."""
        holder = self._place.holder
        if holder is None:
            state = "waiting"
        elif holder.identity is None:
            state = "silent"
        else:
            state = "connected" if holder is self._place.speaker else "half_closed"
        return {
            **self._way,
            "connected": state == "connected",
            "state": state,
            "for_s": round(trio.current_time() - (holder.since_s if holder else self._changed_s), 3),
            "address": holder.address if holder else None,
            "peer": describe(holder.link.peer) if holder else None,
            "path": "open" if self.path_is_open else "closed",
            **self._attestation(holder),
            "problem": self._ledger.trouble[1] if self._ledger.trouble and not holder else None,
            "marked": holder.link.marked if holder else 0,
            "connections": len(self._connections),
        }

    def _attestation(self, holder: Connection | None) -> Mapping[str, object]:
        if self._attested is None:
            return {}
        return {"attested": {"terms": str(self._attested), "peer": holder.evidence if holder else None}}

    @property
    def path_is_open(self) -> bool:
        """Somebody holds the place, and has not said that the path ends there."""
        holder = self._place.holder
        return holder is not None and holder.link.path_is_open

    def note_onward(self, *, is_open: bool) -> None:
        """Take note whether what comes from here goes on beyond the other leg, and tell the speaker."""
        self._onward.note(is_open=is_open)

    def _note_path(self) -> None:
        """Let the other leg know what lies beyond this one, when that may have changed."""
        self._router.note_path(self)

    async def send(self, packets: Packets) -> None:
        """Pass packets to whoever holds the place; without one, or when it takes no more, drop and count them."""
        holder = self._place.holder
        if holder is None:
            self._ledger.note_sent_dropped("no_link", packets)
            return
        try:
            limit_s = STALL_LIMIT_S if holder.identity else SILENT_STALL_LIMIT_S
            await holder.link.send(packets.encoded, stall_limit_s=limit_s)
        except LinkEnded as ended:
            self._ledger.note_sent_dropped("stalled" if ended.reason == "stalled" else "link_ended", packets)
            self._give_up(holder, ended)
            return
        self._note_sent(holder, packets)

    def send_at_once(self, packets: Packets) -> bool:
        """Do what `send` does, if that can be done without waiting."""
        holder = self._place.holder
        if holder is None:
            self._ledger.note_sent_dropped("no_link", packets)
        elif not holder.link.send_at_once(packets.encoded):
            return False
        else:
            self._note_sent(holder, packets)
        return True

    async def listen(self, listeners: list[trio.SocketListener], connections: trio.Nursery) -> None:
        """Accept everyone until cancelled. Connections live in *connections*, and stay."""
        self._way = {"listening": spell_listeners(listeners)}
        await serve(listeners, self.accept, connections)

    async def dial(self, dialer: Dialer, connections: trio.Nursery) -> None:
        """Keep a connection to *dialer*'s endpoint until cancelled. It lives in *connections*, and stays."""
        self._way = {"dialling": spell(dialer.endpoint)}
        backoff = Backoff()
        while True:
            try:
                stream = await dialer.dial()
                connection = self._admit(stream, await self._attest(stream))
            except Unreachable as error:
                text = f"{error}; does the peer gateway listen there (--entg-listen)?"
                self._ledger.note_trouble("unreachable", text)
            except LinkEnded as ended:
                self._ledger.note_failed_attempt(ended)
            else:
                connections.start_soon(self._run, connection, True)
                await connection.has_finished_reading.wait()
                if trio.current_time() - connection.since_s >= PROVED_GOOD_S:
                    backoff.reset()
            await trio.sleep(backoff.next_delay_s())

    async def drain(self) -> None:
        """Pass on what has arrived. Connections stay open for what the other leg has to deliver, until cancelled."""
        for connection in self._connections:
            connection.stop_reading()
        for connection in list(self._connections):
            await connection.has_finished_reading.wait()

    async def accept(self, stream: trio.abc.Stream) -> None:
        """Serve one that has connected, to its end."""
        if self._is_full and not self._make_room():
            self._ledger.note_refused("too_many")
            await trio.aclose_forcefully(stream)
            return
        address = address_of(stream)
        try:
            attested = await self._attest(stream)
        except LinkEnded as ended:
            self._ledger.note_refused(ended.reason, logging.WARNING, address=address, error=ended)
            return
        await self._run(self._admit(stream, attested), is_dialler=False)

    async def _attest(self, stream: trio.abc.Stream) -> AttestedStream | None:
        """Make an attested stream of a plain one; None where plain ones will do.

        Raises:
            LinkEnded: the peer was not accepted, or did not accept us; *stream* is closed.
        """
        return None if self._handshakes is None else await self._handshakes.shake_hands(stream)

    @property
    def _is_full(self) -> bool:
        return len(self._connections) + len(self._handshakes or ()) >= self._limit

    def _make_room(self) -> bool:
        """End the last connection in line, or else the first that has yet to say a word. Returns if there was one.

        Where most are handshakes, the oldest of these goes first: whoever has a link is worth more.
        """
        if self._handshakes is not None and len(self._handshakes) > self._limit // 2:
            return self._handshakes.end_oldest()
        holder = self._place.holder
        wordless = (connection for connection in self._connections if not connection.identity)
        leaving = self._place.last_in_line or next((other for other in wordless if other is not holder), None)
        if leaving is None:
            return self._handshakes is not None and self._handshakes.end_oldest()
        self._forget(leaving)
        leaving.end("too_many", "there are too many connections", Error("there are too many connections"))
        return True

    def _admit(self, stream: trio.abc.Stream, attested: AttestedStream | None) -> Connection:
        link = Link(attested.stream if attested else stream, _HELLO, self._ledger.note_received_dropped)
        connection = Connection(stream, link, attested.evidence if attested else None)
        self._connections.append(connection)
        return connection

    async def _run(self, connection: Connection, is_dialler: bool) -> None:
        """Serve one connection to its end. Its faults end it, and nothing else."""
        retirement = self._retire_in_time(connection)
        try:
            # Strangers by the hundred may stay silent: they have no task beside this one.
            if (first := await self._hear_first_word(connection, is_dialler=is_dialler)) is not None:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._beside, connection, connection.link.keep_alive)
                    identity = await self._introduce(connection, first)
                    if identity is not None and self._claim(connection, identity):
                        tell = partial(self._onward.tell, connection.link, stall_limit_s=STALL_LIMIT_S)
                        nursery.start_soon(self._beside, connection, tell)
                        await self._forward(connection)
                    await self._outlast_reading(connection)
                    nursery.cancel_scope.cancel()
            await self._outlast_reading(connection)
        except* LinkEnded as group:
            ended = next(error for error in leaves(group) if isinstance(error, LinkEnded))
            connection.end(ended.reason, str(ended))
        finally:
            if retirement is not None:
                retirement.cancel()
            connection.has_finished_reading.set()
            self._forget(connection)
            self._ledger.note_end(connection, is_dialler=is_dialler)
            await self._close(connection)

    async def _close(self, connection: Connection) -> None:
        """Say farewell, which takes a second where a peer does not hang up; not to strangers by the dozen."""
        self._leaving += 1
        is_worth_it = connection.identity is not None or self._leaving <= FAREWELL_LIMIT
        await connection.link.aclose(connection.farewell if is_worth_it else None)
        self._leaving -= 1

    async def _beside(self, connection: Connection, work: Callable[[], Awaitable[object]]) -> None:
        """Do what goes on beside the reading, and give the connection up when that fails."""
        try:
            await work()
        except LinkEnded as ended:
            self._give_up(connection, ended)

    def _retire_in_time(self, connection: Connection) -> Timer | None:
        """See to it that a link ends whose peer was judged too long ago. The one that dials makes another."""
        if self._attested is None or (age_s := self._attested.max_link_age_s) == math.inf:
            return None
        text = f"attested {age_s:.0f} s ago, as long as the policy allows"
        return current_timers().after(age_s, lambda: connection.end("reattest", text, Close(text)))

    async def _hear_first_word(self, connection: Connection, *, is_dialler: bool) -> Hello | Packets | None:
        """Hear what a peer says first; None if it is to end before. Who is silent stands in line meanwhile."""
        link = connection.link
        if self._wire == "original":
            # An original gateway says nothing either, until an agent behind it has something to say.
            link.skip_greeting()
        elif is_dialler:
            return await connection.unless_stopped(link.greet)
        elif (first := await connection.unless_stopped(link.hear_first_word, PROVISIONAL_AFTER_S)) is not None:
            return first
        self._stand_in_line(connection, "silent")
        return await connection.unless_stopped(link.hear_first_word)

    async def _introduce(self, connection: Connection, first: Hello | Packets) -> Identity | None:
        """Find out who this is; None if it is to end before it has said so."""
        while (identity := self._identify(first)) is None:
            chatter = await connection.link.receive()
            self._ledger.received_dropped["link_local"] += chatter.count
            self._stand_in_line(connection, "link_local")
            heard = await connection.unless_stopped(connection.link.hear_first_word)
            if heard is None:
                return None
            first = heard
        return identity

    def _stand_in_line(self, connection: Connection, reason: str) -> None:
        if connection.has_ended.is_set():
            return  # it had to make room, and is forgotten already
        self._place.stand_in_line(connection)
        self._note_path()
        self._ledger.note_silent(connection, reason)

    def _identify(self, first: Hello | Packets) -> Identity | None:
        return identify_agent(first) if self.name == "enta" else identify_gateway(first)

    def _claim(self, connection: Connection, identity: Identity) -> bool:
        """Give a speaker the place, or turn it away. Returns whether it has got it."""
        peer = connection.link.peer
        if peer is not None and (peer.role is Role.GATEWAY) != (self.name == "entg"):
            expected = "agents" if self.name == "enta" else "the peer gateway"
            text = f"this port is for {expected}, and you are {describe(peer)}: connect to the other one"
            connection.end("wrong_port", text, Error(text))
            return False
        if incumbent := self._place.incumbent_against(identity):
            text = f"another {'agent' if self.name == 'enta' else 'gateway'} is connected: {incumbent.address}"
            connection.end("busy", text, Error(text))
            return False
        for displaced in self._place.take(connection, identity):
            text = f"replaced by {connection.address}"
            displaced.end("replaced", text, Error(text))
        connection.identity = identity
        connection.link.path_changed = self._note_path
        self._note_path()
        self._ledger.note_connected(connection, peer)
        return True

    async def _forward(self, connection: Connection) -> None:
        received = self._ledger.received

        def take(packets: Packets) -> bool:
            is_taken = self._router.forward_at_once(self, packets)
            if is_taken:
                received["packets"] += packets.count
                received["bytes"] += len(packets.encoded)
            return is_taken

        try:
            while (packets := await connection.receive(take)) is not None:
                received["packets"] += packets.count
                received["bytes"] += len(packets.encoded)
                await self._router.forward(self, packets)
                # Small packets cost more than the reading of them, after which the link gives others their turn.
                if packets.count >= LONG_RUN:
                    await trio.lowlevel.checkpoint()
        except LinkEnded as ended:
            if ended.reason != "eof":
                raise
            connection.has_finished_reading.set()
            self._place.half_close(connection)
            await self._outlast_half_close(connection)

    async def _outlast_reading(self, connection: Connection) -> None:
        """Stay when nothing more is read: where the gateway stops, what the other leg has to deliver may go here."""
        connection.has_finished_reading.set()
        await connection.has_ended.wait()

    async def _outlast_half_close(self, connection: Connection) -> None:
        """Keep a raw peer that has said all it will say for its replies, until there are none or somebody speaks."""
        connection.last_sent_s = trio.current_time()
        while not connection.has_ended.is_set():
            left_s = connection.last_sent_s + HALF_CLOSED_LIMIT_S - trio.current_time()
            if left_s <= 0:
                connection.end("eof", "the peer has ended its side, and there are no more replies")
            with trio.move_on_after(left_s):
                await connection.has_ended.wait()

    def _give_up(self, connection: Connection, ended: LinkEnded) -> None:
        """Send nothing more to a connection that has failed; what has arrived on it is still passed on."""
        self._vacate(connection)
        connection.end(ended.reason, str(ended))

    def _vacate(self, connection: Connection) -> None:
        if connection is self._place.holder:
            self._changed_s = trio.current_time()
            self._ledger.note_vacancy()
        self._place.leave(connection)
        self._note_path()

    def _forget(self, connection: Connection) -> None:
        self._vacate(connection)
        if connection in self._connections:
            self._connections.remove(connection)

    def _note_sent(self, holder: Connection, packets: Packets) -> None:
        if holder.has_finished_reading.is_set():
            holder.last_sent_s = trio.current_time()
        self._sent["packets"] += packets.count
        self._sent["bytes"] += len(packets.encoded)
