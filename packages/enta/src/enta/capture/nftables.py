"""The guard and the capture rules as nftables tables: their text, their life in the kernel, what a crash left.

Two tables an instance, both in family inet. ``eng_<instance>`` belongs to this process: the kernel deletes it when the
process ends, however it ends, and refuses it to everyone else meanwhile, so it is the instance's lock as well.
``eng_<instance>_guard`` belongs to nobody and stays until it is deleted. Each says in its comment whose it is, so that
clean-up needs no other record. Addresses, routes and rules of the routing policy are in `routing`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv4Address
from typing import Literal

from enlink.errors import CannotCreate

from enta.capture.libnftables import Nft, NftFailure
from enta.capture.plan import Identity, Plan

# include/uapi/linux/netfilter_ipv4.h: defragmentation at -400, connection tracking at -200, DNAT at -100, SNAT at 100.
_BEFORE_DEFRAGMENTATION = -450
_AFTER_TRACKING = -150
_DNAT = -100
_FILTER = 0
_LAST = 300

_MORE_FRAGMENTS_OR_OFFSET = 0x3FFF  # RFC 791: of the 16 bits that also hold "don't fragment"

_COMMENT = re.compile(
    r'comment "eng (?P<kind>agent|guard): '
    r'instance=(?P<instance>\S+) tun=(?P<tun>\S+) table=(?P<table>\d+) mark=(?P<mark>0x[0-9a-f]+)"'
)
_OWNED = re.compile(r"^\s*flags (?:\w+,)*owner", re.MULTILINE)
_OWNER_REMARK = re.compile(r" # progname .*")  # names a process, when the library happens to know it


def guard_ruleset(plan: Plan) -> str:
    """Return the text that claims the instance and replaces its guard, with nothing when the plan fails open."""
    name = plan.identity.guard_table_name
    comment = _comment("guard", plan.identity)
    cleared = (
        _table(plan.identity.capture_table_name, *_claim(plan)) + _table(name, comment) + f"delete table inet {name}\n"
    )
    if not plan.is_fail_closed:
        return cleared
    # The kernel stops tracking connections with the last rule that asks about them. After an agent's crash it would
    # start again in their middle, take old acknowledgements for forged ones, and never let the connections go on.
    tracking = _chain(
        "tracking",
        f"type filter hook prerouting priority {_AFTER_TRACKING}; policy accept;",
        "ct state established accept",
    )
    return cleared + _table(name, comment, *_barrier(plan), tracking)


def capture_ruleset(plan: Plan) -> str:
    """Return the text that replaces what the instance captures or replays, under the claim that it holds.

    The guard's barrier is there a second time: others can flush the guard, but not this table.
    """
    name = plan.identity.capture_table_name
    ports = [f"{replay.protocol} dport {replay.transit} accept" for replay in plan.replays]
    entering = _chain(
        "entering",
        # Connection tracking makes one packet of fragments, which then looks like any other.
        f"type filter hook prerouting priority {_BEFORE_DEFRAGMENTATION}; policy accept;",
        f'iifname != "{plan.tun_name}" accept',
        "meta nfproto != ipv4 drop",
        "ip hdrlength != 5 drop",  # in words of 32 bits: options
        f"ip frag-off & {_MORE_FRAGMENTS_OR_OFFSET:#x} != 0 drop",
        f"ip saddr != {_span(*plan.senders)} drop",
        f"ip saddr {plan.address.ip} drop",
        f"ip daddr != {plan.address.ip} drop",
    )
    arriving = _chain(
        "arriving",
        f"type filter hook prerouting priority {_AFTER_TRACKING}; policy accept;",
        f'iifname != {{ "lo", "{plan.tun_name}" }} ip daddr {plan.address.ip} drop',
        f'iifname != "{plan.tun_name}" accept',
        "ct state established,related accept",
        # NAT leaves these alone, so they would meet no socket, and the kernel would reset the connection they are of.
        "ct state invalid drop",
        *ports,
        "drop",
    )
    passing = _chain(
        "passing",
        f"type filter hook forward priority {_FILTER}; policy accept;",
        f'oifname "{plan.tun_name}" drop',
    )
    if plan.role == "client":
        translating = _chain(
            "capture",
            f"type nat hook output priority {_DNAT}; policy accept;",
            f"meta mark {plan.mark:#x} return",
            "fib daddr type local return",
            *(
                f"meta nfproto ipv4 {_matching(capture.protocol, capture.port, capture.destination)}"
                f" dnat ip to {plan.peer}:{capture.transit}"
                for capture in plan.captures
            ),
        )
    else:
        translating = _chain(
            "replay",
            f"type nat hook prerouting priority {_DNAT}; policy accept;",
            *(
                f'iifname "{plan.tun_name}" meta nfproto ipv4 {replay.protocol} dport {replay.transit}'
                f" redirect to :{replay.port}"
                for replay in plan.replays
            ),
        )
    claim = _claim(plan)
    return (
        _table(name, *claim)
        + f"delete table inet {name}\n"
        + _table(name, *claim, *_barrier(plan), entering, arriving, passing, translating)
    )


def _barrier(plan: Plan) -> list[str]:
    """Return the chains that keep captured traffic, and what is for the tunnel, off every other device."""
    refuse = _chain(
        "refuse",
        # A dropped UDP packet is an error that its sender sees. A connection would be tried for minutes. The refusal
        # itself is for an address of this host, or it would leave as well.
        "tcp flags & (syn | ack) == syn fib saddr type local reject with tcp reset",
        "drop",
    )
    outgoing = _chain(
        "outgoing",
        f"type filter hook output priority {_AFTER_TRACKING}; policy accept;",
        f'oifname "{plan.tun_name}" accept',
        f"meta mark {plan.mark:#x} accept",
        "ct direction reply accept",
        "fib daddr type local accept",
        *(f"{_matching(capture.protocol, capture.port, capture.destination)} goto refuse" for capture in plan.captures),
    )
    leaving = _chain(
        "leaving",
        f"type filter hook postrouting priority {_LAST}; policy accept;",
        # After DNAT has chosen the way anew. Input interface 0: the packet was made here, not forwarded for others.
        f'iif 0 oifname != {{ "lo", "{plan.tun_name}" }} ip daddr {plan.address.network} drop',
    )
    return [refuse, outgoing, leaving] if plan.captures else [leaving]


class NftablesFirewall:
    """A `Firewall` on nftables. Opens its netlink socket at once; the first change is `add_guard`.

    Raises:
        CannotCreate: the instance is alive, here or in another process, or a table of that name is a stranger's.
        NotPermitted: no CAP_NET_ADMIN.
        Unavailable: libnftables or nf_tables is missing.
        NftFailure: the kernel refused for another reason.
    """

    backend: Literal["nftables", "iptables"] = "nftables"

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._nft = Nft()
        self._expected: dict[str, str | None] = {}

    def add_guard(self) -> None:
        """Claim the instance; unless the plan fails open, drop captured traffic that would leave by another device."""
        identity = self._plan.identity
        if "claim" not in self._expected:
            _refuse_neighbours(self._nft, identity)
        self._refuse_strangers()
        self._change(guard_ruleset(self._plan))
        self._expected["claim"] = None
        if self._plan.is_fail_closed:
            self._expected["guard"] = self._listing(identity.guard_table_name)

    def delete_guard(self) -> None:
        """Remove the guard. The claim stays until `close`."""
        self._expected.pop("guard", None)
        name = self._plan.identity.guard_table_name
        if _owner_of(self._nft, "guard", name) is not None:
            self._change(f"delete table inet {name}\n")

    def add_capture(self) -> None:
        """Replace what is captured or replayed, in one transaction."""
        self._refuse_strangers()
        self._change(capture_ruleset(self._plan))
        self._expected["capture"] = self._listing(self._plan.identity.capture_table_name)

    def delete_capture(self) -> None:
        """Capture and replay nothing; the claim stays."""
        if self._expected.pop("capture", None) is not None:
            name = self._plan.identity.capture_table_name
            empty = _table(name, *_claim(self._plan))
            self._change(empty + f"delete table inet {name}\n" + empty)

    def missing(self) -> list[str]:
        """Name what was added and is not there as it was: any of "guard" and "capture"."""
        identity = self._plan.identity
        names = {"guard": identity.guard_table_name, "capture": identity.capture_table_name}
        return [what for what, name in names.items() if self._is_altered(what, name)]

    def close(self) -> None:
        """Release the claim, and the capture rules with it. The guard stays unless it was deleted before."""
        self._expected.clear()
        self._nft.close()

    def _is_altered(self, what: str, name: str) -> bool:
        return what in self._expected and self._expected[what] != self._listing(name)

    def _listing(self, name: str) -> str:
        return _OWNER_REMARK.sub("", self._nft.listing("inet", name) or "")

    def _change(self, text: str) -> None:
        with _claimed(self._plan.instance):
            self._nft.run(text)

    def _refuse_strangers(self) -> None:
        identity = self._plan.identity
        for name, is_ours in (
            (identity.capture_table_name, _OWNED.search),
            (identity.guard_table_name, _COMMENT.search),
        ):
            listing = self._nft.listing("inet", name)
            if listing is not None and not is_ours(listing):
                raise CannotCreate(f"nftables table 'inet {name}' is not ours: delete it, or choose another --instance")


def leftover_guards() -> list[Identity]:
    """Return whose guards are in this network namespace without a living agent, sorted by instance."""
    with _opened() as nft:
        living = {identity.instance for identity in _owners(nft, "agent")}
        return [identity for identity in _owners(nft, "guard") if identity.instance not in living]


def living_agents() -> list[Identity]:
    """Return the agents that hold a table of this network namespace now, sorted by instance."""
    with _opened() as nft:
        return _owners(nft, "agent")


def delete_guard_named(instance: str) -> bool:
    """Delete a dead instance's guard; tell whether there was one.

    Raises:
        CannotCreate: the instance is alive, and so is its guard.
    """
    with _opened() as nft:
        for identity in _owners(nft, "guard"):
            if identity.instance == instance:
                claim = _table(identity.capture_table_name, "flags owner;")
                with _claimed(instance):
                    # In one transaction with the claim: an agent that starts meanwhile keeps its guard.
                    nft.run(claim + f"delete table inet {identity.guard_table_name}\n")
                return True
    return False


@contextmanager
def _opened() -> Iterator[Nft]:
    nft = Nft()
    try:
        yield nft
    finally:
        nft.close()


@contextmanager
def _claimed(instance: str) -> Iterator[None]:
    """Turn the kernel's refusal of another process's table into words."""
    try:
        yield
    except NftFailure as failure:
        if failure.is_refused:
            raise _running_already(instance) from failure
        raise


def _running_already(instance: str) -> CannotCreate:
    return CannotCreate(f"instance {instance!r} is running here already: stop it, or choose another --instance")


def _refuse_neighbours(nft: Nft, mine: Identity) -> None:
    for other in _owners(nft, "agent"):
        if other.instance == mine.instance:
            raise _running_already(mine.instance)
        for option, value, taken in (
            ("--tun-name", mine.tun_name, other.tun_name),
            ("--table", str(mine.table), str(other.table)),
            ("--mark", f"{mine.mark:#x}", f"{other.mark:#x}"),
        ):
            if value == taken:
                raise CannotCreate(f"{option} {value} is in use by instance {other.instance!r}: choose another")


def _owners(nft: Nft, kind: Literal["agent", "guard"]) -> list[Identity]:
    names = sorted(name for name in nft.tables("inet") if name.startswith("eng_"))
    return [identity for name in names if (identity := _owner_of(nft, kind, name)) is not None]


def _owner_of(nft: Nft, kind: Literal["agent", "guard"], name: str) -> Identity | None:
    """Read from a table's comment whose it is; None for a stranger's, whatever it is called."""
    listing = nft.listing("inet", name) or ""
    match = _COMMENT.search(listing)
    if match is None or match["kind"] != kind or (kind == "agent" and not _OWNED.search(listing)):
        return None
    identity = Identity(match["instance"], match["tun"], int(match["table"]), int(match["mark"], 16))
    expected = identity.guard_table_name if kind == "guard" else identity.capture_table_name
    return identity if name == expected else None


def _claim(plan: Plan) -> tuple[str, str]:
    return "flags owner;", _comment("agent", plan.identity)


def _comment(kind: Literal["agent", "guard"], identity: Identity) -> str:
    return (
        f'comment "eng {kind}: instance={identity.instance} tun={identity.tun_name}'
        f' table={identity.table} mark={identity.mark:#x}"'
    )


def _matching(protocol: str, port: int, destination: object) -> str:
    where = "" if destination is None else f"ip daddr {destination} "
    return f"{where}{protocol} dport {port}"


def _span(first: IPv4Address, last: IPv4Address) -> str:
    return str(first) if first == last else f"{first}-{last}"


def _table(name: str, *items: str) -> str:
    return "\n".join(
        [f"table inet {name} {{", *(f"    {line}" for item in items for line in item.splitlines()), "}", ""]
    )


def _chain(name: str, *statements: str) -> str:
    return "\n".join([f"chain {name} {{", *(f"    {statement}" for statement in statements), "}"])
