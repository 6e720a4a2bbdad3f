"""What control messages hold, what is refused in them, and what later versions may add."""

from __future__ import annotations

import struct
from ipaddress import IPv4Interface, IPv6Interface

import pytest
from enlink.control import (
    VERSION,
    Close,
    ControlMessage,
    Error,
    Hello,
    Keepalive,
    PathState,
    Role,
    Unknown,
    decode_message,
    encode_message,
)
from hypothesis import given, settings
from hypothesis import strategies as st


def hello(body: bytes) -> ControlMessage:
    return decode_message(b"\0\1" + body)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"", "HELLO of 0 bytes"),
        (b"\1\1\xff", "HELLO of 3 bytes"),
        (b"\1\1\xff\xff" + bytes(1021), "HELLO of 1025 bytes"),
        (b"\0\1\xff\xff", "version 0"),
        (b"\1\0\xff\xff", "0 is not a valid Role"),
        (b"\1\4\xff\xff", "4 is not a valid Role"),
        (b"\1\1\0\0", "MTU of 0"),
        (b"\1\1\xff\xff\1", "cut field"),
        (b"\1\1\xff\xff\1\0", "cut field"),
        (b"\1\1\xff\xff\1\0\1", "cut field"),
        (b"\1\1\xff\xff\x09\xff\xff", "cut field"),
        (b"\1\1\xff\xff\1\0\x40" + b"x" * 64, "more than 63 bytes"),
        (b"\1\1\xff\xff\1\0\1\xff", "invalid start byte"),
        (b"\1\1\xff\xff\2\0\4\x08\x0a\0\0", "TUN address of 4 bytes"),
        (b"\1\1\xff\xff\2\0\0", "TUN address of 0 bytes"),
        (b"\1\1\xff\xff\2\0\5\x21\x0a\0\0\1", "not a valid netmask"),
        (b"\1\1\xff\xff\2\0\x11\x81" + bytes(16), "not a valid netmask"),
    ],
)
def test_a_malformed_hello_is_refused_and_the_refusal_says_why(body: bytes, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        hello(body)


def test_a_hello_without_fields_gets_the_defaults() -> None:
    assert hello(b"\1\3\x05\xdc") == Hello(Role.GATEWAY, "default", (), 1500)


@pytest.mark.proves("F16")
@settings(deadline=None)
@given(
    fields=st.lists(st.tuples(st.just(0) | st.integers(3, 255), st.binary(max_size=40)), max_size=6),
    version=st.integers(VERSION, 255),
    data=st.data(),
)
def test_fields_of_later_versions_are_skipped_wherever_they_stand(
    fields: list[tuple[int, bytes]], version: int, data: st.DataObject
) -> None:
    known = [(1, b"blue"), (2, b"\x18\x0a\0\0\1"), (2, b"\x40" + bytes(16))]
    mixed = known[:]
    for field in fields:
        mixed.insert(data.draw(st.integers(0, len(mixed))), field)
    body = bytes((version, 1)) + b"\x05\xdc"
    body += b"".join(struct.pack("!BH", tag, len(value)) + value for tag, value in mixed)
    said = Hello(Role.CLIENT_AGENT, "blue", (IPv4Interface("10.0.0.1/24"), IPv6Interface("::/64")), 1500, version)
    assert hello(body) == said


def test_of_two_instance_names_the_last_one_counts() -> None:
    assert hello(b"\1\1\xff\xff\1\0\1a\1\0\1b") == Hello(Role.CLIENT_AGENT, "b")


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (Hello(Role.GATEWAY, version=0), "version 0"),
        (Hello(Role.GATEWAY, version=256), "version 256"),
        (Hello(Role.GATEWAY, mtu=0), "MTU 0"),
        (Hello(Role.GATEWAY, mtu=65_536), "MTU 65536"),
        (Hello(Role.GATEWAY, instance="ü" * 32), "64 bytes, more than 63"),
        (Hello(Role.GATEWAY, "x" * 58, (IPv4Interface("10.0.0.1/8"),) * 120), "too many TUN addresses"),
        (Unknown(9), "unknown message cannot be encoded"),
    ],
)
def test_what_no_peer_would_take_is_not_encoded(said: ControlMessage, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        encode_message(said)


def test_the_longest_hello_is_taken() -> None:
    said = Hello(Role.GATEWAY, "x" * 57, (IPv4Interface("10.0.0.1/8"),) * 120)
    assert len(encode_message(said)) == 2 + 1024
    assert decode_message(encode_message(said)) == said


def test_the_longest_name_is_taken() -> None:
    said = Hello(Role.GATEWAY, "x" * 63)
    assert decode_message(encode_message(said)) == said


@pytest.mark.parametrize("make", [Close, Error])
def test_a_long_reason_is_cut_at_a_character(make: type[Close | Error]) -> None:
    assert decode_message(encode_message(make("ü" * 200))) == make("ü" * 127)
    assert decode_message(encode_message(make("x" * 300))) == make("x" * 255)


@pytest.mark.parametrize(("kind", "make"), [(4, Close), (5, Error)])
def test_a_reason_is_shown_as_far_as_it_can_be(kind: int, make: type[Close | Error]) -> None:
    shown = make("no\N{REPLACEMENT CHARACTER} way\x1b[2J\r\n")
    assert decode_message(bytes((0, kind)) + b"no\xff way\x1b[2J\r\n") == shown
    assert decode_message(bytes((0, kind)) + b"x" * 65_533) == make("x" * 1020)


def test_a_reason_that_is_no_text_at_all_is_encoded_with_marks() -> None:
    assert decode_message(encode_message(Close("\ud800!"))) == Close("?!")


@pytest.mark.proves("F16")
@settings(deadline=None)
@given(state=st.integers(0, 255), rest=st.binary(max_size=40))
def test_of_a_path_one_byte_says_whether_it_goes_on_and_what_follows_is_for_later_versions(
    state: int, rest: bytes
) -> None:
    if state in (0, 1):
        assert decode_message(bytes((0, 6, state)) + rest) == PathState(is_open=state == 1)
    else:
        with pytest.raises(ValueError, match=f"PATH that says {state}, not 0 or 1"):
            decode_message(bytes((0, 6, state)) + rest)


def test_a_path_of_which_nothing_is_said_is_refused() -> None:
    with pytest.raises(ValueError, match="PATH that says nothing"):
        decode_message(b"\0\6")


@pytest.mark.parametrize(
    "said", [Keepalive(), Close(), Close("the agent is stopping"), Error("no"), PathState(True), PathState(False)]
)
def test_what_is_encoded_is_decoded(said: ControlMessage) -> None:
    assert decode_message(encode_message(said)) == said


def test_a_message_of_an_unknown_type_is_known_as_one() -> None:
    assert decode_message(b"\0\2body") == Unknown(2)
