"""What is kept of a peer's evidence, and how it reads in a log."""

from __future__ import annotations

from datetime import UTC, datetime

from ratstls.evidence import Evidence
from ratstls.peer import Peer
from ratstls.verdict import Verdict

WHEN = datetime(2026, 1, 2, tzinfo=UTC)


def test_measurements_are_kept_by_name() -> None:
    """Bytes in hexadecimal, numbers in decimal, zero included, and nothing that the evidence does not say."""
    evidence = Evidence(
        "sgx_ecdsa", mr_enclave=b"\x11" * 32, product_id=0, security_version=7, custom_claims=(("role", b"g"),)
    )
    peer = Peer.from_evidence(evidence, Verdict(True, "accepted", "fine"), "sgx_ecdsa_qve", WHEN)
    measurements = (("mr_enclave", "11" * 32), ("product_id", "0"), ("security_version", "7"))
    assert peer == Peer("sgx_ecdsa", measurements, (("role", b"g"),), "sgx_ecdsa_qve", "accepted", WHEN)
    assert str(peer) == (
        f"sgx_ecdsa mr_enclave={'11' * 32} product_id=0 security_version=7 claim 'role'=67"
        " (accepted, sgx_ecdsa_qve, 2026-01-02T00:00:00+00:00)"
    )


def test_a_peer_without_measurements_says_so() -> None:
    """As insecure policies accept it."""
    verdict = Verdict(True, "no_attestation", "INSECURE")
    peer = Peer.from_evidence(Evidence("unknown"), verdict, "nullverifier", WHEN)
    assert str(peer) == "unknown no measurement (no_attestation, nullverifier, 2026-01-02T00:00:00+00:00)"


def test_a_csv_guest_has_its_measurement() -> None:
    """Under a name of its own."""
    evidence = Evidence("csv", csv_measurement=b"\x22" * 32)
    peer = Peer.from_evidence(evidence, Verdict(True, "accepted", "fine"), "csv", WHEN)
    assert peer.measurements == (("csv_measurement", "22" * 32),)
