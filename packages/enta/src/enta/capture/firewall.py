"""What the agent asks of a packet filter, whichever one the host has. `nftables` and `iptables` provide it."""

from __future__ import annotations

from typing import Literal, Protocol


class Firewall(Protocol):
    """The guard and the capture rules of one plan. Blocking and quick (tens of milliseconds); not thread-safe.

    Each ``add_`` replaces what an earlier, dead instance of the same name left, in one transaction and without a
    moment in between, and may be called again to restore what somebody removed. Each ``delete_`` is quiet when
    nothing is there.

    Raises:
        CannotCreate: another live agent holds this instance's rules.
        NotPermitted: no CAP_NET_ADMIN.
        Unavailable: the library or kernel feature is missing.
        SystemFailure: the kernel refused for another reason.
    """

    backend: Literal["nftables", "iptables"]

    def add_guard(self) -> None:
        """Claim the instance; unless the plan fails open, drop captured traffic that would leave by another device.

        Comes first. Until it has returned nothing on the host is this instance's.
        """

    def delete_guard(self) -> None: ...

    def add_capture(self) -> None:
        """Send captured packets into the tunnel (client), or the tunnel's packets to the servers' ports (server).

        Also keeps everything else that comes out of the tunnel away from this host and from those behind it.
        """

    def delete_capture(self) -> None: ...

    def missing(self) -> list[str]:
        """Name what should be there and is not, or is not as it should be: any of "guard" and "capture"."""

    def close(self) -> None:
        """Release the connection to the kernel. What the kernel ties to it (an owned table) goes with it."""
