"""What the command line or a file asks of a relay, as checked values. Does no I/O.

A file holds, in TOML, the command line's options without their dashes: those of the whole program, those that hold for
every bridge, and a table for each bridge, where its own options stand beside ``listen`` and ``target``::

    workers = 2
    idle-timeout = "5m"

    [[bridge]]
    listen = "vsock://:8888"
    target = "tcp://127.0.0.1:8443"

    [[bridge]]
    listen = "tcp://127.0.0.1:8080"
    target = "vsock://parent:8080"
    idle-timeout = "1h"
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from enlink.duration import parse_duration_s, parse_spin_s
from enlink.endpoint import Endpoint, Tcp, Vsock, parse_dial, parse_listen
from enlink.errors import ConfigError, UsageError

from relay.allowlist import Rule, parse_rule

_SIZE = re.compile(r"(?P<number>[0-9]{1,10})(?P<unit>k|m|ki|mi|kib|mib)?", re.IGNORECASE)
_UNIT_BYTES: Final = {"k": 1024, "m": 1024 * 1024}


@dataclass(frozen=True, slots=True, kw_only=True)
class BridgeConfig:
    """One listening endpoint and where its connections lead.

    Attributes:
        allow: what may be dialled, of TCP and vsock; empty: the target, whatever it is.
        max_connections: so many at once; more wait in the backlog.
        connect_timeout_s: for reaching the target, name look-up included.
        idle_timeout_s: a connection on which nothing moves for so long is ended; None: never.
        max_lifetime_s: a connection is ended so long after its start; None: never.
        half_close_timeout_s: after one side has finished, a connection on which nothing moves for so long is ended.
        proxy_protocol: tell the target who connects, in a header before the first byte.
        vsock_buffer_bytes: what a vsock socket may hold in either direction; None: the kernel's own 256 KiB.
    """

    listen: Endpoint
    target: Endpoint
    allow: tuple[Rule, ...] = ()
    max_connections: int = 1024
    connect_timeout_s: float = 10.0
    idle_timeout_s: float | None = None
    max_lifetime_s: float | None = None
    half_close_timeout_s: float | None = None
    proxy_protocol: bool = False
    vsock_buffer_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.allow and not _is_ruled(self.target):
            raise ConfigError(f"no rule can be about {self.target}, only about TCP and vsock: leave allow out there")


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayConfig:
    """All bridges of a relay, and what concerns the program as a whole.

    Attributes:
        grace_s: how long connections may go on after the wish to stop.
        workers: processes that share the listening sockets, and each bridge's connections.
        setup_loopback: bring the loopback device up first, which an enclave does not.
        no_splice: copy every byte, where otherwise many go through pipes in the kernel.
        spin_s: after traffic, how long each process looks for more before it sleeps.
    """

    bridges: tuple[BridgeConfig, ...]
    grace_s: float = 10.0
    workers: int = 1
    setup_loopback: bool = False
    no_splice: bool = False
    spin_s: float = 0.0

    def __post_init__(self) -> None:
        if not self.bridges:
            raise ConfigError("there is nothing to do: give --listen and --target, or a file with a [[bridge]] in it")
        seen: set[Endpoint] = set()
        for bridge in self.bridges:
            if bridge.listen in seen:
                raise ConfigError(f"{bridge.listen} is listened on twice: give each bridge an address of its own")
            seen.add(bridge.listen)
            if bridge.max_connections < self.workers:
                raise ConfigError(
                    f"{bridge.max_connections} connections cannot be shared by {self.workers} workers:"
                    " raise --max-concurrent-connections or lower --workers"
                )
        self._refuse_circles()

    def _refuse_circles(self) -> None:
        """A connection would go round until every bridge on the way is full."""
        leads: dict[Endpoint | None, Endpoint] = {bridge.listen: bridge.target for bridge in self.bridges}
        for listen, target in leads.items():
            there: Endpoint | None = target
            for _ in leads:
                if there == listen:
                    by_way_of = "" if target == listen else f" by way of {target}"
                    raise ConfigError(f"{listen} leads to itself{by_way_of}: give another --target")
                there = leads.get(there)


@dataclass(frozen=True, slots=True)
class Setting:
    """An option that a file may have too: the field that it fills, and how its text becomes a value."""

    field: str
    parse: Callable[[str], object] | None = None  # None: it is there or not
    is_list: bool = False


def parse_positive_duration_s(text: str) -> float:
    """Parse a duration longer than nothing.

    Raises:
        UsageError: anything else.
    """
    seconds = parse_duration_s(text)
    if seconds <= 0:
        raise UsageError(f"{text!r} is no time at all: leave the option out, or write as in 10s")
    return seconds


def parse_count(text: str) -> int:
    """Parse a number from 1 to a million.

    Raises:
        UsageError: anything else.
    """
    if not re.fullmatch(r"[0-9]{1,7}", text) or not 1 <= int(text) <= 1_000_000:
        raise UsageError(f"{text!r} is not a number from 1 to 1000000")
    return int(text)


def parse_size_bytes(text: str) -> int:
    """Parse a size such as ``262144``, ``256k`` or ``1MiB``.

    Raises:
        UsageError: anything else, less than 4 KiB, and more than 1 GiB.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise UsageError(f"{text!r} is no size: write bytes, or as in 256k or 1m")
    size = int(match["number"]) * _UNIT_BYTES.get((match["unit"] or "b")[0].lower(), 1)
    if not 4096 <= size <= 1 << 30:
        raise UsageError(f"{text!r} is not a size from 4k to 1024m")
    return size


BRIDGE_SETTINGS: Final[dict[str, Setting]] = {
    "allow": Setting("allow", parse_rule, is_list=True),
    "max-concurrent-connections": Setting("max_connections", parse_count),
    "connect-timeout": Setting("connect_timeout_s", parse_positive_duration_s),
    "idle-timeout": Setting("idle_timeout_s", parse_positive_duration_s),
    "max-lifetime": Setting("max_lifetime_s", parse_positive_duration_s),
    "half-close-timeout": Setting("half_close_timeout_s", parse_positive_duration_s),
    "proxy-protocol": Setting("proxy_protocol"),
    "vsock-buffer": Setting("vsock_buffer_bytes", parse_size_bytes),
}
RELAY_SETTINGS: Final[dict[str, Setting]] = {
    "grace": Setting("grace_s", parse_duration_s),
    "workers": Setting("workers", parse_count),
    "setup-loopback": Setting("setup_loopback"),
    "no-splice": Setting("no_splice"),
    "spin": Setting("spin_s", parse_spin_s),
}


def parse_file(text: str, name: str) -> RelayConfig:
    """Parse a configuration file; *name* is how messages call it.

    Raises:
        ConfigError: it is not TOML, or something in it is unknown, missing or malformed.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name} is not TOML: {error}") from error
    tables = document.pop("bridge", [])
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise ConfigError(f"{name} has no bridge: write [[bridge]], and below it listen = and target =")
    for key in document:
        if key not in RELAY_SETTINGS and key not in BRIDGE_SETTINGS:
            raise ConfigError(f"{name}: {key!r} is not known: {_known(RELAY_SETTINGS | BRIDGE_SETTINGS)}")
    shared = _values(document, BRIDGE_SETTINGS, name)
    unruled = {field: value for field, value in shared.items() if field != "allow"}
    bridges = []
    for number, table in enumerate(tables, 1):
        where = f"{name}, bridge {number}"
        for key in table:
            if key not in ("listen", "target") and key not in BRIDGE_SETTINGS:
                raise ConfigError(f"{where}: {key!r} is not known: {_known(BRIDGE_SETTINGS)}")
        endpoints = {
            "listen": _value(table, "listen", parse_listen, where),
            "target": _value(table, "target", parse_dial, where),
        }
        common = shared if _is_ruled(endpoints["target"]) else unruled
        try:
            bridges.append(BridgeConfig(**common | _values(table, BRIDGE_SETTINGS, where) | endpoints))
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
    return RelayConfig(bridges=tuple(bridges), **_values(document, RELAY_SETTINGS, name))


def _is_ruled(target: Endpoint) -> bool:
    """Tell whether rules are about such a target."""
    return isinstance(target, Tcp | Vsock)


def _known(settings: Mapping[str, Setting]) -> str:
    return "it takes " + ", ".join(["listen", "target", *sorted(settings)])


def _values(table: Mapping[str, object], settings: Mapping[str, Setting], where: str) -> dict[str, Any]:
    values: dict[str, object] = {}
    for key, setting in settings.items():
        if key not in table:
            continue
        found = table[key]
        if setting.parse is None:
            if not isinstance(found, bool):
                raise ConfigError(f"{where}: {key} = {_toml(found)} is neither true nor false")
            values[setting.field] = found
        elif setting.is_list:
            if not isinstance(found, list):
                raise ConfigError(f"{where}: {key} = {_toml(found)} is no list: write it in [ ]")
            if not found:
                raise ConfigError(f"{where}: {key} = [] does not say what to {key}: list that, or leave it out")
            parse = setting.parse
            values[setting.field] = tuple(_value({key: item}, key, parse, where) for item in found)
        else:
            values[setting.field] = _value(table, key, setting.parse, where)
    return values


def _value(table: Mapping[str, object], key: str, parse: Callable[[str], object], where: str) -> Any:
    if key not in table:
        raise ConfigError(f"{where}: {key} is missing")
    found = table[key]
    if isinstance(found, bool) or not isinstance(found, str | int | float):
        value = _toml(found)
        raise ConfigError(f"{where}: {key} = {value} is neither text nor a number: write it as the option, in quotes")
    try:
        return parse(str(found))
    except UsageError as error:
        raise ConfigError(f"{where}: {key}: {error}") from error


def _toml(value: object) -> str:
    """Return a value as it may stand in a file."""
    return json.dumps(value, ensure_ascii=False, default=str)
