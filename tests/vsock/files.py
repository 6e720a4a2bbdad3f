"""Choose the files of this machine that a guest may see, and serve them to it, read-only."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tests.vsock.debian import Tools

# What programs look up there: users, services, libraries, and which of several programs a name means.
_SETTINGS: Final = ("alternatives", "group", "hosts", "ld.so.cache", "nsswitch.conf", "passwd", "protocols", "services")
_MOUNT_POINTS: Final = ("dev", "proc", "run", "sys", "tmp")
_SYSTEM: Final = ("bin", "lib", "lib64", "sbin")

# In a mount namespace of its own, which ends with virtiofsd: version 7.2 cannot refuse writes, but the kernel can.
_SERVE: Final = """
root=$1; shift
while [ "$1" != -- ]; do
    mount --bind "$1" "$root$1" && mount -o remount,bind,ro "$root$1" || exit
    shift
done
shift
exec "$@"
"""


def python_and(checkout: Path) -> list[Path]:
    """The directories that this Python and the programs of *checkout* need, none inside another."""
    interpreter = Path(sys.executable).resolve()  # of an environment, whose files alone run nothing
    wanted = {checkout, Path("/usr"), Path(sys.prefix), Path(sys.base_prefix), interpreter.parents[1]}
    return outermost(wanted)


def outermost(directories: Iterable[Path]) -> list[Path]:
    """Leave out every directory that lies inside another."""
    kept: list[Path] = []
    for directory in sorted(set(directories)):
        if not any(directory.is_relative_to(other) for other in kept):
            kept.append(directory)
    return kept


@contextmanager
def served(tools: Tools, shares: Sequence[Path], root: Path, path: Path, log: Path) -> Iterator[None]:
    """Serve *shares* to whoever connects to the unix socket *path*, once.

    They have their own paths under *root*, which is made for it. What virtiofsd complains of goes to *log*.
    """
    _lay_out(root, shares)
    script = ["sh", "-c", _SERVE, "sh", str(root), *map(str, shares), "--"]
    namespaces = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    with socket.socket(socket.AF_UNIX) as listener, log.open("wb") as complaints:
        listener.bind(str(path))
        listener.listen(1)
        # Files do not change while a guest looks at them, so its kernel may keep what it has read.
        options = ["-o", f"source={root}", "-o", "cache=always", "-o", "sandbox=chroot", "-o", "log_level=err"]
        server = [str(tools.virtiofsd), f"--fd={listener.fileno()}", *options]
        process = subprocess.Popen(
            [*namespaces, *script, *server],
            env=tools.environment,
            pass_fds=[listener.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=complaints,
            stderr=complaints,
        )
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _lay_out(root: Path, shares: Sequence[Path]) -> None:
    for directory in _MOUNT_POINTS:
        (root / directory).mkdir(parents=True)
    for name in _SYSTEM:
        # Debian 12 has them all in /usr.
        (root / name).symlink_to(Path("/", name).readlink())
    (root / "etc").mkdir()
    for source in (Path("/etc", name) for name in _SETTINGS):
        if source.is_dir():
            shutil.copytree(source, root / "etc" / source.name, symlinks=True)
        elif source.exists():
            shutil.copy(source, root / "etc" / source.name)
    for share in shares:
        (root / share.relative_to("/")).mkdir(parents=True, exist_ok=True)
