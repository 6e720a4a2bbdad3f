"""What every ENG program's command line shares: options, events in the log, exit codes, the word to systemd.

A program is ``run_program(parser, main)``. Nothing happens at import. How lines reach standard error: see log.py.
"""

from __future__ import annotations

import argparse
import io
import itertools
import logging
import os
import signal
import socket
import sys
import time
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, Final, NoReturn

import trio

from enlink.duration import parse_spin_s
from enlink.errors import (
    CannotCreate,
    ConfigError,
    EngError,
    NotPermitted,
    ProtocolError,
    SystemFailure,
    Unavailable,
    UsageError,
)
from enlink.log import log_to_standard_error

INTERNAL_ERROR_EXIT_CODE: Final = 70  # EX_SOFTWARE of sysexits.h, where the codes of enlink.errors come from too
INTERRUPTED_EXIT_CODE: Final = 130  # what a shell reports for a program that SIGINT ended

# Choices of ours.
LOG_LEVELS: Final = ("debug", "info", "warning", "error")
RATE_LIMITED_REASONS: Final = 256
SPIN_HELP: Final = (
    "after traffic, look for more for so long before sleeping, as in 200us: shorter round trips, for more processor"
    " time (default: 0)"
)
NOTIFY_DEADLINE_S: Final = 1.0

# Which error is told when several end a program together: first what somebody must change, then what is in the way,
# then what may heal by itself.
_TELLING_ORDER: Final = (UsageError, ConfigError, NotPermitted, CannotCreate, SystemFailure, ProtocolError, Unavailable)

_logger = logging.getLogger(__name__)


class ProgramParser(argparse.ArgumentParser):
    """An argument parser whose errors are UsageErrors of one line, and which takes options in full only.

    A ``type=`` function may raise UsageError: its own words, after the option's name, reach the reader.
    """

    def __init__(self, prog: str | None = None, **options: Any) -> None:  # argparse's own, which grow with its version
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(prog, **{**options, "allow_abbrev": False})
        self._words: list[str] = []

    def add_common_options(self, version: str) -> None:
        """Add what every program has: the log, the status socket, ``--version``. With sub-commands, to each of them.

        Where they may stand before the sub-command as well, it is made with ``argument_default=argparse.SUPPRESS``, so
        that it leaves alone what stands there.
        """
        group = self.add_argument_group("common options")
        group.add_argument(
            "--log-level",
            choices=LOG_LEVELS,
            default=self.argument_default or "info",
            help="log this and worse (default: info)",
        )
        group.add_argument(
            "--log-format",
            choices=("text", "json"),
            default=self.argument_default or "text",
            help="how to write a line of the log (default: text)",
        )
        group.add_argument(
            "--status-socket", metavar="PATH", type=Path, help="answer `status` here, not in the runtime directory"
        )
        group.add_argument("--version", action="version", version=f"{self.prog.split()[0]} {version}")

    def add_spin_option(self, group: argparse._ArgumentGroup) -> None:
        """Add ``--spin`` to a group of options of a program that moves traffic."""
        group.add_argument("--spin", metavar="DURATION", type=parse_spin_s, default=0.0, help=SPIN_HELP)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does, and remember of what, for `error`."""
        self._words = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(self._words, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise UsageError, where argparse would print its usage and leave."""
        problem = sys.exception()
        # argparse calls a ValueError of a type function "invalid value", and keeps the function's own words to itself.
        if isinstance(problem, argparse.ArgumentError) and isinstance(problem.__context__, UsageError):
            message = f"{problem.argument_name}: {problem.__context__}"
        # It takes the value of an option that it does not know for a sub-command, and complains of that.
        elif isinstance(problem, argparse.ArgumentError) and (unknown := self._unknown_option()):
            message = f"unrecognized arguments: {unknown}"
        raise UsageError(f"{message}; see {self.prog} --help")

    def _unknown_option(self) -> str | None:
        commands = {
            name for action in self._actions if action.nargs == argparse.PARSER for name in action.choices or ()
        }
        for word in itertools.takewhile(lambda word: word != "--" and word not in commands, self._words):
            if word.startswith("--") and word.partition("=")[0] not in self._option_string_actions:
                return word
        return None


def run_program(
    parser: argparse.ArgumentParser,
    main: Callable[[argparse.Namespace], Awaitable[None]],
    argv: Sequence[str] | None = None,
) -> int:
    """Parse the command line, run *main* with it in trio, and return the exit code. To be called by ``cli`` only.

    What *main* prints is written when it has ended. A standard output that is closed, or whose reader has left, is none
    of the program's business; one that takes nothing else makes it exit with 71, after all else went well.

    Whatever is raised becomes one line on standard error, never a traceback, which ``--log-level debug`` adds:

    - an EngError its text and exit code; of several, the first in the order usage, configuration, permission, cannot
      create, system, protocol, unavailable;
    - an OSError that nobody translated, 71;
    - SIGINT while *main* does not handle it, 130;
    - anything else, 70, told before all the others, because it is a mistake of ours.

    SIGINT is ignored from the end of *main* on, and stays so: the process is to end now, with that code.
    """
    with log_to_standard_error() as log, _unraisable_logged():
        code, sentence, printed = 0, "", io.StringIO()
        try:
            try:
                if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # as it is while a program is imported
                    signal.signal(signal.SIGINT, signal.default_int_handler)
                _occupy_standard_descriptors()
                with redirect_stdout(printed):
                    options = parser.parse_args(argv)
                    log.is_json = getattr(options, "log_format", "text") == "json"
                    logging.getLogger().setLevel(getattr(options, "log_level", "info").upper())
                    trio.run(main, options)
            finally:
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # what happened is settled, and to tell it takes a moment
        except SystemExit as done:  # of --help and --version
            code = int(done.code or 0)
        except BaseException as error:  # noqa: BLE001  # this is where every error ends
            code, sentence = _outcome(error)
            for line in "".join(traceback.format_exception(error)).splitlines():
                log_event(_logger, "traceback", logging.DEBUG, line=line)
        unwritten = _write_standard_output(printed.getvalue())
        if unwritten and not code:
            code = SystemFailure.exit_code
            sentence = f"cannot write to standard output: {unwritten}; make room there, or send it elsewhere"
        if sentence:
            log.tell(f"{parser.prog}: {sentence}")
        return code


def log_event(logger: logging.Logger, event: str, level: int = logging.INFO, /, **fields: object) -> None:
    """Log one event: its name in snake_case, and fields, whose text may come from strangers."""
    logger.log(level, event, extra={"fields": fields})


class RateLimitedLog:
    """Logs what strangers can cause: one line a second for each event and reason, with a count of those held back.

    Make one for a program, not one for each link: a stranger can make many links.
    """

    def __init__(self, logger: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._logger = logger
        self._clock = clock
        self._next_s: dict[tuple[str, str], float] = {}
        self._suppressed: Counter[tuple[str, str]] = Counter()

    def log(self, event: str, reason: str, level: int = logging.WARNING, /, **fields: object) -> None:
        """Log the event now, or count it. The *reason* is one of a few words, never text of a stranger's."""
        key = (event, reason)
        if key not in self._next_s and len(self._next_s) >= RATE_LIMITED_REASONS:
            key = ("", "")  # a mistake in a caller costs lines, not memory
        now_s = self._clock()
        if now_s < self._next_s.get(key, now_s):
            self._suppressed[key] += 1
            return
        self._next_s[key] = now_s + 1
        if suppressed := self._suppressed.pop(key, 0):
            fields["suppressed"] = suppressed
        log_event(self._logger, event, level, reason=reason, **fields)


def announce_ready(logger: logging.Logger, **fields: object) -> None:
    """Log the event ``ready``, whatever the log level, and tell systemd. Others rely on both to know that all works."""
    logger.handle(logger.makeRecord(logger.name, logging.INFO, "", 0, "ready", (), None, extra={"fields": fields}))
    notify_supervisor("READY=1")


def notify_supervisor(state: str) -> None:
    """Send *state* to systemd as sd_notify(3) does, if ``NOTIFY_SOCKET`` asks for it. Failure is logged."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.settimeout(NOTIFY_DEADLINE_S)
            notify.sendto(state.encode(), f"\0{address[1:]}" if address.startswith("@") else address)
    except OSError as error:
        log_event(_logger, "notify_failed", logging.WARNING, address=address, error=error)


def _outcome(error: BaseException) -> tuple[int, str]:
    """Choose what to tell of an error, or of a whole group: an exit code and a sentence."""
    leaves = list(_leaves(error))
    for leaf in leaves:
        if not isinstance(leaf, EngError | OSError | KeyboardInterrupt):
            return INTERNAL_ERROR_EXIT_CODE, f"internal error: {type(leaf).__name__}: {leaf}; please report this"
    known = [leaf for leaf in leaves if isinstance(leaf, EngError)]
    for kind in (*_TELLING_ORDER, EngError):
        for leaf in known:
            if isinstance(leaf, kind):
                return leaf.exit_code, str(leaf)
    for leaf in leaves:
        if isinstance(leaf, OSError):
            return SystemFailure.exit_code, f"the system refused: {leaf}; --log-level debug tells where"
    return INTERRUPTED_EXIT_CODE, "interrupted"


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


def _write_standard_output(text: str) -> OSError | None:
    """Return why *text* cannot be written, unless nobody wants it."""
    if not text or sys.stdout is None:
        return None
    try:
        # With a buffer of its own: that of PYTHONUNBUFFERED takes no notice of what is left over.
        with os.fdopen(sys.stdout.fileno(), "wb", closefd=False) as output:
            output.write(text.encode(sys.stdout.encoding, sys.stdout.errors or "strict"))
    except io.UnsupportedOperation:  # whoever called us has put something else in its place
        sys.stdout.write(text)
    except OSError as error:
        return None if isinstance(error, BrokenPipeError) else error
    return None


def _occupy_standard_descriptors() -> None:
    """Open /dev/null as 0, 1 and 2 where the program was started without: no link is to get such a number."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)  # as the others are
    os.close(descriptor)


@contextmanager
def _unraisable_logged() -> Iterator[None]:
    """Log what Python itself would print as a traceback: an exception in a finalizer."""
    hook = sys.unraisablehook
    sys.unraisablehook = lambda what: log_event(_logger, "unraisable", logging.WARNING, error=repr(what.exc_value))
    try:
        yield
    finally:
        sys.unraisablehook = hook
