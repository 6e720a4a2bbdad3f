"""What a run found: its figures round by round, with the machine that it ran on. Kept as JSON in docs/benchmarks."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Self, TypeVar

from enlink.errors import Unavailable

from bench.processes import Load

Figures = dict[str, float]
Results = dict[str, dict[str, list[float]]]
"""By column, by figure: a value for each round."""
Goals = dict[str, tuple[float, bool]]
"""What was to be reached, what was, and whether that is enough."""

Column = TypeVar("Column")
COMMANDS: Final = {
    "socat": ("socat", "-V"),
    "haproxy": ("haproxy", "-v"),
    "openvpn": ("openvpn", "--version"),
    "wireguard-go": ("wireguard-go", "--version"),
    "openssl": ("openssl", "version"),
}


_CONTROL: Final = Path("/proc/sys/net/ipv4/tcp_congestion_control")


class NoRecord(Unavailable):
    """There is nothing to compare with, or it cannot be read."""


def describe_machine(control: str | None = None) -> dict[str, str]:
    """What the figures depend on, without anything that tells whose machine it is.

    Args:
        control: TCP's congestion control where the load ran, if not the machine's own.
    """
    model = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": model[1] if model else platform.machine(),
        "processors": str(os.cpu_count()),
        "memory": f"{memory_gib:.0f} GiB",
        "kernel": f"{platform.system()} {platform.release()}",
        "congestion control": control or _CONTROL.read_text().strip(),
        "python": platform.python_version(),
        **{name: _version(argv) for name, argv in COMMANDS.items() if shutil.which(name)},
    }


def _version(argv: Sequence[str]) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)
    found = re.search(r"\d+(\.\d+)+", done.stdout + done.stderr)
    return found[0] if found else "?"


@dataclass(frozen=True)
class Record:
    """One topic's run.

    Attributes:
        foreign: for each round, the share of all processors that others took, from 0 to 1.
        missing: the commands of columns that were left out.
    """

    topic: str
    rounds: int
    seconds: float
    results: Results
    goals: Goals = field(default_factory=dict)
    foreign: Sequence[float] = ()
    missing: Sequence[str] = ()
    machine: Mapping[str, str] = field(default_factory=describe_machine)
    day: str = field(default_factory=lambda: datetime.now(UTC).date().isoformat())

    @classmethod
    def of(cls, topic: str, document: Mapping[str, Any]) -> Self:
        """Read it from what `json` has made of it, whatever else that holds."""
        known = {name: document[name] for name in cls.__dataclass_fields__ if name in document}
        if not isinstance(known.get("machine"), dict):
            known.pop("machine", None)
        return cls(**{**known, "topic": topic})

    @classmethod
    def load(cls, directory: Path, topic: str) -> Self:
        """Read it from the file that `save` wrote.

        Raises:
            NoRecord: it is missing or damaged.
        """
        path = directory / f"{topic}.json"
        try:
            return cls.of(topic, json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as exc:
            raise NoRecord(f"cannot read {path} ({exc}): make it with ./dev bench {topic} --record") from exc

    def save(self, directory: Path) -> None:
        """Write it to a file named by its topic."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"{self.topic}.json").write_text(self.as_json() + "\n")

    def as_json(self) -> str:
        """The document in one line, with four digits of each value."""
        return json.dumps({**asdict(self), "results": _rounded(self.results), "goals": _rounded(self.goals)})

    def figures(self) -> list[str]:
        """The names of all figures, in the order in which they were taken."""
        return list(dict.fromkeys(figure for column in self.results.values() for figure in column))

    def median(self, column: str, figure: str) -> float | None:
        """The median of a column's rounds; None if it has no such figure."""
        values = self.results[column].get(figure)
        return statistics.median(values) if values else None

    def ratios(self, figure: str, column: str, beside: str) -> list[float]:
        """Round by round, what one column has of another: within a round both were measured in the same minute."""
        return ratios(self.results, figure, column, beside)


def ratios(results: Results, figure: str, column: str, beside: str) -> list[float]:
    """Round by round, what one column has of another; nothing if one of them lacks the figure."""
    pairs = zip(results.get(column, {}).get(figure, ()), results.get(beside, {}).get(figure, ()), strict=False)
    return [ours / theirs if theirs else math.inf for ours, theirs in pairs]


def more_is_better(figure: str) -> bool:
    """Whether a figure is a speed, by its name; the others are times, costs and sizes."""
    return re.search(r"mbit_s|(^|_)per_s\b|per_cpu_s", figure) is not None


def interleaved(
    columns: Mapping[str, Column], measures: Sequence[Callable[[Column], Figures]], rounds: int
) -> tuple[Results, list[float]]:
    """Take every measure of all columns, one after another, in each round; also returns the rounds' foreign load.

    A machine may be another one a second later, so each measure is taken of all columns before the next one is. Whoever
    comes first in one round is not so in the next.
    """
    results: Results = {name: {} for name in columns}
    foreign = []
    for number in range(rounds):
        start = Load.now()
        names = list(columns)
        first = number % len(names)
        for measure in measures:
            for name in names[first:] + names[:first]:
                for figure, value in measure(columns[name]).items():
                    results[name].setdefault(figure, []).append(value)
        foreign.append(round(Load.now().foreign_share_since(start), 2))
    return results, foreign


def _rounded(value: Any) -> Any:
    match value:
        case dict():
            return {key: _rounded(each) for key, each in value.items()}
        case list() | tuple():
            return [_rounded(each) for each in value]
        case float() if math.isfinite(value):
            return float(f"{value:.4g}")
        case _:
            return value
