"""Legacy iptables as the kernel and iptables(8) tell of it: which tables are in use, their shape, the lock.

A table is named with its address family, as in "ip mangle" or "ip6 filter".
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from enlink.errors import NotPermitted, SystemFailure, Unavailable

# linux/netfilter_ipv4/ip_tables.h, ip6_tables.h: SO_GET_INFO and struct ipt_getinfo, which begins with a table's name.
_GET_INFO = 64
_INFO_SIZE_BYTES = 84

_NAMES = {"ip": "/proc/thread-self/net/ip_tables_names", "ip6": "/proc/thread-self/net/ip6_tables_names"}

# Choices of ours.
_LOCK_LIMIT_S = 5.0
_LOCK_POLL_S = 0.02


def used_tables() -> list[str]:
    """Return the tables that this network namespace has. To ask for another one's shape or rules brings it into being.

    Raises:
        NotPermitted: they are for root to see.
    """
    tables = []
    for family, path in _NAMES.items():
        try:
            tables += [f"{family} {table}" for table in Path(path).read_text().split()]
        except FileNotFoundError:  # the kernel has no legacy iptables of this family, or none yet
            continue
        except PermissionError as error:
            raise NotPermitted(f"cannot read {path} ({error.strerror}): run as root") from error
    return tables


def has_ipv6() -> bool:
    """Tell whether the kernel speaks IPv6 at all."""
    return Path("/proc/thread-self/net/if_inet6").exists()


def table_shape(table: str) -> bytes:
    """Return the kernel's summary of a table: where its chains begin, its number of rules, its size. In microseconds.

    Raises:
        NotPermitted: no CAP_NET_ADMIN, or no CAP_NET_RAW.
        Unavailable: the kernel has no such table.
    """
    try:
        return _table_info(*table.split())
    except PermissionError as error:
        raise NotPermitted(
            f"iptables table '{table}': {error.strerror}: run as root or grant CAP_NET_ADMIN and CAP_NET_RAW"
        ) from error
    except OSError as error:
        raise Unavailable(
            f"iptables table '{table}': {error.strerror}: this kernel lacks the legacy table, use --firewall nftables"
        ) from error


def _table_info(family: str, table: str) -> bytes:
    version, level = {
        "ip": (socket.AF_INET, socket.IPPROTO_IP),
        "ip6": (socket.AF_INET6, socket.IPPROTO_IPV6),
    }[family]
    libc = ctypes.CDLL(None, use_errno=True)  # Python's own getsockopt takes no name of a table
    info = ctypes.create_string_buffer(table.encode(), _INFO_SIZE_BYTES)
    size = ctypes.c_uint32(_INFO_SIZE_BYTES)
    # libiptc asks through a raw socket too; another kind would hide that CAP_NET_RAW is missing.
    with socket.socket(version, socket.SOCK_RAW, socket.IPPROTO_RAW) as asking:
        if libc.getsockopt(asking.fileno(), level, _GET_INFO, info, ctypes.byref(size)) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return info.raw


@contextmanager
def xtables_lock() -> Iterator[None]:
    """Hold the lock that iptables(8) takes around each change. Waits up to 5 s for it.

    Raises:
        NotPermitted: its file is for root to open.
        SystemFailure: its file cannot be made, or somebody held it all the time.
    """
    path = os.environ.get("XTABLES_LOCKFILE", "/run/xtables.lock")  # iptables(8), ENVIRONMENT
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        kind = NotPermitted if isinstance(error, PermissionError) else SystemFailure
        raise kind(f"cannot open {path} ({error.strerror}): run as root, or name another XTABLES_LOCKFILE") from error
    try:
        deadline = time.monotonic() + _LOCK_LIMIT_S
        while not _is_locked(descriptor):
            if time.monotonic() > deadline:
                raise SystemFailure(
                    f"another program has held {path} for {_LOCK_LIMIT_S:g} s: end it, see fuser {path}"
                )
            time.sleep(_LOCK_POLL_S)
        yield
    finally:
        os.close(descriptor)


def _is_locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
