"""What can be seen of AF_VSOCK without a machine at the other end. The rest is in test_real_vsock.py."""

from __future__ import annotations

import errno
import os
import socket
import struct
from pathlib import Path
from typing import Any

import pytest
from enlink import vsock
from enlink.endpoint import CID_ANY
from enlink.errors import NotPermitted, Unavailable
from enlink.vsock import SO_VM_SOCKETS_CONNECT_TIMEOUT, local_cid, open_socket, outlast, why_not_bound


def option(sock: socket.socket, number: int, layout: str = "q") -> tuple[int, ...]:
    """Read an option as the kernel has it; of a socket of this family Python would not ask for so many bytes."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0, fileno=os.dup(sock.fileno())) as anonymous:
        return struct.unpack(layout, anonymous.getsockopt(socket.AF_VSOCK, number, struct.calcsize(layout)))


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))  # noqa: PTH208  # the names are all there is to it


@pytest.mark.parametrize("buffer_bytes", [64 * 1024, 1024 * 1024, 4 * 1024 * 1024])
def test_a_buffer_has_the_size_that_was_asked_for_even_above_the_maximum_of_before(buffer_bytes: int) -> None:
    with open_socket(buffer_bytes) as sock:
        assert sock.family == socket.AF_VSOCK
        assert option(sock, socket.SO_VM_SOCKETS_BUFFER_SIZE) == (buffer_bytes,)
        assert option(sock, socket.SO_VM_SOCKETS_BUFFER_MAX_SIZE) == (buffer_bytes,)


def test_a_buffer_is_the_kernels_choice_unless_asked_for() -> None:
    with open_socket() as sock:
        assert option(sock, socket.SO_VM_SOCKETS_BUFFER_SIZE) == (256 * 1024,)


@pytest.mark.parametrize(("deadline_s", "timeout_s"), [(0.5, 1), (5, 6), (10.9, 11), (float("inf"), 86_401)])
def test_the_kernel_waits_for_a_connection_for_longer_than_we_do(deadline_s: float, timeout_s: int) -> None:
    before = descriptors()
    with open_socket() as sock:
        assert option(sock, SO_VM_SOCKETS_CONNECT_TIMEOUT, "qq") == (2, 0)
        outlast(sock, deadline_s)
        assert option(sock, SO_VM_SOCKETS_CONNECT_TIMEOUT, "qq") == (timeout_s, 0)
    assert descriptors() == before


@pytest.mark.parametrize(
    ("number", "kind", "text"),
    [
        (errno.EPERM, NotPermitted, r"\(Operation not permitted\): a seccomp profile forbids it, as Docker's default"),
        (errno.EACCES, NotPermitted, r"\(Permission denied\): a seccomp profile .*; run with a profile that allows"),
        (errno.EAFNOSUPPORT, Unavailable, "this kernel has none; load the module vsock"),
        (errno.EMFILE, OSError, "Too many open files"),
    ],
)
def test_why_there_is_no_socket_is_told(
    monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception], text: str
) -> None:
    def failing(*arguments: Any) -> Any:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(socket, "socket", failing)
    with pytest.raises(kind, match=text):
        open_socket()


def test_a_machine_without_the_device_has_no_cid(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(vsock, "_DEVICE", tmp_path / "vsock")
    assert local_cid() is None
    (tmp_path / "vsock").touch()  # which knows nothing of cids
    assert local_cid() is None


@pytest.mark.parametrize(("answer", "cid"), [(3, 3), (2, 2), (CID_ANY, None)])
def test_the_cid_is_what_the_device_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answer: int, cid: int | None
) -> None:
    (tmp_path / "vsock").touch()
    monkeypatch.setattr(vsock, "_DEVICE", tmp_path / "vsock")
    monkeypatch.setattr("fcntl.ioctl", lambda *_: struct.pack("=I", answer))
    assert local_cid() == cid


@pytest.mark.parametrize(("own", "shown"), [(3, "3"), (None, "unknown")])
def test_whose_cid_it_is_not_is_told(monkeypatch: pytest.MonkeyPatch, own: int | None, shown: str) -> None:
    monkeypatch.setattr(vsock, "local_cid", lambda: own)
    error = OSError(errno.EADDRNOTAVAIL, "")
    expected = f"cid 16 is not this machine's, which is {shown}: write vsock://:8888 to listen on any"
    assert why_not_bound(error, 16, 8888) == expected
    assert why_not_bound(error, None, 8888) == "Cannot assign requested address"
    assert why_not_bound(OSError(errno.ENOMEM, ""), 16, 8888) == "Cannot allocate memory"
