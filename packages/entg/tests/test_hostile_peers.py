"""Gateways as real processes, and peers that stall, lie, flood or hoard: one bad peer hurts one link."""

from __future__ import annotations

import socket
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import AsyncExitStack, suppress
from ipaddress import IPv4Interface
from typing import Literal

import pytest
import trio
from enlink.control import Error, Hello, Keepalive, Role
from enlink.frame import encode_control, encode_packets
from enlink.testing.hosts import Host
from enlink.testing.peers import Peer, connect, ip_packet, ip_packets
from enlink.testing.programs import FAR_BEYOND_S, Program, in_trio, started, until

ALICE, BOB, FAR = "192.168.0.1", "192.168.0.2", "192.168.0.254"
REQUEST, REPLY = ip_packet(ALICE, FAR, b"request"), ip_packet(FAR, ALICE, b"reply")
AGENT = Hello(Role.CLIENT_AGENT, tun=(IPv4Interface(f"{ALICE}/24"),))
GATEWAY = Hello(Role.GATEWAY)
PORTS = {"enta": 6980, "entg": 6979}
MIB = 1 << 20

Leg = Literal["enta", "entg"]

# What a hostile session sends, and the name under which its end is counted.
SESSION = encode_packets([ip_packet(BOB, FAR, b"one"), ip_packet(BOB, FAR, bytes(200)), ip_packet(BOB, FAR, b"three")])
FAULTS: list[tuple[bytes, str]] = [
    (b"\0\1\0\0", "frame_len"),
    (b"\x80\0\0\0 and more", "frame_len"),
    (b"\xff\xff\xff\xff" + bytes(1000), "frame_len"),
    (b"\0\0\0\0" * 64, "junk"),
    (b"\0\0\0\x01\x45" * 64, "junk"),
    (b"\0\0\0\x13\x45" + bytes(18), "eof"),
    (b"\0\0\0\x14\x50" + bytes(19), "eof"),
    (b"\0\0\0\x02\0\x03", "bad_control"),
    (b"\0\0\0\x03\0\x01\x01", "bad_control"),
    (encode_control(AGENT)[:-1], "truncated"),
    (b"\0\0", "truncated"),
    (b"", "eof"),
]
DROPPED = Counter({"empty": 64, "too_short": 64 + 1, "not_ip": 1})  # by one round of all of these


async def admitted(host: Host, leg: Leg) -> Peer:
    """Connect as a good peer."""
    peer = await connect(host, PORTS[leg])
    await peer.greet(AGENT if leg == "enta" else GATEWAY)
    return peer


async def until_connected(gateway: Program) -> None:
    await until(lambda: all(leg["connected"] for leg in gateway.status()["legs"].values()))


async def until_quiet(gateway: Program) -> None:
    """Wait until nobody but the two good peers is connected."""
    await until(lambda: {leg["connections"] for leg in gateway.status()["legs"].values()} == {1})


def attack(host: Host, sessions: Iterable[tuple[Leg, bytes]]) -> None:
    """For each session connect, send, end our side, and wait for the gateway to end its own. For a thread."""
    with host.entered():
        for leg, data in sessions:
            where = ("127.0.0.1", PORTS[leg])
            with socket.create_connection(where, timeout=FAR_BEYOND_S) as stranger, suppress(ConnectionError):
                stranger.sendall(data)
                stranger.shutdown(socket.SHUT_WR)
                while stranger.recv(4096):
                    pass


@pytest.mark.proves("D11", "D22", "F34", "F35", "F37", "F38", "F40", "G18")
@in_trio
async def test_ten_thousand_hostile_sessions_leave_a_good_transfer_and_the_memory_as_they_are(
    gateway: Program, host: Host
) -> None:
    sessions = [*FAULTS, *((SESSION[:end], "busy" if end >= 27 else "truncated") for end in range(1, len(SESSION)))]
    rounds = 10_000 // len(sessions) + 1
    legs: tuple[Leg, Leg] = ("enta", "entg")
    expected = Counter({reason: 0 for _, reason in sessions})
    for _, reason in sessions:
        expected[reason] += rounds
    async with await admitted(host, "enta") as agent, await admitted(host, "entg") as peer:
        await until_connected(gateway)
        resident_bytes = gateway.resident_bytes

        async def transfer() -> None:
            batches = [ip_packets(ALICE, FAR, size_bytes=500_000, seed=seed) for seed in range(4)]
            number = 0
            while True:
                number += 1
                batch = batches[number % 4]
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(agent.send, *batch)
                    assert await peer.hear_packets(len(batch)) == batch
                await peer.say(Keepalive())
                await trio.sleep(0.1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(transfer)
            async with trio.open_nursery() as attackers:
                for turn in range(4):
                    mine = [(legs[number % 2], data) for number, (data, _) in enumerate(sessions * rounds)][turn::4]
                    attackers.start_soon(trio.to_thread.run_sync, attack, host, mine)
            nursery.cancel_scope.cancel()
        await until_quiet(gateway)
        counters = gateway.status()["counters"]
        assert Counter(counters["enta_ended"]) + Counter(counters["entg_ended"]) == expected
        dropped = Counter(counters["from_enta_dropped"]) + Counter(counters["from_entg_dropped"])
        assert dropped == Counter({reason: count * rounds for reason, count in DROPPED.items()})
        assert gateway.resident_bytes - resident_bytes < 8 * MIB
        assert len(gateway.log().splitlines()) < 600  # a line a second for each reason


@pytest.mark.proves("F36", "F39", "G14")
@in_trio
async def test_five_hundred_links_that_announce_the_longest_frame_cost_little_memory(
    gateway: Program, host: Host
) -> None:
    async with await admitted(host, "enta") as agent, await admitted(host, "entg") as peer:
        await until_connected(gateway)
        resident_bytes = gateway.resident_bytes
        async with AsyncExitStack() as hoard:
            for number in range(500):
                stranger = await connect(host, PORTS["enta" if number % 2 else "entg"])
                hoard.push_async_callback(trio.aclose_forcefully, stranger.stream)
                with suppress(trio.BrokenResourceError):  # those that had to make room
                    await stranger.stream.send_all(b"\0\0\xff\xff\x45")
            await agent.send(REQUEST)
            assert await peer.hear_packets(1) == [REQUEST]
            # All are in, and as many as there is room for have stayed.
            await until(lambda: sum(leg["connections"] for leg in gateway.status()["legs"].values()) == 400)
            assert gateway.resident_bytes - resident_bytes < 500 * 10 * 1024
        await until_quiet(gateway)


@pytest.mark.proves("D21", "F48")
@in_trio
async def test_a_peer_that_takes_nothing_holds_up_its_own_leg_for_ten_seconds_and_no_memory(
    gateway: Program, host: Host
) -> None:
    packets = ip_packets(ALICE, FAR, size_bytes=60 * MIB, payload_bytes=(60_000, 65_000))
    async with await admitted(host, "entg") as stuck, await admitted(host, "enta") as agent:
        await until_connected(gateway)
        resident_bytes = gateway.resident_bytes
        began_s = time.monotonic()
        async with trio.open_nursery() as nursery:

            async def live() -> None:
                with suppress(trio.BrokenResourceError):
                    while True:
                        await stuck.say(Keepalive())
                        await trio.sleep(1)

            nursery.start_soon(live)
            nursery.start_soon(agent.send, *packets)
            await until(lambda: gateway.status()["legs"]["entg"]["state"] == "waiting")
            assert time.monotonic() - began_s >= 10
            # What was held up moves on, into the void until a peer is there again.
            await until(lambda: gateway.status()["counters"]["to_entg_dropped"].get("no_link"))
            assert gateway.resident_bytes - resident_bytes < 16 * MIB
        async with await admitted(host, "entg") as new:
            await agent.send(REQUEST)
            while await new.hear_packets(1) != [REQUEST]:
                pass
        counters = gateway.status()["counters"]
        assert counters["entg_ended"]["stalled"] == 1
        assert counters["to_entg_dropped"]["stalled"] >= 1  # the run of packets that was under way
        assert counters["from_enta"]["packets"] == counters["to_entg"]["packets"] + sum(
            counters["to_entg_dropped"].values()
        )


@pytest.mark.proves("F48")
@in_trio
async def test_a_silent_connection_that_takes_nothing_is_let_go_after_a_second(gateway: Program, host: Host) -> None:
    packets = ip_packets(FAR, ALICE, size_bytes=60 * MIB, payload_bytes=(60_000, 65_000))
    async with await admitted(host, "entg") as peer, await connect(host, PORTS["enta"]):
        await until(lambda: gateway.status()["legs"]["enta"]["state"] == "silent")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(peer.send, *packets)
            began_s = time.monotonic()
            await until(lambda: gateway.status()["legs"]["enta"]["state"] == "waiting")
            assert time.monotonic() - began_s < 8
        async with await admitted(host, "enta") as agent:
            await peer.send(REPLY)
            while await agent.hear_packets(1) != [REPLY]:
                pass
        assert gateway.status()["counters"]["enta_ended"]["stalled"] == 1


async def greeting_times_s(host: Host, count: int) -> list[float]:
    """How long it takes to be greeted and turned away, again and again, beside whatever else goes on."""
    times_s = []
    for _ in range(count):
        began_s = time.monotonic()
        async with await connect(host, PORTS["enta"]) as stranger:
            await stranger.greet(Hello(Role.CLIENT_AGENT, tun=(IPv4Interface(f"{BOB}/24"),)))
            assert isinstance(await stranger.hear(), Error)
        times_s.append(time.monotonic() - began_s)
    return sorted(times_s)


@pytest.mark.proves("F46", "G27")
@in_trio
async def test_a_peer_that_floods_small_packets_leaves_others_their_turn(gateway: Program, host: Host) -> None:
    async with await admitted(host, "enta") as agent, await admitted(host, "entg") as peer:
        await until_connected(gateway)
        resident_bytes = gateway.resident_bytes
        flood = encode_packets([ip_packet(ALICE, FAR, b"")] * 10_000)

        async def send() -> None:
            while True:
                await agent.stream.send_all(flood)

        async def receive() -> None:
            while await peer.stream.receive_some(MIB):
                pass

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            nursery.start_soon(receive)
            await until(lambda: gateway.status()["counters"]["to_entg"].get("packets", 0) > 100_000)
            times_s = await greeting_times_s(host, 100)
            nursery.cancel_scope.cancel()
        assert times_s[98] < 8 * 0.05, times_s
        assert gateway.resident_bytes - resident_bytes < 8 * MIB


@pytest.mark.proves("D20", "F49", "G16")
@in_trio
async def test_two_hundred_slow_greetings_add_little_to_a_good_one(gateway: Program, host: Host) -> None:
    async with await admitted(host, "enta"):
        slow = [await connect(host, PORTS["enta"]) for _ in range(200)]
        hello = encode_control(AGENT)
        async with trio.open_nursery() as nursery:

            async def drip(stranger: Peer) -> None:
                with suppress(trio.BrokenResourceError):
                    for byte in hello[:-1]:
                        await stranger.stream.send_all(bytes((byte,)))
                        await trio.sleep(1)

            for stranger in slow:
                nursery.start_soon(drip, stranger)
            times_s = await greeting_times_s(host, 100)
            nursery.cancel_scope.cancel()
        assert times_s[98] < 8 * 0.1, times_s
        for stranger in slow:
            await trio.aclose_forcefully(stranger.stream)


@pytest.mark.proves("F53", "G15")
@in_trio
async def test_without_descriptors_links_go_on_and_new_ones_wait(host: Host) -> None:
    with started(host, "entg", under=("prlimit", "--nofile=48")) as gateway:
        gateway.wait_until_ready()
        async with await admitted(host, "enta") as agent, await admitted(host, "entg") as peer:
            await until_connected(gateway)
            hoard = [await connect(host, PORTS["enta"]) for _ in range(60)]
            began_s = time.monotonic()
            await until(lambda: gateway.events("accept_paused"))
            packets = ip_packets(ALICE, FAR, size_bytes=MIB)
            while time.monotonic() - began_s < 2:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(agent.send, *packets)
                    assert await peer.hear_packets(len(packets)) == packets
            assert len(gateway.events("accept_paused")) <= time.monotonic() - began_s + 2
            for stranger in hoard:
                await trio.aclose_forcefully(stranger.stream)
            began_s = time.monotonic()
            async with await admitted(host, "enta") as again:
                assert time.monotonic() - began_s < 8 * 1.5
                await peer.send(REPLY)
                assert await again.hear_packets(1) == [REPLY]
        assert await trio.to_thread.run_sync(gateway.stop) == 0
