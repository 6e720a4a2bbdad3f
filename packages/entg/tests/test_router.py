"""Where packets go, and news of the path, with one agent and one peer: to the other leg, in order."""

from __future__ import annotations

from enlink.frame import Packets
from entg.router import Router
from trio.testing import trio_test


class Destination:
    def __init__(self) -> None:
        self.got: list[Packets] = []
        self.is_ready = True
        self.path_is_open = False
        self.onward: list[bool] = []

    def note_onward(self, *, is_open: bool) -> None:
        self.onward.append(is_open)

    def send_at_once(self, packets: Packets) -> bool:
        if self.is_ready:
            self.got.append(packets)
        return self.is_ready

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


def test_what_can_go_at_once_goes_to_the_other_leg_and_what_cannot_nowhere() -> None:
    left, right, router = Destination(), Destination(), Router()
    router.connect(left, right)
    first, second = packets(b"first"), packets(b"second")
    assert router.forward_at_once(left, first)
    right.is_ready = False
    assert not router.forward_at_once(left, second)
    assert right.got == [first]
    assert left.got == []


def test_whether_the_path_beyond_one_leg_is_open_is_news_for_the_other() -> None:
    left, right, router = Destination(), Destination(), Router()
    router.connect(left, right)
    router.note_path(left)
    left.path_is_open = True
    router.note_path(left)
    assert (left.onward, right.onward) == ([], [False, True])
