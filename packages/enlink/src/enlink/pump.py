"""The data plane's event loop: calls plain functions when descriptors are ready, without waking a trio task for each.

trio owns everything that waits for people, peers and time. Moving bytes is another matter: a trio task that waits for
a descriptor costs an ``epoll_ctl``, a round of the scheduler and a step of a coroutine for every wake-up, which is
more than what a small packet costs otherwise. So while trio has nothing to do, its thread waits here, on an epoll
instance of our own in which trio's is one descriptor among others: traffic goes from callback to callback, and trio
gets its turn as soon as a timer, a socket or a thread of its own wants it. All of it is one thread, so that callbacks
and tasks share state without locks. What moves is the callers' business: see link.py, and the relay.
"""

from __future__ import annotations

import logging
import select
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from time import monotonic
from typing import Final

import outcome
import trio

from enlink.spin import Poll, Spin

# Choices of ours.
_EVENTS_A_ROUND: Final = 64  # descriptors that get their turn before trio is looked at again

_READABLE: Final = select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR | select.EPOLLRDHUP
_WRITABLE: Final = select.EPOLLOUT | select.EPOLLHUP | select.EPOLLERR

_logger = logging.getLogger(__name__)

Callback = Callable[[], object]
_current: trio.lowlevel.RunVar[Pump] = trio.lowlevel.RunVar("enlink.pump")


class Pump(trio.abc.Instrument):
    """The event loop of one trio run; `current_pump` makes it when it is first asked for.

    Level-triggered: a callback that leaves something behind is called again. Callbacks run in trio's thread while no
    task does. They must neither block nor raise, and wake tasks only by `wake`; `while_readable` does all that.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._readers: dict[int, Callback] = {}
        self._writers: dict[int, Callback] = {}
        self._interrupts: dict[int, Callable[[], None]] = {}
        self._server: trio.lowlevel.Task | None = None
        self._spin: Spin | None = None
        self._token = trio.lowlevel.current_trio_token()
        self._trio_epoll = _descriptor_of_trio()
        if self._trio_epoll is not None:
            self._epoll.register(self._trio_epoll, select.EPOLLIN)

    def spin(self, limit_s: float) -> None:
        """After traffic, look for more for so long before sleeping; 0: sleep at once. See spin.py.

        Of no effect, but for a warning, where trio's own epoll is not to be found.
        """
        self._spin = Spin(self._epoll.poll, limit_s) if limit_s and self._trio_epoll is not None else None
        if limit_s and self._spin is None:
            why = "this trio waits in a way that is not known here: --spin does nothing"
            _logger.warning("spin_unavailable", extra={"fields": {"error": why}})

    def spin_counts(self) -> Mapping[str, int]:
        """Tell for ``status`` how often spinning has found something, and how often not; nothing where it is off."""
        return {"found": self._spin.found, "missed": self._spin.missed} if self._spin else {}

    def on_readable(self, descriptor: int, callback: Callback | None) -> None:
        """Call *callback* whenever *descriptor* can be read, or has ended or failed; None: not any more."""
        self._set(self._readers, descriptor, callback)

    def on_writable(self, descriptor: int, callback: Callback | None) -> None:
        """Call *callback* whenever *descriptor* can be written, or has failed; None: not any more."""
        self._set(self._writers, descriptor, callback)

    def forget(self, descriptor: int) -> None:
        """Call nobody about *descriptor* any more. Before it is closed: its number may soon be somebody else's.

        A task that waits in `while_readable` gets trio.ClosedResourceError.
        """
        if interrupt := self._interrupts.get(descriptor):
            interrupt()
        self.on_readable(descriptor, None)
        self.on_writable(descriptor, None)

    def wake(self, task: trio.lowlevel.Task, result: outcome.Outcome[object]) -> None:
        """Let *task* go on from `trio.lowlevel.wait_task_rescheduled` with *result*. For callbacks."""
        self._token.run_sync_soon(trio.lowlevel.reschedule, task, result)

    async def wait_while_readable(self, descriptor: int, step: Callable[[], bool]) -> None:
        """Do the work of `while_readable`."""
        await trio.lowlevel.checkpoint_if_cancelled()
        if descriptor in self._readers:
            raise trio.BusyResourceError(f"another task waits for descriptor {descriptor}")
        waiting = _Waiting(self, descriptor, step)
        self.on_readable(descriptor, waiting.on_readable)
        self._interrupts[descriptor] = waiting.interrupt
        await trio.lowlevel.wait_task_rescheduled(waiting.abort)

    def stop_waiting(self, descriptor: int) -> None:
        """Call no task any more that waits for *descriptor*."""
        self.on_readable(descriptor, None)
        self._interrupts.pop(descriptor, None)

    def before_io_wait(self, timeout: float) -> None:
        """Move bytes until trio's turn comes: for *timeout* seconds, or until something of its own is ready."""
        if not self._readers and not self._writers:
            return
        readers, writers, trio_epoll = self._readers, self._writers, self._trio_epoll
        wait: Poll = self._epoll.poll
        until = monotonic() + timeout
        left = timeout
        while True:
            events = wait(left, _EVENTS_A_ROUND)
            is_trios_turn = timeout <= 0
            for descriptor, flags in events:
                if descriptor == trio_epoll:
                    is_trios_turn = True
                    continue
                # A callback before this one may have unset either.
                try:
                    if flags & _READABLE and (callback := readers.get(descriptor)):
                        callback()
                    if flags & _WRITABLE and (callback := writers.get(descriptor)):
                        callback()
                except BaseException as error:
                    if self._server is None:
                        raise
                    # Of an instrument trio would only log it, and call us no more.
                    self.wake(self._server, outcome.Error(error))
                    self._server = None
                    return
            if is_trios_turn:
                return
            left = until - monotonic()
            if left <= 0:
                # trio is about to wait for as long as it told us, and that time has passed.
                self._token.run_sync_soon(_nothing, idempotent=True)
                return
            if self._spin is not None:
                wait = self._spin.wait

    async def serve(self) -> None:
        """Be there until trio's run ends: a system task. Without trio's own epoll, wait for ours as a task does.

        Raises:
            BaseException: what a callback raised, which must not. It ends the run.
        """
        try:
            if self._trio_epoll is not None:
                self._server = trio.lowlevel.current_task()
                trio.lowlevel.add_instrument(self)
                await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.SUCCEEDED)
            while True:
                await trio.lowlevel.wait_readable(self._epoll.fileno())
                self.before_io_wait(0)
        finally:
            if self._trio_epoll is not None:
                with suppress(KeyError):
                    trio.lowlevel.remove_instrument(self)
            self._epoll.close()

    def _set(self, callbacks: dict[int, Callback], descriptor: int, callback: Callback | None) -> None:
        was_known = descriptor in self._readers or descriptor in self._writers
        if callback is None:
            callbacks.pop(descriptor, None)
        else:
            callbacks[descriptor] = callback
        mask = select.EPOLLIN if descriptor in self._readers else 0
        mask |= select.EPOLLOUT if descriptor in self._writers else 0
        if not was_known and mask:
            self._epoll.register(descriptor, mask)
        elif was_known and mask:
            self._epoll.modify(descriptor, mask)
        elif was_known:
            # The kernel forgets a descriptor by itself when it is closed.
            with suppress(OSError):
                self._epoll.unregister(descriptor)


class _Waiting:
    """A task that waits while *step* takes what can be read. Hundreds do: four functions would take a kilobyte."""

    __slots__ = ("_descriptor", "_is_over", "_pump", "_step", "_task")

    def __init__(self, pump: Pump, descriptor: int, step: Callable[[], bool]) -> None:
        self._pump, self._descriptor, self._step = pump, descriptor, step
        self._task = trio.lowlevel.current_task()
        self._is_over = False

    def on_readable(self) -> None:
        try:
            if not self._step():
                self._finish(outcome.Value(None))
        except BaseException as error:  # noqa: BLE001  # it is raised where it belongs: in the task that waits
            self._finish(outcome.Error(error))

    def interrupt(self) -> None:
        self._finish(outcome.Error(trio.ClosedResourceError("closed meanwhile")))

    def abort(self, _: object) -> trio.lowlevel.Abort:
        if self._is_over:
            return trio.lowlevel.Abort.FAILED
        self._pump.stop_waiting(self._descriptor)
        return trio.lowlevel.Abort.SUCCEEDED

    def _finish(self, result: outcome.Outcome[object]) -> None:
        self._is_over = True
        self._pump.stop_waiting(self._descriptor)
        self._pump.wake(self._task, result)


def current_pump() -> Pump:
    """Return the pump of this trio run."""
    try:
        return _current.get()
    except LookupError:
        pump = Pump()
        _current.set(pump)
        trio.lowlevel.spawn_system_task(pump.serve)
        return pump


def while_readable(descriptor: int, step: Callable[[], bool]) -> Awaitable[None]:
    """Call *step* each time *descriptor* can be read, until it returns False or raises; what it raises is raised here.

    *step* runs while no task does: it must not block. It should take a bounded amount, and is called again for the
    rest. Cancellation happens between two steps.

    Raises:
        trio.BusyResourceError: another task waits for the same descriptor.
        trio.ClosedResourceError: `Pump.forget` was called.
    """
    return current_pump().wait_while_readable(descriptor, step)


def _descriptor_of_trio() -> int | None:
    """Find the epoll instance on which trio waits; None where there is none to be found, as in another version.

    There is no public way to it. With a public one (guest mode) trio waits in a thread of its own, which makes every
    wake-up of a task dearer. Without it, all works as before and is slower: see `Pump.serve`.
    """
    try:
        from trio._core._run import GLOBAL_RUN_CONTEXT, SystemClock

        runner = GLOBAL_RUN_CONTEXT.runner
        descriptor: object = runner.io_manager._epoll.fileno()  # noqa: SLF001
    except (ImportError, AttributeError):
        return None
    # A test's clock jumps when trio itself has waited for nothing, and must see it wait.
    return descriptor if isinstance(descriptor, int) and isinstance(runner.clock, SystemClock) else None


def _nothing() -> None:
    """Make trio look at the time."""
