"""The traffic that is measured: an ordinary server, and a client that prints its figures as JSON. Knows no tunnel.

A connection's first byte says what the server does: ``U`` swallow and count what follows, ``D`` send until the client
has enough, ``E`` echo.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from typing import Final

PIECE: Final = b"\0" * (256 * 1024)
MESSAGE: Final = b"\0" * 64
TIMEOUT_S: Final = 30.0


def serve(port: int) -> None:
    """Serve until killed."""
    listener = socket.create_server(("0.0.0.0", port), backlog=1024)
    print("ready ", flush=True)
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=_answer, args=(connection,), daemon=True).start()


def _answer(connection: socket.socket) -> None:
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            match connection.recv(1):
                case b"U":
                    received = 0
                    while data := connection.recv(len(PIECE)):
                        received += len(data)
                    connection.sendall(str(received).encode())
                case b"D":
                    while True:
                        connection.sendall(PIECE)
                case b"E":
                    while data := connection.recv(65536):
                        connection.sendall(data)
        except OSError:
            return  # the client has enough


def measure(address: str, port: int, seconds: float) -> dict[str, float]:
    """Take every figure once: megabits a second, microseconds, connections a second."""
    round_trips = _round_trips(address, port, seconds)
    stop, loaded = threading.Event(), []
    bulk = threading.Thread(target=_upload, args=(address, port, 3 * seconds, stop))
    bulk.start()
    time.sleep(seconds / 2)
    loaded = _round_trips(address, port, seconds)
    stop.set()
    bulk.join()
    return {
        "up_mbit_s": _upload(address, port, seconds, threading.Event()),
        "down_mbit_s": _download(address, port, seconds),
        "round_trip_p50_us": _percentile(round_trips, 50),
        "round_trip_p99_us": _percentile(round_trips, 99),
        "loaded_round_trip_p50_us": _percentile(loaded, 50),
        "connections_per_s": _connections(address, port, seconds),
    }


def _connect(address: str, port: int, job: bytes) -> socket.socket:
    connection = socket.create_connection((address, port), TIMEOUT_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.sendall(job)
    return connection


def _upload(address: str, port: int, seconds: float, stop: threading.Event) -> float:
    with _connect(address, port, b"U") as connection:
        began_s = time.monotonic()
        while time.monotonic() - began_s < seconds and not stop.is_set():
            connection.sendall(PIECE)
        connection.shutdown(socket.SHUT_WR)
        received = int(connection.recv(100))
        return received * 8 / (time.monotonic() - began_s) / 1e6


def _download(address: str, port: int, seconds: float) -> float:
    with _connect(address, port, b"D") as connection:
        began_s, received = time.monotonic(), 0
        while time.monotonic() - began_s < seconds:
            received += len(connection.recv(len(PIECE)))
        return received * 8 / (time.monotonic() - began_s) / 1e6


def _round_trips(address: str, port: int, seconds: float) -> list[float]:
    times_us = []
    with _connect(address, port, b"E") as connection:
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            sent_s = time.perf_counter()
            connection.sendall(MESSAGE)
            received = 0
            while received < len(MESSAGE):
                received += len(connection.recv(len(MESSAGE)))
            times_us.append((time.perf_counter() - sent_s) * 1e6)
    return sorted(times_us)


def _connections(address: str, port: int, seconds: float) -> float:
    began_s, done = time.monotonic(), 0
    while time.monotonic() - began_s < seconds:
        with _connect(address, port, b"E" + MESSAGE) as connection:
            connection.recv(len(MESSAGE))
        done += 1
    return done / (time.monotonic() - began_s)


def _percentile(ordered: list[float], percent: int) -> float:
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["serve", port]:
            serve(int(port))
        case ["measure", address, port, seconds]:
            print(json.dumps(measure(address, int(port), float(seconds))))
        case _:
            sys.exit("load: serve PORT | measure ADDRESS PORT SECONDS")
