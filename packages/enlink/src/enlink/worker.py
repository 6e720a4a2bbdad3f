"""Processes that work for another one: how the first starts, hears and ends them, and what each of them does for that.

A worker runs the command line of the first process. What is its own lies in a file in memory that it inherits, together
with a socket on which it reports, and learns what the first process wishes and that it is gone. A signal may reach a
worker too, since systemd's go to all processes of a unit. What a worker is to do is its program's affair.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from operator import index
from typing import Any, Final

import trio

from enlink.errors import ConfigError
from enlink.supervise import Backoff, Stopping

# Wishes that every worker knows. A program may have more, each of one byte.
END_IN_GOOD_ORDER: Final = b"e"
END_AT_ONCE: Final = b"!"

# Choices of ours.
_REPORT_EVERY_S: Final = 0.5
_RECEIVED_AT_ONCE_BYTES: Final = 1 << 20
_PROVEN_S: Final = 10.0  # a worker that lived so long may be replaced without delay
_KILL_AFTER_S: Final = 1.0  # for a worker that is to end at once, and for the kernel to end it
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

Report = dict[str, Any]


class WorkerProcess:
    """A process that works for this one, with the same command line.

    Args:
        variable: names the environment variable that tells it what it is.
        share: what is its own, in values that JSON has; the name ``control`` is taken.
        descriptors: what it inherits, under the same numbers. They need to be open only until it runs.
        hear: is called with what it reports, in a task of `run`; of reports that come together, with the newest.

    Attributes:
        pid: its process id, while it runs.
        has_started: set once it has inherited what it inherits, or could not be started.
    """

    def __init__(
        self,
        variable: str,
        share: Mapping[str, object],
        descriptors: Sequence[int],
        hear: Callable[[Report], None],
    ) -> None:
        self.pid: int | None = None
        self.has_started = trio.Event()
        self._variable = variable
        self._share = share
        self._descriptors = descriptors
        self._hear = hear
        self._control: socket.socket | None = None
        self._untold = b""

    def tell(self, wish: bytes) -> None:
        """Send a wish of one byte, without waiting: before the start too. One that has ended takes no notice.

        A worker that has left hundreds unread does not get to know more.
        """
        if self._control is None:
            self._untold += wish
        else:
            with suppress(OSError):
                self._control.send(wish)

    async def run(self) -> int:
        """Start the process and hear it until it has ended; to be called once.

        Returns its exit code, or the negative number of the signal that ended it.

        Cancelled, it wishes an end at once, and kills the process where that takes longer than a second. However it
        returns, it leaves no process and no descriptor.

        Raises:
            OSError: the system has no room for another process.
        """
        near, far = socket.socketpair()
        with near:
            control = trio.SocketStream(trio.socket.from_stdlib_socket(near))
            self._control = near
            self.tell(self._untold)
            try:
                with far:
                    process = await self._start(far.fileno())
            finally:
                self.has_started.set()
            self.pid = process.pid
            try:
                await self._listen(control)
                return await process.wait()
            finally:
                if process.returncode is None:
                    await self._end(process)
                self.pid = None

    async def _start(self, control: int) -> trio.Process:
        with os.fdopen(os.memfd_create(self._variable), "w") as share:
            json.dump({**self._share, "control": control}, share)
            share.flush()
            return await trio.lowlevel.open_process(
                [sys.executable, *sys.orig_argv[1:]],
                env={**os.environ, self._variable: str(share.fileno())},
                pass_fds=[control, share.fileno(), *self._descriptors],
                start_new_session=True,  # a terminal's signals are for the first process, which passes them on
            )

    async def _listen(self, control: trio.SocketStream) -> None:
        """Pass on what it reports, until it ends."""
        buffer = b""
        with suppress(trio.BrokenResourceError):  # it has ended without listening to the last wish
            while data := await control.receive_some(_RECEIVED_AT_ONCE_BYTES):
                *lines, buffer = (buffer + data).split(b"\n")
                if lines:
                    self._hear(json.loads(lines[-1]))

    async def _end(self, process: trio.Process) -> None:
        self.tell(END_AT_ONCE)
        with trio.move_on_after(_KILL_AFTER_S, shield=True):
            await process.wait()
        if process.returncode is None:
            process.kill()
            with trio.move_on_after(_KILL_AFTER_S, shield=True):
                await process.wait()


async def keep_running(
    make: Callable[[], WorkerProcess], stopping: Stopping, ended: Callable[[int | OSError], None]
) -> None:
    """Run a worker, and another one whenever it has ended, until the wish to stop; then until it ends in good order.

    Between one and the next lies a delay that grows, as `enlink.supervise.Backoff` says, unless the last one has proved
    good by living for ten seconds.

    Args:
        make: makes the next one.
        ended: is called with the exit code of each, the last one included, or with why the system could not start it.
            What it raises ends the loop.
    """
    backoff = Backoff()
    while not stopping.is_set:
        began_s = trio.current_time()
        worker = make()
        end: int | OSError
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_pass_on, stopping, worker)
            try:
                end = await worker.run()
            except OSError as error:  # no room for another process: there may be some later
                end = error
            nursery.cancel_scope.cancel()
        ended(end)
        if trio.current_time() - began_s >= _PROVEN_S:
            backoff.reset()
        with trio.move_on_after(backoff.next_delay_s()):
            await stopping.wait()


async def _pass_on(stopping: Stopping, worker: WorkerProcess) -> None:
    await stopping.wait()
    worker.tell(END_IN_GOOD_ORDER)


class Assignment:
    """What makes this process a worker. Made by `own_assignment`.

    Attributes:
        share: what is its own, as the first process has given it.
    """

    def __init__(self, share: Report, control: int) -> None:
        self.share = share
        self._control = control
        self._is_due = trio.Event()

    def report_now(self) -> None:
        """Let `serve` look at once whether there is something new to report."""
        self._is_due.set()

    async def serve(
        self,
        snapshot: Callable[[], Mapping[str, object]],
        heed: Callable[[bytes], None],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Report to the first process and hear it, until cancelled; to be called once, in the main thread.

        It is ready when signals are handled: SIGTERM and SIGINT, however many, ask for an end in good order, since
        whoever wants one at once tells the first process; SIGHUP is ignored.

        Args:
            snapshot: is asked every half a second, and after `report_now`. What is new since the last time is sent.
            heed: is called with each wish, and with ``b""`` when the first process is gone.
        """
        with socket.socket(fileno=self._control) as sock, trio.open_signal_receiver(*_SIGNALS) as signals:
            control = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._report, snapshot, control)
                nursery.start_soon(_heed_wishes, heed, control)
                task_status.started()
                async for number in signals:
                    if number != signal.SIGHUP:
                        heed(END_IN_GOOD_ORDER)

    async def _report(self, snapshot: Callable[[], Mapping[str, object]], control: trio.SocketStream) -> None:
        told = None
        with suppress(trio.BrokenResourceError):  # the first process is gone, and the work may go on for a while
            while True:
                self._is_due = trio.Event()  # before the look: what happens while this is sent is not missed
                report = json.dumps(snapshot()).encode() + b"\n"
                if report != told:
                    told = report
                    await control.send_all(report)
                with trio.move_on_after(_REPORT_EVERY_S):
                    await self._is_due.wait()


async def _heed_wishes(heed: Callable[[bytes], None], control: trio.SocketStream) -> None:
    with suppress(trio.BrokenResourceError):
        while wishes := await control.receive_some():
            for wish in wishes:
                heed(bytes([wish]))
    heed(b"")


def own_assignment(variable: str) -> Assignment | None:
    """Return what makes this process a worker, None if it is none. Its children are none: the variable is taken away.

    Raises:
        ConfigError: somebody else has set the variable.
    """
    text = os.environ.pop(variable, None)
    if text is None:
        return None
    try:
        descriptor = int(text)
        share = json.loads(os.pread(descriptor, os.fstat(descriptor).st_size, 0))
        control = socket.socket(fileno=index(share.pop("control"))).detach()  # which fails unless it is one
        os.close(descriptor)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError, OSError) as error:
        raise ConfigError(f"{variable}={text!r} is no share of this program's work: unset it") from error
    return Assignment(share, control)


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
