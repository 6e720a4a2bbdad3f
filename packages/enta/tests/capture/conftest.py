"""Hosts to capture on: one with a wire to the internet, and tunnels made of two TUN devices and a thread."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

import pytest
from enlink.testing.hosts import Host, Network
from enlink.testing.probe import Wire
from enta.tun import Tun, open_tun


@dataclass(frozen=True)
class Site:
    """A *host* at 10.0.0.2 and fd00::2 whose default routes lead to *internet*, at 10.0.0.9 and fd00::9."""

    host: Host
    internet: Host
    wire: Wire


@pytest.fixture
def network() -> Iterator[Network]:
    with Network() as network:
        yield network


@pytest.fixture
def make_site(network: Network) -> Iterator[Callable[[], Site]]:
    """Make hosts that check reverse paths strictly, as many as a test needs, each with an internet of its own."""
    with ExitStack() as stack:
        count = 0

        def make() -> Site:
            nonlocal count
            count += 1
            host, internet = network.host(f"host{count}"), network.host(f"internet{count}")
            near, far = network.connect(host, "10.0.0.2/24", internet, "10.0.0.9/24")
            for each, device, address in ((host, near, "fd00::2/64"), (internet, far, "fd00::9/64")):
                # Without duplicate detection, which holds an address back for a second or two.
                each.run("ip", "address", "add", address, "dev", device, "nodad")
            for setting in ("all", "default", near):
                host.run("sysctl", "-qw", f"net.ipv4.conf.{setting}.rp_filter=1")
            host.run("ip", "route", "add", "default", "via", "10.0.0.9")
            host.run("ip", "-6", "route", "add", "default", "via", "fd00::9")
            return Site(host, internet, stack.enter_context(Wire(host, internet, far, "10.0.0.9")))

        yield make


@pytest.fixture
def site(make_site: Callable[[], Site]) -> Site:
    return make_site()


@pytest.fixture
def tun(site: Site) -> Iterator[Tun]:
    """The device eng0 of the site's host, not configured yet."""
    with site.host.entered():
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
