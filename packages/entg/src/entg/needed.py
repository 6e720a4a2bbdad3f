"""Find the shared objects that ELF files need, as ``copy_bom`` will: what it does not find is missing in an enclave."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from enlink.errors import ConfigError

from entg.elf import Elf, read_elf

# Where Occlum's own loader looks, in its order, and then Debian's and others'.
LIBRARY_DIRECTORIES: Final = tuple(
    map(
        Path,
        (
            "/opt/occlum/glibc/lib",
            "/usr/lib/x86_64-linux-gnu",
            "/lib/x86_64-linux-gnu",
            "/lib64",
            "/usr/lib64",
            "/lib",
            "/usr/lib",
            "/usr/local/lib",
        ),
    )
)


def resolved(name: str, directories: Sequence[Path] = LIBRARY_DIRECTORIES) -> Path:
    """Return where the shared object of that *name* is.

    Raises:
        ConfigError: nowhere.
    """
    for directory in directories:
        if (directory / name).is_file():
            return (directory / name).resolve()
    raise ConfigError(f"{name} is needed, and in none of {', '.join(map(str, directories))}: install it")


def require_all_needed(
    tree: Path, files: Sequence[Path], directories: Sequence[Path] = LIBRARY_DIRECTORIES
) -> frozenset[Path]:
    """Make sure that whatever is needed below *tree*, by *files*, and by what they need, is there to be copied.

    Returns:
        The shared objects that come from elsewhere.

    Raises:
        ConfigError: something is missing, or no ELF file for x86-64 that is whole.
        OSError: a file cannot be read.
    """
    waiting = [(path, elf) for path in [*_files_below(tree), *files] if (elf := read_elf(path)) is not None]
    # Who is loaded by path first, as librats_tls before its plug-ins, is there for those who need it by name.
    listed = {elf.soname for path, elf in waiting if path in files}
    seen = {path for path, _ in waiting}
    from_elsewhere: set[Path] = set()
    missing: dict[str, Path] = {}
    while waiting:
        path, elf = waiting.pop()
        for name in _wanted(elf):
            found = _find(name, path, elf, directories)
            if found is None and name not in listed:
                missing.setdefault(name, path)
            elif found is not None and found not in seen:
                seen.add(found)
                from_elsewhere.add(found)
                waiting.append((found, read_elf(found) or Elf()))
    if missing:
        name, path = min(missing.items())
        more = f", and {len(missing) - 1} more are missing" if len(missing) > 1 else ""
        raise ConfigError(
            f"{path} needs {name}, which is not to be found{more}: install it, or leave out what needs it"
        )
    return frozenset(from_elsewhere)


def _files_below(tree: Path) -> Iterator[Path]:
    return (path for path in tree.rglob("*") if path.is_file() and not path.is_symlink())


def _wanted(elf: Elf) -> list[str]:
    return [*elf.needed, *([elf.interpreter] if elf.interpreter is not None else [])]


def _find(name: str, path: Path, elf: Elf, directories: Sequence[Path]) -> Path | None:
    if "/" in name:
        return Path(name).resolve() if Path(name).is_file() else None
    own = (
        Path(entry.replace("${ORIGIN}", str(path.parent)).replace("$ORIGIN", str(path.parent)))
        for entry in elf.search_path
    )
    for directory in (*own, *directories):
        if (directory / name).is_file():
            return (directory / name).resolve()
    return None
