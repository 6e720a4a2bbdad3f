"""Spellings of endpoints: what is understood, and that a wrong one is answered with the right one."""

from __future__ import annotations

import string
from contextlib import suppress
from ipaddress import IPv4Address

import pytest
from enlink.endpoint import Tcp, parse_dial, parse_listen
from enlink.errors import UsageError
from hypothesis import given
from hypothesis import strategies as st

EVERYWHERE = (IPv4Address("0.0.0.0"),)
ports = st.integers(1, 65535)
labels = st.from_regex(r"[a-z_]([A-Za-z0-9_-]{0,20}[A-Za-z0-9_])?", fullmatch=True)  # never a number
names = st.lists(labels, min_size=1, max_size=8).map(".".join)
ipv4 = st.ip_addresses(v=4).filter(lambda address: address not in EVERYWHERE).map(str)
ipv6 = st.ip_addresses(v=6).filter(lambda address: int(address) != 0).map(str)
zoned = st.tuples(ipv6, st.text(string.ascii_letters + string.digits + "_.-", min_size=1, max_size=15)).map("%".join)
hosts = st.one_of(names, ipv4, ipv6, zoned)


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("gateway.example:6980", Tcp("gateway.example", 6980)),
        ("gateway.example.:6980", Tcp("gateway.example.", 6980)),
        ("my_container-1:1", Tcp("my_container-1", 1)),
        ("3com.example:80", Tcp("3com.example", 80)),
        ("192.0.2.1:65535", Tcp("192.0.2.1", 65535)),
        ("tcp://192.0.2.1:6980", Tcp("192.0.2.1", 6980)),
        ("[::1]:6980", Tcp("::1", 6980)),
        ("tcp://[2001:DB8:0:0::1]:6980", Tcp("2001:db8::1", 6980)),
        ("[fe80::1%eth0]:6980", Tcp("fe80::1%eth0", 6980)),
    ],
)
def test_an_address_to_dial_is_understood(text: str, endpoint: Tcp) -> None:
    assert parse_dial(text) == endpoint
    assert parse_listen(text) == endpoint, "whatever can be dialled can be listened on, by the host that has it"


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("6980", Tcp(None, 6980)),
        (":6980", Tcp(None, 6980)),
        ("tcp://:6980", Tcp(None, 6980)),
        ("tcp://6980", Tcp(None, 6980)),
        ("0", Tcp(None, 0)),
        ("127.0.0.1:0", Tcp("127.0.0.1", 0)),
        ("0.0.0.0:6980", Tcp("0.0.0.0", 6980)),
        ("[::]:6980", Tcp("::", 6980)),
    ],
)
def test_an_address_to_listen_on_may_lack_a_host_and_let_the_kernel_choose_the_port(text: str, endpoint: Tcp) -> None:
    assert parse_listen(text) == endpoint


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("6980", "write HOST:6980, as in 192.0.2.1:6980"),
        (":6980", "write HOST:6980"),
        ("0.0.0.0:6980", "write the one to dial, as in 127.0.0.1:6980"),
        ("[::]:6980", "write the one to dial"),
        ("gateway:0", "port 0 cannot be dialled, use 1 to 65535"),
    ],
)
def test_what_can_only_be_listened_on_is_not_dialled(text: str, hint: str) -> None:
    parse_listen(text)
    with pytest.raises(UsageError) as caught:
        parse_dial(text)
    assert repr(text) in str(caught.value)
    assert hint in str(caught.value)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("", "an empty address: write HOST:PORT, as in 192.0.2.1:6980"),
        (" gateway:6980", "has a space in it: write HOST:PORT"),
        ("gateway: 6980", "has a space in it"),
        ("gateway:6980\n", "has a space in it"),
        ("gateway", "write HOST:PORT, as in gateway:6980"),
        ("gateway:", "port '' is not a number from 1 to 65535"),
        ("gateway:http", "port 'http' is not a number"),
        ("gateway:65536", "port '65536' is not a number"),
        ("gateway:000080", "port '000080' is not a number"),
        ("gateway:-1", "port '-1' is not a number"),
        ("gateway:٦٩", "port '٦٩' is not a number"),
        ("٦٩٨٠", "port '٦٩٨٠' is not a number"),
        ("::1", "as in [2001:db8::1]:6980"),
        ("2001:db8::1:6980", "an IPv6 address needs brackets"),
        ("[::1]", "as in [2001:db8::1]:6980"),
        ("[::1]6980", "as in [2001:db8::1]:6980"),
        ("[::1:6980", "as in [2001:db8::1]:6980"),
        ("[]:6980", "'' is not an IPv6 address"),
        ("[192.0.2.1]:6980", "'192.0.2.1' is not an IPv6 address: only those stand in brackets"),
        ("[gateway]:6980", "'gateway' is not an IPv6 address"),
        ("[::1%]:6980", "'' after the % is not the name of a network device"),
        ("[::1%a/b]:6980", "'a/b' after the % is not the name"),
        ("1:6980", "'1' is not an IPv4 address, which has four numbers: 192.0.2.1"),
        ("127.1:6980", "'127.1' is not an IPv4 address"),
        ("0x7f.1:6980", "'0x7f.1' is not an IPv4 address"),
        ("0x7f000001:6980", "is not an IPv4 address"),
        ("192.0.2.256:6980", "is not an IPv4 address"),
        ("192.0.2.1.:6980", "is not an IPv4 address"),
        ("192.0.2.01:6980", "is not an IPv4 address"),
        ("-gateway:6980", "'-gateway' is neither a host name nor an address"),
        ("gate..way:6980", "is neither a host name"),
        ("user@gateway:6980", "is neither a host name"),
        ("gäteway:6980", "is neither a host name"),
        ("g" * 64 + ":6980", "is neither a host name"),
        (".".join(["g" * 50] * 6) + ":6980", "is neither a host name"),
        ("udp://gateway:6980", "udp:// is not known here, write tcp://HOST:PORT"),
        ("vsock://3:5005", "vsock:// is not known here"),
        ("TCP://gateway:6980", "TCP:// is not known here"),
        ("://gateway:6980", ":// is not known here"),
    ],
)
def test_a_wrong_spelling_is_answered_with_the_right_one(text: str, hint: str) -> None:
    for parse in (parse_dial, parse_listen):
        with pytest.raises(UsageError) as caught:
            parse(text)
        assert hint in str(caught.value)


@given(hosts, ports)
def test_an_endpoint_to_dial_survives_being_written_and_read(host: str, port: int) -> None:
    endpoint = parse_dial(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    assert endpoint.port == port
    assert parse_dial(str(endpoint)) == endpoint


@given(st.none() | hosts, st.integers(0, 65535))
def test_an_endpoint_to_listen_on_survives_being_written_and_read(host: str | None, port: int) -> None:
    assert parse_listen(str(Tcp(host, port))) == Tcp(host, port)


@given(st.text(max_size=30) | st.text("0123456789abcdef:.[]%-/tcp", max_size=30))
def test_any_text_is_an_endpoint_or_a_usage_error_and_nothing_else(text: str) -> None:
    for parse in (parse_dial, parse_listen):
        with suppress(UsageError):
            endpoint = parse(text)
            assert parse(str(endpoint)) == endpoint
