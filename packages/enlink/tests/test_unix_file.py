"""A socket's file: whom it keeps out, whose place it takes, and that a stranger's is never touched."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
from pathlib import Path

import pytest
from enlink.errors import CannotCreate
from enlink.unix_file import UnixFile


def taken(path: Path) -> None:
    with pytest.raises(OSError, match=r"in use|making a socket") as raised:
        UnixFile(path, 0o600, 16)
    assert raised.value.errno == errno.EADDRINUSE


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666])
def test_the_mode_is_what_was_asked_for_whatever_the_umask(tmp_path: Path, mode: int) -> None:
    before = os.umask(0o077)
    try:
        file = UnixFile(tmp_path / "app", mode, 16)
    finally:
        os.umask(before)
    with file.socket:
        assert stat.S_IMODE((tmp_path / "app").stat().st_mode) == mode
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / "app"))
        file.remove()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.proves("F13")
def test_a_dead_programs_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "app"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
        dead.listen()
    file = UnixFile(path, 0o600, 16)
    with file.socket, socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


@pytest.mark.parametrize("backlog", [0, 16])
def test_a_living_programs_socket_is_left_alone_even_if_it_is_busy(tmp_path: Path, backlog: int) -> None:
    path = tmp_path / "app"
    with socket.socket(socket.AF_UNIX) as alive:
        alive.bind(str(path))
        alive.listen(backlog)
        before = path.lstat()
        for _ in range(3):  # each leaves a connection in the backlog, until it is full
            taken(path)
        assert os.path.samestat(path.lstat(), before)


@pytest.mark.proves("F13")
@pytest.mark.parametrize("kind", ["file", "directory", "link", "fifo"])
def test_what_is_no_socket_is_never_replaced(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "app"
    match kind:
        case "file":
            path.write_text("precious")
        case "directory":
            path.mkdir()
        case "link":
            path.symlink_to(tmp_path / "elsewhere")
        case "fifo":
            os.mkfifo(path)
    before = path.lstat()
    with pytest.raises(CannotCreate, match="something else is there, which is no socket; remove it") as raised:
        UnixFile(path, 0o600, 16)
    assert raised.value.exit_code == 73
    assert str(path) in str(raised.value)
    assert path.lstat().st_ino == before.st_ino
    assert [entry.name for entry in tmp_path.iterdir()] == ["app"]


def test_why_there_cannot_be_a_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(CannotCreate, match=r"\(No such file or directory\): make its directory"):
        UnixFile(tmp_path / "missing" / "app", 0o600, 16)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(str(tmp_path / "app"))
        with pytest.raises(CannotCreate, match="Protocol wrong type"):
            UnixFile(tmp_path / "app", 0o600, 16)


def test_of_two_that_begin_at_once_neither_takes_the_others_socket_for_a_dead_ones(tmp_path: Path) -> None:
    """One that has bound but does not listen yet would look dead."""
    path = tmp_path / "app"
    other = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(other, fcntl.LOCK_EX)
        with socket.socket(socket.AF_UNIX) as beginning:
            beginning.bind(str(path))
            taken(path)
            beginning.listen()
            fcntl.flock(other, fcntl.LOCK_UN)
            taken(path)
    finally:
        os.close(other)


def test_only_a_file_that_is_still_ours_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "app"
    file = UnixFile(path, 0o600, 16)
    path.unlink()
    file.remove()
    successor = UnixFile(path, 0o600, 16)
    file.remove()
    assert path.is_socket()
    successor.remove()
    assert not path.exists()
    for one in (file, successor):
        one.socket.close()
