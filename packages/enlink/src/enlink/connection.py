"""What a connection is, who is at its other end, and which addresses a name has. Connects nothing: see attempt."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, Final

import trio

from enlink.endpoint import Endpoint, Tcp, Unix, Vsock
from enlink.errors import Unavailable

# As in a Nitro enclave, where nobody has done it.
LOOPBACK_IS_DOWN: Final = "the loopback device is down: bring lo up, as relay does with --setup-loopback"
_FAMILIES: Final = {None: socket.AF_UNSPEC, 4: socket.AF_INET, 6: socket.AF_INET6}


class Unreachable(Unavailable):
    """A peer could not be reached this time; trying again may help.

    Attributes:
        errno: what the kernel said; 0 if nothing.
    """

    def __init__(self, text: str, number: int = 0) -> None:
        super().__init__(text)
        self.errno = number


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
