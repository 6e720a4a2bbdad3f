"""What doctor finds on hosts of a real kernel; each look at one proves that it changed nothing there."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Interface, IPv6Address
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from enlink.endpoint import Tcp
from enlink.errors import EngError
from enlink.testing.hosts import Host, Network
from enlink.testing.programs import as_nobody
from enta import doctor
from enta.capture.libnftables import Nft, NftFailure
from enta.capture.nftables import NftablesFirewall
from enta.capture.plan import Plan, parse_captures, parse_replays
from enta.capture.routing import Routing
from enta.doctor import Finding, Level, examine, worst
from enta.tun import open_tun
from hypothesis import given
from hypothesis import strategies as st

FAR_BEYOND_S = 8 * doctor.GATEWAY_LIMIT_S

CLIENT = Plan("client", IPv4Interface("192.168.0.1/24"), IPv4Address("192.168.0.254"), parse_captures(["7", "udp/53"]))
SERVER = Plan(
    "server", IPv4Interface("192.168.0.254/24"), IPv4Address("192.168.0.1"), replays=parse_replays(["7", "udp/53"])
)
OTHER = replace(CLIENT, captures=(), instance="other", tun_name="eng1", table=6979, mark=0x6979)

# Arguments: the gateway's host, or nothing.
EXAMINE = """
import dataclasses, json, sys
from enlink.endpoint import Tcp
from enta.capture.plan import Plan, parse_captures
from enta.doctor import examine
from ipaddress import IPv4Address, IPv4Interface

plan = Plan("client", IPv4Interface("192.168.0.1/24"), IPv4Address("192.168.0.254"), parse_captures(["7"]))
gateways = [Tcp(name, 6980) for name in sys.argv[1:]]
json.dump([dataclasses.asdict(finding) for finding in examine(plan, gateways)], sys.stdout)
"""

WITH_NOTHING_BUT_THE_PRIVILEGE = as_nobody("net_admin")


@pytest.fixture(autouse=True)
def runtime_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "run"
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(path))
    return path


@pytest.fixture
def network() -> Iterator[Network]:
    with Network() as network:
        yield network


@pytest.fixture
def host(network: Network) -> Host:
    host = network.host("host")
    # Else the kernel gives each new device an address of its own making, some time after it is up.
    host.run("sysctl", "-qw", "net.ipv6.conf.default.disable_ipv6=1")
    return host


def state(host: Host) -> list[str]:
    commands = (
        *(
            "nft list ruleset",
            "ip rule",
            "ip -6 rule",
            "ip route show table all",
            "ip -brief address",
            "ip -brief link",
        ),
        *("sysctl -a -r net.ipv4.(conf|ip_forward)", "cat /proc/net/ip_tables_names /proc/net/ip6_tables_names"),
    )
    return [host.run(*command.split()) for command in commands]


@contextmanager
def unchanged(host: Host) -> Iterator[None]:
    before = state(host)
    yield
    assert state(host) == before


def examined(host: Host, plan: Plan | None = CLIENT, *gateways: Tcp) -> list[Finding]:
    with unchanged(host), host.entered():
        return examine(plan, gateways)


def examined_in_child(host: Host, *wrapper: str, gateway: str | None = None) -> list[Finding]:
    argv = [*wrapper, sys.executable, "-c", EXAMINE, *([gateway] if gateway else [])]
    with unchanged(host):
        return [Finding(**fields) for fields in json.loads(host.run(*argv))]


def told(findings: list[Finding], topic: str) -> list[tuple[Level, str]]:
    return [(finding.level, finding.text) for finding in findings if finding.topic == topic]


def failures(findings: list[Finding]) -> list[tuple[str, int]]:
    return [(finding.text, finding.exit_code) for finding in findings if finding.level == "fail"]


def library(name: str) -> str:
    """Where the dynamic linker finds *name*."""
    lines = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=True).stdout.splitlines()
    return os.path.realpath(next(line.split()[-1] for line in lines if line.split()[0] == name))


@contextmanager
def alive(host: Host, plan: Plan) -> Iterator[None]:
    with host.entered():
        firewall = NftablesFirewall(plan)
    with closing(firewall):
        firewall.add_guard()
        yield


def start_and_stop(plan: Plan) -> None:
    """What a start asks of this host until its TUN is there, in its order."""
    Routing(plan).refuse_conflicts()
    with closing(NftablesFirewall(plan)) as firewall:
        firewall.add_guard()
        try:
            open_tun(plan.tun_name).close()
        finally:
            firewall.delete_guard()


# ---- the whole


@pytest.mark.proves("D30")
@pytest.mark.parametrize("plan", [CLIENT, SERVER], ids=["client", "server"])
def test_where_an_agent_can_work_nothing_fails_and_nothing_changes(host: Host, plan: Plan) -> None:
    findings = examined(host, plan, Tcp("127.0.0.1", 6980))
    assert worst(findings) is None
    assert {finding.exit_code for finding in findings} == {0}
    assert [finding.topic for finding in findings if finding.level == "ok"] == [
        *("privilege", "tun", "runtime", "nftables", "iptables", "leftovers", "kernel", "conflicts"),
    ]
    with host.entered():
        start_and_stop(plan)  # the control: a start agrees


def test_without_a_plan_the_host_alone_is_examined(host: Host) -> None:
    findings = examined(host, plan=None)
    assert worst(findings) is None
    assert [finding.topic for finding in findings] == [
        *("privilege", "tun", "runtime", "nftables", "iptables", "leftovers", "kernel"),
    ]


def test_the_worst_is_what_must_be_permitted_then_what_is_in_the_way_then_what_is_missing() -> None:
    found = [
        Finding("warn", "ports", "", 0),
        Finding("fail", "nftables", "missing", 69),
        Finding("fail", "conflicts", "in the way", 73),
        Finding("fail", "tun", "forbidden", 77),
    ]
    assert worst(found) == found[3]
    assert worst(found[:3]) == found[2]
    assert worst(found[:2]) == found[1]
    assert worst(found[:1]) is None


def plant_table(name: str) -> Callable[[Host], None]:
    def plant(host: Host) -> None:
        host.run("nft", "add", "table", "inet", name)

    return plant


def plant_by_ip(*commands: str) -> Callable[[Host], None]:
    def plant(host: Host) -> None:
        host.run("ip", "link", "add", "wire", "type", "veth", "peer", "name", "far")
        host.run("ip", "link", "set", "wire", "up")
        for command in commands:
            host.run("ip", *command.split())

    return plant


@pytest.mark.proves("F61", "F66")
@pytest.mark.parametrize(
    ("plant", "said"),
    [
        (plant_table("eng_default"), "'inet eng_default' is not ours"),
        (plant_table("eng_default_guard"), "'inet eng_default_guard' is not ours"),
        (plant_by_ip("address add 192.168.0.77/32 dev wire"), "192.168.0.77/32 dev wire"),
        (plant_by_ip("route add 192.168.0.128/25 dev wire"), "192.168.0.128/25 dev wire"),
        (plant_by_ip("route add default dev wire table 6978"), "default dev wire table 6978"),
        (
            plant_by_ip("rule add priority 6978 from 0.0.0.0/32 iif lo ipproto tcp dport 7 lookup 7000 protocol 78"),
            "another agent captures this",
        ),
        (plant_by_ip("link set wire down", "link set wire name eng0"), "TUN eng0 (EBUSY): the name is taken"),
    ],
    ids=["table", "guard", "address", "route", "default-route", "rule", "tun-name"],
)
def test_what_is_in_the_way_is_told_in_the_words_of_a_start(
    host: Host, plant: Callable[[Host], None], said: str
) -> None:
    plant(host)
    with host.entered(), pytest.raises(EngError) as refused:
        start_and_stop(CLIENT)
    findings = examined(host)
    assert failures(findings) == [(str(refused.value), 73)]
    assert refused.value.exit_code == 73
    assert said in str(refused.value)


@pytest.mark.proves("F15")
@pytest.mark.parametrize(
    ("other", "said"),
    [
        (replace(OTHER, instance="default"), "instance 'default' is running here already"),
        (replace(OTHER, tun_name=CLIENT.tun_name), "--tun-name eng0 is in use by instance 'other'"),
        (replace(OTHER, table=CLIENT.table), "--table 6978 is in use by instance 'other'"),
        (replace(OTHER, mark=CLIENT.mark), "--mark 0x6978 is in use by instance 'other'"),
    ],
    ids=["instance", "tun-name", "table", "mark"],
)
def test_what_a_living_agent_uses_is_told_in_the_words_of_a_start(host: Host, other: Plan, said: str) -> None:
    with alive(host, other):
        with host.entered(), pytest.raises(EngError) as refused:
            start_and_stop(CLIENT)
        findings = examined(host)
    assert failures(findings) == [(str(refused.value), 73)]
    assert refused.value.exit_code == 73
    assert said in str(refused.value)


def test_an_agent_beside_a_living_one_can_work_with_names_and_numbers_of_its_own(host: Host) -> None:
    with alive(host, OTHER):
        assert failures(examined(host)) == []


def test_what_is_in_the_way_of_several_checks_is_told_once(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNTIME_DIRECTORY", "/dev/null/eng")
    ((text, exit_code),) = failures(examined(host))
    assert "cannot make the runtime directory /dev/null/eng" in text
    assert exit_code == 73


# ---- privileges and the TUN driver


@pytest.mark.proves("F59")
def test_a_missing_privilege_is_the_worst(host: Host) -> None:
    findings = examined_in_child(host, "setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin")
    assert told(findings, "privilege") == [
        ("fail", "no CAP_NET_ADMIN: run as root, or grant it to this process (AmbientCapabilities in systemd)")
    ]
    found = worst(findings)
    assert found is not None
    assert found.exit_code == 77


def test_who_may_do_nothing_hears_of_the_privilege_first(host: Host) -> None:
    with unchanged(host), host.entered():
        examine(CLIENT, [Tcp("127.0.0.1", 6980)])  # imports what it needs while this process may read where Python is
        os.setegid(65534)
        os.seteuid(65534)  # takes the effective capabilities along
        try:
            findings = examine(CLIENT, [Tcp("127.0.0.1", 6980)])
        finally:
            os.seteuid(0)
            os.setegid(0)
    found = worst(findings)
    assert found is not None
    assert (found.topic, found.exit_code) == ("privilege", 77)
    assert [level for level, _ in told(findings, "iptables")] == ["warn"]
    assert [level for level, _ in told(findings, "kernel")] == ["ok"]


@pytest.mark.proves("F60")
@pytest.mark.parametrize(
    ("mode", "device", "exit_code", "said"),
    [
        ("", "", 73, "cannot open /dev/net/tun (ENOENT): load the driver"),
        ("666", "10 254", 73, "cannot open /dev/net/tun (ENODEV): this kernel has no TUN driver"),
        ("600", "10 200", 77, "cannot open /dev/net/tun (EACCES): the device's mode keeps out user 65534"),
        ("666", "1 3", 71, "cannot use /dev/net/tun (ENOTTY): is it really the TUN driver's?"),
        ("666", "10 200", 0, ""),
    ],
    ids=["no-node", "no-driver", "node-forbidden", "null-device", "allowed"],
)
def test_a_user_with_the_privilege_hears_of_a_device_that_is_not_to_be_had_while_nftables_is(
    host: Host, monkeypatch: pytest.MonkeyPatch, mode: str, device: str, exit_code: int, said: str
) -> None:
    node = f"mknod -m {mode} /dev/net/tun c {device};" if mode else ""
    in_own_mounts = ["unshare", "--mount", "sh", "-ec", f'mount -t tmpfs none /dev/net; {node} exec "$@"', "sh"]
    with TemporaryDirectory() as runtime:  # where that user may go
        os.chown(runtime, 65534, 65534)
        monkeypatch.setenv("RUNTIME_DIRECTORY", runtime)
        findings = examined_in_child(host, *in_own_mounts, *WITH_NOTHING_BUT_THE_PRIVILEGE)
    if exit_code:
        ((text, code),) = failures(findings)
        assert text.startswith(said)
        assert code == exit_code
    else:
        assert failures(findings) == []
    assert [level for level, _ in told(findings, "nftables")] == ["ok"]
    ((level, text),) = told(findings, "iptables")  # whose tables are for root to see
    assert (level, "run as root" in text) == ("warn", True)


# ---- packet filters


@pytest.mark.proves("F65")
def test_without_libnftables_the_package_is_named(host: Host) -> None:
    path = library("libnftables.so.1")
    findings = examined_in_child(
        host, "unshare", "--mount", "sh", "-ec", 'mount --bind /dev/null "$0"; exec "$@"', path
    )
    assert failures(findings) == [("cannot load libnftables.so.1: run apt install libnftables1", 69)]


@pytest.mark.proves("F65")
def test_a_kernel_without_owners_is_told_from_one_that_refuses_a_rule(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OldKernel(Nft):
        """Takes everything but what it does not know."""

        unknown = "flags owner"

        def run(self, text: str, *, is_dry_run: bool = False) -> str:
            if self.unknown in text:
                raise NftFailure(text.split("\n", 1)[0], "Could not process rule: Operation not supported")
            return super().run(text, is_dry_run=is_dry_run)

    monkeypatch.setattr(doctor, "Nft", OldKernel)
    ((text, exit_code),) = failures(examined(host))
    assert text.startswith("no nftables table can have an owner here (Could not process rule: Operation not supported)")
    assert "Linux 5.12" in text
    assert "--firewall iptables" in text
    assert exit_code == 69

    monkeypatch.setattr(OldKernel, "unknown", "fib daddr")
    assert failures(examined(host)) == [
        ("nftables refused 'table inet eng_default {': Could not process rule: Operation not supported", 71)
    ]


def test_legacy_iptables_in_use_is_a_warning(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.run("iptables-legacy", "-t", "mangle", "-A", "OUTPUT", "-j", "ACCEPT")
    in_use = (
        "warn",
        "legacy iptables is in use here (ip mangle): its rules apply as well, see iptables-legacy-save",
    )
    assert told(examined(host), "iptables") == [in_use]
    monkeypatch.setitem(sys.modules, "iptc", None)
    assert told(examined(host), "iptables") == [
        in_use,
        ("warn", "no python-iptables to find leftovers in it with: pip install 'eng-enta[iptables]'"),
    ]


def test_who_has_python_iptables_may_use_it_and_who_has_not_need_not(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert told(examined(host), "iptables") == [("ok", "python-iptables is there, for --firewall iptables")]
    monkeypatch.setitem(sys.modules, "iptc", None)
    assert told(examined(host), "iptables") == [
        ("ok", "no python-iptables, which only --firewall iptables needs"),
    ]


@pytest.mark.proves("F13")
def test_dead_instances_that_block_ports_are_named(host: Host) -> None:
    for plan in (CLIENT, OTHER):
        with alive(host, plan):
            pass
    findings = examined(host)
    assert told(findings, "leftovers") == [
        ("warn", f"instance {instance!r} died and still blocks its ports: start it again, or run enta cleanup")
        for instance in ("default", "other")
    ]
    assert worst(findings) is None


# ---- the kernel's settings


def test_a_loose_reverse_path_filter_is_a_warning(host: Host) -> None:
    host.run("sysctl", "-qw", "net.ipv4.conf.all.rp_filter=2")
    ((level, text),) = told(examined(host), "kernel")
    assert (level, "rp_filter is 2" in text) == ("warn", True)
    for setting in ("0", "1"):
        host.run("sysctl", "-qw", f"net.ipv4.conf.all.rp_filter={setting}")
        assert told(examined(host), "kernel") == [
            ("ok", "the kernel will check the sources of what comes out of the TUN")
        ]


def test_a_host_that_forwards_hears_that_the_tunnel_is_exempt(host: Host) -> None:
    host.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
    assert told(examined(host), "kernel")[1:] == [
        ("ok", "this host forwards packets (net.ipv4.ip_forward): never into the tunnel, nor those out of it")
    ]


def test_settings_that_nobody_can_change_are_a_warning(host: Host) -> None:
    read_only = 'mount --bind /proc/sys /proc/sys; mount -o remount,bind,ro /proc/sys; exec "$@"'
    findings = examined_in_child(host, "unshare", "--mount", "sh", "-ec", read_only, "sh")
    ((level, text),) = told(findings, "kernel")
    assert (level, text.startswith("/proc/sys cannot be written")) == ("warn", True)


# ---- ports


@contextmanager
def server(host: Host, protocol: str, address: str, port: int) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with host.entered():
        listening = socket.socket(family, socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM)
    with listening:
        listening.bind((address, port))
        if protocol == "tcp":
            listening.listen()
        yield listening


@pytest.mark.parametrize(
    ("address", "level", "said"),
    [
        ("0.0.0.0", "ok", "a server listens on 0.0.0.0"),
        ("::", "ok", "a server listens on ::"),
        ("192.168.0.254", "ok", "a server listens on 192.168.0.254"),
        ("127.0.0.1", "warn", "its server listens on 127.0.0.1 only: have it listen on 0.0.0.0 or 192.168.0.254"),
        ("10.0.0.2", "warn", "its server listens on 10.0.0.2 only: have it listen on 0.0.0.0 or 192.168.0.254"),
    ],
)
@pytest.mark.parametrize(("protocol", "port"), [("tcp", 7), ("udp", 53)])
def test_a_replayed_port_needs_a_server_that_the_tunnel_reaches(
    host: Host, protocol: str, port: int, address: str, level: str, said: str
) -> None:
    for own in ("10.0.0.2/32", "192.168.0.254/32"):
        host.run("ip", "address", "add", own, "dev", "lo")
    with server(host, protocol, address, port):
        assert (level, f"{protocol}/{port}: {said}") in told(examined(host, SERVER), "ports")


def test_a_replayed_port_without_a_server_is_a_warning_whoever_talks_from_it(host: Host) -> None:
    with (
        server(host, "tcp", "0.0.0.0", 8000) as other,
        host.entered(),
        socket.create_connection(("127.0.0.1", 8000), source_address=("127.0.0.1", 7)),
        other.accept()[0],
    ):
        findings = examined(host, SERVER)
    assert told(findings, "ports") == [
        ("warn", "tcp/7: nothing listens on it: start the server"),
        ("warn", "udp/53: nothing listens on it: start the server"),
    ]
    assert worst(findings) is None


def test_servers_on_several_addresses_are_all_named_on_a_kernel_without_ipv6_too(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_text(path: Path, *arguments: str) -> str:
        if path.name in ("tcp6", "udp6"):
            raise FileNotFoundError(path)
        return kernel_text(path, *arguments)

    kernel_text = Path.read_text
    with server(host, "tcp", "127.0.0.2", 7), server(host, "tcp", "127.0.0.1", 7):
        monkeypatch.setattr(Path, "read_text", read_text)
        (_, text), _ = told(examined(host, SERVER), "ports")
    assert "listens on 127.0.0.1, 127.0.0.2 only" in text


def test_a_captured_port_that_a_local_server_has_is_said_to_stay_its_own(host: Host) -> None:
    with server(host, "udp", "127.0.0.1", 53):
        assert told(examined(host), "ports") == [
            ("ok", "udp/53: a server here listens on it: traffic to this host's own addresses is left alone")
        ]


def test_a_captured_port_that_the_uplink_uses_is_said_to_be_excluded(host: Host) -> None:
    plan = replace(CLIENT, captures=parse_captures(["6980", "udp/6980", "7"]))
    assert told(examined(host, plan, Tcp("127.0.0.1", 6980)), "ports") == [
        ("ok", "tcp/6980: the uplink uses this port too, and is excluded by its mark 0x6978")
    ]
    assert told(examined(host, plan), "ports") == []


@given(st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)))
def test_any_address_is_read_as_the_kernel_writes_it(address: IPv4Address | IPv6Address) -> None:
    words = [address.packed[start : start + 4] for start in range(0, len(address.packed), 4)]
    written = "".join(f"{int.from_bytes(word, sys.byteorder):08X}" for word in words)
    assert doctor._address(written) == address


# ---- the gateway


def test_a_gateway_that_listens_answers(host: Host) -> None:
    with server(host, "tcp", "127.0.0.1", 6980):
        assert told(examined(host, CLIENT, Tcp("127.0.0.1", 6980)), "gateway") == [
            ("ok", "tcp://127.0.0.1:6980 answers")
        ]


def test_a_gateway_that_does_not_listen_yet_is_a_warning(host: Host) -> None:
    findings = examined(host, CLIENT, Tcp("127.0.0.1", 6980))
    ((level, text),) = told(findings, "gateway")
    assert (level, "Connection refused" in text, "start entg" in text) == ("warn", True, True)
    assert worst(findings) is None


@pytest.mark.proves("F26")
def test_a_gateway_that_is_silent_holds_doctor_up_for_two_seconds(network: Network, host: Host) -> None:
    far = network.host("far")
    network.connect(host, "10.0.0.2/24", far, "10.0.0.9/24")
    far.run("nft", "-f", "-", input="table ip t { chain c { type filter hook input priority 0; policy drop; }\n}")
    began_s = time.monotonic()
    findings = examined(host, CLIENT, Tcp("10.0.0.9", 6980))
    assert told(findings, "gateway") == [
        ("warn", "no answer from tcp://10.0.0.9:6980 within 2 s: start entg there, or see what is between")
    ]
    assert time.monotonic() - began_s < FAR_BEYOND_S


@pytest.mark.proves("F28")
def test_a_gateway_whose_name_cannot_be_resolved_is_a_warning(host: Host) -> None:
    # In a child of its own, because trio keeps threads, and with them the network that a look-up goes to.
    ((level, text),) = told(examined_in_child(host, gateway="gateway.invalid"), "gateway")
    assert (level, "gateway.invalid" in text) == ("warn", True)


def test_a_dead_agents_guard_does_not_hide_the_gateway_behind_a_captured_port(network: Network, host: Host) -> None:
    far = network.host("far")
    network.connect(host, "10.0.0.2/24", far, "10.0.0.9/24")
    plan = replace(CLIENT, captures=parse_captures(["6980"]))
    with alive(host, plan):
        pass
    with server(far, "tcp", "10.0.0.9", 6980):
        ((level, _),) = told(examined(host, plan, Tcp("10.0.0.9", 6980)), "gateway")
        assert level == "ok"
        ((level, _),) = told(examined(host, None, Tcp("10.0.0.9", 6980)), "gateway")
        assert level == "warn", "the control: without the mark the guard is in the way"
