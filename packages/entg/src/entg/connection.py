"""A connection on a leg: what is known of it, and how it is ended in good order. What it carries is up to legs.py."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final, TypeVar

import trio
from enlink.control import Close, Error
from enlink.endpoint import Tcp
from enlink.frame import Packets
from enlink.link import Link

from entg.place import Identity

T = TypeVar("T")

# Choices of ours.
LAST_WORDS_S: Final = 1.0  # how long a connection that is to end may go on sending
PAUSE_S: Final = 0.05  # after such a pause it has nothing more to say


class Connection:
    """A connection on a leg.

    Attributes:
        address: the other end, for people.
        evidence: what the other end has proved of itself, for people; None if nothing was asked for.
        identity: who it is, once it has spoken and got the place.
        has_finished_reading: nothing that comes from here will be passed on any more.
        has_ended: it is to be closed. Until then `reason`, `text` and `farewell` say that the gateway stops.
    """

    def __init__(self, stream: trio.abc.Stream, link: Link, evidence: str | None = None) -> None:
        self.link = link
        self.evidence = evidence
        self.address = address_of(stream)
        self.identity: Identity | None = None
        self.since_s = self.last_sent_s = trio.current_time()
        self.has_finished_reading = trio.Event()
        self.has_ended = trio.Event()
        self.reason, self.text = "stopped", "the gateway is stopping"
        self.farewell: Close | Error = Close(self.text)
        self._is_stopping = False
        self._waiting = trio.CancelScope()
        self._last_words_until_s: float | None = None
        self._owed_bytes = 0

    def end(self, reason: str, text: str, farewell: Close | Error | None = None) -> None:
        """End this connection, once what has arrived on it is passed on. The first *reason* counts."""
        if not self.has_ended.is_set():
            self.reason, self.text, self.farewell = reason, text, farewell or Close(text)
            self.has_ended.set()
            self.stop_reading()

    def stop_reading(self) -> None:
        """Read no more than what has arrived."""
        self._is_stopping = True
        self._waiting.cancel()

    async def unless_stopped(self, wait: Callable[[], Awaitable[T]], patience_s: float = math.inf) -> T | None:
        """Return what *wait* returns; None once reading is to stop, or *patience_s* have passed."""
        if not self._is_stopping:
            with trio.CancelScope(deadline=trio.current_time() + patience_s) as self._waiting:
                return await wait()
        return None

    async def receive(self, take: Callable[[Packets], bool] | None = None) -> Packets | None:
        """Wait for packets that *take* does not take at once; None once there is nothing more to pass on.

        After `stop_reading` that is what the kernel holds by then, however slow the receiver of it all is, and for a
        second at most whatever else comes without a pause.
        """
        packets = await self.unless_stopped(partial(self.link.receive, take))
        return await self._receive_last() if packets is None else packets

    async def _receive_last(self) -> Packets | None:
        if self._last_words_until_s is None:
            self._last_words_until_s = trio.current_time() + LAST_WORDS_S
            self._owed_bytes = self.link.unread_bytes()
        if self._owed_bytes > 0 or trio.current_time() < self._last_words_until_s:
            with trio.move_on_after(PAUSE_S):
                packets = await self.link.receive()
                self._owed_bytes -= len(packets.encoded)
                return packets
        return None


def address_of(stream: trio.abc.Stream) -> str:
    """Write for a person who is at the other end."""
    try:
        host, port, *_ = stream.socket.getpeername() if isinstance(stream, trio.SocketStream) else ("memory", 0)
    except OSError:
        return "unknown"  # gone before we looked
    return spell(Tcp(host, port))


def spell(endpoint: Tcp) -> str:
    """Write an endpoint for a person, who need not be told that it is TCP."""
    return str(endpoint).removeprefix("tcp://")


def spell_listeners(listeners: list[trio.SocketListener]) -> str:
    """Write for a person where listeners listen."""
    names = (listener.socket.getsockname()[:2] for listener in listeners)
    return ", ".join(spell(Tcp(host, port)) for host, port in names)
