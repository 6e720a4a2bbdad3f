"""Run a command that gets no memory both writable and executable: ``hardened.py COMMAND [ARGUMENT ...]``.

As with systemd's MemoryDenyWriteExecute=yes: by a seccomp filter, and by the kernel's own switch where there is one.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import struct
import sys
from typing import Final

# linux/prctl.h, linux/seccomp.h, linux/bpf_common.h, asm/unistd.h, asm-generic/mman-common.h
PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, PR_SET_MDWE = 22, 38, 65
SECCOMP_MODE_FILTER: Final = 2
ALLOW, EPERM = 0x7FFF0000, 0x00050001
LOAD, AND, EQUAL, RETURN = 0x20, 0x54, 0x15, 0x06
NUMBER_AT, PROTECTION_AT = 0, 32  # in struct seccomp_data: the third argument of all three calls
WRITE, EXECUTE = 2, 4
MMAP, MPROTECT, PKEY_MPROTECT = {"x86_64": (9, 10, 329), "aarch64": (222, 226, 288)}[platform.machine()]


def deny() -> None:
    """Refuse such memory to this process from now on, and to whatever it becomes or starts."""
    program = [
        (LOAD, 0, 0, NUMBER_AT),
        (EQUAL, 3, 0, MMAP),
        (EQUAL, 5, 0, MPROTECT),
        (EQUAL, 4, 0, PKEY_MPROTECT),
        (RETURN, 0, 0, ALLOW),
        (LOAD, 0, 0, PROTECTION_AT),
        (AND, 0, 0, WRITE | EXECUTE),
        (EQUAL, 3, 4, WRITE | EXECUTE),
        (LOAD, 0, 0, PROTECTION_AT),
        (AND, 0, 0, EXECUTE),
        (EQUAL, 0, 1, EXECUTE),
        (RETURN, 0, 0, EPERM),
        (RETURN, 0, 0, ALLOW),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *each) for each in program))
    filter_ = struct.pack("@HP", len(program), ctypes.addressof(code))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    if prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, filter_, 0, 0):
        raise OSError(ctypes.get_errno(), "no seccomp filter")
    prctl(PR_SET_MDWE, 1, 0, 0, 0)  # since Linux 6.3


def main() -> None:
    """Deny it, see that it is denied, and become the command."""
    deny()
    try:
        mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except PermissionError:
        os.execvp(sys.argv[1], sys.argv[1:])
    sys.exit("this process still gets memory that is both writable and executable")


if __name__ == "__main__":
    main()
