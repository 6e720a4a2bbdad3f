"""The benchmarks' command line. The relay's takes every figure of every peer that there is, and names the others."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
FAR_BEYOND_S = 55.0
FIGURES = {
    *(f"{figure}, {load}" for figure in ("mbit_s", "cpu_s_per_gb") for load in ("1 connection", "64 connections")),
    *("p50_us", "p99_us", "per_s", "cpu_us_per_connection", "memory_kib", "memory_kib_per_connection"),
}


def measure(path: str, *options: str, exit_code: int = 0) -> tuple[list[str], dict[str, Any]]:
    """Run it as small as can be, with this search path; returns its lines, and the JSON in the last."""
    argv = [sys.executable, "-m", "bench", "relay", "--rounds", "1", "--seconds", "0.01", *options]
    done = subprocess.run(
        argv, cwd=ROOT, env={"PATH": path}, capture_output=True, text=True, timeout=FAR_BEYOND_S, check=False
    )
    assert done.returncode == exit_code, done.stderr
    lines = done.stdout.splitlines()
    return lines, json.loads(lines[-1])


def without_peers(directory: Path) -> str:
    """A search path with nothing but what the benchmark itself runs."""
    for tool in ("ip", "sysctl", "ss"):
        found = shutil.which(tool)
        assert found
        (directory / tool).symlink_to(found)
    return str(directory)


def test_every_figure_is_taken_of_every_peer_that_is_installed() -> None:
    """The direct connection has no process between, and so no figures of one."""
    _, document = measure("/usr/sbin:/usr/bin:/sbin:/bin")
    results = document["results"]
    there = {name for name in ("socat", "haproxy") if shutil.which(name)}
    assert there | set(document["missing"]) == {"socat", "haproxy"}
    assert set(results) - {"socat -b 256k"} == {"direct", "relay", "relay spinning", *there}
    for name, figures in results.items():
        of_processes = {figure for figure in FIGURES if figure.startswith(("cpu", "memory"))}
        assert set(figures) == (FIGURES - of_processes if name == "direct" else FIGURES)
        for figure, values in figures.items():
            least = (
                0 if figure.startswith(("cpu", "memory_kib_per")) else 1e-9
            )  # too short to be seen, in so small a run
            assert len(values) == 1
            assert values[0] >= least, (name, figure)
    assert all(0 <= share <= 1 for share in document["foreign"])


def test_what_is_recorded_is_what_a_later_run_is_compared_with(tmp_path: Path) -> None:
    """A page, a picture and figures are written; a relay that once was faster by far, in every figure, is missed."""
    path, records = without_peers(tmp_path), tmp_path / "records"
    _, document = measure(path, "--record", str(records))
    assert {each.name for each in records.iterdir()} == {"relay.json", "relay.md", "relay.svg"}
    saved = records / "relay.json"
    assert json.loads(saved.read_text()) == document
    document["results"]["relay"]["per_s"][0] *= 1e6
    saved.write_text(json.dumps(document))
    measure(path, "--check", str(records), exit_code=1)


def test_nothing_is_measured_if_there_is_nothing_to_compare_with(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "bench", "path", "--check", str(tmp_path)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=FAR_BEYOND_S, check=False)
    assert (done.returncode, done.stdout) == (69, "")
    assert done.stderr.startswith(f"bench: cannot read {tmp_path}/path.json (")
    assert done.stderr.count("\n") == 1


def test_what_is_not_permitted_is_told_in_one_line() -> None:
    argv = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", sys.executable, "-m", "bench", "growth", "--quick"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=FAR_BEYOND_S, check=False)
    assert (done.returncode, done.stdout) == (71, "")
    assert re.fullmatch("bench: ip netns add .*\n", done.stderr)


def test_a_peer_that_is_not_installed_is_named(tmp_path: Path) -> None:
    lines, document = measure(without_peers(tmp_path))
    assert set(document["results"]) == {"direct", "relay", "relay spinning"}
    assert document["missing"] == ["haproxy", "socat"]
    assert "Left out, since not installed: haproxy, socat." in lines


@pytest.mark.parametrize("words", [["relais"], ["relay", "--rounds", "many"]])
def test_a_command_line_that_means_nothing_is_refused(words: list[str]) -> None:
    argv = [sys.executable, "-m", "bench", *words]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, timeout=FAR_BEYOND_S, check=False)
    assert done.returncode == 2


def test_answers_that_come_at_once_are_counted() -> None:
    """All bytes of them, through the relay and through socat, which is what the whole table begins with."""
    code = "from bench import half_close; half_close.run([0])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=FAR_BEYOND_S, check=False
    )
    rows = [line.rsplit(maxsplit=1) for line in done.stdout.splitlines()[2:]]
    assert {name.split(",")[0] for name, _ in rows} == {"relay", "socat", "socat -t 30"}, done.stderr
    assert [count for _, count in rows] == ["300000"] * 6


def test_an_attested_stream_is_measured_beside_those_it_is_compared_with() -> None:
    argv = [sys.executable, "-m", "bench", "streams", "--quick"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=FAR_BEYOND_S, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])["results"]
    assert set(results) == {"attested", "trio.SSLStream", "plain"}
    for figures in results.values():
        assert len(figures) == 4
        assert all(value > 0 for rounds in figures.values() for value in rounds)


def test_without_a_topic_everything_is_measured_and_quickly_the_path() -> None:
    from bench.__main__ import _chosen
    from bench.topics import TOPICS

    assert _chosen([], is_quick=False) == list(TOPICS)
    assert _chosen([], is_quick=True) == ["path"]
    assert _chosen(["relay", "path", "half-close"], is_quick=True) == ["path", "relay"]
