"""Bring an agent up and down in the order that keeps captured traffic inside the tunnel. What moves it is in lane.py.

Up: guard, TUN, first uplink, capture rules; down in reverse. The order is the promise: traffic is never captured while
nothing can carry it, and never leaves bare while it should be captured.
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final, NoReturn, Protocol, TypeVar

import trio
from enlink.connection import Unreachable
from enlink.errors import EngError, leaves
from enlink.link import LinkEnded
from enlink.program import RateLimitedLog, announce_ready, log_event
from enlink.supervise import Stopping

from enta.capture.firewall import Firewall
from enta.capture.routing import Routing
from enta.capture.watch import host_changes
from enta.config import AgentConfig
from enta.tun import Tun, TunGone, open_tun

T = TypeVar("T")

# Choices of ours.
TEAR_DOWN_LIMIT_S: Final = 5.0
# The kernel announces every change but those of legacy iptables, which are cheap to look for.
CHECK_INTERVAL_S: Final = {"nftables": 10.0, "iptables": 0.5}

_logger = logging.getLogger(__name__)


class Carriage(Protocol):
    """What moves an agent's packets between its device and its gateways: see lane.py and lanes.py."""

    async def resolve(self) -> None:
        """Learn the gateways' addresses, before anything on this host is changed."""

    async def carry(self, tun: Tun) -> NoReturn:
        """Carry packets until cancelled. *tun* was made for as many queues as there are gateways."""

    async def wait_until_up(self) -> None:
        """Wait until a gateway has answered for the first time."""

    def capture(self) -> None:
        """Take note that the rules are in place, and what gateways send may be delivered."""

    def snapshot(self) -> Mapping[str, Any]:
        """Describe what is carried for ``status``: with ``counters``, at least."""


class Agent:
    """One agent on this host.

    Args:
        firewall: where the rules go; made for the same plan.
        carriage: what moves the packets; made for the same configuration.
        is_held_closed: a dead run left its guard, which must not open before this one works.
    """

    def __init__(
        self, config: AgentConfig, firewall: Firewall, carriage: Carriage, *, is_held_closed: bool = False
    ) -> None:
        self._config = config
        self._firewall = firewall
        self._carriage = carriage
        self._is_held_closed = is_held_closed
        self._routing = Routing(config.plan)
        self._tun: Tun | None = None
        self._is_capturing = False
        self._restored = 0
        self._started_s = trio.current_time()
        # One change at a time; and one that had to be abandoned still ends before the next begins.
        self._host_changes = trio.CapacityLimiter(1)
        self._limited = RateLimitedLog(_logger)

    def snapshot(self) -> Mapping[str, object]:
        """Describe the agent for ``status``."""
        plan = self._config.plan
        carried = self._carriage.snapshot()
        restored = {"restored": {"removed_by_others": self._restored}} if self._restored else {}
        return {
            "program": "enta",
            "role": plan.role,
            "instance": plan.instance,
            "pid": os.getpid(),
            "uptime_s": round(trio.current_time() - self._started_s, 3),
            "capturing": self._is_capturing,
            "ports": self._ports(),
            "firewall": self._firewall.backend,
            "fail_closed": plan.is_fail_closed,
            "tun": {
                "name": plan.tun_name,
                "address": str(plan.address),
                "peer": str(plan.peer),
                "mtu": plan.mtu,
                "queue_dropped": self._queue_dropped(),
            },
            **carried,
            "counters": {**carried["counters"], **restored},
        }

    async def run(self, stopping: Stopping) -> None:
        """Capture or replay until *stopping* is set; then this host is as it was before.

        A start that fails undoes what it did. What fails later is a crash to captured programs: guard, rules and the
        unreachable route stay, unless the plan fails open.

        Raises:
            EngError: see the exit codes; among them SystemFailure when the TUN is taken away.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._cancel_when_told, stopping, nursery.cancel_scope)
            await self._carriage.resolve()
            await self._on_host(self._routing.refuse_conflicts)
            async with self._undone(self._firewall.delete_guard):
                await self._on_host(self._firewall.add_guard)
                for line in await self._on_host(self._routing.purge_leftovers):
                    log_event(_logger, "leftover_removed", what=line)
                several = len(self._config.gateways) > 1
                with open_tun(self._config.plan.tun_name, has_queues=several) as tun:
                    self._tun = tun
                    await self._on_host(self._routing.bring_up_tun)
                    async with self._undone(self._routing.delete_rules, self._firewall.delete_capture):
                        await self._carry(tun)

    async def _cancel_when_told(self, stopping: Stopping, scope: trio.CancelScope) -> None:
        await stopping.wait()
        scope.cancel()

    async def _carry(self, tun: Tun) -> NoReturn:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._carriage.carry, tun)
            nursery.start_soon(self._restore_what_others_remove)
            await self._carriage.wait_until_up()
            await self._on_host(self._firewall.add_capture)
            await self._on_host(self._routing.add_rules)
            self._is_capturing = True
            self._carriage.capture()
            gateways = ", ".join(map(str, self._config.gateways))
            announce_ready(_logger, uplink=gateways, tun=tun.name, ports=self._ports())
        raise AssertionError("unreachable: its tasks end by exceptions only")

    @asynccontextmanager
    async def _undone(self, *steps: Callable[[], None]) -> AsyncIterator[None]:
        """Take *steps* back after the block, whatever ends it, unless programs that are captured must not notice."""
        try:
            yield
        except BaseException as error:
            if not self._stays_closed(error):
                await self._undo(steps)
            raise

    async def _undo(self, steps: Iterable[Callable[[], None]]) -> None:
        with trio.move_on_after(TEAR_DOWN_LIMIT_S, shield=True) as limit:
            for step in steps:
                try:
                    await self._on_host(step)
                except EngError as error:
                    log_event(_logger, "undo_failed", logging.ERROR, error=error, undo="enta cleanup")
        if limit.cancelled_caught:
            log_event(_logger, "undo_failed", logging.ERROR, error="took too long", undo="enta cleanup")

    def _stays_closed(self, error: BaseException) -> bool:
        """Whether this end is one that nobody asked for, while programs rely on being captured."""
        if not self._config.plan.is_fail_closed or not (self._is_capturing or self._is_held_closed):
            return False
        wanted = trio.Cancelled | KeyboardInterrupt
        if self._is_capturing:
            # With --once. Before that, an agent that finds no gateway has not taken the place of the dead one yet.
            wanted |= LinkEnded | Unreachable
        return any(not isinstance(leaf, wanted) for leaf in leaves(error))

    async def _on_host(self, change: Callable[[], T]) -> T:
        """Change the host in a thread; one change at a time, and one that is abandoned still ends before the next."""
        return await trio.to_thread.run_sync(change, abandon_on_cancel=True, limiter=self._host_changes)

    async def _restore_what_others_remove(self) -> NoReturn:
        interval_s = CHECK_INTERVAL_S[self._firewall.backend]
        async with host_changes() as changes:
            while True:
                with trio.move_on_after(interval_s) as quiet:
                    await changes.wait()
                for what in await self._on_host(partial(self._restore, is_announced=not quiet.cancelled_caught)):
                    self._restored += 1
                    self._limited.log("restored", "removed_by_others", what=what)

    def _restore(self, *, is_announced: bool) -> list[str]:
        """Put back what is missing, and name it."""
        missing = self._firewall.missing()
        if "guard" in missing:
            self._firewall.add_guard()
        if "capture" in missing:
            self._firewall.add_capture()
        routes = self._routing.missing() if is_announced else []
        if routes:
            self._routing.restore()
        return [*missing, *routes]

    def _queue_dropped(self) -> int | None:
        try:
            return self._tun.tx_dropped() if self._tun else None
        except TunGone:
            return None

    def _ports(self) -> list[str]:
        plan = self._config.plan
        return [*(f"{c}:{c.transit}" for c in plan.captures), *(f"{r}:{r.transit}" for r in plan.replays)]
