"""Durations as people write them."""

from __future__ import annotations

import pytest
from enlink.duration import parse_duration_s, parse_spin_s
from enlink.errors import UsageError
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("10s", 10), ("500ms", 0.5), ("200us", 0.0002), ("5m", 300), ("1h", 3600), ("7", 7), ("0", 0), ("1.5s", 1.5)],
)
def test_durations_are_numbers_with_a_unit(text: str, seconds: float) -> None:
    assert parse_duration_s(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "s", "-1s", "1 s", "1d", "ten", "1e3", "inf", "nan", ".5", "1.", "10S", "٣s"])
def test_anything_else_is_no_duration(text: str) -> None:
    with pytest.raises(UsageError, match="is no duration: write a number and us, ms, s, m or h, as in 10s") as raised:
        parse_duration_s(text)
    assert repr(text) in str(raised.value)


@given(st.text())
def test_any_text_is_a_duration_or_a_usage_error(text: str) -> None:
    try:
        seconds = parse_duration_s(text)
    except UsageError:
        return
    assert 0 <= seconds < 10**9 * 3600


@pytest.mark.parametrize(("text", "seconds"), [("0", 0), ("200us", 0.0002), ("10ms", 0.01)])
def test_a_moment_to_spin_is_a_duration(text: str, seconds: float) -> None:
    assert parse_spin_s(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["11ms", "1", "1h"])
def test_a_moment_to_spin_is_short(text: str) -> None:
    with pytest.raises(UsageError, match=r"is too long to spin: write at most 10ms, or as in 200us"):
        parse_spin_s(text)
