"""What a peer's evidence says, as a value. policy.py judges it, _layout.py reads it from C."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

EvidenceKind = Literal["sgx_ecdsa", "tdx_ecdsa", "csv", "unknown"]


@dataclass(frozen=True, slots=True)
class Evidence:
    """Evidence whose binding to the peer's TLS key the library's verifier has confirmed, copied out of its callback.

    The peer chooses ``kind``, whatever verifier judged it: read nothing else before ``kind`` is the one expected. None
    means that the library delivered nothing: all fields but ``kind`` and ``custom_claims`` are None or empty for
    ``tdx_ecdsa`` and ``unknown`` (which includes SEV, and a peer that presented no evidence at all).

    ``attributes`` are 16 bytes: SGX flags and then XFRM, each a little-endian u64. ``custom_claims`` are attested, but
    the peer chose their bytes; their order is the peer's, and names may repeat. ``quote`` is cut to its own length.
    """

    kind: EvidenceKind
    mr_enclave: bytes | None = None
    mr_signer: bytes | None = None
    product_id: int | None = None
    security_version: int | None = None
    attributes: bytes | None = None
    custom_claims: tuple[tuple[str, bytes], ...] = ()
    quote: bytes = field(default=b"", repr=False)
    csv_vm_id: bytes | None = None
    csv_vm_version: bytes | None = None
    csv_measurement: bytes | None = None
    csv_policy: bytes | None = None
