"""What a program tells about itself: counters, and a socket with bad clients."""

from __future__ import annotations

import json
import os
import resource
import socket
import stat
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
from enlink import status
from enlink.errors import CannotCreate, NotPermitted, ProtocolError, Unavailable
from enlink.status import Counters, fetch_status, render_status, serve_status
from hypothesis import given
from hypothesis import strategies as st

UserNobody = Callable[[], AbstractContextManager[None]]

NOBODY = 65534
FAR_BEYOND_S = 20  # everything here takes milliseconds

pytestmark = pytest.mark.usefixtures("no_descriptor_stays_open")


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
def test_the_socket_is_for_its_user_only_and_goes_with_its_program(
    public: Path, user_nobody: Callable[[], AbstractContextManager[None]]
) -> None:
    path = public / "s"

    async def main() -> None:
        umask = os.umask(0)
        try:
            async with serving(path, dict):
                assert stat.S_IMODE(path.stat().st_mode) == 0o600
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
