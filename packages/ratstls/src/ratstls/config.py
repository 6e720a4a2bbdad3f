"""What a session needs to know before it is made, checked. Does no I/O; plug-ins are looked for in _plugins.py."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum

from ratstls.errors import BadOption

# The library compares names of 32 bytes with strcmp: the last byte must stay 0.
_NAME = re.compile(r"[A-Za-z0-9_-]{1,31}")
_NULL = re.compile(r"null.*", re.IGNORECASE)
_MAX_CLAIMS_BYTES = 4096  # ours: claims travel inside a certificate


class LogLevel(IntEnum):
    """How much the library prints by itself: to stdout up to WARN, to stderr from ERROR on. Holds for the process."""

    DEBUG = 0
    INFO = 1
    WARN = 2
    ERROR = 3
    FATAL = 4
    NONE = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionConfig:
    """Which plug-ins one session uses, and in which role. All names are explicit.

    An empty verifier name would make the library accept a peer without evidence, and other empty names have chosen
    plaintext: there is no way to pass one. A plug-in that proves or hides nothing is refused in a role that counts on
    it, unless ``is_attestation_waived``. ``custom_claims`` go into this side's evidence.

    Raises:
        BadOption: a name is empty, longer than 31 bytes or none; or attestation would be void without a waiver.
    """

    attester: str
    verifier: str
    tls: str = "openssl"
    crypto: str = "openssl"
    is_server: bool
    is_mutual: bool = False
    is_attestation_waived: bool = False
    custom_claims: tuple[tuple[str, bytes], ...] = ()
    log_level: LogLevel = LogLevel.NONE

    def __post_init__(self) -> None:
        for kind in ("attester", "verifier", "tls", "crypto"):
            name = getattr(self, kind)
            if not _NAME.fullmatch(name):
                raise BadOption(f"{kind} {name!r} is no plug-in's name: give 1 to 31 letters, digits, '_' or '-'")
        if self.weakness is not None and not self.is_attestation_waived:
            raise BadOption(f"{self.weakness}: choose a real plug-in, or waive attestation explicitly")
        for name, _ in self.custom_claims:
            if not name or "\0" in name:
                raise BadOption(f"{name!r} is no name for a claim: give it characters, none of them NUL")
        size = sum(len(name.encode()) + len(value) for name, value in self.custom_claims)
        if size > _MAX_CLAIMS_BYTES:
            raise BadOption(f"the custom claims have {size} bytes: keep to {_MAX_CLAIMS_BYTES}")

    @property
    def is_attesting(self) -> bool:
        """This side presents a certificate, with evidence if its attester has any."""
        return self.is_server or self.is_mutual

    @property
    def is_verifying(self) -> bool:
        """This side judges the peer."""
        return not self.is_server or self.is_mutual

    @property
    def weakness(self) -> str | None:
        """Why this session would prove or hide nothing, as a clause; None if it is sound."""
        if _NULL.fullmatch(self.tls):
            return f"tls {self.tls!r} sends plaintext"
        if _NULL.fullmatch(self.crypto):
            return f"crypto {self.crypto!r} makes no keys"
        if self.is_verifying and _NULL.fullmatch(self.verifier):
            return f"verifier {self.verifier!r} accepts any peer"
        if self.is_attesting and _NULL.fullmatch(self.attester):
            return f"attester {self.attester!r} proves nothing to the peer"
        return None
