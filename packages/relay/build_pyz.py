"""Build relay.pyz: the relay and all that it needs in one file, which any Python 3.11 or newer runs.

``python build_pyz.py FILE``, in an environment in which eng-relay is installed: what is there goes in, as far as it is
Python, and nothing is fetched. The same packages and the same Python give the same bytes. Modules go in as source, and
as this Python compiles them, with which another Python of the same version starts faster.
"""

from __future__ import annotations

import importlib
import importlib.util
import marshal
import stat
import sys
import zipfile
from collections.abc import Iterator
from importlib.metadata import Distribution, PackagePath, distribution
from pathlib import Path
from typing import Final

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

_SHEBANG: Final = b"#!/usr/bin/env -S python3 -I\n"
_MAIN: Final = b"import sys\n\nfrom relay.__main__ import main\n\nsys.exit(main())\n"
_OWN: Final = {"eng-relay": "relay", "eng-link": "enlink"}  # installed for editing, they list no files
_UNNEEDED: Final = ("_editable", "trio/_tests/", "enlink/testing/", "pyroute2/nftables/", "bin/")
_LONG_AGO: Final = (1980, 1, 1, 0, 0, 0)  # the first moment that a zip file knows


def main() -> None:
    """Build the file that the command line names."""
    contents = {"__main__.py": _MAIN}
    for needed in _closure("eng-relay"):
        contents.update(_files(needed))
    for name, data in list(contents.items()):
        if name.endswith(".py"):
            contents[f"{name}c"] = _compiled(name, data)
    path = Path(sys.argv[1])
    with path.open("wb") as file:
        file.write(_SHEBANG)
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in sorted(contents.items()):
                archive.writestr(_entry(name), data)
    path.chmod(path.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)


def _closure(name: str) -> list[Distribution]:
    """Return what is installed under that name, and all that it requires here."""
    found: dict[str, Distribution] = {}
    todo = [name]
    while todo:
        key = canonicalize_name(todo.pop())
        if key in found:
            continue
        found[key] = distribution(key)
        requirements = map(Requirement, found[key].requires or [])
        todo += [each.name for each in requirements if each.marker is None or each.marker.evaluate({"extra": ""})]
    return [found[key] for key in sorted(found)]


def _files(installed: Distribution) -> Iterator[tuple[str, bytes]]:
    """Yield the modules, the licences and the metadata of one distribution: some look there for others' versions."""
    listed = [(path.as_posix(), Path(str(path.locate()))) for path in installed.files or [] if _is_wanted(path)]
    if module := _OWN.get(canonicalize_name(installed.metadata["Name"])):
        root = Path(str(importlib.import_module(module).__file__)).parent
        listed += [(path.relative_to(root.parent).as_posix(), path) for path in root.rglob("*.py")]
    for path, place in listed:
        if not path.startswith(("..", *_UNNEEDED)):
            yield path, place.read_bytes()


def _is_wanted(path: PackagePath) -> bool:
    is_about = ".dist-info" in path.parts[0] and ("LICEN" in path.name.upper() or path.name == "METADATA")
    return path.suffix == ".py" or is_about


def _compiled(name: str, source: bytes) -> bytes:
    """Return what zipimport takes for the compiled module."""
    # PEP 552: a hash in the place of the time; flags 1, so that nobody compares it with the source.
    header = importlib.util.MAGIC_NUMBER + (1).to_bytes(4, "little") + importlib.util.source_hash(source)
    return header + marshal.dumps(compile(source, name, "exec", dont_inherit=True))


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, _LONG_AGO)
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.external_attr = (stat.S_IFREG | 0o644) << 16
    return entry


if __name__ == "__main__":
    main()
