"""A loopback device that is down, in a namespace of the test's own: what a relay says that listens there."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator

import pytest
from enlink.endpoint import Tcp
from enlink.testing.hosts import Host, Network
from enlink.testing.programs import FAR_BEYOND_S, started
from relay import loopback
from relay.loopback import warn_if_unreachable

TARGET = ("--target", "127.0.0.1:9000")


@pytest.fixture
def enclave() -> Iterator[Host]:
    with Network() as network:
        host = network.host("enclave")
        host.run("ip", "link", "set", "lo", "down")
        yield host


def connects(host: Host, port: int, within_s: float = FAR_BEYOND_S) -> bool:
    with host.entered(), socket.socket() as client:
        client.settimeout(within_s)
        # Nobody is at the target, so the reset may be here already.
        return client.connect_ex(("127.0.0.1", port)) in (0, errno.ECONNRESET)


@pytest.mark.parametrize("address", ["127.0.0.1", "127.1.2.3"])
def test_a_relay_that_nobody_can_reach_says_so_and_serves_once_the_device_is_up(enclave: Host, address: str) -> None:
    """A warning, not an error: it has no right to bring the device up, and somebody else may do it later."""
    with started(enclave, "relay", "--listen", f"{address}:7000", *TARGET, "--listen", "7001", *TARGET) as relay:
        relay.wait_until_ready()
        assert not connects(enclave, 7001, within_s=0.2), "what is sent there is lost"
        (event,) = relay.events("loopback_is_down")
        assert (event["level"], event["listen"]) == ("warning", f"tcp://{address}:7000")
        assert "as --setup-loopback does" in event["advice"]
        enclave.run("ip", "link", "set", "lo", "up")
        assert connects(enclave, 7001)


@pytest.mark.parametrize("options", [("--setup-loopback",), ("--setup-loopback", "--workers", "2")])
def test_a_relay_that_brings_the_device_up_has_nothing_to_say(enclave: Host, options: tuple[str, ...]) -> None:
    listen = ("--listen", "127.0.0.1:7000", *TARGET, "--listen", "[::1]:7000", *TARGET)
    with started(enclave, "relay", *listen, *options) as relay:
        relay.wait_until_ready()
        assert connects(enclave, 7000)
        assert not relay.events("loopback_is_down")


def test_sockets_elsewhere_and_kernels_that_do_not_tell_are_no_reason_to_warn(
    enclave: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with enclave.entered(), socket.socket() as local, socket.socket() as everywhere, socket.socket(1) as unix:
        local.bind(("127.0.0.1", 0))
        endpoint = Tcp("127.0.0.1", 0)
        warn_if_unreachable(endpoint, [everywhere, unix])
        assert caplog.messages == []
        warn_if_unreachable(endpoint, [everywhere, local])
        assert caplog.messages == ["loopback_is_down"]
        monkeypatch.setattr(loopback, "_SIOCGIFFLAGS", 0x89FF)
        warn_if_unreachable(endpoint, [local])
        assert caplog.messages == ["loopback_is_down"]
