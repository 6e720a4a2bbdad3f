"""Put a plan's TUN settings, policy rules and routes into the kernel, and take exactly these out again.

Rules and routes carry `ROUTE_PROTOCOL` and fixed priorities. Only what carries them is ever removed, one by one; a
table is never flushed, because others may keep routes in it. What a plan wants is in `ip_rules`.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

from enlink.errors import CannotCreate, NotPermitted, SystemFailure
from pyroute2 import IPRoute  # type: ignore[import-untyped]  # ships no types
from pyroute2.netlink.exceptions import NetlinkError  # type: ignore[import-untyped]  # ships no types

from enta.capture.ip_rules import (
    CONGESTION_CONTROL,
    DEVICE_SETTINGS,
    LAST_METRIC,
    MAIN_TABLE,
    QUEUE_PACKETS,
    Route,
    Rule,
    wanted_routes,
    wanted_rules,
)
from enta.capture.plan import ROUTE_PROTOCOL, Identity, Plan, TransportProtocol

# linux/if.h, linux/in.h, linux/rtnetlink.h, linux/fib_rules.h
_IFF_UP = 1
_PROTOCOL_NUMBERS: dict[TransportProtocol, int] = {"tcp": 6, "udp": 17}
_PROTOCOL_NAMES = {number: name for name, number in _PROTOCOL_NUMBERS.items()}
_RTN_UNICAST, _RTN_UNREACHABLE = 1, 7
_RT_SCOPE_LINK = 253
_RTAX_FEATURE_ECN = 1
_FR_ACT_TO_TBL = 1
_RULE_ATTRIBUTES = {
    *("FRA_PRIORITY", "FRA_TABLE", "FRA_PROTOCOL", "FRA_SRC", "FRA_DST", "FRA_IIFNAME", "FRA_FWMARK", "FRA_FWMASK"),
    *("FRA_IP_PROTO", "FRA_DPORT_RANGE"),
    *("FRA_SUPPRESS_PREFIXLEN", "UNKNOWN"),  # said of every rule; the mask of a port, said by newer kernels
}

# Choices of ours.
_SHORTEST_CONFLICT = 8  # a shorter route, such as 0.0.0.0/1, is a default route in disguise and gives way to the TUN's

logger = logging.getLogger(__name__)


class Routing:
    """The kernel's side of a plan. Every call blocks for milliseconds and may be repeated.

    Raises:
        CannotCreate: an address, a route or a table is taken.
        NotPermitted: no CAP_NET_ADMIN.
        SystemFailure: the kernel refused for another reason, or the TUN is gone.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._is_tun_up = False
        self._has_rules = False

    def refuse_conflicts(self) -> None:
        """Raise `CannotCreate` with the line that is in the way, if there is one. Call before the TUN is made."""
        with _kernel("look for conflicts") as kernel:
            self._refuse_rules(kernel)
            names = _device_names(kernel)
            self._refuse_routes(kernel, names)
            self._refuse_addresses(kernel, names)

    def purge_leftovers(self) -> list[str]:
        """Remove what a dead run left in the plan's table or for its mark, unless this plan wants the same; name it."""
        return _purge(self._is_ours, keep=[*wanted_rules(self._plan), *wanted_routes(self._plan)])

    def bring_up_tun(self) -> None:
        """Give the TUN its settings, address and MTU, and bring it up."""
        plan = self._plan
        with _kernel(f"bring up {plan.tun_name}") as kernel:
            index = _device_index(kernel, plan.tun_name)
            _configure_device(plan.tun_name)
            if not _has_address(kernel, index, plan):
                kernel.addr("add", index=index, address=str(plan.address.ip), prefixlen=plan.address.network.prefixlen)
            kernel.link("set", index=index, mtu=plan.mtu, txqlen=QUEUE_PACKETS, state="up")
        self._is_tun_up = True

    def add_rules(self) -> None:
        """Send captured traffic to the TUN, which must be up. Adds what is missing and leaves the rest as it is."""
        with _kernel("add routes and rules") as kernel:
            # Rules follow the routes: a rule whose table is empty sends its traffic on to the main table.
            present_routes, present_rules = _routes(kernel), _rules(kernel)
            for route in wanted_routes(self._plan):
                if route not in present_routes:
                    device = {"oif": _device_index(kernel, route.device)} if route.device else {}
                    kernel.route("add", **_route_request(route), **device)
            for rule in wanted_rules(self._plan):
                if rule not in present_rules:
                    kernel.rule("add", **_rule_request(rule))
        self._has_rules = True

    def delete_rules(self) -> None:
        """Remove the plan's rules and then its routes: exactly these. Quiet when they are gone."""
        self._has_rules = False
        _purge(self._is_ours, keep=())

    def missing(self) -> list[str]:
        """Name, as `ip` would, what was set up and is not as it was."""
        plan = self._plan
        lines: list[str] = []
        with _kernel("check routes and rules") as kernel:
            if self._is_tun_up:
                index = _device_index(kernel, plan.tun_name)
                (link,) = kernel.get_links(index)
                if not _has_address(kernel, index, plan):
                    lines.append(f"address {plan.address} dev {plan.tun_name}")
                if not link["flags"] & _IFF_UP or link.get_attr("IFLA_MTU") != plan.mtu:
                    lines.append(f"link {plan.tun_name} mtu {plan.mtu} up")
            if self._has_rules:
                routes, rules = _routes(kernel), _rules(kernel)
                lines += [f"route {route}" for route in wanted_routes(plan) if route not in routes]
                lines += [f"rule {rule}" for rule in wanted_rules(plan) if rule not in rules]
        return lines

    def restore(self) -> None:
        """Put back what `missing` names. A TUN that is gone is a `SystemFailure`: who opened it must make it again."""
        if self._is_tun_up:
            self.bring_up_tun()
        if self._has_rules:
            self.add_rules()

    def _is_ours(self, table: int, mark: int | None) -> bool:
        return table == self._plan.table or mark == self._plan.mark

    def _refuse_rules(self, kernel: IPRoute) -> None:
        for rule in _rules(kernel):
            if rule.table != self._plan.table and any(_overlap(rule, wanted) for wanted in wanted_rules(self._plan)):
                raise CannotCreate(f"another agent captures this (rule {rule}): stop it, or enta cleanup if it is dead")

    def _refuse_routes(self, kernel: IPRoute, names: dict[int, str]) -> None:
        plan = self._plan
        for route in kernel.get_routes(family=socket.AF_INET):
            table = route.get_attr("RTA_TABLE")
            network = IPv4Network((route.get_attr("RTA_DST") or 0, route["dst_len"]))
            destination = network if network.prefixlen else "default"
            line = f"{destination} dev {names.get(route.get_attr('RTA_OIF'), 'none')} table {table}"
            is_leftover = route["proto"] == ROUTE_PROTOCOL and route["type"] == _RTN_UNREACHABLE
            if table == plan.table and network.prefixlen == 0 and not is_leftover:
                raise CannotCreate(f"--table {table} has a default route already ({line}): choose another table")
            is_conflict = network.prefixlen >= _SHORTEST_CONFLICT and network.overlaps(plan.address.network)
            if table == MAIN_TABLE and is_conflict:
                raise CannotCreate(f"--tun-addr {plan.address} overlaps a route ({line}): choose another address")

    def _refuse_addresses(self, kernel: IPRoute, names: dict[int, str]) -> None:
        for message in kernel.get_addr(family=socket.AF_INET):
            address = IPv4Address(message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS"))
            if address in self._plan.address.network:
                line = f"{address}/{message['prefixlen']} dev {names.get(message['index'], 'none')}"
                raise CannotCreate(f"--tun-addr {self._plan.address} overlaps {line}: choose another address")


def purge_dead(living: Collection[Identity]) -> list[str]:
    """Remove every tagged rule and route of this network namespace that belongs to none of *living*; name them.

    Who still has a route by a device of its own is alive as well: a TUN goes with its process.
    """
    with _kernel("look for living agents") as kernel:
        tables = {route.table for route in _routes(kernel) if route.device}
    tables |= {agent.table for agent in living}
    marks = {agent.mark for agent in living}
    return _purge(lambda table, mark: table not in tables and mark not in marks, keep=())


@contextmanager
def _kernel(attempt: str) -> Iterator[IPRoute]:
    """Open a routing socket in the calling thread's network namespace, and put the kernel's refusals into words."""
    try:
        with IPRoute() as kernel:
            yield kernel
    except NetlinkError as error:
        reason = os.strerror(error.code)
        if error.code == errno.EPERM:
            raise NotPermitted(f"cannot {attempt} ({reason}): run as root or grant CAP_NET_ADMIN") from error
        if error.code == errno.EEXIST:
            raise CannotCreate(f"cannot {attempt} ({reason}): see 'ip rule' and 'ip route show table all'") from error
        raise SystemFailure(f"cannot {attempt} ({reason}): run 'enta doctor'") from error


def _purge(is_dead: Callable[[int, int | None], bool], keep: Collection[Rule | Route]) -> list[str]:
    with _kernel("remove rules and routes") as kernel:
        rules = [rule for rule in _rules(kernel) if is_dead(rule.table, rule.mark) and rule not in keep]
        routes = [route for route in _routes(kernel) if is_dead(route.table, None) and route not in keep]
        # Rules go first: while one stands, its table must not be empty.
        removed = [f"rule {rule}" for rule in rules if _delete(kernel.rule, _rule_request(rule))]
        return removed + [f"route {route}" for route in routes if _delete(kernel.route, _route_request(route))]


def _delete(change: Callable[..., object], request: dict[str, Any]) -> bool:
    try:
        change("del", **request)
    except NetlinkError as error:
        if error.code not in {errno.ENOENT, errno.ESRCH}:
            raise
        return False  # somebody was faster
    return True


def _rules(kernel: IPRoute) -> list[Rule]:
    """Return the rules that carry our tag and have our shape; a stranger may have chosen the same number."""
    rules = []
    for message in kernel.get_rules(family=socket.AF_INET):
        ports = (message.get_attr("FRA_DPORT_RANGE") or "").split(":")
        rule = Rule(
            priority=message.get_attr("FRA_PRIORITY") or 0,
            table=message.get_attr("FRA_TABLE"),
            source=_network(message.get_attr("FRA_SRC"), message["src_len"]),
            destination=_network(message.get_attr("FRA_DST"), message["dst_len"]),
            protocol=_PROTOCOL_NAMES.get(message.get_attr("FRA_IP_PROTO")),
            port=int(ports[0]) if ports[0] else None,
            mark=message.get_attr("FRA_FWMARK"),
        )
        is_tagged = message.get_attr("FRA_PROTOCOL") == ROUTE_PROTOCOL and message["action"] == _FR_ACT_TO_TBL
        if is_tagged and {name for name, _ in message["attrs"]} <= _RULE_ATTRIBUTES:
            rules.append(rule)
    return rules


def _routes(kernel: IPRoute) -> list[Route]:
    """Return the default routes that carry our tag, whatever their table."""
    names = _device_names(kernel)
    routes = []
    for message in kernel.get_routes(family=socket.AF_INET):
        if message["proto"] == ROUTE_PROTOCOL and message["dst_len"] == 0:
            table, metric = message.get_attr("RTA_TABLE"), message.get_attr("RTA_PRIORITY")
            if message["type"] == _RTN_UNICAST and metric is None:
                source = IPv4Address(message.get_attr("RTA_PREFSRC") or 0)
                routes.append(Route(table, names.get(message.get_attr("RTA_OIF"), "gone"), source))
            elif message["type"] == _RTN_UNREACHABLE and metric == LAST_METRIC:
                routes.append(Route(table))
    return routes


def _rule_request(rule: Rule) -> dict[str, Any]:
    request: dict[str, Any] = {
        "family": socket.AF_INET,
        "priority": rule.priority,
        "table": rule.table,
        "protocol": ROUTE_PROTOCOL,
    }
    if rule.source:
        request |= {"src": str(rule.source.network_address), "src_len": rule.source.prefixlen}
    if rule.destination:
        request |= {"dst": str(rule.destination.network_address), "dst_len": rule.destination.prefixlen}
    if rule.protocol:
        request |= {"ip_proto": _PROTOCOL_NUMBERS[rule.protocol], "dport_range": f"{rule.port}:{rule.port}"}
    if rule.mark:
        return request | {"fwmark": rule.mark, "fwmask": 0xFFFFFFFF}
    return request | {"iifname": "lo"}


def _route_request(route: Route) -> dict[str, Any]:
    """Say all but the device, which the kernel does not need to find the route."""
    request: dict[str, Any] = {
        "family": socket.AF_INET,
        "dst": "0.0.0.0/0",
        "table": route.table,
        "proto": ROUTE_PROTOCOL,
    }
    if route.device is None:
        return request | {"type": "unreachable", "priority": LAST_METRIC}
    return request | {
        "prefsrc": str(route.source),
        "scope": _RT_SCOPE_LINK,
        "metrics": {"cc_algo": CONGESTION_CONTROL, "features": _RTAX_FEATURE_ECN},
    }


def _overlap(rule: Rule, other: Rule) -> bool:
    """Whether both capture some packet."""
    everywhere = IPv4Network("0.0.0.0/0")
    return (
        rule.protocol is not None
        and (rule.protocol, rule.port) == (other.protocol, other.port)
        and (rule.destination or everywhere).overlaps(other.destination or everywhere)
    )


def _network(address: str | None, length: int) -> IPv4Network | None:
    return IPv4Network((address, length)) if address is not None else None


def _device_names(kernel: IPRoute) -> dict[int, str]:
    return {link["index"]: link.get_attr("IFLA_IFNAME") for link in kernel.get_links()}


def _device_index(kernel: IPRoute, name: str) -> int:
    for index in kernel.link_lookup(ifname=name):
        return int(index)
    raise SystemFailure(f"the device {name} is gone: start the agent again")


def _has_address(kernel: IPRoute, index: int, plan: Plan) -> bool:
    return any(
        message.get_attr("IFA_LOCAL") == str(plan.address.ip) and message["prefixlen"] == plan.address.network.prefixlen
        for message in kernel.get_addr(family=socket.AF_INET, index=index)
    )


def _configure_device(name: str) -> None:
    for family, setting, value in DEVICE_SETTINGS:
        path = Path("/proc/sys/net") / family / "conf" / name / setting
        try:
            if path.read_text().strip() != value:
                path.write_text(value)
        except FileNotFoundError:  # a kernel without IPv6
            continue
        except OSError as error:
            # In a container /proc/sys is often read-only. The firewall's rules for what arrives do not depend on it.
            logger.warning("cannot set %s to %s (%s)", path, value, error.strerror)
