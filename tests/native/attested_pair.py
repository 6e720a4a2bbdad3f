"""An agent and its gateway on two hosts, their link attested by the stand-in, and ears on the wire between them.

::

    app   10.81.1.1  ──────  10.81.1.2   near
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from attested import GATEWAY_BUILD, STANDIN_SAYS
from enlink.testing.hosts import Host, Network
from enlink.testing.probe import Packet, Wire
from enlink.testing.programs import Program, started
from standin import Installation

AGENT, GATEWAY = "10.81.1.1", "10.81.1.2"
PORT: Final = 6980
POLICY: Final = f"""\
evidence = "sgx_ecdsa"

[[accept]]
mr_enclave = "{GATEWAY_BUILD}"
mr_signer = "{"22" * 32}"
product_id = 1
minimum_svn = 2
"""
HANDSHAKE_RECORDS: Final = {20, 21, 22, 23}  # RFC 8446, 5.1
APPLICATION_DATA: Final = 23


@dataclass(frozen=True)
class Pair:
    """Two hosts, and what it takes to start programs on them that attest.

    Attributes:
        ear, echo: hear what the app's host sends, and what the gateway's answers.
        policy: a file that accepts what the stand-in says by itself.
    """

    app: Host
    near: Host
    ear: Wire
    echo: Wire
    policy: Path
    library: Path

    def agent(self, *options: str, **environment: str) -> AbstractContextManager[Program]:
        """Start the client's agent, which captures port 7 and DNS, with these options and those that attest."""
        attested = ("--entg-rats-tls", "--policy", str(self.policy))
        return self.plain_agent(*attested, *options, **environment)

    def plain_agent(self, *options: str, **environment: str) -> AbstractContextManager[Program]:
        """Start the client's agent with no options that attest but these."""
        argv = ("client", "--capture", "7", "--capture", "udp/53", "--entg-connect", f"{GATEWAY}:{PORT}", *options)
        return started(self.app, "enta", *argv, under=self.under(environment))

    def gateway(self, *options: str, **environment: str) -> AbstractContextManager[Program]:
        """Start the gateway, which attests to agents, with these options too. Its peer gateway does not exist."""
        return self.plain_gateway("--enta-rats-tls", "--attester", "sgx_ecdsa", *options, **environment)

    def plain_gateway(self, *options: str, **environment: str) -> AbstractContextManager[Program]:
        """Start the gateway with no options that attest but these."""
        argv = ("--entg-connect", "127.0.0.1:6979", *options)
        return started(self.near, "entg", *argv, under=self.under(environment))

    def under(self, environment: Mapping[str, str]) -> tuple[str, ...]:
        """What to put before a command so that it finds the stand-in."""
        merged = {**Installation(self.library).environment, **STANDIN_SAYS, **environment}
        return "env", *(f"{name}={value}" for name, value in merged.items())


@contextmanager
def attested_pair(library: Path, directory: Path, policy: str = POLICY) -> Iterator[Pair]:
    """Make the two hosts. Programs are to be started in the block."""
    file = directory / "policy.toml"
    file.write_text(policy)
    with Network() as network:
        app, near = network.host("app"), network.host("near")
        ours, theirs = network.connect(app, f"{AGENT}/24", near, f"{GATEWAY}/24")
        app.run("ip", "route", "add", "default", "via", GATEWAY)
        with Wire(app, near, theirs, GATEWAY) as ear, Wire(near, app, ours, AGENT) as echo:
            yield Pair(app, near, ear, echo, file, library)


def counted(program: Program, group: str) -> dict[str, int]:
    """Return a group of a program's counters; nothing, while there is no program to ask, or nothing to count."""
    try:
        counters: dict[str, dict[str, int]] = program.status()["counters"]
    except (FileNotFoundError, ConnectionRefusedError):
        return {}
    return counters.get(group, {})


def streams(packets: list[Packet], port: int = PORT) -> list[bytes]:
    """Return what was said on each TCP connection from or to *port*; nothing gets lost or twice on these wires."""
    said: dict[tuple[int, int], bytearray] = {}
    for packet in packets:
        if packet.protocol == "tcp" and port in (packet.port, packet.source_port):
            said.setdefault((packet.source_port, packet.port), bytearray()).extend(packet.payload)
    return [bytes(stream) for stream in said.values() if stream]


def records(stream: bytes) -> list[tuple[int, int]]:
    """Cut a stream into TLS records: the type and the length of each.

    Raises:
        ValueError: something else is among them.
    """
    found, start = [], 0
    while start < len(stream):
        kind, version = stream[start], stream[start + 1]
        length = int.from_bytes(stream[start + 3 : start + 5], "big")
        if kind not in HANDSHAKE_RECORDS or version != 3 or start + 5 + length > len(stream):
            raise ValueError(f"no TLS record: {stream[start : start + 40]!r}")
        found.append((kind, length))
        start += 5 + length
    return found


def client_hello() -> bytes:
    """Say what an ordinary TLS client says first."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    outgoing = ssl.MemoryBIO()
    session = context.wrap_bio(ssl.MemoryBIO(), outgoing)
    try:
        session.do_handshake()
    except ssl.SSLWantReadError:
        return outgoing.read()
    raise AssertionError("a handshake of one")
