"""What a relay listens on: sockets that systemd passes and no bridge wants, and who may connect to a unix socket."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import pytest
from enlink.testing.hosts import Host
from enlink.testing.programs import started

# Passes two listening sockets as systemd does, and becomes the program.
PASS_TWO = """
import os, socket, sys
for descriptor in (3, 4):
    sock = socket.socket()
    sock.bind(("127.0.0.1", 7000 + descriptor))
    sock.listen()
    os.dup2(sock.detach(), descriptor + 100)
for descriptor in (3, 4):
    os.dup2(descriptor + 100, descriptor)
    os.close(descriptor + 100)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="2", LISTEN_FDNAMES="web:admin")
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.mark.parametrize("spelling", ["unix:{}", "unix-vsock:{}:52"])
def test_only_its_own_user_may_connect_to_a_unix_socket(host: Host, spelling: str) -> None:
    with tempfile.TemporaryDirectory(prefix="eng-") as directory:
        options = ("--listen", spelling.format(f"{directory}/front"), "--target", "127.0.0.1:9000")
        with started(host, "relay", *options) as relay:
            relay.wait_until_ready()
            (path,) = Path(directory).iterdir()
            assert path.name == {"unix:{}": "front"}.get(spelling, "front_52")
            assert path.stat().st_mode & 0o777 == 0o600


def test_a_socket_of_systemd_that_no_bridge_listens_on_is_named_and_closed(host: Host) -> None:
    """By a warning: systemd has it too, and would let clients wait for ever."""
    options = ("--listen", "systemd:web", "--target", "127.0.0.1:9000")
    with started(host, "relay", *options, under=(sys.executable, "-c", PASS_TWO)) as relay:
        relay.wait_until_ready()
        (event,) = relay.events("socket_unclaimed")
        assert (event["level"], event["name"]) == ("warning", "admin")
        assert event["advice"] == "listen on systemd:admin, or take it out of the .socket unit"
        listeners = host.run("ss", "--no-header", "--listening", "--tcp", "--numeric")
        assert "127.0.0.1:7003" in listeners
        assert "127.0.0.1:7004" not in listeners
        assert relay.stop() == 0
