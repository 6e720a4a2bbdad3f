"""echosvr as its users see it: two programs, one line of result or of error, an exit code."""

from __future__ import annotations

import hashlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import pytest
import trio
import trio.testing
from echosvr.client import Echo, exchange_udp
from echosvr.errors import Unavailable
from hypothesis import given, settings
from hypothesis import strategies as st

DEADLINE_S = 30


def argv(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "echosvr", *arguments]


class Server:
    """An echo server on a free loopback port, ready; its process ends with the block."""

    def __init__(self, *arguments: str) -> None:
        server = argv("server", "--host", "127.0.0.1", "--port", "0", *arguments)
        self.process = subprocess.Popen(server, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        self.ready = self.process.stderr.readline().strip()
        self.port = self.ready.rpartition(":")[2]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop(signal.SIGTERM)

    def stop(self, number: signal.Signals) -> str:
        """Send a signal, wait for the end and return what the server said since it was ready."""
        self.process.send_signal(number)
        return self.process.communicate(timeout=DEADLINE_S)[1]

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", int(self.port)), DEADLINE_S)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


def run_client(port: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    client = argv("client", "--host", "127.0.0.1", "--port", port, *arguments)
    return subprocess.run(client, capture_output=True, text=True, timeout=DEADLINE_S, check=False)


@contextmanager
def impostor(handle: Callable[[socket.socket], object]) -> Iterator[str]:
    """Listen like an echo server, but treat the one connection as *handle* does. Yields the port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(DEADLINE_S)

        def accept() -> None:
            with listener.accept()[0] as connection:
                connection.settimeout(DEADLINE_S)
                handle(connection)

        thread = threading.Thread(target=accept)
        thread.start()
        yield str(listener.getsockname()[1])
        thread.join(DEADLINE_S)


def read_all(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(65536), b""))


def test_a_greeting_comes_back(server: Server) -> None:
    """Without options a client says something short, and one line tells what happened."""
    done = run_client(server.port)
    digest = hashlib.sha256(b"Hello, is there an echo?\n").hexdigest()
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(
        rf"tcp 127\.0\.0\.1:{server.port}: 25 bytes echoed whole in [0-9.]+ s, "
        rf"[0-9.]+ Mbit/s each way, sha256 {digest}\n",
        done.stdout,
    )


def test_five_megabytes_come_back_whole(server: Server) -> None:
    """More than the buffers on the way can hold, so that sending and reading must go on side by side."""
    done = run_client(server.port, "--bytes", "5000000")
    assert (done.returncode, done.stderr) == (0, "")
    assert " 5000000 bytes echoed whole in " in done.stdout


def test_connections_follow_one_another(server: Server) -> None:
    """The result is about all of them together."""
    done = run_client(server.port, "--bytes", "1000", "--connections", "20")
    assert (done.returncode, done.stderr) == (0, "")
    assert " 20000 bytes echoed whole over 20 connections in " in done.stdout


@settings(max_examples=50, deadline=None)
@given(pieces=st.lists(st.binary(min_size=1, max_size=50_000), max_size=4))
def test_the_server_echoes_any_bytes_and_then_shuts_down_its_side(server: Server, pieces: list[bytes]) -> None:
    """Whatever the bytes and however they are cut, and also if there are none."""
    with server.connect() as connection:
        for piece in pieces:
            connection.sendall(piece)
        connection.shutdown(socket.SHUT_WR)
        assert read_all(connection) == b"".join(pieces)


def test_the_reply_can_wait_until_after_the_half_close() -> None:
    """With --reply-delay nothing comes back before the client has shut down its sending side, nor for a while after."""
    with Server("--reply-delay", "0.5") as server, server.connect() as connection:
        connection.sendall(b"are you there?")
        connection.settimeout(0.2)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        connection.settimeout(DEADLINE_S)
        connection.shutdown(socket.SHUT_WR)
        shut_down_s = time.monotonic()
        assert read_all(connection) == b"are you there?"
        assert time.monotonic() - shut_down_s >= 0.5


def test_datagrams_come_back_whole() -> None:
    """Each waits for the echo of the one before, the last is shorter."""
    with Server("--udp") as server:
        done = run_client(server.port, "--udp", "--bytes", "3000")
    assert server.ready == f"ready: udp/127.0.0.1:{server.port}"
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"udp 127.0.0.1:{server.port}: 3000 bytes echoed whole in ")


def test_a_bare_server_listens_on_every_address() -> None:
    """That is what a port without an address means."""
    process = subprocess.Popen(argv("server", "--port", "0"), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert process.stderr.readline().startswith("ready: tcp/0.0.0.0:")
    process.terminate()
    assert process.communicate(timeout=DEADLINE_S)[1] == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_with_exit_code_0(number: signal.Signals) -> None:
    """Also while a client is connected, and without a word."""
    with Server() as server, server.connect():
        assert server.stop(number) == ""
        assert server.process.returncode == 0


def test_a_client_that_goes_away_is_one_line_and_the_server_goes_on() -> None:
    """One peer's end is nobody else's."""
    with Server("--reply-delay", "0") as server:
        with server.connect() as rude:
            rude.sendall(b"never mind")
            # Closing then sends a reset instead of an orderly end.
            rude.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes([1, 0, 0, 0, 0, 0, 0, 0]))
        assert run_client(server.port).returncode == 0
        assert re.fullmatch(r"echosvr: a client went before it had its echo: .*\n", server.stop(signal.SIGTERM))


@pytest.mark.parametrize(
    ("handle", "code", "message"),
    [
        (lambda connection: connection.sendall(read_all(connection)[:-1]), 76, "only 9999 of 10000 bytes came back"),
        (lambda connection: connection.sendall(read_all(connection) + b"!"), 76, "more than 10000 bytes came back"),
        (lambda connection: connection.sendall(read_all(connection)[::-1]), 76, "10000 bytes came back, but not those"),
        (read_all, 76, "only 0 of 10000 bytes came back"),
    ],
    ids=["shorter", "longer", "other", "nothing"],
)
def test_a_wrong_echo_is_told_from_a_right_one(
    handle: Callable[[socket.socket], object], code: int, message: str
) -> None:
    """Size and content are verified, and the error says which is wrong."""
    with impostor(handle) as port:
        done = run_client(port, "--bytes", "10000")
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith(f"echosvr: {message}")
    assert done.stderr.count("\n") == 1


def test_a_reset_is_an_error_of_the_connection() -> None:
    """It does not count as an echo that is too short."""

    def reset(connection: socket.socket) -> None:
        connection.recv(1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes([1, 0, 0, 0, 0, 0, 0, 0]))

    with impostor(reset) as port:
        done = run_client(port, "--bytes", "10000000")
    assert done.returncode == 69
    assert re.fullmatch(
        r"echosvr: the connection to 127\.0\.0\.1:\d+ broke \(.*\) when 0 of 10000000 bytes had come back: try again\n",
        done.stderr,
    )


@pytest.mark.parametrize("protocol", [[], ["--udp"]], ids=["tcp", "udp"])
def test_nobody_on_the_port_exits_69(protocol: list[str]) -> None:
    """One line says who was not there and what to do."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        done = run_client(str(reserved.getsockname()[1]), *protocol)
    assert done.returncode == 69
    assert re.fullmatch(
        r"echosvr: cannot .* 127\.0\.0\.1:\d+ \(Connection refused\): is the server running.*\?\n", done.stderr
    )


def test_an_unknown_host_exits_69() -> None:
    """The resolver's own words are in the line."""
    client = argv("client", "--host", "no-such-host.invalid")
    done = subprocess.run(client, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert done.returncode == 69
    assert re.fullmatch(r"echosvr: cannot connect to no-such-host\.invalid:7 \([^()]+\): .*\n", done.stderr)


@pytest.mark.parametrize("protocol", [[], ["--udp"]], ids=["tcp", "udp"])
def test_a_port_in_use_exits_69(protocol: list[str]) -> None:
    """One line says which port, and what to do."""
    with Server(*protocol) as server:
        second = argv("server", "--host", "127.0.0.1", "--port", server.port, *protocol)
        done = subprocess.run(second, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert done.returncode == 69
    assert re.fullmatch(r"echosvr: cannot listen on .* \(Address already in use\): choose another .*\n", done.stderr)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["serve"],
        ["client", "--port", "65536"],
        ["client", "--port", "http"],
        ["client", "--bytes", "0"],
        ["client", "--connections", "-1"],
        ["client", "--byte", "1"],
        ["server", "--reply-delay", "-1"],
        ["server", "--reply-delay", "soon"],
        ["server", "--reply-delay", "1", "--udp"],
    ],
    ids=" ".join,
)
def test_wrong_use_is_one_line_and_exit_code_64(arguments: list[str]) -> None:
    """And the line says where to read more."""
    done = subprocess.run(argv(*arguments), capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert (done.returncode, done.stdout) == (64, "")
    assert re.fullmatch(r"echosvr.*: .*: see echosvr.* --help\n", done.stderr)


def test_a_datagram_without_answer_is_given_up() -> None:
    """After five seconds, which the test's clock makes short."""
    with socket.socket(type=socket.SOCK_DGRAM) as deaf:
        deaf.bind(("127.0.0.1", 0))
        port = deaf.getsockname()[1]
        clock = trio.testing.MockClock(autojump_threshold=0)
        with pytest.raises(Unavailable, match=f"no answer from udp 127.0.0.1:{port} within 5 s"):
            trio.run(exchange_udp, "127.0.0.1", port, None, Echo(), clock=clock)
