"""What the binding raises, and which exception and which advice a return code deserves."""

from __future__ import annotations

import trio

from ratstls.returncode import ReturnCode, decode

# Values of the class core; init tells which two of the four plug-ins may be at fault by these alone.
_NO_MEMORY = 3
_UNUSABLE = {2: "the attester or the verifier", 10: "the TLS wrapper or the crypto wrapper"}
_PLUGIN_ADVICE = (
    "the plug-in files are there, but {which} does not work on this machine: set the log level to ERROR to see why"
)
_EVIDENCE_ADVICE = (
    "the attester could not produce evidence: check that the enclave device (/dev/sgx, /dev/tdx_guest) is there, that"
    " AESM runs, and that PCCS answers (/etc/sgx_default_qcnl.conf)"
)
_HANDSHAKE_ADVICE = (
    "the library says no more: the peer may have gone, may not speak TLS, or have refused us; its evidence or ours may"
    " be bad; or the clocks differ by more than an hour"
)


class RatsTlsError(Exception):
    """Base of all. ``code`` is what ``function`` of the library returned, or None where it was not the library."""

    def __init__(self, text: str, *, code: ReturnCode | None = None, function: str | None = None) -> None:
        super().__init__(text)
        self.code = code
        self.function = function


class LoadError(RatsTlsError):
    """The library is missing, broken, of an unknown build, or already loaded from elsewhere."""


class ConfigError(RatsTlsError):
    """The library, or its plug-ins, cannot do what was asked for."""


class BadOption(ConfigError, ValueError):
    """An option that would be wrong with any library. Raised before any call into C."""


class EvidenceError(RatsTlsError):
    """This side could not produce evidence about itself."""


class HandshakeError(RatsTlsError):
    """There is no session: the peers did not come to terms, or the connection ended.

    ``reason`` is one short word for logs and counters: ``handshake`` where the library does not tell, and else what
    handshake.py found out.
    """

    def __init__(
        self, text: str, *, reason: str = "handshake", code: ReturnCode | None = None, function: str | None = None
    ) -> None:
        super().__init__(text, code=code, function=function)
        self.reason = reason


class AttestationRejected(HandshakeError):
    """The peer's evidence is genuine, but not what was expected: ``reason`` is the policy's."""

    def __init__(self, reason: str, text: str, *, code: ReturnCode | None = None, function: str | None = None) -> None:
        text = f"the peer's evidence was refused ({reason}): {text}"
        super().__init__(text, reason=reason, code=code, function=function)


class SessionBroken(RatsTlsError, trio.BrokenResourceError):
    """Damaged or forged bytes arrived, or the peer reported a fatal error. Nothing after the damage was delivered."""


class Truncated(RatsTlsError, trio.BrokenResourceError):
    """The connection ended without the peer's authenticated goodbye: bytes at the end may be missing."""


def error_from(function: str, raw: int) -> RatsTlsError:
    """Return the exception for what a function of the library returned, which was not success."""
    code = decode(raw)
    if code is None:
        raise ValueError(f"{function} returned 0, which is success")
    kind, advice = _judge(function.removeprefix("rats_tls_"), code)
    return kind(f"{function} failed ({code}): {advice}", code=code, function=function)


def _judge(function: str, code: ReturnCode) -> tuple[type[RatsTlsError], str]:
    if function == "negotiate":
        return HandshakeError, _HANDSHAKE_ADVICE
    if code.error_class == "attester":
        return EvidenceError, _EVIDENCE_ADVICE
    if code.error_class == "core" and code.value == _NO_MEMORY:
        return RatsTlsError, "free some memory"
    if function == "init" and code.error_class == "core" and code.value in _UNUSABLE:
        return ConfigError, _PLUGIN_ADVICE.format(which=_UNUSABLE[code.value])
    if function == "init" and code.error_class == "crypto wrapper":
        return RatsTlsError, "key or certificate could not be made: check the OpenSSL that the plug-ins use"
    return RatsTlsError, "set the log level to ERROR to see what the library says about it"
