"""Read from an ELF file which shared objects it needs, and where it wants them looked for. Knows x86-64 only."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from enlink.errors import ConfigError

MAGIC: Final = b"\x7fELF"

# System V ABI, "Object Files", and its supplement for AMD64.
_HEADER: Final = struct.Struct("<16s2HI3QI6H")
_PROGRAM_HEADER: Final = struct.Struct("<2I6Q")
_DYNAMIC: Final = struct.Struct("<qQ")
_CLASS_64_LITTLE_ENDIAN: Final = b"\x02\x01"
_MACHINE_X86_64: Final = 62
_PT_LOAD, _PT_DYNAMIC, _PT_INTERP = 1, 2, 3
_DT_NULL, _DT_NEEDED, _DT_STRTAB, _DT_STRSZ, _DT_SONAME, _DT_RPATH, _DT_RUNPATH = 0, 1, 5, 10, 14, 15, 29

Data = bytes | mmap.mmap


class BrokenElf(ConfigError):
    """A file begins like an ELF file, and is not one that a loader for x86-64 would take."""


@dataclass(frozen=True, slots=True)
class Elf:
    """What a loader is asked to find for a program or a shared object.

    Attributes:
        soname: what others call it; None if it has no such name.
        needed: the names of the shared objects that it needs itself.
        search_path: where it wants them looked for first, as written there, with ``$ORIGIN``.
        interpreter: the loader that a program asks for.
    """

    soname: str | None = None
    needed: tuple[str, ...] = ()
    search_path: tuple[str, ...] = ()
    interpreter: str | None = None


def read_elf(path: Path) -> Elf | None:
    """Return what the file at *path* needs; None if it is no ELF file at all.

    Raises:
        BrokenElf: it is one, but damaged, or not for x86-64.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            return None
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return parse_elf(data)
            except BrokenElf as error:
                raise BrokenElf(f"{path} {error}") from error


def parse_elf(data: Data) -> Elf:
    """Return what the ELF file with these bytes needs.

    Raises:
        BrokenElf: that cannot be told.
    """
    _, _, machine, _, _, headers_at, _, _, _, size, count, *_ = _unpack(_HEADER, data, 0)
    if data[:6] != MAGIC + _CLASS_64_LITTLE_ENDIAN or machine != _MACHINE_X86_64:
        raise BrokenElf("is not for x86-64: take one that is")
    if count and size != _PROGRAM_HEADER.size:
        raise BrokenElf(f"has program headers of {size} bytes: it is damaged, install it again")
    headers = [_unpack(_PROGRAM_HEADER, data, headers_at + index * size) for index in range(count)]
    # Of each: type, flags, offset, virtual address, physical address, size in the file, size in memory, alignment.
    segments = [(kind, offset, address, length) for kind, _, offset, address, _, length, _, _ in headers]
    interpreter = [_string(data, offset, offset + length) for kind, offset, _, length in segments if kind == _PT_INTERP]
    entries = [
        entry for kind, offset, _, length in segments if kind == _PT_DYNAMIC for entry in _dynamic(data, offset, length)
    ]
    if not entries:
        return Elf(interpreter=interpreter[0] if interpreter else None)
    tables = {tag: value for tag, value in entries if tag in (_DT_STRTAB, _DT_STRSZ)}
    start = _offset_of(tables.get(_DT_STRTAB, -1), segments)
    end = start + tables.get(_DT_STRSZ, 0)

    def strings(wanted: int) -> list[str]:
        return [_string(data, start + value, end) for tag, value in entries if tag == wanted]

    # A loader that finds both heeds RUNPATH only.
    search = strings(_DT_RUNPATH) or strings(_DT_RPATH)
    return Elf(
        soname=next(iter(strings(_DT_SONAME)), None),
        needed=tuple(strings(_DT_NEEDED)),
        search_path=tuple(directory for path in search for directory in path.split(":") if directory),
        interpreter=interpreter[0] if interpreter else None,
    )


def _dynamic(data: Data, offset: int, length: int) -> Iterator[tuple[int, int]]:
    for position in range(offset, offset + length, _DYNAMIC.size):
        tag, value = _unpack(_DYNAMIC, data, position)
        if tag == _DT_NULL:
            return
        yield tag, value


def _offset_of(address: int, segments: list[tuple[int, int, int, int]]) -> int:
    for kind, offset, begin, length in segments:
        if kind == _PT_LOAD and begin <= address < begin + length:
            return offset + address - begin
    raise BrokenElf("has no table of names: it is damaged, install it again")


def _unpack(layout: struct.Struct, data: Data, offset: int) -> tuple[int, ...]:
    if offset + layout.size > len(data):
        raise BrokenElf("is cut short: install it again")
    return layout.unpack_from(data, offset)


def _string(data: Data, start: int, end: int) -> str:
    length = len(data)
    stop = data.find(b"\0", min(start, length), min(end, length))
    if stop < 0:
        raise BrokenElf("has a name without an end: it is damaged, install it again")
    try:
        return data[start:stop].decode()
    except UnicodeError as error:
        raise BrokenElf("has a name that is no text: it is damaged, install it again") from error
