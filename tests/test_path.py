"""An ordinary program's bytes cross four hosts, captured and replayed. Real kernels, sockets and programs."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import standin
from attested import attested_path
from path import BIN, PLACES, Path, Place

ECHO = str(BIN / "echosvr")
NOWHERE = "1.1.1.1"  # no host here has it, and none routes to it

# Sends TOTAL bytes through one connection and checks the echo; the pace leaves time to break things on the way.
TRANSFER = """
import hashlib, os, socket, sys, threading, time
address, port, total, pace_bps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
connection = socket.create_connection((address, port), 60)
connection.settimeout(60)
sent, got, received = hashlib.sha256(), hashlib.sha256(), 0
def receive():
    global received
    while data := connection.recv(1 << 18):
        got.update(data)
        received += len(data)
reader = threading.Thread(target=receive)
reader.start()
piece, began = os.urandom(1 << 16), time.monotonic()
for done in range(0, total, len(piece)):
    data = piece[: total - done]
    connection.sendall(data)
    sent.update(data)
    if done == 0:
        print("under way", flush=True)
    time.sleep(max(0, done / pace_bps - (time.monotonic() - began)))
connection.shutdown(socket.SHUT_WR)
reader.join(60)
sys.exit(not (received == total and got.digest() == sent.digest()))
"""


@pytest.fixture(scope="module", params=["plain", "spinning", "attested"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The path with three captured ports, running, with echo servers behind two; its links of both kinds."""
    ports: dict[str, Any] = {"capture": ["7", "8080", "udp/53"], "replay": ["7", "8080", "udp/5353"]}
    spin = ("--spin", "300us")
    if request.param == "plain":
        chosen = Path(**ports)
    elif request.param == "spinning":
        chosen = Path(**ports, client=spin, server=spin, near=spin, far=spin)
    else:
        directory = tmp_path_factory.mktemp("attested")
        chosen = attested_path(standin.build(directory / "rats-tls"), directory, **ports)
    with chosen as made:
        made.start()
        with made.running("server", "echosvr", "server", "--port", "7"):
            yield made


def echo(path: Path, *options: str) -> str:
    return path.hosts["app"].run(ECHO, "client", "--host", NOWHERE, *options)


def test_five_megabytes_of_random_data_come_back_unchanged(path: Path) -> None:
    """The echo client compares size and content, and exits non-zero when they differ."""
    assert "5000000" in echo(path, "--bytes", "5000000").replace(",", "").replace("_", "")


def test_a_hundred_connections_one_after_another_are_all_served(path: Path) -> None:
    """Each is a new TCP connection through capture, both gateways and replay."""
    echo(path, "--bytes", "1000", "--connections", "100")


def test_nothing_on_the_way_is_paced_twice(path: Path) -> None:
    """The programs' own connections run Reno with ECN, whatever is usual here; the links are too short for BBR."""
    script = f"""
import socket, sys
connection = socket.create_connection(({NOWHERE!r}, 7))
print(connection.getsockopt(socket.IPPROTO_TCP, 13, 16).rstrip(bytes(1)).decode(), flush=True)
sys.stdin.read()
"""
    argv = path.hosts["app"].argv([sys.executable, "-c", script])
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "reno\n"
        sockets = {place: path.hosts[place].run("ss", "-Htnoi", "state", "established") for place in PLACES}
    for place, listed in sockets.items():
        assert re.search(r"\b69(79|80)\b", listed)  # its links
        assert not re.search(r"\bbbr\b", listed), place
    assert re.search(r"192\.168\.0\.254:7 .*\n.*\becn\b.*\breno\b", sockets["server"])


def test_the_program_keeps_the_address_that_it_dialled(path: Path) -> None:
    """An unmodified program sees the address it asked for as its peer, and the TUN's as its own."""
    script = (
        f"import socket; s = socket.create_connection(({NOWHERE!r}, 7)); print(s.getpeername()[0], s.getsockname()[0])"
    )
    assert path.hosts["app"].run(sys.executable, "-c", script).split() == [NOWHERE, "192.168.0.1"]


@pytest.mark.proves("F17")
def test_a_reply_two_seconds_after_the_client_has_shut_down_its_side_arrives_whole(path: Path) -> None:
    """Half-close is the programs' own affair, end to end; nothing on the way cuts it short."""
    with path.running("server", "echosvr", "server", "--port", "8080", "--reply-delay", "2"):
        began = time.monotonic()
        echo(path, "--port", "8080", "--bytes", "300000")
        assert time.monotonic() - began > 2


def test_curl_fetches_fifty_megabytes_from_a_stock_web_server(path: Path) -> None:
    """Neither program knows of the tunnel; the file arrives with the same SHA-256."""
    served = path.directory / "served"
    served.mkdir()
    (served / "file").write_bytes(blob := bytes(range(256)) * 200_000)
    argv = (sys.executable, "-u", "-m", "http.server", "8080", "--directory", str(served))
    with path.running("server", *argv, ready="HTTP"):
        fetched = path.directory / "fetched"
        path.hosts["app"].run(
            "curl", "--silent", "--show-error", "--fail", "-o", str(fetched), f"http://{NOWHERE}:8080/file"
        )
    assert hashlib.sha256(fetched.read_bytes()).digest() == hashlib.sha256(blob).digest()


def test_two_captured_ports_carry_traffic_at_the_same_time(path: Path) -> None:
    """Each keeps to its own server: the second one's replies come late, and hold up nothing."""
    with path.running("server", "echosvr", "server", "--port", "8080", "--reply-delay", "1"):
        late = threading.Thread(target=echo, args=(path, "--port", "8080", "--bytes", "100000"))
        late.start()
        echo(path, "--bytes", "2000000")
        assert late.is_alive()
        late.join(30)
    assert not late.is_alive()


def test_datagrams_to_a_captured_udp_port_are_answered(path: Path) -> None:
    """As a resolver would: small questions to port 53, replayed to a server on another port."""
    with path.running("server", "echosvr", "server", "--port", "5353", "--udp"):
        echo(path, "--port", "53", "--udp", "--connections", "20")


def test_a_closed_server_port_refuses_the_program_at_once(path: Path) -> None:
    """What a captured program sees is what it would see without the tunnel."""
    script = f"import socket; socket.create_connection(({NOWHERE!r}, 8080), 20)"
    began = time.monotonic()
    assert "ConnectionRefusedError" in _fails(path, script)
    assert time.monotonic() - began < 10


def test_the_counters_of_every_hop_tell_of_the_traffic(path: Path) -> None:
    """`status --json` is there for each of the four programs, and nothing was dropped on the way."""
    before = {place: path.programs[place].status()["counters"] for place in PLACES}
    echo(path, "--bytes", "1000000")
    after = {place: path.programs[place].status()["counters"] for place in PLACES}
    for place, group in (("app", "to_gateway"), ("near", "to_entg"), ("far", "to_enta"), ("server", "from_gateway")):
        grown = after[place][group]["bytes"] - before[place].get(group, {}).get("bytes", 0)  # type: ignore[index]
        assert grown > 1_000_000, place


def test_who_spins_says_how_often_it_paid_and_who_does_not_says_nothing(
    path: Path, request: pytest.FixtureRequest
) -> None:
    echo(path, "--bytes", "1000", "--connections", "100")
    counts = {place: path.programs[place].status()["spin"] for place in PLACES}
    if "spinning" in request.node.name:
        assert all(set(each) == {"found", "missed"} and each["found"] for each in counts.values()), counts
    else:
        assert not any(counts.values())


@pytest.mark.proves("F08", "F09", "F04", "G1", "G9")
@pytest.mark.parametrize("victim", PLACES)
def test_a_transfer_survives_the_death_and_return_of_any_program(path: Path, victim: Place) -> None:
    """Kill -9 during 100 MB, back after one second: the same connection completes, every byte in its place."""
    program = path.programs[victim]
    argv = (sys.executable, "-c", TRANSFER, NOWHERE, "7", "100000000", "40e6")
    with path.running("app", *argv, ready=None) as transfer:
        _wait_for_text(transfer.log, "under way")
        time.sleep(0.5)
        program.kill()
        time.sleep(1)
        assert transfer.process.poll() is None, "the transfer was over before its program came back"
        program.start()
        program.wait_for("ready")
        assert transfer.process.wait(50) == 0, transfer.log()


def _wait_for_text(source: object, text: str, timeout_s: float = 30) -> None:
    deadline_s = time.monotonic() + timeout_s
    while text not in source():  # type: ignore[operator]
        assert time.monotonic() < deadline_s, f"no {text!r}"
        time.sleep(0.01)


def _fails(path: Path, script: str) -> str:
    """Run a script that must fail on the app's host, and return what it wrote on standard error."""
    program = path.program("app", (sys.executable, "-c", script), f"failing-{time.monotonic_ns()}")
    program.start()
    assert program.process.wait(40) != 0
    return program.log()
