"""Headers of the PROXY protocol, beside bytes put together by hand and a decoder that follows the specification."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from relay.proxy_protocol import Connection, TcpConnection, UnixConnection, VsockConnection, encode_header

SIGNATURE = "0d0a0d0a 000d0a51 5549540a "


def tcp(peer: str, peer_port: int, local: str, local_port: int) -> TcpConnection:
    return TcpConnection(ip_address(peer), peer_port, ip_address(local), local_port)


GOLDEN: list[tuple[Connection | None, bytes, str]] = [
    (None, b"", "20 00 0000"),
    (tcp("192.0.2.1", 56324, "198.51.100.7", 443), b"", "21 11 000c c0000201 c6336407 dc04 01bb"),
    (tcp("::ffff:192.0.2.1", 1, "198.51.100.7", 2), b"", "21 11 000c c0000201 c6336407 0001 0002"),
    (
        tcp("2001:db8::1", 65535, "::1", 8080),
        b"",
        "21 21 0024 20010db8000000000000000000000001 00000000000000000000000000000001 ffff 1f90",
    ),
    (
        tcp("192.0.2.1", 1, "2001:db8::1%eth0", 2),
        b"",
        "21 21 0024 00000000000000000000ffffc0000201 20010db8000000000000000000000001 0001 0002",
    ),
    (UnixConnection("", "/run/s"), b"", "21 31 00d8" + "00" * 108 + "2f72756e2f73" + "00" * 102),
    (UnixConnection("@peer", "@s"), b"", "21 31 00d8 0070656572" + "00" * 103 + "0073" + "00" * 106),
    (VsockConnection(16, 1024, 3, 8888), b"", "21 00 0013 e5 0010 00000010 00000400 00000003 000022b8"),
    (VsockConnection(16, 1024, 0xFFFFFFFF, 8888), b"", "21 00 0013 e5 0010 00000010 00000400 ffffffff 000022b8"),
    (None, b"id", "20 00 0005 05 0002 6964"),
    (tcp("192.0.2.1", 1, "192.0.2.2", 2), b"i", "21 11 0010 c0000201 c0000202 0001 0002 05 0001 69"),
    (VsockConnection(1, 2, 3, 4), b"i", "21 00 0017 e5 0010 00000001 00000002 00000003 00000004 05 0001 69"),
]


@pytest.mark.parametrize(("connection", "unique_id", "expected"), GOLDEN)
def test_headers_have_the_bytes_of_the_specification(
    connection: Connection | None, unique_id: bytes, expected: str
) -> None:
    assert encode_header(connection, unique_id).hex() == (SIGNATURE + expected).replace(" ", "")


def test_a_path_is_sent_as_the_bytes_that_it_has_on_disk() -> None:
    header = encode_header(UnixConnection("/tmp/\udcff", "/tmp/ä"))
    assert header[16:22] == b"/tmp/\xff"
    assert header[124:131] == "/tmp/ä".encode()


@pytest.mark.parametrize(
    ("connection", "unique_id", "problem"),
    [
        (None, bytes(129), "at most 128 bytes, not 129"),
        (UnixConnection("", "/" + "x" * 108), b"", "at most 108 bytes: '/xxx"),
        (UnixConnection("ä" * 55, ""), b"", "at most 108 bytes"),
        (tcp("::1", 65536, "::1", 1), b"", "out of range"),
        (VsockConnection(1, 2, 3, 2**32), b"", "out of range"),
        (VsockConnection(-1, 2, 3, 4), b"", "out of range"),
    ],
)
def test_what_does_not_fit_is_refused(connection: Connection | None, unique_id: bytes, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        encode_header(connection, unique_id)


# --- a receiver -------------------------------------------------------------------------------------------------------


def decode(wire: bytes) -> tuple[Connection | None, bytes]:
    """Read one header as section 2.2 says, and insist that nothing is before or after it."""
    assert wire[:12] == bytes.fromhex("0D 0A 0D 0A 00 0D 0A 51 55 49 54 0A")
    version, command, family, transport = wire[12] >> 4, wire[12] & 15, wire[13] >> 4, wire[13] & 15
    assert version == 2
    assert command in (0, 1)
    body = wire[16:]
    assert int.from_bytes(wire[14:16], "big") == len(body)
    size = {0: 0, 1: 12, 2: 36, 3: 216}[family]
    assert transport == (family != 0)
    block, rest = body[:size], body[size:]
    assert len(block) == size
    tlvs = {}
    while rest:
        kind, length = rest[0], int.from_bytes(rest[1:3], "big")
        assert kind not in tlvs
        assert len(rest) >= 3 + length
        tlvs[kind], rest = rest[3 : 3 + length], rest[3 + length :]
    unique_id = tlvs.pop(5, b"")
    connection: Connection | None = None
    if family in (1, 2):
        width = 4 if family == 1 else 16
        kind_of = IPv4Address if family == 1 else IPv6Address
        ports = [int.from_bytes(block[at : at + 2], "big") for at in (2 * width, 2 * width + 2)]
        connection = TcpConnection(kind_of(block[:width]), ports[0], kind_of(block[width : 2 * width]), ports[1])
    elif family == 3:
        halves = [block[:108].rstrip(b"\0"), block[108:].rstrip(b"\0")]
        connection = UnixConnection(*(half.decode().replace("\0", "@") for half in halves))
    elif 0xE5 in tlvs:
        value = tlvs.pop(0xE5)
        assert len(value) == 16
        connection = VsockConnection(*(int.from_bytes(value[at : at + 4], "big") for at in (0, 4, 8, 12)))
    assert not tlvs
    assert (command == 0) == (connection is None)
    return connection, unique_id


u16, u32 = st.integers(0, 65535), st.integers(0, 2**32 - 1)
v4 = st.integers(0, 2**32 - 1).map(IPv4Address)
v6 = st.integers(0, 2**128 - 1).filter(lambda number: number >> 32 != 0xFFFF).map(IPv6Address)
names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=26)
paths = st.sampled_from(["", "/run/app.sock", "@abstract"]) | names.map("/{}".format) | names.map("@x{}".format)
connections: st.SearchStrategy[Connection | None] = (
    st.none()
    | st.builds(TcpConnection, v4, u16, v4, u16)
    | st.builds(TcpConnection, v6, u16, v6, u16)
    | st.builds(UnixConnection, paths, paths)
    | st.builds(VsockConnection, u32, u32, u32, u32)
)


@given(connections, st.binary(max_size=128))
@settings(deadline=None)  # a busy machine is no failure
def test_a_receiver_reads_what_was_sent(connection: Connection | None, unique_id: bytes) -> None:
    assert decode(encode_header(connection, unique_id)) == (connection, unique_id)


@given(v4, v6, u16, u16)
@settings(deadline=None)  # a busy machine is no failure
def test_a_receiver_reads_mixed_families_as_ipv6(old: IPv4Address, new: IPv6Address, one: int, other: int) -> None:
    """The IPv4 address in its IPv6 form."""
    mapped = IPv6Address(f"::ffff:{old}")
    assert decode(encode_header(TcpConnection(old, one, new, other))) == (TcpConnection(mapped, one, new, other), b"")
    assert decode(encode_header(TcpConnection(new, one, old, other))) == (TcpConnection(new, one, mapped, other), b"")
