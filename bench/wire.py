"""A wire of a given rate and delay between two hosts, since the kernels at hand may have no netem.

It is a process that holds a TUN device on either host. What waits for the wire to be free queues for 20 ms at most,
as in a small router; what does not fit is lost.
"""

from __future__ import annotations

import fcntl
import os
import select
import struct
import sys
import time
from collections import deque
from contextlib import suppress
from typing import Final

from enlink.testing.hosts import Host

# From linux/if_tun.h.
TUNSETIFF: Final = 0x400454CA
IFF_TUN: Final = 0x0001
IFF_NO_PI: Final = 0x1000

QUEUE_S: Final = 0.020
TICK_S: Final = 0.0003  # packets that are due within it leave together
BATCH: Final = 64


def open_tun(name: str) -> int:
    """Make a TUN device where the calling thread is; its descriptor does not block."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
    return descriptor


class Way:
    """One of the wire's two ways."""

    def __init__(self, source: int, target: int, bytes_per_s: float, delay_s: float) -> None:
        self._source, self._target = source, target
        self._bytes_per_s, self._delay_s = bytes_per_s, delay_s
        self._free_s = 0.0
        self._under_way: deque[tuple[float, bytes]] = deque()

    def take(self) -> None:
        """Put what there is on the wire, or what fits of it."""
        now_s = time.monotonic()
        for _ in range(BATCH):
            try:
                packet = os.read(self._source, 65536)
            except BlockingIOError:
                return
            begins_s = max(now_s, self._free_s)
            if begins_s - now_s <= QUEUE_S:
                self._free_s = begins_s + len(packet) / self._bytes_per_s
                self._under_way.append((self._free_s + self._delay_s, packet))

    def deliver(self) -> float:
        """Hand over what has arrived, and return the seconds until something does."""
        now_s = time.monotonic()
        while self._under_way:
            if (left_s := self._under_way[0][0] - now_s) > 0:
                return max(left_s, TICK_S)
            with suppress(OSError):  # nobody has set the device up yet
                os.write(self._target, self._under_way.popleft()[1])
        return 1.0


def carry(left: int, right: int, bytes_per_s: float, delay_s: float) -> None:
    """Carry packets both ways until killed."""
    ways = {left: Way(left, right, bytes_per_s, delay_s), right: Way(right, left, bytes_per_s, delay_s)}
    while True:
        readable, _, _ = select.select(list(ways), [], [], min([way.deliver() for way in ways.values()]))
        for descriptor in readable:
            ways[descriptor].take()


def main(other_host: str, device: str, megabits: str, delay_ms: str) -> None:
    """Lay a wire from the host that this runs on to another one."""
    left = open_tun(device)
    with Host(other_host).entered():
        right = open_tun(device)
    print("ready ", flush=True)
    carry(left, right, float(megabits) * 1e6 / 8, float(delay_ms) / 1000)


if __name__ == "__main__":
    main(*sys.argv[1:])
