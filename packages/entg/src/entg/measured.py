"""What an enclave's measured image demands of the gateway in it, and what a command line may add. Does no I/O.

Inside an enclave the host chooses the command line. So whatever is not known to leave the links as safe as the image
wants them is refused: an option that nobody has thought about, too.

The grammar of the settings, ``/etc/entg/gateway.toml``, in which everything may be left out::

    [enta]              the links to ENTAs
    judge  = true       peers must show evidence that the policy accepts
    attest = true       this enclave shows its own
    [entg]              the link to the peer ENTG, likewise
    judge  = true
    attest = true

A leg of which both are false may be plain, if nobody asks for more.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from enlink.attestation import Attestation, Side
from enlink.errors import ConfigError

ATTESTER: Final = "sgx_ecdsa"
VERIFIER: Final = "sgx_ecdsa_qve"  # the one whose work is done by an enclave of Intel's: it trusts nothing of the host
TLS: Final = "openssl"
CRYPTO: Final = "openssl"

_FIXED: Final = {"attester": ATTESTER, "verifier": VERIFIER, "tls": TLS, "crypto": CRYPTO}
_FREE: Final = frozenset(
    {"occlum", "run", "entg_connect", "entg_listen", "enta_listen", "grace", "log_level", "log_format"}
    | {"enta_rats_tls", "entg_rats_tls", "mutual", "policy"}  # these can only add to what the image demands
)


@dataclass(frozen=True, slots=True)
class LegTerms:
    """What the links of one leg must do: ``judge`` their peers, and ``attest`` this enclave to them."""

    judge: bool = True
    attest: bool = True


@dataclass(frozen=True, slots=True)
class Terms:
    """What the image demands of each leg: everything, unless it says otherwise."""

    enta: LegTerms = LegTerms()
    entg: LegTerms = LegTerms()


def parse_terms(text: str) -> Terms:
    """Return the terms that *text* sets.

    Raises:
        ConfigError: it is no TOML, has an unknown key, or a value that is neither true nor false.
    """
    try:
        table: Mapping[str, object] = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"this is no TOML: {error}") from error
    for name in table:
        if name not in ("enta", "entg"):
            raise ConfigError(f"{name!r:.80} is no leg of a gateway: there are [enta] and [entg]")
    return Terms(*(_leg(name, table.get(name, {})) for name in ("enta", "entg")))


def _leg(name: str, table: object) -> LegTerms:
    if not isinstance(table, dict):
        raise ConfigError(f"{name} is no table: write [{name}], and what it demands below")
    for key, value in table.items():
        if key not in ("judge", "attest"):
            raise ConfigError(f"{name}: {key!r:.80} is not known: there are judge and attest")
        if not isinstance(value, bool):
            raise ConfigError(f"{name}.{key}: {value!r:.80} is neither true nor false")
    return LegTerms(**table)


def refuse_loosening(options: Mapping[str, object], defaults: Mapping[str, object]) -> None:
    """Refuse every option that does not leave the links as safe as the image wants them.

    Args:
        options: as they are parsed; defaults: as they would be without a command line.

    Raises:
        ConfigError: there is one.
    """
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        if name in _FIXED:
            if value not in (None, _FIXED[name]):
                raise ConfigError(f"{option} {value!r:.80}: in an enclave it is {_FIXED[name]}: leave it out")
        elif name not in _FREE and value != defaults.get(name):
            raise ConfigError(f"{option} is not for the inside of an enclave: leave it out, or use --host elsewhere")
    if options.get("log_level") == "debug":
        raise ConfigError("--log-level debug tells the host more than it should know: use info")


def attestation_of(
    terms: LegTerms, side: Side, *, is_asked: bool, is_mutual: bool, policy: str | None
) -> Attestation | None:
    """Return how the links of a leg are attested; None if they may be plain, and nobody asks for more.

    Args:
        side: in handshakes, a server attests and a client judges; a mutual one makes both do both.
        is_asked: the command line wants attested links here.
        is_mutual: if they are attested, it wants them to be so both ways.
        policy: the command line's own policy, which comes on top of the image's.
    """
    if not (terms.judge or terms.attest or is_asked):
        return None
    is_lacking = terms.judge if side == "server" else terms.attest
    return Attestation(
        attester=ATTESTER,
        verifier=VERIFIER,
        tls=TLS,
        crypto=CRYPTO,
        is_mutual=is_mutual or is_lacking,
        policy=policy,
    )


def is_judging(attestation: Attestation | None, side: Side) -> bool:
    """Whether links that are attested like this judge their peers."""
    return attestation is not None and (side == "client" or attestation.is_mutual)


def is_attesting(attestation: Attestation | None, side: Side) -> bool:
    """Whether links that are attested like this attest this enclave."""
    return attestation is not None and (side == "server" or attestation.is_mutual)
