"""Hosts made of network namespaces: make them, wire them up, run real programs in them, remove them.

Tests, the demo and the benchmarks use these; nothing here touches the namespace it is started in.
Needs root (or root in a user namespace) and iproute2.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

CLONE_NEWNET = 0x40000000  # linux/sched.h
_NAMESPACE_DIRECTORY = Path("/run/netns")  # iproute2's
_libc = ctypes.CDLL(None, use_errno=True)


def run(argv: Sequence[str], *, check: bool = True, input: str | None = None) -> str:
    """Run a short command and return its standard output.

    Raises:
        RuntimeError: it exited non-zero and *check* is set; the text has argv, status and standard error.
    """
    done = subprocess.run(list(argv), capture_output=True, text=True, input=input, timeout=60, check=False)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(argv)}: exit {done.returncode}: {done.stderr.strip()}")
    return done.stdout


class Host:
    """One network namespace that stands for a machine. Made by `Network.host`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._path = _NAMESPACE_DIRECTORY / name

    def argv(self, argv: Sequence[str]) -> list[str]:
        """The command line that runs *argv* on this host."""
        return ["ip", "netns", "exec", self.name, *argv]

    def run(self, *argv: str, check: bool = True, input: str | None = None) -> str:
        """Run a short command on this host and return its standard output."""
        return run(self.argv(argv), check=check, input=input)

    def popen(
        self,
        *argv: str,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a program on this host, with *environment* besides our own.

        `ip netns exec` replaces itself, so the process id is the program's own.
        """
        merged = {**os.environ, **(environment or {})}
        return subprocess.Popen(self.argv(argv), stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, env=merged)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Put the calling thread on this host: sockets and devices made meanwhile belong to it for good."""
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        there = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _set_network_namespace(there)
            try:
                yield
            finally:
                _set_network_namespace(before)
        finally:
            os.close(there)
            os.close(before)


class Network:
    """Hosts and the wires between them, under a prefix that nobody else uses; gone when the block ends.

    Programs started on a host must be ended by whoever started them, before that.
    """

    def __init__(self) -> None:
        self._prefix = f"engh{secrets.token_hex(3)}"  # no device and no table of an agent begins so
        self._cleanup = ExitStack()
        self._wires = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._cleanup.close()

    def host(self, label: str) -> Host:
        """Add a host with loopback up and no other device."""
        name = f"{self._prefix}-{label}"
        run(["ip", "netns", "add", name])
        self._cleanup.callback(run, ["ip", "netns", "delete", name])
        host = Host(name)
        host.run("ip", "link", "set", "lo", "up")
        return host

    def connect(
        self, left: Host, left_address: str, right: Host, right_address: str, mtu: int = 1500
    ) -> tuple[str, str]:
        """Lay a veth wire between two hosts; addresses carry a prefix length. Returns the two device names."""
        self._wires += 1
        names = (f"wire{self._wires}a", f"wire{self._wires}b")
        here = ("name", names[0], "mtu", str(mtu), "netns", left.name)
        there = ("name", names[1], "mtu", str(mtu), "netns", right.name)
        run(["ip", "link", "add", *here, "type", "veth", "peer", *there])
        for host, name, address in ((left, names[0], left_address), (right, names[1], right_address)):
            host.run("ip", "address", "add", address, "dev", name)
            host.run("ip", "link", "set", name, "up")
        return names


def _set_network_namespace(descriptor: int) -> None:
    if _libc.setns(descriptor, CLONE_NEWNET) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), "setns")
