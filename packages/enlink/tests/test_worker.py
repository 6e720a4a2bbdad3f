"""A process and its workers, as real processes: the test is the first one, and a small program each of the others."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from enlink.errors import ConfigError, SystemFailure
from enlink.supervise import FIRST_DELAY_S, Stopping
from enlink.testing.programs import FAR_BEYOND_S, in_trio, until
from enlink.worker import (
    END_AT_ONCE,
    END_IN_GOOD_ORDER,
    Assignment,
    Report,
    WorkerProcess,
    added,
    keep_running,
    own_assignment,
)
from hypothesis import given
from hypothesis import strategies as st

VARIABLE = "ENG_TEST_WORKER"

# Ends at the wishes that its share names, with the exit code that it names, and reports all that it has heard.
PROGRAM = """
import os, sys, trio
from enlink.program import ProgramParser, run_program
from enlink.worker import WorkerProcess, own_assignment

VARIABLE = "ENG_TEST_WORKER"

async def main(options):
    assignment = own_assignment(VARIABLE)
    if assignment is None:
        share = {"ends_at": [""], "stdout": 1}
        await WorkerProcess(VARIABLE, share, [1], lambda report: os.write(1, b"reported\\n")).run()
    else:
        await work(assignment)

async def work(assignment):
    share, heard = assignment.share, []

    def heed(wish):
        heard.append(wish.decode())
        if wish.decode() in share["ends_at"]:
            nursery.cancel_scope.cancel()
        assignment.report_now()

    async with trio.open_nursery() as nursery:
        report = {"share": share, "heard": heard, "is_told": VARIABLE in os.environ}
        await nursery.start(assignment.serve, lambda: report, heed)
        if "descriptor" in share:
            os.write(share["descriptor"], b"written by the worker")
    if "stdout" in share:
        os.write(share["stdout"], b"ended\\n")
    global code
    code = share.get("exit_code", 0)

code = 0
sys.exit(run_program(ProgramParser("test"), main) or code)
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The program, which is also the command line of this process, as far as workers are concerned."""
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    monkeypatch.setattr(sys, "orig_argv", ["python", str(path)])
    return path


class Hearing:
    """A worker, and what it has reported."""

    def __init__(self, *, ends_at: str = "e!", descriptors: tuple[int, ...] = (), **share: object) -> None:
        self.reports: list[Report] = []
        self.pid = 0
        share = {"ends_at": list(ends_at), **share}
        self.process = WorkerProcess(VARIABLE, share, descriptors, self.reports.append)

    async def wait_until_heard(self, *wishes: str) -> None:
        """Return once the worker has reported that it has heard just these."""
        await until(lambda: self.reports and self.reports[-1]["heard"] == list(wishes))
        self.pid = self.process.pid or 0


def is_there(pid: int) -> bool:
    """Whether the process runs, or has left anything."""
    return Path(f"/proc/{pid}").exists()


@pytest.mark.usefixtures("program", "no_descriptor_stays_open")
@in_trio
async def test_a_worker_has_its_share_and_reports_until_it_ends_with_a_code_of_its_own() -> None:
    worker = Hearing(name="one", exit_code=3)
    codes = []

    async def run() -> None:
        codes.append(await worker.process.run())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        await worker.wait_until_heard()
        share = {"ends_at": ["e", "!"], "name": "one", "exit_code": 3}
        assert worker.reports == [{"share": share, "heard": [], "is_told": False}]
        assert is_there(worker.pid)
        assert os.getsid(worker.pid) == worker.pid, "signals of this terminal are not for it"
        worker.process.tell(END_IN_GOOD_ORDER)
    assert codes == [3]
    assert worker.process.pid is None
    assert not is_there(worker.pid)
    worker.process.tell(END_IN_GOOD_ORDER)  # without harm


@pytest.mark.usefixtures("program", "no_descriptor_stays_open")
@in_trio
async def test_wishes_arrive_one_by_one_in_order_those_from_before_the_start_too() -> None:
    worker = Hearing()
    worker.process.tell(b"a")
    worker.process.tell(b"b")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(worker.process.run)
        await worker.wait_until_heard("a", "b")
        worker.process.tell(b"c")
        worker.process.tell(b"\n")
        await worker.wait_until_heard("a", "b", "c", "\n")
        worker.process.tell(END_AT_ONCE)


@pytest.mark.usefixtures("program", "no_descriptor_stays_open")
@in_trio
async def test_telling_a_worker_that_does_not_listen_never_blocks() -> None:
    worker = Hearing()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(worker.process.run)
        await worker.wait_until_heard()
        os.kill(worker.pid, signal.SIGSTOP)
        for _ in range(100_000):
            worker.process.tell(b"?")
        os.kill(worker.pid, signal.SIGCONT)
        await until(lambda: len(worker.reports[-1]["heard"]) >= 100)
        nursery.cancel_scope.cancel()


@pytest.mark.usefixtures("program", "no_descriptor_stays_open")
@in_trio
async def test_a_worker_inherits_what_it_is_given_under_the_same_number() -> None:
    reading, writing = os.pipe()
    worker = Hearing(descriptor=writing, descriptors=(writing,))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(worker.process.run)
        await worker.wait_until_heard()
        os.close(writing)
        worker.process.tell(END_IN_GOOD_ORDER)
    assert os.read(reading, 100) == b"written by the worker"
    assert os.read(reading, 100) == b"", "nobody holds the other end any more"
    os.close(reading)


@pytest.mark.usefixtures("program")
@in_trio
async def test_a_signal_asks_a_worker_for_an_end_in_good_order_however_often_and_a_hangup_for_nothing() -> None:
    worker = Hearing(ends_at="!")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(worker.process.run)
        await worker.wait_until_heard()
        os.kill(worker.pid, signal.SIGHUP)
        os.kill(worker.pid, signal.SIGTERM)
        await worker.wait_until_heard("e")
        os.kill(worker.pid, signal.SIGINT)
        await worker.wait_until_heard("e", "e")
        worker.process.tell(END_AT_ONCE)


@pytest.mark.usefixtures("program", "no_descriptor_stays_open")
@in_trio
async def test_a_worker_that_a_signal_has_killed_tells_which_also_where_it_was_told_something() -> None:
    worker = Hearing()
    async with trio.open_nursery() as nursery:

        async def kill() -> None:
            await worker.wait_until_heard()
            os.kill(worker.pid, signal.SIGSTOP)
            worker.process.tell(END_IN_GOOD_ORDER)
            os.kill(worker.pid, signal.SIGKILL)

        nursery.start_soon(kill)
        assert await worker.process.run() == -signal.SIGKILL


@pytest.mark.usefixtures("program", "no_descriptor_stays_open")
@in_trio
async def test_cancellation_lets_the_worker_end_by_itself_at_once_and_leaves_nothing() -> None:
    reading, writing = os.pipe()
    worker = Hearing(ends_at="!", stdout=writing, descriptors=(writing,))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(worker.process.run)
        await worker.wait_until_heard()
        nursery.cancel_scope.cancel()
    assert not is_there(worker.pid)
    assert worker.process.pid is None
    os.close(writing)
    assert os.read(reading, 100) == b"ended\n"
    os.close(reading)


@pytest.mark.parametrize("is_stopped", [False, True], ids=["deaf", "stopped"])
@pytest.mark.usefixtures("program", "no_descriptor_stays_open")
def test_cancellation_kills_a_worker_that_heeds_nothing_after_a_second(*, is_stopped: bool) -> None:
    async def main() -> None:
        worker = Hearing(ends_at="")
        with trio.fail_after(FAR_BEYOND_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(worker.process.run)
                await worker.wait_until_heard()
                if is_stopped:
                    os.kill(worker.pid, signal.SIGSTOP)
                began_s = trio.current_time()
                nursery.cancel_scope.cancel()
            took_s = trio.current_time() - began_s
        assert not is_there(worker.pid)
        assert 1 <= took_s < 8
        assert is_stopped or worker.process.pid is None

    trio.run(main)


@pytest.mark.usefixtures("program", "no_descriptor_stays_open")
@in_trio
async def test_whatever_ends_the_hearing_ends_the_worker() -> None:
    pids = []

    def hear(report: Report) -> None:
        pids.append(worker.pid)
        raise SystemFailure("no such report was expected")

    worker = WorkerProcess(VARIABLE, {"ends_at": ["!"]}, [], hear)
    with pytest.raises(SystemFailure, match="no such report"):
        await worker.run()
    assert pids
    assert not is_there(pids[0] or 0)


@pytest.mark.usefixtures("no_descriptor_stays_open")
@in_trio
async def test_a_worker_that_cannot_be_started_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["python", "x" * 10_000_000])
    with pytest.raises(OSError, match="Argument list too long"):
        await Hearing().process.run()


def test_a_worker_whose_first_process_is_killed_hears_of_it_and_ends(program: Path) -> None:
    with subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == b"reported\n"
        first.kill()
        rest, _ = first.communicate(timeout=FAR_BEYOND_S)  # until nobody is left who could write there
    assert rest == b"ended\n"


@pytest.mark.usefixtures("program", "no_descriptor_stays_open")
@in_trio
async def test_a_share_and_a_report_may_be_longer_than_any_buffer() -> None:
    worker = Hearing(name="x" * 1_000_000)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(worker.process.run)
        await worker.wait_until_heard()
        assert worker.reports[0]["share"]["name"] == "x" * 1_000_000
        worker.process.tell(END_IN_GOOD_ORDER)


@pytest.mark.usefixtures("no_descriptor_stays_open")
@in_trio
async def test_of_reports_that_come_together_the_newest_whole_one_is_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "hasty.py"
    program.write_text(f"""
import json, os
share = json.loads(os.pread(int(os.environ["{VARIABLE}"]), 1000, 0))
os.write(share["control"], b'{{"count": 1}}\\n{{"count": 2}}\\n{{"count"')
""")
    monkeypatch.setattr(sys, "orig_argv", ["python", str(program)])
    worker = Hearing()
    assert await worker.process.run() == 0
    assert worker.reports == [{"count": 2}]


# What is reported, and when.


def reports_of(control: socket.socket) -> list[Report]:
    """What has been reported since the last time."""
    try:
        return [json.loads(line) for line in control.recv(1 << 20).splitlines()]
    except BlockingIOError:
        return []


def in_virtual_time(main: Callable[[Assignment, socket.socket], Any]) -> None:
    """Run *main* with an assignment and the first process's end of its control socket; sleeping takes no time."""
    near, far = socket.socketpair()
    with near:
        near.setblocking(False)
        assignment = Assignment({}, far.detach())
        trio.run(main, assignment, near, clock=trio.testing.MockClock(autojump_threshold=0.01))


@pytest.mark.usefixtures("no_descriptor_stays_open")
def test_what_is_new_is_reported_within_half_a_second_or_at_once_where_asked_for_and_only_once() -> None:
    document = {"count": 0}

    async def main(assignment: Assignment, near: socket.socket) -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(assignment.serve, lambda: document, wishes.append)
            await trio.sleep(60.1)
            assert reports_of(near) == [{"count": 0}]
            document["count"] = 1
            assignment.report_now()
            await trio.sleep(0.001)
            assert reports_of(near) == [{"count": 1}]
            document["count"] = 2
            await trio.sleep(0.501)
            assert reports_of(near) == [{"count": 2}]
            assignment.report_now()
            await trio.sleep(0.001)
            assert reports_of(near) == []
            nursery.cancel_scope.cancel()

    wishes: list[bytes] = []
    in_virtual_time(main)
    assert wishes == []


@pytest.mark.usefixtures("no_descriptor_stays_open")
def test_a_worker_goes_on_for_as_long_as_it_likes_when_the_first_process_is_gone() -> None:
    async def main(assignment: Assignment, near: socket.socket) -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(assignment.serve, lambda: {"now_s": trio.current_time()}, wishes.append)
            await trio.sleep(1)
            near.send(b"ab")
            near.close()  # with reports that nobody has read: the other end is reset
            await trio.sleep(60)
            assert wishes in ([b"a", b"b", b""], [b""])
            os.kill(os.getpid(), signal.SIGTERM)
            await trio.sleep(1)
            assert wishes[-1] == END_IN_GOOD_ORDER
            nursery.cancel_scope.cancel()

    wishes: list[bytes] = []
    in_virtual_time(main)


# What happens to workers that die.


class Passing(WorkerProcess):
    """A worker that lives for so long, in the time of the test."""

    def __init__(self, life_s: float) -> None:
        super().__init__(VARIABLE, {}, [], lambda _: None)
        self._life_s = life_s

    async def run(self) -> int:
        """Live and die."""
        await trio.sleep(self._life_s)
        return 7


def gaps_s(*lives_s: float) -> list[float]:
    """Let workers live for so long one after the other; return how long it takes from each to the next."""
    ends_s: list[float] = []
    gaps_s: list[float] = []
    remaining = list(lives_s)
    stopping = Stopping()

    def make() -> WorkerProcess:
        if ends_s:
            gaps_s.append(trio.current_time() - ends_s[-1])
        return Passing(remaining.pop(0))

    def ended(code: int | OSError) -> None:
        assert code == 7
        ends_s.append(trio.current_time())
        if not remaining:
            stopping.set("all have lived")

    trio.run(keep_running, make, stopping, ended, clock=trio.testing.MockClock(autojump_threshold=0))
    return gaps_s


def test_workers_that_die_at_once_are_replaced_after_a_growing_delay() -> None:
    for gap_s, ceiling_s in zip(gaps_s(*[0] * 9), (0.05, 0.1, 0.2, 0.4, 0.8, 1, 1, 1), strict=True):
        assert ceiling_s / 2 <= gap_s <= ceiling_s + 1e-9


def test_a_worker_that_has_lived_for_ten_seconds_is_replaced_as_if_it_were_the_first() -> None:
    *_, grown_s, proved_s = gaps_s(0, 0, 0, 9.9, 10.1, 0)
    assert grown_s > FIRST_DELAY_S
    assert proved_s <= FIRST_DELAY_S + 1e-9


@pytest.mark.usefixtures("program", "no_descriptor_stays_open")
@in_trio
async def test_a_killed_worker_is_replaced_and_the_last_one_ends_in_good_order() -> None:
    workers: list[Hearing] = []
    codes: list[int | OSError] = []
    stopping = Stopping()

    def make() -> WorkerProcess:
        workers.append(Hearing(ends_at="e", exit_code=5))
        return workers[-1].process

    async with trio.open_nursery() as nursery:
        nursery.start_soon(keep_running, make, stopping, codes.append)
        await trio.testing.wait_all_tasks_blocked()
        for number in range(2):
            await until(lambda: len(workers) > number)  # noqa: B023  # awaited here
            await workers[number].wait_until_heard()
            if number == 0:
                os.kill(workers[0].pid, signal.SIGKILL)
        stopping.set("the test is over")
    assert codes == [-signal.SIGKILL, 5]
    assert len(workers) == 2
    assert not any(is_there(worker.pid) for worker in workers)


@pytest.mark.usefixtures("program", "no_descriptor_stays_open")
@in_trio
async def test_a_stop_that_comes_while_a_worker_starts_reaches_it() -> None:
    codes: list[int | OSError] = []
    stopping = Stopping()

    def make() -> WorkerProcess:
        stopping.set("before it is there")
        return Hearing(ends_at="e", exit_code=5).process

    await keep_running(make, stopping, codes.append)
    assert codes == [5]


def test_a_stop_that_comes_between_two_workers_makes_no_other() -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keep_running, make, stopping, codes.append)
            await trio.sleep(FIRST_DELAY_S / 4)
            stopping.set("between two")
        assert trio.current_time() - began_s < FIRST_DELAY_S / 2

    def make() -> WorkerProcess:
        made.append(Passing(0))
        return made[-1]

    made: list[Passing] = []
    codes: list[int | OSError] = []
    stopping = Stopping()
    clock = trio.testing.MockClock(autojump_threshold=0)
    began_s = clock.current_time()
    trio.run(main, clock=clock)
    assert (len(made), codes) == (1, [7])
    trio.run(keep_running, make, stopping, codes.append)
    assert len(made) == 1, "a program that is to stop starts none"


def test_whoever_is_told_of_an_end_may_refuse_another_worker() -> None:
    def refuse(code: int | OSError) -> None:
        raise SystemFailure(f"ended with {code}")

    with pytest.raises(SystemFailure, match="ended with 7"):
        trio.run(keep_running, lambda: Passing(0), Stopping(), refuse)


@pytest.mark.usefixtures("program", "no_descriptor_stays_open")
def test_a_worker_for_which_there_is_no_room_is_told_and_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits until it has inherited what it is to inherit does not wait for ever."""
    stopping, workers, told = Stopping(), [], []

    async def no_room(*_: object, **__: object) -> trio.Process:
        raise BlockingIOError("no room")

    def make() -> WorkerProcess:
        workers.append(WorkerProcess(VARIABLE, {}, [], lambda _: None))
        return workers[-1]

    def ended(end: int | OSError) -> None:
        told.append(end)
        if len(told) == 3:
            stopping.set("tried often enough")

    monkeypatch.setattr(trio.lowlevel, "open_process", no_room)
    trio.run(keep_running, make, stopping, ended, clock=trio.testing.MockClock(autojump_threshold=0))
    assert [str(end) for end in told] == ["no room"] * 3
    assert all(worker.has_started.is_set() and worker.pid is None for worker in workers)


# What makes a process a worker, or does not.


def assignment_of(text: str) -> Assignment | None:
    """What a process takes from such a variable."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, text)
        try:
            return own_assignment(VARIABLE)
        finally:
            assert VARIABLE not in os.environ


def test_a_process_is_no_worker_unless_it_is_told_so() -> None:
    assert own_assignment(VARIABLE) is None


@pytest.mark.usefixtures("no_descriptor_stays_open")
def test_an_assignment_has_its_share_and_leaves_no_file_open() -> None:
    with tempfile.TemporaryFile("w") as file, socket.socket() as control:
        json.dump({"control": control.fileno(), "name": "one", "many": [[1], []]}, file)
        file.flush()
        assignment = assignment_of(str(os.dup(file.fileno())))
        assert assignment is not None
        assert assignment.share == {"name": "one", "many": [[1], []]}
        control.getsockname()  # raises if it is closed: it is for `serve` to take


@pytest.mark.parametrize("text", ["", "x", "-1", "1000000000", "9" * 20, "9" * 5000])
def test_a_variable_that_names_no_file_is_told(text: str) -> None:
    with pytest.raises(ConfigError, match=f"{VARIABLE}='{text}' is no share of this program's work: unset it"):
        assignment_of(text)


# No number is that of a descriptor.
VALUES = st.recursive(
    st.none() | st.integers(max_value=-1) | st.integers(min_value=1 << 24) | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.just("control"), inner),
)


@given(VALUES.map(lambda value: json.dumps(value).encode()) | st.binary() | st.just(b"[" * 100_000))
def test_whatever_stands_in_a_file_that_is_no_share_it_is_an_error_of_configuration(content: bytes) -> None:
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        with pytest.raises(ConfigError, match="unset it"):
            assignment_of(str(file.fileno()))


def test_a_control_that_is_no_socket_is_told() -> None:
    with tempfile.TemporaryFile("w") as file:
        file.write(json.dumps({"control": file.fileno()}))
        file.flush()
        with pytest.raises(ConfigError, match="unset it"):
            assignment_of(str(file.fileno()))


def test_a_program_with_a_hostile_variable_says_so_in_one_line(program: Path) -> None:
    environment = {**os.environ, VARIABLE: "x\ny"}
    command = [sys.executable, str(program)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=FAR_BEYOND_S, check=False)
    assert ended.returncode == ConfigError.exit_code
    assert (ended.stdout, ended.stderr) == (
        "",
        f"test: {VARIABLE}='x\\ny' is no share of this program's work: unset it\n",
    )


# What workers have counted together.

COUNTS = st.dictionaries(st.sampled_from("abc"), st.integers(0, 9))
DOCUMENTS = st.fixed_dictionaries({"bytes": COUNTS, "bridges": st.lists(COUNTS, min_size=2, max_size=2)})


@given(DOCUMENTS, DOCUMENTS, DOCUMENTS)
def test_reports_add_up_in_any_order(one: Report, other: Report, third: Report) -> None:
    assert added(one, other) == added(other, one)
    assert added(added(one, other), third) == added(one, added(other, third))
    assert added({}, one) == added(one, {}) == one


def test_numbers_add_up_and_texts_stay() -> None:
    bridge = {"listen": "tcp://:1", "active": 2, "ended": {"eof": 1}}
    other = {"listen": "tcp://:1", "active": 3, "ended": {"idle": 4, "eof": 1}}
    assert added({"bridges": [bridge]}, {"bridges": [other]}) == {
        "bridges": [{"listen": "tcp://:1", "active": 5, "ended": {"eof": 2, "idle": 4}}]
    }
