"""What carries packets between a device and a gateway: read, judge, send; receive, judge, write. Changes no host."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import trio
from enlink.attested import AttestedSide
from enlink.connection import Unreachable
from enlink.control import Hello, Role
from enlink.endpoint import Tcp
from enlink.frame import Packets
from enlink.program import RateLimitedLog, log_event
from enlink.pump import current_pump
from enlink.status import Counters
from enlink.stream import Dialer

from enta.config import AgentConfig
from enta.filter import PacketFilter, trimmed
from enta.tun import Tun
from enta.uplink import Uplink

_logger = logging.getLogger(__name__)


class Lane:
    """One queue of the agent's device, one link to a gateway, and all that moves between them.

    Args:
        attested: makes the attested link that the configuration asks for.
        addresses: good ones of the gateway's that are known already.
        changed: called when the link, or the path behind it, has come or gone.
    """

    def __init__(
        self,
        config: AgentConfig,
        gateway: Tcp,
        *,
        attested: AttestedSide | None = None,
        addresses: Sequence[str] = (),
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        plan = config.plan
        self._config = config
        self._attested = attested
        self._filter = PacketFilter(plan)
        self._counters = Counters()
        self._delivered = self._counters.group("from_gateway")
        self._dropped = self._counters.group("dropped")
        self._dialer = Dialer(gateway, mark=plan.mark, addresses=addresses)
        role = Role.SERVER_AGENT if plan.role == "server" else Role.CLIENT_AGENT
        self._uplink = Uplink(
            self._dialer,
            Hello(role, plan.instance, (plan.address,), plan.mtu),
            self._inject,
            self._counters,
            wire=config.wire,
            is_once=config.is_once,
            attested=attested,
            changed=changed,
        )
        self._tun: Tun | None = None
        self._limited = RateLimitedLog(_logger)
        self._is_capturing = False

    def snapshot(self) -> Mapping[str, Any]:
        """Describe the lane for ``status``."""
        return {
            "uplink": self._uplink.snapshot(),
            "spin": current_pump().spin_counts(),
            "counters": self._counters.snapshot(),
        }

    async def resolve(self) -> None:
        """Learn the gateway's address: see `look_up`."""
        await look_up(self._dialer, is_once=self._config.is_once)

    def capture(self) -> None:
        """Deliver what the gateway sends from now on, since the rules are in place.

        Before that a packet of an old connection would meet no socket, and the kernel would reset it.
        """
        self._is_capturing = True

    async def wait_until_up(self) -> None:
        """Wait until the gateway has answered for the first time."""
        await self._uplink.has_been_up.wait()

    async def carry(self, tun: Tun) -> NoReturn:
        """Carry packets until cancelled.

        Raises:
            Unreachable, LinkEnded: as `Uplink.run`.
            TunGone, SystemFailure: as `Tun.read_packets`.
        """
        current_pump().spin(self._config.spin_s)
        self._tun = tun
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._uplink.run)
            if self._attested is not None:
                nursery.start_soon(self._attested.warn_for_ever)
            nursery.start_soon(self._pump, tun)
        raise AssertionError("unreachable: its tasks end by exceptions only")

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
            dropped["not_ready"] += packets.count
            return
        for packet in packets:
            reason = judge(packet) or tun.write_packet(trimmed(packet))
            if reason is not None:
                dropped[reason] += 1
                self._limited.log("dropping", reason)
        self._delivered["packets"] += packets.count
        self._delivered["bytes"] += len(packets.encoded)


async def look_up(dialer: Dialer, *, is_once: bool = False) -> None:
    """Learn a gateway's address before the guard goes up, which may well block the way to the name server.

    Raises:
        Unreachable: there is none, and the first failure is to be the end.
    """
    try:
        await dialer.resolve()
    except Unreachable as error:
        if is_once:
            raise
        log_event(_logger, "gateway_unknown", logging.WARNING, error=error)
