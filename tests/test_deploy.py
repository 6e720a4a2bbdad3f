"""The units in deploy/systemd let a program do little, and start what they say."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from enlink.testing.hosts import Host, Network

UNITS = Path(__file__).parent.parent / "deploy" / "systemd"
MOST_EXPOSED = {"relay@.service": 1.3, "entg.service": 1.3, "enta-client.service": 2.0, "enta-server.service": 2.0}
FAR_BEYOND_S = 40.0
BRIDGE = '[[bridge]]\nlisten = "127.0.0.1:7300"\ntarget = "127.0.0.1:9300"\n'


def test_every_unit_has_its_limit() -> None:
    assert {path.name for path in UNITS.iterdir()} == set(MOST_EXPOSED)


def exceeds(unit: Path, most: float) -> bool:
    """Whether systemd's own analysis, from 0 to 10, gives a unit more than that."""
    argv = ["systemd-analyze", "security", "--offline=true", "--no-pager", f"--threshold={most * 10:.0f}", str(unit)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=FAR_BEYOND_S, check=False)
    assert f"exposure level for {unit.name.replace('@', '@i')}" in done.stdout, done.stderr
    return done.returncode != 0


@pytest.mark.proves("G20")
@pytest.mark.parametrize(("unit", "most"), MOST_EXPOSED.items())
def test_units_expose_no_more_than_they_must(unit: str, most: float) -> None:
    assert not exceeds(UNITS / unit, most)


@pytest.mark.parametrize(("unit", "most"), MOST_EXPOSED.items())
def test_a_unit_that_exposes_more_is_found(unit: str, most: float, tmp_path: Path) -> None:
    open_one = tmp_path / unit
    open_one.write_text(re.sub("(?m)^SystemCallFilter.*\n", "", (UNITS / unit).read_text()))
    assert exceeds(open_one, most)


def complaints(unit: Path, directory: Path) -> list[str]:
    """What systemd finds wrong with a unit whose programs are there."""
    name = unit.name.replace("@", "@web")
    copy = directory / name
    copy.write_text(unit.read_text().replace("/opt/eng/bin/", f"{Path(sys.executable).parent}/"))
    argv = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(copy)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=FAR_BEYOND_S, check=False)
    return [line for line in done.stderr.splitlines() if name in line]


@pytest.mark.parametrize("unit", MOST_EXPOSED)
def test_systemd_knows_every_word_of_a_unit(unit: str, tmp_path: Path) -> None:
    assert complaints(UNITS / unit, tmp_path) == []
    wrong = tmp_path / unit
    wrong.write_text((UNITS / unit).read_text().replace("ProtectSystem=", "ProtectSystems="))
    assert len(complaints(wrong, tmp_path)) == 1


def command(unit: str, directory: Path, options: str) -> list[str]:
    """What a unit starts, as systemd would start it, but from this environment and in a place of ours."""
    (line,) = re.findall("(?m)^ExecStart=(.*)$", (UNITS / unit).read_text())
    for ours, theirs in (
        (f"{Path(sys.executable).parent}/", "/opt/eng/bin/"),
        (f"{directory}/", "/etc/eng/"),
        (str(directory), "%t"),
        ("web", "%i"),
        (options, "$ENTA_OPTIONS"),
        (options, "$ENTG_OPTIONS"),
    ):
        line = line.replace(theirs, ours)
    return shlex.split(line)


@contextmanager
def supervised(host: Host, unit: str, directory: Path, options: str = "") -> Iterator[subprocess.Popen[bytes]]:
    """The program of a unit, once it has said that it is ready where systemd listens."""
    path = directory / f"{unit}.notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind(str(path))
        notified.settimeout(FAR_BEYOND_S)
        environment = {**os.environ, "NOTIFY_SOCKET": str(path), "RUNTIME_DIRECTORY": str(directory)}
        with subprocess.Popen(host.argv(command(unit, directory, options)), env=environment) as process:
            try:
                assert notified.recv(100) == b"READY=1"
                yield process
            finally:
                process.terminate()


@pytest.mark.parametrize(
    ("unit", "options"),
    [
        ("relay@.service", ""),
        ("entg.service", ""),
        ("enta-client.service", "--capture 7"),
        ("enta-server.service", "--replay 7"),
    ],
)
def test_a_program_tells_systemd_when_it_is_ready_and_ends_in_good_order(
    unit: str, options: str, tmp_path: Path
) -> None:
    """Each as its unit starts it; the agents beside a gateway, without which they would not be ready."""
    tmp_path.chmod(0o700)
    (tmp_path / "relay-web.toml").write_text(BRIDGE)
    (tmp_path / "relay-web").mkdir()
    with Network() as network, ExitStack() as stack:
        host = network.host("unit")
        if unit.startswith("enta"):
            stack.enter_context(supervised(host, "entg.service", tmp_path))
        process = stack.enter_context(supervised(host, unit, tmp_path, options))
        process.terminate()
        assert process.wait(FAR_BEYOND_S) == 0
