"""Lines of the log: one line each, whatever strangers put into them, and nobody who reads them holds up the program."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from enlink import log
from enlink.log import EventHandler, LineWriter, dropped_lines, format_record, log_to_standard_error, printable
from hypothesis import example, given
from hypothesis import strategies as st

FAR_BEYOND_S = 20  # everything here takes milliseconds
PRINTABLE_ASCII_LINE = re.compile(rb"[ -~]*\n")
HOSTILE = "\x1b]0;owned\x07\r\n2026-01-01T00:00:00.000Z info enta.agent ready \u202e\x7f\x9b31m\x00\u2028\ud800"
any_text = st.text(max_size=40) | st.text(st.characters(), max_size=40) | st.just(HOSTILE)
values = st.none() | st.booleans() | st.integers() | st.floats() | any_text | st.binary(max_size=20)


def record(event: object = "ready", logger: str = "enta.agent", /, **fields: object) -> logging.LogRecord:
    made = logging.LogRecord(logger, logging.INFO, "", 0, event, None, None)
    made.created = 1767225600.25
    made.fields = fields
    return made


def text_of(made: logging.LogRecord) -> str:
    return format_record(made, is_json=False).decode()


def test_a_text_line_has_time_level_logger_event_and_fields() -> None:
    line = text_of(record(uplink="tcp://[::1]:6980", packets=3, is_up=True, reason=None, rtt_s=0.5))
    assert line == (
        "2026-01-01T00:00:00.250Z info enta.agent ready"
        " uplink=tcp://[::1]:6980 packets=3 is_up=true reason=null rtt_s=0.5\n"
    )


def test_a_json_line_has_the_same_and_keeps_the_types() -> None:
    line = format_record(record(uplink="tcp://[::1]:6980", packets=3, path=Path("/x")), is_json=True)
    assert line.endswith(b"\n")
    assert json.loads(line) == {
        "time": "2026-01-01T00:00:00.250Z",
        "level": "info",
        "logger": "enta.agent",
        "event": "ready",
        "uplink": "tcp://[::1]:6980",
        "packets": 3,
        "path": "/x",
    }


def test_text_that_could_be_taken_for_something_else_is_quoted() -> None:
    assert text_of(record(error="no route", empty="", forged="a=b", quoted='"')).endswith(
        r' ready error="no route" empty="" forged="a=b" quoted="\""' + "\n"
    )


def test_a_line_of_another_library_is_quoted_as_a_whole_so_that_it_cannot_pass_for_an_event() -> None:
    foreign = logging.LogRecord("pyroute2", logging.WARNING, "", 0, "peer %s said\nready", ("x",), None)
    assert text_of(foreign).endswith(' warning pyroute2 "peer x said\\nready"\n')


def test_a_field_named_like_a_part_of_every_line_gets_another_name() -> None:
    line = json.loads(format_record(record(level=3, event="connected"), is_json=True))
    assert (line["level"], line["level_"], line["event"], line["event_"]) == ("info", 3, "ready", "connected")


def test_an_exception_is_one_field_and_not_a_traceback() -> None:
    failed = record()
    failed.exc_info = (ValueError, ValueError("first\nsecond"), None)
    assert text_of(failed).endswith(r""" ready error="ValueError('first\\nsecond')" """.rstrip() + "\n")
    failed.exc_info = (None, None, None)
    assert text_of(failed).endswith(" ready\n")


@pytest.mark.proves("D24")
@given(any_text, any_text, st.dictionaries(st.sampled_from(["error", "name", "time"]), values), st.booleans())
def test_whatever_strangers_send_is_one_line_of_printable_ascii(
    event: str, logger: str, fields: dict[str, object], is_json: bool
) -> None:
    line = format_record(record(event, logger, **fields), is_json=is_json)
    assert PRINTABLE_ASCII_LINE.fullmatch(line)
    assert len(line) <= 4096


@pytest.mark.proves("D24")
@given(st.dictionaries(st.sampled_from(["address", "error", "name"]), any_text))
def test_no_value_can_pass_for_another_field(fields: dict[str, str]) -> None:
    line = text_of(record(**fields)).removeprefix("2026-01-01T00:00:00.250Z info enta.agent ready").removesuffix("\n")
    read = re.findall(r' ([a-z]+)=("(?:[^"\\]|\\.)*"|[^ ="]+)', line)
    assert {name: json.loads(value) if value[0] == '"' else value for name, value in read} == fields
    assert json.loads(format_record(record(**fields), is_json=True)).items() >= fields.items()


def test_a_number_that_json_lacks_is_text() -> None:
    assert json.loads(format_record(record(rtt_s=float("nan")), is_json=True))["rtt_s"] == "nan"


def test_long_values_are_cut() -> None:
    assert json.loads(format_record(record(error="x" * 512), is_json=True))["error"] == "x" * 512
    assert json.loads(format_record(record(error="x" * 513), is_json=True))["error"] == "x" * 512 + "..."


@pytest.mark.parametrize("is_json", [True, False])
def test_a_line_never_exceeds_what_a_pipe_takes_in_one_piece(is_json: bool) -> None:
    """Values are shortened first; when there are simply too many fields, none is left."""
    some = {f"field{number}": "\x1b" * 500 for number in range(5)}
    many = {f"field{number}": "\x1b" * 500 for number in range(500)}
    for fields, kept in ((some, 5), (many, 0)):
        line = format_record(record("\x1b" * 5000, "\x1b" * 5000, **fields), is_json=is_json)
        assert len(line) <= 4096
        assert line.count(b"field") == kept
        assert b"shortened" in line
        assert not is_json or json.loads(line)["shortened"] is True


def test_a_line_that_just_fits_is_left_alone() -> None:
    def line_with(count: int) -> str:
        return text_of(record(**{f"f{number:02}": "x" * 500 for number in range(7)}, rest="x" * count))

    room = 4096 - len(line_with(1))
    assert len(line_with(1 + room)) == 4096
    assert "shortened" not in line_with(1 + room)
    assert "shortened" in line_with(2 + room)


@pytest.mark.proves("D24")
@given(any_text)
@example(HOSTILE)
def test_a_sentence_for_people_is_one_line_without_control_characters(text: str) -> None:
    line = printable(text)
    assert line.isprintable()
    assert printable(line) == line


def test_line_breaks_become_semicolons_and_ordinary_text_stays() -> None:
    assert printable(" eins\n\n  zwei – drei \r\n") == "eins; zwei – drei"
    assert printable("\x1b[31m\u202e") == r"\x1b[31m\u202e"


@contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    """The smallest pipe there is: it takes 4096 bytes."""
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    try:
        yield reading, writing
    finally:
        os.close(reading)
        os.close(writing)


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + FAR_BEYOND_S
    while not is_so():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.001)


def test_lines_arrive_whole_and_in_order() -> None:
    lines = [b"%d\n" % number for number in range(200)]
    with pipe() as (reading, writing):
        writer = LineWriter(writing)
        for line in lines:
            writer.write(line)
        assert writer.drain(FAR_BEYOND_S)
        assert os.read(reading, 4096) == b"".join(lines)
        assert writer.dropped == 0


def test_a_writer_that_wrote_nothing_has_nothing_to_wait_for() -> None:
    threads = threading.active_count()
    assert LineWriter(2).drain(0)
    assert threading.active_count() == threads


@pytest.mark.proves("F68")
def test_a_reader_that_has_stopped_delays_nobody_and_what_it_misses_is_counted() -> None:
    line = b"x" * 4095 + b"\n"
    with pipe() as (reading, writing):
        writer = LineWriter(writing)
        for _ in range(2000):
            writer.write(line)  # would hang here
        dropped = writer.dropped
        assert 2000 - dropped in (1024, 1025, 1026), "1024 wait, one is with the thread, one in the pipe"
        assert not writer.drain(0)
        received = b""
        while len(received) < (2000 - dropped) * len(line):
            received += os.read(reading, 65536)
        assert received == line * (2000 - dropped), "whoever goes on reading gets the rest, whole"
        assert writer.drain(FAR_BEYOND_S)
        assert writer.dropped == dropped


def test_the_last_line_of_a_program_is_not_crowded_out() -> None:
    with pipe() as (reading, writing):
        handler = EventHandler(writing)
        for _ in range(2000):
            handler.handle(record(text="x" * 500))
        handler.tell("the end")
        received = b""
        while not received.endswith(b"\nthe end\n"):
            received += os.read(reading, 65536)
        assert handler.drain(FAR_BEYOND_S)
        assert received.count(b"\n") == 2001 - handler.dropped < 2001


def test_a_descriptor_that_somebody_made_non_blocking_loses_nothing() -> None:
    lines = [b"%04d" % number * 1000 + b"\n" for number in range(20)]
    with pipe() as (reading, writing):
        os.set_blocking(writing, False)
        writer = LineWriter(writing)
        for line in lines:
            writer.write(line)
        received = b""
        while len(received) < sum(map(len, lines)):
            received += os.read(reading, 65536)
        assert received == b"".join(lines)
        assert writer.drain(FAR_BEYOND_S)
        assert writer.dropped == 0


@pytest.mark.proves("F68")
def test_lines_for_a_full_disk_or_a_reader_that_left_or_nothing_at_all_are_counted() -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    reading, broken = os.pipe()
    os.close(reading)
    closed = os.dup(full)
    os.close(closed)
    for descriptor in (full, broken, closed, -1):
        writer = LineWriter(descriptor)
        for _ in range(10):
            writer.write(b"line\n")
        assert writer.drain(FAR_BEYOND_S)
        assert writer.dropped == 10
    os.close(full)
    os.close(broken)


@contextmanager
def limit(kind: int, soft: int) -> Iterator[None]:
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


@pytest.mark.proves("F68")
def test_after_half_a_line_the_next_one_starts_afresh(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as file:
        writer = LineWriter(file.fileno())
        with limit(resource.RLIMIT_FSIZE, 8):  # a file that can grow no more, as on a full disk
            writer.write(b"one\n")
            writer.write(b"two half\n")
            wait_until(lambda: writer.dropped == 1)
            writer.write(b"three\n")
            wait_until(lambda: writer.dropped == 2)
        writer.write(b"four\n")
        writer.write(b"five\n")
        assert writer.drain(FAR_BEYOND_S)
    assert (tmp_path / "log").read_bytes() == b"one\ntwo \nfour\nfive\n"
    assert writer.dropped == 2


def test_a_line_is_lost_when_no_thread_is_to_be_had_and_the_next_one_tries_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with pipe() as (reading, writing):
        writer = LineWriter(writing)
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", refuse)
            writer.write(b"lost\n")
        writer.write(b"kept\n")
        assert writer.drain(FAR_BEYOND_S)
        assert os.read(reading, 100) == b"kept\n"
        assert writer.dropped == 1


class Unspeakable:
    def __str__(self) -> str:
        raise RuntimeError("no words")


def test_a_field_that_fails_to_become_text_costs_its_line_and_nothing_else() -> None:
    with pipe() as (reading, writing):
        handler = EventHandler(writing)
        handler.handle(record(what=Unspeakable()))
        handler.handle(record("second"))
        assert handler.drain(FAR_BEYOND_S)
        assert b"enta.agent second\n" in os.read(reading, 4096)
        assert handler.dropped == 1


def test_a_sentence_is_escaped_and_bounded_like_any_line() -> None:
    with pipe() as (reading, writing):
        handler = EventHandler(writing)
        handler.tell(f"enta: --tun-name {HOSTILE}: use Straße instead")
        assert handler.drain(FAR_BEYOND_S)
        told = os.read(reading, 65536)
        assert PRINTABLE_ASCII_LINE.fullmatch(told)
        thread = threading.Thread(target=handler.acquire)
        thread.start()
        thread.join(FAR_BEYOND_S)
        assert not thread.is_alive(), "the handler is free for other threads"
        assert told.endswith(b": use Stra\\xdfe instead\n")
    with pipe() as (reading, writing):
        handler = EventHandler(writing)
        handler.tell("x" * 5000)
        assert handler.drain(FAR_BEYOND_S)
        assert os.read(reading, 65536) == b"x" * 4095 + b"\n"


def open_descriptors() -> set[Path]:
    return set(Path("/proc/self/fd").iterdir())


def test_every_record_goes_to_standard_error_while_the_block_runs(capfd: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before = (list(root.handlers), root.level, open_descriptors())
    threads = threading.active_count()
    with log_to_standard_error() as handler:
        root.setLevel(logging.INFO)
        logging.getLogger("test").info("inside")
        handler.is_json = True
        logging.getLogger("test").info("json")
        logging.getLogger("test").debug("too much")
    logging.getLogger("test").error("outside")
    text, json_line = capfd.readouterr().err.splitlines()
    assert text.endswith(" info test inside")
    assert json.loads(json_line)["event"] == "json"
    assert (list(root.handlers), root.level, open_descriptors()) == before
    assert threading.active_count() == threads


def test_the_log_ends_up_in_no_file_that_becomes_descriptor_2_later(tmp_path: Path) -> None:
    saved = os.dup(2)
    try:
        with (tmp_path / "log").open("wb") as first:
            os.dup2(first.fileno(), 2)
        with log_to_standard_error() as handler, (tmp_path / "link").open("wb") as link:
            os.dup2(link.fileno(), 2)
            handler.tell("for the log")
    finally:
        os.dup2(saved, 2)
        os.close(saved)
    assert (tmp_path / "log").read_text() == "for the log\n"
    assert (tmp_path / "link").read_text() == ""


@pytest.mark.proves("F68")
def test_lines_are_counted_when_standard_error_is_closed() -> None:
    saved = os.dup(2)
    os.close(2)
    try:
        with log_to_standard_error() as handler:
            assert dropped_lines() == 0
            handler.tell("for nobody")
            wait_until(lambda: dropped_lines() == 1)
    finally:
        os.dup2(saved, 2)
        os.close(saved)
    assert dropped_lines() == 0, "nothing logs any more"


def test_standard_error_itself_serves_when_there_is_no_descriptor_for_a_copy(capfd: pytest.CaptureFixture[str]) -> None:
    with limit(resource.RLIMIT_NOFILE, 3), log_to_standard_error() as handler:
        handler.tell("no descriptors left")
    assert capfd.readouterr().err == "no descriptors left\n"
    os.fstat(2)  # raises if it was closed along the way


@pytest.mark.proves("F68")
def test_the_end_waits_for_a_stopped_reader_but_not_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "DRAIN_S", 0.01)
    saved = os.dup(2)
    before = set(threading.enumerate())
    with pipe() as (reading, writing):
        os.dup2(writing, 2)
        try:
            with log_to_standard_error() as handler:
                for _ in range(2):
                    handler.tell("x" * 4095)
        finally:
            os.dup2(saved, 2)
            os.close(saved)
        (thread,) = set(threading.enumerate()) - before
        assert thread.daemon, "else the interpreter would wait for it"
        os.read(reading, 65536)  # now it can end
        thread.join(FAR_BEYOND_S)
        assert not thread.is_alive()
