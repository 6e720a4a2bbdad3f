"""Several processes that share the listening sockets of one relay: what each of them has, and what they are together.

The first process listens, carries nothing, and answers for all. Each worker gets the sockets, its share of the
connections, and the configuration file as the first process has read it. How they talk is in `enlink.worker`.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Final

import trio
from enlink.errors import ConfigError, SystemFailure
from enlink.program import log_event
from enlink.supervise import Stopping
from enlink.worker import END_AT_ONCE, Assignment, Report, WorkerProcess, added, keep_running, own_assignment

from relay.config import RelayConfig
from relay.service import Relay

_VARIABLE: Final = "ENG_RELAY_WORKER"

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Share:
    """What is a worker's own: which of the workers it is, from 0, and descriptors that it inherits.

    Attributes:
        file: the text of the configuration file, if there is one. It may say something else by now.
    """

    number: int
    listeners: list[list[int]]
    file: str | None = None

    def of(self, config: RelayConfig) -> RelayConfig:
        """Return this worker's part of *config*: its connections are whole and add up."""

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


def own_share() -> tuple[Share, Assignment] | None:
    """Return what makes this process a worker; None if it is none.

    Raises:
        ConfigError: something else than a relay has set the variable that tells.
    """
    text = os.environ.get(_VARIABLE)
    try:
        assignment = own_assignment(_VARIABLE)
        return (Share(**assignment.share), assignment) if assignment else None
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"{_VARIABLE}={text!r} is no share of a relay's work: unset it") from error


async def work(relay: Relay, share: Share, assignment: Assignment) -> None:
    """Carry connections, and tell the first process what *relay* counts, until it wishes an end or is gone."""
    stopping = Stopping()
    async with trio.open_nursery() as nursery:

        def heed(wish: bytes) -> None:
            stopping.set("the first process wishes it" if wish else "the first process is gone")
            if wish == END_AT_ONCE:
                nursery.cancel_scope.cancel()

        nursery.start_soon(assignment.serve, relay.snapshot, heed)
        await relay.run(share.sockets(), stopping)
        nursery.cancel_scope.cancel()


class Workers:
    """The workers of a relay, over sockets that listen already. A worker that dies is replaced.

    Args:
        file: the text of the configuration file, if there is one.
    """

    def __init__(self, config: RelayConfig, file: str | None, listeners: Sequence[Sequence[socket.socket]]) -> None:
        self._config = config
        self._file = file
        self._listeners = listeners
        self._processes: list[WorkerProcess | None] = [None] * config.workers
        self._reports: list[Report | None] = [None] * config.workers
        self._retired: Report = {}
        self._are_there = trio.Event()
        self._replaced = 0

    def snapshot(self) -> Report:
        """Return the sum of all that workers have counted, those that have ended included."""
        document = self._retired
        for report in self._reports:
            document = added(document, report or {})
        pids = [process and process.pid for process in self._processes]
        return {**document, "workers": {"pids": pids, "replaced": self._replaced}}

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
                make, ended = partial(self._make, number), partial(self._ended, number, stopping)
                nursery.start_soon(keep_running, make, stopping, ended)
            await stopping.wait()
            for process in filter(None, self._processes):
                await process.has_started.wait()  # it inherits them
            for sock in (sock for bridge in self._listeners for sock in bridge):
                sock.close()

    def _make(self, number: int) -> WorkerProcess:
        listeners = [[sock.fileno() for sock in bridge] for bridge in self._listeners]
        share = Share(number, listeners, self._file)
        inherited = [descriptor for bridge in listeners for descriptor in bridge]
        process = WorkerProcess(_VARIABLE, asdict(share), inherited, partial(self._hear, number))
        self._processes[number] = process
        return process

    def _hear(self, number: int, report: Report) -> None:
        self._reports[number] = report
        if None not in self._reports:
            self._are_there.set()

    def _ended(self, number: int, stopping: Stopping, end: int | OSError) -> None:
        self._retired = added(self._retired, _without_present(self._reports[number] or {}))
        self._reports[number] = None
        if stopping.is_set:
            return
        if not self._are_there.is_set():
            if isinstance(end, OSError):
                raise SystemFailure(f"worker {number} could not be started ({end}): start the relay again") from end
            raise SystemFailure(f"worker {number} ended with exit code {end} before it was ready: it says why")
        if isinstance(end, OSError):
            log_event(_logger, "worker_not_started", logging.WARNING, number=number, error=end)
            return
        self._replaced += 1
        log_event(_logger, "worker_ended", logging.WARNING, number=number, exit_code=end)


def _without_present(report: Report) -> Report:
    """What a worker that has ended leaves to count: nothing that it has, only what it has done."""
    bridges = [{**bridge, "active": 0, "max_concurrent_connections": 0} for bridge in report.get("bridges", [])]
    return {**report, "bridges": bridges} if bridges else report
