"""Addresses that one can dial or listen on, as values, and their spellings. Does no I/O: see stream.py for that.

The grammar::

    dial    [tcp://]HOST:PORT
    listen  [tcp://][HOST:]PORT | [tcp://]:PORT        without HOST: every address of this machine
    HOST    a name | 192.0.2.1 | [2001:db8::1] | [fe80::1%eth0]
    PORT    1 to 65535; to listen also 0, where the kernel chooses
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address, IPv6Address
from typing import TypeAlias

from enlink.errors import UsageError

_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"  # RFC 1123, and the underscores of container names
_NAME = re.compile(rf"(?=.{{1,254}}\Z)(?:{_LABEL}\.)*(?P<last>{_LABEL})\.?")
_NUMBER = re.compile(r"[0-9]+|0[xX][0-9A-Fa-f]*")  # what inet_aton(3) takes for a part of an IPv4 address
_PORT = re.compile(r"[0-9]{1,5}")
_ZONE = re.compile(r"[A-Za-z0-9_.-]{1,15}")  # an interface: IFNAMSIZ - 1
_BRACKETS = re.compile(r"\[(?P<host>[^\[\]]*)\](?::(?P<port>.*))?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Tcp:
    """A TCP endpoint. ``host`` is a name or an address without brackets; None, to listen on every address.

    ``str()`` gives the spelling that `parse_dial` or `parse_listen` turns back into the same value.
    """

    host: str | None
    port: int

    def __str__(self) -> str:
        host = self.host or ""
        return f"tcp://[{host}]:{self.port}" if ":" in host else f"tcp://{host}:{self.port}"


Endpoint: TypeAlias = Tcp
"""Whatever can be dialled or listened on. A union, as soon as there is a second kind."""


def parse_dial(text: str) -> Endpoint:
    """Parse an address to connect to, as in ``gateway:6980``, ``[2001:db8::1]:6980`` or ``tcp://192.0.2.1:6980``.

    Raises:
        UsageError: any other spelling, port 0, and the addresses 0.0.0.0 and ``::``, where nobody can be.
    """
    host, port = _host_and_port(text)
    if not host:
        raise UsageError(f"{text!r} is a port without a host: write HOST:{port}, as in 192.0.2.1:{port}")
    if host in ("0.0.0.0", "::"):
        raise UsageError(f"{text!r} is every address: write the one to dial, as in 127.0.0.1:{port}")
    if port == 0:
        raise UsageError(f"{text!r}: port 0 cannot be dialled, use 1 to 65535")
    return Tcp(host, port)


def parse_listen(text: str) -> Endpoint:
    """Parse an address to listen on, as in ``6980``, ``127.0.0.1:6980``, ``[::1]:6980`` or ``tcp://:6980``.

    Raises:
        UsageError: any other spelling.
    """
    host, port = _host_and_port(text)
    return Tcp(host or None, port)


def _host_and_port(text: str) -> tuple[str, int]:
    """Split any spelling of the grammar; the host is empty where there is none."""
    if not text:
        raise UsageError("an empty address: write HOST:PORT, as in 192.0.2.1:6980")
    if any(character.isspace() for character in text):
        raise UsageError(f"{text!r} has a space in it: write HOST:PORT, as in 192.0.2.1:6980")
    scheme, separator, rest = text.rpartition("://")
    if separator and scheme != "tcp":
        raise UsageError(f"{text!r}: {scheme}:// is not known here, write tcp://HOST:PORT")
    if rest.startswith("["):
        match = _BRACKETS.fullmatch(rest)
        if match is None or match["port"] is None:
            raise UsageError(f"{text!r}: write an IPv6 address and its port as in [2001:db8::1]:6980")
        return _ipv6(text, match["host"]), _port(text, match["port"])
    if rest.count(":") > 1:
        raise UsageError(f"{text!r}: an IPv6 address needs brackets, as in [2001:db8::1]:6980")
    host, colon, port = rest.partition(":")
    if not colon:
        if not rest.isdecimal():
            raise UsageError(f"{text!r} names no port: write HOST:PORT, as in {rest}:6980")
        host, port = "", rest
    return _name_or_ipv4(text, host), _port(text, port)


def _port(text: str, digits: str) -> int:
    if not _PORT.fullmatch(digits) or int(digits) > 65535:
        raise UsageError(f"{text!r}: port {digits!r} is not a number from 1 to 65535")
    return int(digits)


def _name_or_ipv4(text: str, host: str) -> str:
    match = _NAME.fullmatch(host)
    if host and match is None:
        raise UsageError(f"{text!r}: {host!r} is neither a host name nor an address")
    if match and _NUMBER.fullmatch(match["last"]):
        # The resolver would take 1, 127.1 and 0x7f.1 for addresses; whoever writes one of these means something else.
        try:
            IPv4Address(host)
        except AddressValueError as error:
            raise UsageError(f"{text!r}: {host!r} is not an IPv4 address, which has four numbers: 192.0.2.1") from error
    return host


def _ipv6(text: str, host: str) -> str:
    address, percent, zone = host.partition("%")
    try:
        plain = str(IPv6Address(address))
    except AddressValueError as error:
        raise UsageError(f"{text!r}: {host!r} is not an IPv6 address: only those stand in brackets") from error
    if percent and not _ZONE.fullmatch(zone):
        raise UsageError(f"{text!r}: {zone!r} after the % is not the name of a network device")
    return plain + percent + zone
