"""The four-host path, with plain and with attested links, beside its peers and beside nothing but the kernels."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Final

from bench.courses import KINDS, Course, installed, opened, with_control
from bench.record import Figures, Goals, Record, Results, describe_machine, interleaved, ratios

STREAMS: Final = 8
SPINNING: Final = "eng spinning"
# What the original in Rust reached, and the direct path beside it on its machine: for the ratios only.
ORIGINAL: Final = {
    "up_mbit_s": (184, 7377),
    "down_mbit_s": (166, 7271),
    "round_trip_p50_us": (411, 31),
    "round_trip_p99_us": (2737, 79),
    "per_s": (14, 1596),
}
ORIGINAL_ATTESTED: Final = (30, 7377)


def measure(*, rounds: int, seconds: float, names: Sequence[str] = tuple(KINDS), control: str | None = None) -> Record:
    """Take every figure of these courses, of those whose commands are installed, and judge the goals.

    Args:
        control: TCP's congestion control on all hosts; the machine's if there is none.
    """
    names, missing = installed(names)
    crowds = {name: KINDS[name].most_connections for name in names}
    with ExitStack() as stack:
        courses = opened(stack, names, with_control(control) if control else nullcontext)
        measures = (_upload, _download, _streams, _round_trips, _loaded, _connections, datagrams)
        results, foreign = interleaved(courses, [partial(each, seconds=seconds) for each in measures], rounds)
        full = {name: courses[name] for name, most in crowds.items() if most >= 1000}
        crowd, _ = interleaved(full, [partial(_crowd, seconds=seconds)], rounds)
        for name, course in courses.items():
            results[name].update(crowd.get(name, {}))
            if course.programs:
                results[name]["peak_memory_mib"] = [course.peak_memory_bytes() / 2**20]
    topic = "path" if control is None else control
    return Record(topic, rounds, seconds, results, goals(results), foreign, missing, describe_machine(control))


def _upload(course: Course, seconds: float) -> Figures:
    before_s = course.cpu_s()
    found = course.load("up", seconds)
    cost = {"cpu_s_per_gb": (course.cpu_s() - before_s) / found["gigabytes"]} if course.programs else {}
    return {"up_mbit_s": found["mbit_s"], **cost}


def _download(course: Course, seconds: float) -> Figures:
    return {"down_mbit_s": course.load("down", seconds)["mbit_s"]}


def _streams(course: Course, seconds: float) -> Figures:
    return {f"up_mbit_s, {STREAMS} streams": course.load("up", seconds, STREAMS)["mbit_s"]}


def _round_trips(course: Course, seconds: float) -> Figures:
    found = course.load("round_trips", seconds)
    return {"round_trip_p50_us": found["p50_us"], "round_trip_p99_us": found["p99_us"]}


def _loaded(course: Course, seconds: float) -> Figures:
    return {"loaded_round_trip_p50_us": course.load("loaded_round_trips", seconds)["p50_us"]}


def _connections(course: Course, seconds: float) -> Figures:
    before_s = course.cpu_s()
    found = course.load("connections", seconds)
    cost = {"cpu_us_per_connection": (course.cpu_s() - before_s) / found["count"] * 1e6} if course.programs else {}
    return {"connections_per_s": found["per_s"], **cost}


def datagrams(course: Course, seconds: float) -> Figures:
    """How many arrive, how many do not, and what each costs; nothing where only connections are carried."""
    if not course.carries_datagrams:
        return {}
    before_s = course.cpu_s()
    found = course.load("datagrams", seconds)
    cost = {"cpu_us_per_datagram": (course.cpu_s() - before_s) / found["count"] * 1e6} if course.programs else {}
    return {"datagrams_per_s": found["per_s"], "lost_datagrams_percent": found["lost_percent"], **cost}


def _crowd(course: Course, seconds: float) -> Figures:
    found = course.load("crowd", seconds, 1000)
    return {"lost_of_1000": found["lost"], "crowd_p50_us": found["p50_us"], "crowd_p99_us": found["p99_us"]}


def goals(results: Results) -> Goals:
    """What issue and architecture ask for, of the programs as they come, and of those that spin."""
    spinning = {f"spinning: {goal}": found for goal, found in _goals_of(SPINNING, results).items()}
    found = _beside("direct", "up_mbit_s", "attested", results) / (ORIGINAL_ATTESTED[0] / ORIGINAL_ATTESTED[1])
    attested = {"attested links, up, times the original's: at least 20": (found, found >= 20)}
    judged = _goals_of("eng", results) | attested | spinning
    return {goal: each for goal, each in judged.items() if not math.isnan(each[0])}


def _beside(name: str, figure: str, column: str, results: Results) -> float:
    found = ratios(results, figure, column, name)
    return statistics.median(found) if found else math.nan


def _goals_of(column: str, results: Results) -> Goals:
    """By ratio to what ran beside it, wherever that has a meaning; what cannot be told is not a number."""

    def beside(name: str, figure: str) -> float:
        return _beside(name, figure, column, results)

    def times_original(figure: str, original: tuple[float, float]) -> float:
        return beside("direct", figure) / (original[0] / original[1])

    def own(figure: str) -> float:
        values = results.get(column, {}).get(figure)
        return statistics.median(values) if values else math.nan

    at_least: Mapping[str, tuple[float, float]] = {
        "up, times 4 socat: at least 1.2": (beside("4 socat", "up_mbit_s"), 1.2),
        "down, times 4 socat: at least 1.2": (beside("4 socat", "down_mbit_s"), 1.2),
        "up, of direct: at least 0.25": (beside("direct", "up_mbit_s"), 0.25),
        "down, of direct: at least 0.25": (beside("direct", "down_mbit_s"), 0.25),
        "8 streams, times 4 socat: at least 1": (beside("4 socat", f"up_mbit_s, {STREAMS} streams"), 1),
        "connections a second, times the original's: at least 50": (
            times_original("connections_per_s", ORIGINAL["per_s"]),
            50,
        ),
    }
    at_most: Mapping[str, tuple[float, float]] = {
        **{
            f"round trip {part}, times the original's: at most 0.7": (
                times_original(f"round_trip_{part}_us", ORIGINAL[f"round_trip_{part}_us"]),
                0.7,
            )
            for part in ("p50", "p99")
        },
        "round trip p50, times 4 socat's: at most 1": (beside("4 socat", "round_trip_p50_us"), 1),
        "round trip p99, times 4 socat's: at most 1": (beside("4 socat", "round_trip_p99_us"), 1),
        "round trip p50 beside an upload, ms: at most 2": (own("loaded_round_trip_p50_us") / 1000, 2),
        "round trip p50 beside an upload, times the idle one: at most 5": (
            own("loaded_round_trip_p50_us") / own("round_trip_p50_us"),
            5,
        ),
        "processor time for a gigabyte, s: at most 4.6": (own("cpu_s_per_gb"), 4.6),
        "processor time for a gigabyte, times 4 socat's: at most 1": (beside("4 socat", "cpu_s_per_gb"), 1),
        "memory of the largest program, MiB: at most 60": (own("peak_memory_mib"), 60),
        "1,000 connections at once, lost: none": (own("lost_of_1000"), 0),
        "1,000 connections at once, p99 of an echo, ms: at most 250": (own("crowd_p99_us") / 1000, 250),
    }
    judged = {goal: (found, found >= limit) for goal, (found, limit) in at_least.items()}
    return judged | {goal: (found, found <= limit) for goal, (found, limit) in at_most.items()}
