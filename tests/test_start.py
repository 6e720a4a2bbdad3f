"""Each program, from its first line on, however soon somebody interrupts it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from path import BIN

PROGRAMS = ("enta", "entg", "relay", "echosvr")
MOMENTS = 16
FAR_BEYOND_S = 20.0


class Starting:
    """A program whose first module has been imported: Python's own handler of interrupts is off again."""

    def __init__(self, program: str, process: subprocess.Popen[str]) -> None:
        self._process = process
        assert process.stderr is not None
        while not process.stderr.readline().endswith(f" {program}.__main__\n"):
            assert process.poll() is None
        deadline_s = time.monotonic() + FAR_BEYOND_S
        while self._catches_interrupts():
            assert time.monotonic() < deadline_s, "Python's own handler is still there"

    def _catches_interrupts(self) -> bool:
        lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
        (caught,) = (line.split()[1] for line in lines if line.startswith("SigCgt"))
        return bool(int(caught, 16) & 1 << signal.SIGINT - 1)

    def interrupt(self) -> None:
        self._process.send_signal(signal.SIGINT)

    def end(self) -> tuple[int, str, str]:
        """Wait for its end; return its exit code and what it said on standard output and standard error."""
        said, complained = self._process.communicate(timeout=FAR_BEYOND_S)
        lines = [line for line in complained.splitlines(keepends=True) if not line.startswith("import time:")]
        return self._process.returncode, said, "".join(lines)


@contextmanager
def starting(program: str) -> Iterator[Starting]:
    environment = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}  # a line for each module, as soon as it is there
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [BIN / program, "--version"], stdout=pipe, stderr=pipe, text=True, env=environment
    ) as process:
        try:
            yield Starting(program, process)
        finally:
            process.kill()


@pytest.mark.proves("F06")
@pytest.mark.parametrize("program", PROGRAMS)
def test_an_interrupt_at_any_moment_of_the_start_is_no_traceback(program: str) -> None:
    """Nor is one at the end; nothing has changed on the host by then."""
    began_s = time.monotonic()
    with starting(program) as process:
        _, version, _ = process.end()
    duration_s = time.monotonic() - began_s
    assert version == f"{program} 0.1.0\n"
    outcomes = []
    for moment in range(MOMENTS):
        with starting(program) as process:
            time.sleep(duration_s * moment / MOMENTS)
            process.interrupt()
            outcomes.append(process.end())
    by_the_signal = (-signal.SIGINT, "", "")
    assert by_the_signal in outcomes
    told = (130, "", f"{program}: interrupted\n" if program != "echosvr" else "")
    assert set(outcomes) <= {by_the_signal, told, (0, version, ""), (-signal.SIGINT, version, "")}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_that_is_started_with_interrupts_ignored_goes_on_ignoring_them(program: str) -> None:
    """As a shell starts what is to run in the background."""
    script = 'trap "" INT; echo ignored; exec "$0" --version'
    with subprocess.Popen(["sh", "-c", script, BIN / program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ignored\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == f"{program} 0.1.0\n"
    assert process.returncode == 0
