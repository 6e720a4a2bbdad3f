"""Brings the loopback device up, which is down and has no address in a Nitro enclave and in a new network namespace."""

from __future__ import annotations

import errno
import fcntl
import logging
import socket
import struct
from collections.abc import Iterable
from ipaddress import ip_address
from typing import Final

from enlink.endpoint import Endpoint
from enlink.errors import NotPermitted, SystemFailure
from enlink.program import log_event

# linux/sockios.h, and linux/if.h for the flag and for struct ifreq, of which the flags follow 16 bytes of a name.
_SIOCGIFFLAGS: Final = 0x8913
_IFF_UP: Final = 1
_IFREQ: Final = struct.Struct("16sH22x")

_ADDRESSES: Final = (("127.0.0.1", 8), ("::1", 128))
# It is there already, or this kernel has no IPv6.
_HARMLESS: Final = (errno.EEXIST, errno.EAFNOSUPPORT, errno.EOPNOTSUPP, errno.EACCES)
_logger = logging.getLogger(__name__)


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


def warn_if_unreachable(endpoint: Endpoint, listeners: Iterable[socket.socket]) -> None:
    """Log a warning if one of the sockets that listen on *endpoint* is on a loopback device that is down.

    The kernel binds an address of 127.0.0.0/8 all the same, and then nobody can connect. Not an error: somebody may
    bring the device up later.
    """
    if any(_is_on_loopback(listener) and not _is_loopback_up(listener) for listener in listeners):
        advice = "bring lo up, as --setup-loopback does: until then nobody can connect"
        log_event(_logger, "loopback_is_down", logging.WARNING, listen=endpoint, advice=advice)


def _is_on_loopback(listener: socket.socket) -> bool:
    if listener.family not in (socket.AF_INET, socket.AF_INET6):
        return False
    return ip_address(listener.getsockname()[0]).is_loopback


def _is_loopback_up(sock: socket.socket) -> bool:
    try:
        answer = fcntl.ioctl(sock, _SIOCGIFFLAGS, _IFREQ.pack(b"lo", 0))
    except OSError:  # the device has another name, or this kernel does not tell
        return True
    _, flags = _IFREQ.unpack(answer)
    return bool(flags & _IFF_UP)
