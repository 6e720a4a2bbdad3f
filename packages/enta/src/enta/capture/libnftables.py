"""Run nft text inside this process through libnftables, and turn its complaints into errors. Knows no rules."""

from __future__ import annotations

import errno
import os
import socket
import struct
from typing import Any, Protocol, cast

import cffi
from enlink.errors import NotPermitted, SystemFailure, Unavailable

# nftables/libnftables.h, the same in every release since 0.9.
_DECLARATIONS = """
struct nft_ctx;
struct nft_ctx *nft_ctx_new(uint32_t flags);
void nft_ctx_free(struct nft_ctx *ctx);
int nft_ctx_buffer_output(struct nft_ctx *ctx);
int nft_ctx_buffer_error(struct nft_ctx *ctx);
void nft_ctx_set_dry_run(struct nft_ctx *ctx, bool dry);
const char *nft_ctx_get_output_buffer(struct nft_ctx *ctx);
const char *nft_ctx_get_error_buffer(struct nft_ctx *ctx);
int nft_run_cmd_from_buffer(struct nft_ctx *ctx, const char *text);
"""
_LIBRARY_NAME = "libnftables.so.1"
# linux/netlink.h, linux/netfilter/nfnetlink.h, linux/netfilter/nf_tables.h
_NETLINK_NETFILTER = 12
_NLM_F_REQUEST = 1
_NLMSG_ERROR = 2
_GET_GENERATION = 10 << 8 | 16  # NFNL_SUBSYS_NFTABLES, NFT_MSG_GETGEN

_MISSING = "no such file or directory"
_REFUSED = "operation not permitted"


class _Context(Protocol):
    """A ``struct nft_ctx *``, which only the library looks into."""


class _Library(Protocol):
    def nft_ctx_new(self, flags: int) -> _Context: ...
    def nft_ctx_free(self, context: _Context) -> None: ...
    def nft_ctx_buffer_output(self, context: _Context) -> int: ...
    def nft_ctx_buffer_error(self, context: _Context) -> int: ...
    def nft_ctx_set_dry_run(self, context: _Context, is_dry_run: bool) -> None: ...
    def nft_ctx_get_output_buffer(self, context: _Context) -> object: ...
    def nft_ctx_get_error_buffer(self, context: _Context) -> object: ...
    def nft_run_cmd_from_buffer(self, context: _Context, text: bytes) -> int: ...


class NftFailure(SystemFailure):
    """The kernel or the library refused a command. ``reason`` is what the library wrote, its first line."""

    def __init__(self, command: str, reason: str) -> None:
        super().__init__(f"nftables refused '{command}': {reason}")
        self.reason = reason

    @property
    def is_missing(self) -> bool:
        """What the command names does not exist."""
        return _MISSING in self.reason.lower()

    @property
    def is_refused(self) -> bool:
        """No privilege, or the table has another owner: the kernel says EPERM to both."""
        return _REFUSED in self.reason.lower()


class Nft:
    """One libnftables context: one netlink socket of the network namespace that the calling thread is in.

    Tables with ``flags owner`` belong to this context and go when it is closed, or when the process dies.
    Calls block for as long as the kernel needs; not thread-safe.

    Raises:
        NotPermitted: this process may not even look.
        Unavailable: the library is not installed, or the kernel has no nftables.
    """

    def __init__(self) -> None:
        self._ffi = cffi.FFI()
        self._ffi.cdef(_DECLARATIONS)
        try:
            self._library = cast(_Library, self._ffi.dlopen(_LIBRARY_NAME))
        except OSError as error:
            raise Unavailable(f"cannot load {_LIBRARY_NAME}: run apt install libnftables1") from error
        _ask_kernel()
        self._context: _Context | None = self._library.nft_ctx_new(0)
        self._library.nft_ctx_buffer_output(self._context)
        self._library.nft_ctx_buffer_error(self._context)

    def run(self, text: str, *, is_dry_run: bool = False) -> str:
        """Run *text*, all of it or none, and return what it prints; of a dry run, only say what would be wrong with it.

        Raises:
            NftFailure: the kernel or the library said no.
        """
        if self._context is None:
            raise ValueError("this nftables context is closed")
        self._library.nft_ctx_set_dry_run(self._context, is_dry_run)
        status = self._library.nft_run_cmd_from_buffer(self._context, text.encode())
        printed = self._text(self._library.nft_ctx_get_output_buffer(self._context))
        complaint = self._text(self._library.nft_ctx_get_error_buffer(self._context))
        if status != 0:
            raise NftFailure(text.split("\n", 1)[0], complaint.split("\n", 1)[0].removeprefix("Error: "))
        return printed

    def listing(self, family: str, table: str) -> str | None:
        """Return the text of a table, or None when there is no such table."""
        try:
            return self.run(f"list table {family} {table}")
        except NftFailure as failure:
            if failure.is_missing:
                return None
            raise

    def tables(self, family: str) -> list[str]:
        """Return the names of all tables of a family."""
        return [line.split()[-1] for line in self.run(f"list tables {family}").splitlines()]

    def close(self) -> None:
        """Close the socket. Quiet when it is closed already."""
        if self._context is not None:
            self._library.nft_ctx_free(self._context)
            self._context = None

    def _text(self, pointer: object) -> str:
        raw: Any = self._ffi.string(cast(Any, pointer))
        return cast(bytes, raw).decode(errors="replace")


def _ask_kernel() -> None:
    """Find out what the library handles badly: without a socket it exits, without privilege it writes to stderr."""
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER) as kernel:
            kernel.send(struct.pack("=IHHIIBBH", 20, _GET_GENERATION, _NLM_F_REQUEST, 0, 0, 0, 0, 0))
            kind, status = struct.unpack_from("=4xH10xi", kernel.recv(4096))
    except OSError as error:
        raise Unavailable(f"no netfilter socket ({error.strerror}): use a kernel with nf_tables") from error
    if kind == _NLMSG_ERROR and -status == errno.EPERM:
        raise NotPermitted("nftables: operation not permitted: run as root or grant CAP_NET_ADMIN to this process")
    if kind == _NLMSG_ERROR:
        raise Unavailable(f"the kernel has no nftables ({os.strerror(-status)}): load nf_tables")
