"""Addresses that one can dial or listen on, as values, and their spellings. Does no I/O: see connection and listener.

The grammar::

    dial    [tcp://]HOST:PORT         tcp4:// and tcp6:// keep to one family
            vsock://CID:PORT
            unix:PATH                 a path, or @NAME in Linux's abstract space; unix:///PATH is the same
            unix-vsock:PATH:PORT      Firecracker's: the guest's vsock behind a unix socket; unix-vsock:///PATH:PORT too
    listen  all of these, and
            [tcp://][:]PORT           on every address of this machine
            vsock://:PORT             on any cid of this machine, which is also called any
            systemd:NAME              what systemd listens on for us, by its FileDescriptorName=
    HOST    a name | 192.0.2.1 | [2001:db8::1] | [fe80::1%eth0]
    PORT    1 to 65535; to listen also 0, where the kernel chooses
            of vsock, 0 to 4294967294; to listen also 4294967295, where the kernel chooses
    CID     a number | hypervisor = 0 | local = 1 | host = 2 | parent = 3, which is a Nitro enclave's parent instance

Socat's spellings are understood besides: see socat. Where only one kind of address makes sense, it is spelled in this
way or without its scheme: ``16:8888`` is a vsock address there, as are ``:8888`` and ``8888`` to listen on.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address, IPv6Address
from typing import Final, Literal, TypeAlias, overload

from enlink.errors import UsageError
from enlink.socat import translate

# linux/vm_sockets.h
CID_ANY: Final = 0xFFFFFFFF
VSOCK_PORT_ANY: Final = 0xFFFFFFFF
_CID_NAMES: Final = {"any": CID_ANY, "hypervisor": 0, "local": 1, "host": 2, "parent": 3}  # the last is AWS's
SUN_PATH_LIMIT_BYTES: Final = 107  # linux/un.h: 108 with the zero at a path's end, or at an abstract name's start

_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"  # RFC 1123, and the underscores of container names
_NAME = re.compile(rf"(?=.{{1,254}}\Z)(?:{_LABEL}\.)*(?P<last>{_LABEL})\.?")
_NUMBER = re.compile(r"[0-9]+|0[xX][0-9A-Fa-f]*")  # what inet_aton(3) takes for a part of an IPv4 address
_DIGITS = re.compile(r"[0-9]{1,10}")
_ZONE = re.compile(r"[A-Za-z0-9_.-]{1,15}")  # an interface: IFNAMSIZ - 1
_BRACKETS = re.compile(r"\[(?P<host>[^\[\]]*)\](?::(?P<port>.*))?", re.DOTALL)
_WITH_PATH = re.compile(r"(?P<scheme>unix|unix-vsock|systemd):(?P<rest>.*)", re.DOTALL)
_DESCRIPTOR_NAME = re.compile(r"[!-.0-9;-~][!-9;-~]{0,254}")  # sd_listen_fds_with_names(3)


@dataclass(frozen=True, slots=True)
class Tcp:
    """A TCP endpoint. ``host`` is a name or an address without brackets; None, to listen on every address.

    ``str()`` of this and of every other kind gives a spelling that is parsed into the same value again.
    """

    host: str | None
    port: int
    family: Literal[4, 6] | None = None

    def __str__(self) -> str:
        host = self.host or ""
        return f"tcp{self.family or ''}://" + (f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}")


@dataclass(frozen=True, slots=True)
class Vsock:
    """A vsock(7) endpoint. Without ``cid``, to listen on any; with `VSOCK_PORT_ANY`, where the kernel chooses."""

    cid: int | None
    port: int

    def __str__(self) -> str:
        return f"vsock://{'' if self.cid is None else self.cid}:{self.port}"


@dataclass(frozen=True, slots=True)
class Unix:
    """A unix stream socket at a path; after ``@``, a name in the abstract space."""

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"

    @property
    def address(self) -> str:
        """As the kernel takes it."""
        return f"\0{self.path[1:]}" if self.path.startswith("@") else self.path


@dataclass(frozen=True, slots=True)
class HybridVsock:
    """A vsock port behind the unix socket that Firecracker keeps at ``path``.

    Dialled, it is the guest's port. Listened on, it is where the host takes what a guest sends to that port: the unix
    socket ``path_port``.
    """

    path: str
    port: int

    def __str__(self) -> str:
        return f"unix-vsock:{self.path}:{self.port}"

    @property
    def listening(self) -> Unix:
        """Where a host listens for the guest."""
        return Unix(f"{self.path}_{self.port}")


@dataclass(frozen=True, slots=True)
class Systemd:
    """The sockets that systemd passes under a name: to listen only."""

    name: str

    def __str__(self) -> str:
        return f"systemd:{self.name}"


Endpoint: TypeAlias = Tcp | Vsock | Unix | HybridVsock | Systemd
"""Whatever can be dialled or listened on."""

_KindOrAny: TypeAlias = type[Tcp] | type[Vsock] | None
_EXAMPLES: Final[dict[_KindOrAny, str]] = {
    Tcp: "HOST:PORT, as in 192.0.2.1:6980",
    Vsock: "CID:PORT, as in 16:8888",
    None: "HOST:PORT, as in 192.0.2.1:6980, vsock://CID:PORT or unix:/PATH",
}
_SCHEMES: Final[dict[_KindOrAny, str]] = {
    Tcp: "tcp://HOST:PORT",
    Vsock: "vsock://CID:PORT",
    None: "tcp://HOST:PORT, vsock://CID:PORT, unix:PATH, unix-vsock:PATH:PORT or systemd:NAME",
}


@overload
def parse_dial(text: str) -> Endpoint: ...
@overload
def parse_dial(text: str, kind: type[Tcp]) -> Tcp: ...
@overload
def parse_dial(text: str, kind: type[Vsock]) -> Vsock: ...
def parse_dial(text: str, kind: _KindOrAny = None) -> Endpoint:
    """Parse an address to connect to, as in ``gateway:6980`` or ``vsock://3:8002``.

    Args:
        kind: the one that makes sense, where only one does. It may then lack its scheme.

    Raises:
        UsageError: any other spelling, and what can only be listened on.
    """
    endpoint = _parse(text, kind, is_listening=False)
    match endpoint:
        case Tcp(None, port):
            raise UsageError(f"{text!r} is a port without a host: write HOST:{port}, as in 192.0.2.1:{port}")
        case Tcp("0.0.0.0" | "::", port):
            raise UsageError(f"{text!r} is every address: write the one to dial, as in 127.0.0.1:{port}")
        case Tcp(_, 0):
            raise UsageError(f"{text!r}: port 0 cannot be dialled, use 1 to 65535")
        case Vsock(None, port):
            raise UsageError(f"{text!r} is any cid: write the one to dial, as in vsock://3:{port}")
        case Vsock(_, port) if port == VSOCK_PORT_ANY:
            raise UsageError(f"{text!r}: port {port} means any port and cannot be dialled, use 0 to {port - 1}")
        case Systemd():
            raise UsageError(f"{text!r} can only be listened on: write what to dial, as in tcp://HOST:PORT")
    return endpoint


@overload
def parse_listen(text: str) -> Endpoint: ...
@overload
def parse_listen(text: str, kind: type[Tcp]) -> Tcp: ...
@overload
def parse_listen(text: str, kind: type[Vsock]) -> Vsock: ...
def parse_listen(text: str, kind: _KindOrAny = None) -> Endpoint:
    """Parse an address to listen on, as in ``6980``, ``[::1]:6980``, ``vsock://:8888`` or ``systemd:web``.

    Args:
        kind: the one that makes sense, where only one does. It may then lack its scheme.

    Raises:
        UsageError: any other spelling.
    """
    return _parse(text, kind, is_listening=True)


def _parse(text: str, kind: _KindOrAny, *, is_listening: bool) -> Endpoint:
    if not text:
        raise UsageError(f"an empty address: write {_EXAMPLES[kind]}")
    spelling = text if kind is not None else translate(text, is_listening=is_listening) or text
    with_path = _WITH_PATH.fullmatch(spelling)
    if with_path is None or (kind is not None and _DIGITS.fullmatch(with_path["rest"])):
        return _parse_numbered(text, spelling, kind, is_listening=is_listening)
    scheme, rest = with_path.groups()
    if kind is not None:
        raise UsageError(f"{text!r}: {scheme}: is not known here, write {_SCHEMES[kind]}")
    if _DIGITS.fullmatch(rest):
        raise UsageError(f"{text!r} has two meanings: write tcp://{scheme}:{rest} for the host, or {scheme}:./{rest}")
    if scheme == "systemd":
        if not _DESCRIPTOR_NAME.fullmatch(rest):
            raise UsageError(f"{text!r}: {rest!r} is no FileDescriptorName= of a socket unit, write systemd:NAME")
        return Systemd(rest)
    if scheme == "unix":
        return Unix(_path(text, rest))
    path, colon, port = rest.rpartition(":")
    if not colon or path.startswith("@"):
        raise UsageError(f"{text!r}: write the path and the guest's port, as in unix-vsock:/run/vm.vsock:8888")
    endpoint = HybridVsock(_path(text, path), _vsock_port(text, port))
    if endpoint.port == VSOCK_PORT_ANY:
        raise UsageError(f"{text!r}: port {port} means any port, use 0 to {VSOCK_PORT_ANY - 1}")
    if is_listening:
        _path(text, endpoint.listening.path)
    return endpoint


def _parse_numbered(text: str, spelling: str, kind: _KindOrAny, *, is_listening: bool) -> Endpoint:
    """Parse what ends in a port and has no path in it."""
    if any(character.isspace() for character in spelling):
        raise UsageError(f"{text!r} has a space in it: write {_EXAMPLES[kind]}")
    scheme, separator, rest = spelling.rpartition("://")
    if kind is None and not separator and spelling.startswith(("/", "./", "../", "@")):
        raise UsageError(f"{text!r} names no port: for a unix socket write unix:{spelling}")
    if scheme == "vsock" and kind is not Tcp:
        return _vsock(text, rest, may_lack_colon=False)
    if kind is Vsock and not separator:
        return _vsock(text, rest, may_lack_colon=is_listening)
    if scheme == "tcp" or not separator:
        if kind is not Vsock:
            return Tcp(*_host_and_port(text, rest, kind))
    elif kind is None and scheme in ("tcp4", "tcp6"):
        return _tcp_of_family(text, rest, 4 if scheme == "tcp4" else 6)
    raise UsageError(f"{text!r}: {scheme}:// is not known here, write {_SCHEMES[kind]}")


def _tcp_of_family(text: str, rest: str, family: Literal[4, 6]) -> Tcp:
    host, port = _host_and_port(text, rest, Tcp)
    if host and (":" in host if family == 4 else _NUMBER.fullmatch(host.rpartition(".")[2])):
        raise UsageError(f"{text!r}: {host!r} is not an IPv{family} address, write tcp://{rest}")
    return Tcp(host, port, family)


def _host_and_port(text: str, rest: str, kind: _KindOrAny) -> tuple[str | None, int]:
    """Split any spelling of a TCP address; the host is None where there is none."""
    if rest.startswith("["):
        match = _BRACKETS.fullmatch(rest)
        if match is None or match["port"] is None:
            raise UsageError(f"{text!r}: write an IPv6 address and its port as in [2001:db8::1]:6980")
        return _ipv6(text, match["host"]), _tcp_port(text, match["port"])
    if rest.count(":") > 1:
        raise UsageError(f"{text!r}: an IPv6 address needs brackets, as in [2001:db8::1]:6980")
    host, colon, port = rest.partition(":")
    if not colon:
        if not rest.isdecimal():
            raise UsageError(f"{text!r} names no port: write HOST:PORT, as in {rest}:6980")
        host, port = "", rest
    if kind is None and colon and _DIGITS.fullmatch(host):
        raise UsageError(f"{text!r}: {host!r} is not an IPv4 address; for that cid write vsock://{rest}")
    return _name_or_ipv4(text, host) or None, _tcp_port(text, port)


def _tcp_port(text: str, digits: str) -> int:
    if not _DIGITS.fullmatch(digits) or len(digits) > 5 or int(digits) > 65535:
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


def _vsock(text: str, rest: str, *, may_lack_colon: bool) -> Vsock:
    cid, colon, port = rest.rpartition(":")
    if not colon and not may_lack_colon:
        raise UsageError(f"{text!r}: write vsock://CID:PORT, as in vsock://16:8888, or to listen vsock://:8888")
    return Vsock(_cid(text, cid) if cid else None, _vsock_port(text, port))


def _cid(text: str, word: str) -> int | None:
    number = _CID_NAMES.get(word)
    if number is None:
        if not _DIGITS.fullmatch(word) or int(word) > CID_ANY:
            names = ", ".join(_CID_NAMES)
            raise UsageError(f"{text!r}: {word!r} is no cid: write a number, as in vsock://16:8888, or {names}")
        number = int(word)
    return None if number == CID_ANY else number


def _vsock_port(text: str, digits: str) -> int:
    if not _DIGITS.fullmatch(digits) or int(digits) > VSOCK_PORT_ANY:
        raise UsageError(f"{text!r}: vsock port {digits!r} is not a number from 0 to {VSOCK_PORT_ANY - 1}")
    return int(digits)


def _path(text: str, path: str) -> str:
    """Check the path of a unix socket, and return it with one slash where it starts with several."""
    if path.startswith("//") and not path.startswith("///"):
        raise UsageError(f"{text!r}: write unix:/PATH or unix:///PATH, and ./PATH for one that is relative")
    if path in ("", "@") or not path.isprintable() or path != path.strip():
        raise UsageError(f"{text!r}: {path!r} is no path of a socket, write it as in unix:/run/app.sock")
    path = "/" + path.lstrip("/") if path.startswith("/") else path
    length = len(path.removeprefix("@").encode())
    if length > SUN_PATH_LIMIT_BYTES:
        raise UsageError(f"{text!r}: {path!r} is {length} bytes long, of {SUN_PATH_LIMIT_BYTES}: choose a shorter path")
    return path
