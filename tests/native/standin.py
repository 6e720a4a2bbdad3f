"""Build the stand-in for librats_tls that tests and the demo load, beside plug-ins that are no more than file names."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")
ALLOWED = {"RATSTLS_STANDIN": "1"}  # without it the stand-in refuses to load
PLUGINS = {
    "crypto-wrappers/libcrypto_wrapper": ("openssl", "nullcrypto"),
    "attesters/libattester": ("nullattester", "sgx_ecdsa"),
    "verifiers/libverifier": ("nullverifier", "sgx_ecdsa", "sgx_ecdsa_qve", "csv"),
    "tls-wrappers/libtls_wrapper": ("openssl", "nulltls"),
}


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
