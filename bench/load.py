"""The traffic that crosses the hosts: an ordinary server, and clients that print their figures as JSON.

A connection's first byte says what the server does: ``U`` swallow what follows and tell, after a full stop, how much it
was, ``D`` send until the client has enough, ``E`` echo. No figure depends on half-closed connections, which not every
peer keeps. Nothing here knows of tunnels. Unlike in traffic.py, whoever swallows reads, as programs do.

Datagrams to the same port are counted, by sender. All begin with a number; each `ANSWERED`th, and each that is nothing
but a number, is answered with that number and the count.
"""

from __future__ import annotations

import json
import select
import socket
import struct
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from typing import Final

PIECE: Final = 256 * 1024
MESSAGE: Final = b"E" + b"\0" * 63
END: Final = b"."
BACKLOG: Final = 1024
TIMEOUT_S: Final = 40.0
DATAGRAM: Final = 1400 - 8  # without the header of UDP: with those of IP as well, a packet that no peer has to divide
WINDOW: Final = 128  # datagrams on their way; the smallest receive buffer that a kernel grants on demand holds them all
ANSWERED: Final = 16
GIVEN_UP_AFTER_S: Final = 0.05
NUMBER: Final = struct.Struct("!Q")
ANSWER: Final = struct.Struct("!QQ")

Figures = dict[str, float]


def serve(port: int) -> None:
    """Serve until killed, with a thread for each connection, as ordinary servers do, and one for all datagrams."""
    listener = socket.create_server(("0.0.0.0", port), backlog=BACKLOG)
    datagrams = socket.socket(type=socket.SOCK_DGRAM)
    datagrams.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * WINDOW * DATAGRAM)  # their overhead counts as well
    datagrams.bind(("0.0.0.0", port))
    threading.Thread(target=_count, args=(datagrams,), daemon=True).start()
    print("ready ", flush=True)
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=_answer, args=(connection,), daemon=True).start()


def _answer(connection: socket.socket) -> None:
    with connection, suppress(OSError):  # the client has enough
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        match connection.recv(1, socket.MSG_PEEK):
            case b"U":
                received = -1
                while data := connection.recv(PIECE):
                    received += len(data)
                    if data[-1:] == END:
                        connection.sendall(str(received - len(END)).encode())
            case b"D":
                piece = bytes(PIECE)
                while True:
                    connection.sendall(piece)
            case b"E":
                while data := connection.recv(65536):
                    connection.sendall(data)


def _count(datagrams: socket.socket) -> None:
    counts: defaultdict[object, int] = defaultdict(int)
    while True:
        datagram, sender = datagrams.recvfrom(DATAGRAM)
        is_question = len(datagram) == NUMBER.size
        counts[sender] += not is_question
        if is_question or counts[sender] % ANSWERED == 0:
            answer = ANSWER.pack(*NUMBER.unpack_from(datagram), counts[sender])
            with suppress(OSError):  # no way back just now: it is as good as lost
                datagrams.sendto(answer, sender)


Address = tuple[str, int]


def up(address: Address, seconds: float, streams: float = 1, size: float = PIECE) -> Figures:
    """Send on so many connections, *size* bytes a call, until all of it is there."""
    return _transfer(lambda: _upload(address, seconds, int(size), threading.Event()), int(streams))


def down(address: Address, seconds: float, streams: float = 1) -> Figures:
    """Receive on so many connections."""
    return _transfer(lambda: _download(address, seconds), int(streams))


def round_trips(address: Address, seconds: float) -> Figures:
    """Send 64 bytes and wait for them, on one connection."""
    return _percentiles(_round_trips(address, seconds))


def loaded_round_trips(address: Address, seconds: float) -> Figures:
    """The same beside an upload that began a moment before."""
    with _uploading(address, 60 * seconds + TIMEOUT_S):
        time.sleep(seconds / 2)
        return _percentiles(_round_trips(address, seconds))


def connections(address: Address, seconds: float) -> Figures:
    """Connect, send 64 bytes and wait for them, close, and so on."""
    began_s, done = time.monotonic(), 0
    while not done or time.monotonic() - began_s < seconds:
        with _connect(address, MESSAGE) as connection:
            _receive(connection)
        done += 1
    return {"count": done, "per_s": done / (time.monotonic() - began_s)}


def crowd(address: Address, seconds: float, count: float) -> Figures:
    """Open so many connections at once; when all are served, send 64 bytes on each, wait for all, and so on.

    *lost* counts those that were refused, broke, or never had their answer.
    """
    with ExitStack() as stack:
        opening = [stack.enter_context(socket.socket()) for _ in range(int(count))]
        epoll = stack.enter_context(select.epoll())
        for connection in opening:
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with suppress(BlockingIOError):
                connection.connect(address)
            epoll.register(connection, select.EPOLLOUT)
        crowd = _Crowd(epoll, {each.fileno(): each for each in opening})
        crowd.open()
        crowd.echo(0)  # by then the server has accepted them all, and a thread for each
        return {"lost": count - crowd.echo(seconds), **crowd.figures()}


def datagrams(address: Address, seconds: float) -> Figures:
    """Send datagrams, never more than a window of them ahead of the answers; where none comes, it has been lost.

    *count* and *per_s* are of those that have arrived, *lost_percent* of those sent.
    """
    with socket.socket(type=socket.SOCK_DGRAM) as connection:
        connection.connect(address)
        counted_before = _ask(connection, 0)
        sent = answered = 0
        began_s = now_s = time.monotonic()
        while not sent or now_s - began_s < seconds:
            if sent - answered < WINDOW:
                sent += 1
                connection.send(NUMBER.pack(sent).ljust(DATAGRAM, b"\0"))
            else:
                answer = _next_answer(connection)
                answered = max(answered, answer[0]) if answer else sent
            now_s = time.monotonic()
        count = _ask(connection, sent + 1) - counted_before
    return {"count": count, "per_s": count / (now_s - began_s), "lost_percent": 100 * (1 - count / sent)}


def _ask(connection: socket.socket, number: int) -> int:
    """Return how many datagrams have arrived before this question, which is asked until it is answered."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline_s:
        connection.send(NUMBER.pack(number))
        while answer := _next_answer(connection):
            if answer[0] == number:
                return answer[1]
    raise TimeoutError("nobody counts the datagrams")


def _next_answer(connection: socket.socket) -> tuple[int, int] | None:
    if not select.select([connection], [], [], GIVEN_UP_AFTER_S)[0]:
        return None
    number, count = ANSWER.unpack(connection.recv(ANSWER.size))
    return number, count


class _Crowd:
    """Connections of which each waits for something."""

    def __init__(self, epoll: select.epoll, connections: dict[int, socket.socket]) -> None:
        self._epoll = epoll
        self._connections = connections
        self._sent_s: dict[int, float] = {}
        self._times_us: list[float] = []
        self._took_s = 0.0

    def open(self) -> None:
        """Wait until all are connected, and forget those that are not in time."""
        opening = set(self._connections)
        for descriptor in self._ready(opening):
            opening.discard(descriptor)
            self._epoll.modify(descriptor, select.EPOLLIN)
        for descriptor in opening:
            self._forget(descriptor)

    def echo(self, seconds: float) -> int:
        """Send on all at once, wait for all, and so on for so long; return how many connections answered every time."""
        self._times_us.clear()
        began_s = now_s = time.monotonic()
        while now_s - began_s <= seconds or not self._times_us:
            for descriptor in list(self._connections):
                self._send(descriptor)
            for descriptor in self._ready(self._sent_s):
                self._receive(descriptor)
            for descriptor in list(self._sent_s):
                self._forget(descriptor)
            now_s = time.monotonic()
            if not self._connections:
                break
        self._took_s = now_s - began_s
        return len(self._connections)

    def figures(self) -> Figures:
        """How long the echoes took, how many there were, and how many in a second."""
        count = len(self._times_us)
        return {"count": count, "per_s": count / self._took_s, **_percentiles(self._times_us)}

    def _ready(self, waiting: Collection[int]) -> Iterator[int]:
        deadline_s = time.monotonic() + TIMEOUT_S
        while waiting and (left_s := deadline_s - time.monotonic()) > 0:
            for descriptor, _ in self._epoll.poll(left_s):
                yield descriptor

    def _send(self, descriptor: int) -> None:
        try:
            self._connections[descriptor].send(MESSAGE)
        except OSError:
            self._forget(descriptor)
        else:
            self._sent_s[descriptor] = time.monotonic()

    def _receive(self, descriptor: int) -> None:
        try:
            _receive(self._connections[descriptor])
        except OSError:
            self._forget(descriptor)
        else:
            self._times_us.append((time.monotonic() - self._sent_s.pop(descriptor)) * 1e6)

    def _forget(self, descriptor: int) -> None:
        self._epoll.unregister(descriptor)
        self._sent_s.pop(descriptor, None)
        del self._connections[descriptor]


def _transfer(one: Callable[[], int], streams: int) -> Figures:
    began_s = time.monotonic()
    with ThreadPoolExecutor(streams) as pool:
        transferred = sum(pool.map(lambda _: one(), range(streams)))
    return {"mbit_s": transferred * 8 / (time.monotonic() - began_s) / 1e6, "gigabytes": transferred / 1e9}


def _upload(address: Address, seconds: float, size: int, is_over: threading.Event) -> int:
    piece = bytes(size)
    with _connect(address, b"U") as connection:
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s and not is_over.is_set():
            connection.sendall(piece)
        connection.sendall(END)
        return int(connection.recv(100))


def _download(address: Address, seconds: float) -> int:
    with _connect(address, b"D") as connection:
        end_s, received = time.monotonic() + seconds, 0
        while not received or time.monotonic() < end_s:
            received += len(connection.recv(PIECE))
        return received


@contextmanager
def _uploading(address: Address, at_most_s: float) -> Iterator[None]:
    is_over = threading.Event()
    upload = threading.Thread(target=_upload, args=(address, at_most_s, PIECE, is_over))
    upload.start()
    try:
        yield
    finally:
        is_over.set()
        upload.join()


def _round_trips(address: Address, seconds: float) -> list[float]:
    times_us: list[float] = []
    with _connect(address, MESSAGE) as connection:
        _receive(connection)
        end_s = time.monotonic() + seconds
        while not times_us or time.monotonic() < end_s:
            sent_s = time.perf_counter()
            connection.sendall(MESSAGE)
            _receive(connection)
            times_us.append((time.perf_counter() - sent_s) * 1e6)
    return times_us


def _connect(address: Address, first: bytes) -> socket.socket:
    connection = socket.create_connection(address, TIMEOUT_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.sendall(first)
    return connection


def _receive(connection: socket.socket) -> None:
    missing = len(MESSAGE)
    while missing:
        data = connection.recv(missing)
        if not data:
            raise ConnectionError("the connection ended before the answer was there")
        missing -= len(data)


def _percentiles(times_us: list[float]) -> Figures:
    ordered = sorted(times_us) or [TIMEOUT_S * 1e6]  # so long we waited
    return {"p50_us": ordered[len(ordered) // 2], "p99_us": ordered[len(ordered) * 99 // 100]}


CLIENTS: Final[dict[str, Callable[..., Figures]]] = {
    each.__name__: each for each in (up, down, round_trips, loaded_round_trips, connections, crowd, datagrams)
}

if __name__ == "__main__":
    match sys.argv[1:]:
        case ["serve", port]:
            serve(int(port))
        case [name, host, port, *words] if name in CLIENTS:
            print(json.dumps(CLIENTS[name]((host, int(port)), *map(float, words))))
        case _:
            sys.exit(f"load: serve PORT | {' | '.join(CLIENTS)} HOST PORT SECONDS …")
