"""A relay never promises more connections than it has descriptors for."""

from __future__ import annotations

import pytest
from enlink.endpoint import Tcp
from enlink.errors import ConfigError
from enlink.pipes import MAX_PIPES
from hypothesis import assume, given
from hypothesis import strategies as st
from relay.config import BridgeConfig, RelayConfig
from relay.descriptors import fit, pipes_for

COUNTS = st.lists(st.integers(1, 100_000), min_size=1, max_size=5)


def config_of(counts: list[int]) -> RelayConfig:
    target = Tcp("127.0.0.1", 1)
    return RelayConfig(
        bridges=tuple(
            BridgeConfig(listen=Tcp(None, port), target=target, max_connections=count)
            for port, count in enumerate(counts, 2)
        )
    )


@pytest.mark.proves("G15")
@given(COUNTS, st.integers(0, 1_000_000))
def test_connections_and_pipes_fit_into_any_limit(counts: list[int], limit: int) -> None:
    assume((limit - 64) // 2 >= len(counts))
    config = fit(config_of(counts), limit)
    connections = [bridge.max_connections for bridge in config.bridges]
    pipes = pipes_for(config, limit)
    assert all(1 <= fitted <= wanted for fitted, wanted in zip(connections, counts, strict=True))
    assert 2 * sum(connections) + 2 * pipes + 64 <= limit
    assert 0 <= pipes <= MAX_PIPES
    if 2 * sum(counts) + 64 <= limit:
        assert connections == counts


def test_a_limit_without_room_for_one_connection_of_each_is_refused() -> None:
    fit(config_of([5, 5]), 68)
    with pytest.raises(ConfigError, match="a limit of 67 descriptors has no room for connections"):
        fit(config_of([5, 5]), 67)
