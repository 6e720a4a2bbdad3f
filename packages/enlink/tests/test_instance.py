"""Which instances of a program run: the directory that is ours alone, and locks between real processes."""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from enlink import instance
from enlink.errors import CannotCreate
from enlink.instance import InstanceLock, live_instances, runtime_directory
from enlink.testing.hosts import Network

UserNobody = Callable[[], AbstractContextManager[None]]

NOBODY = 65534
FAR_BEYOND_S = 20  # everything here takes milliseconds
CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x20000, 0x4000, 0x40000  # linux/sched.h, linux/mount.h

pytestmark = pytest.mark.usefixtures("no_descriptor_stays_open")

HOLD_A_LOCK = """
import sys
from enlink.instance import InstanceLock
with InstanceLock("enta", "default", facts={"tun": "eng0"}):
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path / "run"))
    return tmp_path / "run"


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_first_directory_that_systemd_gives_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNTIME_DIRECTORY", f"{tmp_path}/one:{tmp_path}/two")
    assert runtime_directory() == tmp_path / "one"
    assert not (tmp_path / "two").exists()


def in_a_private_run(function: Callable[[], None]) -> None:
    """Call *function* in a thread that has an empty /run of its own."""
    libc = ctypes.CDLL(None, use_errno=True)

    def call() -> None:
        assert libc.unshare(CLONE_NEWNS) == 0
        assert libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None) == 0
        assert libc.mount(b"tmpfs", b"/run", b"tmpfs", 0, None) == 0
        function()

    with ThreadPoolExecutor(1) as threads:
        threads.submit(call).result(FAR_BEYOND_S)


def test_root_has_its_directory_in_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> None:
        assert runtime_directory() == Path("/run/eng")
        assert runtime_directory() == Path("/run/eng"), "a second time it is there already"
        assert mode_of(Path("/run/eng")) == 0o700

    monkeypatch.delenv("RUNTIME_DIRECTORY")
    in_a_private_run(check)


def test_another_user_has_it_in_the_session(
    public: Path, user_nobody: UserNobody, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RUNTIME_DIRECTORY")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(public))
    with user_nobody():
        assert runtime_directory() == public / "eng"
        assert mode_of(public / "eng") == 0o700
        monkeypatch.delenv("XDG_RUNTIME_DIR")
        with pytest.raises(CannotCreate, match="set XDG_RUNTIME_DIR to a directory of your own"):
            runtime_directory()


@pytest.mark.proves("D18")
def test_a_directory_that_somebody_else_put_there_is_refused(directory: Path) -> None:
    directory.mkdir(mode=0o700)
    os.chown(directory, NOBODY, NOBODY)
    with pytest.raises(CannotCreate, match="belongs to user 65534: remove it"):
        runtime_directory()


@pytest.mark.proves("D18")
def test_a_symbolic_link_in_the_place_is_refused(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o755)
    directory.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CannotCreate, match=r"cannot make the runtime directory .*Not a directory"):
        runtime_directory()
    assert mode_of(tmp_path / "elsewhere") == 0o755


@pytest.mark.proves("D18")
def test_a_directory_that_others_could_enter_is_closed_to_them(directory: Path) -> None:
    directory.mkdir(mode=0o777)
    directory.chmod(0o2777)
    assert runtime_directory() == directory
    assert mode_of(directory) == 0o700


def test_a_directory_that_cannot_be_made_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNTIME_DIRECTORY", "/proc/eng")
    with pytest.raises(CannotCreate, match=r"/proc/eng \(No such file or directory\): make it"):
        runtime_directory()


@contextmanager
def holder() -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock of enta default."""
    argv = [sys.executable, "-c", HOLD_A_LOCK]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "locked\n"
            yield process
        finally:
            process.kill()


@pytest.mark.proves("F15", "D18")
def test_a_second_instance_is_refused_and_told_the_first_ones_process(directory: Path) -> None:
    with holder() as first:
        for _ in range(2):
            with pytest.raises(CannotCreate) as caught, InstanceLock("enta", "default"):
                pass
            assert f"enta default runs here already (process {first.pid}): stop that one first" in str(caught.value)
        (found,) = live_instances("enta")
    assert (found.pid, found.instance, found.facts) == (first.pid, "default", {"tun": "eng0"})
    assert found.network_namespace == Path("/proc/self/ns/net").stat().st_ino
    assert found.status_path == directory / f"enta-default-{found.network_namespace}.sock"


@pytest.mark.proves("F13")
def test_what_a_killed_instance_leaves_is_no_instance_and_is_removed(directory: Path) -> None:
    with holder() as first:
        found = live_instances("enta")
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(found[0].status_path))  # which leaves the file, as the death of a process does
        first.kill()
        first.wait(FAR_BEYOND_S)
    assert len(list(directory.iterdir())) == 2
    assert live_instances("enta") == []
    assert list(directory.iterdir()) == []


@pytest.mark.proves("F13")
def test_the_next_instance_takes_a_dead_ones_place(directory: Path) -> None:
    with holder() as first:
        first.kill()
        first.wait(FAR_BEYOND_S)
        with InstanceLock("enta", "default"):
            (found,) = live_instances("enta")
            assert (found.pid, found.facts) == (os.getpid(), {})


def test_an_orderly_end_leaves_nothing_and_makes_room(directory: Path) -> None:
    for _ in range(2):
        with InstanceLock("enta", "default"):
            assert [path.suffix for path in directory.iterdir()] == [".lock"]
            assert mode_of(next(directory.iterdir())) == 0o600
        assert list(directory.iterdir()) == []


def test_instances_with_other_names_programs_or_ports_do_not_meet(tmp_path: Path) -> None:
    with (
        InstanceLock("enta", "default"),
        InstanceLock("enta", "default-2", status_path=tmp_path / "status"),
        InstanceLock("entg", "default", listen_port=6980),
        InstanceLock("entg", "default", listen_port=7980),
        InstanceLock("entg", "default", listen_port=6980, listen_address="10.0.0.1"),
        InstanceLock("entg", "default", listen_port=6980, listen_address="2001:db8::1"),
        InstanceLock("enta-like", "default"),
    ):
        assert [found.instance for found in live_instances("enta")] == ["default-2", "default"]
        assert live_instances("enta")[0].status_path == tmp_path / "status"
        assert len({found.status_path for found in live_instances("entg")}) == 4
        with pytest.raises(CannotCreate, match="entg default on port 6980 runs here already"):
            InstanceLock("entg", "default", listen_port=6980).__enter__()
        with pytest.raises(CannotCreate, match=r"entg default on port 6980 of 10\.0\.0\.1 runs here already"):
            InstanceLock("entg", "default", listen_port=6980, listen_address="10.0.0.1").__enter__()
    assert live_instances("entg") == []


def test_one_name_in_two_network_namespaces_is_no_conflict() -> None:
    with Network() as network:
        host = network.host("status")
        with InstanceLock("enta", "default") as here, host.entered(), InstanceLock("enta", "default") as there:
            assert len(live_instances("enta")) == 2
            assert here.status_path != there.status_path


def test_whoever_looks_for_live_instances_keeps_nobody_from_starting(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look takes the lock of a stale file for a moment, and removes the file."""
    with InstanceLock("enta", "default"):
        path = next(directory.iterdir())
    path.write_text("")
    looking = path.open()
    fcntl.flock(looking, fcntl.LOCK_EX)
    tries = []

    def sleep(seconds: float) -> None:
        tries.append(seconds)
        path.unlink()
        looking.close()

    monkeypatch.setattr(time, "sleep", sleep)
    with InstanceLock("enta", "default"):
        assert len(live_instances("enta")) == 1
    assert len(tries) == 1


def test_a_lock_on_a_file_that_was_removed_meanwhile_is_not_taken_for_one(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock_file = fcntl.flock
    removed: list[Path] = []

    def flock(descriptor: int, operation: int) -> None:
        if not removed:
            removed.append(next(directory.iterdir()))
            removed[0].unlink()
        lock_file(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with InstanceLock("enta", "default"):
        assert list(directory.iterdir()) == removed
        assert len(live_instances("enta")) == 1
    assert list(directory.iterdir()) == []


def test_looking_for_instances_survives_those_that_end_meanwhile(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once between the listing and the opening of the file, once between the opening and the lock."""
    directory.mkdir()
    open_file, lock_file = os.open, fcntl.flock
    path = directory / "enta-default-1.lock"

    def open_late(name: Path, flags: int) -> int:
        path.unlink(missing_ok=True)
        return open_file(name, flags)

    def flock_late(descriptor: int, operation: int) -> None:
        path.unlink()
        lock_file(descriptor, operation)

    path.write_text("{}")
    with monkeypatch.context() as patched:
        patched.setattr(instance, "runtime_directory", lambda: directory)
        patched.setattr(os, "open", open_late)
        assert live_instances("enta") == []
    path.write_text("{}")
    with monkeypatch.context() as patched:
        patched.setattr(fcntl, "flock", flock_late)
        assert live_instances("enta") == []


@pytest.mark.parametrize(
    "contents", ["", "{", "[]", "3", "{}", '{"status_path": "x", "unknown": 1}', '{"status_path": 1}']
)
def test_an_instance_that_has_not_described_itself_yet_holds_its_lock_all_the_same(
    directory: Path, contents: str
) -> None:
    with InstanceLock("enta", "default"):
        path = next(directory.iterdir())
        path.write_text(contents)
        assert live_instances("enta") == []
        with pytest.raises(CannotCreate, match=r"process unknown"):
            InstanceLock("enta", "default").__enter__()
        assert path.exists()


def test_an_instance_removes_no_file_but_its_own(directory: Path) -> None:
    with InstanceLock("enta", "default"):
        path = next(directory.iterdir())
        path.unlink()
        path.write_text("somebody else's")
    assert path.read_text() == "somebody else's"


def test_of_many_at_once_one_holds_the_lock_at_any_time() -> None:
    holders, most, wins, is_done = [0], [0], [0], threading.Event()

    def compete() -> None:
        for _ in range(30):
            try:
                with InstanceLock("enta", "default"):
                    holders[0] += 1
                    most[0] = max(most[0], holders[0])
                    wins[0] += 1
                    holders[0] -= 1
            except CannotCreate:
                pass

    def look() -> None:
        while not is_done.is_set():
            live_instances("enta")

    with ThreadPoolExecutor(4) as threads:
        looking = threads.submit(look)
        for competing in [threads.submit(compete) for _ in range(3)]:
            competing.result(FAR_BEYOND_S)
        is_done.set()
        looking.result(FAR_BEYOND_S)
    assert most == [1]
    assert wins[0] > 0


@pytest.mark.proves("D18")
def test_a_lock_file_that_is_a_symbolic_link_is_refused(directory: Path, tmp_path: Path) -> None:
    with InstanceLock("enta", "default"):
        path = next(directory.iterdir())
    (tmp_path / "victim").write_text("precious")
    path.symlink_to(tmp_path / "victim")
    with pytest.raises(CannotCreate, match=r"cannot lock .*\(Too many levels of symbolic links\)"):
        InstanceLock("enta", "default").__enter__()
    assert (tmp_path / "victim").read_text() == "precious"
