"""Run our programs on hosts made of namespaces, for tests: what they log, tell and hold, and how they end."""

from __future__ import annotations

import functools
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import trio

from enlink.testing.hosts import Host

FAR_BEYOND_S = 40.0  # for what takes a second at most on a machine that has nothing else to do


def in_trio(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run a test in trio, by the clock on the wall, and fail if it waits for ever."""

    @functools.wraps(test)
    def run(**fixtures: object) -> None:
        async def bounded() -> None:
            with trio.fail_after(FAR_BEYOND_S):
                await test(**fixtures)

        trio.run(bounded)

    return run


async def until(condition: Callable[[], object]) -> None:
    """Poll until *condition* holds: another process has no events for us."""
    while not condition():  # noqa: ASYNC110  # as said
        await trio.sleep(0.01)


def comes_true(condition: Callable[[], object], within_s: float) -> bool:
    """Poll until *condition* holds, and tell whether it did in time."""
    deadline_s = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.005)
    return True


class Program:
    """A running program, which logs as JSON. Made by `started`, which ends it."""

    def __init__(self, host: Host, process: subprocess.Popen[bytes], log: Path, status_path: Path) -> None:
        self.host = host
        self.process = process
        self._log = log
        self._status_path = status_path

    def log(self) -> str:
        """What it has written to standard error."""
        return self._log.read_text(errors="replace")

    def events(self, name: str) -> list[dict[str, Any]]:
        """The events of that name that it has logged, with their fields."""
        lines = [json.loads(line) for line in self.log().splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == name]

    def wait_until_ready(self) -> None:
        """Wait for the event ``ready``."""
        self.wait_until(lambda: bool(self.events("ready")), "ready")

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Poll until *condition* holds.

        Raises:
            AssertionError: it did not, or the program ended first; the text has the log.
        """
        deadline_s = time.monotonic() + FAR_BEYOND_S
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline_s:
                raise AssertionError(f"never {what} (exit {self.process.returncode}):\n{self.log()}")
            time.sleep(0.01)

    def status(self) -> dict[str, Any]:
        """Ask it for its status."""
        with socket.socket(socket.AF_UNIX) as asking:
            asking.settimeout(FAR_BEYOND_S)
            asking.connect(str(self._status_path))
            with asking.makefile("rb") as answer:
                document: dict[str, Any] = json.load(answer)
        return document

    @property
    def resident_bytes(self) -> int:
        """How much of its memory is in use."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * resource.getpagesize()

    @property
    def descriptors(self) -> int:
        """How many files and sockets it has open."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))  # noqa: PTH208  # a Path for each would be slow

    @property
    def cpu_s(self) -> float:
        """How long it has worked, in user and system mode together."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    def wait(self) -> int:
        """Wait until it ends and return its exit code."""
        return self.process.wait(FAR_BEYOND_S)

    def stop(self) -> int:
        """End it in good order and return its exit code."""
        self.signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """End it as a crash would."""
        self.process.kill()
        self.wait()


NOBODY = 65534
_LET_IN = """
import os, subprocess, sys
count = int(sys.argv[1])
roots, argv = sys.argv[2 : 2 + count], sys.argv[2 + count :]
def mount(*words):
    subprocess.run(["mount", *words], check=True)
def closed(root):
    parents = [root]
    while parents[-1] != "/":
        parents.append(os.path.dirname(parents[-1]))
    return next((each for each in reversed(parents) if not os.stat(each).st_mode & 0o001), None)
mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", "/mnt")
doors = {root: closed(root) for root in roots}
for number, root in enumerate(roots):
    os.mkdir(f"/mnt/{number}")
    mount("--rbind", root, f"/mnt/{number}")
for door in {door for door in doors.values() if door}:
    mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", door)
for number, (root, door) in enumerate(doors.items()):
    if door:
        os.makedirs(root, exist_ok=True)
        mount("--rbind", f"/mnt/{number}", root)
os.execvp(argv[0], argv)
"""


def as_nobody(*capabilities: str) -> tuple[str, ...]:
    """What to put before a command, so that it runs as user nobody with these capabilities and no others.

    Python and this code may lie where that user cannot go, in a home directory say: then they are laid open, in a mount
    namespace of the command's own.
    """
    roots = list(dict.fromkeys(map(os.path.realpath, (sys.prefix, sys.base_prefix, *_source_roots()))))
    kept = "".join(f",+{capability}" for capability in capabilities)
    return (
        *("unshare", "--mount", sys.executable, "-c", _LET_IN, str(len(roots)), *roots),
        *("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"),
        *(f"--inh-caps=-all{kept}", f"--ambient-caps=-all{kept}", f"--bounding-set=-all{kept}"),
    )


def _source_roots() -> list[str]:
    """Where our packages are imported from: a clone of the repository, or nowhere but site-packages."""
    return [path for path in sys.path if path.endswith("/src") and Path(path).is_dir()]


@contextmanager
def started(host: Host, program: str, *options: str, under: Sequence[str] = ()) -> Iterator[Program]:
    """Start one of our programs, and make sure that it has ended in the end.

    Args:
        under: what is to start it, with options of its own: ``("prlimit", "--nofile=64")``.
    """
    with tempfile.TemporaryDirectory(prefix="eng-program-") as directory:
        log, status_path = Path(directory) / "log", Path(directory) / "status"
        common = ("--log-format", "json", "--status-socket", str(status_path))
        with log.open("wb") as output:
            argv = [*under, str(Path(sys.executable).parent / program), *options, *common]
            process = host.popen(*argv, stdout=output, stderr=output)
        try:
            yield Program(host, process, log, status_path)
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(5)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
