"""The sockets that systemd listens on for us, and passes by name. Source: sd_listen_fds(3)."""

from __future__ import annotations

import os
import socket
from typing import Final, TypeAlias

from enlink.errors import ConfigError

FIRST_DESCRIPTOR: Final = 3  # SD_LISTEN_FDS_START

InheritedSockets: TypeAlias = dict[str, list[socket.socket]]
"""What was passed and nobody has claimed yet, by name."""


def take_inherited_sockets() -> InheritedSockets:
    """Take what systemd passed to this process, once: the variables that tell of it are gone then.

    Raises:
        ConfigError: it passed something that is no socket, or the variables make no sense.
    """
    pid, count, names = (os.environ.pop(f"LISTEN_{name}", "") for name in ("PID", "FDS", "FDNAMES"))
    if pid != str(os.getpid()):  # meant for another process, if for any
        return {}
    if not count.isdecimal():
        raise ConfigError(f"LISTEN_FDS={count!r} is not the number of sockets that systemd passes: unset LISTEN_PID")
    named = names.split(":") if names else ["unknown"] * int(count)
    if len(named) != int(count):
        raise ConfigError(f"LISTEN_FDNAMES={names!r} does not name the {count} sockets that systemd passes: unset it")
    found: InheritedSockets = {}
    for descriptor, name in enumerate(named, FIRST_DESCRIPTOR):
        try:
            os.set_inheritable(descriptor, False)
            found.setdefault(name, []).append(socket.socket(fileno=descriptor))
        except OSError as error:
            raise ConfigError(
                f"systemd passes descriptor {descriptor}, called {name}, which is no socket ({error.strerror}):"
                " give its .socket unit ListenStream= only"
            ) from error
    return found


def claim(inherited: InheritedSockets, name: str) -> list[socket.socket]:
    """Take the sockets called *name*, which may be several, out of what was passed.

    Raises:
        ConfigError: there is none, or one of them does not listen for connections.
    """
    if name not in inherited:
        there = f"those are called {', '.join(sorted(inherited))}" if inherited else "start this by its .socket unit"
        raise ConfigError(f"systemd passes no socket called {name}: set FileDescriptorName={name} there; {there}")
    for sock in inherited[name]:
        if sock.type != socket.SOCK_STREAM:
            raise ConfigError(f"the socket called {name} takes no connections: give its unit ListenStream=")
        if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise ConfigError(f"the socket called {name} does not listen: give its unit Accept=no")
    return inherited.pop(name)
