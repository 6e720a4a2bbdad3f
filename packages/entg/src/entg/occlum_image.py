"""Write what Occlum needs to build an image of a gateway, after making sure that nothing in it will be missing.

Who runs ``copy_bom`` and ``occlum build`` with what is written here does so where Occlum is installed; see
docs/occlum.md.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from enlink.attested import allows_debug
from enlink.errors import CannotCreate, ConfigError, EngError

from entg.measured import ATTESTER, CRYPTO, TLS, VERIFIER, parse_terms
from entg.needed import require_all_needed, resolved
from entg.occlum import LIBRARY, POLICY, SETTINGS, THREADS

PYTHON: Final = Path("/opt/python")
LAUNCHER: Final = Path("/bin/entg")
PACKAGES: Final = ("cffi", "enlink", "entg", "ratstls", "trio")

# What a build of rats-tls must have, by where it goes; no null plug-in, so that none can be chosen.
PLUGINS: Final = tuple(
    LIBRARY.parent / path
    for path in (
        f"attesters/libattester_{ATTESTER}.so",
        f"verifiers/libverifier_{VERIFIER}.so",
        f"tls-wrappers/libtls_wrapper_{TLS}.so",
        f"crypto-wrappers/libcrypto_wrapper_{CRYPTO}.so",
    )
)
_LOADER_DIRECTORY: Final = Path("/opt/occlum/glibc/lib")  # where copy_bom puts what it finds, too
_OPENED_BY_NAME: Final = ("libgcc_s.so.1",)  # by glibc, when a thread ends, so that no ELF file says so

# Occlum takes no option after the interpreter's name, and the host chooses the words that follow. So the first Python
# gives way to one that heeds no environment, because there is none, and looks for modules in its prefix only.
_LAUNCHER_TEXT: Final = """\
#!{python}/bin/python3
import os
import sys

if not sys.flags.isolated:
    os.execve("{python}/bin/python3", ["{python}/bin/python3", "-I", __file__, *sys.argv[1:]], {{}})

from entg.launch import main

sys.exit(main())
"""
_STRICTEST: Final = "# Nothing is left out: every link judges its peer, and attests this enclave.\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What an image is made of.

    Attributes:
        python: a prefix with Python and our packages, which borrows nothing from outside.
        rats_tls: a directory with an Occlum build of rats-tls somewhere in it.
        policy: whom links accept; needed unless the settings say that none judges.
        settings: what links must do, as in `measured`; None: everything.
        is_debuggable: the host can read the enclave's memory, which the policy must allow.
    """

    python: Path
    rats_tls: Path
    policy: Path | None = None
    settings: Path | None = None
    is_debuggable: bool = False


def write_image(directory: Path, parts: Parts) -> None:
    """Write the bom, Occlum.json and what they refer to into a new *directory*, or nothing at all.

    Raises:
        CannotCreate: it exists, or cannot be made.
        ConfigError: a part is missing, broken, or none for an enclave; or parts contradict one another.
        Unavailable: there is no package eng-ratstls, which reads policies.
    """
    directory = directory.absolute()
    if directory.exists():
        raise CannotCreate(f"{directory} exists: remove it, or name another directory")
    _check_terms(parts)
    try:
        python = _checked_python(parts.python)
        libraries = _libraries(parts.rats_tls)
        others = {_LOADER_DIRECTORY / name: resolved(name) for name in _OPENED_BY_NAME}
        require_all_needed(python, [*libraries.values(), *others.values()])
    except OSError as error:
        raise ConfigError(f"cannot read {error.filename}: {error.strerror}; an image must have all of it") from error
    try:
        with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as temporary:
            made = Path(temporary) / "image"
            made.mkdir()
            files = {**libraries, **others, **_write_own(made, parts)}
            (made / "entg.yaml").write_text(_bom(python, files, made, directory))
            (made / "Occlum.json").write_text(json.dumps(occlum_json(parts.is_debuggable), indent=2) + "\n")
            made.rename(directory)
    except OSError as error:
        raise CannotCreate(f"cannot write {directory} ({error.strerror}): name a directory that can be made") from error


def _check_terms(parts: Parts) -> None:
    try:
        terms = parse_terms(parts.settings.read_text(encoding="utf-8") if parts.settings else "")
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"cannot read the settings {parts.settings}: {error}") from error
    except EngError as error:
        raise ConfigError(f"settings {parts.settings}: {error}") from error
    if parts.policy is None and (terms.enta.judge or terms.entg.judge):
        raise ConfigError(
            "links are to judge their peers: say with --policy FILE whom to accept, or with --settings FILE that they"
            " are not to"
        )
    is_debug_allowed = parts.policy is not None and allows_debug(parts.policy)
    if parts.is_debuggable and not is_debug_allowed:
        raise ConfigError("--debug: such an image starts only if its --policy says allow_debug = true")


def _checked_python(prefix: Path) -> Path:
    prefix = prefix.resolve(strict=True)
    if (prefix / "pyvenv.cfg").exists():
        raise ConfigError(f"{prefix} is a virtual environment, most of which is elsewhere: install Python to a prefix")
    if not (prefix / "bin" / "python3").is_file():
        raise ConfigError(f"{prefix} has no bin/python3: name the prefix that Python is installed in")
    installed = list(prefix.glob("lib/python3.*/site-packages"))
    if len(installed) != 1:
        raise ConfigError(f"{prefix} has {len(installed)} directories lib/python3.*/site-packages, and needs one")
    for package in PACKAGES:
        if not (installed[0] / package / "__init__.py").is_file():
            raise ConfigError(
                f"{installed[0]} has no {package}: run {prefix}/bin/python3 -m pip install 'eng-entg[ratstls]' there,"
                " not editable"
            )
    for path in prefix.rglob("*"):
        if path.is_symlink() and not (path.exists() and path.resolve().is_relative_to(prefix)):
            raise ConfigError(f"{path} leads out of {prefix}, to nothing in an image: put a copy in its place")
    return prefix


def _libraries(build: Path) -> dict[Path, Path]:
    """Return where each library goes, and where it is."""
    build = build.resolve(strict=True)
    if not build.is_dir():
        raise ConfigError(f"{build} is no directory: name the one that has a build of rats-tls")
    found: dict[Path, Path] = {}
    for wanted in (LIBRARY, *PLUGINS):
        candidates = {path.resolve(strict=True) for path in build.rglob(wanted.name)}
        if len(candidates) > 1:
            raise ConfigError(f"{build} has several {wanted.name}: name the directory of one build of rats-tls")
        if not candidates:
            is_host = any(build.rglob("libverifier_sgx_ecdsa.so"))
            why = "it is a build for hosts: build rats-tls with" if is_host else "build rats-tls there, with"
            raise ConfigError(f"{build} has no {wanted.name}: {why} -DRATS_TLS_BUILD_MODE=occlum")
        found[wanted] = candidates.pop()
    return found


def _write_own(made: Path, parts: Parts) -> dict[Path, Path]:
    """Write the files that are ours; return where each goes, and where it is now."""
    own = {LAUNCHER: made / "entg", SETTINGS: made / SETTINGS.name}
    own[LAUNCHER].write_text(_LAUNCHER_TEXT.format(python=PYTHON))
    own[LAUNCHER].chmod(0o755)
    own[SETTINGS].write_bytes(parts.settings.read_bytes() if parts.settings else _STRICTEST.encode())
    if parts.policy is not None:
        own[POLICY] = made / POLICY.name
        own[POLICY].write_bytes(parts.policy.read_bytes())
    return own


def _bom(python: Path, files: dict[Path, Path], made: Path, directory: Path) -> str:
    """Return the list of what ``copy_bom`` is to copy, each single file with its hash. JSON is YAML, too."""
    made_first = {"dev", "lib64", "proc", "root", "tmp", *(str(path.parent)[1:] for path in (PYTHON, *files))}
    targets: list[object] = [
        {"target": "/", "mkdirs": sorted(made_first)},
        {"target": str(PYTHON), "copy": [{"dirs": [f"{python}/"]}]},
    ]
    for target, source in sorted(files.items()):
        name = str(directory / source.relative_to(made)) if source.is_relative_to(made) else str(source)
        digest = hashlib.sha256(source.read_bytes()).hexdigest().upper()
        entry = {"name": name, "hash": digest, "rename": target.name}
        targets.append({"target": str(target.parent), "copy": [{"files": [entry]}]})
    return json.dumps({"targets": targets}, indent=2) + "\n"


def occlum_json(is_debuggable: bool) -> dict[str, object]:
    """Return Occlum's configuration, which is measured with the image."""
    no_id = {"high": "0x0", "low": "0x0"}
    image = {"target": "/", "type": "sefs", "source": "./build/mount/__ROOT", "options": {"MAC": ""}}
    # What an enclave of the same signer has once written there could otherwise take the place of our policy.
    written = {"target": "/", "type": "sefs", "source": "./run/mount/__ROOT", "options": {"temporary": True}}
    return {
        "resource_limits": {
            # The demos of Python in Occlum take 300 MB; a link under attestation holds 416 KiB, of its socket pair.
            "kernel_space_heap_size": "300MB",
            "kernel_space_stack_size": "1MB",
            # One Python takes 60 MB and at the launcher's exec there are two; threads take 1 MiB each, queues the rest.
            "user_space_size": "640MB",
            "max_num_of_threads": 8 * -(-(THREADS + 2) // 8),
        },
        "process": {"default_stack_size": "4MB", "default_heap_size": "32MB", "default_mmap_size": "400MB"},
        # A file, not the directory that it is in: from nothing else can the host start anything.
        "entry_points": [str(LAUNCHER)],
        "env": {"default": ["OCCLUM=yes", f"PYTHONHOME={PYTHON}"], "untrusted": []},
        "metadata": {
            "product_id": 0,
            "version_number": 0,
            "debuggable": is_debuggable,
            "disable_log": not is_debuggable,
            "enable_kss": False,
            "family_id": no_id,
            "ext_prod_id": no_id,
        },
        "feature": {"amx": 0, "pkru": 0, "io_uring": 0, "enable_edmm": False, "enable_posix_shm": False},
        # No /host: nothing of the host's file system can be seen.
        "mount": [{"target": "/", "type": "unionfs", "options": {"layers": [image, written]}}],
    }
