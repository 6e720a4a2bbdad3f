"""The command line of relay: what it refuses and how, that every option does something, and what status tells."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import pytest
from enlink.endpoint import Endpoint, Tcp, Unix, Vsock
from enlink.testing.hosts import Host, Network
from enlink.testing.programs import FAR_BEYOND_S, Program, as_nobody, started
from relay import cli
from relay.config import RelayConfig

RELAY = str(Path(sys.executable).parent / "relay")
PAIR = ("--listen", "127.0.0.1:7000", "--target", "127.0.0.1:9000")
Relaying = Callable[..., AbstractContextManager[Program]]
Refuse = Callable[..., tuple[int, str]]


@pytest.fixture(autouse=True)
def runtime_directory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Locks and status sockets of this test alone, under a name that is short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="eng-") as path:
        monkeypatch.setenv("RUNTIME_DIRECTORY", path)
        yield Path(path)
        assert list(Path(path).iterdir()) == []


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Refuse:
    """Runs relay with a command line that it refuses; gives its exit code and its one line."""

    def run(*argv: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["relay", *argv])
        code = cli.main()
        captured = capfd.readouterr()
        assert captured.out == ""
        (line,) = captured.err.splitlines()
        return code, line

    return run


@pytest.fixture
def understood(monkeypatch: pytest.MonkeyPatch) -> Callable[..., RelayConfig]:
    """Runs relay with a command line that it takes; gives what it would do."""

    def run(*argv: str) -> RelayConfig:
        taken: list[RelayConfig] = []

        async def serve(config: RelayConfig, *_: object) -> None:
            taken.append(config)

        monkeypatch.setattr(sys, "argv", ["relay", *argv])
        monkeypatch.setattr(cli, "_serve", serve)
        assert cli.main() == 0
        (config,) = taken
        return config

    return run


# What is refused.


@pytest.mark.parametrize(
    ("argv", "code", "expected"),
    [
        ("", 64, "nothing to relay: give --listen and --target, or --tcp-address and --vsock-address, or --config"),
        ("--no-such-option", 64, "unrecognized arguments: --no-such-option"),
        ("--list 1", 64, "unrecognized arguments: --list"),
        ("--listen 7000", 64, "--listen is there 1 times and --target 0 times: give each --listen its --target"),
        ("--target 127.0.0.1:9000", 64, "--listen is there 0 times and --target 1 times"),
        ("--listen 7000 --target 9000", 64, "--target: '9000' is a port without a host: write HOST:9000"),
        ("--listen x --target 127.0.0.1:1", 64, "--listen: 'x' names no port"),
        ("--listen 16:80 --target 127.0.0.1:1", 64, "for that cid write vsock://16:80"),
        ("--listen 7000 --target systemd:web", 64, "'systemd:web' can only be listened on"),
        ("--listen 7000 --target vsock://:80", 64, "is any cid: write the one to dial, as in vsock://3:80"),
        ("--listen 7000 --target http://127.0.0.1:80", 64, "http:// is not known here"),
        ("--tcp-address 127.0.0.1:80", 64, "--vsock-address is missing"),
        ("--vsock-address 16:80", 64, "--tcp-address is missing"),
        ("--tcp-to-vsock", 64, "--tcp-address is missing: --tcp-to-vsock goes with both"),
        ("--tcp-address 80 --vsock-address 16:80", 64, "--tcp-address: '80' is a port without a host"),
        (
            "--tcp-address :80 --vsock-address any:80 --tcp-to-vsock",
            64,
            "--vsock-address: 'any:80' is any cid",
        ),
        ("--tcp-address 127.0.0.1:80 --vsock-address 127.0.0.1:80", 64, "--vsock-address: '127.0.0.1:80'"),
        ("--tcp-address 127.0.0.1:80 --vsock-address 80 --listen 81", 78, "are two ways to say it: use one"),
        ("--mock-vsock --listen 80 --target 127.0.0.1:81", 78, "--mock-vsock and --listen or --target are two ways"),
        ("--listen 127.0.0.1:80 --target 127.0.0.1:80", 78, "tcp://127.0.0.1:80 leads to itself"),
        ("--workers 2 --max-concurrent-connections 1", 78, "1 connections cannot be shared by 2 workers"),
        ("--workers 0", 64, "--workers: '0' is not a number from 1 to 1000000"),
        ("--max-concurrent-connections many", 64, "--max-concurrent-connections: 'many' is not a number"),
        ("--connect-timeout 0s", 64, "--connect-timeout: '0s' is no time at all"),
        ("--idle-timeout soon", 64, "--idle-timeout: 'soon' is no duration"),
        ("--max-lifetime -1", 64, "--max-lifetime: '-1' is no duration"),
        ("--half-close-timeout 0", 64, "--half-close-timeout: '0' is no time at all"),
        ("--grace never", 64, "--grace: 'never' is no duration"),
        ("--vsock-buffer 1", 64, "--vsock-buffer: '1' is not a size from 4k to 1024m"),
        ("--allow nowhere", 64, "--allow: 'nowhere' names no port"),
        (
            "--allow 127.0.0.1:80",
            78,
            "no --allow lets tcp://127.0.0.1:7000 reach its target: 127.0.0.1 port",
        ),
        (
            "--listen 7000 --target unix:/run/app.sock --allow 127.0.0.1:80",
            78,
            "no rule can be about unix:/run/app.sock, only about TCP and vsock: leave allow out",
        ),
        ("--config /nowhere", 78, "cannot read /nowhere (No such file or directory): name another file with --config"),
        ("--config /nowhere --grace 5s", 78, "--config /nowhere says it all: put the other options into that file"),
        ("--log-level loud", 64, "argument --log-level: invalid choice: 'loud'"),
        ("vsock-proxy", 64, "the following arguments are required: local_port, remote_addr, remote_port"),
        ("vsock-proxy 8000 localhost 80 --config /nowhere", 78, "cannot read the allow-list /nowhere"),
        ("--config /a vsock-proxy 8000 h 443", 64, "--config is of no use before vsock-proxy, whose own options stand"),
        ("--grace 0s vsock-proxy 8000 h 443", 64, "--grace is of no use before vsock-proxy"),
        ("--tcp-to-vsock --workers 2 status", 64, "--tcp-to-vsock is of no use before status, whose own options"),
        ("--allow h:1 --no-splice status", 64, "--allow is of no use before status"),
        ("--log-level error status --pid 1", 69, "no relay runs here as process 1"),
        ("status --pid 1", 69, "no relay runs here as process 1: start one, or give its --status-socket"),
    ],
)
def test_a_command_line_that_makes_no_sense_is_refused_in_one_line(
    refused: Refuse, argv: str, code: int, expected: str
) -> None:
    words = argv.split()
    needs_pair = words and words[0].startswith("--") and not {"--listen", "--target", "--config"} & {*words}
    needs_pair = needs_pair and not any("address" in word or word.startswith("--tcp") for word in words)
    needs_pair = needs_pair and not {"vsock-proxy", "status"} & {*words}
    found, line = refused(*(PAIR if needs_pair else ()), *words)
    assert (found, line.partition(": ")[0]) == (code, "relay")
    assert expected in line


def test_a_file_that_is_no_text_is_refused(refused: Refuse, tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff")
    expected = f"relay: cannot read {tmp_path}/binary (it is no UTF-8 text): name another file with --config"
    assert refused("--config", f"{tmp_path}/binary") == (78, expected)


def test_a_variable_for_workers_that_somebody_else_has_set_is_refused(
    refused: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENG_RELAY_WORKER", "x")
    assert refused(*PAIR) == (78, "relay: ENG_RELAY_WORKER='x' is no share of a relay's work: unset it")


# What is understood.


@pytest.mark.parametrize(
    ("argv", "listen", "target"),
    [
        ("--tcp-address 127.0.0.1:1 --vsock-address 16:2", Vsock(16, 2), Tcp("127.0.0.1", 1)),
        ("--tcp-address 127.0.0.1:1 --vsock-address any:2", Vsock(None, 2), Tcp("127.0.0.1", 1)),
        ("--tcp-address :1 --vsock-address parent:2 --tcp-to-vsock", Tcp(None, 1), Vsock(3, 2)),
        ("--mock-vsock --tcp-address [::1]:1 --vsock-address :2", Tcp(None, 2), Tcp("::1", 1)),
        ("--mock-vsock --tcp-address 1 --vsock-address h:2 --tcp-to-vsock", Tcp(None, 1), Tcp("h", 2)),
        ("--listen VSOCK-LISTEN:1,fork --target UNIX-CONNECT:/a", Vsock(None, 1), Unix("/a")),
    ],
)
def test_classic_command_lines_and_general_ones_mean_the_same_kind_of_pair(
    understood: Callable[..., RelayConfig], argv: str, listen: Endpoint, target: Endpoint
) -> None:
    (bridge,) = understood(*argv.split()).bridges
    assert (bridge.listen, bridge.target) == (listen, target)


def test_pairs_are_matched_in_order(understood: Callable[..., RelayConfig]) -> None:
    config = understood(
        *["--listen", "1", "--listen", "2", "--target", "h:1", "--target", "h:2", "--idle-timeout", "5s"]
    )
    assert [(str(bridge.listen), str(bridge.target), bridge.idle_timeout_s) for bridge in config.bridges] == [
        ("tcp://:1", "tcp://h:1", 5.0),
        ("tcp://:2", "tcp://h:2", 5.0),
    ]


def test_vsock_proxy_is_a_relay_with_its_own_list(understood: Callable[..., RelayConfig], tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("allowlist:\n- {address: kms.example, port: 443}\n")
    config = understood(*f"vsock-proxy 8000 kms.example 443 -4 -w 9 --config {tmp_path}/list.yaml".split())
    (bridge,) = config.bridges
    assert (bridge.listen, bridge.target) == (Vsock(None, 8000), Tcp("kms.example", 443, 4))
    assert (bridge.max_connections, [str(rule) for rule in bridge.allow]) == (9, ["kms.example:443"])


def test_vsock_proxy_looks_listed_names_up_for_a_target_that_is_an_address(
    understood: Callable[..., RelayConfig], refused: Refuse, tmp_path: Path
) -> None:
    (tmp_path / "list.yaml").write_text("allowlist:\n- {address: localhost, port: 9000}\n")
    config = understood(*f"vsock-proxy 8000 127.0.0.1 9000 --config {tmp_path}/list.yaml".split())
    assert [str(rule) for rule in config.bridges[0].allow] == ["localhost:9000", "127.0.0.1:9000"]
    code, line = refused(*f"vsock-proxy 8000 127.0.0.2 9000 --config {tmp_path}/list.yaml".split())
    assert code == 78
    assert "list.yaml does not allow 127.0.0.2 port 9000" in line


def test_vsock_proxy_takes_no_name_for_an_address_that_it_shares_with_a_listed_one(
    refused: Refuse, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever answers for that name could lead it anywhere a moment later; the help says so."""
    (tmp_path / "list.yaml").write_text("allowlist:\n- {address: localhost, port: 9000}\n")
    code, line = refused(*f"vsock-proxy 8000 same.localhost 9000 --config {tmp_path}/list.yaml".split())
    assert code == 78
    assert "does not allow same.localhost port 9000: add - {address: 'same.localhost', port: 9000} to its" in line
    monkeypatch.setattr(sys, "argv", ["relay", "vsock-proxy", "--help"])
    assert cli.main() == 0
    assert "to share one with a listed name is not enough" in " ".join(capfd.readouterr().out.split())


# What each option does. What they do under load is in tests/test_relay_load.py.


def talk(host: Host, port: int = 7000) -> socket.socket:
    with host.entered():
        client = socket.create_connection(("127.0.0.1", port))
    client.settimeout(FAR_BEYOND_S)
    return client


@pytest.fixture
def server(host: Host) -> Iterator[socket.socket]:
    """Listens where relays lead to."""
    with host.entered():
        listener = socket.create_server(("127.0.0.1", 9000))
    listener.settimeout(FAR_BEYOND_S)
    with listener:
        yield listener


def accept(server: socket.socket) -> socket.socket:
    accepted, _ = server.accept()
    accepted.settimeout(FAR_BEYOND_S)
    return accepted


@pytest.mark.parametrize(
    ("option", "how"),
    [("--idle-timeout", "idle"), ("--max-lifetime", "lifetime"), ("--half-close-timeout", "half_close_timeout")],
)
def test_a_timeout_ends_a_connection(
    host: Host, relaying: Relaying, server: socket.socket, option: str, how: str
) -> None:
    with relaying(*PAIR, option, "300ms") as relay, talk(host) as client, accept(server):
        client.shutdown(socket.SHUT_WR)
        with pytest.raises(ConnectionResetError):
            client.recv(1)
        assert relay.status()["bridges"][0]["ended"] == {how: 1}


@pytest.mark.proves("D23")
def test_a_name_that_leads_to_an_address_that_no_rule_allows_is_not_dialled(
    host: Host, relaying: Relaying, server: socket.socket
) -> None:
    options = ("--listen", "127.0.0.1:7000", "--target", "localhost:9000", "--allow", "10.0.0.0/8:9000")
    with relaying(*options) as relay:
        with pytest.raises(ConnectionResetError), talk(host) as client:
            client.recv(1)
        assert relay.status()["bridges"][0]["ended"] == {"not_listed": 1}
        relay.wait_until(lambda: bool(relay.events("target_refused")), "said so")
        (event,) = relay.events("target_refused")
        assert "localhost port 9000 at 127.0.0.1 is not allowed" in event["error"]


def test_a_name_is_looked_up_for_each_connection(host: Host, relaying: Relaying, server: socket.socket) -> None:
    options = ("--listen", "127.0.0.1:7000", "--target", "localhost:9000")
    with relaying(*options), talk(host) as client, accept(server) as accepted:
        client.sendall(b"x")
        assert accepted.recv(1) == b"x"


def test_proxy_protocol_tells_the_target_who_connects(host: Host, relaying: Relaying, server: socket.socket) -> None:
    with relaying(*PAIR, "--proxy-protocol"), talk(host) as client, accept(server) as accepted:
        client.sendall(b"hello")
        header = bytes([13, 10, 13, 10, 0, 13, 10, 81, 85, 73, 84, 10, 0x21, 0x11, 0, 12, 127, 0, 0, 1, 127, 0, 0, 1])
        ports = client.getsockname()[1].to_bytes(2, "big") + (7000).to_bytes(2, "big")
        expected = header + ports + b"hello"
        with accepted.makefile("rb") as file:
            assert file.read(len(expected)) == expected


def test_proxy_protocol_has_words_for_unix_sockets(
    host: Host, relaying: Relaying, server: socket.socket, runtime_directory: Path
) -> None:
    path = runtime_directory / "front"
    options = ("--listen", f"unix:{path}", "--target", "127.0.0.1:9000", "--proxy-protocol")
    with relaying(*options), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        with accept(server) as accepted, accepted.makefile("rb") as file:
            header = file.read(16 + 216)
            assert header[12:16] == bytes([0x21, 0x31, 0, 216])
            assert header[16 + 108 :].rstrip(b"\0") == str(path).encode()


def test_a_file_describes_bridges_of_any_number(
    host: Host, relaying: Relaying, server: socket.socket, tmp_path: Path
) -> None:
    file = tmp_path / "relay.toml"
    bridge = '[[bridge]]\nlisten = "127.0.0.1:700{}"\ntarget = "127.0.0.1:9000"\n'
    file.write_text(bridge.format(1) + bridge.format(2))
    with relaying("--config", str(file)) as relay:
        for port in (7001, 7002):
            with talk(host, port) as client, accept(server) as accepted:
                client.sendall(b"x")
                assert accepted.recv(1) == b"x"
        assert [bridge["listen"] for bridge in relay.status()["bridges"]] == [
            "tcp://127.0.0.1:7001",
            "tcp://127.0.0.1:7002",
        ]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_port_that_the_kernel_chose_can_be_learnt(
    host: Host, relaying: Relaying, server: socket.socket, workers: str
) -> None:
    """From the word that it is ready, and from its status."""
    options = ("--listen", "127.0.0.1:0", "--target", "127.0.0.1:9000", "--workers", workers)
    with relaying(*options) as relay:
        (ready,) = relay.events("ready")
        port = int(ready["listen"].removeprefix("tcp://127.0.0.1:"))
        assert relay.status()["bridges"][0]["listen"] == ready["listen"]
        with talk(host, port) as client, accept(server) as accepted:
            client.sendall(b"x")
            assert accepted.recv(1) == b"x"


def test_workers_share_a_unix_socket_too(relaying: Relaying, server: socket.socket, runtime_directory: Path) -> None:
    path = f"{runtime_directory}/front"
    with relaying("--listen", f"unix:{path}", "--target", "127.0.0.1:9000", "--workers", "2") as relay:
        clients = [socket.socket(socket.AF_UNIX) for _ in range(8)]
        with ExitStack() as stack:
            for client in clients:
                stack.enter_context(client).connect(path)
                client.sendall(b"x")
                assert stack.enter_context(accept(server)).recv(1) == b"x"
            relay.wait_until(lambda: relay.status()["bridges"][0]["active"] == 8, "told all")
        assert len(relay.status()["workers"]["pids"]) == 2
        assert relay.stop() == 0


PASS_ON = """
import os, socket, sys
listener = socket.create_server(("127.0.0.1", 7000))
os.dup2(listener.fileno(), 3)
os.set_inheritable(3, True)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1", LISTEN_FDNAMES="web")
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_socket_of_systemd_is_served(host: Host, server: socket.socket, workers: str) -> None:
    options = ("--listen", "systemd:web", "--target", "127.0.0.1:9000", "--workers", workers)
    with started(host, "relay", *options, under=(sys.executable, "-c", PASS_ON)) as relay:
        relay.wait_until_ready()
        with talk(host) as client, accept(server) as accepted:
            client.sendall(b"x")
            assert accepted.recv(1) == b"x"
        assert relay.stop() == 0


# The loopback device.


@pytest.fixture
def enclave() -> Iterator[Host]:
    """A host whose loopback device is down and has no address, as an enclave's."""
    with Network() as network:
        host = network.host("enclave")
        host.run("ip", "address", "flush", "dev", "lo")
        host.run("ip", "link", "set", "lo", "down")
        yield host


def test_in_an_enclave_the_error_names_the_option_that_helps(enclave: Host, runtime_directory: Path) -> None:
    """Both where the relay listens on the loopback device, and where its target is."""
    with started(
        enclave, "relay", "--listen", f"unix:{runtime_directory}/front", "--target", "127.0.0.1:9000"
    ) as relay:
        relay.wait_until_ready()
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(FAR_BEYOND_S)
            client.connect(f"{runtime_directory}/front")
            assert client.recv(1) == b""
        relay.wait_until(lambda: bool(relay.events("target_unreachable")), "said so")
        (event,) = relay.events("target_unreachable")
        assert "Network is unreachable" in event["error"]
        assert "as relay does with --setup-loopback" in event["error"]


def test_setup_loopback_brings_it_up_with_both_addresses_and_once_is_enough(enclave: Host) -> None:
    for _ in range(2):
        with started(enclave, "relay", *PAIR, "--setup-loopback") as relay:
            relay.wait_until_ready()
            assert relay.stop() == 0
    listing = enclave.run("ip", "-brief", "address", "show", "dev", "lo").split()
    assert sorted(listing[2:]) == ["127.0.0.1/8", "::1/128"]
    assert "UP" in enclave.run("ip", "link", "show", "dev", "lo")


def test_setup_loopback_needs_a_privilege_and_says_which(enclave: Host) -> None:
    with started(enclave, "relay", *PAIR, "--setup-loopback", under=as_nobody()) as relay:
        assert relay.wait() == 77
        assert "--setup-loopback needs CAP_NET_ADMIN: run as root, or leave it out" in relay.log()


# Status, and other relays.


def test_status_tells_whether_spinning_pays(host: Host, relaying: Relaying, server: socket.socket) -> None:
    """A relay that spins answers as any other, and says how often it found something before it slept."""
    with (
        relaying("--listen", "127.0.0.1:7000", "--target", "127.0.0.1:9000", "--spin", "10ms"),
        talk(host) as client,
        accept(server) as target,
    ):
        for _ in range(200):
            client.sendall(b"question")
            assert target.recv(8) == b"question"
            target.sendall(b"answer")
            assert client.recv(6) == b"answer"
        document: dict[str, Any] = json.loads(host.run(RELAY, "status", "--json"))
    assert document["spin"]["found"] > 0
    assert document["spin"]["found"] + document["spin"]["missed"] <= 2 * 200 + 100


def test_status_tells_what_a_relay_does_in_words_and_in_json(
    host: Host, runtime_directory: Path, server: socket.socket
) -> None:
    def ask(*options: str) -> subprocess.CompletedProcess[str]:
        argv = host.argv([RELAY, "status", *options])
        return subprocess.run(argv, capture_output=True, text=True, timeout=FAR_BEYOND_S, check=False)

    def start(number: int) -> subprocess.Popen[str]:
        argv = [RELAY, "--listen", f"127.0.0.1:700{number}", "--target", "127.0.0.1:9000"]
        process = subprocess.Popen(host.argv(argv), stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        assert " ready " in process.stderr.readline()
        return process

    with start(1) as one, start(2) as other:
        try:
            assert f"several relays run here: choose one with --pid, of {min(one.pid, other.pid)}" in ask().stderr
            assert ask().returncode == 64
            with talk(host, 7002), accept(server):
                document: dict[str, Any] = json.loads(ask("--pid", str(other.pid), "--json").stdout)
                assert document["bridges"][0]["active"] == 1
            assert "listen                      tcp://127.0.0.1:7001" in ask("--pid", str(one.pid)).stdout
        finally:
            one.terminate()
            other.terminate()


@pytest.mark.proves("F67")
def test_a_port_that_is_taken_is_waited_for_and_then_named(host: Host, relaying: Relaying) -> None:
    with relaying(*PAIR), started(host, "relay", *PAIR) as second:
        assert second.wait() == 69
        assert "cannot listen on 127.0.0.1:7000: " in second.log()
        assert "has the port" in second.log()


def test_help_has_an_example_of_each_way_and_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--help", "--version"):
        done = subprocess.run([RELAY, option], capture_output=True, text=True, timeout=FAR_BEYOND_S, check=True)
        assert done.stderr == ""
        if option == "--version":
            assert done.stdout == "relay 0.1.0\n"
        else:
            for word in ("--tcp-to-vsock", "--mock-vsock", "unix-vsock:", "systemd:", "VSOCK-CONNECT", "--config"):
                assert word in done.stdout.partition("examples:")[2]
