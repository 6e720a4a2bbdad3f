"""What a command line asks of attested links: the options, and a checked value. Does no I/O; package ratstls does it.

Programs work without that package as long as nobody asks for attestation.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Final, Literal

from enlink.errors import ConfigError

Side = Literal["client", "server"]

_NAMES: Final = ("attester", "verifier", "tls", "crypto")
_SWITCHES: Final = ("mutual", "insecure_accept_any_measurement", "insecure_no_attestation")
_OPTIONS: Final = (*_NAMES, "policy", *_SWITCHES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attestation:
    """How a program's attested links are made: who proves what to whom is in docs/attestation.md.

    Attributes:
        attester, verifier, tls, crypto: names of plug-ins of librats_tls, never empty.
        is_mutual: both sides attest, and both judge.
        policy: the file that says whom to accept; None where nobody is judged, or one of the next two says it.
        accepts_any_measurement: any genuine enclave will do.
        is_waived: anybody at all will do.
    """

    attester: str
    verifier: str
    tls: str = "openssl"
    crypto: str = "openssl"
    is_mutual: bool = False
    policy: str | None = None
    accepts_any_measurement: bool = False
    is_waived: bool = False


def add_attestation_options(parser: argparse.ArgumentParser, **switches: str) -> None:
    """Add the options of attested links; *switches* are those that ask for one, each with its help text."""
    group = parser.add_argument_group(
        "attested links (RATS-TLS)", "see docs/attestation.md; they need librats_tls and the package eng-ratstls"
    )
    for name, text in switches.items():
        group.add_argument(f"--{name.replace('_', '-')}", action="store_true", help=text)
    group.add_argument("--mutual", action="store_true", help="both sides attest, and both judge")
    group.add_argument("--policy", metavar="FILE", help="whom to accept, in TOML")
    for name, text in (
        ("attester", "the plug-in that makes this side's evidence"),
        ("verifier", "the plug-in that confirms the peer's evidence"),
        ("tls", "the TLS wrapper (default: openssl)"),
        ("crypto", "the crypto wrapper (default: openssl)"),
    ):
        group.add_argument(f"--{name}", metavar="NAME", help=text)
    group.add_argument(
        "--insecure-accept-any-measurement",
        action="store_true",
        help="instead of --policy: accept every genuine enclave, an attacker's included",
    )
    group.add_argument(
        "--insecure-no-attestation",
        action="store_true",
        help="instead of --policy: accept anybody, and let null plug-ins pass; the link is encrypted, and no more",
    )


def read_attestation(
    options: argparse.Namespace, wanted: tuple[str, ...], sides: set[Side], *, verifier: str = "sgx_ecdsa"
) -> Attestation | None:
    """Make the value of parsed options; None if no link is to be attested.

    Args:
        wanted: the switches that ask for attested links, one of which must be there for the rest to make sense.
        sides: which sides of handshakes this program takes: only a client judges and only a server attests, unless
            ``--mutual`` makes both do both.
        verifier: the name where none is given.

    Raises:
        ConfigError: options that contradict one another, or that would do nothing.
    """
    given = [f"--{name.replace('_', '-')}" for name in _OPTIONS if getattr(options, name) not in (None, False)]
    if not any(getattr(options, name) for name in wanted):
        if given:
            switches = " or ".join(f"--{name.replace('_', '-')}" for name in wanted)
            raise ConfigError(
                f"{given[0]} is for attested links, and none is asked for: add {switches}, or leave it out"
            )
        return None
    is_waived, any_measurement = options.insecure_no_attestation, options.insecure_accept_any_measurement
    if is_waived and any_measurement:
        raise ConfigError("--insecure-no-attestation and --insecure-accept-any-measurement: one says it all")
    is_judging = options.mutual or "client" in sides
    is_attesting = options.mutual or "server" in sides
    if (is_waived or any_measurement) and options.policy is not None:
        insecure = "--insecure-no-attestation" if is_waived else "--insecure-accept-any-measurement"
        raise ConfigError(f"--policy {options.policy} and {insecure} contradict each other: choose")
    if not is_judging and (options.policy is not None or any_measurement):
        what = f"--policy {options.policy}" if options.policy is not None else "--insecure-accept-any-measurement"
        raise ConfigError(f"{what}: this side only attests and judges nobody: add --mutual, or leave it out")
    if is_judging and options.policy is None and not is_waived and not any_measurement:
        raise ConfigError(
            "attested links need --policy FILE, which says whom to accept: without one every genuine enclave would do,"
            " an attacker's included"
        )
    if is_attesting and options.attester is None and not is_waived:
        raise ConfigError(
            "this side attests: name what makes its evidence with --attester, as in --attester csv"
            " (sgx_ecdsa only inside Occlum)"
        )
    null = "nullattester"
    return Attestation(
        attester=options.attester if options.attester is not None else null,
        verifier=options.verifier if options.verifier is not None else ("nullverifier" if is_waived else verifier),
        tls=options.tls if options.tls is not None else "openssl",
        crypto=options.crypto if options.crypto is not None else "openssl",
        is_mutual=options.mutual,
        policy=options.policy,
        accepts_any_measurement=any_measurement,
        is_waived=is_waived,
    )
