"""A host for gateways, and one that runs there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from enlink.testing.hosts import Host, Network
from enlink.testing.programs import Program, started


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Network() as network:
        host = network.host("entg")
        # So that a kernel takes several MiB for a program that does not read.
        host.run("sysctl", "-qw", "net.ipv4.tcp_rmem=4096 8388608 8388608")
        yield host


@pytest.fixture
def gateway(host: Host) -> Iterator[Program]:
    """A gateway that listens on both sides."""
    with started(host, "entg") as gateway:
        gateway.wait_until_ready()
        yield gateway
