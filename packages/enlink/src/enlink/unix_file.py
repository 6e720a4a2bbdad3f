"""A unix socket that listens at a path: when another's file there may be replaced, and when ours is removed."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from enlink.errors import CannotCreate


class UnixFile:
    """A socket that listens at *path*, where everybody may connect who may write to it by *mode*.

    A dead program's socket is replaced. Two programs that begin at the same time do not take each other's for one.

    Raises:
        OSError: EADDRINUSE, while somebody listens there, or is about to.
        CannotCreate: something is there that is no socket, or there cannot be a file.
    """

    def __init__(self, path: Path, mode: int, backlog: int) -> None:
        self._path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with _alone_in(path.parent):
                _remove_dead(path)
                self.socket.bind(str(path))
                self._identity = path.lstat()
                # Until it listens nobody can connect, whatever the mode was until now.
                path.chmod(mode)
                self.socket.listen(backlog)
        except CannotCreate:
            self.socket.close()
            raise
        except OSError as error:
            self.socket.close()
            if error.errno == errno.EADDRINUSE:
                raise
            raise CannotCreate(
                f"cannot make the socket {path} ({error.strerror}): make its directory, or make that writable"
            ) from error

    def remove(self) -> None:
        """Remove the file, if it is still this socket's."""
        with suppress(OSError):  # somebody was faster, or the directory is gone
            if os.path.samestat(self._path.lstat(), self._identity):
                self._path.unlink()


@contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    """Keep others who do the same out of a directory. They do not wait: they find the address in use."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OSError(errno.EADDRINUSE, "another program is making a socket there") from error
        yield
    finally:
        os.close(descriptor)


def _remove_dead(path: Path) -> None:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise CannotCreate(f"cannot make the socket {path}: something else is there, which is no socket; remove it")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except BlockingIOError:  # somebody is there, and busy
            pass
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
