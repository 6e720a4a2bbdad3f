"""What the command line asks of an agent, as a checked value. Does no I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from enlink.attestation import Attestation
from enlink.endpoint import Tcp
from enlink.frame import Wire

from enta.capture.plan import Plan

FirewallChoice = Literal["auto", "nftables", "iptables"]

DEFAULT_GATEWAY: Final = "127.0.0.1:6980"  # the original's


@dataclass(frozen=True, slots=True)
class AgentConfig:
    """An agent.

    Attributes:
        plan: what it does to this host.
        gateways: where its links go: at least one; several share the connections that are captured.
        wire: ``original`` for a gateway that knows no control messages.
        firewall: which packet filter to use; ``auto`` takes nftables, and iptables where that cannot be had.
        attestation: how the link to the gateway is attested; None: it is plain.
        is_once: end when the gateway cannot be reached or has gone, instead of trying again.
        spin_s: after traffic, how long to look for more before sleeping.
    """

    plan: Plan
    gateways: tuple[Tcp, ...]
    wire: Wire = "auto"
    firewall: FirewallChoice = "auto"
    is_once: bool = False
    attestation: Attestation | None = None
    spin_s: float = 0.0
