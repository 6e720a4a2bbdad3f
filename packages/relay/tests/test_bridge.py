"""A bridge goes on accepting whatever accepting, dialling and its connections come to."""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import dns.message
import dns.rdatatype
import dns.rrset
import pytest
import trio
from enlink.endpoint import Tcp, Unix
from enlink.errors import ConfigError
from enlink.supervise import Stopping
from enlink.testing.hosts import Network
from enlink.testing.programs import in_trio, until
from relay.allowlist import parse_rule
from relay.bridge import Bridge
from relay.config import BridgeConfig, RelayConfig
from relay.resolver import open_resolver
from relay.service import Relay, open_relay


class Faulty(socket.socket):
    """A listening socket whose accept(2) fails now and then."""

    failures: list[int]
    accepted: list[socket.socket]

    def accept(self) -> tuple[socket.socket, Any]:
        if self.failures:
            number = self.failures.pop()
            raise OSError(number, os.strerror(number))
        connection, peer = super().accept()
        self.accepted.append(connection)
        return connection, peer


@pytest.fixture
def listener() -> Iterator[Faulty]:
    with Faulty() as listener:
        listener.failures, listener.accepted = [], []
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.setblocking(False)
        yield listener


@pytest.fixture
def server() -> Iterator[socket.socket]:
    """Where bridges lead to."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield server


@asynccontextmanager
async def relaying(listener: socket.socket, server: socket.socket, **settings: Any) -> AsyncIterator[Relay]:
    settings.setdefault("target", Tcp(*server.getsockname()))
    bridge = BridgeConfig(listen=Tcp(*listener.getsockname()), **settings)
    stopping = Stopping()
    async with open_relay(RelayConfig(bridges=(bridge,), grace_s=0)) as relay, trio.open_nursery() as nursery:
        nursery.start_soon(relay.run, [[listener]], stopping)
        yield relay
        stopping.set("the test is over")


def bridge_of(relay: Relay) -> dict[str, Any]:
    bridges: Any = relay.snapshot()["bridges"]
    bridge: dict[str, Any] = bridges[0]
    return bridge


async def exchange(listener: socket.socket, server: socket.socket) -> None:
    """Open a connection, and pass a byte through it and one back."""
    async with await trio.open_tcp_stream(*listener.getsockname()) as client:
        await client.send_all(b"x")
        accepted, _ = await trio.socket.from_stdlib_socket(server).accept()
        with accepted:
            assert await accepted.recv(1) == b"x"
            await accepted.send(b"y")
            assert await client.receive_some(1) == b"y"


@pytest.mark.proves("F54", "F53")
@pytest.mark.parametrize(
    "failure", ["ECONNABORTED", "EPROTO", "ENOBUFS", "ENOMEM", "EMFILE", "ENFILE", "EPERM", "ENETDOWN", "EHOSTUNREACH"]
)
def test_a_failure_to_accept_costs_a_pause_and_one_line(
    listener: Faulty, server: socket.socket, failure: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async with relaying(listener, server) as relay:
            await exchange(listener, server)
            listener.failures = [getattr(errno, failure)] * 3
            began = trio.current_time()
            await exchange(listener, server)
            assert trio.current_time() - began < 8 * 1.5
            assert listener.failures == []
            assert bridge_of(relay)["connections"] == {"accept_paused": 3, "accepted": 2}

    with caplog.at_level(logging.WARNING):
        in_trio(test)()
    lines = [record for record in caplog.records if record.getMessage() == "accept_paused"]
    assert [vars(line)["fields"]["reason"] for line in lines] == [failure]


@pytest.mark.proves("F26", "D22")
def test_a_target_that_refuses_costs_its_connections_and_no_others(listener: Faulty, server: socket.socket) -> None:
    async def test() -> None:
        async with relaying(listener, server) as relay:
            address = server.getsockname()
            server.close()
            for _ in range(5):
                # The reset may come before the client has noticed that it is connected.
                with pytest.raises((trio.BrokenResourceError, OSError)):
                    async with await trio.open_tcp_stream(*listener.getsockname()) as client:
                        await client.receive_some(1)
            assert bridge_of(relay)["ended"] == {"unreachable": 5}
            with socket.create_server(address) as again:
                again.setblocking(False)
                await exchange(listener, again)
            await until(lambda: bridge_of(relay)["active"] == 0)

    in_trio(test)()


def test_a_client_that_has_gone_before_its_target_was_reached_leaves_nothing(
    listener: Faulty, server: socket.socket
) -> None:
    async def test() -> None:
        async with relaying(listener, server) as relay:
            with socket.create_connection(listener.getsockname()) as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            await until(lambda: bridge_of(relay)["ended"] == {"reset": 1})
            first, _ = server.accept()
            with first, pytest.raises(ConnectionResetError):
                first.recv(1)
            await exchange(listener, server)

    in_trio(test)()


RESET = b"\1\0\0\0\0\0\0\0"  # struct linger: close with a reset


@asynccontextmanager
async def silent(address: tuple[str, int]) -> AsyncIterator[Tcp]:
    """A target whose backlog is full, so that dialling it goes on and on; when the block ends, it refuses."""
    with socket.create_server(address, backlog=0) as dead, socket.create_connection(dead.getsockname()):
        yield Tcp(*dead.getsockname())


@pytest.mark.parametrize("said", [b"", b"hello"])
def test_a_client_that_resets_while_its_target_is_dialled_gives_its_place_back(listener: Faulty, said: bytes) -> None:
    """Whatever it has said before; and one that has only finished talking keeps its place."""

    async def test() -> None:
        async with (
            silent(("127.0.0.1", 0)) as dead,
            relaying(listener, listener, target=dead, max_connections=1, connect_timeout_s=1000.0) as relay,
        ):
            with socket.create_connection(listener.getsockname()) as client:
                client.sendall(said)
                await until(lambda: bridge_of(relay)["active"] == 1)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            await until(lambda: bridge_of(relay)["active"] == 0)
            assert bridge_of(relay)["ended"] == {"reset": 1}
            with socket.create_connection(listener.getsockname()) as client:
                client.sendall(said)
                client.shutdown(socket.SHUT_WR)
                await until(lambda: bridge_of(relay)["active"] == 1)
                assert not await comes_true_soon(lambda: bridge_of(relay)["active"] == 0)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            await until(lambda: bridge_of(relay)["ended"] == {"reset": 2})

    in_trio(test)()


async def comes_true_soon(condition: Callable[[], bool]) -> bool:
    with trio.move_on_after(0.3):
        await until(condition)
        return True
    return False


def test_what_a_unix_client_has_said_before_it_closed_arrives_however_late_the_target(tmp_path: Path) -> None:
    """Its end looks like a hang-up at once, where that of a TCP client looks like the end of what it says."""

    async def test() -> None:
        front, back = (socket.socket(socket.AF_UNIX) for _ in range(2))
        with front, back:
            front.bind(str(tmp_path / "front"))
            front.listen()
            front.setblocking(False)
            back.bind(str(tmp_path / "back"))
            back.listen(0)
            with socket.socket(socket.AF_UNIX) as full:
                full.connect(str(tmp_path / "back"))
                bridge = BridgeConfig(listen=Unix(str(tmp_path / "front")), target=Unix(str(tmp_path / "back")))
                stopping = Stopping()
                async with (
                    open_relay(RelayConfig(bridges=(bridge,), grace_s=0)) as relay,
                    trio.open_nursery() as nursery,
                ):
                    nursery.start_soon(relay.run, [[front]], stopping)
                    with socket.socket(socket.AF_UNIX) as client:
                        client.connect(str(tmp_path / "front"))
                        client.sendall(b"the last words")
                    await until(lambda: bridge_of(relay)["active"] == 1)
                    assert not await comes_true_soon(lambda: bridge_of(relay)["active"] == 0)
                    back.accept()[0].close()  # makes room
                    accepted, _ = await trio.to_thread.run_sync(back.accept)
                    with accepted:
                        assert accepted.recv(100) == b"the last words"
                    stopping.set("the test is over")

    in_trio(test)()


def test_a_place_in_the_backlog_of_a_dead_target_is_left_when_the_relay_ends(listener: Faulty) -> None:
    """Also to whom a reset is no news: the client gets one."""

    async def test() -> None:
        async with silent(("127.0.0.1", 0)) as dead:
            with socket.create_connection(listener.getsockname()) as client:
                async with relaying(listener, listener, target=dead, connect_timeout_s=1000.0) as relay:
                    await until(lambda: bridge_of(relay)["active"] == 1)
                with pytest.raises(ConnectionResetError):
                    client.recv(1)

    in_trio(test)()


def is_told(relay: Relay, listen: str) -> bool:
    return bool(bridge_of(relay)["listen"] == listen)


def test_status_names_the_port_that_the_kernel_chose(listener: Faulty, server: socket.socket) -> None:
    async def test() -> None:
        port = listener.getsockname()[1]
        for asked, told in ((Tcp(None, 0), f"tcp://:{port}"), (Unix("/front"), "unix:/front")):
            bridge = BridgeConfig(listen=asked, target=Tcp(*server.getsockname()))
            stopping = Stopping()
            async with open_relay(RelayConfig(bridges=(bridge,))) as relay, trio.open_nursery() as nursery:
                nursery.start_soon(relay.run, [[listener.dup()]], stopping)
                await until(partial(is_told, relay, told))
                stopping.set("the test is over")

    in_trio(test)()


def test_what_is_told_of_a_connection_is_how_it_ended_and_what_it_carried(
    listener: Faulty, server: socket.socket, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async with relaying(listener, server) as relay:
            await exchange(listener, server)
            await until(lambda: bridge_of(relay)["active"] == 0)
            snapshot = bridge_of(relay)
            assert snapshot["bytes"] == {"from_target": 1, "spliced": 0, "to_target": 1}
            assert snapshot["ended"] == {"eof": 1}

    with caplog.at_level(logging.DEBUG, Bridge.__module__):
        in_trio(test)()
    (line,) = [record for record in caplog.records if record.getMessage() == "connection_ended"]
    assert vars(line)["fields"]["how"] == "eof"


def test_what_is_accepted_has_the_listeners_options(listener: Faulty, server: socket.socket) -> None:
    """They are set once, and not for each connection: the kernel hands them on."""

    async def test() -> None:
        async with relaying(listener, server), await trio.open_tcp_stream(*listener.getsockname()):
            await until(lambda: bool(listener.accepted))
            for level, option, value in (
                (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
                (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60),
                (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
                (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 6),
                (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
            ):
                assert listener.accepted[0].getsockopt(level, option) == value

    in_trio(test)()


def test_rules_that_can_never_allow_the_target_are_told_at_the_start() -> None:
    async def test() -> None:
        rules = (parse_rule("127.0.0.1:81"),)
        bridge = BridgeConfig(listen=Unix("/front"), target=Tcp("127.0.0.1", 80), allow=rules)
        with pytest.raises(ConfigError, match="no --allow lets unix:/front reach its target"):
            async with open_relay(RelayConfig(bridges=(bridge,))):
                pass

    in_trio(test)()


class NameServer:
    """Answers every question for an IPv4 address with one and the same, which is good for no time."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.sock = trio.socket.socket(type=socket.SOCK_DGRAM)

    async def serve(self) -> None:
        with self.sock:
            while True:
                wire, peer = await self.sock.recvfrom(4096)
                query = dns.message.from_wire(wire)
                response = dns.message.make_response(query)
                (question,) = query.question
                if question.rdtype == dns.rdatatype.A:
                    response.answer.append(dns.rrset.from_text(question.name, 0, "IN", "A", self.address))
                await self.sock.sendto(response.to_wire(), peer)


@pytest.mark.proves("D23", "F29")
@pytest.mark.parametrize("address", ["169.254.169.254", "127.0.0.1", "10.0.0.1"])
def test_a_name_that_turns_to_another_address_is_refused_and_the_connections_it_has_go_on(
    address: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """From a real name server, through real look-ups, to a client that is told by a reset."""
    public = "93.184.215.14"  # on a host of this test's own
    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.1\n")

    async def test() -> None:
        names = NameServer(public)
        await names.sock.bind(("127.0.0.1", 0))
        port = names.sock.getsockname()[1]
        resolver = partial(open_resolver, resolv_conf=tmp_path / "resolv.conf", hosts=tmp_path / "hosts", dns_port=port)
        monkeypatch.setattr("relay.service.open_resolver", resolver)
        listener, server = socket.create_server(("127.0.0.1", 0)), socket.create_server((public, 0))
        for sock in (listener, server):
            sock.setblocking(False)
        target = Tcp("server.example", server.getsockname()[1])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(names.serve)
            async with (
                relaying(listener, server, target=target) as relay,
                await trio.open_tcp_stream(*listener.getsockname()) as old,
            ):
                accepted, _ = await trio.socket.from_stdlib_socket(server).accept()
                with server, accepted:
                    names.address = address
                    while "rebind" not in bridge_of(relay)["ended"]:  # as long as the answer is good
                        with suppress(OSError, trio.BrokenResourceError):
                            async with await trio.open_tcp_stream(*listener.getsockname()) as client:
                                with trio.move_on_after(0.1):
                                    await client.receive_some(1)
                    await accepted.send(b"still here")
                    assert await old.receive_some(100) == b"still here"
            nursery.cancel_scope.cancel()

    with Network() as network:
        host = network.host("names")
        host.run("ip", "address", "add", f"{public}/32", "dev", "lo")
        with host.entered():
            in_trio(test)()
