"""A relay that dies takes the links through it down, and no program with it: they come back when it does."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from enlink.testing.hosts import Host, Network
from enlink.testing.programs import Program, started

RELAY = ("--listen", "127.0.0.1:7100", "--target", "127.0.0.1:6979")
FAR = ("--entg-listen", "127.0.0.1:6979", "--enta-listen", "127.0.0.1:6980")
NEAR = ("--host", "--entg-connect", "127.0.0.1:7100", "--enta-listen", "127.0.0.1:6981")


@pytest.fixture
def host() -> Iterator[Host]:
    with Network() as network:
        yield network.host("relay")


def is_connected(gateway: Program) -> bool:
    return gateway.status()["legs"]["entg"]["connected"] is True


@pytest.mark.proves("F10")
def test_links_through_a_relay_that_is_killed_fail_are_tried_again_and_cost_next_to_nothing(host: Host) -> None:
    with started(host, "entg", *FAR) as far, started(host, "entg", *NEAR) as near:
        for gateway in (far, near):
            gateway.wait_until_ready()
        for _ in range(2):
            with started(host, "relay", *RELAY) as relay:
                near.wait_until(lambda: is_connected(near) and is_connected(far), "connected")
                relay.kill()
            near.wait_until(lambda: not is_connected(near) and not is_connected(far), "told of the end")
        before_s, began_s = near.cpu_s + far.cpu_s, time.monotonic()
        near.wait_until(lambda: time.monotonic() - began_s > 2, "out of its link for two seconds")
        assert near.cpu_s + far.cpu_s - before_s < 8 * 0.05 * (time.monotonic() - began_s)
        assert len(near.events("unreachable")) <= 3  # one line for an outage, however often it tries
