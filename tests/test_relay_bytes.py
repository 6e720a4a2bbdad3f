"""A relay between programs: every byte arrives, whoever finishes first and however late the answer; and so do ends."""

from __future__ import annotations

import hashlib
import json
import random
import socket
import subprocess
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import pytest
import trio
from enlink.testing.hosts import Host, Network
from enlink.testing.programs import FAR_BEYOND_S, Program, in_trio, started, until

BYTES = random.Random(3).randbytes(300_000)
DIGEST = hashlib.sha256(BYTES).hexdigest()
DELAYS_S = (0, 0.1, 2, 20)
Stream = trio.SocketStream


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Network() as network:
        yield network.host("relay")


@pytest.fixture
def directory() -> Iterator[Path]:
    """A place for sockets, whose names may not be long."""
    with tempfile.TemporaryDirectory(prefix="eng-") as path:
        yield Path(path)


@contextmanager
def relaying(host: Host, *options: str) -> Iterator[Program]:
    with started(host, "relay", *options) as relay:
        relay.wait_until_ready()
        yield relay


def on(host: Host, test: Callable[[], Awaitable[None]]) -> None:
    """Run the test's own ends on that host."""
    with host.entered():
        in_trio(test)()


async def to_end(stream: Stream) -> bytes:
    data = bytearray()
    while some := await stream.receive_some():
        data += some
    return bytes(data)


async def line_of(stream: Stream) -> bytes:
    """Read a line, and nothing behind it."""
    line = b""
    while not line.endswith(b"\n"):
        some = await stream.receive_some(1)
        assert some, f"ended after {line!r}"
        line += some
    return line


async def serve_unix(nursery: trio.Nursery, path: Path, handler: Callable[[Stream], Awaitable[None]]) -> None:
    sock = trio.socket.socket(socket.AF_UNIX)
    await sock.bind(str(path))
    sock.listen()
    await nursery.start(trio.serve_listeners, handler, [trio.SocketListener(sock)])


class Conversations:
    """Both ends of conversations in which one side finishes first, and the other answers after a while."""

    def __init__(self) -> None:
        self.heard: dict[str, str] = {}

    async def until_heard(self, count: int) -> None:
        """Wait until so many have been heard to their end."""
        while True:
            if len(self.heard) == count:
                return
            await trio.sleep(0.01)

    async def serve(self, stream: Stream) -> None:
        plan = json.loads(await line_of(stream))
        async with stream:
            if plan["first"] == "client":
                self.heard[plan["name"]] = hashlib.sha256(await to_end(stream)).hexdigest()
                await trio.sleep(plan["delay_s"])
                await stream.send_all(BYTES)
            else:
                await stream.send_all(BYTES)
                await stream.send_eof()
                self.heard[plan["name"]] = hashlib.sha256(await to_end(stream)).hexdigest()

    async def serve_guest(self, stream: Stream) -> None:
        """As `serve`, behind the socket that Firecracker keeps for a guest."""
        assert await line_of(stream) == b"CONNECT 53\n"
        await stream.send_all(b"OK 1073741824\n")
        await self.serve(stream)

    async def talk(self, stream: Stream, name: str, first: str, delay_s: float) -> None:
        async with stream:
            plan = {"name": name, "first": first, "delay_s": delay_s}
            await stream.send_all(json.dumps(plan).encode() + b"\n")
            if first == "client":
                await stream.send_all(BYTES)
                await stream.send_eof()
                assert hashlib.sha256(await to_end(stream)).hexdigest() == DIGEST, name
            else:
                assert hashlib.sha256(await to_end(stream)).hexdigest() == DIGEST, name
                await trio.sleep(delay_s)
                await stream.send_all(BYTES)
                await stream.send_eof()
                assert await to_end(stream) == b""


@pytest.mark.proves("F17")
def test_every_byte_arrives_whoever_finishes_first_and_however_late_the_answer(host: Host, directory: Path) -> None:
    """{client, server} finishes first × answer after {0, 0.1, 2, 20 s}, on every kind of socket, all at once."""
    mock = ("--mock-vsock", "--vsock-address", "127.0.0.1:7002")
    conversations = Conversations()

    async def test() -> None:
        places: dict[str, int | Path] = {
            "mock vsock": 7001,
            "unix to tcp": directory / "front",
            "tcp to unix": 7003,
            "hybrid vsock": directory / "vm.sock_52",
        }

        async def talk(kind: str, first: str, delay_s: float) -> None:
            place = places[kind]
            if isinstance(place, int):
                stream = await trio.open_tcp_stream("127.0.0.1", place)
            else:
                stream = await trio.open_unix_socket(place)
            await conversations.talk(stream, f"{kind}, {first}, {delay_s}", first, delay_s)

        async with trio.open_nursery() as servers:
            await servers.start(trio.serve_tcp, conversations.serve, 9001)
            await serve_unix(servers, directory / "back", conversations.serve)
            await serve_unix(servers, directory / "guest.sock", conversations.serve_guest)
            async with trio.open_nursery() as clients:
                for case in product(places, ("client", "server"), DELAYS_S):
                    clients.start_soon(talk, *case)
            # A client that finishes last is done before its server has heard it all.
            await conversations.until_heard(4 * 2 * len(DELAYS_S))
            servers.cancel_scope.cancel()

    pairs = {
        f"unix:{directory}/front": "127.0.0.1:9001",
        "127.0.0.1:7003": f"unix:{directory}/back",
        f"unix-vsock:{directory}/vm.sock:52": f"unix-vsock:{directory}/guest.sock:53",
    }
    general = [word for listen, target in pairs.items() for word in ("--listen", listen, "--target", target)]
    with (
        relaying(host, *mock, "--tcp-address", "127.0.0.1:9001") as inner,
        relaying(host, *mock, "--tcp-address", "127.0.0.1:7001", "--tcp-to-vsock") as outer,
        relaying(host, *general) as others,
    ):
        on(host, test)
        assert conversations.heard == dict.fromkeys(conversations.heard, DIGEST)
        for relay in (inner, outer, others):
            assert all(bridge["ended"] == {"eof": 8} for bridge in relay.status()["bridges"])
            assert relay.stop() == 0


def test_the_local_check_works_as_it_is_written(host: Host) -> None:
    """A server on 9443, and between it and a client at 7443 what stands for a parent instance and its enclave."""
    enclave = "--mock-vsock --tcp-address 127.0.0.1:9443 --vsock-address 127.0.0.1:8443"
    parent = "--mock-vsock --tcp-address 127.0.0.1:7443 --vsock-address 127.0.0.1:8443 --tcp-to-vsock"

    async def test() -> None:
        async def serve(stream: Stream) -> None:
            async with stream:
                await stream.send_all(await to_end(stream))

        async with trio.open_nursery() as servers:
            await servers.start(trio.serve_tcp, serve, 9443)
            async with await trio.open_tcp_stream("127.0.0.1", 7443) as client:
                await client.send_all(BYTES)
                await client.send_eof()
                assert await to_end(client) == BYTES
            servers.cancel_scope.cancel()

    with relaying(host, *enclave.split()), relaying(host, *parent.split()):
        on(host, test)


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("copies", [(), ("--no-splice",)], ids=["splice", "copy"])
def test_many_megabytes_arrive_whole_in_both_directions(host: Host, workers: str, copies: tuple[str, ...]) -> None:
    megabyte = random.Random(4).randbytes(1 << 20)

    async def test() -> None:
        digests: list[str] = []

        async def talk(stream: Stream) -> None:
            digest = hashlib.sha256()

            async def read() -> None:
                while some := await stream.receive_some():
                    digest.update(some)

            async with stream, trio.open_nursery() as nursery:
                nursery.start_soon(read)
                for _ in range(64):
                    await stream.send_all(megabyte)
                await stream.send_eof()
            digests.append(digest.hexdigest())

        async with trio.open_nursery() as servers:
            await servers.start(trio.serve_tcp, talk, 9002)
            await talk(await trio.open_tcp_stream("127.0.0.1", 7004))
            await until(lambda: len(digests) == 2)
            servers.cancel_scope.cancel()
        assert digests == [hashlib.sha256(megabyte * 64).hexdigest()] * 2

    options = ("--listen", "127.0.0.1:7004", "--target", "127.0.0.1:9002", "--workers", workers, *copies)
    with relaying(host, *options) as relay:
        on(host, test)
        relay.wait_until(lambda: relay.status()["bridges"][0]["ended"] == {"eof": 1}, "at the end")
        carried: dict[str, int] = relay.status()["bridges"][0]["bytes"]
        assert carried["to_target"] == carried["from_target"] == 64 << 20
        assert (carried["spliced"] > 64 << 20) is not bool(copies)
        assert relay.stop() == 0


@pytest.mark.proves("F18")
@pytest.mark.parametrize("who", ["client", "server"])
def test_a_reset_of_one_side_is_one_on_the_other(host: Host, who: str) -> None:
    async def test() -> None:
        send, receive = trio.open_memory_channel[Stream](1)

        async def serve(stream: Stream) -> None:
            await send.send(stream)
            await trio.sleep_forever()

        async with trio.open_nursery() as servers:
            await servers.start(trio.serve_tcp, serve, 9003)
            client = await trio.open_tcp_stream("127.0.0.1", 7005)
            await client.send_all(b"x")
            server = await receive.receive()
            assert await server.receive_some() == b"x"
            torn, other = (client, server) if who == "client" else (server, client)
            torn.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            torn.socket.close()
            async with other:
                with pytest.raises(trio.BrokenResourceError):
                    await other.receive_some()
            servers.cancel_scope.cancel()

    with relaying(host, "--listen", "127.0.0.1:7005", "--target", "127.0.0.1:9003") as relay:
        on(host, test)
        assert relay.status()["bridges"][0]["ended"] == {"reset": 1}


def test_socat_is_a_peer_like_any_other_in_front_of_a_relay_and_behind_it(host: Host, directory: Path) -> None:
    """It waits for the late answer as long as it is told to."""
    late = f"SYSTEM:sha256sum; sleep 1; cat {directory}/answer"
    (directory / "answer").write_bytes(BYTES)

    def socat(*words: str) -> subprocess.Popen[bytes]:
        argv = host.argv(["socat", "-t30", *words])
        return subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    options = ["--listen", "TCP-LISTEN:7006,fork,reuseaddr", "--target", f"UNIX-CONNECT:{directory}/server"]
    with relaying(host, *options):
        server = socat(f"UNIX-LISTEN:{directory}/server,fork", late)
        client = None
        try:
            while not (directory / "server").exists():
                assert server.poll() is None
            client = socat("-", "TCP:127.0.0.1:7006")
            answer, complaint = client.communicate(BYTES, timeout=FAR_BEYOND_S)
            assert (answer, complaint) == (f"{DIGEST}  -\n".encode() + BYTES, b"")
        finally:
            for process in (server, client):
                if process is not None:
                    process.kill()
                    process.communicate()
