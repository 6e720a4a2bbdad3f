"""Find and remove what dead agents left in this network namespace: never a living one's, never a stranger's.

What an agent puts on a host says whose it is, so nothing else needs to have survived. An agent is alive that holds its
nftables table, its lock or its TUN: containers may differ in their runtime directories, and iptables knows no owners.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from enlink.errors import CannotCreate, EngError, SystemFailure, Unavailable
from enlink.instance import InstanceLock, live_instances
from enlink.program import log_event
from pyroute2 import IPRoute  # type: ignore[import-untyped]  # ships no types

from enta.capture.iptables import delete_leftovers, leftovers
from enta.capture.nftables import delete_guard_named, leftover_guards, living_agents
from enta.capture.plan import Identity
from enta.capture.routing import purge_dead

_logger = logging.getLogger(__name__)


def clean_up() -> list[str]:
    """Remove what dead agents left, and return one line for each thing removed: none the second time.

    A packet filter that this host lacks the parts to look into is left out, with a warning. Blocks for up to a second.

    Raises:
        NotPermitted: no CAP_NET_ADMIN.
        CannotCreate: no runtime directory, so there is no telling who is alive.
        SystemFailure: the kernel refused something, or iptables is locked; what else could be removed has been.
    """
    found = _look()
    # Rules first: whatever ends this half-way, guards still hold the captured ports closed.
    removed = purge_dead(found.living)
    for owner in found.guards:
        if _is_deleted(owner, _delete_guard):
            removed.append(f"guard of instance {owner.instance!r} (nftables table inet {owner.guard_table_name})")
    for owner in found.chains:
        if _is_deleted(owner, _delete_chains):
            names = f"{owner.capture_table_name} and {owner.guard_table_name}"
            removed.append(f"rules of instance {owner.instance!r} (iptables chains {names})")
    for backend, problem in found.problems.items():
        if isinstance(problem, SystemFailure):
            raise problem
        log_event(_logger, "not_looked_into", logging.WARNING, backend=backend, error=problem)
    return removed


def leftover_instances() -> list[str]:
    """Return the names of dead instances that still hold ports closed here, in nftables or iptables, sorted.

    A packet filter that cannot be looked into counts as empty: an agent must not fail for one that it does not use,
    and hears of the other's problems anyway. The lock of the calling process makes no instance alive.

    Raises:
        NotPermitted: no CAP_NET_ADMIN.
        CannotCreate: no runtime directory, so there is no telling who is alive.
    """
    found = _look()
    return sorted({owner.instance for owner in [*found.guards, *found.chains]})


def living_instances() -> list[Identity]:
    """Return the agents that are alive in this network namespace, as far as they can be told, without this process.

    Raises:
        NotPermitted: no CAP_NET_ADMIN.
        CannotCreate: no runtime directory.
    """
    return _look().living


@dataclass(frozen=True, slots=True)
class _Agents:
    """The agents of this network namespace, sorted by instance.

    Attributes:
        guards: the dead ones whose guard is in nftables.
        chains: the dead ones whose rules are in iptables.
        problems: why a packet filter could not be looked into, by its name.
    """

    living: list[Identity]
    guards: list[Identity]
    chains: list[Identity]
    problems: dict[str, EngError]


def _look() -> _Agents:
    guards: list[Identity] = []
    chains: list[Identity] = []
    living: set[Identity] = set()
    problems: dict[str, EngError] = {}
    # The living come last: who comes to life in between must not be taken for dead.
    try:
        chains = leftovers()
    except EngError as error:
        problems["iptables"] = error
    try:
        guards = leftover_guards()
        living.update(living_agents())
    except Unavailable as error:
        problems["nftables"] = error
    living.update(_locked())
    if chains:
        tuns = _held_tuns() - {agent.tun_name for agent in living}
        living.update(owner for owner in chains if owner.tun_name in tuns)
    names = {agent.instance for agent in living}
    return _Agents(
        living=sorted(living, key=lambda agent: agent.instance),
        guards=[owner for owner in guards if owner.instance not in names],
        chains=[owner for owner in chains if owner.instance not in names],
        problems=problems,
    )


def _locked() -> list[Identity]:
    here = Path("/proc/thread-self/ns/net").stat().st_ino
    return [
        Identity(lock.instance, lock.facts["tun_name"], lock.facts["table"], lock.facts["mark"])
        for lock in live_instances("enta")
        if lock.network_namespace == here and lock.pid != os.getpid()
    ]


def _held_tuns() -> set[str]:
    """Return the TUN devices of this network namespace that live only as long as a process holds them."""
    with IPRoute() as kernel:
        return {
            link.get_attr("IFLA_IFNAME")
            for link in kernel.get_links()
            if link.get_nested("IFLA_LINKINFO", "IFLA_INFO_KIND") == "tun"
            and not link.get_nested("IFLA_LINKINFO", "IFLA_INFO_DATA", "IFLA_TUN_PERSIST")
        }


def _is_deleted(owner: Identity, delete: Callable[[Identity], bool]) -> bool:
    try:
        return delete(owner)
    except CannotCreate as error:
        # It has come to life since we looked, and what is there is its own now.
        log_event(_logger, "left_alone", logging.WARNING, instance=owner.instance, error=error)
        return False


def _delete_guard(owner: Identity) -> bool:
    return delete_guard_named(owner.instance)


def _delete_chains(owner: Identity) -> bool:
    # Under the lock, because an agent of this name that starts just now must not lose its new rules.
    with InstanceLock("enta", owner.instance):
        delete_leftovers(owner)
    return True
