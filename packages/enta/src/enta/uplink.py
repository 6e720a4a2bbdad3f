"""The agent's link to its gateway: dialled, greeted, kept alive, and made again for ever.

Packets that find no link wait in a bounded queue, whose oldest give way: what a TCP sends last is what its peer misses.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import Final, NoReturn

import trio
from enlink.attested import AttestedSide
from enlink.connection import Unreachable
from enlink.control import Close, Hello
from enlink.errors import leaves
from enlink.frame import Packets, Wire, encode_packets
from enlink.link import Link, LinkEnded, PeerFault, describe
from enlink.program import RateLimitedLog, log_event
from enlink.status import Counters
from enlink.stream import Dialer
from enlink.supervise import Backoff

# Choices of ours.
QUEUE_LIMIT_BYTES: Final = 1024 * 1024  # sixteen of the largest packets, or seven hundred of the usual ones
_PROVED_GOOD_S: Final = 1.0

_logger = logging.getLogger(__name__)


class PacketQueue:
    """Packets that wait for a link, oldest first; beyond *limit_bytes* the oldest are dropped."""

    def __init__(self, limit_bytes: int = QUEUE_LIMIT_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._packets: deque[bytes] = deque()
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._packets)

    def put(self, packets: Packets) -> int:
        """Append packets and return how many old ones had to go."""
        for packet in packets:
            self._packets.append(bytes(packet))
            self.size_bytes += len(packet)
        dropped = 0
        while self.size_bytes > self._limit_bytes:
            self.size_bytes -= len(self._packets.popleft())
            dropped += 1
        return dropped

    def take_all(self) -> Packets:
        """Empty the queue."""
        packets = Packets(memoryview(encode_packets(self._packets)), len(self._packets))
        self._packets.clear()
        self.size_bytes = 0
        return packets


class Uplink:
    """Keeps one link to the gateway.

    Args:
        deliver: takes what the gateway sends, at once and without blocking. Called while no task runs, see `Link`.
        wire: ``original`` for a gateway that knows no control messages.
        attested: makes an attested link of a plain one; without it, it stays plain.
        is_once: the first failure is the end, instead of another attempt.
        changed: called when `path_is_open` may have changed. It must neither block nor raise.

    Attributes:
        has_been_up: set when the gateway has answered for the first time.
    """

    def __init__(
        self,
        dialer: Dialer,
        hello: Hello,
        deliver: Callable[[Packets], None],
        counters: Counters,
        *,
        wire: Wire = "auto",
        is_once: bool = False,
        attested: AttestedSide | None = None,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self._dialer = dialer
        self._hello = hello
        self._deliver = deliver
        self._counters = counters
        self._sent = counters.group("to_gateway")
        self._wire = wire
        self._is_once = is_once
        self._attested = attested
        self._changed = changed
        self._limited = RateLimitedLog(_logger, trio.current_time)
        self._evidence: str | None = None
        self._queue = PacketQueue()
        self._link: Link | None = None
        self._told: set[str] = set()  # why there is no link, since there was one
        self.has_been_up = trio.Event()
        self._changed_s = trio.current_time()
        self._last_error: str | None = None

    @property
    def is_up(self) -> bool:
        """There is a link, and the gateway has answered its greeting."""
        return self._link is not None

    @property
    def path_is_open(self) -> bool:
        """There is a link, and the gateway has not said that the path beyond it is closed."""
        return self._link is not None and self._link.path_is_open

    def snapshot(self) -> Mapping[str, object]:
        """Describe the uplink for ``status``."""
        link = self._link
        return {
            "up": link is not None,
            "gateway": str(self._dialer.endpoint),
            "peer": describe(link.peer) if link else None,
            "path": "open" if self.path_is_open else "closed",
            **self._attestation(),
            "for_s": round(trio.current_time() - self._changed_s, 3),
            "last_error": self._last_error,
            "marked": link.marked if link else 0,
            "queued": {"packets": len(self._queue), "bytes": self._queue.size_bytes},
        }

    def _attestation(self) -> Mapping[str, object]:
        if self._attested is None:
            return {}
        return {"attested": {"terms": str(self._attested), "peer": self._evidence if self._link else None}}

    def send_at_once(self, packets: Packets) -> bool:
        """Send packets, oldest first, if that can be done without waiting; else do nothing, and return False."""
        link = self._link
        if link is None or len(self._queue) or not link.send_at_once(packets.encoded):
            return False
        self._note_sent(packets)
        return True

    async def send(self, packets: Packets) -> None:
        """Send packets, oldest first, waiting while the link has no room; without a link, queue them."""
        link = self._link
        if link is None:
            self._count_dropped("queue_full", self._queue.put(packets))
            return
        if len(self._queue):
            await self._transmit(link, self._queue.take_all())
        await self._transmit(link, packets)

    async def run(self) -> NoReturn:
        """Keep the link until cancelled, and close it in good order then.

        Raises:
            Unreachable, LinkEnded: once only, and it could not be reached, or is gone.
            NotPermitted: the link cannot be marked.
        """
        backoff = Backoff()
        while True:
            began_s = trio.current_time()
            try:
                await self._connect_and_receive()
            except* (Unreachable, LinkEnded) as group:
                error = next(leaves(group))
            reason = error.reason if isinstance(error, LinkEnded) else "unreachable"
            self._counters.add("uplink_ended", reason)
            if reason == "reattest":
                log_event(_logger, "uplink_due", reason=reason)
                continue
            self._last_error = str(error)
            if self._is_once:
                raise error
            if reason not in self._told:
                event = "uplink_still_down" if self._told else "uplink_down"
                log_event(_logger, event, logging.WARNING, reason=reason, error=error)
                self._told.add(reason)
            if trio.current_time() - began_s >= _PROVED_GOOD_S:
                backoff.reset()
            await trio.sleep(backoff.next_delay_s())

    async def _connect_and_receive(self) -> NoReturn:
        stream: trio.abc.Stream = await self._dialer.dial()
        age_limit_s = math.inf
        if self._attested is not None:
            attested = await self._attested.shake_hands(stream)
            stream, self._evidence = attested.stream, attested.evidence
            age_limit_s = self._attested.max_link_age_s
        link = Link(stream, self._hello, lambda reason: self._counters.add("dropped", reason))
        link.path_changed = self._note_path
        farewell: Close | None = None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(link.keep_alive)
                if self._wire == "original":
                    link.skip_greeting()
                else:
                    await link.greet()
                farewell = Close("the agent is stopping")
                self._set_link(link)
                self._told.clear()
                proved = {"attested": self._evidence} if self._evidence else {}
                log_event(_logger, "uplink_up", gateway=self._dialer.endpoint, peer=describe(link.peer), **proved)
                self._counters.add("uplinks", "made")
                self.has_been_up.set()
                if len(self._queue):
                    await self._transmit(link, self._queue.take_all())
                with trio.move_on_after(age_limit_s):
                    await link.receive(self._take)
                farewell = Close("the link is due to be attested again")
                _end_of_age(age_limit_s)
        except* LinkEnded as ended:
            # Nobody hears farewells on a link that is gone; and to who broke the protocol, it was not we who stopped.
            fault = next((error for error in leaves(ended) if isinstance(error, PeerFault)), None)
            farewell = Close(str(fault)) if fault and farewell else None
            raise
        finally:
            # First, so that what is sent during the farewell waits for the next link.
            if self._link is not None:
                self._set_link(None)
            await link.aclose(farewell)

    def _note_path(self) -> None:
        gateway = self._dialer.endpoint
        if self.path_is_open:
            self._limited.log("path_open", "gateway_says", logging.INFO, gateway=gateway)
        else:
            self._limited.log("path_closed", "gateway_says", gateway=gateway)
        self._changed()

    def _take(self, packets: Packets) -> bool:
        self._deliver(packets)
        return True

    async def _transmit(self, link: Link, packets: Packets) -> None:
        try:
            await link.send(packets.encoded)
        except LinkEnded:
            self._count_dropped("link_ended", packets.count)
        else:
            self._note_sent(packets)

    def _note_sent(self, packets: Packets) -> None:
        self._sent["packets"] += packets.count
        self._sent["bytes"] += len(packets.encoded)

    def _set_link(self, link: Link | None) -> None:
        self._link = link
        self._changed_s = trio.current_time()
        self._changed()

    def _count_dropped(self, reason: str, count: int) -> None:
        if count:
            self._counters.add("dropped", reason, count)


def _end_of_age(limit_s: float) -> NoReturn:
    raise LinkEnded("reattest", f"attested {limit_s:.0f} s ago, as long as the policy allows")
