"""``./dev bench [TOPIC ...] [--quick] [--record] [--check]``: each topic beside what it compares with.

Without a topic it takes all of them, and with --quick the path.

Prints a page and, as the last line of each topic, its figures as JSON. Exits with 1 if --check finds something slower.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Final

from enlink.errors import EngError, SystemFailure

from bench import half_close
from bench.page import as_markdown
from bench.record import Record
from bench.regression import regressions
from bench.topics import TOPICS, Topic

RECORDS: Final = Path(__file__).parents[1] / "docs" / "benchmarks"


def main() -> int:
    """Measure the topics that the command line names, or all but the last."""
    parser = argparse.ArgumentParser("bench", description=__doc__)
    parser.add_argument("topics", nargs="*", metavar="topic", help=", ".join([*TOPICS, "half-close"]))
    parser.add_argument("--quick", action="store_true", help="one short round; of the path, if no topic is named")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seconds", type=float, help="for each figure")
    for option, what in (
        ("--record", "write a page, a picture and JSON of each topic to docs/benchmarks"),
        ("--check", "compare ratios with what is recorded there"),
    ):
        parser.add_argument(option, nargs="?", type=Path, const=RECORDS, metavar="DIRECTORY", help=what)
    options = parser.parse_args()
    if unknown := set(options.topics) - {*TOPICS, "half-close"}:
        parser.error(f"no such topic: {', '.join(sorted(unknown))}")
    try:
        # Before minutes of measuring.
        chosen = _chosen(options.topics, is_quick=options.quick)
        recorded = {name: Record.load(options.check, name) for name in chosen if options.check}
        slower = []
        for name in chosen:
            before = recorded.get(name)
            record = _measure(name, TOPICS[name], options, before)
            if before:
                slower += [f"{name}: {each}" for each in regressions(before, record)]
        if "half-close" in options.topics:
            half_close.run()
    except (EngError, RuntimeError) as error:  # the latter of commands and programs that failed, with what they said
        print(f"bench: {error}", file=sys.stderr)
        return error.exit_code if isinstance(error, EngError) else SystemFailure.exit_code
    for each in slower:
        print(f"SLOWER {each}", file=sys.stderr)
    return 1 if slower else 0


def _chosen(topics: list[str], *, is_quick: bool) -> list[str]:
    if not topics:
        return ["path"] if is_quick else list(TOPICS)
    return [name for name in TOPICS if name in topics]


def _measure(name: str, topic: Topic, options: argparse.Namespace, before: Record | None) -> Record:
    rounds, seconds = topic.quick if options.quick else topic.full
    if before:
        seconds = before.seconds  # every load starts slowly, in each column otherwise
    record = topic.measure(rounds=options.rounds or rounds, seconds=options.seconds or seconds)
    print(as_markdown(record, topic.title, None))
    print(record.as_json(), flush=True)
    if options.record:
        record.save(options.record)
        (options.record / f"{name}.md").write_text(as_markdown(record, topic.title, f"{name}.svg"))
        (options.record / f"{name}.svg").write_text(topic.draw(record, topic.title))
    return record


if __name__ == "__main__":
    sys.exit(main())
