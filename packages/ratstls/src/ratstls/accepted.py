"""One sort of peer that a policy accepts: the conditions of an entry, and who meets them. Does no I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ratstls.errors import BadOption
from ratstls.evidence import Evidence
from ratstls.verdict import Reason, Verdict, rejected

_MEASUREMENT_BYTES: Final = 32  # SHA-256 for SGX, SM3 for CSV


class PolicyError(BadOption):
    """A policy is malformed, contradicts itself, accepts nobody, or asks for what the library cannot deliver."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """One sort of peer to accept: whoever meets every condition that is not None.

    An SGX enclave needs *mr_enclave*, or *mr_signer* with both *product_id* and *minimum_svn*: the same signer signs
    other products too, and has signed versions with holes. A CSV guest needs *measurement*, and that alone.

    Raises:
        PolicyError: too few conditions or of both sorts, a length other than 32 bytes, all zeros, more than 16 bits.
    """

    mr_enclave: bytes | None = None
    mr_signer: bytes | None = None
    product_id: int | None = None
    minimum_svn: int | None = None
    measurement: bytes | None = None

    def __post_init__(self) -> None:
        for name in ("mr_enclave", "mr_signer", "measurement"):
            value: bytes | None = getattr(self, name)
            if value is not None:
                check_bytes(name, value, _MEASUREMENT_BYTES)
        for name in ("product_id", "minimum_svn"):
            number: int | None = getattr(self, name)
            if number is not None and not 0 <= number <= 0xFFFF:
                raise PolicyError(f"{name}: {number} is not a number from 0 to 65535")
        signer = (self.mr_signer, self.product_id, self.minimum_svn)
        if self.measurement is not None and (self.mr_enclave, *signer) != (None,) * 4:
            raise PolicyError("measurement is of a CSV guest and the rest of SGX enclaves: write one entry for each")
        if self.measurement is None and self.mr_enclave is None and None in signer:
            raise PolicyError(
                "an entry accepts too much: give mr_enclave; or mr_signer, product_id and minimum_svn; or measurement"
            )

    def unmet(self, evidence: Evidence) -> tuple[int, Verdict] | None:
        """Return how many conditions sound *evidence* meets before one that it does not; None if it meets them all."""
        met = 0
        exact: tuple[tuple[Reason, str, bytes | int | None, bytes | int | None], ...] = (
            ("mrenclave", "MRENCLAVE", self.mr_enclave, evidence.mr_enclave),
            ("mrsigner", "MRSIGNER", self.mr_signer, evidence.mr_signer),
            ("product_id", "product id", self.product_id, evidence.product_id),
            ("measurement", "measurement", self.measurement, evidence.csv_measurement),
        )
        for reason, label, wanted, found in exact:
            if wanted is not None and wanted != found:
                shown = found.hex() if isinstance(found, bytes) else found
                text = f"{label} {shown} is none that the policy accepts: if it is the one you mean, add it there"
                return met, rejected(reason, text)
            met += wanted is not None
        svn = evidence.security_version or 0
        if self.minimum_svn is not None and svn < self.minimum_svn:
            return met, rejected(
                "svn", f"security version {svn} is below {self.minimum_svn}: update the peer's enclave"
            )
        return None

    def combined(self, other: Accepted) -> Accepted | None:
        """Return the entry for whoever meets the conditions of both, or None if nobody can."""
        is_one_sort = (self.measurement is None) == (other.measurement is None)
        pairs = zip(self._exact(), other._exact(), strict=True)
        if not is_one_sort or any(mine != theirs and None not in (mine, theirs) for mine, theirs in pairs):
            return None
        return Accepted(
            mr_enclave=self.mr_enclave or other.mr_enclave,
            mr_signer=self.mr_signer or other.mr_signer,
            product_id=other.product_id if self.product_id is None else self.product_id,
            minimum_svn=max((svn for svn in (self.minimum_svn, other.minimum_svn) if svn is not None), default=None),
            measurement=self.measurement,
        )

    def _exact(self) -> tuple[bytes | int | None, ...]:
        return self.mr_enclave, self.mr_signer, self.product_id, self.measurement

    def __str__(self) -> str:
        hashes = (("MRENCLAVE", self.mr_enclave), ("MRSIGNER", self.mr_signer), ("measurement", self.measurement))
        numbers = (("product id", self.product_id), ("svn ≥", self.minimum_svn))
        return " ".join(
            [f"{label} {value.hex()[:8]}…" for label, value in hashes if value is not None]
            + [f"{label} {number}" for label, number in numbers if number is not None]
        )


def check_bytes(name: str, value: bytes, length: int) -> None:
    """Make sure that *value* may stand in a policy.

    Raises:
        PolicyError: it has another length, or is all zeros.
    """
    if len(value) != length:
        raise PolicyError(f"{name}: {value.hex()[:80]!r} has {len(value)} bytes, not {length}")
    if not any(value):
        raise PolicyError(f"{name}: all zeros is a placeholder and nobody's value: write the real one")
