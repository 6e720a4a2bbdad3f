"""Read a policy from TOML text. Does no I/O: whoever calls has read the file, and names it when this fails.

The grammar, of which nothing else is known::

    evidence     = "sgx_ecdsa" | "csv"
    [[accept]]                              one of these must fit, with all that it says
    mr_enclave   = 64 hex digits
    mr_signer    = 64 hex digits
    product_id   = 0 to 65535
    minimum_svn  = 0 to 65535
    measurement  = 64 hex digits            of a CSV guest
    [claims]
    NAME         = { text = "..." } | { hex = "..." }
    platforms    = [32 hex digits, ...]     the machines, as quoting enclaves name them
    allow_debug  = false | true             default: false
    max_link_age = "30s" | "10m" | "1h"     default: 1h, at most 24h

What the two ``--insecure`` options say cannot be said in a file: nobody should find it there by surprise.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Final, TypeVar, cast

from ratstls.accepted import Accepted, PolicyError
from ratstls.policy import EvidenceType, Policy

T = TypeVar("T")

_KEYS: Final = ("evidence", "accept", "claims", "platforms", "allow_debug", "max_link_age")
_ACCEPT_KEYS: Final = ("mr_enclave", "mr_signer", "product_id", "minimum_svn", "measurement")
_HEX: Final = re.compile(r"(?:[0-9a-fA-F]{2})+")
_DURATION: Final = re.compile(r"(?P<number>[0-9]{1,6})(?P<unit>[smh])")
_UNIT_S: Final = {"s": 1.0, "m": 60.0, "h": 3600.0}
_LONGEST_SHOWN: Final = 80
_TYPE_NAMES: Final = {str: "a string", int: "a whole number", bool: "true or false", list: "a list", dict: "a table"}


def parse_policy(text: str) -> Policy:
    """Return the policy that *text* describes.

    Raises:
        PolicyError: it is no TOML, has an unknown key or a malformed value, or makes no sensible policy.
    """
    try:
        table: Mapping[str, object] = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise PolicyError(f"this is no TOML: {error}") from error
    for key in ("accept_any_measurement", "no_attestation"):
        if key in table:
            option = f"--insecure-{key.replace('_', '-')}"
            raise PolicyError(f"{key} has no place in a file: whoever starts the program must say {option}")
    _check_keys(table, _KEYS)
    if "evidence" not in table:
        raise PolicyError('evidence is missing: say which type peers must show, as in evidence = "sgx_ecdsa"')
    return Policy(
        # Policy itself refuses a type that it does not know.
        evidence=cast(EvidenceType, _typed(table["evidence"], str, "evidence")),
        accept=tuple(
            _accepted(entry, f"accept[{number}]")
            for number, entry in enumerate(_typed(table.get("accept", []), list, "accept"), start=1)
        ),
        claims=tuple(
            (name, _claim(value, f"claims.{_shown(name)}"))
            for name, value in _typed(table.get("claims", {}), dict, "claims").items()
        ),
        platforms=_platforms(table["platforms"]) if "platforms" in table else None,
        allow_debug=_typed(table.get("allow_debug", False), bool, "allow_debug"),
        max_link_age_s=_duration_s(table.get("max_link_age", "1h"), "max_link_age"),
    )


def _accepted(entry: object, where: str) -> Accepted:
    table = _typed(entry, dict, where)

    def digest(name: str) -> bytes | None:
        return _hex(table[name], name) if name in table else None

    def number(name: str) -> int | None:
        return _typed(table[name], int, name) if name in table else None

    try:
        _check_keys(table, _ACCEPT_KEYS)
        return Accepted(
            mr_enclave=digest("mr_enclave"),
            mr_signer=digest("mr_signer"),
            product_id=number("product_id"),
            minimum_svn=number("minimum_svn"),
            measurement=digest("measurement"),
        )
    except PolicyError as error:
        raise PolicyError(f"{where}: {error}") from error


def _claim(value: object, where: str) -> bytes:
    table = _typed(value, dict, where)
    _check_keys(table, ("text", "hex"), f"{where}: ")
    if len(table) != 1:
        raise PolicyError(f'{where}: give its value once, as {{ text = "..." }} or {{ hex = "..." }}')
    return _typed(table["text"], str, where).encode() if "text" in table else _hex(table["hex"], where)


def _platforms(value: object) -> frozenset[bytes]:
    return frozenset(_hex(item, "platforms") for item in _typed(value, list, "platforms"))


def _hex(value: object, where: str) -> bytes:
    digits = _typed(value, str, where)
    if not _HEX.fullmatch(digits):
        raise PolicyError(f"{where}: {_shown(digits)} is not hex: write two of 0-9 and a-f for each byte")
    return bytes.fromhex(digits)


def _duration_s(value: object, where: str) -> float:
    match = _DURATION.fullmatch(_typed(value, str, where))
    if match is None:
        raise PolicyError(f"{where}: {_shown(value)} is no duration: write a number and s, m or h, as in 1h")
    return int(match["number"]) * _UNIT_S[match["unit"]]


def _check_keys(table: Mapping[str, object], known: tuple[str, ...], where: str = "") -> None:
    for key in table:
        if key not in known:
            nearest = get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise PolicyError(f"{where}{_shown(key)} is no key of a policy: the nearest is {nearest!r}")


def _typed(value: object, kind: type[T], where: str) -> T:
    # type() and not isinstance(): TOML's true is no number, though Python's is.
    if type(value) is not kind:
        raise PolicyError(f"{where}: {_shown(value)} is not {_TYPE_NAMES[kind]}")
    return value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"
