"""An agent with several gateways: its connections are spread over them, and outlive any of them. Real programs."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path as FilePath
from typing import Any

import pytest
import standin
from attested import attested_path
from enlink.testing.hosts import Host
from enlink.testing.state import difference, network_state
from enlink.testing.transfer import FAR_BEYOND_S, NOWHERE, Transfer, until
from enta.lanes import LANE_VARIABLE
from path import Path, Program

TRANSFERS = 6
CONNECTIONS = 40  # over two lanes: all will not take the same one before the sun has gone out


@pytest.fixture
def path() -> Iterator[Path]:
    """The path with two pairs of gateways, and an echo server."""
    with Path(lanes=2) as made, made.running("server", "echosvr", "server", "--port", "7"):
        made.start()
        for agent in agents(made):
            until(lambda agent=agent: used(agent) == [True, True], "complete")  # type: ignore[misc]
        yield made


def agents(path: Path) -> list[Program]:
    return [path.programs["app"], path.programs["server"]]


def lanes(agent: Program) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = agent.status()["lanes"]
    return found


def used(agent: Program) -> list[bool]:
    """Which lanes reach the other agent, and get packets."""
    return [lane["used"] and lane["path"] == "open" for lane in lanes(agent)]


def processes(agent: Program) -> list[int]:
    """An agent's own process and its workers."""
    return [agent.process.pid, *(lane["pid"] for lane in lanes(agent))]


def workers(agent: Program) -> list[int]:
    """An agent's workers, also while it cannot be asked; it has other children as well, for a moment."""
    threads = FilePath(f"/proc/{agent.process.pid}/task").glob("*/children")
    children = [int(pid) for thread in threads for pid in text_of(thread).split()]
    return [pid for pid in children if LANE_VARIABLE in text_of(FilePath(f"/proc/{pid}/environ"))]


def text_of(file: FilePath) -> str:
    """What a file of /proc says; nothing, once its thread or process is gone."""
    try:
        return file.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def is_running(pid: int) -> bool:
    state = text_of(FilePath(f"/proc/{pid}/stat"))
    return bool(state) and ") Z " not in state


def echoed(host: Host, data: bytes = b"there and back") -> bool:
    """A new connection of its own comes to the server and back."""
    with host.entered():
        connection = socket.create_connection((NOWHERE, 7), FAR_BEYOND_S)
    with connection:
        connection.settimeout(FAR_BEYOND_S)
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        got = b""
        while piece := connection.recv(1 << 16):
            got += piece
    return got == data


def transfers(stack: ExitStack, path: Path) -> list[Transfer]:
    return [stack.enter_context(Transfer(path.hosts["app"])) for _ in range(TRANSFERS)]


def carried(gateway: Program, port: int) -> int:
    """How many packets from its agent a gateway has had."""
    document = gateway.host.run(gateway.argv[0], "status", "--json", "--enta-port", str(port))
    packets: int = json.loads(document)["counters"]["from_enta"].get("packets", 0)
    return packets


def test_connections_are_spread_over_the_gateways_and_each_keeps_to_its_own(path: Path) -> None:
    """Both ways: what one gateway of the client's carries, the same one of the server's answers."""
    near, far = path.further_gateways
    gateways = [(path.programs["near"], path.programs["far"], 6980), (near, far, 6982)]
    assert all(echoed(path.hosts["app"]) for _ in range(CONNECTIONS))
    for of_app, of_server, port in gateways:
        # Of a connection's packets about as many are the client's as the server's.
        assert carried(of_app, port) >= 5
        assert abs(carried(of_app, port) - carried(of_server, port)) < carried(of_app, port) / 2
    for agent in agents(path):
        status = agent.status()
        assert status["uplink"] == {"up": True, "path": "open"}
        assert status["counters"]["to_gateway"]["packets"] > 20
        assert status["counters"]["dropped"] == {}


@pytest.mark.parametrize("lost", ["its own", "the peer's"])
def test_connections_outlive_a_gateway_whichever_end_it_stands_at(path: Path, lost: str) -> None:
    """Where it is not the agent's own, nothing but word from its gateway tells the agent."""
    near, far = path.further_gateways
    victim = near if lost == "its own" else far
    with ExitStack() as stack:
        under_way = transfers(stack, path)
        victim.kill()
        for agent in agents(path):
            until(lambda agent=agent: used(agent) == [True, False], "left out")  # type: ignore[misc]
        for transfer in under_way:
            transfer.goes_on()
        assert all(echoed(path.hosts["app"]) for _ in range(CONNECTIONS))
        victim.start()
        for agent in agents(path):
            until(lambda agent=agent: used(agent) == [True, True], "used again")  # type: ignore[misc]
        for transfer in under_way:
            transfer.goes_on()


def test_without_any_gateway_connections_wait_and_go_on_with_the_first_that_is_back(path: Path) -> None:
    near, _ = path.further_gateways
    with Transfer(path.hosts["app"]) as transfer:
        for gateway in (near, path.programs["near"]):
            gateway.kill()
        until(lambda: not path.programs["app"].status()["uplink"]["up"], "noticed")
        assert [lane["used"] for lane in lanes(path.programs["app"])] == [True, True]
        near.start()
        transfer.goes_on()
        assert used(path.programs["app"]) == [False, True]


def test_a_worker_that_is_killed_is_replaced_and_costs_no_connection_and_no_count(path: Path) -> None:
    agent = path.programs["app"]
    with ExitStack() as stack:
        under_way = transfers(stack, path)
        before = agent.status()["counters"]["to_gateway"]["packets"]
        victim = lanes(agent)[1]["pid"]
        os.kill(victim, signal.SIGKILL)
        until(lambda: lanes(agent)[1]["replaced"] == 1 and used(agent) == [True, True], "replaced")
        for transfer in under_way:
            transfer.goes_on()
        assert lanes(agent)[1]["pid"] not in (victim, None)
        assert agent.status()["counters"]["to_gateway"]["packets"] > before
    assert agent.log().count(" lane_ended ") == 1


def test_a_worker_that_hangs_is_left_out_until_it_goes_on(path: Path) -> None:
    """Its link is up, as far as it has said; what it does not say tells the first process."""
    agent = path.programs["app"]
    with ExitStack() as stack:
        under_way = transfers(stack, path)
        victim = lanes(agent)[1]["pid"]
        os.kill(victim, signal.SIGSTOP)
        until(lambda: used(agent) == [True, False], "left out")
        for transfer in under_way:
            transfer.goes_on()
        os.kill(victim, signal.SIGCONT)
        until(lambda: used(agent) == [True, True], "used again")
        for transfer in under_way:
            transfer.goes_on()
    assert lanes(agent)[1]["pid"] == victim


def test_where_no_worker_can_be_started_the_others_go_on_until_one_can(path: Path, tmp_path: FilePath) -> None:
    """As when the system has no room for another process, or Python is just being replaced."""
    python = tmp_path / "python"
    python.symlink_to(sys.prefix)
    agent = path.programs["app"]  # who asks for status
    agent.stop()
    with path.running("app", str(python / "bin" / FilePath(sys.executable).name), *agent.argv) as started:
        until(lambda: used(agent) == [True, True], "complete")
        victim = lanes(agent)[1]["pid"]
        python.unlink()
        os.kill(victim, signal.SIGKILL)
        started.wait_for("lane_not_started")
        until(lambda: used(agent) == [True, False], "left out")
        assert all(echoed(path.hosts["app"]) for _ in range(CONNECTIONS))
        python.symlink_to(sys.prefix)
        until(lambda: lanes(agent)[1]["replaced"] == 1 and used(agent) == [True, True], "replaced")


def test_a_worker_that_dies_before_it_has_said_a_word_is_no_end_of_an_agent_that_works(path: Path) -> None:
    agent = path.programs["app"]
    agent.stop()
    agent.start()
    until(lambda: workers(agent), "begun")
    victim = workers(agent)[0]
    os.kill(victim, signal.SIGSTOP)
    agent.wait_for("ready")
    os.kill(victim, signal.SIGKILL)
    until(lambda: used(agent) == [True, True], "replaced")
    assert victim not in processes(agent)


def test_killed_while_no_gateway_takes_its_leave_it_can_be_started_again_at_once(path: Path) -> None:
    """The device goes with the last worker, and the next start must not meet it."""
    agent, gateways = path.programs["app"], [path.programs["near"], path.further_gateways[0]]
    for gateway in gateways:
        os.kill(gateway.process.pid, signal.SIGSTOP)
    agent.kill()
    agent.start()
    until(lambda: len(workers(agent)) == len(gateways), "begun")
    for gateway in gateways:
        os.kill(gateway.process.pid, signal.SIGCONT)
    agent.wait_for("ready")
    assert echoed(path.hosts["app"])


@pytest.mark.proves("F04", "G5")
def test_when_the_first_process_is_killed_its_workers_and_the_device_go_and_the_guard_holds(path: Path) -> None:
    agent = path.programs["app"]
    pids = processes(agent)
    agent.kill()
    until(lambda: not any(map(is_running, pids)), "gone")
    assert "eng0" not in path.hosts["app"].run("ip", "-brief", "link")
    with path.hosts["app"].entered(), pytest.raises(OSError, match="No route to host"):
        socket.create_connection((NOWHERE, 7), FAR_BEYOND_S)
    agent.start()
    agent.wait_for("ready")
    assert echoed(path.hosts["app"])


@pytest.mark.proves("F05", "G5")
@pytest.mark.parametrize("heard_by", ["the first process", "all of them"])
def test_a_stop_leaves_the_host_as_it_was_and_no_process(heard_by: str) -> None:
    """systemd may signal every process of a unit."""
    with Path(lanes=2) as path:
        before = network_state(path.hosts["app"])
        path.start()
        agent = path.programs["app"]
        pids = processes(agent)
        for pid in pids if heard_by == "all of them" else pids[:1]:
            os.kill(pid, signal.SIGTERM)
        assert agent.process.wait(FAR_BEYOND_S) == 0
        assert not any(map(is_running, pids))
        assert difference(before, network_state(path.hosts["app"])) == []


def test_where_the_device_is_taken_away_the_agent_ends_and_its_workers_with_it(path: Path) -> None:
    agent = path.programs["app"]
    pids = processes(agent)
    path.hosts["app"].run("ip", "link", "delete", "eng0")
    assert agent.process.wait(FAR_BEYOND_S) == 71
    assert not any(map(is_running, pids))
    assert "Traceback" not in agent.log()


def test_a_worker_that_is_replaced_judges_by_the_policy_that_was_there_at_the_start(tmp_path: FilePath) -> None:
    """Else one lane would accept whom the other does not, and nobody would know."""
    library = standin.build(tmp_path / "rats-tls")
    with attested_path(library, tmp_path, lanes=2) as path:
        path.start()
        agent = path.programs["app"]
        until(lambda: used(agent) == [True, True], "complete")
        terms = [lane["attested"]["terms"] for lane in lanes(agent)]
        (tmp_path / "policy.toml").write_text('no = "policy"')
        os.kill(lanes(agent)[0]["pid"], signal.SIGKILL)
        until(lambda: lanes(agent)[0]["replaced"] == 1 and used(agent) == [True, True], "replaced")
        assert [lane["attested"]["terms"] for lane in lanes(agent)] == terms
