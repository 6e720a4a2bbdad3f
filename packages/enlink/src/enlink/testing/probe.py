"""Try to send from a host, and see every IP packet that leaves it by a wire: to prove that something never does.

A capture proves an absence only up to a packet known to be later: `Wire.packets` sends that one itself, a fence.
"""

from __future__ import annotations

import errno
import secrets
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from types import TracebackType
from typing import Literal, Self

from enlink.testing.hosts import Host, Network

# linux/if_ether.h, linux/if_packet.h, linux/in.h, asm-generic/socket.h
_ETH_P_ALL = 3
_IPV4, _IPV6 = 0x0800, 0x86DD
_PACKET_OUTGOING = 4
_SO_RCVBUFFORCE = 33
_SOL_PACKET, _PACKET_STATISTICS = 263, 6
_PROTOCOLS = {1: "icmp", 6: "tcp", 17: "udp", 58: "icmp6"}

_FENCE_PORT = 9  # discard
_FAR_BEYOND_S = 20.0  # a fence takes less than a millisecond
_BUFFER_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Packet:
    """What a test asks about a packet. Ports are 0 where there are none."""

    protocol: str
    source: IPv4Address | IPv6Address
    source_port: int
    destination: IPv4Address | IPv6Address
    port: int
    payload: bytes

    def __str__(self) -> str:
        return f"{self.protocol} {self.source}:{self.source_port} > {self.destination}:{self.port}"


def parse_packet(packet: bytes) -> Packet:
    """Read an IPv4 or IPv6 packet without extension headers, as this machine's kernel makes them."""
    if packet[0] >> 4 == 4:
        header, number = 4 * (packet[0] & 15), packet[9]
        source, destination = packet[12:16], packet[16:20]
        body = packet[header : struct.unpack_from("!H", packet, 2)[0]]
    else:
        number, source, destination, body = packet[6], packet[8:24], packet[24:40], packet[40:]
    protocol = _PROTOCOLS.get(number, str(number))
    ports = struct.unpack_from("!HH", body) if protocol in {"tcp", "udp"} else (0, 0)
    header = 8 if protocol == "udp" else 4 * (body[12] >> 4) if protocol == "tcp" else 0
    return Packet(protocol, ip_address(source), ports[0], ip_address(destination), ports[1], body[header:])


class Wire:
    """Hears, at the far end of a wire, what *host* sends into it: IP, without what IPv6 does to find its neighbours."""

    def __init__(self, host: Host, far_host: Host, far_device: str, far_address: str) -> None:
        self._fence_address = (far_address, _FENCE_PORT)
        with far_host.entered():
            self._ear = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_ETH_P_ALL))
        self._ear.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
        self._ear.bind((far_device, _ETH_P_ALL))
        with host.entered():
            self._fence = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ear.close()
        self._fence.close()

    def packets(self) -> list[Packet]:
        """Return what the host has sent since the last call, oldest first, up to a fence that is sent now.

        Raises:
            TimeoutError: the fence did not arrive: the wire is broken, and silence on it means nothing.
            BufferError: more was sent since the last call than could be kept.
        """
        self._refuse_losses()  # the fence would be lost as well
        mark = secrets.token_bytes(16)
        self._fence.sendto(mark, self._fence_address)
        heard: list[Packet] = []
        deadline = time.monotonic() + _FAR_BEYOND_S
        while select.select([self._ear], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raw, (_, ethertype, kind, *_) = self._ear.recvfrom(65536)
            if kind == _PACKET_OUTGOING or ethertype not in {_IPV4, _IPV6}:
                continue
            packet = parse_packet(raw)
            if packet.payload == mark:
                self._refuse_losses()
                return heard
            is_housekeeping = packet.destination.version == 6 and packet.destination.is_multicast
            if not is_housekeeping and (str(packet.destination), packet.port) != self._fence_address:
                heard.append(packet)
        raise TimeoutError(f"no fence arrived from {self._fence_address}")

    def _refuse_losses(self) -> None:
        _, lost = struct.unpack("II", self._ear.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))
        if lost:
            raise BufferError(f"{lost} packets were lost: call this more often")


_CANARY = """
import itertools, socket, sys, time
tcp_port, udp_port = int(sys.argv[1]), int(sys.argv[2])
connected = []
for number in itertools.count():
    for family, address in ((socket.AF_INET, "1.1.1.1"), (socket.AF_INET6, "2001:db8::1")):
        with socket.socket(family, socket.SOCK_DGRAM) as datagrams:
            try:
                datagrams.sendto(b"canary", (address, udp_port))
            except OSError:
                pass
        connection = socket.socket(family)
        connection.settimeout(0.002)
        try:
            connection.connect((address, tcp_port))
            connected.append(connection)
        except OSError:
            connection.close()
    for connection in connected[:]:
        try:
            connection.sendall(b"canary")
        except TimeoutError:
            pass
        except OSError:
            connected.remove(connection)
    if len(connected) > 4:
        connected.pop(number % 4).close()
    if number == 10:
        print("trying", flush=True)
    time.sleep(0.003)
"""


@contextmanager
def canary(host: Host, tcp_port: int, udp_port: int) -> Iterator[None]:
    """Have a program on *host* that nothing discourages: it tries to reach 1.1.1.1 and 2001:db8::1, again and again.

    Every few milliseconds it begins a connection to each and sends each a datagram, and it says something on the
    connections that it has.
    """
    argv = (sys.executable, "-c", _CANARY, str(tcp_port), str(udp_port))
    with host.popen(*argv, stdout=subprocess.PIPE) as program:
        try:
            if program.stdout is None or program.stdout.readline() != b"trying\n":
                raise RuntimeError(f"the canary on {host.name} has ended")
            yield
        finally:
            program.kill()


@dataclass(frozen=True, slots=True)
class Site:
    """A *host* at 10.0.0.2 and fd00::2, whose default routes lead to *internet* at 10.0.0.9 and fd00::9."""

    host: Host
    internet: Host
    wire: Wire


@contextmanager
def site(network: Network, label: str) -> Iterator[Site]:
    """Make a site. Its host checks reverse paths strictly, as many distributions do."""
    host, internet = network.host(label), network.host(f"{label}-internet")
    for each in (host, internet):
        # No link-local addresses, which come a second or two later than the rest.
        each.run("sysctl", "-qw", "net.ipv6.conf.default.addr_gen_mode=1")
    near, far = network.connect(host, "10.0.0.2/24", internet, "10.0.0.9/24")
    for each, device, address in ((host, near, "fd00::2/64"), (internet, far, "fd00::9/64")):
        # Nor duplicate detection, which holds an address back as long.
        each.run("ip", "address", "add", address, "dev", device, "nodad")
    host.run("sysctl", "-qw", *(f"net.ipv4.conf.{setting}.rp_filter=1" for setting in ("all", "default", near)))
    host.run("ip", "route", "add", "default", "via", "10.0.0.9")
    host.run("ip", "-6", "route", "add", "default", "via", "fd00::9")
    with Wire(host, internet, far, "10.0.0.9") as wire:
        yield Site(host, internet, wire)


def send(
    host: Host,
    protocol: Literal["tcp", "udp"],
    address: str,
    port: int,
    *,
    source: tuple[str, int] | None = None,
    mark: int | None = None,
    payload: bytes = b"canary",
) -> int:
    """Begin a TCP connection or send a UDP packet, as a program would, and return errno: 0 when it is on its way.

    Does not wait: a connection is abandoned after its first packet.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with host.entered():
        program = socket.socket(family, socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM)
    with program:
        program.setblocking(False)
        if mark is not None:
            program.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
        try:
            if source is not None:
                program.bind(source)
            if protocol == "tcp":
                program.connect((address, port))
            else:
                program.sendto(payload, (address, port))
        except OSError as error:
            return 0 if error.errno == errno.EINPROGRESS else error.errno or -1
    return 0
