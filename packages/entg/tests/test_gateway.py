"""Whole gateways, as real processes on a host of their own: traffic, peers that come and go, and orderly ends."""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import termios
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from ipaddress import IPv4Interface
from typing import Literal

import pytest
import trio
from enlink.control import Close, Hello, Keepalive, Role
from enlink.frame import encode_control, encode_packets
from enlink.testing.hosts import Host
from enlink.testing.peers import Peer, connect, ip_packet, ip_packets, listening
from enlink.testing.programs import Program, in_trio, started, until
from enlink.testing.streams import reset

ALICE, FAR = "192.168.0.1", "192.168.0.254"
REQUEST, REPLY = ip_packet(ALICE, FAR, b"request"), ip_packet(FAR, ALICE, b"reply")
AGENT = Hello(Role.CLIENT_AGENT, tun=(IPv4Interface(f"{ALICE}/24"),))
SERVER = Hello(Role.SERVER_AGENT, tun=(IPv4Interface(f"{FAR}/24"),))
GATEWAY = Hello(Role.GATEWAY)

Speech = Literal["raw", "eng"]


async def connect_as(host: Host, leg: Literal["enta", "entg"], speech: Speech) -> Peer:
    """Connect and say a first word that gets the place."""
    peer = await connect(host, 6980 if leg == "enta" else 6979)
    if speech == "eng":
        await peer.greet(AGENT if leg == "enta" else GATEWAY)
    else:
        await peer.send(REQUEST if leg == "enta" else REPLY)
    return peer


async def until_connected(gateway: Program, *legs: str) -> None:
    await until(lambda: all(gateway.status()["legs"][leg]["connected"] for leg in legs or ("enta", "entg")))


async def until_heard(peer: Peer, *, is_open: bool) -> None:
    """Wait until a peer is told that the path is open, or that it is closed."""
    while await peer.hear_path() is not is_open:
        pass


async def exchange(
    one: Peer, other: Peer, *, size_bytes: int = 5_000_000, first: tuple[list[bytes], list[bytes]]
) -> None:
    """Send packets of all sizes both ways at once, and compare what arrives, byte for byte and in order."""
    there = ip_packets(ALICE, FAR, size_bytes=size_bytes, seed=1)
    back = ip_packets(FAR, ALICE, size_bytes=size_bytes, seed=2, payload_bytes=(1, 3000))
    expected_there, expected_back = first[0] + there, first[1] + back
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.send, *there)
        nursery.start_soon(other.send, *back)

        async def compare(peer: Peer, expected: list[bytes]) -> None:
            assert await peer.hear_packets(len(expected)) == expected

        nursery.start_soon(compare, other, expected_there)
        nursery.start_soon(compare, one, expected_back)


@contextmanager
def black_hole(host: Host, port: int) -> Iterator[None]:
    """Lose every packet from and to a port of the host, and tell nobody."""
    rules = "".join(f" tcp {end} {port} drop;" for end in ("sport", "dport"))
    host.run("nft", "-f", "-", input=f"table inet hole {{ chain in {{ type filter hook input priority 0;{rules} }}; }}")
    try:
        yield
    finally:
        host.run("nft", "delete", "table", "inet", "hole")


def unacknowledged_bytes(stream: trio.SocketStream) -> int:
    """How much of what was sent the other kernel has yet to take."""
    (unacknowledged,) = struct.unpack("i", fcntl.ioctl(stream.socket.fileno(), termios.TIOCOUTQ, bytes(4)))
    return int(unacknowledged)


# Traffic.


@pytest.mark.parametrize("agent_speech", ["raw", "eng"])
@pytest.mark.parametrize("peer_speech", ["raw", "eng"])
@in_trio
async def test_whole_frames_go_both_ways_unchanged_and_in_order_whoever_is_connected(
    gateway: Program, host: Host, agent_speech: Speech, peer_speech: Speech
) -> None:
    async with await connect_as(host, "entg", peer_speech) as peer:
        await until_connected(gateway, "entg")
        async with await connect_as(host, "enta", agent_speech) as agent:
            await until_connected(gateway)
            # A raw peer's first word is a packet; the gateway's peer says it when there is nobody to hear it yet.
            await exchange(agent, peer, first=([REQUEST] if agent_speech == "raw" else [], []))
            status = gateway.status()
            assert status["counters"]["from_enta_dropped"] == status["counters"]["from_entg_dropped"] == {}
            assert status["counters"]["from_enta"] == status["counters"]["to_entg"]
            assert {leg["peer"] == "raw peer" for leg in status["legs"].values()} == {
                speech == "raw" for speech in (agent_speech, peer_speech)
            }


@in_trio
async def test_a_gateway_that_dials_greets_and_forwards_just_so(host: Host) -> None:
    async with listening(host, 7979) as accept:
        with started(host, "entg", "--entg-connect", "127.0.0.1:7979") as gateway:
            async with await accept() as peer, await connect_as(host, "enta", "eng") as agent:
                assert await peer.hear() == GATEWAY
                await peer.say(GATEWAY)
                await until_connected(gateway)
                await exchange(agent, peer, first=([], []))


@in_trio
async def test_with_wire_original_a_gateway_that_dials_and_one_that_listens_say_nothing_but_packets(host: Host) -> None:
    with (
        started(host, "entg", "--wire", "original") as listens,
        started(
            host, "entg", "--wire", "original", "--entg-connect", "127.0.0.1:6979", "--enta-listen", "7980"
        ) as dials,
    ):
        listens.wait_until_ready()
        await until(lambda: listens.status()["legs"]["entg"]["state"] == "silent")
        await until(lambda: dials.status()["legs"]["entg"]["state"] == "silent")
        async with await connect(host, 7980) as agent, await connect(host, 6980) as server:
            await until(lambda: listens.status()["legs"]["enta"]["state"] == "silent")
            await exchange(agent, server, first=([], []))


@in_trio
async def test_frames_cut_into_single_bytes_arrive_whole(gateway: Program, host: Host) -> None:
    async with await connect_as(host, "entg", "eng") as peer, await connect_as(host, "enta", "eng") as agent:
        await until_connected(gateway)
        assert isinstance(agent.stream, trio.SocketStream)
        agent.stream.setsockopt(trio.socket.IPPROTO_TCP, trio.socket.TCP_NODELAY, 1)
        packets = ip_packets(ALICE, FAR, size_bytes=3000, payload_bytes=(1, 300))
        for byte in b"".join(len(packet).to_bytes(4, "big") + packet for packet in packets):
            await agent.stream.send_all(bytes((byte,)))
        assert await peer.hear_packets(len(packets)) == packets


@pytest.mark.proves("F17")
@in_trio
async def test_a_raw_peer_that_shut_down_its_sending_side_gets_the_reply_of_two_seconds_later(
    gateway: Program, host: Host
) -> None:
    replies = ip_packets(FAR, ALICE, size_bytes=2_000_000)
    async with await connect_as(host, "entg", "eng") as peer:
        await until_connected(gateway, "entg")
        async with await connect_as(host, "enta", "raw") as agent:
            await agent.stream.send_eof()
            assert await peer.hear_packets(1) == [REQUEST]
            await until(lambda: gateway.status()["legs"]["enta"]["state"] == "half_closed")
            await trio.sleep(2)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(peer.send, *replies)
                assert await agent.hear_packets(len(replies)) == replies


# Peers that come and go.


@pytest.mark.proves("D20", "F52")
@in_trio
async def test_a_thousand_port_scanners_take_neither_the_place_nor_anything_else_for_long(
    gateway: Program, host: Host
) -> None:
    async with await connect_as(host, "entg", "eng") as peer, await connect_as(host, "enta", "eng") as agent:
        await until_connected(gateway)
        await exchange(agent, peer, size_bytes=1_000_000, first=([], []))
        descriptors, resident_bytes = gateway.descriptors, gateway.resident_bytes
        hello = b"\0\0\0\x18\0\x01"
        scanners = []
        for number in range(1000):
            scanner = await connect(host, 6980 if number % 2 else 6979)
            match number % 4:
                case 0:
                    await scanner.stream.aclose()
                case 1:
                    await scanner.stream.send_all(b"\0")
                case 2:
                    await scanner.stream.send_all(hello)
            scanners.append(scanner)
            if number % 100 == 0:
                await agent.send(REQUEST)
                assert await peer.hear_packets(1) == [REQUEST]
        # Those that are being turned away come on top of the 200 on each leg; without a limit it would be 750.
        assert gateway.descriptors - descriptors < 700
        await agent.say(Keepalive())
        await peer.say(Keepalive())
        await exchange(agent, peer, size_bytes=1_000_000, first=([], []))
        for scanner in scanners:
            await trio.aclose_forcefully(scanner.stream)
        await until(lambda: gateway.descriptors <= descriptors)
        # Five hundred at once take about 16 KiB each, which the allocator keeps for the next.
        assert gateway.resident_bytes - resident_bytes < 16 << 20
        # However many there are, they are worth a line a second.
        assert len(gateway.log().splitlines()) < 200


@pytest.mark.proves("F30")
@in_trio
async def test_an_agent_whose_link_is_a_black_hole_has_its_place_again_as_soon_as_it_is_back(
    gateway: Program, host: Host
) -> None:
    async with await connect_as(host, "entg", "eng") as peer, await connect_as(host, "enta", "eng") as lost:
        await until_connected(gateway)
        assert isinstance(lost.stream, trio.SocketStream)
        _, port = lost.stream.socket.getsockname()
        await until_heard(lost, is_open=True)
        with black_hole(host, port):
            async with await connect_as(host, "enta", "eng") as agent:
                await peer.send(REPLY)
                assert await agent.hear_packets(1) == [REPLY]
                await until(lambda: gateway.events("disconnected"))
                with pytest.raises(BlockingIOError):
                    os.read(lost.stream.socket.fileno(), 1)


@pytest.mark.proves("F09", "G9")
@in_trio
async def test_a_gateway_that_is_killed_and_comes_back_is_dialled_again_at_once(host: Host) -> None:
    times_s: list[float] = []
    with started(host, "entg", "--entg-connect", "127.0.0.1:6979", "--enta-listen", "7980") as dials:
        await until(partial(dials.events, "unreachable"))
        async with await connect(host, 7980) as agent:
            await agent.greet(AGENT)
            for _ in range(3):
                with started(host, "entg") as listens:
                    listens.wait_until_ready()
                    began_s = time.monotonic()
                    await until_connected(dials)
                    times_s.append(time.monotonic() - began_s)
                    async with await connect_as(host, "enta", "eng") as server:
                        await agent.say(Keepalive())
                        await exchange(agent, server, size_bytes=1_000_000, first=([], []))
                    listens.kill()
                await until(lambda: dials.status()["legs"]["entg"]["problem"])
        assert dials.status()["counters"]["entg_ended"] == {"truncated": 3}
        await until(lambda: len(dials.events("unreachable")) >= 4)
        assert len(dials.events("unreachable")) == 4  # before the first came, and after each had gone
    assert max(times_s) < 8 * 0.3, times_s


NEAR = ("entg", "--entg-connect", "127.0.0.1:6979", "--enta-listen", "7980")  # a gateway before the one that listens


def path(gateway: Program, leg: str) -> str:
    return str(gateway.status()["legs"][leg]["path"])


def is_closed(gateway: Program, leg: str) -> bool:
    return path(gateway, leg) == "closed"


@pytest.mark.proves("F09")
@in_trio
async def test_an_agent_hears_each_time_when_the_agent_at_the_far_end_goes_or_comes_back(
    gateway: Program, host: Host
) -> None:
    with started(host, *NEAR) as near:
        near.wait_until_ready()
        await until_connected(near, "entg")
        await until(partial(is_closed, near, "entg"))
        async with await connect(host, 7980) as agent:
            await agent.greet(AGENT)
            assert await agent.hear_path() is False
            for last_words in (encode_control(Close("done")), b"", b"\xff\xff\xff\xff", None):
                async with await connect(host, 6980) as server:
                    await server.greet(SERVER)
                    await until_heard(server, is_open=True)
                    assert await agent.hear_path() is True
                    assert (path(near, "entg"), path(gateway, "enta")) == ("open", "open")
                    await exchange(agent, server, size_bytes=100_000, first=([], []))
                    assert isinstance(server.stream, trio.SocketStream)
                    if last_words is None:
                        reset(server.stream)
                    else:
                        await server.stream.send_all(last_words)
                await agent.say(Keepalive())
                assert await agent.hear_path() is False
                assert (path(near, "entg"), path(gateway, "enta")) == ("closed", "closed")


@pytest.mark.proves("F09")
@in_trio
async def test_an_agent_hears_when_the_far_gateway_dies_and_not_before_there_is_an_agent_again(host: Host) -> None:
    with started(host, *NEAR) as near:
        near.wait_until_ready()
        async with await connect(host, 7980) as agent:
            await agent.greet(AGENT)
            assert await agent.hear_path() is False
            for _ in range(2):
                with started(host, "entg") as far:
                    far.wait_until_ready()
                    await until_connected(near, "entg")
                    await until(partial(is_closed, near, "entg"))
                    async with await connect(host, 6980) as server:
                        await server.greet(SERVER)
                        await agent.say(Keepalive())
                        assert await agent.hear_path() is True
                        far.kill()
                        assert await agent.hear_path() is False


@pytest.mark.proves("F31")
@in_trio
async def test_two_gateways_that_both_listen_or_both_dial_say_what_they_wait_for(host: Host) -> None:
    with started(host, "entg") as one, started(host, "entg", "--enta-listen", "7980", "--entg-listen", "7979") as other:
        for gateway, port in ((one, 6979), (other, 7979)):
            gateway.wait_until_ready()
            leg = gateway.status()["legs"]["entg"]
            assert (leg["state"], leg["listening"]) == ("waiting", f"0.0.0.0:{port}, [::]:{port}")
    with (
        started(host, "entg", "--entg-connect", "127.0.0.1:7979") as one,
        started(host, "entg", "--entg-connect", "127.0.0.1:6979", "--enta-listen", "7980") as other,
    ):
        for gateway, port in ((one, 7979), (other, 6979)):
            await until(partial(gateway.events, "unreachable"))
            leg = gateway.status()["legs"]["entg"]
            assert (leg["state"], leg["dialling"]) == ("waiting", f"127.0.0.1:{port}")
            assert leg["problem"] == (
                f"cannot connect to 127.0.0.1 port {port}: Connection refused;"
                " does the peer gateway listen there (--entg-listen)?"
            )
            assert len(gateway.events("unreachable")) == 1


# The end.


async def hear_all(peer: Peer) -> list[bytes]:
    """Return every packet until CLOSE and the end of the stream."""
    heard = []
    while isinstance(event := await peer.hear(), bytes):
        heard.append(event)
    assert event == Close("the gateway is stopping"), event
    assert await peer.hear() is None
    return heard


@pytest.mark.proves("F06", "G11")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@in_trio
async def test_what_was_sent_before_the_stop_signal_is_delivered_both_ways(
    gateway: Program, host: Host, number: signal.Signals
) -> None:
    there = ip_packets(ALICE, FAR, size_bytes=3_000_000, seed=1)
    back = ip_packets(FAR, ALICE, size_bytes=3_000_000, seed=2)
    async with await connect_as(host, "entg", "eng") as peer, await connect_as(host, "enta", "eng") as agent:
        await until_connected(gateway)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(agent.send, *there)
            nursery.start_soon(peer.send, *back)
        # Nobody has read a byte yet: most of it waits in the kernels, on either side of the gateway.
        gateway.signal(number)
        began_s = time.monotonic()

        async def compare(peer: Peer, expected: list[bytes]) -> None:
            assert await hear_all(peer) == expected
            await peer.stream.aclose()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(compare, peer, there)
            nursery.start_soon(compare, agent, back)
        assert await trio.to_thread.run_sync(gateway.wait) == 0
        assert time.monotonic() - began_s < 8 * 2


@in_trio
async def test_a_stop_is_quick_though_strangers_and_raw_peers_hang_on(gateway: Program, host: Host) -> None:
    async with await connect_as(host, "entg", "raw") as peer, await connect(host, 6979), await connect(host, 6980):
        await until_connected(gateway, "entg")
        async with await connect_as(host, "enta", "raw"):
            assert await peer.hear_packets(1) == [REQUEST]
            began_s = time.monotonic()
            assert await trio.to_thread.run_sync(gateway.stop) == 0
            assert time.monotonic() - began_s < 8 * 2
            assert await peer.hear() is None


@pytest.mark.proves("F17")
@in_trio
async def test_what_came_before_one_side_ended_is_delivered_though_it_is_read_later(
    gateway: Program, host: Host
) -> None:
    packets = ip_packets(ALICE, FAR, size_bytes=3_000_000)
    async with await connect_as(host, "entg", "eng") as peer:
        agent = await connect_as(host, "enta", "eng")
        await until_connected(gateway)
        await agent.send(*packets)
        await agent.say(Close())
        await agent.stream.aclose()
        await until(partial(gateway.events, "disconnected"))
        assert await peer.hear_packets(len(packets)) == packets


@pytest.mark.proves("F18")
@in_trio
async def test_what_came_before_a_reset_is_delivered_but_no_part_of_a_frame(gateway: Program, host: Host) -> None:
    packets = ip_packets(ALICE, FAR, size_bytes=20_000, payload_bytes=(1, 500))
    async with await connect_as(host, "entg", "eng") as peer:
        await until_connected(gateway, "entg")
        agent = await connect_as(host, "enta", "raw")
        stream = agent.stream
        assert isinstance(stream, trio.SocketStream)
        await agent.send(*packets)
        await stream.send_all(encode_packets([REQUEST])[:10])
        # The kernel has acknowledged every byte, so they have arrived.
        await until(lambda: not unacknowledged_bytes(stream))
        reset(stream)
        assert await peer.hear_packets(1 + len(packets)) == [REQUEST, *packets]
        await until(lambda: not gateway.status()["legs"]["enta"]["connected"])
        async with await connect_as(host, "enta", "raw"):
            assert await peer.hear_packets(1) == [REQUEST]
        assert gateway.status()["counters"]["enta_ended"]["reset"] == 1


@in_trio
async def test_sighup_changes_nothing(gateway: Program, host: Host) -> None:
    async with await connect_as(host, "entg", "eng") as peer, await connect_as(host, "enta", "eng") as agent:
        await until_connected(gateway)
        gateway.signal(signal.SIGHUP)
        await until(lambda: gateway.events("nothing_to_reload"))
        await agent.send(REQUEST)
        assert await peer.hear_packets(1) == [REQUEST]


@asynccontextmanager
async def held_up(gateway: Program, host: Host) -> AsyncIterator[None]:
    """Let a peer take nothing, and an agent send more than there is room for."""
    async with await connect_as(host, "entg", "eng"), await connect_as(host, "enta", "eng") as agent:
        await until_connected(gateway)
        async with trio.open_nursery() as nursery:

            async def send() -> None:
                with suppress(trio.BrokenResourceError):
                    await agent.send(*ip_packets(ALICE, FAR, size_bytes=50_000_000, payload_bytes=(60_000, 65_000)))

            nursery.start_soon(send)
            sent: list[int] = []

            def is_stuck() -> bool:
                sent.append(gateway.status()["counters"]["to_entg"].get("bytes", 0))
                return sent[-1] > 0 and sent[-20:] == sent[-1:] * 20

            await until(is_stuck)
            yield
            nursery.cancel_scope.cancel()


@in_trio
async def test_a_second_signal_ends_a_held_up_stop_at_once(gateway: Program, host: Host) -> None:
    async with held_up(gateway, host):
        gateway.signal(signal.SIGTERM)
        await until(lambda: gateway.events("stopping"))
        assert gateway.process.poll() is None
        began_s = time.monotonic()
        gateway.signal(signal.SIGTERM)
        assert await trio.to_thread.run_sync(gateway.wait) == 0
        assert time.monotonic() - began_s < 8


@in_trio
async def test_a_held_up_stop_ends_after_the_grace(host: Host) -> None:
    with started(host, "entg", "--grace", "300ms") as gateway:
        gateway.wait_until_ready()
        async with held_up(gateway, host):
            began_s = time.monotonic()
            assert await trio.to_thread.run_sync(gateway.stop) == 0
            assert 0.3 <= time.monotonic() - began_s < 8
