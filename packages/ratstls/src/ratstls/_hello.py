"""Read the first record of a TLS handshake: is it one, and of which version? Does no I/O.

Whoever speaks no TLS is told apart before the library hears of it, since the library keeps memory for every handshake
that fails, and the floor for the version is here, since the library has none. Hellos travel in the clear, but a change
on the way fails the handshake later. Only a hello in one record is understood: those of our peers are.
"""

from __future__ import annotations

from typing import Final, Literal

from ratstls.errors import HandshakeError

TlsVersion = Literal["1.2", "1.3"]

# RFC 8446: 5.1 for records, 4 and 4.1 for the hellos, 4.2.1 for the extension, 6 for alerts.
CLIENT_HELLO: Final = 1
SERVER_HELLO: Final = 2
_ALERT: Final = 21
_ALERT_BYTES: Final = 2
_HANDSHAKE: Final = 22
_HEADERS_BYTES: Final = 9  # of the record 5, of the message 4
_RECORD_LIMIT_BYTES: Final = 1 << 14
_FIXED_BYTES: Final = 34  # the version of old and the random
_SUPPORTED_VERSIONS: Final = 43
_VERSIONS: Final = {"1.2": 0x0303, "1.3": 0x0304}
_END_OF_VERSIONS: Final = 0x0400  # greater ones, 0x?a?a, stand for none: RFC 8701

_SHOWN_BYTES: Final = 16  # ours


def is_hello(data: bytes, kind: int, minimum: TlsVersion) -> bool:
    """Tell whether *data*, all that has come so far, holds a whole hello of that *kind*; False if more has to come.

    Raises:
        HandshakeError: it never will: the peer speaks something else (``not_tls``), for which a single byte may be
            enough, or refuses to speak (``alert``), or in no version from *minimum* on (``tls_version``).
    """
    if not _may_be_hello(data, kind):
        raise HandshakeError(
            f"the peer speaks no TLS, it said {data[:_SHOWN_BYTES]!r}: does it want a plain link, or is it a stranger?",
            reason="not_tls",
        )
    if data[:1] == bytes([_ALERT]) and len(data) >= 7:
        raise HandshakeError(
            f"the peer refused the handshake with TLS alert {data[6]}: it may want another version or other ciphers",
            reason="alert",
        )
    if len(data) < _HEADERS_BYTES or len(data) < 5 + _number(data[3:5]):
        return False
    best = max(_versions(data[_HEADERS_BYTES:], kind), default=0)
    if best < _VERSIONS[minimum]:
        named = f"TLS 1.{best - 0x0301}" if best > 0x0300 else "no known version"
        raise HandshakeError(
            f"the {'client offers' if kind == CLIENT_HELLO else 'server chose'} {named}, and TLS {minimum} is the least"
            " allowed here: look for MaxProtocol in the OpenSSL configurations of both",
            reason="tls_version",
        )
    return True


def _may_be_hello(data: bytes, kind: int) -> bool:
    length = _number(data[3:5])
    is_alert = data[:1] == bytes([_ALERT])
    # How many bytes it takes to know each of them.
    facts = (
        (1, is_alert or data[:1] == bytes([_HANDSHAKE])),
        (2, data[1:2] == b"\x03"),
        (5, length == _ALERT_BYTES if is_alert else 4 <= length <= _RECORD_LIMIT_BYTES),
        (6, is_alert or data[5:6] == bytes([kind])),
        (9, 4 + _number(data[6:9]) <= length),
    )
    return all(is_true for needed, is_true in facts if len(data) >= needed)


def _versions(body: bytes, kind: int) -> list[int]:
    """Return the versions that a hello offers or chooses; none, where it is malformed."""
    _, rest = _take(body[_FIXED_BYTES:], 1)  # the session's identifier
    if kind == CLIENT_HELLO:
        _, rest = _take(rest, 2)  # ciphers
        _, rest = _take(rest, 1)  # compressions
    else:
        rest = rest[3:]
    extensions, _ = _take(rest, 2)
    while len(extensions) >= 4:
        number = _number(extensions[:2])
        value, extensions = _take(extensions[2:], 2)
        if number == _SUPPORTED_VERSIONS:
            listed = _take(value, 1)[0] if kind == CLIENT_HELLO else value
            numbers = [_number(listed[at : at + 2]) for at in range(0, len(listed), 2)]
            return [number for number in numbers if number < _END_OF_VERSIONS]
    return [_number(body[:2])]


def _take(data: bytes, prefix: int) -> tuple[bytes, bytes]:
    """Cut off a value that *prefix* bytes of length stand before; what is cut short is short."""
    end = prefix + _number(data[:prefix])
    return data[prefix:end], data[end:]


def _number(data: bytes) -> int:
    return int.from_bytes(data, "big")
