"""Boot a guest in QEMU, run one command inside it, and give its exit status."""

from __future__ import annotations

import logging
import shlex
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from enlink.errors import SystemFailure

from tests.vsock.debian import Tools
from tests.vsock.files import served
from tests.vsock.initramfs import in_load_order, initramfs

# What every guest needs to see its files.
_FILE_MODULES: Final = ("virtio_pci", "virtiofs")
_BOOT_ATTEMPTS: Final = 2
_POLL_S: Final = 0.1

_log = logging.getLogger(__name__)

_KERNEL_OPTIONS: Final = (
    "console=ttyS0",
    "loglevel=1",
    # On a busy machine the kernel's check of the timer fails now and then, and with it the boot.
    "no_timer_check",
    "tsc=reliable",
    # A panic ends QEMU, which is told not to reboot.
    "panic=-1",
    "reboot=t",
    # Both cost time, and nobody attacks this guest.
    "mitigations=off",
    "nokaslr",
)


@dataclass(frozen=True, kw_only=True)
class Guest:
    """What a guest is made of. *shares* are the directories of this machine that it sees, and nothing else of it."""

    tools: Tools
    shares: Sequence[Path]
    modules: Sequence[str]
    devices: Sequence[str] = ()  # for QEMU's -device
    memory_mib: int = 768
    boot_deadline_s: float = 120.0
    deadline_s: float = 600.0  # for the boot and the command together

    def run(self, command: Sequence[str], directory: Path, environment: Mapping[str, str]) -> int:
        """Run *command* in *directory*, its output to ours, and give its exit status. A failed boot is tried again.

        Raises:
            SystemFailure: the guest did not boot, twice, or the command was not done in time or took the guest down.
        """
        variables = [f"{name}={value}" for name, value in environment.items()]
        job = f"cd {shlex.quote(str(directory))} || exit\nexec {shlex.join(['env', '-i', *variables, *command])}\n"
        for _ in range(_BOOT_ATTEMPTS):
            progress = self._boot(job)
            if progress[1:]:
                return int(progress[1])
            if progress:
                what = f"took the guest down, or more than {self.deadline_s:.0f} s: see its output above"
                raise SystemFailure(f"{shlex.join(command)} {what}")
        raise SystemFailure("no guest boots here: see what QEMU and the guest's kernel wrote above")

    def _boot(self, job: str) -> list[str]:
        """Boot once and wait for the end. What init wrote about its progress: nothing, "up", or also a status."""
        with tempfile.TemporaryDirectory(prefix="eng-guest-") as directory:
            place = Path(directory)
            initrd, files, progress, log = (place / name for name in ("initrd", "files", "progress", "log"))
            modules = in_load_order(self.tools.root, [*_FILE_MODULES, *self.modules])
            initrd.write_bytes(initramfs(self.tools.busybox, modules, job))
            progress.touch()
            with served(self.tools, self.shares, place / "root", files, log):
                started_s = time.monotonic()
                process = subprocess.Popen(
                    self._qemu(initrd, files, progress), env=self.tools.environment, stdin=subprocess.DEVNULL
                )
                try:
                    while process.poll() is None:
                        is_up = bool(progress.read_bytes())
                        if time.monotonic() - started_s > (self.deadline_s if is_up else self.boot_deadline_s):
                            break
                        time.sleep(_POLL_S)
                finally:
                    process.kill()
                    process.wait()
                if not progress.read_bytes():
                    _log.warning("the guest did not boot; what serves its files said: %s", log.read_text() or "nothing")
            # A line that QEMU was killed in the middle of says nothing.
            return [line.strip() for line in progress.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def _qemu(self, initrd: Path, files: Path, progress: Path) -> list[str]:
        return [
            str(self.tools.qemu),
            *(word for directory in self.tools.firmware for word in ("-L", str(directory))),
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            # KVM is often there and does not work, on virtual machines themselves.
            *("-accel", "tcg,thread=multi", "-cpu", "max,la57=off", "-smp", "2"),
            # virtiofs reads the guest's memory.
            *("-object", f"memory-backend-memfd,id=memory,size={self.memory_mib}M,share=on"),
            *("-machine", "q35,memory-backend=memory", "-m", str(self.memory_mib)),
            *("-kernel", str(self.tools.kernel), "-initrd", str(initrd), "-append", " ".join(_KERNEL_OPTIONS)),
            *("-chardev", f"socket,id=files,path={files}", "-device", "vhost-user-fs-pci,chardev=files,tag=given"),
            *("-serial", "stdio", "-serial", f"file:{progress}"),
            *(word for device in self.devices for word in ("-device", device)),
        ]
