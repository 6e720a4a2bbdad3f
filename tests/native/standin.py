"""Build the stand-in for librats_tls that tests and the demo load, and run Python with it in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")
ALLOWED = {"RATSTLS_STANDIN": "1"}  # without it the stand-in refuses to load
# The library finds plug-ins, and the stand-in no more than their names.
PLUGINS = {
    "crypto-wrappers/libcrypto_wrapper": ("openssl", "nullcrypto"),
    "attesters/libattester": ("nullattester", "sgx_ecdsa"),
    "verifiers/libverifier": ("nullverifier", "sgx_ecdsa", "sgx_ecdsa_qve", "csv"),
    "tls-wrappers/libtls_wrapper": ("openssl", "nulltls"),
}


@dataclass(frozen=True)
class Installation:
    """A library, the stand-in or another."""

    path: Path

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to load it."""
        return {**ALLOWED, "RATSTLS_LIBRARY": str(self.path)}

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run Python in a process of its own: whatever the library does to it, this one lives."""
        command = [sys.executable, "-I", *arguments]
        merged = {**os.environ, **self.environment, **environment}
        return subprocess.run(command, env=merged, capture_output=True, text=True, timeout=50, check=False)


def build(directory: Path, context_size: int = 240) -> Path:
    """Compile the stand-in into a new *directory* and return the library's path. *context_size* says which build."""
    for prefix, names in PLUGINS.items():
        for name in names:
            plugin = directory / f"{prefix}_{name}.so"
            plugin.parent.mkdir(parents=True, exist_ok=True)
            plugin.touch()
    library = directory / "librats_tls_standin.so"
    compile_library(SOURCE, library, f"-DCONTEXT_SIZE={context_size}", "-lssl", "-lcrypto")
    return library


def compile_library(source: Path, library: Path, *options: str) -> None:
    """Compile one C file into a shared library; a warning is an error."""
    flags = ["-std=c11", "-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror", f"-Wl,-soname,{library.name}"]
    compiler = os.environ.get("CC", "gcc")
    subprocess.run([compiler, *flags, str(source), "-o", str(library), *options], check=True)
