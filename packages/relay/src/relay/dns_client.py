"""Ask the DNS for the addresses of a name, once. When to ask, and what to keep, is for resolver.py.

Importing this module takes about 50 ms, since it loads all of dnspython that a look-up needs.
"""

from __future__ import annotations

import math
from ipaddress import ip_address
from pathlib import Path
from typing import Final, Literal, TypeAlias

import dns.asyncbackend
import dns.asyncresolver
import dns.exception
import dns.rdtypes.ANY.CNAME  # records that dnspython would load at the first answer that has one, and what follows too
import dns.rdtypes.ANY.SOA
import dns.rdtypes.IN.A
import dns.rdtypes.IN.AAAA
import dns.resolver
import trio

from relay.addresses import Address
from relay.watched_file import WatchedFile

Family: TypeAlias = Literal[4, 6]
Failure: TypeAlias = Literal["not_there", "no_address", "no_answer", "refused", "no_server"]

# Choices of ours.
OTHER_FAMILY_S: Final = 0.5  # for the other family's answer, once one is there

_RECORDS: Final[dict[Family, Literal["A", "AAAA"]]] = {4: "A", 6: "AAAA"}


class DnsFailure(Exception):
    """There is no address to be had, for the reason given."""

    def __init__(self, reason: Failure) -> None:
        super().__init__(reason)
        self.reason: Failure = reason


class DnsClient:
    """A stub resolver with the servers, search list and options of a resolv.conf, which it reads when that has changed.

    Args:
        port: where the servers listen.
    """

    def __init__(self, resolv_conf: Path, port: int) -> None:
        self._resolv_conf = WatchedFile(resolv_conf)
        self._port = port
        self._backend = dns.asyncbackend.get_backend("trio")
        self._stub: dns.asyncresolver.Resolver | None = None

    async def ask(self, name: str, family: Family | None) -> tuple[tuple[Address, ...], int]:
        """Return the addresses of a name, IPv4 first, and the seconds for which they are good.

        Both families are asked at once. When one has answered with addresses, the other has `OTHER_FAMILY_S` left, so
        that servers which never answer for AAAA cost no more than that.

        Raises:
            DnsFailure: there are none, or no server says so.

        It takes its time: the caller sets the deadline.
        """
        found: dict[Family, tuple[tuple[Address, ...], int]] = {}
        failures: list[Failure] = []
        async with trio.open_nursery() as nursery:

            async def ask_for(one: Family) -> None:
                try:
                    found[one] = await self._ask_for(name, one)
                    nursery.cancel_scope.deadline = trio.current_time() + OTHER_FAMILY_S
                except DnsFailure as failure:
                    failures.append(failure.reason)

            for one in _RECORDS if family is None else (family,):
                nursery.start_soon(ask_for, one)
        if not found:
            # Where one family has no record, what befell the other one says more.
            raise DnsFailure(max(failures, key=lambda failure: failure != "no_address"))
        addresses = tuple(address for one in sorted(found) for address in found[one][0])
        return addresses, min(ttl_s for _, ttl_s in found.values())

    async def _ask_for(self, name: str, family: Family) -> tuple[tuple[Address, ...], int]:
        stub = self._configured()
        try:
            answer = await stub.resolve(
                name,
                _RECORDS[family],
                search=True,
                raise_on_no_answer=False,
                lifetime=math.inf,  # by the wall clock, which may jump
                backend=self._backend,
            )
        except dns.resolver.NXDOMAIN as error:
            raise DnsFailure("not_there") from error
        except dns.exception.Timeout as error:  # the wall clock has been set back
            raise DnsFailure("no_answer") from error
        except dns.exception.DNSException as error:
            raise DnsFailure("refused") from error
        addresses = tuple(ip_address(record.to_text()) for record in answer.rrset or ())
        if not addresses:
            raise DnsFailure("no_address")
        return addresses, answer.chaining_result.minimum_ttl

    def _configured(self) -> dns.asyncresolver.Resolver:
        if self._resolv_conf.has_changed():
            try:
                self._stub = dns.asyncresolver.Resolver(str(self._resolv_conf.path))
                self._stub.port = self._port
            except (dns.resolver.NoResolverConfiguration, dns.exception.DNSException, ValueError):
                self._stub = None
        if self._stub is None:
            raise DnsFailure("no_server")
        return self._stub
