"""A shared object that is missing in an enclave is missed before the image is made, by its name and who needs it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from enlink.errors import ConfigError
from entg.elf import BrokenElf
from entg.needed import LIBRARY_DIRECTORIES, require_all_needed, resolved

PYTHON = Path(sys.executable).resolve()


def linked(path: Path, *options: str) -> Path:
    """Make a shared object with a name of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    command = ["gcc", "-shared", "-fPIC", "-nostdlib", "-x", "c", "/dev/null", "-x", "none", "-o", str(path)]
    subprocess.run([*command, f"-Wl,-soname,{path.name}", "-Wl,--no-as-needed", *options], check=True)
    return path


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A prefix with Python and two files that are no ELF files."""
    (tmp_path / "prefix" / "bin").mkdir(parents=True)
    shutil.copy(PYTHON, tmp_path / "prefix" / "bin" / "python3")
    (tmp_path / "prefix" / "empty").touch()
    (tmp_path / "prefix" / "script").write_text("#!/bin/sh\n")
    return tmp_path / "prefix"


def test_what_python_needs_is_found_on_this_machine_and_what_that_needs_in_turn(tree: Path) -> None:
    names = {path.name.split(".so")[0].split("-")[0] for path in require_all_needed(tree, [])}
    # Whether Python has a zlib of its own depends on who built it.
    assert {"libc", "libm", "ld"} <= names


def test_what_is_nowhere_is_told_with_who_needs_it(tree: Path, tmp_path: Path) -> None:
    first = linked(tmp_path / "build" / "libfirst.so.1")
    needy = linked(tree / "lib" / "libneedy.so", str(first))
    with pytest.raises(ConfigError, match=f"^{needy} needs libfirst.so.1, which is not to be found: install it, or"):
        require_all_needed(tree, [])
    second = linked(tmp_path / "build" / "libsecond.so.1")
    linked(tree / "lib" / "other.so", str(second))
    with pytest.raises(ConfigError, match=r"needs libfirst\.so\.1, which is not to be found, and 1 more are missing"):
        require_all_needed(tree, [])
    assert {first, second} <= require_all_needed(tree, [], [*LIBRARY_DIRECTORIES, first.parent])


def test_what_is_missing_only_for_what_is_needed_is_missed_too(tree: Path, tmp_path: Path) -> None:
    last = linked(tmp_path / "gone" / "liblast.so.1")
    middle = linked(tmp_path / "there" / "libmiddle.so.1", str(last))
    linked(tree / "lib" / "libneedy.so", str(middle), f"-Wl,-rpath-link,{last.parent}")
    with pytest.raises(ConfigError, match=f"^{middle} needs liblast.so.1"):
        require_all_needed(tree, [], [*LIBRARY_DIRECTORIES, middle.parent])


@pytest.mark.parametrize("origin", ["$ORIGIN", "${ORIGIN}"])
def test_a_library_beside_who_needs_it_is_found_where_that_says(tree: Path, origin: str) -> None:
    beside = linked(tree / "lib" / "inner" / "libbeside.so.1")
    linked(tree / "lib" / "libneedy.so", str(beside), f"-Wl,-rpath,{origin}/inner")
    assert beside not in require_all_needed(tree, [])


def test_who_is_loaded_first_by_path_is_there_for_its_plug_ins(tree: Path, tmp_path: Path) -> None:
    library = linked(tmp_path / "build" / "librats_tls.so.0")
    plugin = linked(tmp_path / "build" / "attesters" / "plugin.so", str(library))
    with pytest.raises(ConfigError, match=f"^{plugin} needs librats_tls.so.0"):
        require_all_needed(tree, [plugin])
    assert library not in require_all_needed(tree, [library, plugin])


def test_a_program_whose_loader_is_missing_is_no_use(tree: Path, tmp_path: Path) -> None:
    source = tmp_path / "main.c"
    source.write_text("int main(void) { return 0; }\n")
    argv = ["gcc", str(source), "-o", str(tree / "program"), "-Wl,--dynamic-linker=/nowhere/ld.so"]
    subprocess.run(argv, check=True)
    with pytest.raises(ConfigError, match=f"^{tree}/program needs /nowhere/ld.so"):
        require_all_needed(tree, [])


def test_a_broken_library_is_found_wherever_it_is(tree: Path, tmp_path: Path) -> None:
    broken = tree / "lib" / "libbroken.so"
    broken.parent.mkdir()
    broken.write_bytes(PYTHON.read_bytes()[:200])
    with pytest.raises(BrokenElf, match=f"^{broken} is cut short"):
        require_all_needed(tree, [])


def test_a_needed_name_that_leads_to_no_elf_file_needs_nothing_more(tree: Path, tmp_path: Path) -> None:
    text = linked(tmp_path / "there" / "libtext.so.1")
    linked(tree / "lib" / "libneedy.so", str(text))
    text.write_text("INPUT(libtext.so.2)\n")
    assert text in require_all_needed(tree, [], [*LIBRARY_DIRECTORIES, text.parent])


def test_a_library_is_looked_up_by_name(tmp_path: Path) -> None:
    (tmp_path / "lib.so.1.2").touch()
    (tmp_path / "lib.so.1").symlink_to("lib.so.1.2")
    assert resolved("lib.so.1", [tmp_path / "no", tmp_path]) == (tmp_path / "lib.so.1.2").resolve()
    with pytest.raises(ConfigError, match=rf"lib.so.2 is needed, and in none of /a, {tmp_path}: install it"):
        resolved("lib.so.2", [Path("/a"), tmp_path])
