"""Workers share what one process would have, to the last connection, and together tell what it would have told."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from tempfile import TemporaryFile
from typing import Any

import pytest
from enlink.endpoint import Tcp
from enlink.errors import ConfigError
from hypothesis import given
from hypothesis import strategies as st
from relay.config import BridgeConfig, RelayConfig
from relay.workers import Share, added, own_share

COUNTS = st.dictionaries(st.sampled_from("abc"), st.integers(0, 9))
DOCUMENTS = st.fixed_dictionaries({"bytes": COUNTS, "bridges": st.lists(COUNTS, min_size=2, max_size=2)})
Document = dict[str, Any]


def config_of(connections: int, workers: int) -> RelayConfig:
    bridge = BridgeConfig(listen=Tcp(None, 1), target=Tcp("127.0.0.1", 2), max_connections=connections)
    return RelayConfig(bridges=(bridge,), workers=workers)


@given(st.integers(1, 20).flatmap(lambda workers: st.tuples(st.integers(workers, 5000), st.just(workers))))
def test_connections_are_divided_exactly_and_evenly(numbers: tuple[int, int]) -> None:
    connections, workers = numbers
    shares = [
        Share(number, 3, [[4]]).of(config_of(connections, workers)).bridges[0].max_connections
        for number in range(workers)
    ]
    assert sum(shares) == connections
    assert max(shares) - min(shares) <= 1
    assert min(shares) >= 1


@pytest.fixture
def hand_over(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], int]]:
    """Puts a text where a worker looks for its share; gives the descriptor."""
    with TemporaryFile("w") as file:

        def put(text: str) -> int:
            file.write(text)
            file.flush()
            descriptor = os.dup(file.fileno())
            monkeypatch.setenv("ENG_RELAY_WORKER", str(descriptor))
            return descriptor

        yield put


@given(st.integers(0, 9), st.lists(st.lists(st.integers(3, 99))), st.none() | st.text())
def test_a_share_arrives_as_it_was(number: int, listeners: list[list[int]], file: str | None) -> None:
    share = Share(number, 3, listeners, file)
    with pytest.MonkeyPatch.context() as patch, TemporaryFile("w") as written:
        json.dump(asdict(share), written)
        written.flush()
        patch.setenv("ENG_RELAY_WORKER", str(os.dup(written.fileno())))
        assert own_share() == share


def test_a_process_is_a_worker_only_if_it_is_told_so_and_its_children_are_none(
    hand_over: Callable[[str], int],
) -> None:
    assert own_share() is None
    descriptor = hand_over('{"number": 1, "control": 3, "listeners": [[4, 5]], "file": "workers = 2"}')
    assert own_share() == Share(1, 3, [[4, 5]], "workers = 2")
    assert "ENG_RELAY_WORKER" not in os.environ
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"number": 1, "colour": "red"}'])
def test_a_share_that_is_none_is_told_by_the_variable(hand_over: Callable[[str], int], text: str) -> None:
    descriptor = hand_over(text)
    with pytest.raises(ConfigError, match=f"ENG_RELAY_WORKER='{descriptor}' is no share of a relay's work: unset it"):
        own_share()
    os.close(descriptor)


@pytest.mark.parametrize("text", ["", "x", "-1", "1000000000"])
def test_a_variable_that_names_no_share_is_told(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("ENG_RELAY_WORKER", text)
    with pytest.raises(ConfigError, match=f"ENG_RELAY_WORKER='{text}' is no share of a relay's work: unset it"):
        own_share()


@given(DOCUMENTS, DOCUMENTS, DOCUMENTS)
def test_reports_add_up_in_any_order(one: Document, other: Document, third: Document) -> None:
    assert added(one, other) == added(other, one)
    assert added(added(one, other), third) == added(one, added(other, third))
    assert added({}, one) == added(one, {}) == one


def test_numbers_add_up_and_texts_stay() -> None:
    bridge = {"listen": "tcp://:1", "active": 2, "ended": {"eof": 1}}
    other = {"listen": "tcp://:1", "active": 3, "ended": {"idle": 4, "eof": 1}}
    assert added({"bridges": [bridge]}, {"bridges": [other]}) == {
        "bridges": [{"listen": "tcp://:1", "active": 5, "ended": {"eof": 2, "idle": 4}}]
    }
