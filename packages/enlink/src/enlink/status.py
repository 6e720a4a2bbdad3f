"""What a running program tells about itself: counters, the status socket, and the lock that says that it runs.

Files are named by program, instance and network namespace, so that one instance name in two namespaces is no conflict.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import stat
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import trio

from enlink.errors import CannotCreate, NotPermitted, ProtocolError, Unavailable
from enlink.log import dropped_lines, printable

# Choices of ours.
STATUS_CLIENTS: Final = 8  # at once; more of them wait
STATUS_DEADLINE_S: Final = 2.0  # for a client to take its answer
FETCH_DEADLINE_S: Final = 5.0
ACCEPT_PAUSE_S: Final = 0.1
STATUS_LIMIT_BYTES: Final = 16 * 1024 * 1024
LOCK_PATIENCE_S: Final = 0.2  # whoever looks for live instances holds a stale lock for microseconds

Document = dict[str, Any]  # what JSON makes of an object


class Counters:
    """What happened how often, in groups: ``{"packets": {"to_link": 3}, "dropped": {"spoof_src": 1}}``.

    Counts start at zero and only grow.
    """

    def __init__(self) -> None:
        self._groups: defaultdict[str, Counter[str]] = defaultdict(Counter)

    def group(self, name: str) -> Counter[str]:
        """Return a group to count in directly, as ``packets["to_link"] += 64``: for the data plane."""
        return self._groups[name]

    def add(self, group: str, name: str, amount: int = 1) -> None:
        """Count *amount* more of *name*."""
        self._groups[group][name] += amount

    def snapshot(self) -> dict[str, dict[str, int]]:
        """Return a copy of every group, sorted by name."""
        return {group: dict(sorted(counts.items())) for group, counts in sorted(self._groups.items())}


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
    facts: Document


class InstanceLock:
    """Says that an instance of a program runs in this network namespace, for as long as the block runs.

    The kernel lets go of the lock however the program ends; what a killed one leaves is a file that means nothing.

    Args:
        listen_port: of a gateway, which may run several times under one name.
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
        status_path: Path | None = None,
        facts: Mapping[str, object] | None = None,
    ) -> None:
        self._title = f"{program} {instance}" + ("" if listen_port is None else f" on port {listen_port}")
        namespace = Path("/proc/thread-self/ns/net").stat().st_ino
        name = f"{program}-{instance}-{namespace}" + ("" if listen_port is None else f"-{listen_port}")
        self._path = runtime_directory() / f"{name}.lock"
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
        contents = json.loads(os.pread(descriptor, STATUS_LIMIT_BYTES, 0))
        return LiveInstance(**contents | {"status_path": Path(contents["status_path"])})
    except (ValueError, TypeError, KeyError):  # it has just started, or it is of another version
        return None


async def serve_status(
    path: Path,
    snapshot: Callable[[], Mapping[str, object]],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer every connection to the unix socket *path* with one JSON document, until cancelled.

    The document is *snapshot*'s, and how many lines of the log were lost. Only this user may connect. Clients that do
    not read cost a place among eight, for two seconds. A dead program's socket is replaced, and ours is removed at the
    end.

    Raises:
        CannotCreate: something else is at *path*, or it cannot be made.
    """
    slots = trio.Semaphore(STATUS_CLIENTS)

    async def answer(stream: trio.SocketStream) -> None:
        document = {**snapshot(), "log": {"dropped_lines": dropped_lines()}}
        with stream.socket, trio.move_on_after(STATUS_DEADLINE_S), suppress(trio.BrokenResourceError):
            await stream.send_all(json.dumps(document, default=str).encode() + b"\n")
        slots.release()

    with _status_socket(path) as listener:
        async with trio.open_nursery() as nursery:
            task_status.started()
            while True:
                await slots.acquire()
                try:
                    nursery.start_soon(answer, await listener.accept())
                except OSError:  # out of descriptors or memory: there will be some again
                    slots.release()
                    await trio.sleep(ACCEPT_PAUSE_S)


@contextmanager
def _status_socket(path: Path) -> Iterator[trio.SocketListener]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            _remove_stale(path)
            os.fchmod(sock.fileno(), 0o600)  # before bind(2), which makes the file with this mode
            sock.bind(str(path))
            sock.listen(STATUS_CLIENTS)
            ours = path.lstat()
        except OSError as error:
            raise CannotCreate(
                f"cannot make the status socket {path} ({error}): choose another --status-socket"
            ) from error
        try:
            yield trio.SocketListener(trio.socket.from_stdlib_socket(sock))
        finally:
            with suppress(FileNotFoundError):
                if os.path.samestat(path.lstat(), ours):
                    path.unlink()


def _remove_stale(path: Path) -> None:
    """Remove the socket of a dead program, if that is what is in the place."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode) or found.st_uid != os.geteuid():
        raise CannotCreate(f"{path} is not a socket of ours: remove it, or choose another --status-socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except BlockingIOError:  # somebody is there, and busy
            pass
    raise CannotCreate(f"another program answers at {path}: stop it, or choose another --status-socket")


async def fetch_status(path: Path) -> Document:
    """Ask the program at the unix socket *path* for its status.

    Raises:
        Unavailable: nobody is there, or it does not answer within five seconds.
        NotPermitted: it is another user's.
        ProtocolError: what answers is no ENG program.
    """
    answer = bytearray()
    try:
        with trio.fail_after(FETCH_DEADLINE_S):
            async with await trio.open_unix_socket(path) as stream:
                while len(answer) <= STATUS_LIMIT_BYTES and (data := await stream.receive_some()):
                    answer += data
        document = json.loads(answer)
    except PermissionError as error:
        raise NotPermitted(f"cannot ask {path}: it is another user's, run this as that user or as root") from error
    except trio.TooSlowError as error:
        raise Unavailable(
            f"no answer at {path} within {FETCH_DEADLINE_S:.0f} s: the program is stopped or hangs"
        ) from error
    except (OSError, trio.BrokenResourceError) as error:
        raise Unavailable(f"nobody answers at {path} ({error}): is the program running?") from error
    except ValueError as error:
        raise ProtocolError(f"what answers at {path} sends no status: it is another kind of program") from error
    if not isinstance(document, dict):
        raise ProtocolError(f"what answers at {path} sends no status: it is another kind of program")
    return document


def render_status(document: Mapping[str, object]) -> str:
    """Lay a status document out for a person: one line a value, names as in the document, values in one column."""
    rows = list(_rows(document, 0))
    width = max((len(name) for name, _ in rows), default=0)
    return "".join(f"{name:<{width}}  {value}".rstrip() + "\n" for name, value in rows)


def _rows(document: Mapping[str, object], depth: int) -> Iterator[tuple[str, str]]:
    for name, value in document.items():
        title = "  " * depth + printable(str(name))
        if isinstance(value, Mapping) and value:
            yield title, ""
            yield from _rows(value, depth + 1)
        elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            yield title, ""
            yield from _rows({str(number): item for number, item in enumerate(value, 1)}, depth + 1)
        elif isinstance(value, list):
            yield title, ", ".join(printable(str(item)) for item in value) or "-"
        elif isinstance(value, bool):
            yield title, "yes" if value else "no"
        else:
            yield title, "-" if value is None or value == {} else printable(str(value))
