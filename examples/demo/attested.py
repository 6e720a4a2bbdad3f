"""The same path with all three links attested, by a real librats_tls or, where there is none, by the tests' stand-in.

The stand-in encrypts for real and attests for show: its evidence says what its environment tells it to.
"""

from __future__ import annotations

import sys
from pathlib import Path as FilePath
from typing import Any, Final

sys.path.insert(0, str(FilePath(__file__).parents[2] / "tests" / "native"))
import standin
from path import Path

GATEWAY_BUILD: Final = "5e" * 32
"""What the gateways' evidence says they run, and the agents' policy wants."""
STANDIN_SAYS: Final = {"STANDIN_MR_ENCLAVE": GATEWAY_BUILD, "STANDIN_ATTRIBUTES": "00" * 16}
POLICY: Final = f"""\
evidence = "sgx_ecdsa"

[[accept]]
mr_enclave = "{GATEWAY_BUILD}"
"""


def build_standin(directory: FilePath) -> FilePath:
    """Compile the stand-in into a new directory in *directory*, and return the library's path."""
    return standin.build(directory / "rats-tls")


def encrypted_path(library: FilePath, **options: Any) -> Path:
    """Return a path whose links *library* encrypts, with plug-ins that prove nothing; *options* are `Path`'s."""
    insecure = ["--entg-rats-tls", "--insecure-no-attestation"]
    gateway = [*insecure, "--enta-rats-tls"]
    environment = {"RATSTLS_LIBRARY": str(library)}
    return Path(client=insecure, server=insecure, near=gateway, far=gateway, environment=environment, **options)


def attested_path(library: FilePath, directory: FilePath, *, policy: str = POLICY, **options: Any) -> Path:
    """Return a path whose gateways attest to those who dial them, with the stand-in at *library*.

    Args:
        directory: where the policy is written.
        options: as for `Path`; each program's come after what attestation needs.
    """
    file = directory / "policy.toml"
    file.write_text(policy)
    judging = ["--entg-rats-tls", "--policy", str(file)]
    attesting = ["--entg-rats-tls", "--enta-rats-tls", "--attester", "sgx_ecdsa"]
    environment = {**standin.Installation(library).environment, **STANDIN_SAYS}
    return Path(
        **{
            **options,
            "client": [*judging, *options.get("client", ())],
            "server": [*judging, *options.get("server", ())],
            "near": [*attesting, "--policy", str(file), *options.get("near", ())],
            "far": [*attesting, *options.get("far", ())],
            "environment": {**environment, **options.get("environment", {})},
        }
    )
