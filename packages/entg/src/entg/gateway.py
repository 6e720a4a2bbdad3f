"""Start a gateway's two legs, keep them, and end them in order. How a leg works is in legs.py."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

import trio
from enlink.attested import AttestedSide
from enlink.listener import listen_tcp
from enlink.program import announce_ready
from enlink.pump import current_pump
from enlink.status import Counters
from enlink.stream import Dialer
from enlink.supervise import Stopping

from entg.config import GatewayConfig
from entg.connection import spell, spell_listeners
from entg.legs import Leg
from entg.router import Router

_logger = logging.getLogger(__name__)


class Gateway:
    """A gateway with one leg to ENTAs and one to a peer ENTG.

    Args:
        enta_attested, entg_attested: what makes the attested links that the configuration asks for.
    """

    def __init__(
        self,
        config: GatewayConfig,
        enta_attested: AttestedSide | None = None,
        entg_attested: AttestedSide | None = None,
    ) -> None:
        self._config = config
        self._counters = Counters()
        router = Router()
        self._enta = Leg("enta", router, self._counters, config.wire, enta_attested)
        self._entg = Leg("entg", router, self._counters, config.wire, entg_attested)
        self._attested = [side for side in (enta_attested, entg_attested) if side is not None]
        router.connect(self._enta, self._entg)
        self._listeners: list[tuple[Leg, list[trio.SocketListener]]] = []
        self._started_s = trio.current_time()

    def snapshot(self) -> Mapping[str, object]:
        """Describe the gateway for ``status``."""
        return {
            "program": "entg",
            "pid": os.getpid(),
            "uptime_s": round(trio.current_time() - self._started_s, 3),
            "spin": current_pump().spin_counts(),
            "legs": {leg.name: leg.snapshot() for leg in (self._enta, self._entg)},
            "counters": self._counters.snapshot(),
        }

    async def bind(self) -> int:
        """Listen on every port of the configuration; connections wait in the backlog until `run`.

        Returns:
            The port on which ENTAs connect.

        Raises:
            Unavailable, NotPermitted: a port cannot be listened on.
        """
        for leg, endpoint in ((self._enta, self._config.enta_listen), (self._entg, self._config.entg_listen)):
            if endpoint is not None:
                self._listeners.append((leg, await listen_tcp(endpoint)))
        _, (first, *_) = self._listeners[0]
        return int(first.socket.getsockname()[1])

    async def run(self, stopping: Stopping) -> None:
        """Serve until *stopping* is set, then pass on what has arrived, within the grace, and close every link."""
        config = self._config
        current_pump().spin(config.spin_s)
        async with trio.open_nursery() as connections:
            async with trio.open_nursery() as accepting:
                for leg, listeners in self._listeners:
                    accepting.start_soon(leg.listen, listeners, connections)
                if config.entg_connect is not None:
                    accepting.start_soon(self._entg.dial, Dialer(config.entg_connect), connections)
                where = {f"{leg.name}_listen": spell_listeners(listeners) for leg, listeners in self._listeners}
                if config.entg_connect is not None:
                    where["entg_connect"] = spell(config.entg_connect)
                announce_ready(_logger, **where)
                for side in self._attested:
                    accepting.start_soon(side.warn_for_ever)
                await stopping.wait()
                accepting.cancel_scope.cancel()
            with trio.move_on_after(config.grace_s):
                async with trio.open_nursery() as draining:
                    draining.start_soon(self._enta.drain)
                    draining.start_soon(self._entg.drain)
            connections.cancel_scope.cancel()
