"""What a guest is made from: which directories it is given, and what it starts from. Needs no guest."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.vsock.files import outermost, python_and
from tests.vsock.initramfs import in_load_order, initramfs


def test_a_directory_inside_another_is_not_given_twice() -> None:
    """A name that only begins alike is no parent."""
    wanted = [Path("/home/a/code/.venv"), Path("/usr"), Path("/home/a/code"), Path("/usr/local"), Path("/home/a/code2")]
    assert outermost(wanted) == [Path("/home/a/code"), Path("/home/a/code2"), Path("/usr")]


def test_a_guest_is_given_what_python_needs_and_not_the_machine(tmp_path: Path) -> None:
    """The interpreter itself as well, of which an environment has only a link."""
    given = python_and(tmp_path)
    assert Path("/") not in given
    for needed in (tmp_path, Path("/usr"), Path(sys.prefix), Path(sys.executable).resolve()):
        assert any(needed.is_relative_to(directory) for directory in given)


def test_a_module_comes_after_what_it_depends_on(tmp_path: Path) -> None:
    """Once, under whichever name; one that the kernel has built in is left out."""
    modules = tmp_path / "lib" / "modules" / "6.1"
    modules.mkdir(parents=True)
    for name, depends in (("top", "left_side,built_in,right"), ("left-side", "base"), ("right", "base"), ("base", "")):
        (modules / f"{name}.ko").write_bytes(b"ELF\0name=x\0depends=" + depends.encode() + b"\0vermagic=6.1\0")
    names = [path.stem for path in in_load_order(tmp_path, ["right", "top"])]
    assert names == ["base", "right", "left-side", "top"]


def test_the_archive_has_every_file_under_its_name_and_on_a_boundary(tmp_path: Path) -> None:
    """Read back by the sizes in its headers, as the kernel does."""
    busybox, module = tmp_path / "busybox", tmp_path / "vsock.ko"
    busybox.write_bytes(b"program")
    module.write_bytes(b"module!!!")
    archive = initramfs(busybox, [module], "exec true\n")
    files, offset = {}, 0
    while offset < len(archive):
        assert archive[offset : offset + 6] == b"070701"
        fields = [int(archive[start : start + 8], 16) for start in range(offset + 6, offset + 110, 8)]
        size, name_size = fields[6], fields[11]
        name = archive[offset + 110 : offset + 109 + name_size].decode()
        start = offset + -(-(110 + name_size) // 4) * 4
        files[name] = archive[start : start + size]
        offset = start + -(-size // 4) * 4
    assert files["bin/busybox"] == b"program"
    assert files["modules/00-vsock.ko"] == b"module!!!"
    assert files["job"] == b"exec true\n"
    assert list(files)[-1] == "TRAILER!!!"
