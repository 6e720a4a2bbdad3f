"""Understand the command line and the allow-list of AWS's vsock-proxy, so that the relay can take its place.

What is accepted, and the defaults, are those of vsock-proxy in aws-nitro-enclaves-cli. Its list holds exact addresses,
as names or as IP addresses, which match a target that is spelled so or has that address: a target that is an address
may be that of a listed name, which is looked up once, at the start. A target that is a name must be listed itself, or
its addresses must: vsock-proxy takes it as well if at the start it shares an address with a listed name, and goes on
wherever it leads later. Where vsock-proxy would go on with an entry that it cannot use, or cut a port to 16 bits, this
is an error here.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_address
from pathlib import Path
from typing import Final, Literal, TypeAlias

from enlink.endpoint import VSOCK_PORT_ANY, Tcp, Vsock
from enlink.errors import ConfigError, Unavailable, UsageError

from relay.addresses import Address, plain
from relay.allowlist import AllowList, NameRule, Rule, canonical_name, rule_for

DEFAULT_FILE: Final = Path("/etc/nitro_enclaves/vsock-proxy.yaml")
DEFAULT_WORKERS: Final = 4
_MOST_WORKERS: Final = 2**31 - 1
_ENTRY: Final = "- {address: kms.us-east-1.amazonaws.com, port: 443}"

Resolve: TypeAlias = Callable[[str, Literal[4, 6] | None], Awaitable[Sequence[Address]]]


@dataclass(frozen=True, slots=True)
class VsockProxy:
    """What a command line of vsock-proxy asks for.

    Attributes:
        listen: on every cid that this machine has; vsock-proxy has 3 there, the parent's own.
        target: with the family, if only one is wanted.
        allow: the entries of the list, of which at least one allows the target or may allow its addresses.
        max_connections: so many at once, which vsock-proxy calls workers; more wait in the backlog.
        list_file: where the list is.
        names: listed names, of which one must lead to the target, an address that is not listed itself; see `settle`.
    """

    listen: Vsock
    target: Tcp
    allow: tuple[Rule, ...]
    max_connections: int
    list_file: Path
    names: tuple[str, ...] = ()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give *parser* the arguments of vsock-proxy, for `from_options`."""
    parser.add_argument("local_port", type=_number("local_port", 0, VSOCK_PORT_ANY - 1), help="vsock port to listen on")
    parser.add_argument("remote_addr", type=_host, help="name or address to connect to")
    parser.add_argument("remote_port", type=_number("remote_port", 1, 65535), help="TCP port to connect to")
    families = parser.add_mutually_exclusive_group()
    families.add_argument("-4", "--ipv4", action="store_true", default=False, help="use IPv4 addresses only")
    families.add_argument("-6", "--ipv6", action="store_true", default=False, help="use IPv6 addresses only")
    parser.add_argument(
        "-w",
        "--num_workers",
        metavar="N",
        type=_number("--num_workers", 1, _MOST_WORKERS),
        default=DEFAULT_WORKERS,
        help=f"connections at a time; more wait (default: {DEFAULT_WORKERS})",
    )
    parser.add_argument(
        "--config",
        dest="allowlist_file",
        metavar="FILE",
        type=Path,
        default=DEFAULT_FILE,
        help=f"YAML file of what may be connected to (default: {DEFAULT_FILE})",
    )


def from_options(options: argparse.Namespace) -> VsockProxy:
    """Turn what `add_arguments` has parsed into values, and read the list.

    Raises:
        UsageError: the target is an address of the family that is not wanted.
        ConfigError: the list cannot be read or understood, or cannot have the target.
    """
    family: Literal[4, 6] | None = 4 if options.ipv4 else 6 if options.ipv6 else None
    host, port = options.remote_addr, options.remote_port
    if family not in (None, _version(host) or family):
        raise UsageError(f"remote_addr {host!r} is no IPv{family} address: leave out -{family}")
    file: Path = options.allowlist_file
    allow = read_allowlist(file)
    names: tuple[str, ...] = ()
    if not AllowList(allow).judge_host(host, port).is_allowed:
        if _version(host):
            names = tuple(rule.name for rule in allow if isinstance(rule, NameRule) and port in rule.ports)
        if not names:
            raise _not_allowed(file, host, port)
    return VsockProxy(Vsock(None, options.local_port), Tcp(host, port, family), allow, options.num_workers, file, names)


async def settle(proxy: VsockProxy, resolve: Resolve) -> VsockProxy:
    """Return *proxy* as it is, or with its target allowed because one of its `names` leads there now.

    An address that the name may not lead to, such as a metadata service's, is not allowed by that.

    Raises:
        ConfigError: none does.
    """
    host, port = proxy.target.host or "", proxy.target.port
    judge = AllowList(proxy.allow)
    for name in proxy.names:
        try:
            addresses = await resolve(name, proxy.target.family)
        except Unavailable:  # the resolver has said so
            continue
        verdicts = judge.judge_answer(name, port, addresses)
        allowed = [plain(address) for address, verdict in zip(addresses, verdicts, strict=True) if verdict.is_allowed]
        if plain(ip_address(host)) in allowed:
            return replace(proxy, allow=(*proxy.allow, rule_for(host, port)), names=())
    if proxy.names:
        raise _not_allowed(proxy.list_file, host, port)
    return proxy


def _not_allowed(file: Path, host: str, port: int) -> ConfigError:
    entry = f"- {{address: '{host}', port: {port}}}"
    return ConfigError(f"{file} does not allow {host} port {port}: add {entry} to its allowlist")


def read_allowlist(path: Path) -> tuple[Rule, ...]:
    """Return the rules of a vsock-proxy.yaml.

    Raises:
        ConfigError: it cannot be read, or is none; the text has the file and, as far as there is one, the line.
    """
    import yaml  # takes 20 ms, and only this needs it

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise ConfigError(f"cannot read the allow-list {path} ({reason}): name another one with --config") from error

    def wrong(where: yaml.Node | yaml.Mark | None, expected: str) -> ConfigError:
        mark = where.start_mark if isinstance(where, yaml.Node) else where
        line = mark.line + 1 if mark else 1
        return ConfigError(f"{path} line {line}: expected {expected}")

    def field(node: yaml.Node | None, name: str, expected: str) -> yaml.Node:
        pairs: list[tuple[yaml.Node, yaml.Node]] = node.value if isinstance(node, yaml.MappingNode) else []
        found = [value for key, value in pairs if isinstance(key, yaml.ScalarNode) and key.value == name]
        if len(found) != 1:
            raise wrong(node, expected)
        return found[0]

    def rule(entry: yaml.Node) -> Rule:
        form = f"an entry with one address and one port, as in {_ENTRY}"
        address, port = field(entry, "address", form), field(entry, "port", form)
        number = port.value if port.tag == "tag:yaml.org,2002:int" and re.fullmatch("[0-9]{1,9}", port.value) else "0"
        if not 1 <= int(number) <= 65535:
            raise wrong(port, f"a port from 1 to 65535, without quotes, as in {_ENTRY}")
        try:
            # YAML 1.1 takes some IPv6 addresses for numbers to the base of 60.
            is_text = address.tag == "tag:yaml.org,2002:str" or ":" in address.value
            return rule_for(address.value if is_text else "", int(number))
        except UsageError as error:
            raise wrong(address, f"a host name or an IP address, as in {_ENTRY}") from error

    try:
        document = next(yaml.compose_all(text, Loader=yaml.SafeLoader), None)
    except yaml.MarkedYAMLError as error:
        raise wrong(error.problem_mark, f"YAML, but {error.problem}") from error
    # PyYAML lets these through from escapes for characters that do not exist, and from thousands of brackets.
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise ConfigError(f"{path}: expected YAML, but {str(error).splitlines()[0]}") from error
    allowlist = field(document, "allowlist", f"allowlist: with entries such as {_ENTRY}")
    if not isinstance(allowlist, yaml.SequenceNode):
        raise wrong(allowlist, f"a list of entries such as {_ENTRY}")
    return tuple(map(rule, allowlist.value))


def _host(text: str) -> str:
    rule_for(text, 1)  # raises UsageError if it is neither a name nor an address
    return text if text.isascii() else canonical_name(text)


def _version(host: str) -> int | None:
    try:
        return ip_address(host).version
    except ValueError:
        return None


def _number(name: str, least: int, most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch("[0-9]{1,10}", text) or not least <= int(text) <= most:
            raise UsageError(f"{text!r} is not a number from {least} to {most}")
        return int(text)

    parse.__name__ = name
    return parse
