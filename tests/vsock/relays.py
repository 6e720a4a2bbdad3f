"""Run `relay` in a guest, for the tests there."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from enlink.testing.hosts import Host
from enlink.testing.programs import Program, started


class ThisGuest(Host):
    """The guest itself, which nobody else uses."""

    def argv(self, argv: Sequence[str]) -> list[str]:
        return list(argv)


def free_tcp_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        assert isinstance(port, int)
        return port


@contextmanager
def relaying(*options: str) -> Iterator[Program]:
    with started(ThisGuest("guest"), "relay", *options, "--log-level", "debug") as program:
        program.wait_until_ready()
        yield program
