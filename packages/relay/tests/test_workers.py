"""Workers share what one process would have, to the last connection. How they talk: enlink's test_worker.py."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import pytest
import trio
from enlink.endpoint import Tcp
from enlink.errors import ConfigError, SystemFailure
from enlink.supervise import Stopping
from hypothesis import given
from hypothesis import strategies as st
from relay.config import BridgeConfig, RelayConfig
from relay.workers import Share, Workers, own_share
from trio.testing import wait_all_tasks_blocked


def config_of(connections: int, workers: int) -> RelayConfig:
    bridge = BridgeConfig(listen=Tcp(None, 1), target=Tcp("127.0.0.1", 2), max_connections=connections)
    return RelayConfig(bridges=(bridge,), workers=workers)


@given(st.integers(1, 20).flatmap(lambda workers: st.tuples(st.integers(workers, 5000), st.just(workers))))
def test_connections_are_divided_exactly_and_evenly(numbers: tuple[int, int]) -> None:
    connections, workers = numbers
    shares = [
        Share(number, [[4]]).of(config_of(connections, workers)).bridges[0].max_connections for number in range(workers)
    ]
    assert sum(shares) == connections
    assert max(shares) - min(shares) <= 1
    assert min(shares) >= 1


@pytest.fixture
def hand_over(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], int]]:
    """Puts a text where a worker looks for its share, with a socket in place of CONTROL; gives the descriptor."""
    with TemporaryFile("w") as file, socket.socket() as control:

        def put(text: str) -> int:
            file.write(text.replace("CONTROL", str(control.fileno())))
            file.flush()
            descriptor = os.dup(file.fileno())
            monkeypatch.setenv("ENG_RELAY_WORKER", str(descriptor))
            return descriptor

        yield put


@given(st.integers(0, 9), st.lists(st.lists(st.integers(3, 99))), st.none() | st.text())
def test_a_share_arrives_as_it_was(number: int, listeners: list[list[int]], file: str | None) -> None:
    share = Share(number, listeners, file)
    with pytest.MonkeyPatch.context() as patch, TemporaryFile("w") as written, socket.socket() as control:
        json.dump({**asdict(share), "control": control.fileno()}, written)
        written.flush()
        patch.setenv("ENG_RELAY_WORKER", str(os.dup(written.fileno())))
        assert own() == share


def own() -> Share | None:
    found = own_share()
    return found and found[0]


def test_a_process_is_a_worker_only_if_it_is_told_so_and_its_children_are_none(
    hand_over: Callable[[str], int],
) -> None:
    assert own() is None
    descriptor = hand_over('{"number": 1, "control": CONTROL, "listeners": [[4, 5]], "file": "workers = 2"}')
    assert own() == Share(1, [[4, 5]], "workers = 2")
    assert "ENG_RELAY_WORKER" not in os.environ
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"number": 1, "colour": "red"}', '{"number": 1, "listeners": []}']
)
def test_a_share_that_is_none_is_told_by_the_variable(hand_over: Callable[[str], int], text: str) -> None:
    descriptor = hand_over(text)
    with pytest.raises(ConfigError, match=f"ENG_RELAY_WORKER='{descriptor}' is no share of a relay's work: unset it"):
        own_share()
    os.close(descriptor)


def test_the_share_of_another_program_is_told_by_the_variable(hand_over: Callable[[str], int]) -> None:
    descriptor = hand_over('{"number": 1, "control": CONTROL, "colour": "red"}')
    with pytest.raises(ConfigError, match=f"ENG_RELAY_WORKER='{descriptor}' is no share of a relay's work: unset it"):
        own_share()


@pytest.mark.parametrize("text", ["", "x", "-1", "1000000000"])
def test_a_variable_that_names_no_share_is_told(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("ENG_RELAY_WORKER", text)
    with pytest.raises(ConfigError, match=f"ENG_RELAY_WORKER='{text}' is no share of a relay's work: unset it"):
        own_share()


def test_a_worker_that_is_being_started_while_all_stop_still_inherits_the_sockets(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    open_process = trio.lowlevel.open_process

    async def main() -> None:
        stopping = Stopping()

        async def open_late(*arguments: Any, **options: Any) -> trio.Process:
            stopping.set("just now")
            await wait_all_tasks_blocked()
            return await open_process(*arguments, **options)

        monkeypatch.setattr(trio.lowlevel, "open_process", open_late)
        with socket.socket() as listener, trio.fail_after(40):
            look = (
                f"import os, pathlib; os.fstat({listener.fileno()}); pathlib.Path({str(tmp_path / 'seen')!r}).touch()"
            )
            monkeypatch.setattr(sys, "orig_argv", ["python", "-c", look])
            await Workers(config_of(1, 1), None, [[listener]]).run(stopping)
            assert listener.fileno() == -1
        assert (tmp_path / "seen").exists()

    trio.run(main)


def test_a_relay_for_which_there_is_no_room_ends_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    async def no_room(*_: object, **__: object) -> trio.Process:
        raise BlockingIOError("no room")

    async def main() -> None:
        with socket.socket() as listener:
            await Workers(config_of(1, 1), None, [[listener]]).run(Stopping())

    monkeypatch.setattr(trio.lowlevel, "open_process", no_room)
    with pytest.RaisesGroup(pytest.RaisesExc(SystemFailure, match="worker 0 could not be started .no room.: start")):
        trio.run(main)


def test_a_relay_that_works_outlives_a_worker_for_which_there_is_no_room(caplog: pytest.LogCaptureFixture) -> None:
    """It is tried again, as enlink's test_worker.py shows, and counts as replaced only when it runs."""
    workers = Workers(config_of(1, 1), None, [])
    workers._hear(0, {"bridges": []})
    workers._ended(0, Stopping(), BlockingIOError("no room"))
    assert [record.message for record in caplog.records] == ["worker_not_started"]
    assert workers.snapshot()["workers"]["replaced"] == 0
