"""Pack the files that a guest starts from: busybox, init, the kernel modules in their order, and the job."""

from __future__ import annotations

import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

INIT: Final = Path(__file__).with_name("init")
_MAGIC: Final = "070701"  # Linux Documentation/driver-api/early-userspace/buffer-format.rst
_ALIGNMENT: Final = 4


def initramfs(busybox: Path, modules: Iterable[Path], job: str) -> bytes:
    """Give the archive that the kernel unpacks and whose ``/init`` it runs. *job* is a script for ``/bin/sh``."""
    directories = dict.fromkeys(("bin", "dev", "modules", "new", "proc", "sys"), stat.S_IFDIR | 493)
    files = {"bin/busybox": busybox.read_bytes(), "init": INIT.read_bytes(), "job": job.encode()}
    for number, module in enumerate(modules):
        files[f"modules/{number:02}-{module.name}"] = module.read_bytes()
    entries = [_entry(name, mode) for name, mode in directories.items()]
    entries += [_entry(name, stat.S_IFREG | 0o755, content) for name, content in files.items()]
    # The kernel opens its first console before init has mounted anything.
    entries.append(_entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)))
    return b"".join([*entries, _entry("TRAILER!!!", 0)])


def _entry(name: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)) -> bytes:
    path = name.encode() + b"\0"
    # inode, mode, uid, gid, links, mtime, size, the file's device, what device it is, length of the name, checksum
    numbers = (0, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(path), 0)
    header = _MAGIC + "".join(f"{number:08X}" for number in numbers)
    return _padded(header.encode() + path) + _padded(content)


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % _ALIGNMENT)


def in_load_order(kernel_root: Path, names: Iterable[str]) -> list[Path]:
    """Find the named modules and all that they depend on, each after what it needs.

    Names that the kernel has no module for are left out: those parts are built in.
    """
    available = {path.stem.replace("-", "_"): path for path in kernel_root.glob("lib/modules/**/*.ko")}
    ordered: dict[str, Path] = {}
    for name in names:
        _add(name, available, ordered)
    return list(ordered.values())


def _add(name: str, available: Mapping[str, Path], ordered: dict[str, Path]) -> None:
    if name in ordered or name not in available:
        return
    # A module says what it needs in its .modinfo section; the file that depmod makes of all of them is not packaged.
    match = re.search(rb"\0depends=([^\0]+)\0", available[name].read_bytes())
    for needed in match[1].decode().split(",") if match else []:
        _add(needed.replace("-", "_"), available, ordered)
    ordered[name] = available[name]
