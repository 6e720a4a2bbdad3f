"""Durations as people write them."""

from __future__ import annotations

import pytest
from enlink.duration import parse_duration_s
from enlink.errors import UsageError
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize(
    ("text", "seconds"), [("10s", 10), ("500ms", 0.5), ("5m", 300), ("1h", 3600), ("7", 7), ("0", 0), ("1.5s", 1.5)]
)
def test_durations_are_numbers_with_a_unit(text: str, seconds: float) -> None:
    assert parse_duration_s(text) == seconds


@pytest.mark.parametrize("text", ["", "s", "-1s", "1 s", "1d", "ten", "1e3", "inf", "nan", ".5", "1.", "10S", "٣s"])
def test_anything_else_is_no_duration(text: str) -> None:
    with pytest.raises(UsageError, match="is no duration: write a number and ms, s, m or h, as in 10s") as raised:
        parse_duration_s(text)
    assert repr(text) in str(raised.value)


@given(st.text())
def test_any_text_is_a_duration_or_a_usage_error(text: str) -> None:
    try:
        seconds = parse_duration_s(text)
    except UsageError:
        return
    assert 0 <= seconds < 10**9 * 3600
