"""The whole path on one machine: four hosts in a row, a program on each, real kernels and sockets in between.

::

    app                   near                 far                  server
    10.81.1.1  ──────  10.81.1.2
                       10.81.2.1  ──────  10.81.2.2
                                          10.81.3.1  ──────  10.81.3.2
    enta client           entg                 entg                 enta server

With several lanes there are as many programs entg on near, and on far. The demo, the tests and the benchmarks walk it.
No host routes for another: what crosses did so through the programs.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path as FilePath
from types import TracebackType
from typing import Any, Final, Literal, Self

from enlink.testing.hosts import Host, Network

Place = Literal["app", "near", "far", "server"]
PLACES: Final[tuple[Place, ...]] = ("app", "near", "far", "server")
BIN: Final = FilePath(sys.executable).parent

GATEWAY_OF_APP: Final = "10.81.1.2"
GATEWAY_OF_SERVER: Final = "10.81.3.1"
PEER_GATEWAY: Final = "10.81.2.2"


class Program:
    """A program on a host, and its log."""

    def __init__(
        self, host: Host, argv: Sequence[str], log: FilePath, environment: Mapping[str, str] | None = None
    ) -> None:
        self.host = host
        self.environment = environment
        self.argv = [str(BIN / argv[0]), *argv[1:]] if (BIN / argv[0]).exists() else list(argv)
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The process, running or ended."""
        if self._process is None:
            raise RuntimeError(f"{self.argv[0]} was never started")
        return self._process

    def start(self) -> None:
        """Start it, or start it again; do not wait."""
        self._log.touch()
        self._log_start = self._log.stat().st_size
        with self._log.open("ab") as log:
            self._process = self.host.popen(*self.argv, stdout=log, stderr=log, environment=self.environment)

    def log(self) -> str:
        """What it has written since it was last started."""
        with self._log.open("rb") as log:
            log.seek(self._log_start)
            return log.read().decode(errors="replace")

    def wait_for(self, event: str, timeout_s: float = 40) -> None:
        """Wait until it has logged *event* since it was last started.

        Raises:
            RuntimeError: it has ended instead, or *timeout_s* have passed; the text has the log.
        """
        deadline_s = time.monotonic() + timeout_s
        while re.search(rf"\b{event}\b", self.log()) is None:
            if self.process.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError(
                    f"{' '.join(self.argv)}: no {event!r} (exit {self.process.returncode}):\n{self.log()}"
                )
            time.sleep(0.01)

    def kill(self) -> None:
        """End it as a crash would, at once."""
        self.process.kill()
        self.process.wait(10)

    def stop(self, timeout_s: float = 40) -> int:
        """End it in good order and return its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)

    def end(self) -> None:
        """Make sure that it has ended, by whatever means."""
        if self._process is None or self._process.poll() is not None:
            return
        try:
            self.stop(5)
        except subprocess.TimeoutExpired:
            self.kill()

    def status(self) -> dict[str, Any]:
        """Ask it for its status."""
        document: dict[str, Any] = json.loads(self.host.run(self.argv[0], "status", "--json"))
        return document


class Path:
    """Four hosts in a row with the four programs, not started yet. Everything is gone when the block ends.

    Args:
        ports: the options of the client's agent that say what it captures, and of the server's what it replays.
        client, server, near, far: more options for each program.
        lanes: how many pairs of gateways there are between the two agents. The n-th pair's ports are 2 (n - 1) higher.
        environment: what the four programs find there, besides what we do.
    """

    def __init__(
        self,
        *,
        capture: Sequence[str] = ("7",),
        replay: Sequence[str] = ("7",),
        client: Sequence[str] = (),
        server: Sequence[str] = (),
        near: Sequence[str] = (),
        far: Sequence[str] = (),
        lanes: int = 1,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._environment = environment
        self._stack = ExitStack()
        higher = range(0, 2 * lanes, 2)
        self._argv: dict[Place, list[str]] = {
            "app": [
                "enta",
                "client",
                *_each("--capture", capture),
                *_each("--entg-connect", [f"{GATEWAY_OF_APP}:{6980 + more}" for more in higher]),
                *client,
            ],
            "near": ["entg", "--entg-connect", f"{PEER_GATEWAY}:6979", *near],
            "far": ["entg", "--entg-listen", "6979", *far],
            "server": [
                "enta",
                "server",
                *_each("--replay", replay),
                *_each("--entg-connect", [f"{GATEWAY_OF_SERVER}:{6980 + more}" for more in higher]),
                *server,
            ],
        }
        self._further: list[tuple[Place, list[str]]] = []
        for more in higher[1:]:
            ours, peers = ["--enta-listen", str(6980 + more)], str(6979 + more)
            self._further.append(("near", ["entg", *ours, "--entg-connect", f"{PEER_GATEWAY}:{peers}", *near]))
            self._further.append(("far", ["entg", *ours, "--entg-listen", peers, *far]))
        self.hosts: dict[Place, Host] = {}
        self.programs: dict[Place, Program] = {}
        self.further_gateways: list[Program] = []  # pairs of near and far
        self.outer_device = ""

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            network = stack.enter_context(Network())
            self.directory = FilePath(stack.enter_context(tempfile.TemporaryDirectory(prefix="eng-path-")))
            for place in PLACES:
                self.hosts[place] = network.host(place)
            app, near, far, server = (self.hosts[place] for place in PLACES)
            self.outer_device, _ = network.connect(app, "10.81.1.1/24", near, f"{GATEWAY_OF_APP}/24")
            network.connect(near, "10.81.2.1/24", far, f"{PEER_GATEWAY}/24")
            network.connect(far, f"{GATEWAY_OF_SERVER}/24", server, "10.81.3.2/24")
            # A way out for everything, so that what leaks can be seen to leak.
            app.run("ip", "route", "add", "default", "via", GATEWAY_OF_APP)
            server.run("ip", "route", "add", "default", "via", GATEWAY_OF_SERVER)
            for place in PLACES:
                log = self.directory / f"{place}-{self._argv[place][0]}.log"
                self.programs[place] = Program(self.hosts[place], self._argv[place], log, self._environment)
                stack.callback(self.programs[place].end)
            for number, (place, argv) in enumerate(self._further):
                self.further_gateways.append(self.program(place, argv, f"{place}-entg-{number}", self._environment))
                stack.callback(self.further_gateways[-1].end)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def program(
        self, place: Place, argv: Sequence[str], name: str, environment: Mapping[str, str] | None = None
    ) -> Program:
        """Prepare another program on a host; `running` starts it."""
        return Program(self.hosts[place], argv, self.directory / f"{name}.log", environment)

    @contextmanager
    def running(self, place: Place, *argv: str, ready: str | None = "ready") -> Iterator[Program]:
        """Run another program on a host for the block, from when it says that it is *ready*."""
        program = self.program(place, argv, f"{place}-{FilePath(argv[0]).name}-{time.monotonic_ns()}")
        try:
            program.start()
            if ready is not None:
                program.wait_for(ready)
            yield program
        finally:
            program.end()

    def start(self, *places: Place) -> None:
        """Start programs, all of them if none is named, and wait until they are ready."""
        chosen = [self.programs[place] for place in places] or [*self.further_gateways, *self.programs.values()]
        for program in chosen:
            program.start()
        for program in chosen:
            program.wait_for("ready")


def _each(option: str, values: Sequence[str]) -> list[str]:
    return [word for value in values for word in (option, value)]
