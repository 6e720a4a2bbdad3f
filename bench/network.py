"""What a network adds that loses packets and takes its time: TCP inside TCP beside what is not.

The wire between the gateways is a process (bench/wire.py) that carries 200 Mbit/s each way. The gateways' nftables lose
packets of both ways. Congestion control is one that takes a loss for congestion, as most hosts' is.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import product
from pathlib import Path as FilePath
from typing import Final

from enlink.testing.hosts import Host
from path import PEER_GATEWAY, Path

from bench.courses import Course, Setting, installed, opened, with_control
from bench.record import Figures, Record, Results, describe_machine, interleaved

COURSES: Final = ("eng", "4 socat", "openvpn", "wireguard-go", "direct")
MEGABITS: Final = 200
CONTROL: Final = "reno"  # every kernel has it, in every namespace
DELAYS_MS: Final = (0, 10)  # one way
LOST_OF_1000: Final = (0, 1, 10)
WIRE: Final = str(FilePath(__file__).with_name("wire.py"))
DEVICE: Final = "line0"


def measure(*, rounds: int, seconds: float, names: Sequence[str] = COURSES) -> Record:
    """Take throughput and round trips of these courses with each delay and each loss."""
    names, missing = installed(names)
    results: Results = {name: {} for name in names}
    foreign: list[float] = []
    for delay_ms, lost in product(DELAYS_MS, LOST_OF_1000):
        # Made anew for each: a link that has met losses stays slow for a while on a network without any.
        with ExitStack() as stack:
            courses = opened(stack, names, slow_wire(delay_ms, lost))
            network = f"{delay_ms} ms one way, {lost / 10:g} % lost"
            found, shares = interleaved(courses, [partial(_measure, network=network, seconds=seconds)], rounds)
            foreign += shares
            for name, figures in found.items():
                results[name].update(figures)
    return Record("network", rounds, seconds, results, {}, foreign, missing, describe_machine(CONTROL))


def _measure(course: Course, network: str, seconds: float) -> Figures:
    trips = course.load("round_trips", seconds)
    return {
        f"up_mbit_s, {network}": course.load("up", seconds)["mbit_s"],
        f"p50_ms, {network}": trips["p50_us"] / 1000,
        f"p99_ms, {network}": trips["p99_us"] / 1000,
    }


def lose(host: Host, lost: int) -> None:
    """From now on lose so many of 1,000 packets that come to a gateway by the wire."""
    rule = f"iifname {DEVICE} numgen random mod 1000 0-{lost - 1} drop" if lost else ""
    host.run(
        *("nft", "-f", "-"),
        input=f"""
            table inet bench
            delete table inet bench
            table inet bench {{
                chain loss {{
                    type filter hook prerouting priority raw;
                    {rule}
                }}
            }}
        """,
    )


def slow_wire(delay_ms: float, lost: int = 0) -> Setting:
    """A wire that takes so long each way, in place of the one between the gateways, and TCP that minds losses.

    Args:
        lost: of 1,000 packets each way.
    """

    @contextmanager
    def setting(path: Path) -> Iterator[None]:
        near, far = path.hosts["near"], path.hosts["far"]
        near.run("ip", "link", "delete", near.run("ip", "-o", "address", "show", "to", "10.81.2.1").split()[1])
        wire = path.running("near", sys.executable, WIRE, far.name, DEVICE, str(MEGABITS), str(delay_ms))
        with with_control(CONTROL)(path), wire:
            for host, address in ((near, "10.81.2.1"), (far, PEER_GATEWAY)):
                host.run("ip", "address", "add", f"{address}/24", "dev", DEVICE)
                host.run("ip", "link", "set", DEVICE, "up", "mtu", "1500", "txqueuelen", "5000")
                lose(host, lost)
            yield

    return setting
