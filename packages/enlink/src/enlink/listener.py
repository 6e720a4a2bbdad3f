"""Listen on an endpoint of any kind, and accept. What becomes of the connections is other modules' affair."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NoReturn

import trio

from enlink import vsock
from enlink.activation import InheritedSockets, claim
from enlink.congestion import unpace
from enlink.connection import LOOPBACK_IS_DOWN, Connection, name_of
from enlink.endpoint import CID_ANY, Endpoint, HybridVsock, Tcp, Unix, Vsock
from enlink.errors import ConfigError, NotPermitted, Unavailable
from enlink.unix_file import UnixFile

# Choices of ours.
BIND_PATIENCE_S: Final = 5.0  # a predecessor may still be going
BACKLOG: Final = 1024
_BIND_PAUSE_S: Final = 0.1

_TAKEN: Final = "stop it, or write another port"


@asynccontextmanager
async def listening(
    endpoint: Endpoint,
    *,
    inherited: InheritedSockets | None = None,
    is_shared: bool = False,
    unix_mode: int = 0o600,
    vsock_buffer_bytes: int | None = None,
) -> AsyncIterator[list[trio.SocketListener]]:
    """Listen on *endpoint* for as long as the block runs. What is taken is tried again for `BIND_PATIENCE_S`.

    Args:
        inherited: what systemd passed, from which a Systemd endpoint takes what is its own.
        is_shared: several processes listen on the one TCP port, and the kernel divides connections among them.
        unix_mode: who may connect to a unix socket that has a path: those who may write to it. A dead program's socket
            is replaced, anything else in the place is not, and the path is gone when the block ends.
        vsock_buffer_bytes: see `enlink.vsock.open_socket`.

    Raises:
        Unavailable: it is taken (of TCP, the text names who has it), not this machine's, or this kernel has no vsock.
        NotPermitted: a right is missing; the text says which.
        CannotCreate: something that is no socket is at the path, or there can be none.
        ConfigError: systemd passed no such socket, or this kind cannot be shared.
    """
    if is_shared and not isinstance(endpoint, Tcp):
        raise ConfigError(f"several processes cannot share {endpoint}: only TCP ports can be; run one")
    listeners: list[trio.SocketListener] = []
    with ExitStack() as stack:
        stack.callback(_close, listeners)
        match endpoint:
            case Tcp():
                listeners += await listen_tcp(endpoint, is_shared=is_shared)
            case Vsock():
                listeners.append(await _listen_vsock(endpoint, vsock_buffer_bytes))
            case Unix() | HybridVsock():
                where = endpoint.listening if isinstance(endpoint, HybridVsock) else endpoint
                listeners.append(await _listen_unix(where, unix_mode, stack))
            case _:
                sockets = claim({} if inherited is None else inherited, endpoint.name)
                listeners += [trio.SocketListener(trio.socket.from_stdlib_socket(sock)) for sock in sockets]
        yield listeners


async def accept(listener: trio.SocketListener) -> Connection:
    """Wait for a connection, and return it with its peer's name.

    Raises:
        OSError: there was none, for now: out of descriptors or memory, or it was gone before it was accepted.
        trio.ClosedResourceError: the listener was closed.
    """
    sock, address = await listener.socket.accept()
    return Connection(sock, name_of(sock.family, address))


async def listen_tcp(endpoint: Tcp, *, is_shared: bool = False) -> list[trio.SocketListener]:
    """Listen on a TCP endpoint; without a host on every address, IPv4 and, where there is IPv6, IPv6.

    A port that is taken is tried again for `BIND_PATIENCE_S`.

    Raises:
        Unavailable: the port is taken (the text names who has it) or the address is not this host's.
        NotPermitted: the port needs CAP_NET_BIND_SERVICE.
    """
    everywhere = {4: ["0.0.0.0"], 6: ["::"], None: ["0.0.0.0", "::"]}[endpoint.family]
    hosts = [endpoint.host] if endpoint.host is not None else everywhere
    listeners: list[trio.SocketListener] = []
    deadline = trio.current_time() + BIND_PATIENCE_S
    try:
        for host in hosts:
            try:
                listeners.append(await _listen_on_host(host, endpoint, deadline, is_shared=is_shared))
                # Which port 0 was, is the same on every address.
                endpoint = replace(endpoint, port=listeners[0].socket.getsockname()[1])
            except OSError as error:
                # Every address was asked for: a host without IPv6 has fewer of them.
                if len(hosts) > 1 and host == "::" and error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                    continue
                _raise_bind_failure(host, endpoint.port, error)
    except BaseException:
        _close(listeners)
        raise
    return listeners


async def _listen_on_host(host: str, endpoint: Tcp, deadline: float, *, is_shared: bool) -> trio.SocketListener:
    wanted = {None: socket.AF_UNSPEC, 4: socket.AF_INET, 6: socket.AF_INET6}[endpoint.family]
    ((family, _, _, _, address), *_) = await trio.socket.getaddrinfo(
        host, endpoint.port, family=wanted, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )

    def open_socket() -> trio.socket.SocketType:
        sock = trio.socket.socket(family, socket.SOCK_STREAM)
        unpace(sock)  # whoever accepts knows better: see congestion.pace_if_long
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if is_shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        return sock

    return await _patiently(lambda: _bound(open_socket(), address), deadline)


async def _listen_vsock(endpoint: Vsock, buffer_bytes: int | None) -> trio.SocketListener:
    address = (CID_ANY if endpoint.cid is None else endpoint.cid, endpoint.port)
    deadline = trio.current_time() + BIND_PATIENCE_S
    try:
        return await _patiently(
            lambda: _bound(trio.socket.from_stdlib_socket(vsock.open_socket(buffer_bytes)), address), deadline
        )
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise Unavailable(f"cannot listen on {endpoint}: another process has the port; {_TAKEN}") from error
        if error.errno == errno.EACCES:
            raise NotPermitted(f"cannot listen on {endpoint}: ports below 1024 need CAP_NET_BIND_SERVICE") from error
        reason = vsock.why_not_bound(error, endpoint.cid, endpoint.port)
        raise Unavailable(f"cannot listen on {endpoint}: {reason}") from error


async def _listen_unix(endpoint: Unix, mode: int, stack: ExitStack) -> trio.SocketListener:
    deadline = trio.current_time() + BIND_PATIENCE_S

    async def bind() -> trio.SocketListener:
        if endpoint.path.startswith("@"):
            sock = _bound_to_name(endpoint)
        else:
            file = UnixFile(Path(endpoint.path), mode, BACKLOG)
            stack.callback(file.remove)
            sock = file.socket
        return trio.SocketListener(trio.socket.from_stdlib_socket(sock))

    try:
        return await _patiently(bind, deadline)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise Unavailable(
                f"cannot listen on {endpoint}: another program listens there; stop it, or write another path"
            ) from error
        raise Unavailable(f"cannot listen on {endpoint}: {os.strerror(error.errno or 0)}") from error


def _bound_to_name(endpoint: Unix) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(endpoint.address)
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


async def _bound(sock: trio.socket.SocketType, address: Any) -> trio.SocketListener:
    try:
        await sock.bind(address)
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return trio.SocketListener(sock)


async def _patiently(bind: Callable[[], Awaitable[trio.SocketListener]], deadline: float) -> trio.SocketListener:
    """Bind, and while somebody else has the address try again until the deadline."""
    while True:
        try:
            return await bind()
        except OSError as error:
            if error.errno != errno.EADDRINUSE or trio.current_time() >= deadline:
                raise
        await trio.sleep(_BIND_PAUSE_S)


def _close(listeners: Sequence[trio.SocketListener]) -> None:
    for listener in listeners:
        listener.socket.close()


def _raise_bind_failure(host: str, port: int, error: OSError) -> NoReturn:
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if error.errno == errno.EADDRINUSE:
        holder = _holder_of(port) or "another process"
        raise Unavailable(f"cannot listen on {where}: {holder} has the port; {_TAKEN}") from error
    if error.errno == errno.EACCES:
        raise NotPermitted(f"cannot listen on {where}: ports below 1024 need CAP_NET_BIND_SERVICE") from error
    raise Unavailable(f"cannot listen on {where}: {_why_not_bound(host, port, error)}") from error


def _why_not_bound(host: str, port: int, error: OSError) -> str:
    """Say what a failure to bind means, and what to do."""
    _, is_scoped, device = host.partition("%")
    if isinstance(error, socket.gaierror) and is_scoped:
        return f"there is no network device {device} here; write one that `ip link` shows"
    advice = ""
    if isinstance(error, socket.gaierror):
        advice = f"; write an address of this machine, or :{port} for all"
    elif error.errno == errno.EINVAL and host.lower().startswith("fe80:"):
        advice = f"; write its network device too, as in {host}%eth0"
    elif error.errno == errno.EADDRNOTAVAIL and (host in ("localhost", "::1") or host.startswith("127.")):
        advice = f"; {LOOPBACK_IS_DOWN}"
    elif error.errno == errno.EADDRNOTAVAIL:
        advice = f"; write an address that a device of this machine has, or :{port} for all"
    return f"{error.strerror}{advice}"


def _holder_of(port: int) -> str | None:
    """Name the process that listens on a TCP port of this namespace, as far as /proc shows it to us."""
    inodes = set()
    for table in ("/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"):
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for columns in map(str.split, lines):
            if columns[3] == "0A" and int(columns[1].rpartition(":")[2], 16) == port:  # 0A: LISTEN
                inodes.add(f"socket:[{columns[9]}]")
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            if any(str(entry.readlink()) in inodes for entry in (process / "fd").iterdir()):
                return f"{(process / 'comm').read_text().strip()} (pid {process.name})"
        except OSError:
            continue
    return None
