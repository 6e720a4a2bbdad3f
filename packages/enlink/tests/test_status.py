"""What a program tells about itself: counters, locks between real processes, sockets with bad clients."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import resource
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
from enlink import status
from enlink.errors import CannotCreate, NotPermitted, ProtocolError, Unavailable
from enlink.status import (
    Counters,
    InstanceLock,
    fetch_status,
    live_instances,
    render_status,
    runtime_directory,
    serve_status,
)
from enlink.testing.hosts import Network
from hypothesis import given
from hypothesis import strategies as st

NOBODY = 65534
FAR_BEYOND_S = 20  # everything here takes milliseconds
CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x20000, 0x4000, 0x40000  # linux/sched.h, linux/mount.h

HOLD_A_LOCK = """
import sys
from enlink.status import InstanceLock
with InstanceLock("enta", "default", facts={"tun": "eng0"}):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_counters_are_nested_by_group_and_sorted() -> None:
    counters = Counters()
    counters.add("dropped", "spoof_src")
    counters.add("dropped", "not_ip", 2)
    counters.add("dropped", "spoof_src")
    assert counters.snapshot() == {"dropped": {"not_ip": 2, "spoof_src": 2}}
    assert list(counters.snapshot()["dropped"]) == ["not_ip", "spoof_src"]


def test_the_data_plane_counts_in_a_group_directly() -> None:
    counters = Counters()
    packets = counters.group("packets")
    packets["to_link"] += 64
    counters.add("packets", "to_link")
    assert packets is counters.group("packets")
    assert counters.snapshot() == {"packets": {"to_link": 65}}


def test_a_snapshot_does_not_change_with_the_counters() -> None:
    counters = Counters()
    counters.add("packets", "to_link")
    snapshot = counters.snapshot()
    counters.add("packets", "to_link")
    assert snapshot == {"packets": {"to_link": 1}}


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path / "run"))
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def no_descriptor_stays_open() -> Iterator[None]:
    before = set(Path("/proc/self/fd").iterdir())
    yield
    assert set(Path("/proc/self/fd").iterdir()) == before


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


@contextmanager
def user_nobody() -> Iterator[None]:
    """Be another user, in this process and for as long as the block runs."""
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that everybody may enter, unlike pytest's, and that belongs to nobody."""
    path = Path(tempfile.mkdtemp(prefix="eng-test-"))
    os.chown(path, NOBODY, NOBODY)
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def test_another_user_has_it_in_the_session(public: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
        listening(found[0].status_path).close()  # which leaves the file, as the death of a process does
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
        InstanceLock("enta-like", "default"),
    ):
        assert [found.instance for found in live_instances("enta")] == ["default-2", "default"]
        assert live_instances("enta")[0].status_path == tmp_path / "status"
        assert len(live_instances("entg")) == 2
        with pytest.raises(CannotCreate, match="entg default on port 6980 runs here already"):
            InstanceLock("entg", "default", listen_port=6980).__enter__()
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
        patched.setattr(status, "runtime_directory", lambda: directory)
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


@asynccontextmanager
async def serving(path: Path, snapshot: Callable[[], Mapping[str, object]]) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_status, path, snapshot)
        yield
        nursery.cancel_scope.cancel()


def listening(path: Path, backlog: int = 1) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    sock.listen(backlog)
    return sock


def test_each_question_is_answered_with_the_state_of_the_moment(tmp_path: Path) -> None:
    async def main() -> None:
        counters = Counters()
        async with serving(tmp_path / "s", lambda: {"address": Path("/x"), "counters": counters.snapshot()}):
            assert await fetch_status(tmp_path / "s") == {
                "address": "/x",
                "counters": {},
                "log": {"dropped_lines": 0},
            }
            counters.add("dropped", "not_ip")
            document = await fetch_status(tmp_path / "s")
            assert document["counters"] == {"dropped": {"not_ip": 1}}

    trio.run(main)


@pytest.mark.proves("D18")
def test_the_socket_is_for_its_user_only_and_goes_with_its_program(public: Path) -> None:
    path = public / "s"

    async def main() -> None:
        umask = os.umask(0)
        try:
            async with serving(path, dict):
                assert mode_of(path) == 0o600
                with user_nobody(), pytest.raises(NotPermitted, match="run this as that user or as root"):
                    await fetch_status(path)
                assert await fetch_status(path)
            assert not path.exists()
        finally:
            os.umask(umask)

    trio.run(main)


def test_clients_that_never_read_keep_nobody_else_from_an_answer(
    tmp_path: Path,
) -> None:
    """Eight are served at once, each for two seconds at most; the ninth waits until then."""

    async def main() -> None:
        async with serving(tmp_path / "s", lambda: {"large": "x" * 4_000_000}):
            start_s = trio.current_time()
            idle = [await trio.open_unix_socket(tmp_path / "s") for _ in range(8)]
            document = await fetch_status(tmp_path / "s")
            assert len(document["large"]) == 4_000_000
            assert trio.current_time() - start_s == pytest.approx(2)
            for stream in idle:
                await stream.aclose()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_client_that_hangs_up_or_talks_costs_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path / "s", lambda: {"large": "x" * 4_000_000}):
            for _ in range(20):
                stream = await trio.open_unix_socket(tmp_path / "s")
                await stream.send_all(b"GET / HTTP/1.1\r\n\r\n")
                await stream.aclose()
            with trio.fail_after(FAR_BEYOND_S):
                assert await fetch_status(tmp_path / "s")

    trio.run(main)


def test_no_connection_survives_the_server(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path / "s", lambda: {"large": "x" * 4_000_000}):
            stream = await trio.open_unix_socket(tmp_path / "s")
            await trio.testing.wait_all_tasks_blocked()
        received = 0
        with trio.fail_after(FAR_BEYOND_S):
            while data := await stream.receive_some():
                received += len(data)
        assert received < 4_000_000
        await stream.aclose()

    trio.run(main)


@pytest.mark.proves("F53")
def test_without_descriptors_the_server_waits_until_there_are_some(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path / "s", dict):
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            with socket.socket(socket.AF_UNIX) as client:
                client.setblocking(False)
                resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free_descriptor(), hard))
                try:
                    client.connect(str(tmp_path / "s"))
                    await trio.sleep(10)  # of the test's clock: far more attempts than the server has places
                    with pytest.raises(BlockingIOError):
                        client.recv(1)
                finally:
                    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
                with trio.fail_after(FAR_BEYOND_S):
                    await trio.lowlevel.wait_readable(client)
                assert json.loads(client.recv(1000)) == {"log": {"dropped_lines": 0}}

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def lowest_free_descriptor() -> int:
    descriptor = os.dup(0)
    os.close(descriptor)
    return descriptor


@pytest.mark.proves("F13")
def test_a_dead_programs_socket_is_replaced(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path / "s", dict):
            assert await fetch_status(tmp_path / "s")

    listening(tmp_path / "s").close()
    assert (tmp_path / "s").is_socket()
    trio.run(main)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("backlog", [8, 0])
def test_a_live_programs_socket_is_left_alone(tmp_path: Path, backlog: int) -> None:
    """Even if it is so busy that nobody else can connect."""
    with listening(tmp_path / "s", backlog) as sock, socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "s"))
        with pytest.RaisesGroup(pytest.RaisesExc(CannotCreate, match="another program answers at")):
            trio.run(start_and_stop, tmp_path / "s")
        sock.accept()[0].close()
        assert (tmp_path / "s").is_socket()


async def start_and_stop(path: Path) -> None:
    async with serving(path, dict):
        pass


@pytest.mark.proves("D18")
def test_what_is_no_socket_of_ours_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    listening(tmp_path / "foreign").close()
    os.chown(tmp_path / "foreign", NOBODY, NOBODY)
    for name in ("file", "link", "foreign"):
        with pytest.RaisesGroup(pytest.RaisesExc(CannotCreate, match="not a socket of ours: remove it")):
            trio.run(start_and_stop, tmp_path / name)
        assert (tmp_path / name).lstat()


@pytest.mark.parametrize("name", ["missing/s", "x" * 108])
def test_a_place_where_no_socket_can_be_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.RaisesGroup(pytest.RaisesExc(CannotCreate, match=r"cannot make the status socket .*choose another")):
        trio.run(start_and_stop, tmp_path / name)


def test_a_server_removes_no_socket_but_its_own(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path / "s", dict):
            (tmp_path / "s").unlink()
        async with serving(tmp_path / "s", dict):
            (tmp_path / "s").unlink()
            listening(tmp_path / "s").close()

    trio.run(main)
    assert (tmp_path / "s").is_socket()


def test_asking_where_nobody_is_says_so(tmp_path: Path) -> None:
    listening(tmp_path / "dead").close()
    for name in ("missing", "dead"):
        with pytest.raises(Unavailable, match=f"nobody answers at {tmp_path / name}.*is the program running"):
            trio.run(fetch_status, tmp_path / name)


def test_asking_a_program_that_hangs_ends_after_5_s(tmp_path: Path) -> None:
    with listening(tmp_path / "s"), pytest.raises(Unavailable, match=r"no answer at .* within 5 s"):
        trio.run(fetch_status, tmp_path / "s", clock=trio.testing.MockClock(autojump_threshold=0))


@pytest.mark.parametrize("answer", [b"", b"SSH-2.0-OpenSSH\r\n", b"[]", b"\xff", b"{"])
def test_an_answer_that_is_no_status_is_refused(tmp_path: Path, answer: bytes) -> None:
    with listening(tmp_path / "s") as sock, ThreadPoolExecutor(1) as threads:
        threads.submit(send_to_the_next, sock, answer)
        with pytest.raises(ProtocolError, match="sends no status"):
            trio.run(fetch_status, tmp_path / "s")


def test_an_endless_answer_is_not_read_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "STATUS_LIMIT_BYTES", 100_000)
    with listening(tmp_path / "s") as sock, ThreadPoolExecutor(1) as threads:
        sending = threads.submit(send_to_the_next, sock, b" " * 100_000_000)
        with pytest.raises(ProtocolError):
            trio.run(fetch_status, tmp_path / "s")
        assert isinstance(sending.exception(FAR_BEYOND_S), BrokenPipeError)


def send_to_the_next(sock: socket.socket, answer: bytes) -> None:
    connection, _ = sock.accept()
    with connection:
        connection.sendall(answer)


def test_a_status_is_laid_out_with_its_values_in_one_column() -> None:
    document = {
        "program": "enta",
        "capturing": True,
        "ports": ["tcp/7:6978", "udp/53:6979"],
        "uplink": {"connected": False, "address": None, "rtt_s": 0.5},
        "legs": [{"name": "enta"}, {"name": "entg"}],
        "counters": {"dropped": {"not_ip": 12}, "ended": {}},
        "routes": [],
    }
    assert render_status(document) == (
        "program      enta\n"
        "capturing    yes\n"
        "ports        tcp/7:6978, udp/53:6979\n"
        "uplink\n"
        "  connected  no\n"
        "  address    -\n"
        "  rtt_s      0.5\n"
        "legs\n"
        "  1\n"
        "    name     enta\n"
        "  2\n"
        "    name     entg\n"
        "counters\n"
        "  dropped\n"
        "    not_ip   12\n"
        "  ended      -\n"
        "routes       -\n"
    )
    assert render_status({}) == ""


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=10,
)


@pytest.mark.proves("D24")
@given(st.dictionaries(st.text(max_size=8), json_values, max_size=4))
def test_no_status_reaches_the_terminal_with_control_characters(document: dict[str, object]) -> None:
    rendered = render_status(document)
    assert all(line.isprintable() for line in rendered.splitlines())
    assert len(rendered.splitlines()) >= len(document)
