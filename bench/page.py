"""A run as a page for docs/benchmarks, which is also what the terminal shows."""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from typing import Final

from bench import plot
from bench.record import Record

_STEP: Final = re.compile(r"(.+), (\d+) (.+)")


def as_markdown(record: Record, title: str, drawing: str | None) -> str:
    """The whole page; *drawing* is the name of a picture beside it."""
    machine = ", ".join(f"{what} {value}" for what, value in record.machine.items())
    foreign = ", ".join(f"{share:.0%}" for share in record.foreign)
    parts = [
        f"# {title}",
        f"Written by `./dev bench {record.topic} --record` on {record.day}: not to be edited.",
        f"Interleaved rounds: {record.rounds}, {record.seconds:g} s for a figure. Medians, and least to greatest.",
        "Compare within this page only.",
        f"Machine: {machine}.",
    ]
    if foreign:
        parts.append(f"Of all processors, others took in each round: {foreign}.")
    if record.missing:
        parts.append(f"Left out, since not installed: {', '.join(record.missing)}.")
    if drawing:
        parts.append(f"![{title}]({drawing})")
    parts.append(_table(record))
    if record.goals:
        parts.append(_goals(record))
    return "\n\n".join(parts) + "\n"


def _table(record: Record) -> str:
    columns = list(record.results)
    rows = [[figure, *(_cell(record.results[column].get(figure)) for column in columns)] for figure in record.figures()]
    return _lines([["", *columns], ["---"] * (1 + len(columns)), *rows])


def _cell(values: list[float] | None) -> str:
    if not values:
        return "–"
    median = plot.short(statistics.median(values))
    if len(values) == 1:
        return median
    return f"{median} ({plot.short(min(values))}–{plot.short(max(values))})"


def _goals(record: Record) -> str:
    rows = [
        ["met" if is_met else "**MISSED**", plot.short(found), goal] for goal, (found, is_met) in record.goals.items()
    ]
    return _lines([["", "found", "goal"], ["---"] * 3, *rows])


def _lines(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def as_dots(record: Record, title: str) -> str:
    """A drawing with a panel for each figure."""
    panels = {
        figure: {name: column[figure] for name, column in record.results.items() if figure in column}
        for figure in record.figures()
    }
    return plot.dots(title, panels, list(record.results))


def as_lines(record: Record, title: str) -> str:
    """A drawing with a graph for each kind of figures that are named alike but for a number, ``mbit_s, 4 streams``."""
    graphs: defaultdict[str, defaultdict[str, list[tuple[float, float]]]]
    graphs = defaultdict(lambda: defaultdict(list))
    for figure in record.figures():
        step = _STEP.fullmatch(figure)
        for column in record.results:
            value = record.median(column, figure)
            if step and value is not None:
                graphs[f"{step[1]}, by {step[3]}"][column].append((float(step[2]), value))
    return plot.lines(title, graphs, list(record.results))
