"""The first record of a handshake, as real clients say it and as nobody should."""

from __future__ import annotations

import ssl
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ratstls._hello import CLIENT_HELLO, SERVER_HELLO, TlsVersion, is_hello
from ratstls.errors import HandshakeError

VERSIONS: tuple[TlsVersion, ...] = ("1.2", "1.3")
KINDS = st.sampled_from((CLIENT_HELLO, SERVER_HELLO))


def client_hello(maximum: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1_2, maximum
    outgoing = ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="x").do_handshake()
    return outgoing.read()


def server_hello(chosen: int | None, legacy: int = 0x0303) -> bytes:
    """What a server says that chooses a version: in the extension, or, as older ones do, in the field of old."""
    extensions = struct.pack(">HHH", 51, 2, 29)
    if chosen is not None:
        extensions += struct.pack(">HHH", 43, 2, chosen)
    body = struct.pack(">H32sB4sHBH", legacy, bytes(32), 4, b"sess", 0x1302, 0, len(extensions)) + extensions
    return struct.pack(">BHHB", 22, 0x0303, len(body) + 4, SERVER_HELLO) + len(body).to_bytes(3, "big") + body


def reason_of(data: bytes, kind: int, minimum: TlsVersion = "1.3") -> str:
    with pytest.raises(HandshakeError) as caught:
        is_hello(data, kind, minimum)
    return caught.value.reason


@pytest.mark.parametrize(
    ("hello", "kind"), [(client_hello(), CLIENT_HELLO), (server_hello(0x0304), SERVER_HELLO)], ids=["client", "server"]
)
def test_a_hello_of_tls_1_3_is_known_by_its_last_byte(hello: bytes, kind: int) -> None:
    """And no earlier; what follows it is no matter."""
    assert [is_hello(hello[:length], kind, "1.3") for length in range(len(hello))] == [False] * len(hello)
    assert is_hello(hello, kind, "1.3")
    assert is_hello(hello + b"\x14\x03\x03", kind, "1.3")


@pytest.mark.proves("D5", "F72")
def test_tls_1_2_is_refused_unless_it_is_allowed() -> None:
    """Whatever the record's header says: 1.3 calls itself 1.2 there, and 1.0 in a client's first record."""
    for hello, kind in (
        (client_hello(ssl.TLSVersion.TLSv1_2), CLIENT_HELLO),
        (server_hello(None), SERVER_HELLO),
        (server_hello(0x0303), SERVER_HELLO),
    ):
        assert reason_of(hello, kind) == "tls_version"
        assert is_hello(hello, kind, "1.2")


@pytest.mark.proves("D5", "F72")
def test_versions_that_are_none_do_not_count() -> None:
    """Numbers that clients strew in, versions before 1.2, and a hello without room for any."""
    for chosen, legacy, named in ((0x7A7A, 0x0303, "no known"), (0x0302, 0x0303, "TLS 1.1"), (None, 0x0301, "TLS 1.0")):
        with pytest.raises(HandshakeError, match=named):
            is_hello(server_hello(chosen, legacy), SERVER_HELLO, "1.2")
    assert reason_of(b"\x16\x03\x03\x00\x04\x02\x00\x00\x00", SERVER_HELLO) == "tls_version"


def test_strangers_are_known_by_as_few_bytes_as_it_takes() -> None:
    """The first, for most of what people run on ports."""
    strangers = [b"G", b"S", b"\x00", b"\x80", b"\x17", b"\x16\x02", b"\x15\x03\x03\x00\x03"]
    for stranger in (*strangers, b"\x16\x03\x03\x00\x03", b"\x16\x03\x03\x40\x01"):
        assert reason_of(stranger, CLIENT_HELLO) == "not_tls"
        if len(stranger) > 1:
            assert not is_hello(stranger[:-1], CLIENT_HELLO, "1.3")
    with pytest.raises(HandshakeError, match=r"it said b'GET / HTTP/1\.1.*': does it want a plain link"):
        is_hello(b"GET / HTTP/1.1\r\n", CLIENT_HELLO, "1.3")


def test_a_hello_of_the_wrong_side_is_none() -> None:
    """Nor is one that goes on in the next record."""
    assert reason_of(client_hello(), SERVER_HELLO) == "not_tls"
    assert reason_of(b"\x16\x03\x03\x00\x05\x02\x00\x00\x02\x00", SERVER_HELLO) == "not_tls"
    assert is_hello(b"\x16\x03\x03\x00\x05\x02\x00\x00", SERVER_HELLO, "1.3") is False


def test_a_refusal_is_told_with_its_number() -> None:
    """Servers say so in plaintext, before there are keys."""
    alert = b"\x15\x03\x03\x00\x02\x02\x46"
    assert [is_hello(alert[:length], SERVER_HELLO, "1.3") for length in range(7)] == [False] * 7
    with pytest.raises(HandshakeError, match="with TLS alert 70"):
        is_hello(alert, SERVER_HELLO, "1.3")


@given(data=st.binary(max_size=200), kind=KINDS, minimum=st.sampled_from(VERSIONS))
def test_no_bytes_do_harm(data: bytes, kind: int, minimum: TlsVersion) -> None:
    """There is an answer, or one kind of error, for everything, and once it is no it stays no."""
    refused = False
    for length in range(len(data) + 1):
        try:
            is_hello(data[:length], kind, minimum)
        except HandshakeError:
            refused = True
        else:
            assert not refused


@given(at=st.integers(9, 500), bit=st.integers(0, 7), kind=KINDS)
def test_a_damaged_hello_is_a_hello_or_an_error(at: int, bit: int, kind: int) -> None:
    """Its lengths may lead anywhere; the library judges what passes."""
    hello = bytearray(client_hello() if kind == CLIENT_HELLO else server_hello(0x0304))
    hello[9 + at % (len(hello) - 9)] ^= 1 << bit
    try:
        verdict = "fine" if is_hello(bytes(hello), kind, "1.3") else "unfinished"
    except HandshakeError as error:
        verdict = error.reason
    assert verdict in ("fine", "tls_version")
