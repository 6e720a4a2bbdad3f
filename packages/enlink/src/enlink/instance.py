"""Which instances of a program run: the runtime directory, and in it the locks that last as long as their holders.

Files are named by program, instance and network namespace, so that one instance name in two namespaces is no conflict.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from enlink.errors import CannotCreate

# Choices of ours.
LOCK_LIMIT_BYTES: Final = 16 * 1024 * 1024
LOCK_PATIENCE_S: Final = 0.2  # whoever looks for live instances holds a stale lock for microseconds


def runtime_directory() -> Path:
    """Make the directory of locks and status sockets, or check it: ours, with mode 0700, and no symbolic link.

    It is ``$RUNTIME_DIRECTORY`` (systemd), else ``/run/eng`` for root, else ``$XDG_RUNTIME_DIR/eng``.

    Raises:
        CannotCreate: none of these is to be had, or somebody else's is in the place.
    """
    if from_systemd := os.environ.get("RUNTIME_DIRECTORY"):
        path = Path(from_systemd.split(":")[0])
    elif os.geteuid() == 0:
        path = Path("/run/eng")
    elif from_session := os.environ.get("XDG_RUNTIME_DIR"):
        path = Path(from_session) / "eng"
    else:
        raise CannotCreate("no runtime directory: set XDG_RUNTIME_DIR to a directory of your own, or run as root")
    try:
        with suppress(FileExistsError):
            path.mkdir(mode=0o700)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            found = os.fstat(descriptor)
            if found.st_uid != os.geteuid():
                raise CannotCreate(f"the runtime directory {path} belongs to user {found.st_uid}: remove it")
            if stat.S_IMODE(found.st_mode) != 0o700:
                os.fchmod(descriptor, 0o700)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CannotCreate(
            f"cannot make the runtime directory {path} ({error.strerror}): make it, or set RUNTIME_DIRECTORY"
        ) from error
    return path


@dataclass(frozen=True, slots=True)
class LiveInstance:
    """A running instance of a program, as its lock describes it; ``facts`` are what it chose to tell."""

    program: str
    instance: str
    network_namespace: int
    pid: int
    status_path: Path
    facts: dict[str, Any]


class InstanceLock:
    """Says that an instance of a program runs in this network namespace, for as long as the block runs.

    The kernel lets go of the lock however the program ends; what a killed one leaves is a file that means nothing.

    Args:
        listen_port: of a gateway, which may run several times under one name...
        listen_address: ...and on one port, if not every one of them listens on every address.
        status_path: where the status socket is, if the command line chose a place.
        facts: what JSON can hold and `live_instances` is to tell.

    Raises:
        CannotCreate: such an instance runs already (the text has its process id), or there is no place for the lock.
    """

    def __init__(
        self,
        program: str,
        instance: str,
        *,
        listen_port: int | None = None,
        listen_address: str | None = None,
        status_path: Path | None = None,
        facts: Mapping[str, object] | None = None,
    ) -> None:
        self._title, place = f"{program} {instance}", ""
        if listen_port is not None:
            self._title += f" on port {listen_port}"
            place += f"-{listen_port}"
        if listen_address is not None:
            self._title += f" of {listen_address}"
            place += f"-{listen_address}"
        namespace = Path("/proc/thread-self/ns/net").stat().st_ino
        self._path = runtime_directory() / f"{program}-{instance}-{namespace}{place}.lock"
        self.status_path = status_path or self._path.with_suffix(".sock")
        self._contents = {
            "program": program,
            "instance": instance,
            "network_namespace": namespace,
            "pid": os.getpid(),
            "status_path": str(self.status_path.absolute()),
            "facts": facts or {},
        }
        self._descriptor = -1

    def __enter__(self) -> Self:
        try:
            self._descriptor = self._acquire()
            contents = json.dumps(self._contents).encode()
            # Until it is cut to length it is no JSON, which readers take for an instance that has just started.
            os.pwrite(self._descriptor, contents, 0)
            os.ftruncate(self._descriptor, len(contents))
        except OSError as error:
            raise CannotCreate(
                f"cannot lock {self._path} ({error.strerror}): make room, or make it writable"
            ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if _is_file(self._path, self._descriptor):
            self._path.unlink()
        os.close(self._descriptor)

    def _acquire(self) -> int:
        deadline_s = time.monotonic() + LOCK_PATIENCE_S
        while True:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            if _try_lock(descriptor) and _is_file(self._path, descriptor):
                return descriptor
            holder = _describe_lock(descriptor)
            os.close(descriptor)
            if time.monotonic() > deadline_s:
                pid = "unknown" if holder is None else holder.pid
                raise CannotCreate(f"{self._title} runs here already (process {pid}): stop that one first")
            time.sleep(LOCK_PATIENCE_S / 20)


def live_instances(program: str) -> list[LiveInstance]:
    """Find the running instances of a program, in whatever network namespace, and remove what dead ones left.

    Raises:
        CannotCreate: there is no runtime directory.
    """
    found = []
    for path in sorted(runtime_directory().glob(f"{program}-*.lock")):
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:  # it ended just now
            continue
        try:
            if not _try_lock(descriptor):
                instance = _describe_lock(descriptor)
                if instance is not None and instance.program == program:
                    found.append(instance)
            elif _is_file(path, descriptor):
                path.with_suffix(".sock").unlink(missing_ok=True)
                path.unlink()
        finally:
            os.close(descriptor)
    return found


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_file(path: Path, descriptor: int) -> bool:
    """Tell whether *path* still names the file that is open: somebody may have removed it in between."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _describe_lock(descriptor: int) -> LiveInstance | None:
    try:
        contents = json.loads(os.pread(descriptor, LOCK_LIMIT_BYTES, 0))
        return LiveInstance(**contents | {"status_path": Path(contents["status_path"])})
    except (ValueError, TypeError, KeyError):  # it has just started, or it is of another version
        return None
