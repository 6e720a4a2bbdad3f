"""What a running program tells about itself: counters, the socket that answers with them, and who asks there."""

from __future__ import annotations

import json
import os
import socket
import stat
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import trio

from enlink.errors import CannotCreate, NotPermitted, ProtocolError, Unavailable
from enlink.log import dropped_lines, printable

# Choices of ours.
STATUS_CLIENTS: Final = 8  # at once; more of them wait
STATUS_DEADLINE_S: Final = 2.0  # for a client to take its answer
FETCH_DEADLINE_S: Final = 5.0
ACCEPT_PAUSE_S: Final = 0.1
STATUS_LIMIT_BYTES: Final = 16 * 1024 * 1024

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
