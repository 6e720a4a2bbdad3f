"""Beside the original: peers that speak frames of IP packets and nothing else, in any mix with ENG."""

from __future__ import annotations

import re
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
from enlink.link import KEEPALIVE_INTERVAL_S
from enlink.testing.gateways import HELLO, AgentSide, Between, framed, split_frames
from enlink.testing.hosts import Host
from enlink.testing.peers import ip_packets
from enlink.testing.probe import Packet, Wire, canary
from enlink.testing.state import network_state
from path import BIN, GATEWAY_OF_APP, GATEWAY_OF_SERVER, PEER_GATEWAY, Path, Place, Program

FAR_BEYOND_S = 40.0
ORIGINAL = ("--wire", "original")
HINT = "needs --wire original"
NOWHERE = "1.1.1.1"
# Long enough for a peer that speaks ENG to say that it lives.
LONG_SILENCE_S = KEEPALIVE_INTERVAL_S + 1.5

# One UDP datagram with "hello" inside: from the client's agent to transit port 6979, and its answer. What tokio-util's
# LengthDelimitedCodec::new() makes of these packets; `....` is the identification and the checksum that covers it.
QUESTION = "00000021 45000021....4000 4011.... c0a80001 c0a800fe 9c401b43 000d822e 68656c6c6f"
ANSWER = "00000021 4500002100014000 4011b87b c0a800fe c0a80001 1b439c40 000d822e 68656c6c6f"


def until(condition: Callable[[], object], what: str, timeout_s: float = FAR_BEYOND_S) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"never {what}"
        time.sleep(0.01)


def echo(path: Path, *options: str) -> str:
    return path.hosts["app"].run(str(BIN / "echosvr"), "client", "--host", NOWHERE, *options)


def packets_only(stream: bytes | bytearray) -> list[bytes]:
    """Cut a stream as the original does, which takes every payload for an IP packet and knows nothing else."""
    payloads, rest = split_frames(stream)
    assert rest == b""
    for payload in payloads:
        assert payload[0] == 0x45, payload[:40].hex()
        assert struct.unpack_from("!H", payload, 2) == (len(payload),)
    return payloads


def exchange(one: socket.socket, other: socket.socket, there: list[bytes], back: list[bytes]) -> None:
    """Send packets both ways at once, and compare what arrives: the same frames and not a byte more."""
    streams = [b"".join(map(framed, packets)) for packets in (there, back)]
    heard = [bytearray(), bytearray()]

    def hear(at: socket.socket, number: int) -> None:
        while len(heard[number]) < len(streams[number]) and (data := at.recv(1 << 18)):
            heard[number] += data

    threads = [
        threading.Thread(target=hear, args=(other, 0)),
        threading.Thread(target=hear, args=(one, 1)),
        threading.Thread(target=one.sendall, args=(streams[0],)),
        threading.Thread(target=other.sendall, args=(streams[1],)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(FAR_BEYOND_S)
    assert heard == streams


@contextmanager
def dialled(host: Host, address: str) -> Iterator[socket.socket]:
    """Connect as an agent that has nothing to say yet."""
    with host.entered():
        agent = socket.create_connection((address, 6980), FAR_BEYOND_S)
    with agent:
        yield agent


# A gateway of the test's own in the place of both.


def test_agents_say_nothing_but_packets_to_an_original_gateway_from_start_to_stop() -> None:
    """Not at the start, not under load, not after seconds of silence, not to a gateway that is back, not at the end."""
    with (
        Path(client=ORIGINAL, server=ORIGINAL) as path,
        Between(path.hosts["near"], path.hosts["far"]) as gateway,
    ):
        sides = (gateway.client, gateway.server)
        path.start("app", "server")
        assert [bytes(side.connections[0].heard) for side in sides] == [b"", b""]
        with path.running("server", "echosvr", "server", "--port", "7"):
            echo(path, "--bytes", "5000000")
        with path.running("server", "echosvr", "server", "--port", "7", "--reply-delay", "2"):
            began_s = time.monotonic()
            echo(path, "--bytes", "300000")
            assert time.monotonic() - began_s > 2, "the reply came before the client's side was shut down"

            heard = [len(side.connections[0].heard) for side in sides]
            silent_since_s = time.monotonic()
            until(lambda: time.monotonic() - silent_since_s > LONG_SILENCE_S, "silent for so long")
            assert [len(side.connections[0].heard) for side in sides] == heard

            for side in sides:
                side.close()
                side.open()
            until(lambda: all(len(side.connections) == 2 for side in sides), "dialled again")
            echo(path, "--bytes", "300000")
        assert [path.programs[place].stop() for place in ("app", "server")] == [0, 0]
        until(lambda: all(side.agent is None for side in sides), "hung up")
        for side in sides:
            first, second = (packets_only(connection.heard) for connection in side.connections)
            assert sum(map(len, first)) > 5_300_000
            assert sum(map(len, second)) > 300_000
        assert path.programs["app"].log().count("uplink_down") == 1


def test_the_same_ear_hears_control_messages_where_both_speak_eng() -> None:
    """The control of the test above: the ear is not deaf."""
    with Path() as path, AgentSide(path.hosts["near"], greeting=HELLO) as gateway:
        path.start("app")
        assert path.programs["app"].stop() == 0
        payloads, _ = split_frames(gateway.connections[0].heard)
        assert [payload[:2] for payload in payloads] == [b"\0\1", b"\0\4"]  # HELLO and CLOSE
        with pytest.raises(AssertionError):
            packets_only(gateway.connections[0].heard)


def test_an_agent_makes_and_takes_the_bytes_of_tokio_utils_codec() -> None:
    """Golden bytes, through a running agent: what a captured program sends, and what it is answered."""
    with (
        Path(capture=["7", "udp/53"], client=ORIGINAL) as path,
        AgentSide(path.hosts["near"]) as gateway,
    ):
        path.start("app")
        with path.hosts["app"].entered():
            program = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with program:
            program.settimeout(FAR_BEYOND_S)
            program.bind(("", 40000))
            program.sendto(b"hello", (NOWHERE, 53))
            agent = gateway.connections[0]
            until(lambda: len(agent.heard) >= 37, "said anything")
            expected = QUESTION.replace(" ", "")
            assert [
                got for got, wanted in zip(agent.heard.hex(), expected, strict=True) if wanted not in (got, ".")
            ] == []
            header = struct.unpack_from("!10H", agent.heard, 4)
            assert sum(header) % 0xFFFF == 0

            answer = bytes.fromhex(ANSWER)
            for data in (answer, answer * 100, *(answer[at : at + 1] for at in range(len(answer)))):
                agent.say(data)
            assert [program.recvfrom(100) for _ in range(102)] == [(b"hello", (NOWHERE, 53))] * 102

            # The longest there are: 65,535 bytes with their headers.
            del agent.heard[:]
            program.sendto(bytes(65507), (NOWHERE, 53))
            until(lambda: len(agent.heard) >= 65539, "said it all")
            assert agent.heard[:8] == bytes.fromhex("0000ffff 4500ffff")
            question = packets_only(agent.heard)[0]
            ports = struct.pack("!HH", *reversed(struct.unpack_from("!HH", question, 20)))
            agent.say(framed(question[:12] + question[16:20] + question[12:16] + ports + question[24:]))
            assert program.recv(65535) == bytes(65507)


# Agents of the test's own at both ends of two gateways.


def test_raw_agents_at_both_ends_of_two_gateways_hear_the_packets_and_nothing_else() -> None:
    """The one beside the server is silent until it is sent something. Silence and the gateways' end bring no word."""
    there = ip_packets("192.168.0.1", "192.168.0.254", size_bytes=5_000_000, seed=1)
    back = ip_packets("192.168.0.254", "192.168.0.1", size_bytes=5_000_000, seed=2, payload_bytes=(1, 3000))
    with Path() as path:
        path.start("near", "far")
        with (
            dialled(path.hosts["server"], GATEWAY_OF_SERVER) as server,
            dialled(path.hosts["app"], GATEWAY_OF_APP) as client,
        ):
            until(lambda: path.programs["far"].status()["legs"]["enta"]["state"] == "silent", "taken for a silent one")
            until(lambda: path.programs["near"].status()["legs"]["entg"]["connected"], "linked with the other gateway")
            until(lambda: path.programs["far"].status()["legs"]["entg"]["connected"], "linked with the other gateway")
            exchange(client, server, there[:1], [])
            exchange(client, server, there, back)
            assert select.select([client, server], [], [], LONG_SILENCE_S) == ([], [], [])
            assert [path.programs[place].stop() for place in ("near", "far")] == [0, 0]
            assert (client.recv(1), server.recv(1)) == (b"", b"")


# Who is at the other end.


@pytest.mark.proves("F09")
def test_an_agent_knows_that_the_other_is_gone_or_back_where_all_between_speak_eng() -> None:
    """Its own link stays all the while. Behind an original gateway, a path that cannot be known of is taken as open."""
    with Path() as path:
        path.start()
        app, server = path.programs["app"], path.programs["server"]
        until(lambda: app.status()["uplink"]["path"] == "open", "open from end to end")
        for _ in range(2):
            server.stop()
            until(lambda: app.status()["uplink"]["path"] == "closed", "told that the other agent is gone")
            path.start("server")
            until(lambda: app.status()["uplink"]["path"] == "open", "told that the other agent is back")
        path.programs["far"].stop()
        until(lambda: app.status()["uplink"]["path"] == "closed", "told that the other gateway is gone")
        log = app.log()
        assert " path_closed " in log
        assert " path_open " in log
        assert log.count(" uplink_up ") == 1
        assert " uplink_down " not in log

        path.programs["far"].argv += ORIGINAL
        path.programs["near"].stop()
        path.programs["near"].argv += ORIGINAL
        app.stop()
        app.argv += ORIGINAL
        path.start("far", "near", "app")
        near = path.programs["near"]
        until(lambda: {leg["path"] for leg in near.status()["legs"].values()} == {"open"}, "linked both ways")
        assert app.status()["uplink"]["path"] == "open"


# Who may be original.


def test_programs_told_to_be_original_mix_with_others_wherever_the_dialler_is_one_or_the_listener_is_none() -> None:
    """Every mix that can work. One program changes at a time, and the others find out by themselves."""
    with Path() as path, path.running("server", "echosvr", "server", "--port", "7"):
        path.start()
        originals: set[Place] = set()
        changes: list[Place | None] = [None, "server", "app", "server", "near", "server", "far"]
        for place in changes:
            if place is not None:
                program = path.programs[place]
                program.stop()
                if place in originals:
                    del program.argv[-len(ORIGINAL) :]
                else:
                    program.argv += ORIGINAL
                originals ^= {place}
                path.start(place)
            echo(path, "--bytes", "1000000")
            links: list[tuple[Place, Place]] = [("app", "near"), ("near", "far"), ("server", "far")]
            for dialler, listener in links:
                leg = "entg" if dialler == "near" else "enta"
                *_, last = re.findall(rf" connected reason=(raw|eng) leg={leg} ", path.programs[listener].log())
                assert last == ("raw" if dialler in originals else "eng"), (originals, dialler)


def test_who_greets_an_original_listener_is_told_what_is_missing_in_one_line_and_keeps_trying() -> None:
    """Each dialler of the path, for as many attempts as take seconds."""
    with Path(near=ORIGINAL, far=ORIGINAL) as path:
        path.start("near", "far")
        agents = [path.programs[place] for place in ("app", "server")]
        for agent in agents:
            agent.start()
        for agent in agents:
            agent.wait_for("uplink_down")
            until(partial(has_tried, agent, times=5), "tried again")
            assert agent.log().count("uplink_down") == 1
            assert HINT in line_of("uplink_down", agent)
        # Between gateways, it is the one that dials.
        with path.running("near", "entg", "--entg-connect", f"{PEER_GATEWAY}:6979", "--enta-listen", "6981") as near:
            near.wait_for("unreachable")
            assert HINT in line_of("unreachable", near)


def has_tried(agent: Program, times: int) -> bool:
    ended: dict[str, int] = agent.status()["counters"]["uplink_ended"]
    return sum(ended.values()) >= times


def line_of(event: str, program: Program) -> str:
    return next(line for line in program.log().splitlines() if f" {event} " in line)


def strays(wire: Wire) -> list[Packet]:
    """What left the app's host besides the agent's own link."""
    return [packet for packet in wire.packets() if (str(packet.destination), packet.port) != (GATEWAY_OF_APP, 6980)]


@pytest.mark.proves("D16", "F26")
def test_a_gateway_that_never_answers_the_greeting_is_tried_for_ever_and_nothing_leaks_meanwhile() -> None:
    """One line says what helps, captured ports stay closed, and an agent that may try only once ends with 69."""
    with (
        Path(server=("--once",)) as path,
        AgentSide(path.hosts["near"]) as mute,
        AgentSide(path.hosts["far"]),
        Wire(path.hosts["app"], path.hosts["near"], "wire1b", GATEWAY_OF_APP) as wire,
    ):
        app, once = path.programs["app"], path.programs["server"]
        before = network_state(path.hosts["server"])
        with canary(path.hosts["app"], 7, 53):
            until(lambda: strays(wire), "seen what leaves without an agent")
            app.start()
            once.start()
            until(lambda: mute.connections, "dialled")
            wire.packets()
            until(lambda: len(mute.connections) >= 2, "tried again")
            # Port 53 is not captured, and shows that the program never stopped.
            assert {packet.port for packet in strays(wire) if packet.destination.version == 4} == {53}
        assert all(split_frames(connection.heard)[0][0].startswith(b"\0\1") for connection in mute.connections)
        assert app.log().count("uplink_down") == 1
        assert HINT in line_of("uplink_down", app)
        assert " ready " not in app.log()
        assert app.status()["uplink"]["up"] is False

        assert once.process.wait(FAR_BEYOND_S) == 69
        last_line = once.log().splitlines()[-1]
        assert last_line.startswith("enta: ")
        assert HINT in last_line
        assert network_state(path.hosts["server"]) == before


def test_once_and_a_gateway_that_breaks_the_protocol_end_with_76_or_hangs_up_with_69() -> None:
    """The exit code tells whose fault it was, the line says what it did, and the host is as it was."""
    with Path(client=("--once",)) as path, AgentSide(path.hosts["near"], greeting=HELLO) as gateway:
        agent, before = path.programs["app"], network_state(path.hosts["app"])
        for last_words, code, text in (
            (bytes.fromhex("00010000"), 76, "65536"),
            (framed(b"\0\1\0"), 76, "HELLO"),
            (b"\0\0", 69, "without CLOSE"),
            (framed(b"\0\4"), 69, "closed the link"),
            (framed(b"\0\5go away"), 69, "go away"),
        ):
            agent.start()
            agent.wait_for("ready")
            gateway.connections[-1].say(last_words)
            gateway.connections[-1].hang_up()
            assert agent.process.wait(FAR_BEYOND_S) == code
            assert text in agent.log().splitlines()[-1]
            assert network_state(path.hosts["app"]) == before
