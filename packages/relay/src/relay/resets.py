"""Notice that a client has broken off its connection while nobody reads from it yet."""

from __future__ import annotations

import select
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from enlink.pump import current_pump

_EVENTS_A_ROUND: Final = 64  # a choice of ours


class Resets:
    """The connections that are watched. Made by `watching_resets`.

    To wait until one of them can be read would not do: what a client has sent before waits there for the target, and so
    does the end of a client that has nothing more to say. Neither is a reset.
    """

    def __init__(self, epoll: select.epoll) -> None:
        self._epoll = epoll
        self._callbacks: dict[int, Callable[[], object]] = {}

    def watch(self, descriptor: int, callback: Callable[[], object]) -> None:
        """Call *callback* once, when the peer has reset the connection; it has been forgotten then."""
        self._callbacks[descriptor] = callback
        self._epoll.register(descriptor, 0)  # of errors it tells all the same

    def forget(self, descriptor: int) -> None:
        """Call nobody about *descriptor* any more. Before it is closed; it need not be watched."""
        if self._callbacks.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)

    def look(self) -> None:
        """Call back for what has been reset."""
        for descriptor, flags in self._epoll.poll(0, _EVENTS_A_ROUND):
            callback = self._callbacks.get(descriptor)
            self.forget(descriptor)
            # EPOLLHUP alone is a unix or vsock peer that has closed: what it said before is for the target to read.
            if callback is not None and flags & select.EPOLLERR:
                callback()


@contextmanager
def watching_resets() -> Iterator[Resets]:
    """Watch connections for as long as the block runs."""
    pump = current_pump()
    with select.epoll() as epoll:
        resets = Resets(epoll)
        pump.on_readable(epoll.fileno(), resets.look)
        try:
            yield resets
        finally:
            pump.forget(epoll.fileno())
