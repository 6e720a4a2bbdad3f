"""The command line of entg: what it refuses and how, what it listens on, and what status tells."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from enlink.control import Hello, Role
from enlink.testing.hosts import Host
from enlink.testing.peers import connect
from enlink.testing.programs import FAR_BEYOND_S, NOBODY, Program, as_nobody, in_trio, started
from entg.cli import main

ENTG = str(Path(sys.executable).parent / "entg")
COUNTERS = [
    f"{direction}_{leg}{suffix}"
    for leg in ("enta", "entg")
    for direction in ("from", "to")
    for suffix in ("", "_dropped")
] + ["enta_ended", "entg_ended"]

Refuse = Callable[..., tuple[int, str]]


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Refuse:
    """Runs entg with a command line that it refuses; gives its exit code and its one line."""

    def run(*argv: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["entg", *argv])
        code = main()
        captured = capfd.readouterr()
        assert captured.out == ""
        (line,) = captured.err.splitlines()
        return code, line

    return run


@pytest.fixture(autouse=True)
def runtime_directory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Locks and status sockets of this test alone, under a name that is short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="eng-") as path:
        monkeypatch.setenv("RUNTIME_DIRECTORY", path)
        yield Path(path)
        assert list(Path(path).iterdir()) == []


# What is refused.


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--no-such-option"], "unrecognized arguments: --no-such-option"),
        (["--enta", "6980"], "unrecognized arguments: --enta;"),
        (["--entg-listen=x"], "'x' names no port"),
        (["--entg-con", "10.0.0.1:6979"], "unrecognized arguments: --entg-con;"),
        (["--entg-connect", "6979"], "'6979' is a port without a host: write HOST:6979"),
        (["--entg-connect", "10.0.0.1"], "names no port"),
        (["--entg-connect", "10.0.0.1:0"], "port 0 cannot be dialled"),
        (["--entg-connect", "0.0.0.0:6979"], "is every address: write the one to dial"),
        (["--entg-connect", "fd00::1:6979"], "needs brackets"),
        (["--entg-connect", "10.0.0.256:6979"], "is not an IPv4 address"),
        (["--entg-connect", "http://10.0.0.1:6979"], "http:// is not known here"),
        (["--entg-connect", "vsock://3:6979"], "vsock:// is not known here, write tcp://HOST:PORT"),
        (["--entg-listen", "unix:/run/entg.sock"], "unix: is not known here, write tcp://HOST:PORT"),
        (["--enta-listen", "systemd:enta"], "systemd: is not known here, write tcp://HOST:PORT"),
        (["--enta-listen", "65536"], "port '65536' is not a number from 1 to 65535"),
        (["--enta-listen", "-1"], "--enta-listen: '-1' names no port"),
        (["--enta-listen", ""], "an empty address"),
        (["--wire", "raw"], "invalid choice: 'raw'"),
        (["--grace", "soon"], "'soon' is no duration"),
        (["--spin", "1s"], "--spin: '1s' is too long to spin: write at most 10ms"),
        (["--log-level", "loud"], "invalid choice: 'loud'"),
        (["--config", "entg.toml"], "unrecognized arguments: --config;"),
        (["--metrics=9100"], "unrecognized arguments: --metrics=9100"),
        (["stat"], "invalid choice: 'stat'"),
        (["status", "--js"], "unrecognized arguments: --js"),
        (["status", "--enta-port", "127.0.0.1:6980"], "is more than a port: write it as in 6980"),
        (["status", "--enta-port", "x"], "--enta-port: 'x' names no port"),
    ],
)
def test_wrong_use_exits_64_with_one_line_that_names_the_value(refused: Refuse, argv: list[str], expected: str) -> None:
    code, line = refused(*argv)
    assert code == 64
    assert line.startswith("entg: ")
    assert expected in line
    assert line.endswith("--help")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--occlum"], "--occlum is for the inside of an enclave, and this is none"),
        (["--host", "--occlum"], "--host and --occlum contradict each other: choose"),
        (["--occlum", "status"], "--occlum goes with no command"),
        (["--entg-rats-tls"], "this side attests: name what makes its evidence with --attester"),
        (["--enta-rats-tls"], "this side attests: name what makes its evidence with --attester"),
        (["--entg-rats-tls", "--entg-connect", "10.0.0.1:6979"], "attested links need --policy FILE"),
        (["--mutual"], "--mutual is for attested links, and none is asked for: add --enta-rats-tls or --entg-rats-tls"),
        (["--attester", "sgx_ecdsa"], "--attester is for attested links"),
        (["--attester", ""], "--attester is for attested links"),
        (["--verifier", "sgx_ecdsa"], "--verifier is for attested links"),
        (["--tls", "openssl"], "--tls is for attested links"),
        (["--crypto", "openssl"], "--crypto is for attested links"),
        (["--policy", "policy.toml"], "--policy is for attested links"),
        (["--insecure-no-attestation"], "--insecure-no-attestation is for attested links"),
        (["--enta-rats-tls", "--attester", "csv", "--policy", "p"], "this side only attests and judges nobody"),
        (["--entg-connect", "10.0.0.1:6979", "--entg-listen", "6979"], "--entg-connect or --entg-listen, not both"),
        (["--entg-listen", "7000", "--enta-listen", "7000"], "--enta-listen and --entg-listen both want port 7000"),
        (["--enta-listen", "6979"], "both want port 6979"),
    ],
)
def test_options_that_contradict_each_other_or_this_place_exit_78(
    refused: Refuse, argv: list[str], expected: str
) -> None:
    code, line = refused(*argv)
    assert (code, expected in line) == (78, True), line


def test_help_explains_itself_and_names_every_option(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["entg", "--help"])
    assert main() == 0
    text = capsys.readouterr().out
    where = ["--host", "--occlum", "--entg-connect", "--entg-listen", "--enta-listen", "--wire", "--grace"]
    attested = ["--entg-rats-tls", "--enta-rats-tls", "--attester", "--verifier", "--tls", "--crypto", "--mutual"]
    common = ["--policy", "--log-level", "--log-format", "--status-socket", "--version", "--help", "status"]
    assert [word for word in where + attested + common if word not in text] == []
    assert "entg --entg-connect gateway.example:6979" in text


def test_version_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["entg", "--version"])
    assert main() == 0
    assert re.fullmatch(r"entg \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.proves("F67")
def test_a_port_in_use_exits_69_after_five_seconds_and_names_the_holder(host: Host, gateway: Program) -> None:
    with started(host, "entg", "--enta-listen", "7980") as second:
        began_s = time.monotonic()
        assert second.wait() == 69
        assert 4.5 <= time.monotonic() - began_s < FAR_BEYOND_S
        assert second.log() == (
            f"entg: cannot listen on 0.0.0.0:6979: entg (pid {gateway.process.pid}) has the port;"
            " stop it, or write another port\n"
        )
    assert gateway.process.poll() is None


@pytest.mark.proves("F67")
def test_a_port_that_becomes_free_within_five_seconds_is_taken(host: Host) -> None:
    with host.entered():
        holder = socket.create_server(("0.0.0.0", 6979))
    with started(host, "entg") as gateway:
        gateway.wait_until(lambda: ":6980 " in host.run("ss", "-Htln"), "listening on its first port")
        holder.close()
        gateway.wait_until_ready()


@pytest.mark.proves("F06")
def test_a_stop_is_obeyed_while_a_port_is_waited_for(host: Host) -> None:
    with host.entered(), socket.create_server(("0.0.0.0", 6979)), started(host, "entg") as gateway:
        gateway.wait_until(lambda: ":6980 " in host.run("ss", "-Htln"), "listening on its first port")
        assert gateway.stop() == 0
        assert gateway.events("ready") == []


@pytest.mark.proves("D19", "G21")
def test_a_gateway_needs_no_privilege(host: Host, runtime_directory: Path) -> None:
    os.chown(runtime_directory, NOBODY, NOBODY)
    under = as_nobody()
    process = host.popen(*under, ENTG, stderr=subprocess.PIPE)
    assert process.stderr is not None
    assert b" ready " in process.stderr.readline()
    status = Path(f"/proc/{process.pid}/status").read_text()
    assert "CapEff:\t0000000000000000" in status
    process.terminate()
    assert process.wait(FAR_BEYOND_S) == 0
    process.stderr.close()
    process = host.popen(*under, ENTG, "--enta-listen", "80", stderr=subprocess.PIPE)
    _, error = process.communicate(timeout=FAR_BEYOND_S)
    assert process.returncode == 77
    assert error.splitlines()[0] == b"entg: cannot listen on 0.0.0.0:80: ports below 1024 need CAP_NET_BIND_SERVICE"


# What it does.


def test_bare_entg_listens_on_6979_and_6980_of_every_address(host: Host) -> None:
    process = host.popen(ENTG, stderr=subprocess.PIPE)
    assert process.stderr is not None
    ready = process.stderr.readline().decode()
    assert re.fullmatch(
        r'\S+Z info entg\.gateway ready enta_listen="0\.0\.0\.0:6980, \[::\]:6980"'
        r' entg_listen="0\.0\.0\.0:6979, \[::\]:6979"\n',
        ready,
    ), ready
    listening = [line.split()[3] for line in host.run("ss", "-Htln").splitlines()]
    assert sorted(listening) == sorted(["0.0.0.0:6979", "0.0.0.0:6980", "[::]:6979", "[::]:6980"])
    for address in ("127.0.0.1", "::1"):
        for port in (6979, 6980):
            with host.entered():
                socket.create_connection((address, port), timeout=FAR_BEYOND_S).close()
    process.terminate()
    assert process.wait(FAR_BEYOND_S) == 0
    process.stderr.close()


def test_without_ipv6_it_listens_on_ipv4(host: Host) -> None:
    host.run("sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1")
    try:
        with started(host, "entg") as gateway:
            gateway.wait_until_ready()
            with host.entered():
                socket.create_connection(("127.0.0.1", 6980), timeout=FAR_BEYOND_S).close()
            assert gateway.stop() == 0
    finally:
        host.run("sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=0")


def test_it_listens_where_it_is_told(host: Host) -> None:
    with started(host, "entg", "--enta-listen", "127.0.0.1:7980", "--entg-listen", "[::1]:7979") as gateway:
        gateway.wait_until_ready()
        (ready,) = gateway.events("ready")
        assert (ready["enta_listen"], ready["entg_listen"]) == ("127.0.0.1:7980", "[::1]:7979")
        listening = [line.split()[3] for line in host.run("ss", "-Htln").splitlines()]
        assert sorted(listening) == ["127.0.0.1:7980", "[::1]:7979"]


def ask(host: Host, *options: str) -> tuple[int, str, str]:
    done = subprocess.run(
        host.argv([ENTG, *options]), capture_output=True, text=True, timeout=FAR_BEYOND_S, check=False
    )
    return done.returncode, done.stdout, done.stderr


@contextmanager
def running(host: Host, log: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a gateway whose status socket is where it is by default, until it is ready and then until the block ends."""
    with log.open("wb") as output:
        process = host.popen(ENTG, *options, stderr=output)
    deadline_s = time.monotonic() + FAR_BEYOND_S
    while b" ready " not in log.read_bytes():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(FAR_BEYOND_S)


@in_trio
async def test_status_shows_legs_and_every_counter(host: Host, tmp_path: Path) -> None:
    with running(host, tmp_path / "log") as process:
        async with await connect(host, 6979) as peer:
            await peer.greet(Hello(Role.GATEWAY))
            code, output, error = await trio.to_thread.run_sync(ask, host, "status", "--json")
            assert (code, error) == (0, "")
            document: dict[str, Any] = json.loads(output)
            assert (document["program"], document["pid"]) == ("entg", process.pid)
            assert sorted(document["counters"]) == sorted(COUNTERS)
            assert document["legs"]["entg"]["peer"] == "entg 'default'"
            assert document["legs"]["enta"]["state"] == "waiting"
            assert document["log"] == {"dropped_lines": 0}
            code, output, error = await trio.to_thread.run_sync(ask, host, "status")
            assert (code, error) == (0, "")
            assert re.search(r"^    peer +entg 'default'$", output, re.MULTILINE), output


def test_gateways_of_different_addresses_share_a_port_and_are_told_apart_by_their_sockets(
    host: Host, tmp_path: Path
) -> None:
    pairs = [
        ("--enta-listen", f"127.0.0.{number}:6980", "--entg-listen", f"127.0.0.{number}:6979") for number in (1, 2)
    ]
    with running(host, tmp_path / "1", *pairs[0]) as one, running(host, tmp_path / "2", *pairs[1]) as two:
        code, output, error = ask(host, "status")
        assert (code, output) == (64, "")
        said = re.fullmatch(
            r"entg: several entg run here on port 6980: choose one with --status-socket, of (\S+), (\S+)\n", error
        )
        assert said is not None, error
        documents = [json.loads(ask(host, "status", "--json", "--status-socket", path)[1]) for path in said.groups()]
        assert {document["pid"] for document in documents} == {one.pid, two.pid}


def test_status_of_one_of_several_gateways_is_found_by_its_port(host: Host, tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with (
        running(host, tmp_path / "1") as one,
        running(host, tmp_path / "2", "--enta-listen", "7980", "--entg-listen", "7979") as two,
        running(
            host, tmp_path / "3", "--enta-listen", "8980", "--entg-listen", "8979", "--status-socket", path
        ) as three,
    ):
        assert ask(host, "status") == (
            64,
            "",
            "entg: several entg run here: choose one with --enta-port, of 6980, 7980, 8980\n",
        )
        for process, options in (
            (one, ["status", "--enta-port", "6980"]),
            (two, ["status", "--enta-port", "7980"]),
            (three, ["status", "--enta-port", "8980"]),
            (three, ["status", "--status-socket", path]),
            (three, ["--status-socket", path, "status"]),
        ):
            code, output, error = ask(host, *options, "--json")
            assert (code, error, json.loads(output)["pid"]) == (0, "", process.pid)
        code, output, error = ask(host, "status", "--enta-port", "7000")
        assert (code, output) == (69, "")
        assert error == "entg: no entg runs here with --enta-listen 7000: start one, or give its --status-socket\n"


def test_what_a_killed_gateway_leaves_is_no_obstacle(host: Host, tmp_path: Path, runtime_directory: Path) -> None:
    with running(host, tmp_path / "log") as process:
        process.kill()
        process.wait(FAR_BEYOND_S)
    (stale,) = runtime_directory.glob("*.sock")
    assert ask(host, "status")[::2] == (69, "entg: no entg runs here: start one, or give its --status-socket\n")
    assert not stale.exists()
    with running(host, tmp_path / "log") as process:
        process.kill()
        process.wait(FAR_BEYOND_S)
    with running(host, tmp_path / "log") as process:
        code, output, _ = ask(host, "status", "--json")
        assert (code, json.loads(output)["pid"]) == (0, process.pid)


def test_a_status_socket_path_that_is_a_file_exits_73_and_the_file_stays(host: Host, tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("words")
    code, _, error = ask(host, "--status-socket", str(path))
    assert code == 73
    assert error.splitlines()[-1] == (
        f"entg: {path} is not a socket of ours: remove it, or choose another --status-socket"
    )
    assert path.read_text() == "words"
