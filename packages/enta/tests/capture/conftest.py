"""Hosts to capture on: one with a wire to the internet, and tunnels made of two TUN devices and a thread."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
from enlink.testing import probe
from enlink.testing.hosts import Network
from enlink.testing.probe import Site
from enta.tun import Tun, open_tun


@pytest.fixture
def network() -> Iterator[Network]:
    with Network() as network:
        yield network


@pytest.fixture
def site(network: Network) -> Iterator[Site]:
    with probe.site(network, "near") as site:
        yield site


@pytest.fixture
def far_site(network: Network) -> Iterator[Site]:
    with probe.site(network, "far") as site:
        yield site


@pytest.fixture
def tun(site: Site) -> Iterator[Tun]:
    """The device eng0 of the near host, not configured yet."""
    with site.host.entered():
        tun = open_tun("eng0")
    with tun:
        yield tun


@pytest.fixture
def far_tun(far_site: Site) -> Iterator[Tun]:
    """The device eng0 of the far host, not configured yet."""
    with far_site.host.entered():
        tun = open_tun("eng0")
    with tun:
        yield tun


@pytest.fixture
def tunnel() -> Callable[[Tun, Tun], AbstractContextManager[None]]:
    """Carry packets between two TUN devices while the block lasts."""

    @contextmanager
    def carry(left: Tun, right: Tun) -> Iterator[None]:
        stop_reader, stop_writer = os.pipe()
        other = {left.fileno(): right.fileno(), right.fileno(): left.fileno()}

        def pump() -> None:
            while stop_reader not in (readable := select.select([*other, stop_reader], [], [])[0]):
                for descriptor in readable:
                    os.write(other[descriptor], os.read(descriptor, 65536))

        thread = threading.Thread(target=pump)
        thread.start()
        try:
            yield
        finally:
            os.write(stop_writer, b"x")
            thread.join()
            os.close(stop_reader)
            os.close(stop_writer)

    return carry


@contextmanager
def _unprivileged() -> Iterator[None]:
    os.seteuid(65534)  # takes the effective capabilities along
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def unprivileged() -> Callable[[], AbstractContextManager[None]]:
    """Do without capabilities while the block lasts."""
    return _unprivileged
