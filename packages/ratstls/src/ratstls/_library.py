"""Find librats_tls, make sure that loading it cannot end this process, and load it once. Opens no session."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ratstls._ffi import FUNCTIONS, RatsTls, ffi, symbol_size
from ratstls._layout import Layout, choose_layout
from ratstls._plugins import DEFAULT_DIRECTORY, Plugins, list_plugins
from ratstls.config import LogLevel
from ratstls.errors import LoadError

VARIABLE = "RATSTLS_LIBRARY"
DEFAULT_PATH = DEFAULT_DIRECTORY / "librats_tls.so.0"
_PREFLIGHT_LIMIT_S = 30.0
_PREFLIGHT_REFUSED = 3
_STDERR_TAIL = 400
# All that a child needs: no package, no site directory, no environment of Python's.
_PREFLIGHT = f"""
import ctypes, sys
try:
    ctypes.CDLL(sys.argv[1])
except OSError as error:
    sys.stderr.write(str(error))
    sys.exit({_PREFLIGHT_REFUSED})
"""


@dataclass(frozen=True, slots=True)
class Library:
    """The loaded library. There is one in a process, for as long as the process lives."""

    path: Path
    layout: Layout
    plugins: Plugins
    lib: RatsTls

    def __str__(self) -> str:
        return f"{self.path} ({self.layout.name})"


# The library registers its plug-ins in process-wide tables: a second copy would find them taken, and call exit(1).
_loaded: Library | None = None
_loading = threading.Lock()


def load(path: str | os.PathLike[str] | None = None, *, is_preflighted: bool = True) -> Library:
    """Return the library: the one loaded before or else the file at *path*, $RATSTLS_LIBRARY or the default, in turn.

    Blocks for a fraction of a second the first time, since a child process tries the file first: its constructor ends
    the process it is in when the installation is broken. Leave that out (``is_preflighted``) only where there can be no
    child, as in an Occlum enclave. Any thread may call this.

    Raises:
        LoadError: there is no library, it or its plug-ins are broken, its build is unknown, or another was loaded.
    """
    global _loaded
    canonical = _canonical(path)
    with _loading:
        if _loaded is None:
            plugins = list_plugins(canonical)
            if is_preflighted:
                _preflight(canonical)
            _loaded = _open(canonical, plugins)
        elif _loaded.path != canonical:
            raise LoadError(
                f"cannot load {canonical}: {_loaded.path} is loaded already, and a process can have but one:"
                " name one path everywhere"
            )
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


def _preflight(path: Path) -> None:
    command = [sys.executable, "-I", "-S", "-c", _PREFLIGHT, str(path)]
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
    except subprocess.TimeoutExpired as error:
        raise LoadError(f"loading {path} takes over {_PREFLIGHT_LIMIT_S:g} s: install rats-tls again") from error
    except OSError as error:
        raise LoadError(f"cannot run {command[0]!r} to try {path} ({error.strerror}): check this Python") from error
    said = " ".join(child.stderr.decode(errors="replace").split())[-_STDERR_TAIL:]
    match child.returncode:
        case 0:
            return
        case status if status == _PREFLIGHT_REFUSED:
            raise LoadError(f"cannot load {path}: {said}: install what is missing, or rats-tls again")
        case status if status < 0:
            how = f"crashes ({signal.Signals(-status).name})"
        case status:
            how = f"ends the process with status {status}"
    raise LoadError(f"loading {path} {how}, saying {said or 'nothing'!r}: install rats-tls again, with its plug-ins")


def _open(path: Path, plugins: Plugins) -> Library:
    try:
        library: Any = ffi.dlopen(str(path))
    except OSError as error:
        raise LoadError(f"cannot load {path}: {error}: install what is missing, or rats-tls again") from error
    missing = [name for name in (f"rats_tls_{function}" for function in FUNCTIONS) if not _has(library, name)]
    if missing:
        raise LoadError(f"{path} is not librats_tls, it has no {', '.join(missing)}: name the right file in {VARIABLE}")
    layout = choose_layout(
        symbol_size(library, "global_core_context"), has_claims_symbol=_has(library, "free_claims_list")
    )
    # The constructor took the level from the environment, and below ERROR the library prints to standard output.
    library.global_log_level = LogLevel.NONE
    return Library(path, layout, plugins, cast(RatsTls, library))


def _has(library: Any, name: str) -> bool:
    try:
        getattr(library, name)
    except AttributeError:
        return False
    return True
