"""An ordinary program's one connection, which may meet anything and must lose nothing: for tests."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

from enlink.testing.hosts import Host

FAR_BEYOND_S: Final = 40.0
MIB: Final = 1 << 20
NOWHERE: Final = "1.1.1.1"  # no host of a test has it, and none routes to it


def until(condition: Callable[[], object], what: str) -> float:
    """Poll until *condition* holds and return how long that took, in seconds."""
    began_s = time.monotonic()
    while not condition():
        if time.monotonic() - began_s > FAR_BEYOND_S:
            raise AssertionError(f"never {what}")
        time.sleep(0.01)
    return time.monotonic() - began_s


class Transfer:
    """An ordinary program that sends to an echo server without end, until the block ends; then all must have come back.

    Its one connection is the promise: nothing of it may be lost, doubled or changed, whatever happens meanwhile.
    """

    def __init__(self, host: Host, port: int = 7) -> None:
        with host.entered():
            self._connection = socket.create_connection((NOWHERE, port), FAR_BEYOND_S)
        self._connection.settimeout(FAR_BEYOND_S)
        self._sent, self._received = hashlib.sha256(), hashlib.sha256()
        self._is_enough = threading.Event()
        self.received_bytes = 0
        self._threads = [threading.Thread(target=self._send), threading.Thread(target=self._receive)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        until(lambda: self.received_bytes > MIB, "under way")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_enough.set()
        for thread in self._threads:
            thread.join(FAR_BEYOND_S)
        self._connection.close()
        if error is None and self._received.digest() != self._sent.digest():
            raise AssertionError("what came back is not what was sent")

    def goes_on(self) -> None:
        """Wait until another mebibyte has come back."""
        received_bytes = self.received_bytes
        until(lambda: self.received_bytes - received_bytes > MIB, "went on")

    def _send(self) -> None:
        while not self._is_enough.wait(0.01):
            piece = os.urandom(1 << 16)
            self._connection.sendall(piece)
            self._sent.update(piece)
        self._connection.shutdown(socket.SHUT_WR)

    def _receive(self) -> None:
        while piece := self._connection.recv(1 << 18):
            self._received.update(piece)
            self.received_bytes += len(piece)
