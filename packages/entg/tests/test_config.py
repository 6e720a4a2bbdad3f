"""What a gateway is asked for: values that contradict each other."""

from __future__ import annotations

import pytest
from enlink.endpoint import Tcp, parse_listen
from enlink.errors import ConfigError
from entg.config import DEFAULT_ENTA_PORT, DEFAULT_ENTG_PORT, GatewayConfig

PEER = Tcp("192.0.2.1", 6979)


def test_default_ports_are_the_documented_ones() -> None:
    assert (DEFAULT_ENTA_PORT, DEFAULT_ENTG_PORT) == (6980, 6979)
    assert GatewayConfig(entg_connect=PEER).enta_listen == Tcp(None, 6980)


def test_a_gateway_dials_its_peer_or_listens_for_it() -> None:
    assert GatewayConfig(entg_connect=PEER).entg_listen is None
    assert GatewayConfig(entg_listen=Tcp(None, 6979)).entg_connect is None
    for listen, connect in ((Tcp(None, 6979), PEER), (None, None)):
        with pytest.raises(ConfigError, match="--entg-connect or --entg-listen, not both"):
            GatewayConfig(entg_listen=listen, entg_connect=connect)


@pytest.mark.parametrize(
    ("enta", "entg"),
    [("7000", "7000"), ("127.0.0.1:7000", "7000"), ("7000", "127.0.0.1:7000"), ("[::1]:7000", "[::1]:7000")],
)
def test_two_legs_cannot_share_a_port(enta: str, entg: str) -> None:
    with pytest.raises(ConfigError, match="both want port 7000"):
        GatewayConfig(parse_listen(enta, Tcp), parse_listen(entg, Tcp))


@pytest.mark.parametrize(("enta", "entg"), [("7000", "7001"), ("127.0.0.1:7000", "127.0.0.2:7000"), ("0", "0")])
def test_two_legs_may_have_ports_or_addresses_of_their_own(enta: str, entg: str) -> None:
    config = GatewayConfig(parse_listen(enta, Tcp), parse_listen(entg, Tcp))
    assert (config.enta_listen, config.entg_listen) == (parse_listen(enta, Tcp), parse_listen(entg, Tcp))
