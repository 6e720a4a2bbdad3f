"""Pipes through which splice(2) moves bytes inside the kernel, and a pool that lends them out. Moves nothing itself."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from typing import Final

# Choices of ours.
PIPE_BYTES: Final = 1024 * 1024  # /proc/sys/fs/pipe-max-size, what anybody may ask for
MAX_PIPES: Final = 64  # of that size: /proc/sys/fs/pipe-user-pages-soft, what a user without privileges may have
USEFUL_BYTES: Final = 64 * 1024  # what a pipe has without asking, as long as its user has few of them


class Pipe:
    """Both ends of a pipe, non-blocking, and how many bytes its user has put in and not taken out."""

    __slots__ = ("held_bytes", "read_end", "size_bytes", "write_end")

    def __init__(self) -> None:
        self.read_end, self.write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.held_bytes = 0
        with suppress(PermissionError):
            fcntl.fcntl(self.write_end, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self.size_bytes: int = fcntl.fcntl(self.write_end, fcntl.F_GETPIPE_SZ)

    def close(self) -> None:
        os.close(self.read_end)
        os.close(self.write_end)


class PipePool:
    """Lends empty pipes, up to a limit, and keeps those that come back."""

    def __init__(self, limit: int) -> None:
        self._free: list[Pipe] = []
        self._left = limit

    def take(self) -> Pipe | None:
        """Return an empty pipe, or None if as many as there may be are in use."""
        if self._free:
            return self._free.pop()
        if not self._left:
            return None
        try:
            pipe = Pipe()
        except OSError:  # out of descriptors: copying needs none
            return None
        self._left -= 1
        if pipe.size_bytes < USEFUL_BYTES:  # others of this user have all that it may have
            self._left = 0
        return pipe

    def give_back(self, pipe: Pipe) -> None:
        """Take a pipe back; one that is not empty is closed."""
        if pipe.held_bytes:
            pipe.close()
            self._left += 1
        else:
            self._free.append(pipe)

    def close(self) -> None:
        """Close the pipes that are here, and lend no more."""
        self._left = 0
        while self._free:
            self._free.pop().close()
