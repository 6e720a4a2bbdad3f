"""Connect to an endpoint of any kind within a deadline. Dialling one again and again is a Dialer's job: see stream.

Callbacks of the pump do the work; a task that wants a connection waits for the last of them.
"""

from __future__ import annotations

import errno
import os
import re
import socket
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache, partial
from ipaddress import ip_address
from typing import Any, Final, TypeAlias

import outcome
import trio

from enlink import vsock
from enlink.congestion import unpace
from enlink.connection import LOOPBACK_IS_DOWN, Connection, Unreachable
from enlink.endpoint import Endpoint, HybridVsock, Tcp, Unix, Vsock
from enlink.errors import EngError, NotPermitted, UsageError
from enlink.pump import current_pump
from enlink.timers import Timer, current_timers

SO_MARK: Final = 36  # asm-generic/socket.h; Python's socket module lacks it
# Firecracker, docs/vsock.md: "OK " and the host's port, which says nothing that anybody needs.
_HYBRID_ANSWER: Final = re.compile(rb"OK [0-9]{1,10}\n")

# Choices of ours.
HYBRID_ANSWER_LIMIT_BYTES: Final = 32
_BACKLOG_PAUSE_S: Final = 0.02
_WHY_NO_UNIX: Final = {
    errno.ENOENT: "there is no such socket: start the program that listens on it",
    errno.ECONNREFUSED: "nobody listens there any more: start the program that does",
    errno.ECONNRESET: "refused: nobody listens on that port of the guest",
}

_UNDER_WAY: Final = (errno.EINPROGRESS, errno.EALREADY)
_DONE: Final = (0, errno.EISCONN)

Found: TypeAlias = socket.socket | EngError  # a connection, or why there is none


class Attempt:
    """An attempt to connect to one endpoint within a deadline, from callback to callback. `start` begins it.

    Args:
        done: called once, perhaps before `start` returns: with a connected, non-blocking socket, which is then the
            caller's; with Unreachable, which says who was not reached, and why; with NotPermitted where the mark
            needs CAP_NET_ADMIN; with NotPermitted or Unavailable where this process, or this kernel, has no vsock; or
            with UsageError, if the endpoint can only be listened on, or is a name, which must be looked up before.
        mark: SO_MARK for a TCP connection, so that the host's rules can tell it from captured traffic.
        vsock_buffer_bytes: see `enlink.vsock.open_socket`.
    """

    __slots__ = (
        *("_address", "_answer", "_deadline_s", "_done", "_endpoint", "_family", "_mark", "_pause", "_pump", "_sock"),
        *("_timeout", "_vsock_buffer_bytes"),
    )

    def __init__(
        self,
        endpoint: Endpoint,
        deadline_s: float,
        done: Callable[[Found], object],
        *,
        mark: int | None = None,
        vsock_buffer_bytes: int | None = None,
    ) -> None:
        self._family = 0
        self._address: Any = None
        self._endpoint = endpoint
        self._deadline_s = deadline_s
        self._done = done
        self._mark = mark
        self._vsock_buffer_bytes = vsock_buffer_bytes
        self._sock: socket.socket | None = None
        self._timeout: Timer | None = None
        self._pause: Timer | None = None
        self._answer = b""

    def start(self) -> None:
        """Begin. What cannot be begun fails at once, through *done*."""
        try:
            self._pump = current_pump()
            self._family, self._address = _address_of(self._endpoint)
            sock = self._opened()
        except EngError as error:
            self._end(error)
        except OSError as error:
            self._fail(error.errno)
        else:
            self._connect(sock)

    def abort(self) -> None:
        """Give up, leave nothing open and call nobody. It may be over already."""
        for timer in (self._timeout, self._pause):
            if timer is not None:
                timer.cancel()
        if self._sock is not None:
            self._pump.forget(self._sock.fileno())
            self._sock.close()
            self._sock = None

    def _opened(self) -> socket.socket:
        if self._family == socket.AF_VSOCK:
            sock = self._sock = vsock.open_socket(self._vsock_buffer_bytes)
            vsock.outlast(sock, self._deadline_s)
            return sock
        sock = self._sock = socket.socket(self._family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        if isinstance(self._endpoint, Tcp):
            unpace(sock)
            if self._mark is not None:
                _set_mark(sock, self._mark, self._where)
        return sock

    def _connect(self, sock: socket.socket) -> None:
        code = sock.connect_ex(self._address)
        if code == errno.EINPROGRESS:
            # Over loopback the other side has answered meanwhile, and there is no need to wait for an event.
            code = sock.connect_ex(self._address)
        if code in _DONE:
            self._greet(sock)
        elif code in _UNDER_WAY:
            self._limit_time()
            self._pump.on_writable(sock.fileno(), partial(self._on_writable, sock))
        elif code == errno.EAGAIN and self._family == socket.AF_UNIX:
            # The listener's backlog is full. Nothing has begun then, and no event tells when there is room.
            self._limit_time()
            self._pause = current_timers().after(_BACKLOG_PAUSE_S, partial(self._connect, sock))
        else:
            self._fail(code)

    def _on_writable(self, sock: socket.socket) -> None:
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) or sock.connect_ex(self._address)
        if code in _DONE:
            self._pump.on_writable(sock.fileno(), None)
            self._greet(sock)
        elif code not in _UNDER_WAY:  # or the event was for a descriptor that had this number before
            self._fail(code)

    def _greet(self, sock: socket.socket) -> None:
        if not isinstance(self._endpoint, HybridVsock):
            self._end(sock)
            return
        with suppress(OSError):  # whoever has gone already does not answer
            sock.send(b"CONNECT %d\n" % self._endpoint.port)  # an empty buffer takes it whole
        self._limit_time()
        self._pump.on_readable(sock.fileno(), partial(self._on_answer, sock))

    def _on_answer(self, sock: socket.socket) -> None:
        """Read a hybrid vsock's answer, but not a byte of what follows it."""
        try:
            seen = sock.recv(HYBRID_ANSWER_LIMIT_BYTES - len(self._answer), socket.MSG_PEEK)
            self._answer += sock.recv(seen.find(b"\n") + 1 or len(seen))
        except BlockingIOError:
            return
        except OSError as error:
            self._fail(error.errno)
            return
        is_whole = self._answer.endswith(b"\n")
        if not is_whole and seen and len(self._answer) < HYBRID_ANSWER_LIMIT_BYTES:
            return
        if _HYBRID_ANSWER.fullmatch(self._answer):
            self._pump.on_readable(sock.fileno(), None)
            self._end(sock)
        elif self._answer:
            self._fail(errno.EPROTO)
        else:
            self._fail(errno.ECONNRESET)

    def _limit_time(self) -> None:
        if self._timeout is None:
            self._timeout = current_timers().after(self._deadline_s, partial(self._fail, 0))

    def _fail(self, code: int | None) -> None:
        """End without a connection, for a reason of the kernel's; 0: because time is up."""
        reason = self._why(code) if code else f"no answer within {self._deadline_s:.3g} s"
        self._end(Unreachable(f"cannot connect to {self._where}: {reason}", code or 0))

    def _end(self, found: Found) -> None:
        if isinstance(found, socket.socket):
            self._sock = None  # it is somebody else's now
        self.abort()
        self._done(found)

    @property
    def _where(self) -> str:
        endpoint = self._endpoint
        return f"{endpoint.host} port {endpoint.port}" if isinstance(endpoint, Tcp) else str(endpoint)

    def _why(self, code: int) -> str:
        match self._endpoint:
            case Tcp(str(host)):
                return _why_no_tcp(code, host)
            case Vsock():
                return vsock.why_not_connected(code)
        if code == errno.EPROTO:
            return f"the answer is {self._answer!r}, not OK: is this the socket of a guest's vsock?"
        return _WHY_NO_UNIX.get(code) or os.strerror(code)


async def open_connection(
    endpoint: Endpoint, deadline_s: float, *, mark: int | None = None, vsock_buffer_bytes: int | None = None
) -> Connection:
    """Connect to *endpoint*, for a task. The arguments, and what is raised, are those of an `Attempt`.

    Cancellation leaves nothing open.
    """
    await trio.lowlevel.checkpoint_if_cancelled()
    task = trio.lowlevel.current_task()
    is_waiting = False
    found: list[Found] = []

    def done(result: Found) -> None:
        found.append(result)
        if is_waiting:
            current_pump().wake(task, outcome.Value(None))

    def give_up(_: object) -> trio.lowlevel.Abort:
        if found:  # the task has been woken, and comes to that in a moment
            return trio.lowlevel.Abort.FAILED
        attempt.abort()
        return trio.lowlevel.Abort.SUCCEEDED

    attempt = Attempt(endpoint, deadline_s, done, mark=mark, vsock_buffer_bytes=vsock_buffer_bytes)
    attempt.start()
    if not found:
        is_waiting = True
        await trio.lowlevel.wait_task_rescheduled(give_up)
    else:
        await trio.lowlevel.cancel_shielded_checkpoint()
    (result,) = found
    if isinstance(result, EngError):
        raise result
    return Connection(trio.socket.from_stdlib_socket(result), endpoint)


async def connect_tcp(address: str, port: int, deadline_s: float, *, mark: int | None = None) -> Connection:
    """Connect to one TCP address, which is a number, as `open_connection` does."""
    return await open_connection(Tcp(address, port), deadline_s, mark=mark)


def _address_of(endpoint: Endpoint) -> tuple[int, Any]:
    """Return the family and the address as the socket module wants it, without asking a name service."""
    match endpoint:
        case Tcp(str(host), port):
            # The number of a zone's device may be another tomorrow.
            return _numeric(host, port) if "%" not in host else _numeric.__wrapped__(host, port)
        case Vsock(int(cid), port):
            return socket.AF_VSOCK, (cid, port)
        case Unix():
            return socket.AF_UNIX, endpoint.address
        case HybridVsock(path):
            return socket.AF_UNIX, Unix(path).address
    raise UsageError(f"{endpoint} can only be listened on")


@lru_cache
def _numeric(host: str, port: int) -> tuple[int, Any]:
    try:
        ((family, *_, address), *_) = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
        )
    except socket.gaierror as error:
        _, is_scoped, device = host.partition("%")
        if is_scoped:  # it may come, or come back
            raise Unreachable(
                f"cannot connect to {host} port {port}: there is no network device {device} here", errno.ENODEV
            ) from error
        raise UsageError(f"{host} is no address: look the name up before") from error
    return family, address


def _why_no_tcp(code: int, address: str) -> str:
    reason = os.strerror(code)
    if code in (errno.ENETUNREACH, errno.EADDRNOTAVAIL) and ip_address(address).is_loopback:
        return f"{reason}; {LOOPBACK_IS_DOWN}"
    return reason


def _set_mark(sock: socket.socket, mark: int, where: str) -> None:
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_MARK, mark)
    except PermissionError as error:
        # Not to be mistaken for the EACCES of a prohibited route, which may be gone a moment later.
        raise NotPermitted(f"cannot mark the connection to {where}: needs CAP_NET_ADMIN") from error
