"""Peers for tests of links and gateways: they speak raw packets or ENG, well or badly, and note what they hear."""

from __future__ import annotations

import random
import struct
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from ipaddress import IPv4Address
from typing import Self

import trio

from enlink.control import ControlMessage, Hello, PathState
from enlink.frame import Event, FrameDecoder, Packets, encode_control, encode_packets
from enlink.testing.frames import feed
from enlink.testing.hosts import Host


def ip_packet(source: str, destination: str, payload: bytes) -> bytes:
    """Make an IPv4 packet of an experimental protocol; *payload* is up to 65,515 bytes."""
    header = struct.pack("!BBHHHBB", 0x45, 0, 20 + len(payload), 0, 0, 64, 253)  # RFC 3692: 253 is for experiments
    addresses = IPv4Address(source).packed + IPv4Address(destination).packed
    total = sum(struct.unpack("!9H", header + addresses))
    total = (total >> 16) + (total & 0xFFFF)
    return header + struct.pack("!H", ~(total + (total >> 16)) & 0xFFFF) + addresses + payload


def ip_packets(
    source: str, destination: str, *, size_bytes: int, seed: int = 0, payload_bytes: tuple[int, int] = (1, 65_515)
) -> list[bytes]:
    """Make packets with *size_bytes* of payload in all, random in content and, between the bounds, in length."""
    rng = random.Random(seed)  # noqa: S311  # nothing secret: a failure is to be repeatable
    packets, left = [], size_bytes
    while left > 0:
        length = min(left, rng.randint(*payload_bytes))
        packets.append(ip_packet(source, destination, rng.randbytes(length)))
        left -= length
    return packets


async def connect(host: Host, port: int, address: str = "127.0.0.1") -> Peer:
    """Connect from a host to a port of its own, or of *address*."""
    with host.entered():
        sock = trio.socket.socket()
    await sock.connect((address, port))
    return Peer(trio.SocketStream(sock))


@asynccontextmanager
async def listening(host: Host, port: int) -> AsyncIterator[Callable[[], Awaitable[Peer]]]:
    """Listen on a host's loopback; yields what accepts the next connection."""
    with host.entered():
        sock = trio.socket.socket()
    with sock:
        sock.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_REUSEADDR, 1)
        await sock.bind(("127.0.0.1", port))
        sock.listen()

        async def accept() -> Peer:
            accepted, _ = await sock.accept()
            return Peer(trio.SocketStream(accepted))

        yield accept


class Peer:
    """The other end of a link. Speaks as it is told, and decodes what it hears.

    Reading is for one task. Everything waits as long as it takes: put a deadline around.
    """

    def __init__(self, stream: trio.abc.HalfCloseableStream) -> None:
        self.stream = stream
        self._decoder = FrameDecoder()
        self._events: deque[Event | bytes] = deque()
        self._paths: deque[bool] = deque()
        self._is_greeted = False

    async def say(self, *messages: ControlMessage) -> None:
        """Send control messages."""
        await self.stream.send_all(b"".join(map(encode_control, messages)))

    async def send(self, *packets: bytes) -> None:
        """Send IP packets."""
        await self.stream.send_all(encode_packets(packets))

    async def greet(self, hello: Hello) -> Hello:
        """Say HELLO as the dialler and return the answer."""
        await self.say(hello)
        match await self.hear():
            case Hello() as answer:
                return answer
            case other:
                raise AssertionError(f"no HELLO, but {other!r}")

    async def hear(self) -> Event | bytes | None:
        """Return the next IP packet or other event; None at the end of the stream. See `hear_path` for the rest."""
        while not self._events:
            if not await self._receive():
                return None
        return self._events.popleft()

    async def hear_path(self) -> bool:
        """Return the next word on the path: it is open. `hear` leaves these out, once we are greeted.

        Raises:
            AssertionError: the stream ended.
        """
        while not self._paths:
            if not await self._receive():
                raise AssertionError("the stream ended")
        return self._paths.popleft()

    async def hear_packets(self, count: int) -> list[bytes]:
        """Return the next *count* IP packets.

        Raises:
            AssertionError: something else came, which an original peer would not survive, or the stream ended.
        """
        heard: list[bytes] = []
        while len(heard) < count:
            match await self.hear():
                case bytes() as packet:
                    heard.append(packet)
                case other:
                    raise AssertionError(f"after {len(heard)} of {count} packets: {other!r}")
        return heard

    async def _receive(self) -> bool:
        data = await self.stream.receive_some(256 * 1024)
        for event in feed(self._decoder, data):
            match event:
                case Packets():
                    self._events.extend(map(bytes, event))
                # Who was never greeted must not get it, and is to notice.
                case PathState(is_open) if self._is_greeted:
                    self._paths.append(is_open)
                case _:
                    self._is_greeted |= isinstance(event, Hello)
                    self._events.append(event)
        return bool(data)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await trio.aclose_forcefully(self.stream)
