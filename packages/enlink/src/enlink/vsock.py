"""What is peculiar to sockets of the family AF_VSOCK on Linux, and to Python's view of them."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
import sys
from pathlib import Path
from typing import Final

from enlink.endpoint import CID_ANY
from enlink.errors import NotPermitted, Unavailable

SO_VM_SOCKETS_CONNECT_TIMEOUT: Final = 6  # linux/vm_sockets.h; Python's socket module lacks it
_DEVICE: Final = Path("/dev/vsock")
_LONGEST_TIMEOUT_S: Final = 86_400

_CONNECT_FAILURES: Final = {
    errno.ECONNRESET: "nobody listens there",
    errno.ENODEV: "no vsock transport leads to that cid: check the cid, and load vhost_vsock on a host of guests",
    errno.ETIMEDOUT: "no machine with that cid answers",
}


def open_socket(buffer_bytes: int | None = None) -> socket.socket:
    """Open an unconnected, non-blocking stream socket.

    Args:
        buffer_bytes: how much may be under way in either direction, for this socket and those that it accepts; the
            smaller of both ends' sizes counts. The kernel's own choice is 256 KiB.

    Raises:
        NotPermitted: a seccomp profile forbids vsock.
        Unavailable: this kernel has none.
        OSError: anything else, such as a lack of descriptors.
    """
    try:
        sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    except PermissionError as error:
        raise NotPermitted(
            f"cannot open a vsock socket ({error.strerror}): a seccomp profile forbids it, as Docker's"
            " default one does; run with a profile that allows AF_VSOCK"
        ) from error
    except OSError as error:
        if error.errno == errno.EAFNOSUPPORT:
            raise Unavailable("cannot open a vsock socket: this kernel has none; load the module vsock") from error
        raise
    if buffer_bytes is not None:
        # The size is cut down to the maximum without a word, so the maximum comes first.
        sock.setsockopt(socket.AF_VSOCK, socket.SO_VM_SOCKETS_BUFFER_MAX_SIZE, buffer_bytes)
        sock.setsockopt(socket.AF_VSOCK, socket.SO_VM_SOCKETS_BUFFER_SIZE, buffer_bytes)
    return sock


def outlast(sock: socket.socket, deadline_s: float) -> None:
    """Let the kernel wait for a connection for longer than *deadline_s*, where it would give up after two seconds."""
    timeout = struct.pack("qq", int(min(deadline_s, _LONGEST_TIMEOUT_S)) + 1, 0)
    # Of a socket of this family Python takes numbers only, so the option is set on one whose family it does not know.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0, fileno=os.dup(sock.fileno())) as anonymous:
        anonymous.setsockopt(socket.AF_VSOCK, SO_VM_SOCKETS_CONNECT_TIMEOUT, timeout)


def local_cid() -> int | None:
    """Return this machine's cid; None where it has none, or the kernel does not tell."""
    try:
        with _DEVICE.open("rb") as device:
            answer = fcntl.ioctl(device, socket.IOCTL_VM_SOCKETS_GET_LOCAL_CID, bytes(4))
    except OSError:
        return None
    cid = int.from_bytes(answer, sys.byteorder)
    return None if cid == CID_ANY else cid


def why_not_connected(code: int) -> str:
    """Say what an error number of connect(2) means, which differs from TCP."""
    return _CONNECT_FAILURES.get(code, os.strerror(code))


def why_not_bound(error: OSError, cid: int | None, port: int) -> str:
    """Say what a failure to bind means."""
    if error.errno == errno.EADDRNOTAVAIL and cid is not None:
        own = local_cid()
        return f"cid {cid} is not this machine's, which is {own or 'unknown'}: write vsock://:{port} to listen on any"
    return os.strerror(error.errno or 0)
