"""Clean-up after agents that were killed, beside others that live and rules that are strangers', on a real kernel."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from enlink.errors import CannotCreate, SystemFailure, Unavailable
from enlink.instance import InstanceLock
from enlink.testing.hosts import Host, Network
from enlink.testing.programs import as_nobody
from enta import cleanup
from enta.capture.ip_rules import wanted_routes, wanted_rules
from enta.capture.nftables import guard_ruleset
from enta.capture.plan import Identity, Plan, parse_captures
from enta.cleanup import clean_up, leftover_instances, living_instances
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

BACKENDS = ("nftables", "iptables")
FAR_BEYOND_S = 50  # everything here takes a second or two

# What an agent does to its host, in the agent's order. Arguments: instance, a number, packet filter.
AGENT = """
import signal, sys
from enlink.instance import InstanceLock
from enta.capture.iptables import IptablesFirewall
from enta.capture.nftables import NftablesFirewall
from enta.capture.plan import Plan, parse_captures
from enta.capture.routing import Routing
from enta.tun import open_tun
from ipaddress import IPv4Address, IPv4Interface

instance, number, backend = sys.argv[1:]
plan = Plan(
    "client",
    IPv4Interface(f"192.168.{number}.1/24"),
    IPv4Address(f"192.168.{number}.254"),
    parse_captures([number, f"udp/{number}"]),
    instance=instance,
    tun_name=f"eng{number}",
    table=6900 + int(number),
    mark=0x6900 + int(number),
)
facts = {"tun_name": plan.tun_name, "table": plan.table, "mark": plan.mark, "firewall": backend}
with InstanceLock("enta", instance, facts=facts):
    firewall = {"nftables": NftablesFirewall, "iptables": IptablesFirewall}[backend](plan)
    routing = Routing(plan)
    firewall.add_guard()
    with open_tun(plan.tun_name):
        routing.bring_up_tun()
        firewall.add_capture()
        routing.add_rules()
        print("up", flush=True)
        signal.pause()
"""

# Holds the lock of an instance and nothing else, as an agent does that is just starting. Argument: instance.
STARTING = """
import signal, sys
from enlink.instance import InstanceLock

with InstanceLock("enta", sys.argv[1], facts={"tun_name": "eng77", "table": 6977, "mark": 0x6977}):
    print("up", flush=True)
    signal.pause()
"""

CLEAN_UP = """
import logging, sys
from enlink.errors import EngError
from enta.cleanup import clean_up

logging.basicConfig(format="%(message)s %(fields)s")
try:
    print(*clean_up(), sep="\\n")
except EngError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""

# Each is ours in all but one thing.
STRANGERS_TABLES = """
table inet eng_one_guard_too {
    chain outgoing { type filter hook output priority -150; policy accept; tcp dport 7 drop; }
}
table inet eng_other_guard {
    comment "the engine's guard"
    chain outgoing { type filter hook output priority -150; policy accept; tcp dport 7 drop; }
}
table inet eng_copied_guard {
    comment "eng guard: instance=default tun=eng0 table=6978 mark=0x6978"
}
table inet default_guard {
    comment "eng guard: instance=default tun=eng0 table=6978 mark=0x6978"
}
table ip eng_default_guard {
    comment "eng guard: instance=default tun=eng0 table=6978 mark=0x6978"
}
table inet eng_default {
    comment "eng agent: instance=default tun=eng0 table=6978 mark=0x6978"
}
"""

# Cleans up again and again, and is killed before or after one more word with the kernel each time, until it gets to the
# end. Standard input: the scripts for nft and ip that put leftovers on the host.
KILLED_LATER_AND_LATER = """
import itertools, json, os, signal, subprocess, sys
from enta.capture import routing
from enta.capture.libnftables import Nft
from enta.cleanup import clean_up, leftover_instances

def state():
    commands = (["nft", "list", "ruleset"], ["ip", "rule"], ["ip", "route", "show", "table", "all"])
    return [subprocess.run(command, capture_output=True, check=True).stdout for command in commands]

def killed_at(limit):
    points = itertools.count(1)
    def profile(frame, event, argument):
        if event in ("call", "return") and frame.f_code in (Nft.run.__code__, routing._delete.__code__):
            if next(points) == limit:
                os.kill(os.getpid(), signal.SIGKILL)
    return profile

nft_script, ip_script = json.load(sys.stdin)
before = state()
half_done = set()
for limit in itertools.count(1):
    for program, script in (["nft", "-f", "-"], nft_script), (["ip", "-batch", "-"], ip_script):
        subprocess.run(program, input=script, text=True, check=True)
    child = os.fork()
    if child == 0:
        sys.setprofile(killed_at(limit))
        clean_up()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    half_done.add(tuple(clean_up()))
    assert clean_up() == [], limit
    assert leftover_instances() == [], limit
    assert state() == before, limit
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL
print(limit, len(half_done))
"""


@pytest.fixture(autouse=True)
def runtime_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One for this test and for the programs that it starts."""
    path = tmp_path / "run"
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(path))
    return path


@pytest.fixture
def host() -> Iterator[Host]:
    with Network() as network:
        host = network.host("host")
        # Else the kernel gives each device an address of its own making, some time after it is up.
        host.run("sysctl", "-qw", "net.ipv6.conf.default.disable_ipv6=1")
        yield host


@dataclass(frozen=True)
class State:
    """What others can see of a host, as sorted text. Of iptables the rules: tables stay, empty, once they were used."""

    nftables: str
    iptables: tuple[str, ...]
    routing: str


def state(host: Host) -> State:
    saved = host.run("iptables-legacy-save").splitlines() + host.run("ip6tables-legacy-save").splitlines()
    routing = (("ip", "rule"), ("ip", "route", "show", "table", "all"), ("ip", "-brief", "address"))
    return State(
        host.run("nft", "list", "ruleset"),
        tuple(line for line in saved if line.startswith(("-A", ":eng_"))),
        "".join(host.run(*command) for command in routing),
    )


@contextmanager
def program(host: Host, source: str, *arguments: str, runtime: Path | None = None) -> Iterator[None]:
    """Run *source* until the block ends, and kill it then."""
    setting = [] if runtime is None else ["env", f"RUNTIME_DIRECTORY={runtime}"]
    with host.popen(*setting, sys.executable, "-c", source, *arguments, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"up\n"
            yield
        finally:
            process.kill()


@contextmanager
def agent(host: Host, instance: str, number: int, backend: str, runtime: Path | None = None) -> Iterator[None]:
    with program(host, AGENT, instance, str(number), backend, runtime=runtime):
        yield


def crash(host: Host, instance: str, number: int, backend: str) -> None:
    """Leave what an agent leaves that is killed."""
    with agent(host, instance, number, backend):
        pass


def removed_from(host: Host) -> list[str]:
    with host.entered():
        return clean_up()


def leftovers_on(host: Host) -> list[str]:
    with host.entered():
        return leftover_instances()


def clean_up_in_child(host: Host, *wrapper: str) -> subprocess.CompletedProcess[str]:
    argv = host.argv([*wrapper, sys.executable, "-c", CLEAN_UP])
    return subprocess.run(argv, capture_output=True, text=True, timeout=FAR_BEYOND_S, check=False)


def without_file(path: str) -> tuple[str, ...]:
    """The words before a command that make it find an empty file at *path*."""
    return ("unshare", "--mount", "sh", "-ec", 'mount --bind /dev/null "$0"; exec "$@"', path)


def library(name: str) -> str:
    """Where the dynamic linker finds *name*."""
    lines = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=True).stdout.splitlines()
    return os.path.realpath(next(line.split()[-1] for line in lines if line.split()[0] == name))


# ---- what goes


@pytest.mark.proves("F05", "F13", "D30")
@pytest.mark.parametrize("backend", BACKENDS)
def test_all_that_a_killed_agent_left_goes_and_nothing_is_left_for_a_second_time(host: Host, backend: str) -> None:
    before = state(host)
    crash(host, "one", 11, backend)
    assert state(host) != before
    assert leftovers_on(host) == ["one"]
    filter_line = {
        "nftables": "guard of instance 'one' (nftables table inet eng_one_guard)",
        "iptables": "rules of instance 'one' (iptables chains eng_one and eng_one_guard)",
    }[backend]
    assert removed_from(host) == [
        "rule priority 6977 fwmark 0x690b lookup main protocol 78",
        "rule priority 6978 to 192.168.11.0/24 iif lo lookup 6911 protocol 78",
        *(
            f"rule priority 6978 from {source} iif lo ipproto {protocol} dport 11 lookup 6911 protocol 78"
            for protocol in ("tcp", "udp")
            for source in ("0.0.0.0/32", "192.168.11.1/32")
        ),
        "route unreachable default metric 4294967295 table 6911 protocol 78",
        filter_line,
    ]
    assert state(host) == before
    assert removed_from(host) == []
    assert leftovers_on(host) == []


@pytest.mark.proves("F13", "D30")
@pytest.mark.parametrize("living", BACKENDS)
@pytest.mark.parametrize("dead", BACKENDS)
def test_a_dead_agents_leftovers_go_from_beside_a_living_one(host: Host, living: str, dead: str) -> None:
    with agent(host, "living", 12, living):
        before = state(host)
        crash(host, "dead", 11, dead)
        assert leftovers_on(host) == ["dead"]
        removed = removed_from(host)
        assert len(removed) == 8
        assert not [line for line in removed if "living" in line or "12" in line.split()]
        assert state(host) == before
        assert removed_from(host) == []
    assert leftovers_on(host) == ["living"]


@pytest.mark.proves("F13")
def test_leftovers_go_although_someone_flushed_the_guard_away(host: Host) -> None:
    before = state(host)
    crash(host, "one", 11, "nftables")
    host.run("nft", "flush", "ruleset")
    assert leftovers_on(host) == []
    assert len(removed_from(host)) == 7
    assert state(host) == before


@pytest.mark.proves("F13")
def test_a_device_that_outlives_its_process_makes_no_agent_alive(host: Host) -> None:
    crash(host, "one", 11, "iptables")
    host.run("ip", "tuntap", "add", "dev", "eng11", "mode", "tun")
    assert "rules of instance 'one' (iptables chains eng_one and eng_one_guard)" in removed_from(host)


@st.composite
def dead_plans(draw: st.DrawFn) -> list[Plan]:
    """Draw what up to three agents may have been asked for. They may have shared their table and mark."""
    names = st.from_regex(r"[a-z0-9_-]{1,15}", fullmatch=True).filter(lambda name: not name.endswith("_guard"))
    ports = st.integers(1, 65535)
    return [
        Plan(
            "client",
            IPv4Interface("192.168.0.1/24"),
            IPv4Address("192.168.0.254"),
            parse_captures([str(draw(ports)), f"udp/10.0.0.0/8:{draw(ports)}"]),
            instance=instance,
            table=draw(st.sampled_from([6978, 6979, 2**32 - 1])),
            mark=draw(st.sampled_from([1, 0x6978, 2**32 - 1])),
        )
        for instance in draw(st.lists(names, min_size=1, max_size=3, unique=True))
    ]


def leftover_scripts(plans: list[Plan]) -> tuple[str, str]:
    """What to hand to nft, and to ip -batch, to leave what these plans' agents would. Claims go with nft's process."""
    routing = [f"route add {route}" for plan in plans for route in wanted_routes(plan) if route.device is None]
    routing += [f"rule add {rule}" for plan in plans for rule in wanted_rules(plan)]
    return "".join(guard_ruleset(plan) for plan in plans), "".join(f"{line}\n" for line in routing)


@pytest.mark.proves("F13", "D30")
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plans=dead_plans())
def test_whatever_they_were_asked_for_dead_agents_leave_nothing_behind(host: Host, plans: list[Plan]) -> None:
    before = state(host)
    nft_script, ip_script = leftover_scripts(plans)
    host.run("nft", "-f", "-", input=nft_script)
    host.run("ip", "-force", "-batch", "-", input=ip_script, check=False)  # what two plans have in common is there once
    assert leftovers_on(host) == sorted(plan.instance for plan in plans)
    assert len(removed_from(host)) > len(plans)
    assert state(host) == before


@pytest.mark.proves("F05")
def test_clean_up_killed_at_any_point_is_finished_by_the_next(host: Host) -> None:
    scripts = leftover_scripts(
        [
            Plan("client", IPv4Interface("192.168.0.1/24"), IPv4Address("192.168.0.254"), parse_captures(["7"])),
            Plan("client", IPv4Interface("10.0.0.1/24"), IPv4Address("10.0.0.2"), instance="two", table=6979, mark=2),
        ]
    )
    argv = host.argv([sys.executable, "-c", KILLED_LATER_AND_LATER])
    done = subprocess.run(
        argv, input=json.dumps(scripts), capture_output=True, text=True, timeout=FAR_BEYOND_S, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    points, results = map(int, done.stdout.split())
    assert points > 30, "the control: it was killed at many points"
    assert results > 5, "and what the next one had to do differed"


# ---- what stays


@pytest.mark.proves("F13", "D29", "D30")
def test_what_only_looks_like_ours_is_left_as_it_is(host: Host) -> None:
    host.run("ip", "link", "add", "wire", "type", "veth", "peer", "name", "far")
    host.run("ip", "link", "set", "wire", "up")
    for line in (
        "rule add priority 6978 iif lo ipproto tcp dport 7 lookup 6978",  # without our tag
        "rule add priority 6977 fwmark 0x6978 lookup main protocol static",
        "rule add priority 6978 iif wire ipproto tcp dport 7 lookup 6978 protocol 78",  # of another shape
        "rule add priority 6978 iif lo ipproto tcp dport 7-9 lookup 6978 protocol 78",
        "rule add priority 6978 iif lo unreachable protocol 78",
        "route add unreachable default metric 4294967295 table 6978 protocol static",
        "route add unreachable 10.0.0.0/8 metric 4294967295 table 6979 protocol 78",
        "route add default dev wire table 6980 protocol static",
    ):
        host.run("ip", *line.split())
    host.run("nft", "-f", "-", input=STRANGERS_TABLES)
    for line in ("-N eng_other", "-N eng_other_guard", "-A eng_other -j DROP", "-A OUTPUT -j eng_other"):
        host.run("iptables-legacy", *line.split())
    comment = "eng guard: instance=other tun=eng0 table=6978"
    host.run("iptables-legacy", "-A", "OUTPUT", "-m", "comment", "--comment", comment, "-j", "eng_other")
    before = state(host)
    assert leftovers_on(host) == []
    assert removed_from(host) == []
    assert state(host) == before

    crash(host, "one", 11, "nftables")
    crash(host, "two", 12, "iptables")
    assert leftovers_on(host) == ["one", "two"]
    assert len(removed_from(host)) == 16
    assert state(host) == before


@pytest.mark.proves("D30")
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_agent_in_another_container_is_alive_although_its_lock_is_elsewhere(
    host: Host, backend: str, tmp_path: Path
) -> None:
    crash(host, "one", 11, backend)  # its leftovers are not those of a dead agent any more, once it is back
    with agent(host, "one", 11, backend, runtime=tmp_path / "container"):
        before = state(host)
        assert leftovers_on(host) == []
        assert removed_from(host) == []
        assert state(host) == before
    assert len(removed_from(host)) == 8, "the control: dead, it would have lost all of it"


@pytest.mark.proves("D30")
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_agent_that_is_just_starting_keeps_the_guard_of_its_dead_predecessor(host: Host, backend: str) -> None:
    crash(host, "one", 11, backend)
    with program(host, STARTING, "one"):
        assert leftovers_on(host) == []
        assert [line for line in removed_from(host) if "instance" in line] == []
    assert leftovers_on(host) == ["one"], "the control: it was still there"


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_agent_that_came_to_life_after_the_look_keeps_its_rules(
    host: Host, backend: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    crash(host, "one", 11, backend)
    with host.entered():
        seen_before = cleanup._look()
    with agent(host, "one", 11, backend):
        before = state(host)
        monkeypatch.setattr(cleanup, "_look", lambda: seen_before)
        monkeypatch.setattr(cleanup, "purge_dead", lambda _living: [])
        assert removed_from(host) == []
        assert state(host) == before
    (record,) = caplog.records
    fields = vars(record)["fields"]
    assert (record.message, fields["instance"]) == ("left_alone", "one")
    assert "here already" in str(fields["error"])


def test_the_same_instance_alive_on_another_host_is_another_one(host: Host) -> None:
    with Network() as network:
        other = network.host("other")
        with agent(other, "one", 11, "nftables"):
            crash(host, "one", 11, "nftables")
            with host.entered():
                assert living_instances() == []
            assert leftovers_on(host) == ["one"]
            before = state(other)
            assert len(removed_from(host)) == 8
            assert state(other) == before


def test_an_agent_that_starts_sees_its_dead_predecessors_guard_from_under_its_own_lock(host: Host) -> None:
    crash(host, "one", 11, "nftables")
    facts = {"tun_name": "eng11", "table": 6911, "mark": 0x690B, "firewall": "nftables"}
    with host.entered(), InstanceLock("enta", "one", facts=facts):
        assert leftover_instances() == ["one"]


# ---- what cannot be done


@pytest.mark.proves("F59")
def test_without_the_privilege_nothing_changes_and_the_reader_learns_which(host: Host) -> None:
    crash(host, "one", 11, "nftables")
    before = state(host)
    done = clean_up_in_child(host, "setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin")
    assert (done.returncode, done.stdout) == (77, "")
    assert "CAP_NET_ADMIN" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert state(host) == before


@pytest.mark.proves("G21")
def test_a_user_with_nothing_but_the_privilege_cleans_up(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    before = state(host)
    crash(host, "one", 11, "nftables")
    with TemporaryDirectory() as runtime:  # where that user may go
        os.chown(runtime, 65534, 65534)
        monkeypatch.setenv("RUNTIME_DIRECTORY", runtime)
        done = clean_up_in_child(host, *as_nobody("net_admin"))
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 8
    assert state(host) == before
    (warning,) = [line for line in done.stderr.splitlines() if "not_looked_into" in line]
    assert "run as root" in warning, "iptables' tables are for root to see"


@pytest.mark.proves("F65")
def test_without_libnftables_the_rest_is_cleaned_up_and_a_warning_says_what_is_not(host: Host) -> None:
    before = state(host)
    crash(host, "one", 11, "iptables")
    crash(host, "two", 12, "nftables")
    with_guard = state(host).nftables
    done = clean_up_in_child(host, *without_file(library("libnftables.so.1")))
    assert done.returncode == 0, done.stderr
    assert "rules of instance 'one'" in done.stdout
    assert "two" not in done.stdout
    (warning,) = done.stderr.splitlines()
    assert "not_looked_into" in warning
    assert "apt install libnftables1" in warning
    assert state(host) == State(with_guard, before.iptables, before.routing)
    assert removed_from(host) == ["guard of instance 'two' (nftables table inet eng_two_guard)"]


def test_without_libnftables_living_agents_are_still_alive(host: Host) -> None:
    with agent(host, "one", 11, "nftables"), agent(host, "two", 12, "iptables"):
        before = state(host)
        done = clean_up_in_child(host, *without_file(library("libnftables.so.1")))
        assert (done.returncode, done.stdout) == (0, "\n")
        assert state(host) == before


@pytest.mark.proves("F65")
def test_without_what_iptables_needs_the_rest_is_cleaned_up_and_a_warning_says_what_is_not(host: Host) -> None:
    crash(host, "one", 11, "iptables")
    crash(host, "two", 12, "nftables")
    with_chains = state(host).iptables
    done = clean_up_in_child(host, *without_file(library("libip4tc.so.2")))
    assert done.returncode == 0, done.stderr
    assert "guard of instance 'two'" in done.stdout
    assert "rules of instance" not in done.stdout
    (warning,) = done.stderr.splitlines()
    assert "not_looked_into" in warning
    assert "libip4tc.so.2" in warning
    assert state(host).iptables == with_chains
    assert removed_from(host) == ["rules of instance 'one' (iptables chains eng_one and eng_one_guard)"]


def test_an_agent_starts_although_one_of_the_filters_cannot_be_looked_into(
    host: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> list[Identity]:
        raise SystemFailure("another program has held the lock")

    def miss() -> list[Identity]:
        raise Unavailable("cannot load libnftables.so.1")

    crash(host, "one", 11, "iptables")
    crash(host, "two", 12, "nftables")
    with monkeypatch.context() as patched:
        patched.setattr(cleanup, "leftovers", fail)
        assert leftovers_on(host) == ["two"]
    with monkeypatch.context() as patched:
        patched.setattr(cleanup, "leftover_guards", miss)
        patched.setattr(cleanup, "living_agents", miss)
        assert leftovers_on(host) == ["one"]
    assert [record.levelno for record in caplog.records if record.levelno > logging.DEBUG] == []


def test_a_packet_filter_that_fails_is_no_success(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> list[Identity]:
        raise SystemFailure("another program has held the lock")

    monkeypatch.setattr(cleanup, "leftovers", fail)
    with pytest.raises(SystemFailure, match="held the lock"):
        removed_from(host)


def test_nothing_is_removed_when_there_is_no_telling_who_is_alive(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    crash(host, "one", 11, "nftables")
    before = state(host)
    monkeypatch.setenv("RUNTIME_DIRECTORY", "/dev/null/eng")
    with pytest.raises(CannotCreate, match="cannot make the runtime directory /dev/null/eng"):
        removed_from(host)
    with pytest.raises(CannotCreate, match="cannot make the runtime directory /dev/null/eng"):
        leftovers_on(host)
    assert state(host) == before
