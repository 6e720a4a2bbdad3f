"""relay.pyz is the relay in one file: any Python runs it, with nothing installed, and each build gives equal bytes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from enlink.testing.hosts import Host, Network

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "packages" / "relay" / "build_pyz.py"
FAR_BEYOND_S = 40.0
# No site-packages, no variables, nothing of the directory where it is started.
BARE = (str(Path(sys.executable).resolve()), "-I", "-S")


@pytest.fixture(scope="module")
def pyz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pyz") / "relay.pyz"
    build(path)
    return path


def build(path: Path) -> None:
    subprocess.run([sys.executable, SCRIPT, path], check=True, timeout=FAR_BEYOND_S)


@contextmanager
def running(host: Host, pyz: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """The file as a program, ready."""
    argv = host.argv([*BARE, str(pyz), *options])
    with subprocess.Popen(
        argv, stderr=subprocess.PIPE, text=True, env={"RUNTIME_DIRECTORY": str(pyz.parent)}
    ) as process:
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if " ready " in line:
                    break
            else:
                raise AssertionError(f"it ended with {process.wait()}")
            yield process
        finally:
            process.terminate()
            process.communicate(timeout=FAR_BEYOND_S)


def test_building_it_again_gives_the_same_bytes(pyz: Path, tmp_path: Path) -> None:
    build(tmp_path / "again.pyz")
    assert (tmp_path / "again.pyz").read_bytes() == pyz.read_bytes()


def test_it_holds_python_and_licences_and_nothing_that_only_one_machine_runs(pyz: Path) -> None:
    with zipfile.ZipFile(pyz) as archive:
        names = archive.namelist()
        about = [name for name in names if ".dist-info/" in name]
        assert {Path(name).suffix for name in names if name not in about} == {".py", ".pyc"}
        licensed = {name.split("-")[0].lower() for name in about if "LICEN" in name.upper()}
        assert {"trio", "dnspython", "pyyaml", "eng_relay", "eng_link"} <= licensed
        assert str(ROOT).encode() not in b"".join(archive.read(name) for name in names)


def test_a_bare_python_runs_it(pyz: Path) -> None:
    done = subprocess.run([*BARE, pyz, "--version"], capture_output=True, text=True, timeout=FAR_BEYOND_S, check=True)
    assert (done.stdout, done.stderr) == ("relay 0.1.0\n", "")
    assert os.access(pyz, os.X_OK)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_it_relays_and_sets_the_loopback_device_up_all_by_itself(pyz: Path, workers: str) -> None:
    """To a target with a name, for which it needs more of its libraries."""
    with Network() as network:
        host = network.host("pyz")
        host.run("ip", "link", "set", "lo", "down")
        options = ("--setup-loopback", "--listen", "127.0.0.1:7200", "--target", "localhost:9200", "--workers", workers)
        with running(host, pyz, *options) as process, host.entered():
            with socket.create_server(("127.0.0.1", 9200)) as server:
                server.settimeout(FAR_BEYOND_S)
                with socket.create_connection(("127.0.0.1", 7200), FAR_BEYOND_S) as client:
                    accepted, _ = server.accept()
                    with accepted:
                        client.sendall(b"question")
                        client.shutdown(socket.SHUT_WR)
                        with accepted.makefile("rb") as file:
                            assert file.read() == b"question"
                        accepted.sendall(b"answer")
                    with client.makefile("rb") as file:
                        assert file.read() == b"answer"
            process.terminate()
            assert process.wait(FAR_BEYOND_S) == 0
