"""Turn names into addresses, again and again, without ever holding up the program or losing the last good answer.

A name goes to /etc/hosts first, and to the DNS if it is not there, with the servers, the search list and the options of
/etc/resolv.conf; both files are read again when they have changed. Which addresses may be dialled is for allowlist.py.
"""

from __future__ import annotations

import logging
import math
from collections import Counter, OrderedDict, defaultdict
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio
from enlink.errors import Unavailable
from enlink.program import log_event

from relay.addresses import Address
from relay.watched_file import WatchedFile

if TYPE_CHECKING:
    from relay.dns_client import DnsClient, Failure, Family

# Choices of ours.
DEADLINE_S: Final = 5.0  # for a look-up
PATIENCE_S: Final = 1.0  # for a fresh answer, counted from where its look-up began, while there is an old one
LEAST_TTL_S: Final = 1.0  # whatever an answer says, so that it cannot make us ask for each connection
MOST_TTL_S: Final = 3600.0
RETRY_S: Final = 1.0  # from a look-up that failed to the next
REMEMBERED_NAMES: Final = 1024

_FAILURES: Final[Mapping[Failure, str]] = {
    "not_there": "there is no such name",
    "no_address": "it has no address",
    "no_answer": f"no answer within {DEADLINE_S:.0f} s",
    "refused": "no name server can tell",
    "no_server": "resolv.conf names no name server",
}
_LOCALHOST: Final[tuple[Address, ...]] = (ip_address("127.0.0.1"), ip_address("::1"))
_log = logging.getLogger(__name__)


class NameNotResolved(Unavailable):
    """A name has no address now, and had none before; trying again may help."""


@dataclass(slots=True)
class _Entry:
    """What is known of one name: its last good addresses, and how asking for them goes."""

    addresses: tuple[Address, ...] = ()
    failure: Failure | None = None
    ask_after_s: float = -math.inf
    patience_ends_s: float = math.inf
    answered: trio.Event | None = None  # while a look-up runs


@asynccontextmanager
async def open_resolver(
    *,
    expects_names: bool = True,
    resolv_conf: Path = Path("/etc/resolv.conf"),
    hosts: Path = Path("/etc/hosts"),
    dns_port: int = 53,
) -> AsyncIterator[Resolver]:
    """Give the block a resolver, whose look-ups end with it. Open it before there are connections to hold up.

    Args:
        expects_names: load dnspython now, and not when the first name has to be looked up, if ever.
        resolv_conf: in the place of the system's own; as are the others.
    """
    async with trio.open_nursery() as nursery:
        resolver = Resolver(nursery, resolv_conf, HostsFile(hosts), dns_port)
        if expects_names:
            resolver.load_dns()
        yield resolver
        nursery.cancel_scope.cancel()


class Resolver:
    """Resolves names for connections; made by `open_resolver`.

    Attributes:
        counters: ``lookups``; those that failed, as ``failed_`` and the reason; and ``kept``, for each connection that
            was given an old answer.
    """

    def __init__(self, nursery: trio.Nursery, resolv_conf: Path, hosts: HostsFile, dns_port: int) -> None:
        self._nursery = nursery
        self._resolv_conf = resolv_conf
        self._dns_port = dns_port
        self._dns: DnsClient | None = None
        self._hosts = hosts
        self._entries: OrderedDict[tuple[str, Family | None], _Entry] = OrderedDict()
        self.counters: Counter[str] = Counter()

    def load_dns(self) -> DnsClient:
        """Return what asks the DNS. The first call takes 50 ms."""
        if self._dns is None:
            from relay.dns_client import DnsClient

            self._dns = DnsClient(self._resolv_conf, self._dns_port)
        return self._dns

    async def resolve(self, host: str, family: Family | None = None) -> tuple[Address, ...]:
        """Return the addresses of a name, at least one: those of the DNS with IPv4 first; of an address, itself.

        An answer is used until its time to live is over. Then the next caller has it looked up, and all who ask
        meanwhile wait for the same look-up: up to `DEADLINE_S` if there is nothing else; up to `PATIENCE_S` if there is
        an old answer, which they get then; and not at all if the look-up before this one has failed.

        Raises:
            NameNotResolved: there is no answer, and none from before.

        Cancellation leaves the look-up to those who ask next.
        """
        await self._hosts.read_if_changed()
        addresses = self._local(host)
        if addresses is None:
            return await self._remote(host.lower(), family)
        await trio.lowlevel.checkpoint()
        addresses = tuple(address for address in addresses if family in (None, address.version))
        if not addresses:
            raise NameNotResolved(f"cannot resolve {host}: it has no IPv{family} address here")
        return addresses

    def known(self, host: str, family: Family | None = None) -> tuple[Address, ...] | None:
        """Return what `resolve` would, if that needs no look-up, no file and no patience; else None."""
        if not self._hosts.is_current():
            return None
        addresses = self._local(host)
        if addresses is not None:
            return tuple(address for address in addresses if family in (None, address.version)) or None
        entry = self._entries.get((host.lower(), family))
        if entry is None or entry.answered or entry.failure or trio.current_time() >= entry.ask_after_s:
            return None
        self._entries.move_to_end((host.lower(), family))
        return entry.addresses

    def _local(self, host: str) -> tuple[Address, ...] | None:
        """Return what needs no DNS: an address as it is, or what this machine says of a name; None if it does not."""
        try:
            return (ip_address(host),)
        except ValueError:
            name = host.lower().removesuffix(".")
        # RFC 6761, 6.3: nobody else is to be asked for these, and an enclave may have no hosts file.
        fallback = _LOCALHOST if f".{name}".endswith(".localhost") else None
        return self._hosts.names.get(name) or fallback

    async def _remote(self, name: str, family: Family | None) -> tuple[Address, ...]:
        entry = self._entries.setdefault((name, family), _Entry())
        self._entries.move_to_end((name, family))
        if len(self._entries) > REMEMBERED_NAMES:
            self._entries.popitem(last=False)
        now_s = trio.current_time()
        if entry.answered is None and now_s >= entry.ask_after_s:
            entry.answered = trio.Event()
            entry.patience_ends_s = now_s if entry.failure else now_s + PATIENCE_S
            self._nursery.start_soon(self._look_up, name, family, entry, entry.answered)
        if entry.answered is None:
            await trio.lowlevel.checkpoint()
        else:
            with trio.move_on_at(entry.patience_ends_s if entry.addresses else math.inf):
                await entry.answered.wait()
        if not entry.addresses:
            raise NameNotResolved(f"cannot resolve {name}: {_FAILURES[entry.failure or 'no_answer']}")
        self.counters["kept"] += entry.answered is not None or entry.failure is not None
        return entry.addresses

    async def _look_up(self, name: str, family: Family | None, entry: _Entry, answered: trio.Event) -> None:
        dns = self.load_dns()
        from relay.dns_client import DnsFailure

        before, failure, good_for_s = entry.failure, None, RETRY_S
        self.counters["lookups"] += 1
        try:
            with trio.fail_after(DEADLINE_S):
                entry.addresses, ttl_s = await dns.ask(name, family)
            good_for_s = min(max(ttl_s, LEAST_TTL_S), MOST_TTL_S)
        except (DnsFailure, trio.TooSlowError) as error:
            failure = error.reason if isinstance(error, DnsFailure) else "no_answer"
            self.counters[f"failed_{failure}"] += 1
        finally:
            entry.failure = failure
            entry.ask_after_s = trio.current_time() + good_for_s
            entry.answered = None
            answered.set()
        addresses = " ".join(map(str, entry.addresses))
        if failure and failure != before:
            log_event(_log, "name_not_resolved", logging.WARNING, name=name, reason=failure, kept=addresses)
        elif before and not failure:
            log_event(_log, "name_resolved", name=name, addresses=addresses)


class HostsFile:
    """The names of /etc/hosts. Read at once, and again in a thread when it has changed: some have a million lines.

    Attributes:
        names: in lower case, with their addresses in the order of the file.
    """

    def __init__(self, path: Path) -> None:
        self._file = WatchedFile(path)
        self._is_current = self._file.has_changed()  # the first time, it says so
        self.names = _read_hosts(path)

    def is_current(self) -> bool:
        """Tell whether the file is still what was read."""
        self._is_current = self._is_current and not self._file.has_changed()
        return self._is_current

    async def read_if_changed(self) -> None:
        if not self.is_current():
            self._is_current = True
            self.names = await trio.to_thread.run_sync(_read_hosts, self._file.path)


def _read_hosts(path: Path) -> dict[str, tuple[Address, ...]]:
    found: defaultdict[str, dict[Address, None]] = defaultdict(dict)
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                first, *names = line.partition("#")[0].split() or [""]
                try:
                    address = ip_address(first)
                except ValueError:
                    continue
                for name in names:
                    found[name.lower().removesuffix(".")][address] = None
    except OSError:
        return {}
    return {name: tuple(addresses) for name, addresses in found.items()}
