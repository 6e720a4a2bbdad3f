"""The benchmarks of the four-host path run on real hosts, and take every figure that their pages promise."""

from __future__ import annotations

import socket

import pytest
from enlink.testing.programs import FAR_BEYOND_S, comes_true

from bench import growth, network, path
from bench.courses import KINDS, PORT, with_control
from bench.record import Record

SECONDS = 0.02  # as little as can be
STEPS = {
    "connections": growth.CONNECTIONS,
    "bytes a write": growth.BYTES_A_WRITE,
    "streams": growth.STREAMS,
}
OF_PROGRAMS = ("cpu", "peak_memory")


def assert_complete(record: Record, names: tuple[str, ...], figures: set[str]) -> None:
    """Every figure of every column, and of the direct one all that are not of programs."""
    assert tuple(record.results) == names
    for name, column in record.results.items():
        expected = {figure for figure in figures if name != "direct" or not figure.startswith(OF_PROGRAMS)}
        assert set(column) == expected, name
        for figure, values in column.items():
            assert len(values) == record.rounds
            # What is measured in so short a time may cost too little to be seen.
            assert all(value > 0 or figure.startswith(("cpu", "lost")) for value in values), (name, figure)
    assert record.foreign
    assert record.missing == []


def test_the_path_is_measured_beside_the_direct_one() -> None:
    """1,000 connections at once included, of which none is lost."""
    names = ("eng", "direct")
    record = path.measure(rounds=1, seconds=SECONDS, names=names)
    speeds = {"up_mbit_s", "down_mbit_s", "up_mbit_s, 8 streams", "connections_per_s", "datagrams_per_s"}
    times = {"round_trip_p50_us", "round_trip_p99_us", "loaded_round_trip_p50_us", "crowd_p50_us", "crowd_p99_us"}
    costs = {"cpu_s_per_gb", "cpu_us_per_connection", "cpu_us_per_datagram", "peak_memory_mib"}
    losses = {"lost_of_1000", "lost_datagrams_percent"}
    assert_complete(record, names, speeds | times | costs | losses)
    assert record.results["eng"]["lost_of_1000"] == [0]
    assert record.goals["1,000 connections at once, lost: none"][1]
    assert not any("socat" in goal for goal in record.goals)


def test_another_congestion_control_is_one_of_all_hosts_and_of_the_record() -> None:
    with KINDS["direct"].open(with_control("reno")) as course:
        controls = {host.run("sysctl", "-n", "net.ipv4.tcp_congestion_control") for host in course.hosts.values()}
        assert controls == {"reno\n"}
    record = path.measure(rounds=0, seconds=SECONDS, names=["direct"], control="reno")
    assert (record.topic, record.machine["congestion control"]) == ("reno", "reno")


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if not kind.missing() and name != "eng"])
def test_every_peer_that_is_installed_carries_the_load(name: str) -> None:
    """Both ways, and each has programs whose processor time and memory are seen; nothing has none."""
    with KINDS[name].open() as course:
        assert course.load("up", SECONDS)["mbit_s"] > 0
        assert course.load("down", SECONDS)["mbit_s"] > 0
        assert course.load("crowd", SECONDS, 5)["lost"] == 0
        figures = path.datagrams(course, SECONDS)
        assert course.carries_datagrams == ("socat" not in name and "haproxy" not in name)
        assert figures.get("datagrams_per_s", 0) > 0 if course.carries_datagrams else not figures
        if name == "direct":
            assert (course.cpu_s(), course.peak_memory_bytes()) == (0, 0)
        else:
            assert course.peak_memory_bytes() > 0
            # The kernel counts in hundredths of a second, which one short load may not take.
            assert comes_true(lambda: bool(course.load("up", SECONDS)) and course.cpu_s() > 0, FAR_BEYOND_S)


def test_a_peer_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.courses.shutil.which", lambda name: None if name == "socat" else f"/usr/bin/{name}")
    measured = growth.measure(rounds=0, seconds=SECONDS, names=("4 socat", "direct"))
    assert measured.missing == ["socat"]
    assert list(measured.results) == ["direct"]


def test_every_step_is_taken() -> None:
    record = growth.measure(rounds=1, seconds=SECONDS, names=("eng", "direct"))
    steps = {f"{steps} {what}" for what in STEPS for steps in STEPS[what]}
    assert {figure.partition(", ")[2] for figure in record.results["eng"]} == steps
    assert_complete(record, ("eng", "direct"), set(record.figures()))


def test_every_network_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both of them, where there are usually more."""
    monkeypatch.setattr(network, "DELAYS_MS", [1])
    monkeypatch.setattr(network, "LOST_OF_1000", [0, 1])
    record = network.measure(rounds=1, seconds=SECONDS, names=("eng", "direct"))
    networks = ("1 ms one way, 0 % lost", "1 ms one way, 0.1 % lost")
    figures = {f"{figure}, {name}" for figure in ("up_mbit_s", "p50_ms", "p99_ms") for name in networks}
    assert_complete(record, ("eng", "direct"), figures)
    assert len(record.foreign) == 2


def test_a_share_of_the_datagrams_that_the_network_loses_is_told_as_lost() -> None:
    """And lost answers stop nobody: what has been lost is of the datagrams, whatever became of the answers."""
    with KINDS["direct"].open(network.slow_wire(1, 400)) as course:
        assert 20 < course.load("datagrams", 0.5)["lost_percent"] < 60
        for host in ("near", "far"):
            network.lose(course.hosts[host], 0)
        found = course.load("datagrams", SECONDS)
        assert found["lost_percent"] == 0
        assert found["count"] > 1


def test_the_slow_wire_takes_its_time_and_loses_what_it_is_to() -> None:
    """A round trip takes twice the delay of one way; when everything is lost, nobody answers."""
    with KINDS["direct"].open(network.slow_wire(30)) as course:
        assert course.load("round_trips", SECONDS)["p50_us"] >= 60_000
        network.lose(course.hosts["far"], 1000)
        with course.hosts["app"].entered(), pytest.raises(TimeoutError):
            socket.create_connection((course.address, int(PORT)), timeout=0.5)
        network.lose(course.hosts["far"], 0)
        with course.hosts["app"].entered():
            socket.create_connection((course.address, int(PORT)), timeout=40).close()
