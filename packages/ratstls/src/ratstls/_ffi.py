"""The C side of librats_tls as declarations and types. Loads nothing: see _library.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import cffi

# api.h, the same in every version since 2021 but for the structures, which are opaque here: see _layout.py. The error
# codes have no negative member, which makes C's type for them unsigned. dladdr1 is glibc's, Elf64_Sym is elf.h's.
_DECLARATIONS = """
typedef unsigned int rats_tls_err_t;
typedef void *rats_tls_handle;
typedef int (*rats_tls_callback_t)(void *);
rats_tls_err_t rats_tls_init(const void *conf, rats_tls_handle *handle);
rats_tls_err_t rats_tls_set_verification_callback(rats_tls_handle *handle, rats_tls_callback_t callback);
rats_tls_err_t rats_tls_negotiate(rats_tls_handle handle, int fd);
rats_tls_err_t rats_tls_receive(rats_tls_handle handle, void *buffer, size_t *size);
rats_tls_err_t rats_tls_transmit(rats_tls_handle handle, void *buffer, size_t *size);
rats_tls_err_t rats_tls_cleanup(rats_tls_handle handle);
void free_claims_list(void *claims, size_t count);
extern int global_log_level;
extern char global_core_context;

typedef struct {
    const char *dli_fname;
    void *dli_fbase;
    const char *dli_sname;
    void *dli_saddr;
} Dl_info;
typedef struct {
    uint32_t st_name;
    unsigned char st_info, st_other;
    uint16_t st_shndx;
    uint64_t st_value, st_size;
} Elf64_Sym;
int dladdr1(const void *address, Dl_info *info, void **extra, int flags);
"""
FUNCTIONS = ("init", "set_verification_callback", "negotiate", "receive", "transmit", "cleanup")
RTLD_DL_SYMENT = 1  # dlfcn.h

ffi = cffi.FFI()
ffi.cdef(_DECLARATIONS)

CData: TypeAlias = cffi.FFI.CData
Callback: TypeAlias = Callable[[CData], int]  # what types-cffi says ffi.callback() makes


class RatsTls(Protocol):
    """The library's symbols. The functions return what returncode.decode() reads."""

    global_log_level: int

    def rats_tls_init(self, conf: CData, handle: CData, /) -> int: ...
    def rats_tls_set_verification_callback(self, handle_address: CData, callback: Callback, /) -> int: ...
    def rats_tls_negotiate(self, handle: CData, fd: int, /) -> int: ...
    def rats_tls_receive(self, handle: CData, buffer: CData, size: CData, /) -> int: ...
    def rats_tls_transmit(self, handle: CData, buffer: CData, size: CData, /) -> int: ...
    def rats_tls_cleanup(self, handle: CData, /) -> int: ...


def symbol_size(library: Any, name: str) -> int | None:
    """Return the ELF size of a data symbol of a loaded library in bytes, or None if it has no such symbol."""
    try:
        address = ffi.addressof(library, name)
    except AttributeError:
        return None
    symbol: Any = ffi.new("Elf64_Sym **")
    process: Any = ffi.dlopen(None)
    found = process.dladdr1(address, ffi.new("Dl_info *"), ffi.cast("void **", symbol), RTLD_DL_SYMENT)
    return int(symbol[0].st_size) if found and symbol[0] else None
