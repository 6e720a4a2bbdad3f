"""Programs that are told to stop, and told again and again until they have ended."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest
from enlink.testing.hosts import Host, Network
from enlink.testing.programs import FAR_BEYOND_S, started

PROGRAMS = {
    "relay": ("relay", "--listen", "127.0.0.1:7000", "--target", "127.0.0.1:9"),
    "relay with workers": ("relay", "--listen", "127.0.0.1:7000", "--target", "127.0.0.1:9", "--workers", "2"),
    "entg": ("entg", "--entg-listen", "127.0.0.1:6979", "--enta-listen", "127.0.0.1:6980"),
}
TRIES = 8


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Network() as network:
        yield network.host("stop")


@pytest.mark.proves("F06")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_ends_with_0_however_often_it_is_told_to_stop(host: Host, name: str, number: signal.Signals) -> None:
    """A signal in every moment, from the first word on until the process is gone: none is taken for another end."""
    endings = []
    for _ in range(TRIES):
        with started(host, *PROGRAMS[name]) as program:
            program.wait_until_ready()
            deadline_s = time.monotonic() + FAR_BEYOND_S
            while program.process.poll() is None and time.monotonic() < deadline_s:
                program.signal(number)
                with suppress(subprocess.TimeoutExpired):
                    program.process.wait(0.0005)
            endings.append(program.process.returncode)
            assert program.events("stopping")
    assert endings == [0] * TRIES
