"""An agent's lanes to several gateways: a process and a queue of the device for each. What one does is in lane.py.

The first process has changed the host and answers for all. It holds every queue and carries nothing. Queues whose
gateway cannot be reached, or says that the path ends there, or whose worker hangs, it leaves out of the kernel's
choice: their connections go on through the others. A worker runs the same command line, and inherits what is its own.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final, NoReturn

import trio
from enlink.attested import prepare
from enlink.errors import ConfigError, SystemFailure
from enlink.program import RateLimitedLog
from enlink.stream import Dialer
from enlink.supervise import Stopping
from enlink.worker import Assignment, Report, WorkerProcess, added, keep_running

from enta.config import AgentConfig
from enta.lane import Lane, look_up
from enta.tun import Tun

LANE_VARIABLE: Final = "ENG_ENTA_LANE"

_CAPTURE: Final = b"c"  # a wish: the rules are in place, deliver what comes

# Choices of ours.
_SILENT_S: Final = 3.0  # six reports that did not come: the worker hangs, or is stopped
_PAUSE_S: Final = 0.1  # between two choices of queues, however often gateways change their minds

_logger = logging.getLogger(__name__)


class Lanes:
    """The lanes of an agent with several gateways. A worker that dies is replaced.

    Raises:
        ConfigError: the policy cannot be read.
    """

    def __init__(self, config: AgentConfig) -> None:
        self._lanes = [_LaneAtWork(config, number) for number in range(len(config.gateways))]
        self._policy = _read_policy(config)
        self._is_up = trio.Event()
        self._has_changed = trio.Event()

    def snapshot(self) -> Mapping[str, Any]:
        """Describe the lanes for ``status``: what they have counted together, and the link of each."""
        counted: Report = {"spin": {}, "counters": {}}
        for lane in self._lanes:
            counted = added(counted, lane.counted())
        progress = max(lane.progress for lane in self._lanes)
        return {
            "uplink": {"up": progress > 0, "path": "open" if progress > 1 else "closed"},
            "lanes": [lane.snapshot() for lane in self._lanes],
            **counted,
        }

    async def resolve(self) -> None:
        """Learn the gateways' addresses before the guard goes up: see `look_up`."""
        async with trio.open_nursery() as nursery:
            for lane in self._lanes:
                nursery.start_soon(look_up, lane.dialer)

    async def wait_until_up(self) -> None:
        """Wait until one of the gateways has answered for the first time."""
        await self._is_up.wait()

    def capture(self) -> None:
        """Have every lane deliver what its gateway sends: see `Lane.capture`."""
        for lane in self._lanes:
            lane.capture()

    async def carry(self, tun: Tun) -> NoReturn:
        """Keep a worker running for each gateway until cancelled; they end with this.

        Raises:
            SystemFailure: a worker could not begin to work, and no gateway has been reached yet.
            TunGone: the device was deleted.
            CannotCreate: the kernel refuses a queue.
        """
        with ExitStack() as stack:
            # The file may say something else by the time a worker is replaced.
            policy = stack.enter_context(_in_memory(self._policy)) if self._policy is not None else None
            for number, lane in enumerate(self._lanes):
                lane.queue = stack.enter_context(tun.open_queue()) if number else tun
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._choose_queues)
                for lane in self._lanes:
                    make = partial(lane.make, policy, self._note_change)
                    nursery.start_soon(keep_running, make, Stopping(), partial(self._note_end, lane, tun))
        raise AssertionError("unreachable: its tasks end by exceptions only")

    async def _choose_queues(self) -> NoReturn:
        """Leave the traffic to those lanes that have come farthest: to the other agent, or else to a gateway.

        Each report is an occasion, so a lane without any is noticed as long as another one has some.
        """
        while True:
            await self._has_changed.wait()
            self._has_changed = trio.Event()
            progress = {lane: lane.progress for lane in self._lanes}  # once, since time alone may change it
            farthest = max(progress.values())
            if farthest:
                self._is_up.set()
            # Those that come are first, so that the device is never without a queue.
            for lane in sorted(self._lanes, key=lambda lane: -progress[lane]):
                lane.use(is_used=progress[lane] == farthest)
            await trio.sleep(_PAUSE_S)

    def _note_end(self, lane: _LaneAtWork, tun: Tun, end: int | OSError) -> None:
        lane.retire()
        self._note_change()
        tun.tx_dropped()  # where the device is gone, another worker would fare no better
        has_begun = lane.has_reported or self._is_up.is_set()
        if isinstance(end, OSError):
            if not has_begun:
                raise SystemFailure(f"the lane to {lane.gateway} could not be started ({end}): start the agent again")
            lane.limited.log("lane_not_started", "system", gateway=lane.gateway, error=end)
        else:
            if not has_begun:
                raise SystemFailure(f"the lane to {lane.gateway} ended with exit code {end} before it began: see above")
            lane.replaced += 1
            lane.limited.log("lane_ended", "exit", gateway=lane.gateway, exit_code=end)

    def _note_change(self) -> None:
        self._has_changed.set()


class _LaneAtWork:
    """One lane as the first process sees it: a queue, and a worker that reports."""

    def __init__(self, config: AgentConfig, number: int) -> None:
        self.gateway = config.gateways[number]
        self.dialer = Dialer(self.gateway, mark=config.plan.mark)
        self.queue: Tun | None = None
        self.has_reported = False
        self._number = number
        self._is_capturing = False
        self._worker: WorkerProcess | None = None
        self._report: Report = {}
        self._heard_s = 0.0
        self._retired: Report = {}
        self.replaced = 0
        self.limited = RateLimitedLog(_logger)

    @property
    def progress(self) -> int:
        """How far packets come: 2, to the other agent, as far as anybody knows; 1, to the gateway; 0, nowhere."""
        link = self._link()
        return int(link.get("up", False)) + int(link.get("path") == "open")

    def counted(self) -> Report:
        """Return what this lane has counted, those workers included that have ended."""
        return added(self._retired, _counts(self._report))

    def snapshot(self) -> Mapping[str, object]:
        return {
            "gateway": str(self.gateway),
            "pid": self._worker.pid if self._worker else None,
            "replaced": self.replaced,
            "used": self.queue is not None and self.queue.is_attached,
            "up": False,
            "path": "closed",
            **self._link(),
        }

    def capture(self) -> None:
        self._is_capturing = True
        if self._worker is not None:
            self._worker.tell(_CAPTURE)

    def use(self, *, is_used: bool) -> None:
        """Have the kernel give this lane packets, or none."""
        if self.queue is not None and self.queue.is_attached != is_used:
            self.queue.attach() if is_used else self.queue.detach()
            event = "lane_used" if is_used else "lane_left_out"
            reason = "silent" if self._is_silent() else ("no_link", "path_closed", "path_open")[self.progress]
            self.limited.log(event, reason, logging.INFO, gateway=self.gateway)

    def make(self, policy: int | None, changed: Callable[[], None]) -> WorkerProcess:
        """Make the next worker. It inherits the queue and *policy*; *changed* is called for each report."""
        assert self.queue is not None  # noqa: S101  # for mypy: `Lanes.carry` has opened it
        queue = self.queue.fileno()
        share = {
            "number": self._number,
            "queue": queue,
            "policy": policy,
            "addresses": self.dialer.addresses,
            "is_capturing": self._is_capturing,
        }

        def hear(report: Report) -> None:
            self.has_reported = True
            self._report = report
            self._heard_s = trio.current_time()
            changed()

        self._heard_s = trio.current_time()
        self._worker = WorkerProcess(LANE_VARIABLE, share, [queue, *([] if policy is None else [policy])], hear)
        return self._worker

    def retire(self) -> None:
        """Keep what a worker that has ended leaves to count."""
        self._retired = self.counted()
        self._report = {}

    def _link(self) -> Mapping[str, Any]:
        """What the worker says of its link; nothing, once it says nothing any more."""
        link: Mapping[str, Any] = {} if self._is_silent() else self._report.get("uplink", {})
        return link

    def _is_silent(self) -> bool:
        return trio.current_time() - self._heard_s > _SILENT_S


async def work(config: AgentConfig, assignment: Assignment) -> None:
    """Be the worker of one lane, until the first process wishes an end or is gone.

    Raises:
        ConfigError: the assignment is not one of an agent's.
        EngError: as `Lane.carry`.
    """
    share = assignment.share
    try:
        gateway = config.gateways[share["number"]]
        queue = Tun(share["queue"], config.plan.tun_name)
        attestation, policy, addresses = config.attestation, share["policy"], share["addresses"]
        is_capturing = share["is_capturing"]
    except (LookupError, TypeError) as error:
        raise ConfigError(f"{LANE_VARIABLE} is no share of this agent's work: unset it") from error
    if attestation is not None and policy is not None:
        attestation = replace(attestation, policy=f"/proc/self/fd/{policy}")
    lane = Lane(
        config,
        gateway,
        attested=await prepare(attestation, "client", config.wire),
        addresses=addresses,
        changed=assignment.report_now,
    )
    if is_capturing:
        lane.capture()
    with queue:
        async with trio.open_nursery() as nursery:

            def heed(wish: bytes) -> None:
                if wish == _CAPTURE:
                    lane.capture()
                elif not wish:
                    # The first process was killed, and its next start is not to find the device still there.
                    signal.raise_signal(signal.SIGKILL)
                else:
                    nursery.cancel_scope.cancel()

            await nursery.start(assignment.serve, lane.snapshot, heed)
            nursery.start_soon(lane.carry, queue)


def _counts(report: Report) -> Report:
    return {name: report[name] for name in ("spin", "counters") if name in report}


def _read_policy(config: AgentConfig) -> bytes | None:
    if config.attestation is None or config.attestation.policy is None:
        return None
    try:
        return Path(config.attestation.policy).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the policy {config.attestation.policy}: {error}") from error


@contextmanager
def _in_memory(content: bytes) -> Iterator[int]:
    """Keep *content* in a file in memory, and give its descriptor."""
    descriptor = os.memfd_create("policy")
    try:
        os.write(descriptor, content)
        yield descriptor
    finally:
        os.close(descriptor)
