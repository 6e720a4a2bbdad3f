"""Find out whether an agent can work on this host, and say what to do where it cannot. Changes nothing here.

Asks the modules that do the work wherever they can be asked, so that the answer is the one that a start would give.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Final, Literal

import trio
from enlink.endpoint import Tcp
from enlink.errors import CannotCreate, EngError, NotPermitted, Unavailable
from enlink.instance import runtime_directory
from enlink.stream import Dialer

from enta.capture.legacy import used_tables
from enta.capture.libnftables import Nft, NftFailure
from enta.capture.nftables import capture_ruleset, guard_ruleset, leftover_guards, living_agents
from enta.capture.plan import Plan, TransportProtocol
from enta.capture.routing import Routing
from enta.cleanup import leftover_instances, living_instances
from enta.tun import check_driver, check_name

# linux/capability.h, net/tcp_states.h (what is bound to a UDP port has the state that TCP calls closed)
_CAP_NET_ADMIN: Final = 12
_BOUND_STATES: Final[dict[TransportProtocol, str]] = {"tcp": "0A", "udp": "07"}
_LOOSE: Final = "2"  # Documentation/networking/ip-sysctl.rst: the greater of all and of the device counts

# Choices of ours.
GATEWAY_LIMIT_S: Final = 2.0

Level = Literal["ok", "warn", "fail"]
_Check = Callable[[], Iterator[tuple[Level, str]]]


@dataclass(frozen=True, slots=True)
class Finding:
    """One fact about this host.

    Attributes:
        topic: what it is about, in one word.
        text: the fact, and what to do about it if anything.
        exit_code: the one that a start would end with if it fails, else 0.
    """

    level: Level
    topic: str
    text: str
    exit_code: int = 0


def examine(plan: Plan | None, gateways: Sequence[Tcp] = ()) -> list[Finding]:
    """Check this host, for an agent with *plan* whose links go to *gateways*, as far as they are given.

    Blocks for up to a few seconds. What is wrong is a finding, never an exception.
    """
    checks: list[tuple[str, _Check]] = [
        ("privilege", _check_privilege),
        ("tun", _check_tun),
        ("runtime", _check_runtime_directory),
        ("nftables", partial(_check_nftables, plan)),
        ("iptables", _check_iptables),
        ("leftovers", _check_leftovers),
        ("kernel", _check_kernel),
    ]
    if plan is not None:
        checks += [("conflicts", partial(_check_conflicts, plan)), ("ports", partial(_check_ports, plan, gateways))]
    checks += [("gateway", partial(_check_gateway, gateway, plan)) for gateway in gateways]
    findings: dict[str, Finding] = {}
    for topic, check in checks:
        for finding in _examined(topic, check):
            findings.setdefault(finding.text, finding)  # what is in the way of several checks is told once
    return list(findings.values())


def worst(findings: Sequence[Finding]) -> Finding | None:
    """Return the finding to end with, or None if nothing fails.

    By exit code: what must be permitted comes before what is in the way, and that before what is missing.
    """
    failed = [finding for finding in findings if finding.level == "fail"]
    return max(failed, key=lambda finding: finding.exit_code, default=None)


def _examined(topic: str, check: _Check) -> Iterator[Finding]:
    try:
        for level, text in check():
            yield Finding(level, topic, text)
    except EngError as error:
        yield Finding("fail", topic, str(error), error.exit_code)


def _check_privilege() -> Iterator[tuple[Level, str]]:
    if not _has_privilege():
        raise NotPermitted(
            "no CAP_NET_ADMIN: run as root, or grant it to this process (AmbientCapabilities in systemd)"
        )
    yield "ok", "this process has CAP_NET_ADMIN"


def _has_privilege() -> bool:
    lines = Path("/proc/thread-self/status").read_text().splitlines()
    (effective,) = (int(line.split()[1], 16) for line in lines if line.startswith("CapEff:"))
    return bool(effective >> _CAP_NET_ADMIN & 1)


def _check_tun() -> Iterator[tuple[Level, str]]:
    check_driver()
    yield "ok", "/dev/net/tun can be used"


def _check_runtime_directory() -> Iterator[tuple[Level, str]]:
    yield "ok", f"locks and status sockets go to {runtime_directory()}"


def _check_nftables(plan: Plan | None) -> Iterator[tuple[Level, str]]:
    with closing(Nft()) as nft:
        try:
            # A name that no instance can have.
            nft.run("table inet eng.doctor { flags owner; }", is_dry_run=True)
        except NftFailure as failure:
            raise Unavailable(
                f"no nftables table can have an owner here ({failure.reason}): it takes Linux 5.12 and nftables 1.0;"
                " or use --firewall iptables, all of whose rules outlive a crash"
            ) from failure
        if plan is not None:
            _refuse_strangers(nft, plan)
            try:
                nft.run(guard_ruleset(plan) + capture_ruleset(plan), is_dry_run=True)
            except NftFailure as failure:
                if not failure.is_refused:  # else the instance is alive, which is another finding
                    raise
    yield "ok", "the kernel would take the rules, in tables that go with their process"


def _refuse_strangers(nft: Nft, plan: Plan) -> None:
    names = nft.tables("inet")
    living = {agent.instance for agent in living_agents()}
    guarded = living | {agent.instance for agent in leftover_guards()}
    for name, owners in ((plan.identity.capture_table_name, living), (plan.identity.guard_table_name, guarded)):
        if name in names and plan.instance not in owners:
            raise CannotCreate(f"nftables table 'inet {name}' is not ours: delete it, or choose another --instance")


def _check_iptables() -> Iterator[tuple[Level, str]]:
    try:
        tables = ", ".join(used_tables())
    except NotPermitted as error:
        yield "warn", str(error)
        return
    has_library = find_spec("iptc") is not None
    if tables:
        yield "warn", f"legacy iptables is in use here ({tables}): its rules apply as well, see iptables-legacy-save"
        if not has_library:
            yield "warn", "no python-iptables to find leftovers in it with: pip install 'eng-enta[iptables]'"
    elif has_library:
        yield "ok", "python-iptables is there, for --firewall iptables"
    else:
        yield "ok", "no python-iptables, which only --firewall iptables needs"


def _check_leftovers() -> Iterator[tuple[Level, str]]:
    leftovers = leftover_instances()
    for instance in leftovers:
        yield "warn", f"instance {instance!r} died and still blocks its ports: start it again, or run enta cleanup"
    if not leftovers:
        yield "ok", "no dead instance blocks ports here"


def _check_kernel() -> Iterator[tuple[Level, str]]:
    settings = Path("/proc/sys/net/ipv4")
    if os.statvfs(settings).f_flag & os.ST_RDONLY:
        yield (
            "warn",
            "/proc/sys cannot be written: the TUN keeps its defaults, and only our firewall rules filter sources",
        )
    elif (settings / "conf/all/rp_filter").read_text().strip() == _LOOSE:
        yield (
            "warn",
            "net.ipv4.conf.all.rp_filter is 2, loose, and so for the TUN: set it to 1, to filter sources twice",
        )
    else:
        yield "ok", "the kernel will check the sources of what comes out of the TUN"
    if (settings / "ip_forward").read_text().strip() != "0":
        yield "ok", "this host forwards packets (net.ipv4.ip_forward): never into the tunnel, nor those out of it"


def _check_conflicts(plan: Plan) -> Iterator[tuple[Level, str]]:
    _refuse_living(plan)
    check_name(plan.tun_name)
    Routing(plan).refuse_conflicts()
    yield "ok", f"{plan.tun_name}, {plan.address}, table {plan.table} and mark {plan.mark:#x} are free"


def _refuse_living(plan: Plan) -> None:
    for other in living_instances():
        if other.instance == plan.instance:
            raise CannotCreate(
                f"instance {plan.instance!r} is running here already: stop it, or choose another --instance"
            )
        for option, is_taken, value in (
            ("--tun-name", other.tun_name == plan.tun_name, plan.tun_name),
            ("--table", other.table == plan.table, plan.table),
            ("--mark", other.mark == plan.mark, f"{plan.mark:#x}"),
        ):
            if is_taken:
                raise CannotCreate(f"{option} {value} is in use by instance {other.instance!r}: choose another")


def _check_ports(plan: Plan, gateways: Sequence[Tcp]) -> Iterator[tuple[Level, str]]:
    for replay in plan.replays:
        addresses = _listening(replay.protocol, replay.port)
        where = ", ".join(sorted(map(str, addresses)))
        if not addresses:
            yield "warn", f"{replay}: nothing listens on it: start the server"
        elif any(address.is_unspecified or address == plan.address.ip for address in addresses):
            yield "ok", f"{replay}: a server listens on {where}"
        else:
            yield (
                "warn",
                f"{replay}: its server listens on {where} only: have it listen on 0.0.0.0 or {plan.address.ip}",
            )
    for capture in plan.captures:
        if capture.protocol == "tcp" and capture.port in [gateway.port for gateway in gateways]:
            yield "ok", f"{capture}: the uplink uses this port too, and is excluded by its mark {plan.mark:#x}"
        if _listening(capture.protocol, capture.port):
            yield "ok", f"{capture}: a server here listens on it: traffic to this host's own addresses is left alone"


def _listening(protocol: TransportProtocol, port: int) -> set[IPv4Address | IPv6Address]:
    """Return the addresses of this network namespace on which something listens on *port*."""
    addresses = set()
    for table in (protocol, f"{protocol}6"):
        try:
            lines = Path("/proc/thread-self/net", table).read_text().splitlines()[1:]
        except FileNotFoundError:  # a kernel without IPv6
            continue
        for columns in map(str.split, lines):
            address, _, digits = columns[1].partition(":")
            if columns[3] == _BOUND_STATES[protocol] and int(digits, 16) == port:
                addresses.add(_address(address))
    return addresses


def _address(words: str) -> IPv4Address | IPv6Address:
    """Read an address as /proc writes it: words of 32 bits, each in this machine's byte order."""
    numbers = (int(words[start : start + 8], 16) for start in range(0, len(words), 8))
    return ip_address(b"".join(number.to_bytes(4, sys.byteorder) for number in numbers))


def _check_gateway(gateway: Tcp, plan: Plan | None) -> Iterator[tuple[Level, str]]:
    # As the agent's uplink: what holds captured ports closed lets the mark pass.
    mark = plan.mark if plan is not None and _has_privilege() else None
    try:
        trio.run(_dial, Dialer(gateway, mark=mark))
    except trio.TooSlowError:
        yield (
            "warn",
            f"no answer from {gateway} within {GATEWAY_LIMIT_S:.0f} s: start entg there, or see what is between",
        )
    except EngError as error:
        yield "warn", f"{error}: start entg at {gateway}; an agent tries until it answers"
    else:
        yield "ok", f"{gateway} answers"


async def _dial(dialer: Dialer) -> None:
    with trio.fail_after(GATEWAY_LIMIT_S):
        await (await dialer.dial()).aclose()
