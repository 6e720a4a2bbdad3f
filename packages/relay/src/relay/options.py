"""Turn what the command line says, or the file that it names, into a configuration. The options are in cli.py."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from enlink.endpoint import Endpoint, Tcp, Vsock, parse_dial, parse_listen
from enlink.errors import ConfigError, UsageError

from relay.config import BRIDGE_SETTINGS, RELAY_SETTINGS, BridgeConfig, RelayConfig, Setting, parse_file

_CLASSIC: Final = ("tcp_address", "vsock_address", "tcp_to_vsock", "mock_vsock")


def given_options(options: argparse.Namespace) -> list[str]:
    """Return which options say what to relay, and how; before a command, if there is one."""
    names = (*_CLASSIC, "listen", "target", "config", *BRIDGE_SETTINGS, *RELAY_SETTINGS)
    values = ((name, getattr(options, name.replace("-", "_"))) for name in names)
    return [f"--{name.replace('_', '-')}" for name, value in values if not (value in (None, []) or value is False)]


def read_file(options: argparse.Namespace) -> str | None:
    """Return the configuration file's text; None if there is to be none.

    Raises:
        ConfigError: it cannot be read, or there are other options beside it.
    """
    if options.config is None:
        return None
    if given_options(options) != ["--config"]:
        raise ConfigError(f"--config {options.config} says it all: put the other options into that file")
    return _read(options.config)


def to_config(options: argparse.Namespace, file: str | None) -> RelayConfig:
    """Understand the command line or, where there is one, the text of the configuration file.

    Raises:
        UsageError: options are missing, or of no use together.
        ConfigError: they contradict each other, or the file is wrong.
    """
    if file is not None:
        return parse_file(file, str(options.config))
    settings = _values(options, BRIDGE_SETTINGS)
    bridges = (BridgeConfig(listen=listen, target=target, **settings) for listen, target in _pairs(options))
    return RelayConfig(bridges=tuple(bridges), **_values(options, RELAY_SETTINGS))


def _values(options: argparse.Namespace, settings: Mapping[str, Setting]) -> dict[str, Any]:
    return {
        setting.field: tuple(given) if setting.is_list else given
        for option, setting in settings.items()
        if (given := getattr(options, option.replace("-", "_"))) is not None
    }


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise ConfigError(f"cannot read {path} ({reason}): name another file with --config") from error


def _classic(options: argparse.Namespace) -> list[str]:
    """The options of the classic command line that were given."""
    classic = [f"--{name.replace('_', '-')}" for name in _CLASSIC]
    return [option for option in given_options(options) if option in classic]


def _pairs(options: argparse.Namespace) -> list[tuple[Endpoint, Endpoint]]:
    classic = _classic(options)
    if not classic and not options.listen and not options.target:
        raise UsageError(
            "nothing to relay: give --listen and --target, or --tcp-address and --vsock-address, or --config;"
            " see relay --help"
        )
    if classic and (options.listen or options.target):
        raise ConfigError(f"{classic[0]} and --listen or --target are two ways to say it: use one")
    if not classic:
        if len(options.listen) != len(options.target):
            raise UsageError(
                f"--listen is there {len(options.listen)} times and --target {len(options.target)} times:"
                " give each --listen its --target"
            )
        return list(zip(options.listen, options.target, strict=True))
    for name in _CLASSIC[:2]:
        if getattr(options, name) is None:
            missing = f"--{name.replace('_', '-')}"
            raise UsageError(f"{missing} is missing: {classic[0]} goes with both --tcp-address and --vsock-address")
    kind: Any = Tcp if options.mock_vsock else Vsock
    tcp, vsock = ("--tcp-address", options.tcp_address, Tcp), ("--vsock-address", options.vsock_address, kind)
    listen, dial = (tcp, vsock) if options.tcp_to_vsock else (vsock, tcp)
    return [(_endpoint(parse_listen, *listen), _endpoint(parse_dial, *dial))]


def _endpoint(parse: Any, option: str, text: str, kind: type[Tcp | Vsock]) -> Endpoint:
    try:
        endpoint: Endpoint = parse(text, kind)
    except UsageError as error:
        raise UsageError(f"{option}: {error}; see relay --help") from error
    return endpoint
