"""Who is at the other end of an attested link, for logs, status and decisions. Judging is policy.py's job."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Final

from ratstls.evidence import Evidence, EvidenceKind
from ratstls.verdict import Reason, Verdict

_MEASUREMENTS: Final = ("mr_enclave", "mr_signer", "product_id", "security_version", "attributes", "csv_measurement")


@dataclass(frozen=True, slots=True)
class Peer:
    """A peer whose evidence a verifier has confirmed and a policy has accepted.

    Attributes:
        kind: the type of its evidence; ``unknown`` also means none at all, which only insecure policies accept.
        measurements: the fields of its evidence by name: hexadecimal, numbers in decimal. Empty without evidence.
        claims: its custom claims, attested, but of its own choice.
        verifier: the plug-in that confirmed the evidence.
        reason: why the policy accepted it.
        verified_at: when, UTC, by this machine's clock.
    """

    kind: EvidenceKind
    measurements: tuple[tuple[str, str], ...]
    claims: tuple[tuple[str, bytes], ...]
    verifier: str
    reason: Reason
    verified_at: datetime

    @classmethod
    def from_evidence(cls, evidence: Evidence, verdict: Verdict, verifier: str, verified_at: datetime) -> Peer:
        """Return what is worth keeping of *evidence* that *verdict* accepts."""
        fields = ((name, getattr(evidence, name)) for name in _MEASUREMENTS)
        measurements = tuple(
            (name, value.hex() if isinstance(value, bytes) else str(value))
            for name, value in fields
            if value is not None
        )
        return cls(evidence.kind, measurements, evidence.custom_claims, verifier, verdict.reason, verified_at)

    def __str__(self) -> str:
        """One line for logs and status."""
        fields = " ".join(f"{name}={value}" for name, value in self.measurements) or "no measurement"
        claims = "".join(f" claim {name!r}={value.hex()}" for name, value in self.claims)
        when = self.verified_at.isoformat(timespec="seconds")
        return f"{self.kind} {fields}{claims} ({self.reason}, {self.verifier}, {when})"
