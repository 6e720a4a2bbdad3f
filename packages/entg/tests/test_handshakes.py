"""Handshakes of attested links that do not come to an end: they give way, and take nothing from a real agent."""

from __future__ import annotations

import math
from typing import cast

import pytest
import trio
from enlink.attested import AttestedSide, AttestedStream
from enlink.control import Hello, Role
from enlink.link import LinkEnded
from enlink.status import Counters
from enlink.testing.peers import Peer
from entg.handshakes import Handshakes
from entg.legs import ATTESTED_LIMIT, Leg
from entg.router import Router
from trio.testing import MockClock, memory_stream_pair, wait_all_tasks_blocked

FLOOD = 5 * ATTESTED_LIMIT


class Side:
    """Shakes hands with whoever sends a byte, and with the rest for ever."""

    max_link_age_s = math.inf

    async def shake_hands(self, stream: trio.abc.Stream) -> AttestedStream:
        try:
            await stream.receive_some(1)
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise
        return AttestedStream(stream, "sgx_ecdsa")


def test_the_oldest_handshake_gives_way_and_its_connection_is_closed() -> None:
    async def main() -> None:
        handshakes = Handshakes(cast("AttestedSide", Side()))
        assert not handshakes.end_oldest()
        ends: list[str] = []

        async def shake_hands(stream: trio.abc.Stream) -> None:
            try:
                ends.append((await handshakes.shake_hands(stream)).evidence)
            except LinkEnded as ended:
                ends.append(ended.reason)

        with trio.fail_after(40):
            async with trio.open_nursery() as nursery:
                strangers = []
                for _ in range(2):
                    ours, theirs = memory_stream_pair()
                    strangers.append(ours)
                    nursery.start_soon(shake_hands, theirs)
                    await wait_all_tasks_blocked()
                assert len(handshakes) == 2
                assert handshakes.end_oldest()
                assert len(handshakes) == 1
                assert await strangers[0].receive_some() == b""
                await strangers[1].send_all(b"x")
        assert (ends, len(handshakes)) == (["too_many", "sgx_ecdsa"], 0)

    trio.run(main)


@pytest.mark.proves("D20", "F49")
@pytest.mark.parametrize("said", ["nothing", "its hands only"])
def test_five_times_too_many_slow_strangers_take_nothing_from_an_agent(said: str) -> None:
    """Whether they stop before the handshake or after it: the agent gets in, and stays while as many come again."""

    async def main() -> None:
        router, counters = Router(), Counters()
        attested = cast("AttestedSide", Side())
        enta, entg = (
            Leg("enta", router, counters, attested=attested),
            Leg("entg", router, counters, attested=attested),
        )
        router.connect(enta, entg)

        async def connect(word: bytes, count: int) -> list[Peer]:
            peers = []
            for _ in range(count):
                ours, theirs = memory_stream_pair()
                peers.append(Peer(ours))
                nursery.start_soon(enta.accept, theirs)
                await ours.send_all(word)
                await trio.sleep(0.001)  # as they come one after another
            return peers

        with trio.fail_after(600):
            async with trio.open_nursery() as nursery:
                word = b"" if said == "nothing" else b"x"
                await connect(word, FLOOD)
                (agent,) = await connect(b"x", 1)
                await agent.greet(Hello(Role.CLIENT_AGENT))
                await connect(word, FLOOD)
                assert enta.snapshot()["connected"] is True
                assert counters.snapshot()["enta_ended"]["too_many"] >= 2 * FLOOD + 1 - ATTESTED_LIMIT
                nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0))
