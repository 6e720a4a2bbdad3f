"""A relay with more to do than it can: limits hold exactly, nobody who is there is lost, and nothing is left behind."""

from __future__ import annotations

import os
import resource
import signal
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import trio
from enlink.testing.hosts import Host, Network
from enlink.testing.programs import FAR_BEYOND_S, Program, comes_true, started, until

PORT, SERVER_PORT = 7100, 9100
PAIR = ("--listen", f"127.0.0.1:{PORT}", "--target", f"127.0.0.1:{SERVER_PORT}")
MIB = 1 << 20
Stream = trio.SocketStream


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    """A host on which this test may hold thousands of descriptors, and a server's backlog is long."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with Network() as network:
        host = network.host("load")
        host.run("sysctl", "-qw", "net.core.somaxconn=4096", "net.ipv4.ip_local_port_range=1024 65000")
        yield host
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextmanager
def relaying(host: Host, *options: str, under: tuple[str, ...] = ()) -> Iterator[Program]:
    with started(host, "relay", *(options or PAIR), under=under) as relay:
        relay.wait_until_ready()
        yield relay


def on(host: Host, test: Callable[[], Awaitable[None]], *, within_s: float = FAR_BEYOND_S) -> None:
    """Run the test's own ends on that host."""

    async def bounded() -> None:
        with trio.fail_after(within_s):
            await test()

    with host.entered():
        trio.run(bounded)


def bridge_of(relay: Program) -> dict[str, Any]:
    """What its only bridge counts."""
    bridge: dict[str, Any] = relay.status()["bridges"][0]
    return bridge


def active(relay: Program) -> object:
    return bridge_of(relay)["active"]


async def echo(stream: Stream) -> None:
    async with stream:
        try:
            while data := await stream.receive_some():
                await stream.send_all(data)
        except trio.BrokenResourceError:
            pass


async def keep_asking(stream: Stream, seconds: float) -> None:
    """Ask again and again for so long: whenever the connection ends meanwhile, it is noticed."""
    until_s = trio.current_time() + seconds
    while trio.current_time() < until_s:
        await ask(stream, b"still there?")


async def ask(stream: Stream, question: bytes) -> None:
    """Ask an echo server, through the relay."""
    await stream.send_all(question)
    answer = b""
    while len(answer) < len(question):
        some = await stream.receive_some()
        assert some, "ended before it answered"
        answer += some
    assert answer == question


async def connect() -> Stream:
    return await trio.open_tcp_stream("127.0.0.1", PORT)


@pytest.mark.proves("F52", "G2")
@pytest.mark.parametrize("visits", [150, pytest.param(1_650, marks=[pytest.mark.soak, pytest.mark.timeout(600)])])
def test_thousands_of_connections_come_and_go_and_leave_nothing(host: Host, visits: int) -> None:
    """Opened, answered and closed, thirty at a time; descriptors are then as many as after the first thousand.

    Ten thousand each time, and a hundred thousand on demand: more than a host has ports, so that those that have been
    used must be free again.
    """
    sizes: list[tuple[int, int]] = []

    async def test() -> None:
        async def visit(count: int) -> None:
            for number in range(count):
                async with await connect() as stream:
                    await ask(stream, b"%d" % number)

        async with trio.open_nursery() as servers:
            await servers.start(trio.serve_tcp, echo, SERVER_PORT)
            for each in (33, visits, visits):
                async with trio.open_nursery() as clients:
                    for _ in range(30):
                        clients.start_soon(visit, each)
                await until(lambda: active(relay) == 0)
                sizes.append((relay.descriptors, relay.resident_bytes))
            servers.cancel_scope.cancel()

    with relaying(host) as relay:
        on(host, test, within_s=500)
        assert bridge_of(relay)["ended"] == {"eof": 30 * (33 + 2 * visits)}
    descriptors, resident = zip(*sizes, strict=True)
    assert len(set(descriptors)) == 1
    assert resident[2] <= 1.05 * resident[1]


@pytest.mark.proves("G13", "F50")
def test_two_thousand_idle_connections_take_14_kilobytes_each_and_all_answer(host: Host) -> None:
    async def test() -> None:
        async with trio.open_nursery() as servers:
            await servers.start(trio.serve_tcp, echo, SERVER_PORT)
            before = relay.resident_bytes
            streams = []
            for _ in range(2_000):
                streams.append(await connect())
                await ask(streams[-1], b"hello")
            assert active(relay) == 2_000
            assert (relay.resident_bytes - before) / 2_000 <= 14 * 1024
            for stream in streams:
                await ask(stream, b"still there")
                await stream.aclose()
            await until(lambda: active(relay) == 0)
            servers.cancel_scope.cancel()

    with relaying(host, *PAIR, "--max-concurrent-connections", "2000") as relay:
        on(host, test)
        assert bridge_of(relay)["ended"] == {"eof": 2_000}


@pytest.mark.proves("F48", "G12", "G27")
def test_a_thousand_clients_that_never_read_take_little_memory_and_hinder_nobody(host: Host) -> None:
    async def test() -> None:
        async def flood(stream: Stream) -> None:
            """Answer a line that says so with far more than anybody will read; else echo."""
            if (first := await stream.receive_some()) != b"flood":
                await stream.send_all(first)
                await echo(stream)
                return
            async with stream:
                while True:
                    await stream.send_all(bytes(MIB))

        async with trio.open_nursery() as servers:
            await servers.start(trio.serve_tcp, flood, SERVER_PORT)
            silent = []
            for _ in range(1_000):
                silent.append(await connect())
                await silent[-1].send_all(b"flood")
            waits_s = []
            async with await connect() as stream:
                for number in range(300):
                    began_s = trio.current_time()
                    await ask(stream, b"%d" % number)
                    waits_s.append(trio.current_time() - began_s)
                    await trio.sleep(0.003)
            await until(lambda: active(relay) == 1_000)
            assert relay.resident_bytes <= 128 * MIB
            assert sorted(waits_s)[270] < 0.4
            before_s = relay.cpu_s
            await trio.sleep(1)
            assert relay.cpu_s - before_s < 0.4  # it does not keep trying
            for stream in silent:
                stream.socket.close()
            servers.cancel_scope.cancel()

    # Small buffers in the kernel, which would take megabytes for each.
    host.run("sysctl", "-qw", "net.ipv4.tcp_wmem=4096 16384 65536", "net.ipv4.tcp_rmem=4096 65536 131072")
    try:
        with relaying(host) as relay:
            on(host, test)
            relay.wait_until(lambda: active(relay) == 0, "rid of the silent ones")
    finally:
        host.run("sysctl", "-qw", "net.ipv4.tcp_wmem=4096 16384 4194304", "net.ipv4.tcp_rmem=4096 131072 6291456")


@pytest.mark.proves("F51", "G15")
@pytest.mark.parametrize("workers", ["1", "3"])
def test_the_limit_holds_exactly_and_all_who_wait_are_served_in_the_end(host: Host, workers: str) -> None:
    """Of two hundred clients at once, sixteen are at the server, and never a seventeenth."""
    there: Counter[str] = Counter()

    async def test() -> None:
        async def serve(stream: Stream) -> None:
            there["now"] += 1
            there["most"] = max(there["most"], there["now"])
            async with stream:
                await trio.sleep(0.05)
                await stream.send_all(await stream.receive_some())
                await stream.receive_some()
                there["now"] -= 1  # before the relay can know, and dial for the next one

        async def visit() -> None:
            async with await connect() as stream:
                await ask(stream, b"hello")
                there["served"] += 1

        async with trio.open_nursery() as servers:
            await servers.start(trio.serve_tcp, serve, SERVER_PORT)
            async with trio.open_nursery() as clients:
                for _ in range(200):
                    clients.start_soon(visit)
            servers.cancel_scope.cancel()

    with relaying(host, *PAIR, "--max-concurrent-connections", "16", "--workers", workers):
        on(host, test)
    assert there["served"] == 200
    assert there["most"] == 16


@pytest.mark.proves("F53", "G15")
def test_a_relay_out_of_descriptors_pauses_says_so_once_a_second_and_recovers(host: Host) -> None:
    async def test() -> None:
        async with trio.open_nursery() as servers:
            await servers.start(trio.serve_tcp, echo, SERVER_PORT)
            async with await connect() as old:
                await ask(old, b"before")
                soft, hard = resource.prlimit(relay.process.pid, resource.RLIMIT_NOFILE)
                # One more can be accepted, for which its target cannot be dialled.
                limit = relay.descriptors + 1
                resource.prlimit(relay.process.pid, resource.RLIMIT_NOFILE, (limit, hard))
                began_s = trio.current_time()
                waiting = [await connect() for _ in range(50)]
                await trio.sleep(2.5)
                await ask(old, b"meanwhile")
                lines = len(relay.events("accept_paused"))
                assert 1 <= lines <= 1 + (trio.current_time() - began_s)
                before_s = relay.cpu_s
                await trio.sleep(0.5)
                assert relay.cpu_s - before_s < 0.25
                resource.prlimit(relay.process.pid, resource.RLIMIT_NOFILE, (soft, hard))
                began_s = trio.current_time()
                for stream in waiting:
                    await ask(stream, b"after")
                    await stream.aclose()
                assert trio.current_time() - began_s < 8 * 1.5
                await ask(old, b"after")
            servers.cancel_scope.cancel()

    with relaying(host) as relay:
        on(host, test)


@pytest.mark.proves("G15")
def test_a_limit_that_descriptors_have_no_room_for_is_lowered_with_a_warning(host: Host) -> None:
    with relaying(host, under=("prlimit", "--nofile=100:264")) as relay:
        assert bridge_of(relay)["max_concurrent_connections"] == 100
        (warning,) = relay.events("connections_limited")
        assert (warning["wanted"], warning["allowed"], warning["descriptors"]) == (1024, 100, 264)
    with started(host, "relay", *PAIR, under=("prlimit", "--nofile=64")) as relay:
        assert relay.wait() == 78
        assert "a limit of 64 descriptors has no room for connections: raise it with ulimit -n" in relay.log()


@pytest.mark.proves("F26")
def test_a_dead_target_holds_a_place_no_longer_than_the_connect_timeout(host: Host) -> None:
    """Its backlog is full, so that it is silent; the clients are told by a reset, and the next ones get their turn."""

    async def test() -> None:
        ends_s: list[float] = []

        async def visit() -> None:
            async with await connect() as stream:
                with pytest.raises(trio.BrokenResourceError):
                    await stream.receive_some()
            ends_s.append(trio.current_time() - began_s)

        with socket.socket() as dead:
            dead.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            dead.bind(("127.0.0.1", SERVER_PORT))
            dead.listen(0)
            with socket.create_connection(("127.0.0.1", SERVER_PORT)):
                began_s = trio.current_time()
                async with trio.open_nursery() as clients:
                    for _ in range(3):
                        clients.start_soon(visit)
        gaps_s = [after - before for before, after in pairwise([0, *sorted(ends_s)])]
        assert all(0.4 < gap < 8 for gap in gaps_s)  # one after the other, since there is one place

    with relaying(host, *PAIR, "--max-concurrent-connections", "1", "--connect-timeout", "500ms") as relay:
        on(host, test)
        assert bridge_of(relay)["ended"] == {"unreachable": 3}
        assert relay.events("target_unreachable")[0]["error"].startswith("cannot connect to 127.0.0.1 port ")
        assert relay.events("target_unreachable")[0]["error"].endswith(": no answer within 0.5 s")


@pytest.mark.proves("G11")
@pytest.mark.parametrize(
    ("workers", "told"), [("1", "the first"), ("2", "the first"), ("2", "all"), ("2", "all twice")]
)
def test_an_orderly_stop_takes_nobody_new_and_lets_those_that_are_there_finish(
    host: Host, workers: str, told: str
) -> None:
    """Also where all processes are told, as systemd does: workers take no number of signals for a second wish."""

    async def test() -> None:
        async with trio.open_nursery() as servers:
            await servers.start(trio.serve_tcp, echo, SERVER_PORT)
            async with await connect() as stream:
                await ask(stream, b"before")
                others = pids(relay) if told.startswith("all") else []
                relay.signal(signal.SIGTERM)
                for pid in others:
                    os.kill(pid, signal.SIGTERM)
                began_s = time.monotonic()
                await until_refused()
                assert time.monotonic() - began_s < 8 * 0.1
                for pid in others if told == "all twice" else []:
                    os.kill(pid, signal.SIGTERM)
                await keep_asking(stream, 0.5)  # in which a second wish would long have come
                await ask(stream, bytes(MIB))
                assert relay.process.poll() is None
            servers.cancel_scope.cancel()

    with relaying(host, *PAIR, "--workers", workers, "--grace", "1m") as relay:
        on(host, test)
        began_s = time.monotonic()
        assert relay.wait() == 0
        assert time.monotonic() - began_s < 8 * 0.5  # and not for as long as its grace lasts


async def until_refused() -> None:
    while True:
        try:
            stream = await connect()
        except OSError:
            return
        await stream.aclose()
        await trio.sleep(0.005)


@pytest.mark.parametrize(
    ("options", "signals", "least_s"),
    [(("--grace", "1s"), 1, 1.0), (("--grace", "1m"), 2, 0.0), (("--grace", "1m", "--workers", "2"), 2, 0.0)],
    ids=["grace is over", "second signal", "second signal, workers"],
)
def test_connections_that_go_on_are_ended_when_grace_is_over_or_with_the_second_signal(
    host: Host, options: tuple[str, ...], signals: int, least_s: float
) -> None:
    async def test() -> None:
        async with trio.open_nursery() as servers:
            await servers.start(trio.serve_tcp, echo, SERVER_PORT)
            async with await connect() as stream:
                await ask(stream, b"before")
                began_s = time.monotonic()
                for _ in range(signals):
                    heard = relay.log().count("SIGTERM")
                    relay.signal(signal.SIGTERM)
                    await until(partial(is_heard, relay, heard))
                with pytest.raises(trio.BrokenResourceError):
                    await stream.receive_some()
                assert least_s <= time.monotonic() - began_s < least_s + 8
            servers.cancel_scope.cancel()

    with relaying(host, *PAIR, *options) as relay:
        on(host, test)
        assert relay.wait() == 0


def is_heard(relay: Program, before: int) -> bool:
    return relay.log().count("SIGTERM") > before


def test_workers_that_die_are_replaced_and_none_outlives_the_first_process(host: Host) -> None:
    async def test() -> None:
        async with trio.open_nursery() as servers:
            await servers.start(trio.serve_tcp, echo, SERVER_PORT)
            for _ in range(20):
                async with await connect() as stream:
                    await ask(stream, b"hello")
            servers.cancel_scope.cancel()

    with relaying(host, *PAIR, "--workers", "2", "--max-concurrent-connections", "5") as relay:
        on(host, test)
        relay.wait_until(lambda: bridge_of(relay)["ended"] == {"eof": 20}, "told all")
        first = relay.status()["workers"]["pids"]
        for pid in first:
            os.kill(pid, signal.SIGKILL)
        relay.wait_until(lambda: len(set(pids(relay)) - {*first, None}) == 2, "complete again")
        relay.wait_until(lambda: bridge_of(relay).get("max_concurrent_connections") == 5, "complete again")
        on(host, test)
        relay.wait_until(lambda: bridge_of(relay)["ended"] == {"eof": 40}, "told all")
        assert [event["exit_code"] for event in relay.events("worker_ended")] == [-9, -9]
        second = pids(relay)
        relay.kill()
        assert comes_true(lambda: not any(is_running(pid) for pid in second), FAR_BEYOND_S)


def test_a_first_process_that_dies_ends_its_workers_in_good_order(host: Host) -> None:
    """They have nobody to tell any more, and let their connections finish as if they had been told to stop."""

    async def test() -> None:
        async with trio.open_nursery() as servers:
            await servers.start(trio.serve_tcp, echo, SERVER_PORT)
            async with await connect() as stream:
                await ask(stream, b"before")
                relay.kill()
                await until_refused()
                await keep_asking(stream, 1)  # in which a worker reports twice
                await ask(stream, bytes(MIB))
            servers.cancel_scope.cancel()

    with relaying(host, *PAIR, "--workers", "2", "--grace", "1m") as relay:
        workers = pids(relay)
        on(host, test)
        assert comes_true(lambda: not any(is_running(pid) for pid in workers), FAR_BEYOND_S)
        assert "internal error" not in relay.log()


def test_a_new_worker_leads_where_the_others_lead_whatever_the_file_says_by_now(host: Host, tmp_path: Path) -> None:
    """An edited file takes effect by a restart, for all bridges and all workers at once."""
    ports = (PORT, PORT + 1)
    targets = (SERVER_PORT, SERVER_PORT + 1)
    file = tmp_path / "relay.toml"

    def write(bridges: Iterable[tuple[int, int]]) -> None:
        tables = (f'[[bridge]]\nlisten = "127.0.0.1:{port}"\ntarget = "127.0.0.1:{to}"\n' for port, to in bridges)
        file.write_text("workers = 2\n" + "".join(tables))

    async def test() -> None:
        async def name(number: int, stream: Stream) -> None:
            async with stream:
                await stream.send_all(b"%d" % number)

        async with trio.open_nursery() as servers:
            for target in targets:
                await servers.start(trio.serve_tcp, partial(name, target), target)
            for port, target in [*zip(ports, targets, strict=True)] * 10:
                async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                    assert await stream.receive_some() == b"%d" % target
            servers.cancel_scope.cancel()

    write(zip(ports, targets, strict=True))
    with relaying(host, "--config", str(file)) as relay:
        on(host, test)
        write(zip(reversed(ports), reversed(targets), strict=True))
        first = pids(relay)
        for pid in first:
            os.kill(pid, signal.SIGKILL)
        relay.wait_until(lambda: len(set(pids(relay)) - {*first, None}) == 2, "complete again")
        relay.wait_until(lambda: bridge_of(relay).get("max_concurrent_connections") == 1024, "complete again")
        on(host, test)
        file.unlink()
        os.kill(pids(relay)[0], signal.SIGKILL)
        relay.wait_until(lambda: relay.status()["workers"]["replaced"] == 3, "told of its end")
        relay.wait_until(lambda: bridge_of(relay).get("max_concurrent_connections") == 1024, "complete again")
        on(host, test)


def pids(relay: Program) -> list[int]:
    found: list[int] = relay.status()["workers"]["pids"]
    return found


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
