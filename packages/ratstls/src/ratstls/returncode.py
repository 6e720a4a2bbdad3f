"""Read the 32-bit codes that librats_tls returns. Does no I/O, and knows nothing of exceptions: see errors.py.

The library writes the same error in three ways, which its own header does not say. With bits 30-28 as the class:

    leaked    bit 31 clear             an enumerator that someone forgot to negate       0x00000003
    negated   bits 27-23 all ones      minus an enumerator                               0xeffffffd
    packed    bits 27-23 all zeros     22 bits and a sign of another library's result    0x907fffff
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ErrorClass = Literal["core", "TLS wrapper", "attester", "verifier", "crypto wrapper", "unknown class"]
Encoding = Literal["leaked", "negated", "packed"]

# err.h, the same since 2021: later builds only added to the ends.
CORE, TLS_WRAPPER, ATTESTER, VERIFIER, CRYPTO_WRAPPER = range(5)
_CLASSES: tuple[ErrorClass, ...] = ("core", "TLS wrapper", "attester", "verifier", "crypto wrapper")
_CLASS_SHIFT = 28
_VALUE_BITS = 23
_VALUE_MASK = (1 << _VALUE_BITS) - 1
_SUBCLASS_ONES = 0x1F
_MEANINGS: dict[int, tuple[str, ...]] = {
    CORE: (
        "unknown failure",
        "invalid argument or unusable plug-in",
        "out of memory",
        "plug-in not registered",
        "no crypto wrapper could be loaded",
        "no TLS wrapper could be loaded",
        "no attester could be loaded",
        "no verifier could be loaded",
        "a plug-in file could not be opened",
        "unknown or unusable wrapper",
        "unsupported certificate algorithm",
        "no such plug-in name",
    ),
    TLS_WRAPPER: (
        "out of memory",
        "TLS library not found",
        "invalid argument",
        "sending failed",
        "receiving failed",
        "unsupported kind of quote",
        "unusable private key",
        "unusable certificate",
        "unknown failure",
    ),
    ATTESTER: ("unknown failure", "out of memory", "invalid argument", "this CPU cannot attest", "a tool is missing"),
    VERIFIER: ("unknown failure", "out of memory", "invalid argument", "a tool is missing", "malformed CBOR"),
    CRYPTO_WRAPPER: (
        "out of memory",
        "invalid argument",
        "unusable certificate",
        "wrong length of private key",
        "wrong length of EC key",
        "wrong length of RSA key",
        "wrong length of public key",
        "unsupported algorithm",
        "undecodable public key",
        "bad certificate extension",
        "unsupported hash",
    ),
}


@dataclass(frozen=True, slots=True)
class ReturnCode:
    """A code other than success. ``value`` is an enumerator of its class or, if packed, another library's result."""

    raw: int
    encoding: Encoding
    class_number: int
    value: int

    @property
    def error_class(self) -> ErrorClass:
        """Which part of the library failed."""
        return _CLASSES[self.class_number] if self.class_number < len(_CLASSES) else "unknown class"

    @property
    def meaning(self) -> str:
        """What the code says, in a few words; codes of other libraries are shown as numbers, since they own them."""
        if self.encoding == "packed" and self.class_number == TLS_WRAPPER:
            return f"OpenSSL's call returned {self.value}"
        if self.encoding == "packed":
            return f"the platform's code {self.value & _VALUE_MASK:#x}"
        meanings = _MEANINGS.get(self.class_number, ())
        return meanings[self.value - 1] if 1 <= self.value <= len(meanings) else f"code {self.value}"

    def __str__(self) -> str:
        return f"{self.raw:#010x}, {self.error_class}: {self.meaning}"


def decode(raw: int) -> ReturnCode | None:
    """Return what a function's result says, signed or unsigned, or None for success. No 32-bit value is refused."""
    raw &= 0xFFFFFFFF
    if raw == 0:
        return None
    if not raw >> 31:
        return ReturnCode(raw, "leaked", raw >> _CLASS_SHIFT, raw & _VALUE_MASK)
    if raw >> _VALUE_BITS & _SUBCLASS_ONES == _SUBCLASS_ONES:
        enumerator = (1 << 32) - raw
        return ReturnCode(raw, "negated", enumerator >> _CLASS_SHIFT, enumerator & _VALUE_MASK)
    value = raw & _VALUE_MASK
    if value >> _VALUE_BITS - 1:
        value -= 1 << _VALUE_BITS
    return ReturnCode(raw, "packed", raw >> _CLASS_SHIFT & 7, value)
