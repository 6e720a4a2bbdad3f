"""List the plug-ins of an installation by their file names, since the library itself never says what it found."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ratstls.config import SessionConfig
from ratstls.errors import ConfigError, LoadError

DEFAULT_DIRECTORY = Path("/usr/local/lib/rats-tls")  # compiled into the library, and where it is installed itself
_DIRECTORIES = {
    "crypto": ("crypto-wrappers", "crypto_wrapper"),
    "attester": ("attesters", "attester"),
    "verifier": ("verifiers", "verifier"),
    "tls": ("tls-wrappers", "tls_wrapper"),
}


@dataclass(frozen=True, slots=True)
class Plugins:
    """The names that each kind of plug-in has, sorted; the library loads what it finds there and no more."""

    directory: Path
    crypto: tuple[str, ...]
    attester: tuple[str, ...]
    verifier: tuple[str, ...]
    tls: tuple[str, ...]

    def require(self, config: SessionConfig) -> None:
        """Check that all four plug-ins are there.

        Raises:
            ConfigError: one is not.
        """
        for kind, (directory, _) in _DIRECTORIES.items():
            wanted, present = getattr(config, kind), getattr(self, kind)
            if wanted not in present:
                raise ConfigError(
                    f"there is no {kind} {wanted!r} in {self.directory / directory}: choose of {', '.join(present)},"
                    " or install a build of rats-tls that has it"
                )


def list_plugins(library: Path) -> Plugins:
    """Return the plug-ins that the library at *library* will load: those beside it or else the installed ones.

    Raises:
        LoadError: a directory is missing or has no plug-in, which the library would answer by ending the process.
    """
    beside = library.parent
    directory = beside if (beside / "attesters").is_dir() else DEFAULT_DIRECTORY
    names = {kind: _names(directory / folder, prefix) for kind, (folder, prefix) in _DIRECTORIES.items()}
    return Plugins(directory, **names)


def _names(folder: Path, prefix: str) -> tuple[str, ...]:
    pattern = re.compile(rf"lib{prefix}_(.+)\.so")
    try:
        found = [match[1] for entry in folder.iterdir() if (match := pattern.fullmatch(entry.name))]
    except OSError as error:
        raise LoadError(f"cannot list the plug-ins in {folder} ({error.strerror}): install rats-tls again") from error
    if not found:
        raise LoadError(f"{folder} has no plug-in (lib{prefix}_*.so): install rats-tls again")
    return tuple(sorted(found))
