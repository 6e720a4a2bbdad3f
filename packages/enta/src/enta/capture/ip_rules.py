"""The policy rules and routes that a plan wants, as values and as the words of `ip`. Does no I/O: see `routing`."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network

from enta.capture.plan import (
    CAPTURE_RULE_PRIORITY,
    ROUTE_PROTOCOL,
    UPLINK_RULE_PRIORITY,
    Plan,
    TransportProtocol,
)

# linux/rtnetlink.h
MAIN_TABLE = 254
LAST_METRIC = 2**32 - 1

# Choices of ours: what the TUN is set to under /proc/sys/net/<family>/conf/<device>, in this order. IPv6 is off before
# the device is up, because otherwise the kernel sends router solicitations into the tunnel.
DEVICE_SETTINGS = (
    ("ipv6", "disable_ipv6", "1"),
    ("ipv4", "rp_filter", "1"),
    ("ipv4", "accept_local", "0"),
    ("ipv4", "route_localnet", "0"),
)
# Of captured connections. The tunnel loses nothing, and its links pace where that is of use: twice would cost twice.
# What would wait in the links is held back by marks instead of losses: see enlink.ecn.
CONGESTION_CONTROL = "reno"  # every kernel has it
# Packets that the TUN keeps for the agent. Linux's 500 are fewer than a thousand connections that all speak at once.
QUEUE_PACKETS = 2000
_NOT_CHOSEN_YET = IPv4Network("0.0.0.0/32")


@dataclass(frozen=True, slots=True)
class Rule:
    """One `ip rule` of ours. Its words are those of ip-rule(8); None matches anything."""

    priority: int
    table: int
    source: IPv4Network | None = None
    destination: IPv4Network | None = None
    protocol: TransportProtocol | None = None
    port: int | None = None
    mark: int | None = None

    def __str__(self) -> str:
        words = [f"priority {self.priority}"]
        words += [f"from {self.source}"] if self.source else []
        words += [f"to {self.destination}"] if self.destination else []
        words += [f"fwmark {self.mark:#x}"] if self.mark else ["iif lo"]
        words += [f"ipproto {self.protocol} dport {self.port}"] if self.protocol else []
        table = "main" if self.table == MAIN_TABLE else self.table
        return " ".join([*words, f"lookup {table} protocol {ROUTE_PROTOCOL}"])


@dataclass(frozen=True, slots=True)
class Route:
    """One default route of ours: by a device with a source address or, without a device, "unreachable"."""

    table: int
    device: str | None = None
    source: IPv4Address | None = None

    def __str__(self) -> str:
        way = f"default dev {self.device} src {self.source}" if self.device else "unreachable default"
        last = f" congctl {CONGESTION_CONTROL} features ecn" if self.device else ""
        metric = "" if self.device else f" metric {LAST_METRIC}"
        return f"{way}{metric} table {self.table} protocol {ROUTE_PROTOCOL}{last}"


def wanted_rules(plan: Plan) -> list[Rule]:
    """Return the rules of a plan, in the order of their priorities.

    A capture has two: for a packet without a source address, which is how a connection begins, and for the TUN's own.
    Never for any source. The kernel asks the same rules where an arriving packet's answer would go, so local servers
    would lose every client whose port is captured, and strict reverse path filtering would drop what it sends.
    """
    uplink = [Rule(UPLINK_RULE_PRIORITY, MAIN_TABLE, mark=plan.mark)] if plan.captures else []
    # After DNAT, and for a server's answers: whatever else routes the TUN's network, or stops to.
    tunnel = Rule(CAPTURE_RULE_PRIORITY, plan.table, destination=plan.address.network)
    # A general rule makes a specific one superfluous, and the kernel takes it for a duplicate of the specific one.
    general = {(capture.protocol, capture.port) for capture in plan.captures if not capture.prefix_length}
    captures = [
        Rule(
            priority=CAPTURE_RULE_PRIORITY,
            table=plan.table,
            source=source,
            destination=capture.destination if capture.prefix_length else None,
            protocol=capture.protocol,
            port=capture.port,
        )
        for capture in plan.captures
        if not capture.prefix_length or (capture.protocol, capture.port) not in general
        for source in (_NOT_CHOSEN_YET, IPv4Network(plan.address.ip))
    ]
    return [*uplink, tunnel, *captures]


def wanted_routes(plan: Plan) -> list[Route]:
    """Return the routes of a plan's table: by the TUN, and nowhere at all when that is gone."""
    last = [Route(plan.table)] if plan.is_fail_closed else []
    return [*last, Route(plan.table, plan.tun_name, plan.address.ip)]


def ip_commands(plan: Plan) -> list[str]:
    """Return the commands that would do by hand, in this order, all that `Routing` does once the TUN exists."""
    return [
        *(f"sysctl -w net/{family}/conf/{plan.tun_name}/{name}={value}" for family, name, value in DEVICE_SETTINGS),
        f"ip address add {plan.address} dev {plan.tun_name}",
        f"ip link set dev {plan.tun_name} mtu {plan.mtu} txqueuelen {QUEUE_PACKETS} up",
        *(f"ip route add {route}" for route in wanted_routes(plan)),
        *(f"ip rule add {rule}" for rule in wanted_rules(plan)),
    ]
