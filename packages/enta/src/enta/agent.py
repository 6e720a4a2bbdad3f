"""Bring an agent up and down in the order that keeps captured traffic inside the tunnel, and move its packets.

Up: guard, TUN, first uplink, capture rules; down in reverse. The order is the promise: traffic is never captured while
nothing can carry it, and never leaves bare while it should be captured.
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Final, NoReturn, TypeVar

import trio
from enlink.attested import AttestedSide
from enlink.connection import Unreachable
from enlink.control import Hello, Role
from enlink.errors import EngError, leaves
from enlink.frame import Packets
from enlink.link import LinkEnded
from enlink.program import RateLimitedLog, announce_ready, log_event
from enlink.pump import current_pump
from enlink.status import Counters
from enlink.stream import Dialer
from enlink.supervise import Stopping

from enta.capture.firewall import Firewall
from enta.capture.routing import Routing
from enta.capture.watch import host_changes
from enta.config import AgentConfig
from enta.filter import PacketFilter, trimmed
from enta.tun import Tun, TunGone, open_tun
from enta.uplink import Uplink

T = TypeVar("T")

# Choices of ours.
TEAR_DOWN_LIMIT_S: Final = 5.0
# The kernel announces every change but those of legacy iptables, which are cheap to look for.
CHECK_INTERVAL_S: Final = {"nftables": 10.0, "iptables": 0.5}

_logger = logging.getLogger(__name__)


class Agent:
    """One agent on this host.

    Args:
        firewall: where the rules go; made for the same plan.
        attested: makes the attested link that the configuration asks for.
        is_held_closed: a dead run left its guard, which must not open before this one works.
    """

    def __init__(
        self,
        config: AgentConfig,
        firewall: Firewall,
        *,
        is_held_closed: bool = False,
        attested: AttestedSide | None = None,
    ) -> None:
        plan = config.plan
        self._config = config
        self._firewall = firewall
        self._is_held_closed = is_held_closed
        self._routing = Routing(plan)
        self._filter = PacketFilter(plan)
        self._counters = Counters()
        self._delivered = self._counters.group("from_gateway")
        self._dropped = self._counters.group("dropped")
        self._dialer = Dialer(config.gateway, mark=plan.mark)
        role = Role.SERVER_AGENT if plan.role == "server" else Role.CLIENT_AGENT
        self._uplink = Uplink(
            self._dialer,
            Hello(role, plan.instance, (plan.address,), plan.mtu),
            self._inject,
            self._counters,
            wire=config.wire,
            is_once=config.is_once,
            attested=attested,
        )
        self._attested = attested
        self._tun: Tun | None = None
        self._is_capturing = False
        self._started_s = trio.current_time()
        # One change at a time; and one that had to be abandoned still ends before the next begins.
        self._host_changes = trio.CapacityLimiter(1)
        self._limited = RateLimitedLog(_logger)

    def snapshot(self) -> Mapping[str, object]:
        """Describe the agent for ``status``."""
        plan = self._config.plan
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
            "uplink": self._uplink.snapshot(),
            "spin": current_pump().spin_counts(),
            "counters": self._counters.snapshot(),
        }

    async def run(self, stopping: Stopping) -> None:
        """Capture or replay until *stopping* is set; then this host is as it was before.

        A start that fails undoes what it did. What fails later is a crash to captured programs: guard, rules and the
        unreachable route stay, unless the plan fails open.

        Raises:
            EngError: see the exit codes; among them SystemFailure when the TUN is taken away.
        """
        current_pump().spin(self._config.spin_s)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._cancel_when_told, stopping, nursery.cancel_scope)
            await self._resolve_gateway()
            await self._on_host(self._routing.refuse_conflicts)
            async with self._undone(self._firewall.delete_guard):
                await self._on_host(self._firewall.add_guard)
                for line in await self._on_host(self._routing.purge_leftovers):
                    log_event(_logger, "leftover_removed", what=line)
                with open_tun(self._config.plan.tun_name) as tun:
                    self._tun = tun
                    await self._on_host(self._routing.bring_up_tun)
                    async with self._undone(self._routing.delete_rules, self._firewall.delete_capture):
                        await self._carry(tun)

    async def _cancel_when_told(self, stopping: Stopping, scope: trio.CancelScope) -> None:
        await stopping.wait()
        scope.cancel()

    async def _resolve_gateway(self) -> None:
        """Learn the gateway's address before the guard goes up, which may well block the way to the name server."""
        try:
            await self._dialer.resolve()
        except Unreachable as error:
            if self._config.is_once:
                raise
            log_event(_logger, "gateway_unknown", logging.WARNING, error=error)

    async def _carry(self, tun: Tun) -> NoReturn:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._uplink.run)
            if self._attested is not None:
                nursery.start_soon(self._attested.warn_for_ever)
            nursery.start_soon(self._pump, tun)
            nursery.start_soon(self._restore_what_others_remove)
            await self._uplink.has_been_up.wait()
            await self._on_host(self._firewall.add_capture)
            await self._on_host(self._routing.add_rules)
            self._is_capturing = True
            announce_ready(_logger, uplink=self._config.gateway, tun=tun.name, ports=self._ports())
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
                    self._counters.add("restored", "removed_by_others")
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

    async def _pump(self, tun: Tun) -> NoReturn:
        """Carry what local programs send, in order: device, filter, link."""

        judge, dropped, uplink = self._filter.judge_outbound, self._dropped, self._uplink

        def admit(packet: memoryview) -> bool:
            """Leave out, and count, what does not belong into the tunnel."""
            reason = judge(packet)
            if reason is not None:
                dropped[reason] += 1
            return reason is None

        while True:
            await uplink.send(await tun.read_packets(admit=admit, take=uplink.send_at_once))

    def _inject(self, packets: Packets) -> None:
        """Hand what the gateway sent to the kernel, as far as the plan allows it."""
        tun, judge, dropped = self._tun, self._filter.judge, self._dropped
        if tun is None or not self._is_capturing:
            # Without the rules a packet of an old connection would meet no socket, and the kernel would reset it.
            dropped["not_ready"] += packets.count
            return
        for packet in packets:
            reason = judge(packet) or tun.write_packet(trimmed(packet))
            if reason is not None:
                dropped[reason] += 1
                self._limited.log("dropping", reason)
        self._delivered["packets"] += packets.count
        self._delivered["bytes"] += len(packets.encoded)

    def _queue_dropped(self) -> int | None:
        try:
            return self._tun.tx_dropped() if self._tun else None
        except TunGone:
            return None

    def _ports(self) -> list[str]:
        plan = self._config.plan
        return [*(f"{c}:{c.transit}" for c in plan.captures), *(f"{r}:{r.transit}" for r in plan.replays)]
