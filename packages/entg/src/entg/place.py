"""Decide which of a leg's connections gets its packets. Does no I/O: see legs.py for that.

Original peers cannot say who they are, and an original agent beside a server says nothing until it is sent something.
So:

- who speaks (HELLO, or an IP packet) takes the place from whoever is silent: a port scanner takes it from nobody;
- who speaks while another speaker has the place replaces it if it is the same one, come back, and is refused
  otherwise: the packets of two agents are never mixed;
- a raw speaker never replaces one that speaks ENG: that one says every few seconds that it lives, and would say HELLO
  when it came back;
- a raw speaker that has shut down its sending side keeps the place for its replies, until somebody else speaks;
- without a speaker, the oldest silent connection gets the packets; the next one waits until it ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv6Address
from typing import Generic, TypeVar

from enlink.control import Hello
from enlink.frame import Packets

C = TypeVar("C")


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a speaker is, as far as that can be told.

    Attributes:
        names: what it goes by; two speakers who share a name are the same one.
        is_eng: it has said HELLO.
    """

    names: frozenset[str]
    is_eng: bool


def identify_agent(first: Hello | Packets) -> Identity | None:
    """Tell an agent by its TUN addresses, which HELLO names and packets bear as their source.

    Returns:
        None, if all that was heard are the IPv6 link-local packets that a TUN device sends of its own accord: their
        source is made up anew each time.
    """
    if isinstance(first, Hello):
        return Identity(frozenset(str(tun.ip) for tun in first.tun) or frozenset((first.instance,)), is_eng=True)
    for packet in first:
        if source := _source(packet):
            return Identity(frozenset((source,)), is_eng=False)
    return None


def identify_gateway(first: Hello | Packets) -> Identity:
    """Take every gateway for the one peer: what it sends bears the addresses of agents, and the newest is right."""
    return Identity(frozenset(("gateway",)), is_eng=isinstance(first, Hello))


def _source(packet: memoryview) -> str | None:
    if packet[0] >> 4 == 4:
        return ".".join(map(str, packet[12:16]))
    source = IPv6Address(bytes(packet[8:24]))
    return None if source.is_link_local or source.is_unspecified else str(source)


class Place(Generic[C]):
    """The place on a leg, who holds it, and who stands in line for it."""

    def __init__(self) -> None:
        self._speaker: tuple[C, Identity] | None = None
        self._half_closed: C | None = None
        self._silent: list[C] = []

    @property
    def speaker(self) -> C | None:
        """Who speaks here."""
        return self._speaker[0] if self._speaker else None

    @property
    def holder(self) -> C | None:
        """Who gets the packets."""
        if self._speaker:
            return self._speaker[0]
        return self._half_closed or (self._silent[0] if self._silent else None)

    @property
    def last_in_line(self) -> C | None:
        """The youngest silent connection, if it does not hold the place: the first to go where there are too many."""
        return self._silent[-1] if self._silent and self._silent[-1] is not self.holder else None

    def stand_in_line(self, connection: C) -> None:
        """Let a connection that has not said who it is have the packets when its turn comes."""
        if connection not in self._silent:
            self._silent.append(connection)

    def incumbent_against(self, identity: Identity) -> C | None:
        """Return the speaker that keeps such a newcomer out, if there is one."""
        if self._speaker is None:
            return None
        incumbent, known = self._speaker
        is_same = not known.names.isdisjoint(identity.names)
        return None if is_same and (identity.is_eng or not known.is_eng) else incumbent

    def take(self, connection: C, identity: Identity) -> list[C]:
        """Give the place to a connection that has spoken. Returns those whom it displaces, who are to be ended."""
        displaced = [other for other in (self.speaker, self._half_closed) if other is not None]
        self.leave(connection)
        self._speaker, self._half_closed = (connection, identity), None
        return displaced

    def half_close(self, connection: C) -> None:
        """Note that the speaker will say no more. It keeps the place until somebody else speaks."""
        if connection is self.speaker:
            self._speaker, self._half_closed = None, connection

    def leave(self, connection: C) -> None:
        """Forget a connection that has ended, whatever it was here."""
        if connection is self.speaker:
            self._speaker = None
        if connection is self._half_closed:
            self._half_closed = None
        if connection in self._silent:
            self._silent.remove(connection)
