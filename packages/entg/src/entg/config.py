"""What the command line asks of a gateway, as a checked value. Does no I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from enlink.attestation import Attestation
from enlink.endpoint import Tcp
from enlink.errors import ConfigError
from enlink.frame import Wire

DEFAULT_ENTA_PORT: Final = 6980
DEFAULT_ENTG_PORT: Final = 6979


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """A gateway with one leg to ENTAs and one to a peer ENTG.

    Attributes:
        enta_listen: where ENTAs connect.
        entg_listen: where the peer ENTG connects; exactly one of this and *entg_connect* is given.
        entg_connect: where the peer ENTG is.
        wire: ``original`` if the peers are original ones, which know no control messages.
        grace_s: how long an orderly stop may take to pass on what has arrived.
        enta_attestation, entg_attestation: how the links of a leg are attested; None: they are plain.
        spin_s: after traffic, how long to look for more before sleeping.
    """

    enta_listen: Tcp = Tcp(None, DEFAULT_ENTA_PORT)
    entg_listen: Tcp | None = None
    entg_connect: Tcp | None = None
    wire: Wire = "auto"
    grace_s: float = 10.0
    enta_attestation: Attestation | None = None
    entg_attestation: Attestation | None = None
    spin_s: float = 0.0

    def __post_init__(self) -> None:
        if (self.entg_listen is None) == (self.entg_connect is None):
            raise ConfigError(
                "give --entg-connect or --entg-listen, not both and not neither: one gateway dials, one listens"
            )
        if self.entg_listen is not None and _overlap(self.entg_listen, self.enta_listen):
            raise ConfigError(
                f"--enta-listen and --entg-listen both want port {self.enta_listen.port}: give each leg its own"
            )


def _overlap(one: Tcp, other: Tcp) -> bool:
    return one.port == other.port != 0 and (one.host == other.host or one.host is None or other.host is None)
