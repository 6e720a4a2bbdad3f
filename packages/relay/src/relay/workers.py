"""Several processes that share the listening sockets of one relay: the one that starts them, and what makes a worker.

The first process listens, carries nothing, and answers for all. Each worker runs the same command line, with what is
its own in an environment variable: the sockets, its share of the connections, and a socket on which it tells its
counters, and by whose end it learns that the first process is gone.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import trio
from enlink.errors import ConfigError, SystemFailure
from enlink.program import log_event
from enlink.supervise import Backoff, Stopping

from relay.config import RelayConfig
from relay.service import Relay

_VARIABLE: Final = "ENG_RELAY_WORKER"

# Choices of ours.
_REPORT_EVERY_S: Final = 0.5
_REPORT_LIMIT_BYTES: Final = 1 << 20
_PROVEN_S: Final = 10.0  # a worker that lived so long may be replaced without delay
_KILL_AFTER_S: Final = 1.0  # for a worker that has been told twice

_logger = logging.getLogger(__name__)
Report = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Share:
    """What makes a process a worker: descriptors that it inherits, and which of the workers it is, from 0."""

    number: int
    control: int
    listeners: list[list[int]]

    def of(self, config: RelayConfig) -> RelayConfig:
        """Return this worker's part of *config*: its connections are whole and add up.

        Raises:
            ConfigError: the sockets are those of another configuration.
        """
        if len(self.listeners) != len(config.bridges):
            raise ConfigError("the configuration file has changed: restart the relay to use it")

        def part(count: int) -> int:
            return count // config.workers + (self.number < count % config.workers)

        bridges = (replace(bridge, max_connections=part(bridge.max_connections)) for bridge in config.bridges)
        return replace(config, bridges=tuple(bridges), workers=1)

    def sockets(self) -> list[list[socket.socket]]:
        """Take the listening sockets."""
        sockets = [[socket.socket(fileno=descriptor) for descriptor in bridge] for bridge in self.listeners]
        for sock in (sock for bridge in sockets for sock in bridge):
            sock.setblocking(False)
        return sockets

    async def report(self, relay: Relay, stopping: Stopping) -> None:
        """Tell the first process what *relay* counts, until cancelled; wish to stop when that process is gone."""
        with socket.socket(fileno=self.control) as sock:
            sock.setblocking(False)
            control = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
            async with trio.open_nursery() as nursery:

                async def notice_the_end() -> None:
                    await control.receive_some(1)
                    stopping.set("the first process is gone")

                nursery.start_soon(notice_the_end)
                told = None
                while True:
                    report = relay.snapshot()
                    if report != told:
                        told = report
                        await control.send_all(json.dumps(report).encode() + b"\n")
                    await trio.sleep(_REPORT_EVERY_S)


def own_share() -> Share | None:
    """Return what makes this process a worker; None if it is none."""
    text = os.environ.pop(_VARIABLE, None)
    return None if text is None else Share(**json.loads(text))


class Workers:
    """The workers of a relay, over sockets that listen already. A worker that dies is replaced."""

    def __init__(self, config: RelayConfig, listeners: Sequence[Sequence[socket.socket]]) -> None:
        self._config = config
        self._listeners = listeners
        self._reports: list[Report | None] = [None] * config.workers
        self._retired: Report = {}
        self._pids: list[int | None] = [None] * config.workers
        self._are_there = trio.Event()
        self._replaced = 0

    def snapshot(self) -> Report:
        """Return the sum of all that workers have counted, those that have ended included."""
        document = self._retired
        for report in self._reports:
            document = added(document, report or {})
        return {**document, "workers": {"pids": list(self._pids), "replaced": self._replaced}}

    async def wait_until_ready(self) -> None:
        """Wait until every worker accepts connections."""
        await self._are_there.wait()

    async def run(self, stopping: Stopping) -> None:
        """Keep the workers running until the wish to stop, then until they have ended. Closes the sockets here.

        Raises:
            SystemFailure: a worker ended before all of them were ready.
        """
        async with trio.open_nursery() as nursery:
            for number in range(self._config.workers):
                nursery.start_soon(self._keep_running, number, stopping)
            await stopping.wait()
            for sock in (sock for bridge in self._listeners for sock in bridge):
                sock.close()

    async def _keep_running(self, number: int, stopping: Stopping) -> None:
        backoff = Backoff()
        while True:
            began_s = trio.current_time()
            code = await self._run_one(number, stopping)
            if stopping.is_set:
                return
            if not self._are_there.is_set():
                raise SystemFailure(f"worker {number} ended with exit code {code} before it was ready: it says why")
            self._replaced += 1
            log_event(_logger, "worker_ended", logging.WARNING, number=number, exit_code=code)
            if trio.current_time() - began_s >= _PROVEN_S:
                backoff.reset()
            with trio.move_on_after(backoff.next_delay_s()):
                await stopping.wait()
                return

    async def _run_one(self, number: int, stopping: Stopping) -> int:
        near, far = trio.socket.socketpair()
        listeners = [[sock.fileno() for sock in bridge] for bridge in self._listeners]
        with near:
            with far:
                share = Share(number, far.fileno(), listeners)
                process = await trio.lowlevel.open_process(
                    [sys.executable, *sys.orig_argv[1:]],
                    env={**os.environ, _VARIABLE: json.dumps(asdict(share))},
                    pass_fds=[far.fileno(), *(descriptor for bridge in listeners for descriptor in bridge)],
                    start_new_session=True,  # a terminal's signals are for the first process, which passes them on
                )
            self._pids[number] = process.pid
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_pass_on, stopping, process)
                    await self._listen_to(number, trio.SocketStream(near))
                    await process.wait()
                    nursery.cancel_scope.cancel()
            finally:
                if process.returncode is None:
                    process.terminate()  # this process was told to end at once
                    with trio.move_on_after(_KILL_AFTER_S, shield=True):
                        await process.wait()
                    process.kill()
                self._retire(number)
        return process.returncode or 0

    async def _listen_to(self, number: int, control: trio.SocketStream) -> None:
        """Keep what a worker reports, until it ends."""
        buffer = b""
        while data := await control.receive_some(_REPORT_LIMIT_BYTES):
            *lines, buffer = (buffer + data).split(b"\n")
            if lines:
                self._reports[number] = json.loads(lines[-1])
                if None not in self._reports:
                    self._are_there.set()

    def _retire(self, number: int) -> None:
        self._retired = added(self._retired, _without_present(self._reports[number] or {}))
        self._reports[number] = None
        self._pids[number] = None


async def _pass_on(stopping: Stopping, process: trio.Process) -> None:
    await stopping.wait()
    process.terminate()


def added(one: Mapping[str, Any], other: Mapping[str, Any]) -> Report:
    """Add two status documents of one shape, in which anything may be missing: numbers add up, texts are the same."""
    result = dict(one)
    for name, value in other.items():
        there = result.get(name)
        if isinstance(value, Mapping):
            result[name] = added(there or {}, value)
        elif isinstance(value, list):
            result[name] = [added(*pair) for pair in zip(there or [{}] * len(value), value, strict=True)]
        elif isinstance(value, int):
            result[name] = (there or 0) + value
        else:
            result[name] = value
    return result


def _without_present(report: Report) -> Report:
    """What a worker that has ended leaves to count: nothing that it has, only what it has done."""
    bridges = [{**bridge, "active": 0, "max_concurrent_connections": 0} for bridge in report.get("bridges", [])]
    return {**report, "bridges": bridges} if bridges else report
