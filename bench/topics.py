"""What can be measured, and how long that takes when it is done in full or quickly."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from bench import growth, network, page, path, relays, streams
from bench.record import Record


@dataclass(frozen=True, slots=True)
class Topic:
    """Something to measure.

    Attributes:
        measure: called with *rounds* and *seconds* for each figure.
        full, quick: such numbers.
        draw: makes the picture, from the record and its title.
    """

    title: str
    measure: Callable[..., Record]
    full: tuple[int, float]
    quick: tuple[int, float]
    draw: Callable[[Record, str], str] = page.as_dots


def _relay(*, rounds: int, seconds: float) -> Record:
    size = relays.QUICK if rounds <= relays.QUICK.rounds else relays.FULL
    return _printed("relay", lambda: relays.run(replace(size, rounds=rounds, seconds=seconds)))


def _streams(*, rounds: int, seconds: float) -> Record:
    return _printed("streams", lambda: streams.run(rounds=rounds, seconds=seconds))


def _printed(topic: str, measure: Callable[[], None]) -> Record:
    """The record of a topic that prints it as JSON in its last line."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        measure()
    return Record.of(topic, json.loads(output.getvalue().splitlines()[-1]))


TOPICS: Final = {
    "path": Topic("The path beside its peers", path.measure, full=(5, 1.0), quick=(1, 0.2)),
    "reno": Topic(
        "The path with Reno for congestion control",
        partial(path.measure, control="reno"),
        full=(5, 1.0),
        quick=(1, 0.2),
    ),
    "growth": Topic("How cost grows", growth.measure, full=(3, 0.7), quick=(1, 0.2), draw=page.as_lines),
    "network": Topic("On a network with loss and delay", network.measure, full=(3, 2.0), quick=(1, 1.0)),
    "streams": Topic("One attested stream beside trio's TLS", _streams, full=(5, 0.5), quick=(1, 0.3)),
    "relay": Topic("The relay beside its peers", _relay, full=(9, 1.0), quick=(2, 0.3)),
}
