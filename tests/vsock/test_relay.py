"""`relay` over a real AF_VSOCK, in both directions, with `splice` and without. Runs in the guest: see cli.py."""

from __future__ import annotations

import functools
import hashlib
import itertools
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from signal import SIGTERM
from typing import Any, Final

import pytest
import trio
from enlink.testing.programs import Program, in_trio, until

from tests.vsock.relays import free_tcp_port, relaying
from tests.vsock.streams import ABSENT, LOCAL, received

pytestmark = pytest.mark.vsock

BLOCK: Final = bytes(range(256)) * 1024  # 256 KiB
MUCH: Final = 256  # blocks, 64 MiB
LESS: Final = 32  # the machine is a slow one
DELAYS_S: Final = (0.0, 0.1, 2.0, 20.0)
LATE_S: Final = 0.6  # whatever is not held back has come by then
POLL_S: Final = 0.05
_vsock_ports: Final = itertools.count(7000)


@dataclass(frozen=True)
class Bridged:
    """A running relay, where its clients dial, and where its target listens."""

    relay: Program
    entrance: tuple[int, Any]
    target: trio.SocketListener
    may_splice: bool

    async def dial(self) -> trio.SocketStream:
        return await dial(self.entrance)

    async def connect(self) -> tuple[trio.SocketStream, trio.SocketStream]:
        """A client and the target's end of the same connection."""
        client = await self.dial()
        return client, await self.target.accept()

    def counters(self) -> dict[str, Any]:
        bridges: list[dict[str, Any]] = self.relay.status()["bridges"]
        return bridges[0]

    def spliced_bytes(self) -> int:
        return int(self.counters()["bytes"].get("spliced", 0))


async def dial(entrance: tuple[int, Any]) -> trio.SocketStream:
    family, address = entrance
    sock = trio.socket.socket(family)
    try:
        await sock.connect(address)
    except BaseException:
        sock.close()
        raise
    return trio.SocketStream(sock)


def listening(family: int, address: Any) -> trio.SocketListener:
    sock = socket.socket(family)
    sock.bind(address)
    sock.listen(128)
    return trio.SocketListener(trio.socket.from_stdlib_socket(sock))


@contextmanager
def bridged(*options: str, tcp_to_vsock: bool) -> Iterator[Bridged]:
    """Start a relay between a TCP and a vsock port, as on a parent instance or as in its enclave."""
    tcp, vsock = free_tcp_port(), next(_vsock_ports)
    addresses = ["--tcp-address", f"127.0.0.1:{tcp}", "--vsock-address", f"{LOCAL}:{vsock}"]
    by_tcp, by_vsock = (socket.AF_INET, ("127.0.0.1", tcp)), (socket.AF_VSOCK, (LOCAL, vsock))
    entrance, target = (by_tcp, by_vsock) if tcp_to_vsock else (by_vsock, by_tcp)
    direction = ["--tcp-to-vsock"] if tcp_to_vsock else []
    listener = listening(*target)
    with listener.socket, relaying(*addresses, *direction, *options) as relay:
        yield Bridged(relay, entrance, listener, "--no-splice" not in options)


@pytest.fixture(scope="module", params=["tcp-to-vsock", "vsock-to-tcp"])
def tcp_to_vsock(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "tcp-to-vsock")


@pytest.fixture(scope="module", params=["splice", "copy"])
def bridge(request: pytest.FixtureRequest, tcp_to_vsock: bool) -> Iterator[Bridged]:
    options = {"splice": [], "copy": ["--no-splice"]}[request.param]
    with bridged(*options, tcp_to_vsock=tcp_to_vsock) as made:
        yield made


async def send_blocks(stream: trio.SocketStream, count: int) -> None:
    for _ in range(count):
        await stream.send_all(BLOCK)
    await stream.send_eof()


async def digest_received(stream: trio.SocketStream) -> str:
    hashed = hashlib.sha256()
    async for piece in stream:
        hashed.update(piece)
    return hashed.hexdigest()


@functools.cache
def digest_of_blocks(count: int) -> str:
    hashed = hashlib.sha256()
    for _ in range(count):
        hashed.update(BLOCK)
    return hashed.hexdigest()


@in_trio
async def test_every_byte_arrives_whoever_finishes_first_and_however_late_the_answer(bridge: Bridged) -> None:
    """{client, target} finishes first × answer after {0, 0.1, 2, 20 s}, all at once: each learns of the other's end."""

    async def converse(asking: trio.SocketStream, answering: trio.SocketStream, delay_s: float) -> None:
        async with asking, answering:
            await asking.send_all(b"request")
            await asking.send_eof()
            assert await received(answering) == b"request"
            await trio.sleep(delay_s)
            await answering.send_all(BLOCK)
            await answering.send_eof()
            assert await received(asking) == BLOCK

    async with trio.open_nursery() as nursery:
        for first, delay_s in itertools.product(("client", "target"), DELAYS_S):
            client, target = await bridge.connect()
            ends = (client, target) if first == "client" else (target, client)
            nursery.start_soon(converse, *ends, delay_s)


@in_trio
async def test_64_megabytes_arrive_as_they_were_sent(bridge: Bridged) -> None:
    """From the client to the target; through pipes in the kernel unless that is switched off."""
    before = bridge.spliced_bytes()
    client, target = await bridge.connect()
    async with client, target, trio.open_nursery() as nursery:
        nursery.start_soon(send_blocks, client, MUCH)
        assert await digest_received(target) == digest_of_blocks(MUCH)
        await target.send_eof()
        assert await received(client) == b""
    await until(lambda: bridge.counters()["active"] == 0)
    spliced = bridge.spliced_bytes() - before
    assert spliced > len(BLOCK) if bridge.may_splice else spliced == 0


@in_trio
async def test_what_the_target_sends_arrives_too(bridge: Bridged) -> None:
    """The other way, after the client has ended its side."""
    client, target = await bridge.connect()
    async with client, target, trio.open_nursery() as nursery:
        await client.send_eof()
        nursery.start_soon(send_blocks, target, LESS)
        assert await digest_received(client) == digest_of_blocks(LESS)


@in_trio
async def test_a_connection_keeps_its_peers_name_after_the_end(bridge: Bridged) -> None:
    """The kernel forgets a vsock peer's name when this side shuts down: the log has it nevertheless."""
    client, target = await bridge.connect()
    port = client.socket.getsockname()[1]
    async with client, target:
        await target.send_eof()
        assert await received(client) == b""

    def is_told() -> bool:
        return any(str(port) in event["peer"] for event in bridge.relay.events("connection_ended"))

    await until(is_told)


@in_trio
async def test_a_client_whose_target_cannot_be_reached_is_let_go() -> None:
    """A TCP client by a reset, a vsock client by an end, which is all that vsock can tell; the log says why."""
    ports, entrance, absent = [free_tcp_port() for _ in range(2)], next(_vsock_ports), next(_vsock_ports)
    with relaying(
        *("--listen", f"127.0.0.1:{ports[0]}", "--target", f"vsock://{LOCAL}:{absent}"),
        *("--listen", f"127.0.0.1:{ports[1]}", "--target", f"vsock://{ABSENT}:{absent}"),
        *("--listen", f"vsock://:{entrance}", "--target", f"127.0.0.1:{free_tcp_port()}"),
    ) as relay:
        for port in ports:
            # The reset may come before the client has noticed that it is connected.
            with pytest.raises((trio.BrokenResourceError, ConnectionResetError)):
                async with await dial((socket.AF_INET, ("127.0.0.1", port))) as client:
                    await client.receive_some()
        async with await dial((socket.AF_VSOCK, (LOCAL, entrance))) as client:
            assert await client.receive_some() == b""
        # A line may come a moment after what it tells of.
        await until(lambda: len(relay.events("target_unreachable")) == 3)
        reasons = [event["error"] for event in relay.events("target_unreachable")]
        wanted = ["nobody listens there", "no vsock transport leads to that cid", "Connection refused"]
        assert all(part in reason for part, reason in zip(wanted, reasons, strict=True)), reasons


@in_trio
async def test_the_limit_holds_and_the_rest_wait_in_the_backlog() -> None:
    """Three clients of a relay for two: the third is served when one of the others has gone, and has lost nothing."""
    with bridged("--max-concurrent-connections", "2", tcp_to_vsock=False) as bridge:
        first, second, third = [await bridge.dial() for _ in range(3)]
        async with first, second, third:
            # Two are dialled for at the same time: which of them is served first is not said.
            for client, name in ((first, b"first"), (second, b"second"), (third, b"patient")):
                await client.send_all(name)
            targets = [await bridge.target.accept() for _ in range(2)]
            by_name = {bytes(await target.receive_some()): target for target in targets}
            async with by_name[b"first"] as served, by_name[b"second"]:
                assert bridge.counters()["active"] == 2
                with trio.move_on_after(LATE_S):
                    await bridge.target.accept()
                    pytest.fail("the limit is two")
                await first.aclose()
                assert await received(served) == b""
                await served.aclose()
                async with await bridge.target.accept() as late:
                    assert await late.receive_some() == b"patient"


async def dial_for_ever(bridge: Bridged) -> None:
    while True:
        await (await bridge.dial()).aclose()
        await trio.sleep(POLL_S)


@in_trio
async def test_a_relay_that_is_told_to_stop_lets_connections_finish() -> None:
    """Whoever comes is reset at once; who is there already finishes; then it ends, well."""
    with bridged(tcp_to_vsock=False) as bridge:
        client, target = await bridge.connect()
        async with client, target:
            bridge.relay.signal(SIGTERM)

            with pytest.raises(ConnectionResetError):
                await dial_for_ever(bridge)
            # Those who came before the relay had heard of it are gone again, and so is their target.
            await bridge.target.aclose()
            await client.send_all(BLOCK)
            await client.send_eof()
            assert await received(target) == BLOCK
            await target.send_all(BLOCK)
            await target.send_eof()
            assert await received(client) == BLOCK
        assert await trio.to_thread.run_sync(bridge.relay.wait) == 0
        assert not bridge.relay.events("grace_over")


@in_trio
async def test_connections_that_do_not_finish_end_with_the_grace() -> None:
    """Both peers see the end, and the relay ends well."""
    with bridged("--grace", "1s", tcp_to_vsock=True) as bridge:
        client, target = await bridge.connect()
        async with client, target:
            bridge.relay.signal(SIGTERM)
            assert await target.receive_some() == b""
            with pytest.raises(trio.BrokenResourceError):
                await client.receive_some()
        assert await trio.to_thread.run_sync(bridge.relay.wait) == 0
