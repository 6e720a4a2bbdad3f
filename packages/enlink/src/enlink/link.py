"""One framed connection over any trio stream: greeting, packets, keepalive, an orderly end. stream.py dials."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Final, Literal, NoReturn, TypeGuard

import trio

from enlink.control import Close, ControlMessage, Error, Hello, Keepalive, PathState, Role, Unknown
from enlink.ecn import StandingQueue, mark_congested
from enlink.errors import ProtocolError, Unavailable
from enlink.frame import Buffer, Discarded, Event, Fault, FrameDecoder, Packets, encode_control
from enlink.port import Port
from enlink.sealed import port_of

Speech = Literal["silent", "raw", "eng"]

# Choices of ours.
GREETING_DEADLINE_S: Final = 10.0  # absolute, not idle: one byte a second buys nobody a place
KEEPALIVE_INTERVAL_S: Final = 5.0
SILENCE_LIMIT_S: Final = 2 * KEEPALIVE_INTERVAL_S
_WATCH_INTERVAL_S: Final = 1.0
_FAREWELL_S: Final = 1.0
_SCRATCH: Final = memoryview(bytearray(64 * 1024))  # one for all: nobody looks at what is thrown away
QUEUE_LIMIT_BYTES: Final = 256 * 1024  # that wait to be read: half a millisecond at 4 Gbit/s
QUEUE_INTERVAL_S: Final = 0.0005
_BULK_BYTES: Final = 32 * 1024
_BULK_PACKET_BYTES: Final = 1024
_ORIGINAL_HINT: Final = " (an original ENTA or ENTG needs --wire original)"


class LinkEnded(Unavailable):
    """The link is over. *reason* is the short name under which it is counted; the text is for people."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


class PeerFault(LinkEnded, ProtocolError):
    """The link is over because the peer broke the protocol."""

    exit_code = ProtocolError.exit_code


class Refused(LinkEnded):
    """The peer said why it ends the link."""


class Link:
    """One framed connection.

    One task receives and any number send. Every method may raise `LinkEnded`; after that, and after a send was
    cancelled half-way, nothing but `aclose` is of use. Make one with a connected stream, then `greet` or
    `hear_first_word`, and from then on keep `keep_alive` running beside.

    Args:
        hello: what this side says of itself.
        count: called with the name of each thing dropped or skipped.

    Attributes:
        speech: what the peer turned out to be: ``silent`` so far, ``raw`` packets only, or ``eng``.
        peer: the peer's HELLO, if it speaks ENG.
        marked: how many packets have learned here that more than `QUEUE_LIMIT_BYTES` wait behind them: see ecn.py.
        path_is_open: False while the peer's last word is that beyond it the path does not go on...
        path_changed: ...and what to call when that has changed; it must neither block nor raise.
    """

    def __init__(self, stream: trio.abc.Stream, hello: Hello, count: Callable[[str], None]) -> None:
        self.speech: Speech = "silent"
        self.peer: Hello | None = None
        self.marked = 0
        self.path_is_open = True
        self.path_changed: Callable[[], object] = _do_nothing
        self._hello = hello
        self._count = count
        self._stream = stream
        self._port: Port = port_of(stream)
        self._decoder = FrameDecoder(clock=trio.current_time)
        self._queue = StandingQueue(QUEUE_LIMIT_BYTES, QUEUE_INTERVAL_S, trio.current_time)
        self._events: list[Event] = []  # a few; a deque has room for many, which strangers by the hundred would take
        self._sending = trio.Lock()
        self._is_closed = False
        self._is_mid_frame = False
        self._take: Callable[[Packets], bool] = _take_nothing
        self._has_said_hello = False
        # To ask for the time is dear: `keep_alive` turns these into times once a second.
        self._has_sent = self._has_received = False
        self._waiting_since: float | None = None
        # When the peer began to speak; for ever in the future, once it has said a word.
        self._began_to_speak: float | None = None

    async def greet(self) -> Hello:
        """As the dialler: say HELLO and wait for the answer. Packets that come before it are dropped and counted.

        Raises:
            LinkEnded: no answer within `GREETING_DEADLINE_S`. An original peer needs ``--wire original``.
        """
        with trio.move_on_after(GREETING_DEADLINE_S):
            await self._send_control(self._hello)
            while self.peer is None:
                event = await self._next_event()
                if isinstance(event, Packets):
                    for _ in range(event.count):
                        self._count("before_hello")
            return self.peer
        raise LinkEnded("no_hello", f"the peer did not answer our HELLO{_ORIGINAL_HINT}")

    def skip_greeting(self) -> None:
        """Take the peer for an original one, which knows no control messages and dies of the first."""
        self.speech = "raw"

    async def hear_first_word(self) -> Hello | Packets:
        """As the listener: wait until the peer has said what it is, and answer its HELLO.

        It may be silent for ever, but has `GREETING_DEADLINE_S` for its first word from its first byte on. Packets
        that are returned here are received once more. Cancellation loses nothing; call it again.
        """
        event = await self._next_event()
        if isinstance(event, Packets):
            self._events.insert(0, event)
            self.speech = "raw"
        return event

    async def receive(self, take: Callable[[Packets], bool] | None = None) -> Packets:
        """Wait for packets and return one run of them, in order. They are good until the next call.

        With *take*, runs that it returns True for are done with, and the first other one is returned. It must not
        block: it is called while no task runs, which makes this the fast way. See pump.py.
        """
        self._take = take or _take_nothing
        try:
            while True:
                event = await self._next_event()
                if isinstance(event, Packets):
                    if self.speech == "silent":
                        self.speech = "raw"
                    if not self._take(event):
                        return event
        finally:
            self._take = _take_nothing

    async def send(self, encoded: Buffer, *, stall_limit_s: float = math.inf) -> None:
        """Send whole encoded frames, waiting while the kernel has no room.

        Raises:
            LinkEnded: also as ``stalled``, when the peer has taken nothing at all for *stall_limit_s*.
        """
        if self._is_closed:
            raise LinkEnded("closed", "the link was closed here")
        await self._send(encoded, stall_limit_s)

    async def tell_path(self, *, is_open: bool, stall_limit_s: float = math.inf) -> None:
        """Tell an ENG peer whether the path goes on beyond this side. Raises and waits as `send` does."""
        if self.speech == "eng":
            await self.send(encode_control(PathState(is_open)), stall_limit_s=stall_limit_s)

    @property
    def can_send_at_once(self) -> bool:
        """This is a socket, nobody is sending, and nothing waits for room in the kernel."""
        port = self._port
        is_busy = port.has_unsent or self._is_mid_frame or self._is_closed or self._sending.locked()
        return port.takes_offers and port.failure is None and not is_busy

    def send_at_once(self, encoded: Buffer) -> bool:
        """Send whole encoded frames without waiting; False, if that cannot be: then nothing was sent, and use `send`.

        What the kernel has no room for follows as soon as it has, and before anything else.
        """
        if not self.can_send_at_once:
            return False
        try:
            is_taken = self._port.offer(encoded)
        except (trio.BrokenResourceError, OSError):
            return False
        self._has_sent = True
        return is_taken

    def unread_bytes(self) -> int:
        """Return how much has arrived in the kernel; 0 for other streams than sockets, of which nobody knows."""
        return self._port.unread_bytes()

    @property
    def is_between_frames(self) -> bool:
        return self._decoder.is_between_frames

    async def keep_alive(self) -> NoReturn:
        """Tell an ENG peer that we live, and end the link when the peer has stopped: run this beside the rest.

        Silence counts only while somebody waits to receive: a link that is not read, because what it leads to is
        slow, is not dead.

        Raises:
            LinkEnded: nothing came for `SILENCE_LIMIT_S` (ENG peer), or half a frame and no more (any peer).
        """
        last_sent = last_received = trio.current_time()
        while True:
            asleep_since = trio.current_time()
            await trio.sleep(_WATCH_INTERVAL_S)
            self._port.settle()
            now = trio.current_time()
            if self._has_sent:
                self._has_sent, last_sent = False, now
            if self._has_received:
                self._has_received, last_received = False, now
            # We were stopped or starved: what the peer said meanwhile is still to be read.
            was_starved = now - asleep_since > 2 * _WATCH_INTERVAL_S
            if self._waiting_since is not None and not was_starved:
                silent_for = now - max(self._waiting_since, last_received)
                if silent_for >= SILENCE_LIMIT_S and self.speech == "eng":
                    raise LinkEnded("keepalive", f"the peer has said nothing for {silent_for:.0f} s")
                has_spoken = self._began_to_speak == math.inf
                if silent_for >= SILENCE_LIMIT_S and has_spoken and not self.is_between_frames:
                    raise PeerFault("frame_deadline", f"half a frame and nothing more for {silent_for:.0f} s")
            is_due = now - last_sent >= KEEPALIVE_INTERVAL_S
            # Whoever is sending at the moment says the same with more weight.
            if self.speech == "eng" and is_due and not self._sending.locked():
                await self._send_control(Keepalive())
                self._has_sent, last_sent = False, now

    async def aclose(self, message: Close | Error | None = None) -> None:
        """Close the link; with a message, tell an ENG peer first and let what is under way arrive. Takes 1 s at most.

        Safe to call twice, and from a cancelled scope.
        """
        if self._is_closed:
            return
        self._is_closed = True
        with trio.move_on_after(_FAREWELL_S, shield=True):
            if message is not None:
                # The peer went first, or another task still receives and hears what the peer has to say.
                with suppress(LinkEnded, EOFError, OSError, trio.BrokenResourceError, trio.BusyResourceError):
                    await self._say_farewell(message)
                    self._port.close()
                    # An encrypted stream has a goodbye of its own.
                    await self._stream.aclose()
        self._port.close()
        await trio.aclose_forcefully(self._stream)

    async def _say_farewell(self, message: Close | Error) -> None:
        if self.speech == "eng" or self._port.has_unsent:
            await self._send(encode_control(message) if self.speech == "eng" else b"")
        if isinstance(self._stream, trio.abc.HalfCloseableStream):
            await self._stream.send_eof()
        elif self.speech != "eng":
            return
        if self._port.failure is None:
            # Closing with unread bytes would reset the connection, and the peer might never see our last words.
            # Not into the decoder's buffer: another task may still use what was received before.
            while await self._port.read(lambda: _SCRATCH, lambda _: False):
                await self._port.take_turn()

    async def _next_event(self) -> Packets | Hello:
        """Return the next event that is not the link's own business."""
        while True:
            while self._events:
                event = self._events[0]
                match event:
                    case Packets():
                        pass
                    case Discarded(reason):
                        self._count(reason)
                    case Fault(reason, text):
                        await self._refuse(text)
                        raise PeerFault(reason, f"the peer {text}")
                    case _:
                        await self._hear(event)
                # Not before: who is cancelled while answering HELLO has still to answer it.
                del self._events[0]
                if isinstance(event, Packets | Hello):
                    self._began_to_speak = math.inf
                    return event
            began = self._began_to_speak
            if began is None or began == math.inf:
                await self._read()
            else:
                await self._read_in_time(began + GREETING_DEADLINE_S)

    async def _read_in_time(self, deadline_s: float) -> None:
        with trio.CancelScope(deadline=deadline_s):  # hundreds may wait here, and `move_on_at` is larger
            await self._read()
            return
        raise PeerFault("frame_deadline", f"not a word within {GREETING_DEADLINE_S:.0f} s of the first byte")

    async def _hear(self, message: ControlMessage) -> None:
        if isinstance(message, Close):
            raise LinkEnded("closed", f"the peer closed the link{f': {message.reason}' if message.reason else ''}")
        if isinstance(message, Error):
            raise Refused("refused", f"the peer refused the link: {message.reason}")
        if isinstance(message, Unknown):
            self._count("unknown_control")
        elif isinstance(message, Hello) and self.speech == "silent":
            if not self._has_said_hello:
                await self._send_control(self._hello)
            self.peer = message
            self.speech = "eng"
        elif self.speech != "eng":
            name = type(message).__name__.removesuffix("State").upper()  # as docs/wire-format.md has it
            raise PeerFault("bad_control", f"the peer said {name} out of turn")
        elif isinstance(message, PathState) and message.is_open != self.path_is_open:
            self.path_is_open = message.is_open
            self.path_changed()

    async def _refuse(self, text: str) -> None:
        if self.speech == "eng":
            with trio.move_on_after(_FAREWELL_S), suppress(LinkEnded):
                await self._send_control(Error(f"you {text}"))

    async def _send_control(self, message: ControlMessage) -> None:
        await self.send(encode_control(message))
        if isinstance(message, Hello):
            self._has_said_hello = True

    async def _read(self) -> None:
        """Read until there is an event for a task to look at."""
        self._waiting_since = trio.current_time()
        try:
            await self._port.take_turn()
            # From here on to where it waits nothing else runs, so it never meets the reading of `aclose`.
            if self._is_closed:
                raise LinkEnded("closed", "the link was closed here")
            is_open = await self._port.read(self._decoder.space, self._digest)
        except trio.ClosedResourceError as error:
            raise LinkEnded("closed", "the link was closed here") from error
        except EOFError as error:
            raise LinkEnded("truncated", f"the connection ended without CLOSE: {error}") from error
        except (trio.BrokenResourceError, OSError) as error:
            raise LinkEnded("reset", _how_it_broke(error)) from error
        finally:
            self._waiting_since = None
        if not is_open:
            if failure := self._port.failure:
                raise LinkEnded("reset", _how_it_broke(failure)) from failure
            if self._has_said_hello and self.peer is None:
                raise LinkEnded("truncated", f"the peer hung up on our HELLO{_ORIGINAL_HINT}")
            if self._has_said_hello or not self.is_between_frames:
                raise LinkEnded("truncated", "the connection ended without CLOSE")
            raise LinkEnded("eof", "the peer ended its side of the connection")

    def _digest(self, count: int) -> bool:
        """Take in what was received. Returns whether it is dealt with: nothing is left for a task to look at."""
        self._has_received = True
        deadline_before = self._began_to_speak
        if self._began_to_speak is None:
            self._began_to_speak = trio.current_time()
        events = self._decoder.decode(count)
        # A small read leaves nothing behind, and what it brings is in a hurry.
        if self._queue.stands(self._port.unread_bytes() if count >= _BULK_BYTES else 0):
            self.marked += sum(mark_congested(event) for event in events if _is_bulk(event))
        # Whoever speaks for the first time is a matter for tasks, and so is all that is not packets.
        if len(events) == 1 and self.speech != "silent" and not self._events:
            event = events[0]
            if isinstance(event, Packets) and self._take(event):
                self._began_to_speak = math.inf
                events = []
        self._events.extend(events)
        # The first byte sets a deadline and the first word lifts it, both for the task that waits.
        return not events and self._began_to_speak == deadline_before

    async def _send(self, encoded: Buffer, stall_limit_s: float = math.inf) -> None:
        # trio's lock visits the scheduler even when it is free, which costs four times what the sending does.
        try:
            self._sending.acquire_nowait()
        except trio.WouldBlock:
            await self._sending.acquire()
        try:
            await self._write(encoded, stall_limit_s)
        finally:
            self._sending.release()

    async def _write(self, encoded: Buffer, stall_limit_s: float) -> None:
        # A send that was cut short leaves half a frame behind, which more bytes would only complete with rubbish.
        if self._is_mid_frame:
            raise LinkEnded("cut", "an earlier send was cut short")
        await self._port.take_turn()
        self._is_mid_frame = True
        try:
            await self._port.write(encoded, stall_limit_s)
        except trio.TooSlowError as error:
            raise LinkEnded("stalled", f"the peer has taken nothing for {stall_limit_s:.0f} s") from error
        except trio.ClosedResourceError as error:
            raise LinkEnded("closed", "the link was closed here") from error
        except (trio.BrokenResourceError, OSError) as error:
            raise LinkEnded("reset", _how_it_broke(error)) from error
        self._is_mid_frame = False
        self._has_sent = True


def describe(hello: Hello | None) -> str:
    """Say in a few words who a peer is, for logs and status."""
    if hello is None:
        return "raw peer"
    kind = {Role.CLIENT_AGENT: "enta client", Role.SERVER_AGENT: "enta server", Role.GATEWAY: "entg"}[hello.role]
    addresses = "".join(f" {interface}" for interface in hello.tun)
    return f"{kind} {hello.instance!r}{addresses}"


def _is_bulk(event: Event) -> TypeGuard[Packets]:
    """Whether these are packets of flows that have much under way. To look at thousands of small ones takes long."""
    return isinstance(event, Packets) and len(event.encoded) >= event.count * _BULK_PACKET_BYTES


def _take_nothing(_: Packets) -> bool:
    """Leave every run of packets to the task that receives."""
    return False


def _do_nothing() -> None:
    """Nobody asked to be told."""


def _how_it_broke(error: Exception) -> str:
    return f"the connection broke: {error.__cause__ or error}"
