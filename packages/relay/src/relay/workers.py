"""Several processes that share the listening sockets of one relay: the one that starts them, and what makes a worker.

The first process listens, carries nothing, and answers for all. Each worker runs the same command line, with what is
its own in a file that it inherits: the sockets, its share of the connections, the configuration file as the first
process has read it, and a socket on which it tells its counters, and learns what the first process wishes and that it
is gone. A signal may reach a worker too, since systemd's go to all processes of a unit; that is no wish of its own.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
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
_KILL_AFTER_S: Final = 1.0  # for a worker that is to end at once
_END_IN_GOOD_ORDER: Final = b"e"
_END_AT_ONCE: Final = b"!"
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

_logger = logging.getLogger(__name__)
Report = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Share:
    """What makes a process a worker: descriptors that it inherits, and which of the workers it is, from 0.

    Attributes:
        file: the text of the configuration file, if there is one. It may say something else by now.
    """

    number: int
    control: int
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

    async def work(self, relay: Relay) -> None:
        """Carry connections, and tell the first process what *relay* counts, until it wishes an end or is gone."""
        stopping = Stopping()
        with socket.socket(fileno=self.control) as sock, trio.open_signal_receiver(*_SIGNALS) as signals:
            sock.setblocking(False)
            control = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
            async with trio.open_nursery() as nursery:

                async def heed_signals() -> None:
                    async for number in signals:
                        if number != signal.SIGHUP:
                            # However many: whoever wants an end at once tells the first process.
                            stopping.set(signal.Signals(number).name)

                async def heed_wishes() -> None:
                    with suppress(trio.BrokenResourceError):
                        while wishes := await control.receive_some(2):
                            stopping.set("the first process wishes it")
                            if _END_AT_ONCE in wishes:
                                nursery.cancel_scope.cancel()
                    stopping.set("the first process is gone")

                nursery.start_soon(heed_signals)
                nursery.start_soon(heed_wishes)
                nursery.start_soon(_report, relay, control)
                await relay.run(self.sockets(), stopping)
                nursery.cancel_scope.cancel()


async def _report(relay: Relay, control: trio.SocketStream) -> None:
    told = None
    with suppress(trio.BrokenResourceError):  # the first process is gone, and connections may go on for a while
        while True:
            report = relay.snapshot()
            if report != told:
                told = report
                await control.send_all(json.dumps(report).encode() + b"\n")
            await trio.sleep(_REPORT_EVERY_S)


def own_share() -> Share | None:
    """Return what makes this process a worker; None if it is none.

    Raises:
        ConfigError: something else than a relay has set the variable that tells.
    """
    text = os.environ.pop(_VARIABLE, None)
    if text is None:
        return None
    try:
        descriptor = int(text)
        share = Share(**json.loads(os.pread(descriptor, os.fstat(descriptor).st_size, 0)))
        os.close(descriptor)
    except (ValueError, TypeError, OSError) as error:
        raise ConfigError(f"{_VARIABLE}={text!r} is no share of a relay's work: unset it") from error
    return share


class Workers:
    """The workers of a relay, over sockets that listen already. A worker that dies is replaced.

    Args:
        file: the text of the configuration file, if there is one.
    """

    def __init__(self, config: RelayConfig, file: str | None, listeners: Sequence[Sequence[socket.socket]]) -> None:
        self._config = config
        self._file = file
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
            with far, os.fdopen(os.memfd_create(_VARIABLE), "w") as share:
                json.dump(asdict(Share(number, far.fileno(), listeners, self._file)), share)
                share.flush()
                inherited = [far.fileno(), share.fileno(), *(each for bridge in listeners for each in bridge)]
                process = await trio.lowlevel.open_process(
                    [sys.executable, *sys.orig_argv[1:]],
                    env={**os.environ, _VARIABLE: str(share.fileno())},
                    pass_fds=inherited,
                    start_new_session=True,  # a terminal's signals are for the first process, which passes them on
                )
            self._pids[number] = process.pid
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_pass_on, stopping, near)
                    await self._listen_to(number, trio.SocketStream(near))
                    await process.wait()
                    nursery.cancel_scope.cancel()
            finally:
                if process.returncode is None:  # this process was told to end at once
                    with trio.move_on_after(_KILL_AFTER_S, shield=True), suppress(OSError):
                        await near.send(_END_AT_ONCE)
                        await process.wait()
                    process.kill()
                self._retire(number)
        return process.returncode or 0

    async def _listen_to(self, number: int, control: trio.SocketStream) -> None:
        """Keep what a worker reports, until it ends."""
        buffer = b""
        with suppress(trio.BrokenResourceError):  # it has ended without listening to the last wish
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


async def _pass_on(stopping: Stopping, control: trio.socket.SocketType) -> None:
    await stopping.wait()
    with suppress(OSError):  # it has ended by itself
        await control.send(_END_IN_GOOD_ORDER)


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
