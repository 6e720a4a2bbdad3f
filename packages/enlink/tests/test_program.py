"""The command line that all programs share: real processes where the promise is about a process."""

from __future__ import annotations

import argparse
import gc
import io
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path

import pytest
import trio
from enlink import program
from enlink.endpoint import Tcp, parse_dial
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
from enlink.program import (
    ProgramParser,
    RateLimitedLog,
    announce_ready,
    log_event,
    notify_supervisor,
    run_program,
)
from hypothesis import given
from hypothesis import strategies as st

FAR_BEYOND_S = 20  # everything here takes milliseconds
Main = Callable[[argparse.Namespace], Awaitable[None]]


def parser() -> ProgramParser:
    made = ProgramParser("enta", description="Captures.\n\n  enta client")
    made.add_argument("--entg-connect", type=parse_dial)
    made.add_common_options("1.2.3")
    return made


async def nothing(options: argparse.Namespace) -> None:
    pass


def raising(*errors: BaseException) -> Main:
    """A main whose tasks end with these errors together, as trio hands them on."""

    async def fail(error: BaseException) -> None:
        raise error

    async def main(options: argparse.Namespace) -> None:
        async with trio.open_nursery() as nursery:
            for error in errors:
                nursery.start_soon(fail, error)

    return main


def test_options_reach_the_program() -> None:
    async def main(options: argparse.Namespace) -> None:
        seen.append(options)

    seen: list[argparse.Namespace] = []
    assert run_program(parser(), main, ["--entg-connect", "[::1]:6980", "--status-socket", "/x"]) == 0
    (options,) = seen
    assert options.entg_connect == Tcp("::1", 6980)
    assert options.status_socket == Path("/x")
    assert (options.log_level, options.log_format) == ("info", "text")


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--unknown"], "enta: unrecognized arguments: --unknown; see enta --help"),
        (["--log-lev", "debug"], "enta: unrecognized arguments: --log-lev debug; see enta --help"),
        (["--log-level"], "enta: argument --log-level: expected one argument; see enta --help"),
        (["--log-level", "loud"], "enta: argument --log-level: invalid choice: 'loud' (choose from "),
        (["--entg-connect", "6980"], "enta: --entg-connect: '6980' is a port without a host: write HOST:6980"),
        (["--\x1b[31m\n"], r"enta: unrecognized arguments: --\x1b[31m; ; see enta --help"),
        (["\udcff"], r"enta: unrecognized arguments: \udcff; see enta --help"),
    ],
)
def test_a_wrong_command_line_is_told_in_one_line(
    argv: list[str], told: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_program(parser(), nothing, argv) == 64
    out, err = capfd.readouterr()
    assert err.startswith(told)
    assert err.count("\n") == 1
    assert err.rstrip("\n").isprintable()
    assert out == ""


def test_a_sub_command_shares_the_manners(capfd: pytest.CaptureFixture[str]) -> None:
    made = ProgramParser("enta")
    client = made.add_subparsers(required=True, dest="command").add_parser("client")
    client.add_argument("--entg-connect", type=parse_dial)
    client.add_common_options("1.2.3")
    assert run_program(made, nothing, ["client", "--entg", "gateway:6980"]) == 64
    assert run_program(made, nothing, ["client", "--entg-connect", "gateway"]) == 64
    assert run_program(made, nothing, []) == 64
    assert run_program(made, nothing, ["client", "--version"]) == 0
    out, err = capfd.readouterr()
    assert out == "enta 1.2.3\n"
    assert err.splitlines() == [
        "enta: unrecognized arguments: --entg gateway:6980; see enta --help",
        "enta: --entg-connect: 'gateway' names no port: write HOST:PORT, as in gateway:6980; see enta client --help",
        "enta: the following arguments are required: command; see enta --help",
    ]


def gateway() -> ProgramParser:
    """A program that does its main job without a sub-command, and shares its common options with one."""
    made = parser()
    status = made.add_subparsers(dest="command").add_parser("status", argument_default=argparse.SUPPRESS)
    status.add_common_options("1.2.3")
    return made


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--unknown", "value"], "unrecognized arguments: --unknown"),
        (["--unknown=value", "status"], "unrecognized arguments: --unknown=value"),
        (["--log-level", "debug", "stats"], "argument command: invalid choice: 'stats' (choose from "),
        (["--log-level=debug", "--", "--unknown"], "argument command: invalid choice: '--"),
        (["status", "--unknown"], "unrecognized arguments: --unknown"),
        (["--log-level", "loud", "status", "--unknown"], "argument --log-level: invalid choice: 'loud'"),
    ],
)
def test_beside_sub_commands_it_is_the_unknown_option_that_is_named(
    argv: list[str], told: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_program(gateway(), nothing, argv) == 64
    assert capfd.readouterr().err.startswith(f"enta: {told}")


def test_common_options_may_stand_before_or_after_a_sub_command() -> None:
    async def main(options: argparse.Namespace) -> None:
        seen.append((options.log_level, options.log_format, options.status_socket))

    seen: list[tuple[str, str, Path | None]] = []
    for argv in (["--log-level", "error", "--status-socket", "/x", "status", "--log-format", "json"], ["status"]):
        assert run_program(gateway(), main, argv) == 0
    assert seen == [("error", "json", Path("/x")), ("info", "text", None)]


def test_a_value_error_of_another_kind_is_told_as_argparse_does(capfd: pytest.CaptureFixture[str]) -> None:
    made = parser()
    made.add_argument("--mtu", type=int)
    assert run_program(made, nothing, ["--mtu", "x"]) == 64
    assert capfd.readouterr().err == "enta: argument --mtu: invalid int value: 'x'; see enta --help\n"


def test_a_program_without_the_common_options_runs_with_their_defaults() -> None:
    assert run_program(argparse.ArgumentParser("plain"), nothing, []) == 0
    assert run_program(argparse.ArgumentParser("plain"), nothing, ["--unknown"]) == 2, "and with its own manners"


def test_help_and_version_go_to_standard_output(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_program(parser(), nothing, ["--version"]) == 0
    assert capfd.readouterr() == ("enta 1.2.3\n", "")
    assert run_program(parser(), nothing, ["--help"]) == 0
    out, err = capfd.readouterr()
    for option in ("--log-level", "--log-format", "--status-socket PATH", "--version"):
        assert option in out
    assert "Captures.\n\n  enta client\n" in out, "laid out as it was written"
    assert err == ""


@pytest.mark.parametrize(
    "error",
    [
        UsageError("a"),
        Unavailable("b"),
        SystemFailure("c"),
        CannotCreate("d"),
        ProtocolError("e"),
        NotPermitted("f"),
        ConfigError("g"),
        EngError("h"),
    ],
)
def test_an_error_is_one_line_and_its_exit_code(error: EngError, capfd: pytest.CaptureFixture[str]) -> None:
    async def main(options: argparse.Namespace) -> None:
        raise error

    assert run_program(parser(), main, []) == error.exit_code
    assert run_program(parser(), raising(error), []) == error.exit_code, "and in a group of trio's"
    assert capfd.readouterr().err == f"enta: {error}\n" * 2


def test_a_text_of_several_lines_is_told_in_one(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_program(parser(), raising(SystemFailure("nft said:\n  no such\x1b table\n")), []) == 71
    assert capfd.readouterr().err == "enta: nft said:; no such\\x1b table\n"


class LinkUnavailable(Unavailable):
    pass


# Each is told before those after it.
ORDER: list[tuple[BaseException, int]] = [
    (TypeError("ours"), 70),
    (UsageError("u"), 64),
    (ConfigError("c"), 78),
    (NotPermitted("n"), 77),
    (CannotCreate("cc"), 73),
    (SystemFailure("s"), 71),
    (ProtocolError("p"), 76),
    (LinkUnavailable("un"), 69),
    (EngError("plain"), 71),
    (OSError(28, "No space left on device"), 71),
    (KeyboardInterrupt(), 130),
]


@given(st.lists(st.sampled_from(ORDER), min_size=1, max_size=4))
def test_of_several_errors_the_most_telling_one_is_told(errors: list[tuple[BaseException, int]]) -> None:
    leader = BaseExceptionGroup("", [errors[0][0]])
    nested = BaseExceptionGroup("", [leader, *(error for error, _ in errors[1:])])
    expected = min(errors, key=ORDER.index)
    assert program._outcome(nested)[0] == expected[1]


def test_of_two_errors_of_a_kind_the_first_is_told() -> None:
    group = ExceptionGroup("", [Unavailable("first"), ExceptionGroup("", [Unavailable("second")])])
    assert program._outcome(group) == (69, "first")


@pytest.mark.parametrize("leader", [TypeError("two\nlines"), trio.BrokenResourceError("gone"), SystemExit(3)])
def test_a_mistake_of_ours_is_told_without_a_traceback(
    leader: BaseException, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_program(parser(), raising(leader, Unavailable("the peer is gone")), []) == 70
    line = capfd.readouterr().err
    assert line.startswith(f"enta: internal error: {type(leader).__name__}: ")
    assert line.endswith("; please report this\n")
    assert line.count("\n") == 1


def test_an_error_of_the_system_that_nobody_translated_is_no_mistake_to_report(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert run_program(parser(), raising(OSError(24, "Too many open files", "/x")), []) == 71
    told = "enta: the system refused: [Errno 24] Too many open files: '/x'; --log-level debug tells where\n"
    assert capfd.readouterr().err == told


def test_the_traceback_is_there_for_whoever_asks(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_program(parser(), raising(TypeError("ours")), ["--log-level", "debug"]) == 70
    *trace, sentence = capfd.readouterr().err.splitlines()
    assert sentence == "enta: internal error: TypeError: ours; please report this"
    assert all(re.match(r"\S+Z debug enlink.program traceback line=", line) for line in trace)
    assert any("in fail" in line for line in trace)


def test_an_interrupt_that_the_program_does_not_handle_ends_it(capfd: pytest.CaptureFixture[str]) -> None:
    async def main(options: argparse.Namespace) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        await trio.sleep_forever()

    assert run_program(parser(), main, []) == 130
    assert capfd.readouterr().err == "enta: interrupted\n"
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN, "until the process has ended"


def test_an_interrupt_changes_nothing_once_the_program_has_ended(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def outcome(error: BaseException) -> tuple[int, str]:
        os.kill(os.getpid(), signal.SIGINT)
        return 69, "nobody answers"

    monkeypatch.setattr(program, "_outcome", outcome)
    assert run_program(parser(), raising(Unavailable("")), []) == 69
    assert capfd.readouterr().err == "enta: nobody answers\n"


def test_an_exception_in_a_finalizer_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    class Careless:
        def __del__(self) -> None:
            raise RuntimeError("in a finalizer")

    async def main(options: argparse.Namespace) -> None:
        Careless()
        gc.collect()

    hook = sys.unraisablehook
    assert run_program(parser(), main, []) == 0
    (line,) = capfd.readouterr().err.splitlines()
    assert line.endswith(""" warning enlink.program unraisable error="RuntimeError('in a finalizer')" """.rstrip())
    assert sys.unraisablehook == hook


@pytest.mark.proves("G2")
def test_a_program_that_has_ended_leaves_nothing_behind_in_the_process() -> None:
    def state() -> object:
        root = logging.getLogger()
        return (sorted(Path("/proc/self/fd").iterdir()), threading.enumerate(), root.level, list(root.handlers))

    run_program(parser(), raising(Unavailable("first, whatever is imported late is imported")), [])
    before = state()
    run_program(parser(), raising(Unavailable("second")), ["--log-level", "debug"])
    assert state() == before


async def printing(options: argparse.Namespace) -> None:
    print("x" * 1000)  # noqa: T201  # as a cli does


def test_printed_text_is_written_before_the_program_ends_or_its_loss_told(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with Path("/dev/full").open("w") as full, os.fdopen(writing, "w") as unread:
        for stdout, code in ((full, 71), (unread, 0), (None, 0)):
            monkeypatch.setattr(sys, "stdout", stdout)
            assert run_program(parser(), printing, []) == code
        monkeypatch.undo()
    why = "[Errno 28] No space left on device"
    told = f"enta: cannot write to standard output: {why}; make room there, or send it elsewhere\n"
    assert capfd.readouterr().err == told


def test_what_stands_in_for_standard_output_gets_what_is_printed() -> None:
    with redirect_stdout(io.StringIO()) as output:
        assert run_program(parser(), printing, []) == 0
    assert output.getvalue() == "x" * 1000 + "\n"


@pytest.mark.parametrize("descriptor", [0, 2])
def test_a_standard_descriptor_that_is_missing_becomes_dev_null(descriptor: int) -> None:
    saved = os.dup(descriptor)
    os.close(descriptor)
    try:
        assert run_program(parser(), nothing, []) == 0
        assert os.path.samestat(os.fstat(descriptor), Path(os.devnull).stat())
        assert os.get_inheritable(descriptor)
    finally:
        os.dup2(saved, descriptor)
        os.close(saved)


def test_the_log_level_and_format_are_those_of_the_command_line(capfd: pytest.CaptureFixture[str]) -> None:
    async def main(options: argparse.Namespace) -> None:
        log_event(logging.getLogger("test"), "quiet", logging.INFO, packets=1)
        log_event(logging.getLogger("test"), "loud", logging.ERROR, level=2)

    assert run_program(parser(), main, ["--log-level", "error", "--log-format", "json"]) == 0
    (line,) = map(json.loads, capfd.readouterr().err.splitlines())
    assert (line["event"], line["level"], line["level_"]) == ("loud", "error", 2)


def test_ready_is_logged_at_any_level(capfd: pytest.CaptureFixture[str]) -> None:
    async def main(options: argparse.Namespace) -> None:
        announce_ready(logging.getLogger("enta.agent"), uplink=Tcp("gateway", 6980))

    for level in program.LOG_LEVELS:
        assert run_program(parser(), main, ["--log-level", level]) == 0
        assert capfd.readouterr().err.endswith("Z info enta.agent ready uplink=tcp://gateway:6980\n")


@contextmanager
def systemd(address: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(address.replace("@", "\0"))
        sock.settimeout(FAR_BEYOND_S)
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        yield sock


def test_systemd_is_told_when_the_program_is_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for address in (f"{tmp_path}/notify", f"@eng-test-{os.getpid()}"):
        with systemd(address, monkeypatch) as sock:
            announce_ready(logging.getLogger("test"))
            assert sock.recv(100) == b"READY=1"


def test_nobody_is_told_when_nobody_asked(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify_supervisor("READY=1")
    assert caplog.messages == []


def test_a_supervisor_that_does_not_listen_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(program, "NOTIFY_DEADLINE_S", 0.01)
    with systemd(f"{tmp_path}/notify", monkeypatch) as sock:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender, suppress(BlockingIOError):
            sender.setblocking(False)
            while True:
                sender.sendto(b"fill", sock.getsockname())
        notify_supervisor("READY=1")  # full
    notify_supervisor("READY=1")  # gone
    monkeypatch.setenv("NOTIFY_SOCKET", "/" + "x" * 200)
    notify_supervisor("READY=1")  # impossible
    assert caplog.messages == ["notify_failed"] * 3


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def fields_of(caplog: pytest.LogCaptureFixture) -> list[dict[str, object]]:
    return [vars(record)["fields"] for record in caplog.records]


@pytest.mark.proves("D24")
def test_what_strangers_cause_is_logged_once_a_second_with_a_count(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    limited = RateLimitedLog(logging.getLogger("test"), clock)
    for now_s in (100.0, 100.1, 100.999, 101.0, 101.5, 103.0, 104.0):
        clock.now_s = now_s
        limited.log("frame_dropped", "not_ip", address="peer")
    first = {"reason": "not_ip", "address": "peer"}
    assert fields_of(caplog) == [first, {**first, "suppressed": 2}, {**first, "suppressed": 1}, first]
    assert {record.levelname for record in caplog.records} == {"WARNING"}


@pytest.mark.proves("D24")
def test_a_million_bad_frames_of_two_kinds_are_two_lines(caplog: pytest.LogCaptureFixture) -> None:
    limited = RateLimitedLog(logging.getLogger("test"), Clock())
    for _ in range(500_000):
        limited.log("frame_dropped", "not_ip")
        limited.log("frame_dropped", "frame_len", logging.ERROR)
    assert fields_of(caplog) == [{"reason": "not_ip"}, {"reason": "frame_len"}]


def test_reasons_without_number_cost_neither_memory_nor_lines(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    limited = RateLimitedLog(logging.getLogger("test"), clock)
    for number in range(10_000):
        limited.log("refused", f"reason {number}")
    assert len(caplog.records) == 257
    clock.now_s += 1
    limited.log("refused", "reason 0")
    assert fields_of(caplog)[-1] == {"reason": "reason 0"}, "those that came first are still told apart"
    limited.log("refused", "reason 9999")
    assert fields_of(caplog)[-1] == {"reason": "reason 9999", "suppressed": 10_000 - 257}


TALKER = """
import argparse, logging, sys, trio
from enlink.log import dropped_lines
from enlink.program import ProgramParser, announce_ready, log_event, run_program

async def main(options):
    logger = logging.getLogger("talker")
    announce_ready(logger)
    for number in range(5000):
        log_event(logger, "packet_dropped", number=number, text="x" * 200)
    with trio.move_on_after(0.1):
        await trio.sleep_forever()
    print(dropped_lines(), flush=True)
    for path in options.open:
        print(open(path).fileno(), flush=True)

parser = ProgramParser("talker")
parser.add_argument("--open", action="append", default=[])
sys.exit(run_program(parser, main))
"""


def talker(*redirections: str) -> subprocess.CompletedProcess[str]:
    """Run the program above from a shell, which redirects or closes its descriptors."""
    command = " ".join(['exec "$0" "$@"', *redirections])
    argv = ["sh", "-c", command, sys.executable, "-c", TALKER]
    return subprocess.run(argv, capture_output=True, text=True, timeout=FAR_BEYOND_S, check=False)


@pytest.mark.proves("F68")
@pytest.mark.parametrize("where", ["2>/dev/full", "2>&-"])
def test_a_program_whose_log_goes_nowhere_does_its_work_and_counts_the_lines(where: str) -> None:
    done = talker(where)
    assert done.returncode == 0
    assert int(done.stdout) > 0
    assert done.stderr == ""


@pytest.mark.proves("F68")
def test_a_program_whose_log_has_lost_its_reader_does_its_work_and_counts_the_lines() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", TALKER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        process.stderr.close()
        out, _ = process.communicate(timeout=FAR_BEYOND_S)
    assert process.returncode == 0
    assert int(out) > 0


@pytest.mark.proves("F68")
def test_a_program_whose_log_is_no_longer_read_does_its_work_and_ends() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", TALKER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert int(process.stdout.readline()) > 3000, "5000 lines, of which a pipe takes 300 and the queue 1024"
        assert process.wait(FAR_BEYOND_S) == 0
        lines = process.stderr.read().splitlines()
    assert lines[0].endswith(" info talker ready")
    assert all(line.endswith("x" * 200) for line in lines[1:]), "what did arrive arrived whole"


def test_no_file_becomes_a_standard_descriptor_that_was_closed_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "link").write_text("")
    argv = ["sh", "-c", 'exec "$0" "$@" 2>&- <&-', sys.executable, "-c", TALKER, "--open", str(tmp_path / "link")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=FAR_BEYOND_S, check=False)
    _, descriptor = map(int, done.stdout.splitlines())
    assert descriptor > 2
    assert done.returncode == 0


def test_a_program_started_without_standard_output_ends_as_it_should() -> None:
    assert talker(">&-").returncode == 0


PRINTER = """
import sys
from enlink.errors import Unavailable
from enlink.program import ProgramParser, run_program

async def main(options):
    print("x" * 1_000_000)
    if options.fail:
        raise Unavailable("nobody answers")

parser = ProgramParser("printer")
parser.add_argument("--fail", action="store_true")
sys.exit(run_program(parser, main))
"""


@pytest.fixture(params=["", "1"], ids=["buffered", "unbuffered"])
def unbuffered(request: pytest.FixtureRequest) -> str:
    """What PYTHONUNBUFFERED is: nothing that is printed may depend on it."""
    value: str = request.param
    return value


def run_printer(unbuffered: str, redirection: str, *options: str) -> tuple[int, str]:
    """The exit code and standard error of the program above, whose standard output a shell redirects."""
    done = subprocess.run(
        ["sh", "-c", f'{{ "$0" "$@"; echo $? >&2; }} {redirection}', sys.executable, "-c", PRINTER, *options],
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        capture_output=True,
        text=True,
        timeout=FAR_BEYOND_S,
        check=False,
    )
    *lines, code = done.stderr.splitlines(keepends=True)
    return int(code), "".join(lines)


@pytest.mark.proves("F68")
@pytest.mark.parametrize(
    ("redirection", "why"),
    [(">/dev/full", "[Errno 28] No space left on device"), ("</dev/null >&0", "[Errno 9] Bad file descriptor")],
)
def test_output_that_cannot_be_written_is_told_unless_there_is_worse(
    unbuffered: str, redirection: str, why: str
) -> None:
    told = f"printer: cannot write to standard output: {why}; make room there, or send it elsewhere\n"
    assert run_printer(unbuffered, redirection) == (71, told)
    assert run_printer(unbuffered, redirection, "--help") == (71, told)
    assert run_printer(unbuffered, redirection, "--fail") == (69, "printer: nobody answers\n")


@pytest.mark.proves("F68")
@pytest.mark.parametrize("redirection", [">&-", "| :"])
def test_output_that_nobody_wants_is_no_error(unbuffered: str, redirection: str) -> None:
    """A closed standard output, and a reader that has seen enough."""
    for options in ([], ["--help"]):
        assert run_printer(unbuffered, redirection, *options) == (0, "")


def test_output_is_whole_and_comes_before_the_error(unbuffered: str) -> None:
    """More than a pipe holds, all of which an unbuffered stream need not write."""
    text = "x" * 1_000_000 + "\n"
    assert run_printer(unbuffered, "2>&1 | cat >&2", "--fail") == (69, f"{text}printer: nobody answers\n")
