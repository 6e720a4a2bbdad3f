"""How many connections and pipes the limit on descriptors has room for."""

from __future__ import annotations

import logging
import resource
from dataclasses import replace
from typing import Final

from enlink.errors import ConfigError
from enlink.pipes import MAX_PIPES
from enlink.program import log_event

from relay.config import BridgeConfig, RelayConfig

# Choices of ours.
_OTHERS: Final = 64  # listeners, the log, the status socket, name look-ups
_ENDS: Final = 2  # of a connection, and of a pipe

_logger = logging.getLogger(__name__)


def raise_limit() -> int:
    """Raise this process's limit on descriptors as far as it may, and return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def fit(config: RelayConfig, limit: int) -> RelayConfig:
    """Return *config* with as many connections as *limit* descriptors allow, and warn if these are fewer.

    Raises:
        ConfigError: not even one connection for each bridge.
    """
    room = (limit - _OTHERS) // _ENDS
    wanted = sum(bridge.max_connections for bridge in config.bridges)
    if wanted <= room:
        return config
    if room < len(config.bridges):
        raise ConfigError(f"a limit of {limit} descriptors has no room for connections: raise it with ulimit -n")

    count = len(config.bridges)

    def share(bridge: BridgeConfig) -> BridgeConfig:
        """One connection for each bridge, and its part of the rest."""
        more = (bridge.max_connections - 1) * (room - count) // (wanted - count)
        return replace(bridge, max_connections=1 + more)

    log_event(_logger, "connections_limited", logging.WARNING, wanted=wanted, allowed=room, descriptors=limit)
    return replace(config, bridges=tuple(map(share, config.bridges)))


def pipes_for(config: RelayConfig, limit: int) -> int:
    """Return how many pipes there is room for beside all the connections."""
    connections = sum(bridge.max_connections for bridge in config.bridges)
    return max(0, min(MAX_PIPES, (limit - _OTHERS) // _ENDS - connections))
