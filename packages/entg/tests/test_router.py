"""Where packets go, with one agent and one peer: to the other leg, in order."""

from __future__ import annotations

from enlink.frame import Packets
from entg.router import Router
from trio.testing import trio_test


class Destination:
    def __init__(self) -> None:
        self.got: list[Packets] = []

    async def send(self, packets: Packets) -> None:
        self.got.append(packets)


def packets(text: bytes) -> Packets:
    return Packets(memoryview(text), 1)


@trio_test
async def test_what_comes_from_one_leg_goes_to_the_other_in_order() -> None:
    left, right, router = Destination(), Destination(), Router()
    router.connect(left, right)
    first, second, back = packets(b"first"), packets(b"second"), packets(b"back")
    await router.forward(left, first)
    await router.forward(right, back)
    await router.forward(left, second)
    assert right.got == [first, second]
    assert left.got == [back]
