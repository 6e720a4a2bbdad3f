"""What a run found is kept, shown and compared as it was found."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.__main__ import RECORDS
from bench.page import as_dots, as_lines, as_markdown
from bench.plot import short
from bench.record import NoRecord, Record, Results, describe_machine, interleaved, more_is_better
from bench.regression import SLACK, regressions
from bench.topics import TOPICS

RESULTS: Results = {
    "eng": {"up_mbit_s": [200.0, 240.0, 210.0], "round_trip_p50_us": [300.0, 310.0, 290.0], "lost_of_1000": [0.0]},
    "4 socat": {"up_mbit_s": [220.0, 260.0, 230.0], "round_trip_p50_us": [200.0, 230.0, 210.0]},
    "direct": {"up_mbit_s": [1000.0, 1100.0, 900.0], "round_trip_p50_us": [30.0, 31.0, 28.0], "lost_of_1000": [0.0]},
}
RECORD = Record("path", 3, 1.0, RESULTS, {"up: at least 1": (0.9, False), "memory: at most 60": (45.0, True)}, [0.1])


def changed(column: str, figure: str, factor: float, record: Record = RECORD) -> Record:
    """The same run with one figure multiplied."""
    values = [value * factor for value in record.results[column][figure]]
    return replace(record, results={**record.results, column: {**record.results[column], figure: values}})


def texts(drawing: str) -> set[str]:
    """Every text in a drawing, which has to be well-formed."""
    return {element.text or "" for element in ET.fromstring(drawing).iter("{http://www.w3.org/2000/svg}text")}


def test_a_record_is_read_as_it_was_saved(tmp_path: Path) -> None:
    RECORD.save(tmp_path / "new")
    loaded = Record.load(tmp_path / "new", "path")
    assert loaded.results == RESULTS
    assert (loaded.topic, loaded.rounds, loaded.machine, loaded.day) == ("path", 3, RECORD.machine, RECORD.day)


@pytest.mark.parametrize("text", [None, "{", "[]", '{"rounds": 1}'])
def test_a_record_that_is_missing_or_damaged_is_told_in_one_line(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "path.json").write_text(text)
    with pytest.raises(
        NoRecord, match=r"cannot read .*path\.json .*: make it with \./dev bench path --record"
    ) as raised:
        Record.load(tmp_path, "path")
    assert "\n" not in str(raised.value)


def test_the_machine_is_described_without_its_name_or_its_paths() -> None:
    import socket

    described = describe_machine("reno")
    assert {"processor", "processors", "memory", "kernel", "congestion control", "python"} <= set(described)
    assert described["congestion control"] == "reno"
    assert socket.gethostname() not in described.values()
    assert not any("/" in value for value in described.values())


def test_columns_take_turns_in_going_first() -> None:
    asked: list[tuple[str, str]] = []

    def measure(column: str) -> dict[str, float]:
        asked.append(("first", column))
        return {"figure": len(asked)}

    def another(column: str) -> dict[str, float]:
        asked.append(("second", column))
        return {} if column == "b" else {"other": 0.0}

    results, foreign = interleaved({"a": "a", "b": "b"}, [measure, another], 2)
    assert "".join(column for _, column in asked) == "ababbaba"
    assert [name for name, _ in asked[:4]] == ["first", "first", "second", "second"]
    assert results == {"a": {"figure": [1, 6], "other": [0.0, 0.0]}, "b": {"figure": [2, 5]}}
    assert len(foreign) == 2
    assert all(0 <= share <= 1 for share in foreign)


def test_speeds_are_told_from_costs_by_their_names() -> None:
    speeds = ["up_mbit_s, 8 streams", "mbit_s, 1 connection", "per_s", "connections_per_s", "mb_per_cpu_s_1400"]
    costs = ["cpu_s_per_gb", "round_trip_p50_us", "cpu_us_per_connection", "peak_memory_mib", "round_trip_cpu_us"]
    assert all(map(more_is_better, [*speeds, "echoes_per_s, 10 connections"]))
    assert not any(map(more_is_better, [*costs, "memory_kib_per_connection"]))


def test_a_slower_run_is_found_out() -> None:
    found = regressions(RECORD, changed("eng", "up_mbit_s", 0.5))
    assert len(found) == 1
    assert found[0].startswith("eng, up_mbit_s: 2.00 times worse than recorded, ")
    assert len(regressions(RECORD, changed("eng", "round_trip_p50_us", 2))) == 1


def test_a_figure_that_fell_to_nothing_is_found_out() -> None:
    found = regressions(RECORD, changed("eng", "up_mbit_s", 0))
    assert len(found) == 1
    assert found[0].startswith("eng, up_mbit_s: inf times worse")


def test_a_peer_that_became_faster_makes_nobody_slower() -> None:
    assert regressions(RECORD, changed("4 socat", "up_mbit_s", 3)) == []


def test_what_cannot_be_compared_is_not() -> None:
    alone = replace(RECORD, results={"eng": RESULTS["eng"]})
    assert regressions(RECORD, alone) == regressions(alone, RECORD) == []


@settings(deadline=None)
@given(st.floats(0.01, 100))
def test_another_machine_is_no_regression(factor: float) -> None:
    """All times and speeds change together, and no ratio does."""
    results = {
        name: {figure: [value * factor for value in values] for figure, values in column.items()}
        for name, column in RESULTS.items()
    }
    assert regressions(RECORD, replace(RECORD, results=results)) == []


@settings(deadline=None)  # a busy machine is no failure
@given(st.lists(st.floats(50, 200), min_size=1, max_size=9), st.floats(1.01, 100))
def test_what_is_worse_than_the_spread_allows_is_found_and_what_is_not_is_not(rounds: list[float], more: float) -> None:
    """Worse than the worst recorded round by a tenth."""
    recorded = Record("path", 1, 1.0, {"eng": {"p50_us": rounds}, "direct": {"p50_us": [1.0] * len(rounds)}})
    allowed = SLACK * max(rounds) / statistics.median(rounds)
    assert len(regressions(recorded, changed("eng", "p50_us", allowed * more, recorded))) == 1
    assert regressions(recorded, changed("eng", "p50_us", allowed / more, recorded)) == []


def test_the_page_has_every_figure_of_every_column_and_every_goal() -> None:
    page = as_markdown(replace(RECORD, missing=["haproxy"]), "A title", "path.svg")
    assert "|  | eng | 4 socat | direct |" in page
    assert "| up_mbit_s | 210 (200–240) | 230 (220–260) | 1000 (900–1100) |" in page
    assert "| lost_of_1000 | 0 | – | 0 |" in page
    assert "| **MISSED** | 0.9 | up: at least 1 |" in page
    assert "| met | 45 | memory: at most 60 |" in page
    assert "Left out, since not installed: haproxy." in page
    assert "others took in each round: 10%." in page
    assert "![A title](path.svg)" in page


def test_the_picture_shows_every_column_of_every_figure() -> None:
    """Also a figure of nothing, which has no place on a logarithmic scale."""
    assert {*RESULTS, *RECORD.figures(), "A < title", "210", "0"} <= texts(as_dots(RECORD, "A < title"))


def test_steps_of_a_figure_make_one_graph() -> None:
    results = {name: {f"up_mbit_s, {step} streams": [step * 3.0] for step in (1, 2, 8)} for name in ("eng", "direct")}
    drawing = as_lines(Record("growth", 1, 1.0, results), "Growth")
    assert {"eng", "direct", "up_mbit_s, by streams", "1", "2", "8", "5", "10", "20"} == texts(drawing) - {"Growth"}
    points = [each.get("points", "") for each in ET.fromstring(drawing).iter("{http://www.w3.org/2000/svg}polyline")]
    assert [len(each.split()) for each in points] == [3, 3]


@pytest.mark.parametrize("topic", TOPICS)
def test_the_recorded_run_of_a_topic_is_a_full_one_and_is_shown(topic: str) -> None:
    """Its page and picture are beside it, and show what it found."""
    record = Record.load(RECORDS, topic)
    assert record.rounds == TOPICS[topic].full[0]
    page = (RECORDS / f"{topic}.md").read_text()
    assert all(f"\n| {figure} |" in page for figure in record.figures())
    assert f"]({topic}.svg)" in page
    assert {TOPICS[topic].title, *record.results} <= texts((RECORDS / f"{topic}.svg").read_text())


def test_numbers_are_short() -> None:
    assert list(map(short, (0, 0.01234, 3.14159, 99.5, 123.4, 9999, 12345, 2_000_000, 3e9))) == [
        *("0", "0.0123", "3.14", "99.5", "123", "9999", "12.3k", "2M", "3G")
    ]
