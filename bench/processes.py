"""What processes use, as the kernel counts it in /proc: processor time and memory, descendants included."""

from __future__ import annotations

import os
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
_PROC: Final = Path("/proc")


@dataclass(frozen=True, slots=True)
class _Process:
    parent: int
    ticks: int  # user and system mode, its own and that of the children it has waited for


def _processes() -> dict[int, _Process]:
    found = {}
    for path in _PROC.iterdir():
        if path.name.isdigit():
            with suppress(OSError):  # it has just ended
                fields = (path / "stat").read_text().rpartition(")")[2].split()
                found[int(path.name)] = _Process(int(fields[1]), sum(map(int, fields[11:15])))
    return found


def _tree(pid: int, processes: dict[int, _Process]) -> list[int]:
    children = defaultdict(list)
    for each, process in processes.items():
        children[process.parent].append(each)
    tree = [pid]
    for each in tree:
        tree += children[each]
    return [each for each in tree if each in processes]


def descendants(pid: int) -> list[int]:
    """The processes that this one has started, and those that they have."""
    return _tree(pid, _processes())[1:]


def cpu_s(pid: int) -> float:
    """Processor time of a process and of all its descendants, also of those that have ended and been waited for."""
    processes = _processes()
    return sum(processes[each].ticks for each in _tree(pid, processes)) / _TICKS_PER_S


def memory_bytes(pid: int) -> int:
    """Memory of a process and its descendants; what several of them share counts once. Without the kernel's own."""
    total = 0
    for each in _tree(pid, _processes()):
        with suppress(OSError):
            lines = (_PROC / str(each) / "smaps_rollup").read_text().splitlines()
            total += next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


def peak_resident_bytes(pid: int) -> int:
    """The most memory that a process, or one of its descendants, has ever had in use. What it shares counts fully."""
    peaks = []
    for each in _tree(pid, _processes()):
        lines = (_PROC / str(each) / "status").read_text().splitlines()
        peaks += [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")]
    return max(peaks)


@dataclass(frozen=True, slots=True)
class Load:
    """A moment, for the share of the machine that others took since another one."""

    busy_s: float
    total_s: float
    own_s: float

    @classmethod
    def now(cls) -> Self:
        user, nice, system, idle, iowait, irq, softirq, *_ = map(int, (_PROC / "stat").read_text().split()[1:9])
        busy = user + nice + system + irq + softirq
        return cls(busy / _TICKS_PER_S, (busy + idle + iowait) / _TICKS_PER_S, cpu_s(os.getpid()))

    def foreign_share_since(self, start: Load) -> float:
        """From 0 to 1: processor time of processes that are not ours, of all that there was."""
        total_s = self.total_s - start.total_s
        foreign_s = (self.busy_s - start.busy_s) - (self.own_s - start.own_s)
        return min(1.0, max(0.0, foreign_s / total_s)) if total_s else 0.0
