"""Judge a peer's evidence by what its operator allows. Does no I/O: policy_file.py reads a policy from text.

A policy denies by default: it accepts what it describes and nothing else. That evidence is genuine and belongs to the
peer's TLS key is settled by the library's verifier before anything here is asked.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from hmac import compare_digest
from itertools import product
from types import MappingProxyType
from typing import Final, Literal, get_args

from ratstls.accepted import Accepted, PolicyError, check_bytes
from ratstls.evidence import Evidence
from ratstls.verdict import DELIVERS_FIELDS, Verdict, can_be_debugged, find_flaw, platform_of, rejected

EvidenceType = Literal["sgx_ecdsa", "csv", "tdx_ecdsa", "sev", "sev_snp", "sgx_la"]
_EVIDENCE_TYPES: Final[tuple[str, ...]] = get_args(EvidenceType)

EVIDENCE_OF_VERIFIER: Final[Mapping[str, EvidenceType | None]] = MappingProxyType(
    {
        "sgx_ecdsa": "sgx_ecdsa",
        "sgx_ecdsa_qve": "sgx_ecdsa",
        "csv": "csv",
        "tdx_ecdsa": "tdx_ecdsa",
        "sev": "sev",
        "sev_snp": "sev_snp",
        "sgx_la": "sgx_la",
        "nullverifier": None,
    }
)
"""The type of evidence that each of the library's verifiers confirms; None for the one that lets everybody in."""

PLATFORM_BYTES: Final = 16

# Choices of ours: an attested link that lives longer than a day says little, one of less than a second carries nothing.
_LINK_AGE_LIMITS_S: Final = (1.0, 24 * 3600.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What is asked of a peer before a link to it may carry anything.

    Attributes:
        evidence: the type of evidence to require; the peer presents no other.
        accept: the sorts of peer to accept: one of them must fit.
        claims: custom claims, by name, that the peer must make once each, with exactly these bytes.
        platforms: where not None, the machines to accept, each by the 16 bytes of `verdict.platform_of`.
        allow_debug: accept peers whose host can read their memory.
        max_link_age_s: after how many seconds a link is re-made and attested again, 1 second to 24 hours.
        accept_any_measurement: for ``--insecure-accept-any-measurement``, instead of *accept*.
        no_attestation: for ``--insecure-no-attestation``, instead of everything but *max_link_age_s*.

    Raises:
        PolicyError: nobody could be accepted, or the evidence says nothing of what is required.
    """

    evidence: EvidenceType = "sgx_ecdsa"
    accept: tuple[Accepted, ...] = ()
    claims: tuple[tuple[str, bytes], ...] = ()
    platforms: frozenset[bytes] | None = None
    allow_debug: bool = False
    max_link_age_s: float = 3600.0
    accept_any_measurement: bool = False
    no_attestation: bool = False

    def __post_init__(self) -> None:
        low, high = _LINK_AGE_LIMITS_S
        if not low <= self.max_link_age_s <= high:
            raise PolicyError(f"max_link_age: {self.max_link_age_s:g} s is not from 1 second to 24 hours")
        if self.no_attestation:
            wants = (
                self.accept,
                self.claims,
                self.allow_debug,
                self.accept_any_measurement,
                self.platforms is not None,
            )
            if any(wants):
                raise PolicyError("no_attestation goes with no other requirement: nobody could be held to it")
        else:
            self._check_evidence()
            self._check_claims()
            self._check_platforms()

    def _check_evidence(self) -> None:
        _check_known("evidence", self.evidence, _EVIDENCE_TYPES)
        if self.accept_any_measurement and self.accept:
            raise PolicyError("accept_any_measurement makes a list of accepted peers void: drop one or the other")
        if self.evidence not in DELIVERS_FIELDS and not self.accept_any_measurement:
            raise PolicyError(
                f"evidence: librats_tls confirms {self.evidence} but delivers none of its measurements, so no policy"
                f" can be about them: use {' or '.join(sorted(DELIVERS_FIELDS))}, or --insecure-accept-any-measurement"
            )
        if not self.accept and not self.accept_any_measurement:
            raise PolicyError("the policy accepts nobody: add an [[accept]] with mr_enclave, mr_signer or measurement")
        for entry in self.accept:
            if (self.evidence == "csv") != (entry.measurement is not None):
                raise PolicyError(
                    f"{entry} is no condition for {self.evidence}: csv has measurement, sgx_ecdsa the others"
                )

    def _check_claims(self) -> None:
        names = [name for name, _ in self.claims]
        for name in names:
            if not name or not name.isprintable():
                raise PolicyError(f"claims: {name!r} is no name of a claim")
            if names.count(name) > 1:
                raise PolicyError(f"claims: {name!r} is required twice: a peer makes a claim once")

    def _check_platforms(self) -> None:
        if self.platforms is None:
            return
        if self.evidence != "sgx_ecdsa":
            raise PolicyError(
                f"platforms: {self.evidence} does not say under a signature where it runs, only sgx_ecdsa does"
            )
        if not self.platforms:
            raise PolicyError("platforms: an empty list accepts nobody: drop it, or name a platform")
        for platform in self.platforms:
            check_bytes("platforms", platform, PLATFORM_BYTES)

    @classmethod
    def any_measurement(cls, verifier: str) -> Policy:
        """Return the policy of ``--insecure-accept-any-measurement`` for what *verifier* confirms.

        Raises:
            PolicyError: that is no verifier, or one that confirms nothing.
        """
        _check_known("verifier", verifier, EVIDENCE_OF_VERIFIER)
        evidence = EVIDENCE_OF_VERIFIER[verifier]
        if evidence is None:
            raise PolicyError(f"{verifier} confirms nothing: name another verifier, or say --insecure-no-attestation")
        return cls(evidence=evidence, accept_any_measurement=True)

    def check_verifier(self, verifier: str) -> None:
        """Make sure that *verifier* is what this policy relies on. Call it before the library hears of either.

        Raises:
            PolicyError: it is unknown or empty, confirms nothing, or confirms another type of evidence.
        """
        _check_known("verifier", verifier, EVIDENCE_OF_VERIFIER)
        confirmed = EVIDENCE_OF_VERIFIER[verifier]
        if not self.no_attestation and confirmed != self.evidence:
            fitting = " or ".join(name for name, kind in EVIDENCE_OF_VERIFIER.items() if kind == self.evidence)
            raise PolicyError(
                f"{verifier} confirms {confirmed or 'nothing'}, the policy wants {self.evidence}: use {fitting}"
            )

    def judge(self, evidence: Evidence) -> Verdict:
        """Say whether a peer with this *evidence* may have a link. Never raises, whatever the peer sent."""
        if self.no_attestation:
            return Verdict(True, "no_attestation", "nothing was asked of the peer: INSECURE")
        verdict = (
            self._judge_kind(evidence)
            or self._judge_platform(evidence)
            or self._judge_measurement(evidence)
            or self._judge_claims(evidence)
        )
        if verdict is not None:
            return verdict
        if self.accept_any_measurement:
            return Verdict(True, "any_measurement", f"genuine {self.evidence}, whatever it runs: INSECURE")
        return Verdict(True, "accepted", f"the policy accepts this {self.evidence} peer")

    def _judge_kind(self, evidence: Evidence) -> Verdict | None:
        # The peer names the type of its own evidence, whatever the verifier has verified.
        if self.evidence in DELIVERS_FIELDS:
            if evidence.kind == "unknown":
                return rejected(
                    "no_evidence", f"the peer showed no {self.evidence} evidence: start it with that attester"
                )
            if evidence.kind != self.evidence:
                return rejected(
                    "evidence_type", f"the peer's evidence is {evidence.kind}, and {self.evidence} is required"
                )
            if (flaw := find_flaw(evidence)) is not None:
                return flaw
            if can_be_debugged(evidence) and not self.allow_debug:
                return rejected("debug", "the peer's host can debug it: build and sign it not debuggable")
        elif evidence.kind not in ("unknown", self.evidence):
            return rejected("evidence_type", f"the peer's evidence is {evidence.kind}, and {self.evidence} is required")
        return None

    def _judge_platform(self, evidence: Evidence) -> Verdict | None:
        if self.platforms is None or platform_of(evidence) in self.platforms:
            return None
        return rejected("platform", f"platform {platform_of(evidence).hex()} is not listed: if it is yours, add it")

    def _judge_measurement(self, evidence: Evidence) -> Verdict | None:
        if self.accept_any_measurement:
            return None
        unmet = [entry.unmet(evidence) for entry in self.accept]
        # Of several entries the one that the peer came closest to says most about what is wrong.
        failures = [failure for failure in unmet if failure is not None]
        return max(failures, key=lambda failure: failure[0])[1] if len(failures) == len(unmet) else None

    def _judge_claims(self, evidence: Evidence) -> Verdict | None:
        for name, wanted in self.claims:
            values = [value for claim, value in evidence.custom_claims if claim == name]
            if not values:
                return rejected("claim_missing", f"the peer does not make the claim {name!r}")
            if len(values) > 1:
                return rejected("claim_repeated", f"the peer makes the claim {name!r} {len(values)} times")
            # A measurement is public, but what a claim must be may be known to few: how long this takes says nothing.
            if not compare_digest(values[0], wanted):
                return rejected("claim_value", f"the claim {name!r} has another value than the policy requires")
        return None

    def tightened(self, other: Policy) -> Policy:
        """Return the policy that accepts whom both accept, such as an image's policy and its command line's.

        Raises:
            PolicyError: there can be no such peer.
        """
        max_link_age_s = min(self.max_link_age_s, other.max_link_age_s)
        if self.no_attestation or other.no_attestation:
            return replace(other if self.no_attestation else self, max_link_age_s=max_link_age_s)
        if self.evidence != other.evidence:
            raise PolicyError(f"evidence: nobody has both {self.evidence} and {other.evidence}: ask for one of them")
        if self.accept_any_measurement or other.accept_any_measurement:
            accept = self.accept or other.accept
        else:
            both = [mine.combined(theirs) for mine, theirs in product(self.accept, other.accept)]
            accept = tuple(dict.fromkeys(entry for entry in both if entry is not None))
            if not accept:
                raise PolicyError("no peer is accepted by both policies: they have no measurement in common")
        platforms = self.platforms if other.platforms is None else other.platforms
        if self.platforms is not None and other.platforms is not None:
            platforms = self.platforms & other.platforms
            if not platforms:
                raise PolicyError("no peer is accepted by both policies: they have no platform in common")
        return Policy(
            evidence=self.evidence,
            accept=accept,
            claims=tuple(dict.fromkeys(self.claims + other.claims)),
            platforms=platforms,
            allow_debug=self.allow_debug and other.allow_debug,
            max_link_age_s=max_link_age_s,
            accept_any_measurement=self.accept_any_measurement and other.accept_any_measurement,
        )

    @property
    def warnings(self) -> tuple[str, ...]:
        """What to say at start and every minute as long as this policy is in force; empty where it is safe."""
        if self.no_attestation:
            return ("INSECURE, no attestation: links are encrypted, but nobody knows who is at their other end",)
        texts = []
        if self.accept_any_measurement:
            debug = "" if self.evidence in DELIVERS_FIELDS else ", one that its host can debug included"
            texts.append(
                f"INSECURE, any measurement: every genuine {self.evidence} peer is let in, whatever it runs{debug}"
            )
        if self.allow_debug:
            texts.append("INSECURE, allow_debug: peers are let in whose host can read their memory, keys included")
        return tuple(texts)

    def __str__(self) -> str:
        """One line for logs and status."""
        age = f"re-attested every {self.max_link_age_s:g} s"
        if self.no_attestation:
            return f"no attestation; {age}"
        accept = "any measurement" if self.accept_any_measurement else " | ".join(map(str, self.accept))
        parts = [f"{self.evidence}: {accept}"]
        parts += [f"claims {', '.join(name for name, _ in self.claims)}"] if self.claims else []
        parts += [f"{len(self.platforms)} platforms"] if self.platforms is not None else []
        return "; ".join([*parts, f"debug {'allowed' if self.allow_debug else 'refused'}", age])


def _check_known(name: str, value: str, known: Collection[str]) -> None:
    if value not in known:
        nearest = get_close_matches(value, known, n=1, cutoff=0.0)[0]
        raise PolicyError(f"{name}: {value!r:.80} is not known, the nearest is {nearest!r}")
