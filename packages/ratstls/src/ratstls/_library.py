"""Find librats_tls, make sure that loading it cannot end this process, and load it once. Opens no session."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from ratstls._ffi import FUNCTIONS, RatsTls, ffi, symbol_size
from ratstls._layout import Layout, choose_layout, make_conf
from ratstls._plugins import DEFAULT_DIRECTORY, Plugins, list_plugins
from ratstls.config import LogLevel, SessionConfig
from ratstls.errors import ConfigError, LoadError

VARIABLE = "RATSTLS_LIBRARY"
DEFAULT_PATH = DEFAULT_DIRECTORY / "librats_tls.so.0"
_PREFLIGHT_LIMIT_S = 30.0
_PREFLIGHT_REFUSED = 3
_STDERR_TAIL = 400
# All that a child needs: no package, no site directory, no environment of Python's.
_PREFLIGHT = f"""
import ctypes, sys
try:
    library = ctypes.CDLL(sys.argv[1])
except OSError as error:
    sys.stderr.write(str(error))
    sys.exit({_PREFLIGHT_REFUSED})
for conf in sys.argv[2:]:
    library.rats_tls_init(bytes.fromhex(conf), ctypes.byref(ctypes.c_void_p()))
"""


@dataclass(frozen=True, slots=True)
class Library:
    """The loaded library. There is one in a process, for as long as the process lives."""

    path: Path
    layout: Layout
    plugins: Plugins
    lib: RatsTls
    is_preflighted: bool

    def __str__(self) -> str:
        return f"{self.path} ({self.layout.name})"

    def rehearse(self, config: SessionConfig) -> None:
        """Let a child choose these plug-ins first, once: where one of them is broken the library may crash over it.

        Raises:
            ConfigError: it does.
        """
        names = (config.attester, config.verifier, config.tls, config.crypto)
        if not self.is_preflighted or names in _rehearsed:
            return
        # As a client, who needs no evidence: making it may take seconds.
        told = replace(
            config,
            is_server=False,
            is_mutual=False,
            is_attestation_waived=True,
            custom_claims=(),
            log_level=LogLevel.ERROR,
        )
        conf, _ = make_conf(told, self.layout)
        failure = _try_in_child(self.path, bytes(ffi.buffer(conf)).hex())
        if failure is not None:
            raise ConfigError(
                f"making a session with attester {names[0]!r}, verifier {names[1]!r}, tls {names[2]!r} and crypto"
                f" {names[3]!r} {failure}: remove the plug-in files that do not work on this machine"
            )
        _rehearsed.add(names)


# The library registers its plug-ins in process-wide tables: a second copy would find them taken, and call exit(1).
_loaded: Library | None = None
_mapped: Path | None = None  # also if it turned out to be of an unknown build
_loading = threading.Lock()
_rehearsed: set[tuple[str, str, str, str]] = set()


def load(path: str | os.PathLike[str] | None = None, *, is_preflighted: bool = True) -> Library:
    """Return the library: the one loaded before or else the file at *path*, $RATSTLS_LIBRARY or the default, in turn.

    Blocks for a fraction of a second the first time, since a child process tries the file first: its constructor ends
    the process it is in when the installation is broken. Leave out that, and rehearsals, only where there can be no
    child, as in an Occlum enclave (``is_preflighted``). Any thread may call this.

    Raises:
        LoadError: there is no library, it or its plug-ins are broken, its build is unknown, or another was loaded.
    """
    global _loaded
    canonical = _canonical(path)
    with _loading:
        if _mapped not in (None, canonical):
            raise LoadError(
                f"cannot load {canonical}: {_mapped} is loaded already, and a process can have but one:"
                " name one path everywhere"
            )
        if _loaded is None:
            plugins = list_plugins(canonical)
            if is_preflighted and (failure := _try_in_child(canonical)) is not None:
                raise LoadError(f"loading {canonical} {failure}: install rats-tls again, with its plug-ins")
            _loaded = _open(canonical, plugins, is_preflighted=is_preflighted)
        return _loaded


def _canonical(path: str | os.PathLike[str] | None) -> Path:
    chosen = Path(path or os.environ.get(VARIABLE) or DEFAULT_PATH)
    if not chosen.is_absolute():
        raise LoadError(f"{str(chosen)!r} is no absolute path: write it from / on, in {VARIABLE} too")
    try:
        canonical = chosen.resolve(strict=True)
    except OSError as error:
        raise LoadError(
            f"there is no librats_tls at {chosen} ({error.strerror}): install rats-tls, or set {VARIABLE} to its path"
        ) from error
    if not canonical.is_file():
        raise LoadError(f"{chosen} is no file: set {VARIABLE} to the path of librats_tls.so.0")
    return canonical


def _try_in_child(path: Path, *confs: str) -> str | None:
    """Return None if a child can load the library, and make a handle of each configuration; or else how it ends."""
    command = [sys.executable, "-I", "-S", "-c", _PREFLIGHT, str(path), *confs]
    environment = {**os.environ, "RATS_TLS_GLOBAL_LOG_LEVEL": "error"}
    try:
        child = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=_PREFLIGHT_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"takes over {_PREFLIGHT_LIMIT_S:g} s"
    except OSError as error:
        raise LoadError(f"cannot run {command[0]!r} to try {path} ({error.strerror}): check this Python") from error
    said = " ".join(child.stderr.decode(errors="replace").split())[-_STDERR_TAIL:]
    match child.returncode:
        case 0:
            return None
        case status if status == _PREFLIGHT_REFUSED:
            raise LoadError(f"cannot load {path}: {said}: install what is missing, or rats-tls again")
        case status:
            how = (
                f"crashes ({signal.Signals(-status).name})" if status < 0 else f"ends the process with status {status}"
            )
            return f"{how}, saying {said or 'nothing'!r}"


def _open(path: Path, plugins: Plugins, *, is_preflighted: bool) -> Library:
    global _mapped
    try:
        library: Any = ffi.dlopen(str(path))
    except OSError as error:
        raise LoadError(f"cannot load {path}: {error}: install what is missing, or rats-tls again") from error
    missing = [name for name in (f"rats_tls_{function}" for function in FUNCTIONS) if not _has(library, name)]
    if missing:
        raise LoadError(f"{path} is not librats_tls, it has no {', '.join(missing)}: name the right file in {VARIABLE}")
    _mapped = path
    layout = choose_layout(
        symbol_size(library, "global_core_context"), has_claims_symbol=_has(library, "free_claims_list")
    )
    # The constructor took the level from the environment, and below ERROR the library prints to standard output.
    library.global_log_level = LogLevel.NONE
    return Library(path, layout, plugins, cast(RatsTls, library), is_preflighted)


def _has(library: Any, name: str) -> bool:
    try:
        getattr(library, name)
    except AttributeError:
        return False
    return True
