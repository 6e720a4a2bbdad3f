"""How cost grows: with connections that talk at once, with the size of writes, with streams side by side."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Final

from bench.courses import KINDS, Course, installed, opened
from bench.record import Figures, Record, interleaved

COURSES: Final = ("eng", "eng 2 lanes", "attested", "4 socat", "4 haproxy", "wireguard-go", "direct")
CONNECTIONS: Final = (1, 10, 100, 1000)
BYTES_A_WRITE: Final = (64, 256, 1024, 4096, 16384, 65536)
STREAMS: Final = (1, 2, 4, 8)


def measure(*, rounds: int, seconds: float, names: Sequence[str] = COURSES) -> Record:
    """Take every step of all three of these courses, of those whose commands are installed."""
    names, missing = installed(names)
    with ExitStack() as stack:
        courses = opened(stack, names)
        few = {id(course): KINDS[name].most_connections for name, course in courses.items()}
        measures = [
            *(partial(_echoes, few=few, seconds=seconds, count=count) for count in CONNECTIONS),
            *(partial(_written, seconds=seconds, size=size) for size in BYTES_A_WRITE),
            *(partial(_streams, seconds=seconds, count=count) for count in STREAMS),
        ]
        results, foreign = interleaved(courses, measures, rounds)
    return Record("growth", rounds, seconds, results, {}, foreign, missing)


def _echoes(course: Course, few: dict[int, int], seconds: float, count: int) -> Figures:
    if count > few[id(course)]:
        return {}
    before_s = course.cpu_s()
    found = course.load("crowd", seconds, count)
    name = f"{count} connections"
    figures = {f"echoes_per_s, {name}": found["per_s"], f"echo_p99_us, {name}": found["p99_us"]}
    if course.programs:
        figures[f"cpu_us_per_echo, {name}"] = (course.cpu_s() - before_s) / found["count"] * 1e6
    return figures


def _written(course: Course, seconds: float, size: int) -> Figures:
    return _transfer(course, f"{size} bytes a write", seconds, 1, size)


def _streams(course: Course, seconds: float, count: int) -> Figures:
    return _transfer(course, f"{count} streams", seconds, count)


def _transfer(course: Course, name: str, *words: float) -> Figures:
    before_s = course.cpu_s()
    found = course.load("up", *words)
    figures = {f"up_mbit_s, {name}": found["mbit_s"]}
    if course.programs:
        figures[f"cpu_s_per_gb, {name}"] = (course.cpu_s() - before_s) / found["gigabytes"]
    return figures
