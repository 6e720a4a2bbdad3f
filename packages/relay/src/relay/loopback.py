"""Brings the loopback device up, which is down and has no address in a Nitro enclave and in a new network namespace."""

from __future__ import annotations

import errno
from typing import Final

from enlink.errors import NotPermitted, SystemFailure

_ADDRESSES: Final = (("127.0.0.1", 8), ("::1", 128))
# It is there already, or this kernel has no IPv6.
_HARMLESS: Final = (errno.EEXIST, errno.EAFNOSUPPORT, errno.EOPNOTSUPP, errno.EACCES)


def set_up_loopback() -> None:
    """Give the loopback device its addresses, and bring it up; done again, it changes nothing.

    Raises:
        NotPermitted: this needs CAP_NET_ADMIN.
        SystemFailure: the kernel refuses.
    """
    from pyroute2 import IPRoute  # type: ignore[import-untyped]  # ships no types, and takes a tenth of a second to load
    from pyroute2.netlink.exceptions import NetlinkError  # type: ignore[import-untyped]  # ships no types

    try:
        with IPRoute() as netlink:
            (index,) = netlink.link_lookup(ifname="lo")
            netlink.link("set", index=index, state="up")
            for address, length in _ADDRESSES:
                try:
                    netlink.addr("add", index=index, address=address, prefixlen=length)
                except NetlinkError as error:
                    if error.code not in _HARMLESS:
                        raise
    except NetlinkError as error:
        if error.code == errno.EPERM:
            raise NotPermitted(
                "--setup-loopback needs CAP_NET_ADMIN: run as root, or leave it out where lo is up already"
            ) from error
        raise SystemFailure(f"cannot bring the loopback device up: {error}") from error
