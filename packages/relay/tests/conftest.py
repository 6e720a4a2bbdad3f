"""A host for relays, and one that runs there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
from enlink.testing.hosts import Host, Network
from enlink.testing.programs import Program, started

Relaying = Callable[..., AbstractContextManager[Program]]


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Network() as network:
        yield network.host("relay")


@pytest.fixture
def relaying(host: Host) -> Relaying:
    """Starts a relay on the host, and waits until it is ready."""

    @contextmanager
    def start(*options: str) -> Iterator[Program]:
        with started(host, "relay", *options) as relay:
            relay.wait_until_ready()
            yield relay

    return start
