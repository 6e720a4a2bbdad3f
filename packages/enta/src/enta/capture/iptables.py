"""The second packet filter, for hosts without nftables: the same effect in legacy iptables (``--firewall iptables``).

Every rule sits in a chain of ours, named after the instance, to which commented rules of built-in chains jump.

What is weaker than with nftables:

- Nothing ties a rule to a process. What a crash leaves of the capture rules does nothing without the TUN, but it stays
  until the next start or ``enta cleanup``; and only the instance lock keeps two live agents of one name apart.
- Tables are shared. A rule that somebody puts above our jump, and that accepts a packet, hides it from the guard.
- Nobody tells of changes. `IptablesFirewall.missing` compares the kernel's summary of each table, and cannot see an
  edit that leaves the number of the rules and their size as they were.
- IPv4 options and fragments out of the tunnel are for the agent's own filter to stop. The match for options is one that
  many kernels lack, and connection tracking has put fragments together before the first table sees them.
- The guard drops IPv4 without an answer, because REJECT works in the table filter only, which is too late.
- A table that the host never used before stays behind, empty, as it does after iptables itself.

Reads and writes through the process in `xtables`; imports nothing of python-iptables.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from typing import Literal

from enlink.errors import EngError, NotPermitted, SystemFailure, Unavailable

from enta.capture.legacy import has_ipv6, table_shape, used_tables
from enta.capture.plan import Capture, Identity, Plan, TransportProtocol
from enta.capture.xtables import CHAIN_PREFIX, Answer, Chains, Change, Request, State

Part = Literal["guard", "capture"]
Rules = dict[str, Chains]  # by table, as in "ip mangle"

# Choices of ours.
_TABLES = ("ip mangle", "ip6 filter", "ip nat")
_PROCESS_LIMIT_S = 20.0
_COMMENT = re.compile(
    r"eng (?:agent|guard): instance=(?P<instance>\S+) tun=(?P<tun>\S+) table=(?P<table>\d+) mark=(?P<mark>0x[0-9a-f]+)"
)

_SKIP_THIS_HOST = ["-m", "addrtype", "--dst-type", "LOCAL", "-j", "RETURN"]
_SKIP_REPLIES = ["-m", "conntrack", "--ctdir", "REPLY", "-j", "RETURN"]
# A reset ends a connection attempt at once, where an ICMP error waits for its first repetition, a second later.
_ANSWERS6 = {"tcp": "tcp-reset", "udp": "icmp6-adm-prohibited"}

_ERRORS: dict[str, type[EngError]] = {error.__name__: error for error in (NotPermitted, SystemFailure, Unavailable)}


class IptablesFirewall:
    """The guard and the capture rules of one plan in legacy iptables. See `firewall.Firewall`.

    What changes rules takes a tenth of a second, most of it the start of a process; ``missing`` takes microseconds
    unless somebody changed a table that we use. Never raises CannotCreate: the caller holds the instance's lock.
    """

    backend: Literal["nftables", "iptables"] = "iptables"

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._expected: dict[Part, Rules] = {}
        self._shapes: dict[str, str] = {}

    def add_guard(self) -> None:
        rules = guard_rules(self._plan)
        if not has_ipv6():  # then there is no table for it, and nothing to guard against
            rules.pop("ip6 filter", None)
        self._add("guard", self._plan.identity.guard_table_name, rules)

    def delete_guard(self) -> None:
        self._expected.pop("guard", None)
        _delete([self._plan.identity.guard_table_name])

    def add_capture(self) -> None:
        self._add("capture", self._plan.identity.capture_table_name, capture_rules(self._plan))

    def delete_capture(self) -> None:
        self._expected.pop("capture", None)
        _delete([self._plan.identity.capture_table_name])

    def missing(self) -> list[str]:
        tables = {name for rules in self._expected.values() for name in rules}
        if all(table_shape(name).hex() == self._shapes.get(name) for name in tables):
            return []
        own_chains = [self._plan.identity.capture_table_name, self._plan.identity.guard_table_name]
        states = _ask(Request(read=dict.fromkeys(tables, own_chains), write={}))
        missing: list[str] = [part for part, rules in self._expected.items() if not _are_there(rules, states)]
        if not missing:
            self._remember(states)
        return missing

    def close(self) -> None:
        """Do nothing: the kernel ties none of this to us."""

    def _add(self, part: Part, own_chain: str, rules: Rules) -> None:
        self._expected[part] = rules
        # A table without new rules may still hold old ones, of a run with other options.
        write = {name: Change(remove=[own_chain], add=rules.get(name, {})) for name in {*rules, *_our_used_tables()}}
        states = _ask(Request(read={name: [own_chain] for name in rules}, write=write))
        if not _are_there(rules, states):
            raise SystemFailure(
                f"iptables altered the {part} rules of instance {self._plan.instance}: use --firewall nftables"
            )
        self._remember(states)

    def _remember(self, states: dict[str, State]) -> None:
        self._shapes |= {name: state["shape"] for name, state in states.items()}


def leftovers() -> list[Identity]:
    """Return who has rules in this network namespace, dead or alive, sorted by instance.

    Raises:
        NotPermitted, Unavailable, SystemFailure: as for `IptablesFirewall`.
    """
    states = _ask(Request(read={name: [] for name in _our_used_tables()}, write={}))
    words = (word for state in states.values() for chain in state["chains"].values() for rule in chain for word in rule)
    matches = [match for word in words if (match := _COMMENT.fullmatch(word))]
    found = {Identity(m["instance"], m["tun"], int(m["table"]), int(m["mark"], 16)) for m in matches}
    return sorted(found, key=lambda identity: identity.instance)


def delete_leftovers(identity: Identity) -> None:
    """Remove every rule of an instance that is dead; quiet when there is none.

    Raises:
        NotPermitted, Unavailable, SystemFailure: as for `IptablesFirewall`.
    """
    _delete([identity.capture_table_name, identity.guard_table_name])


def iptables_commands(plan: Plan) -> list[str]:
    """Return the command lines that give a host without rules of this instance exactly what the firewall adds."""
    commands = []
    for rules in (guard_rules(plan), capture_rules(plan)):
        for name, chains in rules.items():
            family, table = name.split()
            program = ["iptables-legacy" if family == "ip" else "ip6tables-legacy", "-w", "-t", table]
            own_chains = [chain for chain in chains if chain.startswith(CHAIN_PREFIX)]
            commands += [[*program, "-N", chain] for chain in own_chains]
            for chain, chain_rules in chains.items():
                verb = "-A" if chain in own_chains else "-I"
                ordered = chain_rules if chain in own_chains else chain_rules[::-1]
                commands += [[*program, verb, chain, *rule] for rule in ordered]
    return [shlex.join(command) for command in commands]


def guard_rules(plan: Plan) -> Rules:
    """Return the rules that keep what is for the tunnel off every device but the TUN: none when the plan fails open."""
    if not plan.is_fail_closed:
        return {}
    chain = plan.identity.guard_table_name
    jump = [*_comment("guard", plan), "-j", chain]
    elsewhere = ["!", "-o", plan.tun_name]
    network = ["-d", str(plan.address.network), *elsewhere]
    # The DNAT routes a packet again, and what came of that shows after the routing only. Forwarded packets, which are
    # not ours to judge, pass there as well: they have neither a source of this host nor a DNAT of its own making.
    late = [["-m", "addrtype", "--src-type", "LOCAL"]]
    if plan.role == "client":
        late.append(["-m", "conntrack", "--ctstate", "DNAT"])
    captured = [[*_destination(c), *elsewhere, *_port(c.protocol, c.port), "-j", "DROP"] for c in plan.captures]
    rules: Rules = {
        "ip mangle": {  # before the DNAT, and not where people keep their filters
            "OUTPUT": [jump],
            "POSTROUTING": [[*network, *match, *jump] for match in late],
            chain: [_SKIP_THIS_HOST, [*network, "-j", "DROP"], _skip_uplink(plan), _SKIP_REPLIES, *captured],
        }
    }
    refusals6 = [rule for c in plan.captures if c.destination is None for rule in _refusals6(c)]
    if refusals6:
        # In the table filter, which can answer, so that programs that try IPv6 first go on to IPv4.
        rules["ip6 filter"] = {
            "OUTPUT": [jump],
            chain: [_SKIP_THIS_HOST, _skip_uplink(plan), _SKIP_REPLIES, *refusals6],
        }
    return rules


def capture_rules(plan: Plan) -> Rules:
    """Return the rules that turn captured packets into the tunnel, or those out of it to the server's port.

    Packets of others that pretend to belong to the tunnel, and packets of the tunnel that are for others, are dropped.
    """
    chain = plan.identity.capture_table_name
    jump = [*_comment("agent", plan), "-j", chain]
    tun, own_address = plan.tun_name, f"{plan.address.ip}/32"
    mangle: Chains = {
        "PREROUTING": [
            ["-d", own_address, "!", "-i", tun, "-m", "addrtype", "--dst-type", "LOCAL", *jump],
            ["-i", tun, *jump],
        ],
        "FORWARD": [["-o", tun, *jump]],
        chain: [
            ["-i", "lo", "-j", "RETURN"],
            ["!", "-i", tun, "-j", "DROP"],
            *_strange_sources(plan),
            ["!", "-d", own_address, "-j", "DROP"],
            ["-m", "conntrack", "--ctstate", "RELATED,ESTABLISHED", "-j", "RETURN"],
            # NAT leaves these alone, so the kernel would answer with a reset of the connection that they are of.
            ["-m", "conntrack", "--ctstate", "INVALID", "-j", "DROP"],
            *([*_port(replay.protocol, replay.transit), "-j", "RETURN"] for replay in plan.replays),
            ["-j", "DROP"],
        ],
    }
    if plan.role == "server":
        redirects = [
            ["-i", tun, *_port(replay.protocol, replay.transit), "-j", "REDIRECT", "--to-ports", str(replay.port)]
            for replay in plan.replays
        ]
        return {"ip mangle": mangle, "ip nat": {"PREROUTING": [jump], chain: redirects}}

    translations = [
        [
            *_destination(c),
            "-o",
            tun,
            *_port(c.protocol, c.port),
            "-j",
            "DNAT",
            "--to-destination",
            f"{plan.peer}:{c.transit}",
        ]
        for c in plan.captures
    ]
    nat: Chains = {"OUTPUT": [jump], chain: [_skip_uplink(plan), _SKIP_THIS_HOST, *translations]}
    return {"ip mangle": mangle, "ip nat": nat}


def _refusals6(capture: Capture) -> list[list[str]]:
    # Whatever the device: python-iptables compares only one bit of each letter of a device's name for IPv6.
    port = _port(capture.protocol, capture.port)
    return [
        # The answer quotes the packet. It must not leave either, which it would for an address that is no longer here.
        [*port, "-m", "addrtype", "!", "--src-type", "LOCAL", "-j", "DROP"],
        [*port, "-j", "REJECT", "--reject-with", _ANSWERS6[capture.protocol]],
    ]


def _strange_sources(plan: Plan) -> list[list[str]]:
    """Return the rules that drop what no sender of the plan can have sent."""
    first, last = plan.senders
    if first == last:
        return [["!", "-s", f"{first}/32", "-j", "DROP"]]
    no_senders = (first - 1, last + 1, plan.address.ip)  # one by one: a kernel may lack the match for a range
    return [
        ["!", "-s", str(plan.address.network), "-j", "DROP"],
        *(["-s", f"{address}/32", "-j", "DROP"] for address in no_senders),
    ]


def _skip_uplink(plan: Plan) -> list[str]:
    return ["-m", "mark", "--mark", f"{plan.mark:#x}", "-j", "RETURN"]


def _destination(capture: Capture) -> list[str]:
    return ["-d", str(capture.destination)] if capture.destination else []


def _port(protocol: TransportProtocol, port: int) -> list[str]:
    return ["-p", protocol, "-m", protocol, "--dport", str(port)]


def _comment(kind: Literal["agent", "guard"], plan: Plan) -> list[str]:
    identity = plan.identity
    numbers = f"table={identity.table} mark={identity.mark:#x}"
    return ["-m", "comment", "--comment", f"eng {kind}: instance={identity.instance} tun={identity.tun_name} {numbers}"]


def _are_there(rules: Rules, states: dict[str, State]) -> bool:
    for name, chains in rules.items():
        for chain, expected in chains.items():
            there = states[name]["chains"].get(chain, [])
            if not chain.startswith(CHAIN_PREFIX):
                there = [rule for rule in there if rule[-1] in chains]  # other instances jump from here as well
            if there != expected:
                return False
    return True


def _our_used_tables() -> list[str]:
    return [name for name in used_tables() if name in _TABLES]


def _delete(chains: list[str]) -> None:
    _ask(Request(read={}, write={name: Change(remove=chains, add={}) for name in _our_used_tables()}))


def _ask(request: Request) -> dict[str, State]:
    """Have the process serve *request*.

    Raises:
        NotPermitted: a capability, or the lock of iptables, is out of reach.
        Unavailable: python-iptables, one of its libraries, or a table or an extension of the kernel is missing.
        SystemFailure: the kernel refused for another reason, or somebody held the lock of iptables for too long.
    """
    if not request["read"] and not request["write"]:
        return {}
    argv = [sys.executable, "-I", "-m", "enta.capture.xtables"]
    try:
        done = subprocess.run(
            argv, input=json.dumps(request), capture_output=True, text=True, timeout=_PROCESS_LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise SystemFailure(f"{shlex.join(argv)} did not end within {_PROCESS_LIMIT_S:g} s") from error
    if done.returncode:
        last_line = done.stderr.strip().rpartition("\n")[2]
        raise SystemFailure(f"{shlex.join(argv)} ended with status {done.returncode}: {last_line}")
    answer: Answer = json.loads(done.stdout)
    if error_name := answer["error"]:
        raise _ERRORS[error_name](answer["text"])
    return answer["tables"]
