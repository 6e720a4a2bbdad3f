"""Connect to an endpoint of any kind within a deadline. Dialling one again and again is a Dialer's job: see stream."""

from __future__ import annotations

import errno
import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, Final

import trio

from enlink import vsock
from enlink.endpoint import Endpoint, HybridVsock, Tcp, Unix, Vsock
from enlink.errors import NotPermitted, Unavailable, UsageError

SO_MARK: Final = 36  # asm-generic/socket.h; Python's socket module lacks it
# Firecracker, docs/vsock.md: "OK " and the host's port, which says nothing that anybody needs.
_HYBRID_ANSWER: Final = re.compile(rb"OK [0-9]{1,10}\n")

# Choices of ours.
HYBRID_ANSWER_LIMIT_BYTES: Final = 32
_BACKLOG_PAUSE_S: Final = 0.02
# As in a Nitro enclave, where nobody has done it.
LOOPBACK_IS_DOWN: Final = "the loopback device is down: bring lo up, as relay does with --setup-loopback"
_FAMILIES: Final = {None: socket.AF_UNSPEC, 4: socket.AF_INET, 6: socket.AF_INET6}


class Unreachable(Unavailable):
    """A peer could not be reached this time; trying again may help."""


@dataclass(frozen=True, slots=True)
class Connection:
    """A connected stream socket, and who is at its other end.

    Attributes:
        socket: to be closed by whoever has the connection.
        peer: as it was called when the connection was made, since the kernel forgets it: vsock when this side shuts
            down sending, TCP when the peer resets. A unix socket without a name is ``Unix("")``.
    """

    socket: trio.socket.SocketType
    peer: Endpoint


async def open_connection(
    endpoint: Endpoint, deadline_s: float, *, vsock_buffer_bytes: int | None = None
) -> Connection:
    """Connect to *endpoint*; the deadline includes looking a name up, and every address that it has.

    Args:
        vsock_buffer_bytes: see `enlink.vsock.open_socket`.

    Raises:
        Unreachable: who was not reached, and why.
        NotPermitted, Unavailable: this process, or this kernel, has no vsock.
        UsageError: the endpoint is one that can only be listened on.

    Cancellation leaves nothing open.
    """
    match endpoint:
        case Tcp(str()):
            return await _connect_by_name(endpoint, deadline_s)
        case Vsock(int(cid), port):
            with _attempt(str(endpoint), deadline_s, vsock.why_not_connected):
                sock = vsock.open_socket(vsock_buffer_bytes)
                with _closed_on_failure(sock):
                    vsock.outlast(sock, deadline_s)
                    await sock.connect((cid, port))
                return Connection(sock, endpoint)
        case Unix():
            with _attempt(str(endpoint), deadline_s, _why_no_unix):
                return Connection(await _connect_unix(endpoint), endpoint)
        case HybridVsock(path, port):
            with _attempt(str(endpoint), deadline_s, _why_no_unix):
                sock = await _connect_unix(Unix(path))
                with _closed_on_failure(sock):
                    await _ask_for_port(sock, port)
                return Connection(sock, endpoint)
    raise UsageError(f"{endpoint} can only be listened on")


async def connect_tcp(address: str, port: int, deadline_s: float, *, mark: int | None = None) -> Connection:
    """Connect to one address, which is a number.

    Args:
        mark: SO_MARK for the connection, so that the host's rules can tell it from captured traffic.

    Raises:
        Unreachable: with the address and the reason.
        NotPermitted: the mark needs CAP_NET_ADMIN.

    Cancellation leaves nothing open.
    """
    where = f"{address} port {port}"
    with _attempt(where, deadline_s, lambda error: _why_no_tcp(error, address)):
        ((family, _, _, _, socket_address), *_) = socket.getaddrinfo(
            address, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
        )
        sock = trio.socket.socket(family, socket.SOCK_STREAM)
        with _closed_on_failure(sock):
            _set_mark(sock, mark, where)
            await sock.connect(socket_address)
        return Connection(sock, Tcp(address, port))


async def resolve(endpoint: Tcp, *, limiter: trio.CapacityLimiter | None = None) -> list[str]:
    """Look up the addresses of an endpoint's host, as numbers and without doubles; a number is its own.

    Args:
        limiter: bounds the threads that look names up, which cannot be interrupted: cancelled, they are abandoned.

    Raises:
        Unreachable: it has none, or the name service fails.
    """
    host = endpoint.host or ""
    with suppress(ValueError):
        ip_address(host)
        await trio.lowlevel.checkpoint()
        return [host]
    try:
        found = await trio.to_thread.run_sync(
            lambda: socket.getaddrinfo(host, None, family=_FAMILIES[endpoint.family], type=socket.SOCK_STREAM),
            abandon_on_cancel=True,
            limiter=limiter,
        )
    except (OSError, UnicodeError) as error:
        raise Unreachable(f"cannot resolve {host}: {error}") from error
    if not found:
        raise Unreachable(f"cannot resolve {host}: it has no address")
    return list(dict.fromkeys(_number(address) for *_, address in found))


def name_of(family: int, address: Any) -> Endpoint:
    """Turn a socket's address, as the socket module gives it, into an endpoint."""
    match family, address:
        case socket.AF_VSOCK, (cid, port):
            return Vsock(cid, port)
        case socket.AF_UNIX, bytes():
            return Unix("@" + os.fsdecode(address[1:]))
        case socket.AF_UNIX, _:
            return Unix(address or "")
    return Tcp(_number(address), address[1])


def _number(address: tuple[Any, ...]) -> str:
    is_scoped = len(address) == 4 and address[3] and "%" not in address[0]
    return f"{address[0]}%{address[3]}" if is_scoped else str(address[0])


@contextmanager
def _attempt(where: str, deadline_s: float, explain: Callable[[OSError], str]) -> Iterator[None]:
    """Bound an attempt to connect, and say in one line why it failed."""
    try:
        with trio.fail_after(deadline_s):
            yield
    except trio.TooSlowError as error:
        raise Unreachable(f"cannot connect to {where}: no answer within {deadline_s:.3g} s") from error
    except OSError as error:
        raise Unreachable(f"cannot connect to {where}: {explain(error)}") from error


@contextmanager
def _closed_on_failure(sock: trio.socket.SocketType) -> Iterator[None]:
    try:
        yield
    except BaseException:
        sock.close()
        raise


async def _connect_by_name(endpoint: Tcp, deadline_s: float) -> Connection:
    deadline = trio.current_time() + deadline_s
    failure = Unreachable(f"cannot resolve {endpoint.host}: no answer within {deadline_s:.3g} s")
    addresses: list[str] = []
    with trio.move_on_at(deadline):
        addresses = await resolve(endpoint)
    for number, address in enumerate(addresses):
        # An address that is silent leaves the others their share.
        share_s = max(0.0, deadline - trio.current_time()) / (len(addresses) - number)
        try:
            return await connect_tcp(address, endpoint.port, share_s)
        except Unreachable as error:
            failure = error
    raise failure


async def _connect_unix(endpoint: Unix) -> trio.socket.SocketType:
    await trio.lowlevel.checkpoint()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        while True:
            try:
                sock.connect(endpoint.address)
            except BlockingIOError:
                # The listener's backlog is full. Nothing has begun then, and no event tells when there is room.
                await trio.sleep(_BACKLOG_PAUSE_S)
            else:
                return trio.socket.from_stdlib_socket(sock)
    except BaseException:
        sock.close()
        raise


async def _ask_for_port(sock: trio.socket.SocketType, port: int) -> None:
    """Ask a hybrid vsock for a port of the guest, and read the answer, but not a byte of what follows it."""
    await sock.send(b"CONNECT %d\n" % port)  # an empty buffer takes it whole
    answer = b""
    while not answer.endswith(b"\n"):
        seen = await sock.recv(HYBRID_ANSWER_LIMIT_BYTES - len(answer), socket.MSG_PEEK)
        if not seen:  # or the answer is too long, and nothing was asked for
            break
        answer += await sock.recv(seen.find(b"\n") + 1 or len(seen))
    if not answer:
        raise ConnectionResetError(errno.ECONNRESET, "refused")
    if not _HYBRID_ANSWER.fullmatch(answer):
        raise OSError(errno.EPROTO, f"the answer is {answer!r}, not OK: is this the socket of a guest's vsock?")


def _why_no_tcp(error: OSError, address: str) -> str:
    reason = os.strerror(error.errno or 0)
    if error.errno in (errno.ENETUNREACH, errno.EADDRNOTAVAIL) and ip_address(address).is_loopback:
        return f"{reason}; {LOOPBACK_IS_DOWN}"
    return reason


def _why_no_unix(error: OSError) -> str:
    match error.errno:
        case errno.ENOENT:
            return "there is no such socket: start the program that listens on it"
        case errno.ECONNREFUSED:
            return "nobody listens there any more: start the program that does"
        case errno.ECONNRESET | errno.EPIPE:
            return "refused: nobody listens on that port of the guest"
        case errno.EPROTO:
            return error.strerror or ""
    return os.strerror(error.errno or 0)


def _set_mark(sock: trio.socket.SocketType, mark: int | None, where: str) -> None:
    if mark is None:
        return
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_MARK, mark)
    except PermissionError as error:
        # Not to be mistaken for the EACCES of a prohibited route, which may be gone a moment later.
        raise NotPermitted(f"cannot mark the connection to {where}: needs CAP_NET_ADMIN") from error
