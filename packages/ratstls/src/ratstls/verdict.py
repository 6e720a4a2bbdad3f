"""Tell whether evidence holds together, whatever the policy. policy.py asks here first, then judges by its own lists.

The library hands over fields *and* the raw quote that they were read from. Both must be there, be of the right length
and say the same: a mistake in reading one of them must not let anybody in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

from ratstls.evidence import Evidence

Reason = Literal[
    "accepted", "any_measurement", "no_attestation",
    "no_evidence", "evidence_type", "no_fields", "field_length", "short_quote", "quote_version", "quote_mismatch",
    "debug", "platform", "mrenclave", "mrsigner", "product_id", "svn", "measurement",
    "claim_missing", "claim_repeated", "claim_value",
]  # fmt: skip
"""Why evidence is accepted (the first three) or rejected: short names for logs, counters and status."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a policy says of evidence. ``text`` is one line for a person: what is wrong, which value, what to do."""

    accepted: bool
    reason: Reason
    text: str


def rejected(reason: Reason, text: str) -> Verdict:
    """Return the verdict that keeps a peer out."""
    return Verdict(False, reason, text)


@dataclass(frozen=True, slots=True)
class _Field:
    label: str
    offset: int  # in the quote
    length: int  # bytes; numbers are little-endian


# Intel SGX DCAP, ECDSA Quote Library API, appendix A.4: a header of 48 bytes, a report body of 384, a length of 4.
# rats-tls, csv.h: the attestation report fills a page; SEV API 0.24, chapter 3, for the bits of the policy.
_FIELDS: Final[Mapping[str, Mapping[str, _Field]]] = MappingProxyType(
    {
        "sgx_ecdsa": {
            "attributes": _Field("the attributes", 96, 16),
            "mr_enclave": _Field("MRENCLAVE", 112, 32),
            "mr_signer": _Field("MRSIGNER", 176, 32),
            "product_id": _Field("the product id", 304, 2),
            "security_version": _Field("the security version", 306, 2),
        },
        "csv": {
            "csv_measurement": _Field("the measurement", 144, 32),
            "csv_policy": _Field("the guest's policy", 176, 4),
        },
    }
)
_SHORTEST_QUOTE: Final = {"sgx_ecdsa": 436, "csv": 4096}
_SGX_QUOTE_VERSION: Final = 3
_SGX_FLAGS: Final = 96  # the lowest byte
_SGX_DEBUG: Final = 0x2
_CSV_POLICY: Final = 176  # the lowest byte
_CSV_NO_DEBUG: Final = 0x1
_PLATFORM: Final = slice(28, 44)

DELIVERS_FIELDS: Final = frozenset(_FIELDS)
"""The types of evidence of which the library delivers anything that a policy could be about."""


def find_flaw(evidence: Evidence) -> Verdict | None:
    """Return why evidence of a kind in `DELIVERS_FIELDS` proves nothing, or None where it holds together."""
    kind, quote, fields = evidence.kind, evidence.quote, _FIELDS[evidence.kind]
    values: dict[str, bytes | int | None] = {name: getattr(evidence, name) for name in fields}
    for name, value in values.items():
        if value is None:
            return rejected("no_fields", f"the library delivered {kind} evidence without {fields[name].label}")
        if isinstance(value, bytes) and len(value) != fields[name].length:
            return rejected("field_length", f"{fields[name].label} has {len(value)} bytes, not {fields[name].length}")
    if len(quote) < _SHORTEST_QUOTE[kind]:
        return rejected("short_quote", f"the quote has {len(quote)} bytes, and {kind} at least {_SHORTEST_QUOTE[kind]}")
    if kind == "sgx_ecdsa" and (version := _number(quote[:2])) != _SGX_QUOTE_VERSION:
        return rejected("quote_version", f"the quote is of version {version}, and only version 3 is known here")
    for name, value in values.items():
        field = fields[name]
        in_quote = quote[field.offset : field.offset + field.length]
        if value != (in_quote if isinstance(value, bytes) else _number(in_quote)):
            return rejected("quote_mismatch", f"{field.label} differs from the quote: one of them was misread")
    return None


def can_be_debugged(evidence: Evidence) -> bool:
    """Tell whether the host can read and write the memory of a peer whose evidence has no flaw."""
    if evidence.kind == "csv":
        return not evidence.quote[_CSV_POLICY] & _CSV_NO_DEBUG
    return bool(evidence.quote[_SGX_FLAGS] & _SGX_DEBUG)


def platform_of(evidence: Evidence) -> bytes:
    """Return the 16 bytes by which Intel's quoting enclave names the machine that it runs on, from an SGX quote."""
    return evidence.quote[_PLATFORM]


def _number(data: bytes) -> int:
    return int.from_bytes(data, "little")
