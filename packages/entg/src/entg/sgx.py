"""Ask the CPU about the enclave that this process runs in, through Occlum's ``/dev/sgx``.

What is asked here tells an operator what runs; it proves nothing to anybody else. Peers ask for evidence.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import secrets
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from enlink.errors import ConfigError, Unavailable

Ioctl = Callable[[int, int, memoryview], object]
"""As `fcntl.ioctl` with a buffer that it may write to."""

DEVICE: Final = Path("/dev/sgx")

# Occlum 0.31, src/libos/src/fs/dev_fs/dev_sgx: numbers made as those of Linux, of the magic 's'.
SELF_TARGET: Final = 0x82007303
CREATE_REPORT: Final = 0xC0187304
DETECT_DCAP_DRIVER: Final = 0x80047306
GET_DCAP_QUOTE_SIZE: Final = 0x80047307

# Intel SGX SDK, sgx_report.h: offsets in the report, which begins with its body.
_TARGET_INFO_BYTES: Final = 512
_REPORT_BYTES: Final = 432
_FLAGS: Final = struct.Struct("<48xQ")
_MR_ENCLAVE: Final = slice(64, 96)
_MR_SIGNER: Final = slice(128, 160)
_PRODUCT_AND_VERSION: Final = struct.Struct("<256xHH")
_REPORT_DATA: Final = slice(320, 384)
_DEBUG: Final = 0x2

# Ours: where things lie in one page. EREPORT wants its operands aligned to 512 and 128 bytes.
_AT_TARGET: Final = 0
_AT_DATA: Final = 512
_AT_REPORT: Final = 1024
_AT_POINTERS: Final = 2048


@dataclass(frozen=True, slots=True)
class Report:
    """What the CPU says of this enclave: the values that peers list in their policies.

    Attributes:
        can_be_debugged: the host can read and write this enclave's memory.
    """

    mr_enclave: bytes
    mr_signer: bytes
    can_be_debugged: bool
    product_id: int
    security_version: int


def read_report(path: Path = DEVICE, ioctl: Ioctl = fcntl.ioctl) -> Report:
    """Have the CPU make a report about this enclave, and return what it says.

    Raises:
        ConfigError: this process is in no enclave.
    """
    page = mmap.mmap(-1, mmap.PAGESIZE)
    memory = memoryview(page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(page))
    challenge = secrets.token_bytes(_REPORT_DATA.stop - _REPORT_DATA.start)
    memory[_AT_DATA : _AT_DATA + len(challenge)] = challenge
    pointers = (start + _AT_TARGET, start + _AT_DATA, start + _AT_REPORT)
    struct.pack_into("<3Q", memory, _AT_POINTERS, *pointers)
    try:
        with _opened(path) as device:
            # Python hands over a buffer of more than 1024 bytes in place, and a shorter one as a copy.
            ioctl(device, SELF_TARGET, memory[_AT_TARGET:])
            ioctl(device, CREATE_REPORT, memory[_AT_POINTERS:])
    except OSError as error:
        raise ConfigError(
            f"--occlum is for the inside of an enclave, and this is none ({path}: {error.strerror}): make an image with"
            " `entg occlum-image`, and start that with `occlum run /bin/entg`"
        ) from error
    report = bytes(memory[_AT_REPORT : _AT_REPORT + _REPORT_BYTES])
    if report[_REPORT_DATA] != challenge or not any(report[_MR_ENCLAVE]):
        raise ConfigError(f"{path} made a report that is none of this enclave: is it Occlum's own?")
    product_id, security_version = _PRODUCT_AND_VERSION.unpack_from(report)
    return Report(
        mr_enclave=report[_MR_ENCLAVE],
        mr_signer=report[_MR_SIGNER],
        can_be_debugged=bool(_FLAGS.unpack_from(report)[0] & _DEBUG),
        product_id=product_id,
        security_version=security_version,
    )


def require_quotes(path: Path = DEVICE, ioctl: Ioctl = fcntl.ioctl) -> None:
    """Make sure that the host can turn reports into quotes, which is what evidence is made of.

    Raises:
        Unavailable: it has no DCAP driver, or nothing that signs quotes.
    """
    answer = memoryview(bytearray(4))
    try:
        with _opened(path) as device:
            ioctl(device, DETECT_DCAP_DRIVER, answer)
            if not any(answer):
                raise Unavailable("the host has no DCAP driver, without which there is no evidence: install it there")
            ioctl(device, GET_DCAP_QUOTE_SIZE, answer)
    except OSError as error:
        raise Unavailable(
            f"the host makes no quotes ({path}: {error.strerror}): check aesmd, and PCCS in /etc/sgx_default_qcnl.conf,"
            " on the host"
        ) from error
    if not any(answer):
        raise Unavailable("the host makes quotes of 0 bytes: check aesmd on the host")


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
