"""Fetch QEMU, a kernel and busybox from this machine's Debian sources, once, and unpack them. Installs nothing."""

from __future__ import annotations

import fcntl
import logging
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from enlink.errors import SystemFailure, Unavailable

PACKAGES: Final = ("busybox-static", "qemu-system-common", "qemu-system-data", "qemu-system-x86", "seabios")
KERNEL: Final = "linux-image-cloud-amd64"  # has vsock, and is the smallest of Debian's kernels
LIBRARIES: Final = ("usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Tools:
    """The programs that make a guest, as Debian's packages lay them out under *root*."""

    root: Path

    @property
    def busybox(self) -> Path:
        return self.root / "bin/busybox"

    @property
    def qemu(self) -> Path:
        return self.root / "usr/bin/qemu-system-x86_64"

    @property
    def virtiofsd(self) -> Path:
        return self.root / "usr/lib/qemu/virtiofsd"

    @property
    def firmware(self) -> Sequence[Path]:
        return [self.root / "usr/share/qemu", self.root / "usr/share/seabios"]

    @property
    def kernel(self) -> Path:
        (kernel,) = self.root.glob("boot/vmlinuz-*")
        return kernel

    @property
    def environment(self) -> Mapping[str, str]:
        """What QEMU and virtiofsd need to find their libraries and modules here."""
        return {
            "LD_LIBRARY_PATH": ":".join(str(self.root / directory) for directory in LIBRARIES),
            "QEMU_MODULE_DIR": str(self.root / "usr/lib/x86_64-linux-gnu/qemu"),
            "PATH": os.environ.get("PATH", os.defpath),
        }


def cached() -> Path:
    """Where the tools are kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "eng-vsock-guest"


def tools() -> Tools:
    """Give the tools, and fetch what is missing first: 42 MB. A fetch that was cut short goes on where it stopped.

    Raises:
        Unavailable: this is no Debian 12 on amd64, or the packages cannot be had.
        SystemFailure: they do not run here.
    """
    cache = cached()
    found = Tools(cache / "debian-12")
    if not found.root.exists():
        _require_debian_12()
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / "lock"):
            if not found.root.exists():
                _fetch(cache, found.root)
    return found


def _fetch(cache: Path, root: Path) -> None:
    """Make *root*, which is there when it is complete."""
    archives = cache / "archives"
    unpacked = Tools(cache / "unpacking")
    shutil.rmtree(unpacked.root, ignore_errors=True)
    _download(archives)
    for archive in archives.glob("*.deb"):
        _run("dpkg", "-x", str(archive), str(unpacked.root))
    for program in (unpacked.qemu, unpacked.virtiofsd):
        _run(str(program), "--version", environment=unpacked.environment)
    unpacked.root.rename(root)
    shutil.rmtree(archives)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _require_debian_12() -> None:
    release = platform.freedesktop_os_release()
    found = f"{release['ID']} {release.get('VERSION_ID', '')} on {platform.machine()}"
    # QEMU and the kernel come as a pair: QEMU 7.2 with kernel 6.12 did not boot once.
    if found != "debian 12 on x86_64":
        raise Unavailable(f"cannot make a guest: this is {found}, run it on debian 12 on x86_64")


def _download(archives: Path) -> None:
    """Download what this machine lacks into *archives*; apt-get checks the hashes, and resumes what it had begun."""
    (archives / "partial").mkdir(parents=True, exist_ok=True)
    _log.info("fetching QEMU and a kernel into %s", archives.parent)
    ours = ["--option", f"Dir::Cache={archives.parent}", "--option", f"Dir::Cache::archives={archives}"]
    # Nothing here touches the machine's own packages, so none of its locks is needed, nor being root.
    command = ["apt-get", "--quiet", "--quiet", *ours, "--option", "Debug::NoLocking=1"]
    command += ["--option", "APT::Sandbox::User="]  # apt's own user could not write into a cache in somebody's home
    download = [*command, "install", "--yes", "--no-install-recommends", "--reinstall", "--download-only"]
    try:
        _run(*download, *PACKAGES, _newest_kernel())
    except SystemFailure:
        # The lists of packages are missing or too old. Ours are read beside the machine's, which only root may renew.
        lists = archives.parent / "lists"
        (lists / "partial").mkdir(parents=True, exist_ok=True)
        here = ["--option", f"Dir::State::lists={lists}"]
        subprocess.run([*command, *here, "update"], check=False)  # a foreign source that is down is no reason to stop
        try:
            _run(*download, *here, *PACKAGES, _newest_kernel(*here))
        except SystemFailure as error:
            raise Unavailable(f"cannot fetch Debian packages, see to apt's sources and the network: {error}") from error


def _newest_kernel(*options: str) -> str:
    """The package that the kernel's name without a version stands for."""
    listed = _run("apt-cache", *options, "depends", KERNEL)
    names = re.findall(r"Depends: (linux-image-\S+)", listed)
    if not names:
        raise SystemFailure(f"apt knows no package {KERNEL}")
    return str(names[0])


def _run(*command: str, environment: Mapping[str, str] | None = None) -> str:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemFailure(f"{' '.join(command)} failed ({done.returncode}): {' '.join(done.stderr.split())}")
    return done.stdout
