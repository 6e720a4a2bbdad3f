"""The traffic that relays are measured with: a server of one process, and clients that print what they found as JSON.

A connection's first byte says what the server does: ``U`` swallow what follows and tell how much it was, ``E`` echo.
Whoever swallows does not copy, so that neither end works harder than the relay between them: directly, the two move
several times what any relay does.
"""

from __future__ import annotations

import json
import select
import socket
import sys
import time
from contextlib import ExitStack, suppress
from typing import Final

HOST: Final = "127.0.0.1"
PIECE: Final = b"\0" * (256 * 1024)
MESSAGE: Final = b"\0" * 64
BACKLOG: Final = 1024
CONNECTIONS: Final = 10  # on which round trips are measured
TIMEOUT_S: Final = 60.0


class Server:
    """Serves until killed, on a port of the kernel's choice, which it prints."""

    def __init__(self) -> None:
        self._listener = socket.create_server((HOST, 0), backlog=BACKLOG)
        self._epoll = select.epoll()
        self._epoll.register(self._listener, select.EPOLLIN)
        self._connections: dict[int, socket.socket] = {}
        self._swallowed: dict[int, int] = {}
        self._buffer = bytearray(4 * len(PIECE))

    def serve(self) -> None:
        print(self._listener.getsockname()[1], flush=True)
        while True:
            for descriptor, _ in self._epoll.poll():
                if descriptor == self._listener.fileno():
                    self._accept()
                else:
                    try:
                        self._answer(descriptor)
                    except OSError:
                        self._forget(descriptor)

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connections[connection.fileno()] = connection
        self._epoll.register(connection, select.EPOLLIN)

    def _answer(self, descriptor: int) -> None:
        connection = self._connections[descriptor]
        if descriptor in self._swallowed:
            count = connection.recv_into(self._buffer, 0, socket.MSG_TRUNC)
            self._swallowed[descriptor] += count
            if not count:
                connection.sendall(b"%d" % self._swallowed[descriptor])
        elif data := connection.recv(65536):
            if data[:1] == b"U":
                self._swallowed[descriptor] = len(data) - 1
            else:
                connection.sendall(data)
            return
        else:
            count = 0
        if not count:
            self._forget(descriptor)

    def _forget(self, descriptor: int) -> None:
        self._swallowed.pop(descriptor, None)
        self._epoll.unregister(descriptor)
        self._connections.pop(descriptor).close()


def connect(port: int, first: bytes) -> socket.socket:
    """Connect, with what the connection is for."""
    connection = socket.create_connection((HOST, port), TIMEOUT_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.sendall(first)
    return connection


def throughput(port: int, seconds: float, count: int) -> dict[str, float]:
    """Send as much as goes on so many connections, and wait until all of it is there."""
    with ExitStack() as stack:
        connections = {each.fileno(): each for each in (stack.enter_context(connect(port, b"U")) for _ in range(count))}
        epoll = stack.enter_context(select.epoll())
        for connection in connections.values():
            connection.setblocking(False)
            epoll.register(connection, select.EPOLLOUT)
        began_s = time.monotonic()
        while time.monotonic() - began_s < seconds:
            for descriptor, _ in epoll.poll(1):
                with suppress(BlockingIOError):
                    connections[descriptor].send(PIECE)
        received = 0
        for connection in connections.values():
            connection.settimeout(TIMEOUT_S)
            connection.shutdown(socket.SHUT_WR)
        for connection in connections.values():
            with connection.makefile("rb") as answer:
                received += int(answer.read())
        return {"mbit_s": received * 8 / (time.monotonic() - began_s) / 1e6, "gigabytes": received / 1e9}


def round_trips(port: int, seconds: float) -> dict[str, float]:
    """Send 64 bytes and wait for them, on one connection after another.

    On which processors the kernel lets the processes of a connection run is settled once for each, and makes more of a
    difference than what they are.
    """
    times_us: list[float] = []
    for _ in range(CONNECTIONS):
        with connect(port, b"E") as connection:
            connection.recv(1)
            until_s = time.monotonic() + seconds / CONNECTIONS
            while True:
                sent_s = time.perf_counter()
                _exchange(connection)
                times_us.append((time.perf_counter() - sent_s) * 1e6)
                if time.monotonic() >= until_s:
                    break
    times_us.sort()
    return {"p50_us": times_us[len(times_us) // 2], "p99_us": times_us[len(times_us) * 99 // 100]}


def connections(port: int, seconds: float) -> dict[str, float]:
    """Connect, send 64 bytes and wait for them, close, and so on."""
    began_s, done = time.monotonic(), 0
    while not done or time.monotonic() - began_s < seconds:
        with connect(port, MESSAGE) as connection:
            _receive(connection)
        done += 1
    return {"count": done, "per_s": done / (time.monotonic() - began_s)}


def hold(port: int, count: int) -> None:
    """Open so many connections that have been used once; keep them until standard input ends."""
    with ExitStack() as stack:
        for _ in range(count):
            _receive(stack.enter_context(connect(port, MESSAGE)))
        print("open", flush=True)
        sys.stdin.read()


def _exchange(connection: socket.socket) -> None:
    connection.sendall(MESSAGE)
    _receive(connection)


def _receive(connection: socket.socket) -> None:
    missing = len(MESSAGE)
    while missing:
        data = connection.recv(missing)
        if not data:
            raise ConnectionError("the connection ended before the answer was there")
        missing -= len(data)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["serve"]:
            Server().serve()
        case ["throughput", port_, seconds_, count_]:
            print(json.dumps(throughput(int(port_), float(seconds_), int(count_))))
        case ["round_trips", port_, seconds_]:
            print(json.dumps(round_trips(int(port_), float(seconds_))))
        case ["connections", port_, seconds_]:
            print(json.dumps(connections(int(port_), float(seconds_))))
        case ["hold", port_, count_]:
            hold(int(port_), int(count_))
        case _:
            sys.exit("traffic: serve | throughput PORT S N | round_trips PORT S | connections PORT S | hold PORT N")
