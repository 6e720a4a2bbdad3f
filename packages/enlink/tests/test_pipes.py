"""A pool lends empty pipes, as many as it may, makes do with what the system gives it, and leaves none open."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from enlink.pipes import MAX_PIPES, PIPE_BYTES, Pipe, PipePool


@pytest.fixture(autouse=True)
def no_descriptor_is_left() -> Iterator[None]:
    before = len(list(Path("/proc/self/fd").iterdir()))
    yield
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.fixture
def pool() -> Iterator[PipePool]:
    pool = PipePool(2)
    yield pool
    pool.close()


def take(pool: PipePool) -> Pipe:
    pipe = pool.take()
    assert pipe is not None
    return pipe


def test_a_pipe_is_as_large_as_anybody_may_have_it_and_never_waits(pool: PipePool) -> None:
    pipe = take(pool)
    assert pipe.size_bytes == PIPE_BYTES
    with pytest.raises(BlockingIOError):
        os.read(pipe.read_end, 1)
    pool.give_back(pipe)


def test_no_more_are_lent_than_there_may_be_and_those_that_come_back_are_lent_again(pool: PipePool) -> None:
    one, other = take(pool), take(pool)
    assert pool.take() is None
    pool.give_back(one)
    assert pool.take() is one
    assert pool.take() is None
    pool.give_back(other)
    pool.give_back(one)


def test_a_pipe_that_comes_back_with_bytes_in_it_is_lent_to_nobody(pool: PipePool) -> None:
    """They are another connection's."""
    pipe, other = take(pool), take(pool)
    os.write(pipe.write_end, b"secret")
    pipe.held_bytes = 6
    pool.give_back(pipe)
    fresh = take(pool)
    assert fresh is not pipe
    with pytest.raises(BlockingIOError):
        os.read(fresh.read_end, 1)
    pool.give_back(fresh)
    pool.give_back(other)


def test_a_pool_for_none_lends_none() -> None:
    assert PipePool(0).take() is None


def test_without_descriptors_none_is_lent_until_there_are_some(pool: PipePool, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_descriptors(_: int) -> tuple[int, int]:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pipe2", no_descriptors)
        assert pool.take() is None
    pool.give_back(take(pool))


@pytest.mark.parametrize(("size", "more"), [(64 * 1024, True), (4096, False)])
def test_a_user_who_has_used_up_its_share_gets_small_pipes_and_soon_no_more(
    pool: PipePool, monkeypatch: pytest.MonkeyPatch, size: int, more: bool
) -> None:
    """The kernel refuses to enlarge pipes then, and later makes new ones of a page: see pipe(7)."""
    really = fcntl.fcntl

    def used_up(descriptor: int, command: int, *words: Any) -> Any:
        if command == fcntl.F_SETPIPE_SZ:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        return size if command == fcntl.F_GETPIPE_SZ else really(descriptor, command, *words)

    monkeypatch.setattr(fcntl, "fcntl", used_up)
    pipe = take(pool)
    assert pipe.size_bytes == size
    another = pool.take()
    assert (another is not None) is more
    for lent in (pipe, another):
        if lent is not None:
            pool.give_back(lent)


def test_all_pipes_together_are_what_a_user_without_privileges_may_have() -> None:
    pages = int(Path("/proc/sys/fs/pipe-user-pages-soft").read_text())
    assert pages * os.sysconf("SC_PAGE_SIZE") >= MAX_PIPES * PIPE_BYTES
    assert int(Path("/proc/sys/fs/pipe-max-size").read_text()) >= PIPE_BYTES
