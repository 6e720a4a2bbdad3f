"""What an ELF file needs is read as the system's own tools read it, and damage is told, never guessed around."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from entg.elf import BrokenElf, Elf, parse_elf, read_elf
from hypothesis import given
from hypothesis import strategies as st

PYTHON = Path(sys.executable).resolve()
LIBSSL = Path("/usr/lib/x86_64-linux-gnu/libssl.so.3")
LIBRARIES = sorted(LIBSSL.parent.glob("lib[a-m]*.so.*"))[:60]
SMALL = min((path for path in LIBRARIES if path.is_file()), key=lambda path: path.stat().st_size)
BYTES = SMALL.read_bytes()


def by_readelf(path: Path) -> tuple[list[str], list[str]]:
    """The names and the search paths that binutils finds in the dynamic section, and the interpreter."""
    command = ["readelf", "--wide", "--dynamic", "--program-headers", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.findall(r"\(NEEDED\).*\[(.*)\]", text), re.findall(
        r"\(SONAME\).*\[(.*)\]|\(R(?:UN)?PATH\).*\[(.*)\]|interpreter: (.*)\]", text
    )


@pytest.mark.parametrize("path", [PYTHON, LIBSSL, *LIBRARIES], ids=lambda path: path.name)
def test_a_real_file_needs_what_binutils_say_it_needs(path: Path) -> None:
    elf = read_elf(path)
    assert elf is not None
    needed, others = by_readelf(path)
    assert list(elf.needed) == needed
    told = {word for words in others for word in words if word}
    assert {word for word in (elf.soname, elf.interpreter, ":".join(elf.search_path)) if word} == told


def test_python_and_libssl_have_what_everybody_knows_they_have() -> None:
    python, libssl = read_elf(PYTHON), read_elf(LIBSSL)
    assert python is not None
    assert python.interpreter == "/lib64/ld-linux-x86-64.so.2"
    assert "libc.so.6" in python.needed
    assert libssl == Elf("libssl.so.3", ("libcrypto.so.3", "libc.so.6"))


@pytest.mark.parametrize("option", ["--enable-new-dtags", "--disable-new-dtags"])
def test_where_libraries_are_to_be_looked_for_is_read(tmp_path: Path, option: str) -> None:
    """As RUNPATH and as the older RPATH."""
    library = tmp_path / "lib.so"
    source = tmp_path / "lib.c"
    source.write_text("int one(void) { return 1; }\n")
    paths = "-Wl,-rpath,$ORIGIN/../lib:/opt/lib"
    subprocess.run(["gcc", "-shared", "-fPIC", f"-Wl,{option}", paths, "-o", library, source], check=True)
    elf = read_elf(library)
    assert elf is not None
    assert elf.search_path == ("$ORIGIN/../lib", "/opt/lib")


def test_a_program_without_a_loader_needs_nothing(tmp_path: Path) -> None:
    source = tmp_path / "static.c"
    source.write_text("void _start(void) { for (;;) { } }\n")
    subprocess.run(["gcc", "-static", "-nostdlib", "-o", tmp_path / "static", source], check=True)
    subprocess.run(["gcc", "-c", "-o", tmp_path / "object", source], check=True)
    assert read_elf(tmp_path / "static") == read_elf(tmp_path / "object") == Elf()


@pytest.mark.parametrize("content", [b"", b"\x7f", b"\x7fEL", b"#!/bin/sh\n", b"MZ" + bytes(100)])
def test_what_is_no_elf_file_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    assert read_elf(tmp_path / "file") is None


def test_damage_is_told_with_the_path_and_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "lib.so").write_bytes(BYTES[:100])
    with pytest.raises(BrokenElf, match=rf"^{tmp_path}/lib.so is cut short: install it again$") as caught:
        read_elf(tmp_path / "lib.so")
    assert caught.value.exit_code == 78


@pytest.mark.parametrize(
    ("offset", "value", "says"),
    [
        (4, b"\x01", "is not for x86-64"),  # 32 bits
        (5, b"\x02", "is not for x86-64"),  # big-endian
        (18, struct.pack("<H", 183), "is not for x86-64"),  # AArch64
        (54, struct.pack("<H", 55), "program headers of 55 bytes"),
        (32, struct.pack("<Q", 2**64 - 1), "is cut short"),
        (56, struct.pack("<H", 0xFFFF), "is cut short|no table of names|a name"),
    ],
)
def test_a_header_that_lies_is_found_out(offset: int, value: bytes, says: str) -> None:
    data = bytearray(BYTES)
    data[offset : offset + len(value)] = value
    with pytest.raises(BrokenElf, match=says):
        parse_elf(bytes(data))


def dynamic_header() -> int:
    """Where the program header of the dynamic section is."""
    start, size, count = (*struct.unpack_from("<Q", BYTES, 32), *struct.unpack_from("<2H", BYTES, 54))
    (found,) = [at for at in range(start, start + size * count, size) if BYTES[at : at + 4] == b"\2\0\0\0"]
    return int(found)


def test_names_that_lie_are_found_out() -> None:
    """Names that are no text, a table of names that is too short, and a dynamic section that ends before it says."""
    (begin,) = struct.unpack_from("<Q", BYTES, dynamic_header() + 8)
    (length,) = struct.unpack_from("<Q", BYTES, dynamic_header() + 32)
    name = (parse_elf(BYTES).soname or "").encode()
    with pytest.raises(BrokenElf, match="a name that is no text"):
        parse_elf(BYTES.replace(name, b"\xff" + name[1:]))
    (size_at,) = [at for at in range(begin, begin + length, 16) if struct.unpack_from("<q", BYTES, at) == (10,)]
    with pytest.raises(BrokenElf, match="a name without an end"):
        parse_elf(BYTES[: size_at + 8] + bytes(8) + BYTES[size_at + 16 :])
    with pytest.raises(BrokenElf, match="has no table of names"):
        parse_elf(BYTES[: dynamic_header() + 32] + struct.pack("<Q", 16) + BYTES[dynamic_header() + 40 :])


@given(st.integers(0, len(BYTES)))
def test_a_file_cut_anywhere_is_refused_or_read_as_the_whole_one(length: int) -> None:
    """What a loader is asked for lies before the end of most files, so that some cuts lose nothing of it."""
    try:
        cut = parse_elf(BYTES[:length])
    except BrokenElf:
        return
    assert cut == parse_elf(BYTES)


@given(st.lists(st.tuples(st.integers(0, 4095), st.integers(0, 255)), min_size=1, max_size=20), st.data())
def test_damaged_bytes_are_refused_or_read_and_nothing_else(
    changes: list[tuple[int, int]], data: st.DataObject
) -> None:
    damaged = bytearray(BYTES)
    for offset, value in changes:
        damaged[offset] = value
    dynamic = data.draw(st.integers(0, len(damaged) - 8))
    damaged[dynamic : dynamic + 8] = data.draw(st.binary(min_size=8, max_size=8))
    try:
        parse_elf(bytes(damaged))
    except BrokenElf as error:
        advice = str(error).partition(": ")[2]
    else:
        advice = ""
    assert advice in ("", "install it again", "it is damaged, install it again", "take one that is")
