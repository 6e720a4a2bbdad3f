"""Gateways of the test's own, for running agents: they pass on what agents send, and say whatever they are told.

In threads, so that a test may wait for a program meanwhile. Needs no part of `entg`, and shares no code with the codec
that it helps to judge.
"""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Final, Self

from enlink.testing.hosts import Host

PORT: Final = 6980
HELLO: Final = bytes.fromhex("00000010 000101 03 ffff 0100 07 64656661756c74")  # docs/wire-format.md: hello-gateway
KEEPALIVE: Final = bytes.fromhex("00000002 0003")
_LENGTH: Final = struct.Struct("!I")
_READ_BYTES: Final = 256 * 1024


def framed(payload: bytes) -> bytes:
    """Put a payload, good or bad, into a frame."""
    return _LENGTH.pack(len(payload)) + payload


def split_frames(stream: bytes | bytearray) -> tuple[list[bytes], bytes]:
    """Cut a stream into the payloads of its frames, whatever they are, and what is left of an unfinished one."""
    payloads, start = [], 0
    while len(stream) - start >= _LENGTH.size:
        end = start + _LENGTH.size + _LENGTH.unpack_from(stream, start)[0]
        if end > len(stream):
            break
        payloads.append(bytes(stream[start + _LENGTH.size : end]))
        start = end
    return payloads, bytes(stream[start:])


class Connection:
    """One that an agent has made.

    Attributes:
        heard: all that the agent has said, byte for byte.
        is_greeted: its HELLO was answered.
        has_ended: the agent has ended its side, or this one was closed.
    """

    def __init__(self, accepted: socket.socket) -> None:
        self.heard = bytearray()
        self.is_greeted = False
        self.has_ended = False
        self._socket = accepted
        self._saying = threading.Lock()
        self._unsplit = b""

    def say(self, data: bytes) -> None:
        """Send bytes just as they are.

        Raises:
            OSError: the agent has hung up.
        """
        with self._saying:
            self._socket.sendall(data)

    def hang_up(self) -> None:
        """End the connection; what was said arrives."""
        # Closing with unread bytes would reset the connection, and the last words might be lost.
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """End the connection at once, both ways."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def reset(self) -> None:
        """End the connection as a host does that has forgotten it."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        # Nothing of this is seen outside, but it wakes who listens, and closes.
        self._socket.shutdown(socket.SHUT_RD)

    def listen(self, greeting: bytes | None, pass_on: Callable[[bytes], None]) -> None:
        """Hear the agent out, to its end; pass on all that it says or, if there is a greeting, its packets."""
        with self._socket:
            with suppress(OSError):
                while data := self._socket.recv(_READ_BYTES):
                    self.heard += data
                    onward = data if greeting is None else self._packets(data, greeting)
                    if onward:
                        pass_on(onward)
            self.has_ended = True

    def _packets(self, data: bytes, greeting: bytes) -> bytes:
        payloads, self._unsplit = split_frames(self._unsplit + data)
        for payload in payloads:
            if payload.startswith(b"\0\1"):
                self.say(greeting)
                self.is_greeted = True
            elif payload.startswith(b"\0\3"):
                self.say(KEEPALIVE)
        return b"".join(framed(payload) for payload in payloads if not payload.startswith(b"\0"))


class AgentSide:
    """Where one agent connects.

    Args:
        greeting: what answers HELLO. None: it is an original gateway, which knows of none and passes bytes on blindly.

    Attributes:
        connections: all that were made, oldest first.
        other: where what the agent says is passed on to...
        delay_s: ...after a time between these bounds.
    """

    def __init__(self, host: Host, *, greeting: bytes | None = None) -> None:
        self.greeting = greeting
        self.connections: list[Connection] = []
        self.other: AgentSide | None = None
        self.delay_s = (0.0, 0.0)
        self._host = host
        self._listener: socket.socket | None = None
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def open(self) -> None:
        """Listen."""
        with self._host.entered():
            self._listener = socket.create_server(("", PORT))
        self._start(self._accept, self._listener)

    def close(self) -> None:
        """Go away: refuse agents, and hang up on the one that is connected."""
        listener, self._listener = self._listener, None
        if listener is not None:
            # Closing alone would wake nobody who waits in accept.
            listener.shutdown(socket.SHUT_RDWR)
        for connection in self.connections:
            connection.close()
        for thread in self._threads:
            thread.join(20)
        self._threads.clear()

    @property
    def agent(self) -> Connection | None:
        """The connection that counts, the newest, as long as the agent keeps it."""
        last = self.connections[-1] if self.connections else None
        return None if last is None or last.has_ended else last

    def pass_on(self, data: bytes) -> None:
        """Send the agent what came from elsewhere; lose it if there is none."""
        if (agent := self.agent) is not None:
            with suppress(OSError):
                agent.say(data)

    def _accept(self, listener: socket.socket) -> None:
        with listener, suppress(OSError):
            while True:
                accepted, _ = listener.accept()
                accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.connections.append(Connection(accepted))
                self._start(self.connections[-1].listen, self.greeting, self._pass_on)

    def _pass_on(self, data: bytes) -> None:
        time.sleep(random.uniform(*self.delay_s))  # noqa: S311  # nothing secret
        if self.other is not None:
            self.other.pass_on(data)

    def _start(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()


class Between:
    """A gateway with an agent on either side.

    Args:
        greeting: see `AgentSide`.
    """

    def __init__(self, client_host: Host, server_host: Host, *, greeting: bytes | None = None) -> None:
        self.client = AgentSide(client_host, greeting=greeting)
        self.server = AgentSide(server_host, greeting=greeting)
        self.client.other, self.server.other = self.server, self.client

    def __enter__(self) -> Self:
        self.client.open()
        self.server.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.client.close()
        self.server.close()
