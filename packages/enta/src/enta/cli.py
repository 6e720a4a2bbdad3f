"""The command line of ``enta``. What an agent does is in agent.py; what it does to a host, in capture."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from contextlib import closing
from dataclasses import asdict
from functools import partial
from ipaddress import AddressValueError, IPv4Address, IPv4Interface, NetmaskValueError
from pathlib import Path

import trio
from enlink.attestation import add_attestation_options, read_attestation
from enlink.attested import prepare
from enlink.endpoint import Tcp, parse_dial
from enlink.errors import EngError, Unavailable, UsageError
from enlink.instance import InstanceLock, live_instances
from enlink.program import ProgramParser, log_event, run_program
from enlink.status import fetch_status, render_status, serve_status
from enlink.supervise import stop_signals
from enlink.worker import own_assignment

from enta import __version__
from enta.agent import Agent
from enta.capture.firewall import Firewall
from enta.capture.ip_rules import ip_commands
from enta.capture.plan import MAX_MTU, Plan, Role, parse_captures, parse_replays
from enta.cleanup import clean_up, leftover_instances
from enta.config import DEFAULT_GATEWAY, AgentConfig
from enta.doctor import examine, worst
from enta.lane import Lane
from enta.lanes import LANE_VARIABLE, Lanes, work
from enta.tun import MAX_QUEUES

_DESCRIPTION = """\
ENTA captures what ordinary programs send to certain ports and carries it through gateways to an ordinary server,
neither of which need know.

  enta client   on the host of the programs: captures their ports
  enta server   on the host of the server: replays what arrives to its ports
"""
_EXAMPLES = """\
examples:
  enta client --capture 7 --entg-connect gateway.example:6980
  enta server --replay 7 --entg-connect 127.0.0.1:6980
  enta client --capture 443 --capture udp/53 --capture 10.1.0.0/16:8080 --dry-run
  enta client --capture 7 --entg-connect one.example:6980 --entg-connect two.example:6980
"""
_CLIENT = """\
Captures what local programs send to the given ports of any address, and carries it to the gateway. Connections to this
host's own addresses are left alone. While the gateway cannot be reached, and after a crash, captured ports are blocked.
"""
_SERVER = """\
Hands what arrives from the gateway to local servers, and carries their answers back. The n-th port here is for the n-th
port that the client captures, whatever its number there.
"""
_logger = logging.getLogger(__name__)


def main() -> int:
    """Run ``enta`` and return its exit code."""
    return run_program(_parser(), _main)


def _parser() -> ProgramParser:
    parser = ProgramParser("enta", description=_DESCRIPTION, epilog=_EXAMPLES)
    parser.add_argument("--version", action="version", version=f"enta {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for role, text in (("client", _CLIENT), ("server", _SERVER)):
        command = commands.add_parser(role, help=f"run the {role}'s agent", description=text)
        _add_agent_options(command, "client" if role == "client" else "server")
        command.add_common_options(__version__)
        command.set_defaults(run=_agent, role=role)
    doctor = commands.add_parser(
        "doctor",
        help="check this host, and change nothing",
        description="Check whether an agent with these options can work on this host. Changes nothing.",
    )
    _add_plan_options(doctor, "both")
    doctor.add_argument("--json", action="store_true", help="as JSON")
    doctor.set_defaults(run=_doctor)
    cleanup = commands.add_parser(
        "cleanup",
        help="remove what dead agents left on this host",
        description="Remove the rules, routes and guards of agents that were killed here. Never touches a live one's.",
    )
    cleanup.set_defaults(run=_cleanup)
    status = commands.add_parser(
        "status", help="show what a running agent does", description="Show what a running agent does."
    )
    status.add_argument("--json", action="store_true", help="as JSON, every counter")
    status.add_argument("--instance", help="which one, where several run")
    status.set_defaults(run=_status)
    for command in (doctor, cleanup, status):
        command.add_common_options(__version__)
    return parser


def _add_agent_options(parser: ProgramParser, role: Role) -> None:
    _add_plan_options(parser, role)
    link = parser.add_argument_group("link to the gateway")
    link.add_argument(
        "--wire",
        choices=("auto", "original"),
        default="auto",
        help="auto greets an ENG gateway; original says nothing but packets, as the original ENTG wants it"
        " (default: auto)",
    )
    link.add_argument(
        "--once",
        action="store_true",
        help="end when the gateway cannot be reached or has gone, instead of trying again",
    )
    parser.add_spin_option(link)
    add_attestation_options(parser, entg_rats_tls="attest the link to the gateway")


def _add_plan_options(parser: ProgramParser, role: Role | str) -> None:
    """Add the options that say what happens to this host; ``doctor`` takes those of both roles."""
    ports = parser.add_argument_group("ports")
    # Each role takes the other's option as well, only to say what is meant for it.
    ports.add_argument(
        "--capture",
        metavar="[PROTO/][CIDR:]PORT[:TRANSIT]",
        action="append",
        default=[],
        help="capture this port (tcp unless udp/ is said) of every address, or of those in CIDR; may be repeated."
        " TRANSIT is the port inside the tunnel: 6978 for the first, and so on"
        if role != "server"
        else argparse.SUPPRESS,
    )
    ports.add_argument(
        "--replay",
        metavar="[PROTO/]PORT[:TRANSIT]",
        action="append",
        default=[],
        help="hand what arrives for TRANSIT (6978 for the first, and so on) to the server on this port; may be repeated"
        if role != "client"
        else argparse.SUPPRESS,
    )
    link = parser.add_argument_group("gateway")
    link.add_argument(
        "--entg-connect",
        metavar="HOST:PORT",
        type=partial(parse_dial, kind=Tcp),
        action="append",
        help="where the gateway is; repeated, connections are spread over several, with a process for each, and those"
        f" that cannot be reached are left out (default: {DEFAULT_GATEWAY})",
    )
    own, peer = ("192.168.0.254", "192.168.0.1") if role == "server" else ("192.168.0.1", "192.168.0.254")
    host = parser.add_argument_group("on this host")
    host.add_argument("--tun-addr", metavar="ADDRESS", default=own, help=f"the TUN's address (default: {own})")
    host.add_argument(
        "--tun-mask", metavar="MASK", default="255.255.255.0", help="its network mask (default: 255.255.255.0)"
    )
    host.add_argument(
        "--peer-addr", metavar="ADDRESS", default=peer, help=f"the TUN address of the other agent (default: {peer})"
    )
    host.add_argument("--tun-name", metavar="NAME", default="eng0", help="the TUN's name (default: eng0)")
    host.add_argument(
        "--mtu", metavar="BYTES", type=_number, default=MAX_MTU, help=f"the TUN's MTU (default: {MAX_MTU}, the fastest)"
    )
    host.add_argument("--table", metavar="NUMBER", type=_number, default=6978, help="routing table (default: 6978)")
    host.add_argument(
        "--mark",
        metavar="NUMBER",
        type=_number,
        default=0x6978,
        help="mark of packets that are not captured (default: 0x6978)",
    )
    host.add_argument(
        "--instance", metavar="NAME", default="default", help="its name, where several agents run (default: default)"
    )
    host.add_argument(
        "--firewall",
        choices=("auto", "nftables", "iptables"),
        default="auto",
        help="auto is nftables, or iptables where that cannot be had. iptables cannot promise that the rules go when"
        " the agent is killed (default: auto)",
    )
    host.add_argument(
        "--on-crash",
        choices=("closed", "open"),
        default="closed",
        help="what an agent that was killed leaves: captured ports blocked, or open and in the clear (default: closed)",
    )
    if role != "both":
        host.add_argument(
            "--dry-run", action="store_true", help="print every rule and command, change nothing, and end"
        )


def _number(text: str) -> int:
    try:
        return int(text, 0)
    except ValueError as error:
        raise UsageError(f"{text!r} is no number: write it as in 6978 or 0x6978") from error


async def _main(options: argparse.Namespace) -> None:
    await options.run(options)


def _gateways(options: argparse.Namespace) -> tuple[Tcp, ...]:
    gateways = tuple(options.entg_connect or [parse_dial(DEFAULT_GATEWAY, Tcp)])
    for gateway in gateways:
        if gateways.count(gateway) > 1:
            raise UsageError(f"--entg-connect {gateway} is there twice: a gateway takes one link of an agent")
    if len(gateways) > MAX_QUEUES:
        raise UsageError(f"--entg-connect is there {len(gateways)} times: a device has {MAX_QUEUES} queues at most")
    return gateways


def _plan(options: argparse.Namespace, role: Role) -> Plan:
    try:
        address = IPv4Interface(f"{options.tun_addr}/{options.tun_mask}")
    except NetmaskValueError as error:
        raise UsageError(f"--tun-mask {options.tun_mask!r} is no network mask: write it as in 255.255.255.0") from error
    except ValueError as error:
        raise UsageError(f"--tun-addr {options.tun_addr!r} is no IPv4 address: write it as in 192.168.0.1") from error
    try:
        peer = IPv4Address(options.peer_addr)
    except AddressValueError as error:
        raise UsageError(
            f"--peer-addr {options.peer_addr!r} is no IPv4 address: write it as in 192.168.0.254"
        ) from error
    return Plan(
        role=role,
        address=address,
        peer=peer,
        captures=parse_captures(options.capture),
        replays=parse_replays(options.replay),
        instance=options.instance,
        tun_name=options.tun_name,
        mtu=options.mtu,
        table=options.table,
        mark=options.mark,
        is_fail_closed=options.on_crash == "closed",
    )


async def _agent(options: argparse.Namespace) -> None:
    attestation = read_attestation(options, ("entg_rats_tls",), {"client"})
    plan = _plan(options, options.role)
    if not plan.captures and not plan.replays:
        option = "--capture" if options.role == "client" else "--replay"
        raise UsageError(
            f"no port to {option[2:]}: give at least one, as in {option} 7; see enta {options.role} --help"
        )
    gateways = _gateways(options)
    if options.once and len(gateways) > 1:
        raise UsageError("--once is for one gateway: with several, give --entg-connect once, or leave --once out")
    config = AgentConfig(plan, gateways, options.wire, options.firewall, options.once, attestation, options.spin)
    if (assignment := own_assignment(LANE_VARIABLE)) is not None:
        await work(config, assignment)
        return
    if options.dry_run:
        sys.stdout.write(_dry_run(config))
        return
    attested = await prepare(attestation, "client", options.wire)
    carriage = Lane(config, gateways[0], attested=attested) if len(gateways) == 1 else Lanes(config)
    facts = {"tun_name": plan.tun_name, "table": plan.table, "mark": plan.mark, "firewall": config.firewall}
    path = Path(options.status_socket) if options.status_socket else None
    async with stop_signals() as stopping:
        # The firewall comes first: who lacks the privilege hears of that, not of where a lock would have to be.
        with (
            closing(_firewall(config)) as firewall,
            InstanceLock("enta", plan.instance, status_path=path, facts=facts) as lock,
        ):
            is_held_closed = plan.instance in leftover_instances()
            agent = Agent(config, firewall, carriage, is_held_closed=is_held_closed)
            async with trio.open_nursery() as nursery:
                await nursery.start(serve_status, lock.status_path, agent.snapshot)
                await agent.run(stopping)
                nursery.cancel_scope.cancel()


def _firewall(config: AgentConfig) -> Firewall:
    # Imported here: each needs a library that only its own users must have.
    from enta.capture.iptables import IptablesFirewall
    from enta.capture.nftables import NftablesFirewall

    if config.firewall == "iptables":
        return IptablesFirewall(config.plan)
    try:
        return NftablesFirewall(config.plan)
    except Unavailable as error:
        if config.firewall == "nftables":
            raise
        reason = error
    try:
        firewall = IptablesFirewall(config.plan)
    except Unavailable as error:
        raise Unavailable(f"{reason}; nor does the second choice work: {error}") from error
    log_event(_logger, "second_choice", logging.WARNING, firewall="iptables", why=reason)
    return firewall


def _dry_run(config: AgentConfig) -> str:
    """Return every change to this host, in the order in which they are made."""
    plan = config.plan
    if config.firewall == "iptables":
        from enta.capture.iptables import iptables_commands

        rules = [("iptables commands", "\n".join(iptables_commands(plan)) + "\n")]
    else:
        from enta.capture.nftables import capture_ruleset, guard_ruleset

        rules = [("nft: the guard", guard_ruleset(plan)), ("nft: what is captured", capture_ruleset(plan))]
    queues = " multi_queue" if len(config.gateways) > 1 else ""
    device = f"ip tuntap add dev {plan.tun_name} mode tun{queues}\n"
    commands = "".join(f"{line}\n" for line in ip_commands(plan))
    return (
        "".join(f"# {title}\n{text}\n" for title, text in (*rules, ("ip commands", device + commands))).rstrip() + "\n"
    )


async def _doctor(options: argparse.Namespace) -> None:
    if options.capture and options.replay:
        raise UsageError("give --capture or --replay, not both: a client captures, a server replays")
    plan = _plan(options, "server" if options.replay else "client")
    findings = await trio.to_thread.run_sync(examine, plan, _gateways(options))
    if options.json:
        rows = [asdict(found) for found in findings]
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
    else:
        for found in findings:
            sys.stdout.write(f"{found.level:<5} {found.topic:<12} {found.text}\n")
    if (problem := worst(findings)) is not None:
        failed = sum(each.level == "fail" for each in findings)
        raise _Unhealthy(problem.exit_code, f"{failed} of {len(findings)} checks failed: {problem.text}")


class _Unhealthy(EngError):
    """What doctor found is in the way of an agent."""

    def __init__(self, exit_code: int, text: str) -> None:
        super().__init__(text)
        self.exit_code = exit_code  # type: ignore[misc]  # the worst finding's own


async def _cleanup(options: argparse.Namespace) -> None:  # noqa: ARG001  # every command takes its options
    for line in await trio.to_thread.run_sync(clean_up):
        sys.stdout.write(f"removed {line}\n")


async def _status(options: argparse.Namespace) -> None:
    path = Path(options.status_socket) if options.status_socket else _socket_of_running(options.instance)
    document = await fetch_status(path)
    sys.stdout.write(json.dumps(document, indent=2) + "\n" if options.json else render_status(document))


def _socket_of_running(instance: str | None) -> Path:
    namespace = Path("/proc/thread-self/ns/net").stat().st_ino
    running = [found for found in live_instances("enta") if found.network_namespace == namespace]
    chosen = [found for found in running if instance is None or found.instance == instance]
    if not chosen:
        who = "enta" if instance is None else f"enta of instance {instance!r}"
        raise Unavailable(f"no {who} runs here: start one, or give its --status-socket")
    if len(chosen) > 1:
        names = ", ".join(found.instance for found in chosen)
        raise UsageError(f"several enta run here: choose one with --instance, of {names}")
    return chosen[0].status_path
