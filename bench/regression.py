"""Has this project become slower? Compares ratios of a run with those of the recorded one, and never times."""

from __future__ import annotations

import math
import statistics
from typing import Final

from bench.record import Record, more_is_better

OURS: Final = ("eng", "attested", "relay")
SLACK: Final = 1.1  # two runs of the same code differ by that, whatever the spread within either


def regressions(recorded: Record, now: Record) -> list[str]:
    """Return a sentence for each figure of ours that has become worse beside every other column.

    Worse than the recorded median ratio by more than the recorded rounds lie apart, and a tenth. What is worse beside
    some columns only is these columns' gain.
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
        worse, better = statistics.median(today), statistics.median(then)
        if more_is_better(figure):
            worse, better = better, worse
        change = worse / better if better else math.inf
        changes.append((change, SLACK * max(then) / min(then)))
    return min(changes, key=lambda each: each[0] / each[1], default=(1.0, SLACK))
