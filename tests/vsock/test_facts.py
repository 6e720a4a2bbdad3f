"""What the kernel does with AF_VSOCK, as far as our programs rely on it. Runs in the guest, see cli.py."""

from __future__ import annotations

import socket

import pytest

pytestmark = pytest.mark.vsock


def test_a_port_of_the_loopback_can_be_bound() -> None:
    """CID 1 is this machine, wherever the loopback transport is loaded."""
    with socket.socket(socket.AF_VSOCK) as sock:
        sock.bind((1, 5000))
        assert sock.getsockname() == (1, 5000)
