"""The log on standard error: one line for each record, and nobody who reads it can hold up or kill the program.

This is the machinery; programs log with `enlink.program.log_event`.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import math
import os
import queue
import re
import select
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Final

LINE_LIMIT_BYTES: Final = 4096  # PIPE_BUF: programs that share a pipe never cut into each other's lines

# Choices of ours.
QUEUED_LINES: Final = 1024  # for a burst that outruns the thread; of ordinary lines, 150 kB
DRAIN_S: Final = 1.0  # for the last lines, when the program ends

_BARE = re.compile(r"[A-Za-z0-9_.:/@%+*,\[\]-]+")


def printable(text: str) -> str:
    """Return *text* as one line that no terminal obeys: line breaks become ``;``, other control characters escapes."""
    line = "; ".join(part.strip() for part in text.splitlines() if part.strip())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def format_record(record: logging.LogRecord, *, is_json: bool) -> bytes:
    """Return the line of one log record: printable ASCII, at most 4096 bytes with its newline."""
    head = {
        "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "level": record.levelname.lower(),
        "logger": record.name,
        "event": record.getMessage(),
    }
    fields: Mapping[str, object] = getattr(record, "fields", {})
    if record.exc_info and record.exc_info[1]:
        fields = {**fields, "error": repr(record.exc_info[1])}
    shortened = {"shortened": True}
    attempts = (
        _line(head, chosen, limit, is_json=is_json)
        for chosen, limit in ((fields, 512), (shortened | {**fields}, 64), (shortened, 64))
    )
    return next(line for line in attempts if len(line) < LINE_LIMIT_BYTES).encode() + b"\n"


def _line(head: Mapping[str, str], fields: Mapping[str, object], limit: int, *, is_json: bool) -> str:
    start = {name: _plain(value, limit) for name, value in head.items()}
    rest = {f"{name}_" if name in head else name: _plain(value, limit) for name, value in fields.items()}
    if is_json:
        return json.dumps(start | rest)
    return " ".join([*map(_text, start.values()), *(f"{name}={_text(value)}" for name, value in rest.items())])


def _plain(value: object, limit: int) -> object:
    """Make a value one that JSON has, with at most *limit* characters of text."""
    if value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    text = str(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def _text(value: object) -> str:
    # JSON's escapes leave nothing but printable ASCII.
    return value if isinstance(value, str) and _BARE.fullmatch(value) else json.dumps(value)


class LineWriter:
    """Hands lines to a descriptor from a thread of its own: wherever the bytes go, only that thread ever waits.

    A line that cannot be written, or that finds 1024 others waiting, is dropped and counted.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        # One is counted by whoever writes a line, the other by the thread, so that neither needs a lock.
        self._refused = 0
        self._failed = 0

    @property
    def dropped(self) -> int:
        """How many lines never reached the descriptor."""
        return self._refused + self._failed

    def write(self, line: bytes) -> None:
        """Queue one line. Never waits and never raises. Not for two threads at once."""
        self._put(line, QUEUED_LINES)

    def write_last(self, line: bytes) -> None:
        """Queue the line that ends a program, which nothing before it can crowd out."""
        self._put(line, QUEUED_LINES + 1)

    def _put(self, line: bytes, limit: int) -> None:
        if self._lines.qsize() >= limit or not self._has_thread():
            self._refused += 1
        else:
            self._lines.put(line)

    def drain(self, timeout_s: float) -> bool:
        """Wait until everything is written, and write no more. Returns whether that was possible in time."""
        if self._thread is None:
            return True
        self._lines.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _has_thread(self) -> bool:
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="log", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # no thread to be had now; there may be one for the next line
                return False
            self._thread = thread
        return True

    def _run(self) -> None:
        is_torn = False
        while (line := self._lines.get()) is not None:
            whole = rest = b"\n" + line if is_torn else line
            try:
                while rest:
                    rest = rest[self._write_some(rest) :]
            except OSError:
                self._failed += 1
            # After half a line (a full disk) the next one starts afresh.
            is_torn = bool(rest) if rest != whole else is_torn

    def _write_some(self, data: bytes) -> int:
        while True:
            try:
                return os.write(self._descriptor, data)
            except BlockingIOError:  # somebody else with this descriptor made it non-blocking
                poll = select.poll()
                poll.register(self._descriptor, select.POLLOUT)
                poll.poll()


class EventHandler(logging.Handler):
    """Writes records to a descriptor as text, or as JSON when ``is_json`` is set."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self.is_json = False
        self._writer = LineWriter(descriptor)
        self._unformatted = 0

    @property
    def dropped(self) -> int:
        """How many lines were lost: nobody took them, or a field could not be turned into text."""
        return self._writer.dropped + self._unformatted

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = format_record(record, is_json=self.is_json)
        except Exception:  # noqa: BLE001  # whatever a field's __str__ raises, a line of the log ends no program
            self._unformatted += 1
        else:
            self._writer.write(line)

    def tell(self, sentence: str) -> None:
        """Write the line that ends a program, which is no record."""
        line = printable(sentence).encode("ascii", "backslashreplace")
        self.acquire()
        try:
            self._writer.write_last(line[: LINE_LIMIT_BYTES - 1] + b"\n")
        finally:
            self.release()

    def drain(self, timeout_s: float) -> bool:
        """Wait until everything is written, and write no more. Returns whether that was possible in time."""
        return self._writer.drain(timeout_s)


@contextmanager
def log_to_standard_error() -> Iterator[EventHandler]:
    """Send every record of the process to what is standard error now, until the block ends; keeps the root's level."""
    try:
        # A copy, so that the log never ends up in whatever else is opened as descriptor 2 later.
        descriptor = fcntl.fcntl(2, fcntl.F_DUPFD_CLOEXEC, 3)
    except OSError as error:
        descriptor = -1 if error.errno == errno.EBADF else 2  # -1: it is closed, and each line is dropped and counted
    handler = EventHandler(descriptor)
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    try:
        yield handler
    finally:
        root.setLevel(level)
        root.removeHandler(handler)
        handler.close()
        if handler.drain(DRAIN_S) and descriptor > 2:
            os.close(descriptor)


def dropped_lines() -> int:
    """Return how many lines of this process's log were lost, for ``status``."""
    return sum(handler.dropped for handler in logging.getLogger().handlers if isinstance(handler, EventHandler))
