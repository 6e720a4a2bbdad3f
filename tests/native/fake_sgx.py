"""A stand-in for Occlum's /dev/sgx: a device with state that answers the ioctls. Run, it is entg as in an enclave.

It says whatever it is told to and signs nothing: it is for tests of what a gateway does with the answers.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys
from dataclasses import dataclass, field
from pathlib import Path

TARGET_INFO = 0x82007303
CREATE_REPORT = 0xC0187304
DETECT_DCAP = 0x80047306
QUOTE_SIZE = 0x80047307


@dataclass
class FakeSgx:
    """An enclave's device: what the CPU knows of it, and what the host has installed."""

    mr_enclave: bytes = bytes(range(1, 33))
    mr_signer: bytes = bytes(range(33, 65))
    flags: int = 0x5  # initialised, 64 bits
    product_id: int = 7
    security_version: int = 3
    has_driver: bool = True
    quote_size: int | None = 4734
    asked: list[int] = field(default_factory=list)

    def ioctl(self, descriptor: int, request: int, argument: memoryview) -> int:
        """Do what the device does, pointers included."""
        assert os.fstat(descriptor)
        self.asked.append(request)
        if request == TARGET_INFO:
            argument[:512] = self._target_info()
        elif request == CREATE_REPORT:
            target, data, report = struct.unpack_from("<3Q", argument)
            if target % 512 or data % 128 or report % 512 or ctypes.string_at(target, 512) != self._target_info():
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            ctypes.memmove(report, self.report(ctypes.string_at(data, 64)), 432)
        elif request == DETECT_DCAP:
            argument[:4] = struct.pack("<i", self.has_driver)
        elif request == QUOTE_SIZE:
            if self.quote_size is None:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            argument[:4] = struct.pack("<I", self.quote_size)
        else:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        return 0

    def report(self, data: bytes) -> bytes:
        """Return a report as the CPU lays it out; what nobody reads is not zero."""
        report = bytearray(b"\xd5" * 432)
        struct.pack_into("<2Q", report, 48, self.flags, 7)
        report[64:96] = self.mr_enclave
        report[128:160] = self.mr_signer
        struct.pack_into("<2H", report, 256, self.product_id, self.security_version)
        report[320:384] = data
        return bytes(report)

    def _target_info(self) -> bytes:
        return self.mr_enclave + b"\xa7" * 480


def main() -> int:
    """Run entg with the arguments after the first two: the library, and a directory with the image's files."""
    library, image, *words = sys.argv[1:]
    from entg.launch import forbid_processes
    from entg.launch import main as launch

    forbid_processes()  # also while this is made ready
    from entg import occlum

    device = Path(image) / "sgx"
    device.touch()
    inside = occlum.Inside(
        device=device,
        ioctl=FakeSgx().ioctl,
        library=Path(library),
        policy=Path(image) / "policy.toml",
        settings=Path(image) / "gateway.toml",
        environment={},
    )
    vars(occlum)["Inside"] = lambda: inside
    sys.argv = ["entg", *words]
    return launch()


if __name__ == "__main__":
    sys.exit(main())
