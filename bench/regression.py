"""Has this project become slower? Compares ratios of a run with those of the recorded one, and never times."""

from __future__ import annotations

import math
import statistics
from typing import Final

from bench.record import Record, more_is_better

OURS: Final = ("eng", "eng spinning", "eng 2 lanes", "attested", "relay", "relay spinning")
SLACK: Final = 1.1  # two runs of the same code differ by that even where the rounds of one do not


def regressions(recorded: Record, now: Record) -> list[str]:
    """Return a sentence for each figure of ours that has become worse beside every other column.

    Worse by a tenth than the worst recorded round, that is. What is worse beside some columns only is these columns'
    gain, or noise, which seldom strikes beside all of them.
    """
    ours = [name for name in OURS if name in recorded.results and name in now.results]
    others = [name for name in recorded.results if name not in OURS and name in now.results]
    return [
        f"{name}, {figure}: {change:.2f} times worse than recorded, {allowed:.2f} would do"
        for name in ours
        for figure in recorded.figures()
        for change, allowed in [_least_change(recorded, now, figure, name, others)]
        if change > allowed
    ]


def _least_change(recorded: Record, now: Record, figure: str, ours: str, others: list[str]) -> tuple[float, float]:
    """How many times worse, and how many would do, beside the column that speaks most in our favour."""
    changes = []
    for other in others:
        then, today = recorded.ratios(figure, ours, other), now.ratios(figure, ours, other)
        if not then or not today or min(then) <= 0 or math.inf in then + today:
            continue  # too small a figure to be seen, such as a cost of nothing
        before, after = statistics.median(then), statistics.median(today)
        if more_is_better(figure):
            change, spread = before / after if after else math.inf, before / min(then)
        else:
            change, spread = after / before, max(then) / before
        changes.append((change, SLACK * spread))
    return min(changes, key=lambda each: each[0] / each[1], default=(1.0, SLACK))
