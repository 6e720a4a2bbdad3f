"""Spellings of endpoints: what is understood, and that a wrong one is answered with the right one."""

from __future__ import annotations

import string
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from ipaddress import IPv4Address

import pytest
from enlink.endpoint import (
    VSOCK_PORT_ANY,
    Endpoint,
    HybridVsock,
    Systemd,
    Tcp,
    Unix,
    Vsock,
    parse_dial,
    parse_listen,
)
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
numbers = st.integers(0, 2**32 - 2)  # of vsock: cids and ports
paths = (
    st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S"]), min_size=1, max_size=20)
    .map(lambda name: name if name.startswith("@") else f"./{name}" if len(name) % 2 else "/" + name.lstrip("/"))
    .filter(lambda path: path not in ("@", "/"))
)
dialled = st.one_of(
    st.builds(Tcp, names, ports, st.sampled_from([None, 4, 6])),
    st.builds(Tcp, hosts, ports),
    st.builds(Vsock, numbers, numbers),
    st.builds(Unix, paths),
    st.builds(HybridVsock, paths.filter(lambda path: path[0] != "@"), numbers),
)
listened_on = st.one_of(
    dialled,
    st.builds(Tcp, st.none(), st.integers(0, 65535), st.sampled_from([None, 4, 6])),
    st.builds(Vsock, st.none() | numbers, numbers | st.just(VSOCK_PORT_ANY)),
    st.builds(Systemd, st.from_regex(r"[A-Za-z][!-9;-~]{0,40}", fullmatch=True)),
)
Parse = Callable[[str], Endpoint]
TCP_ONLY: tuple[Parse, ...] = (partial(parse_dial, kind=Tcp), partial(parse_listen, kind=Tcp))
VSOCK_ONLY: tuple[Parse, ...] = (partial(parse_dial, kind=Vsock), partial(parse_listen, kind=Vsock))


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
        ("1:6980", "'1' is not an IPv4 address"),
        ("tcp://1:6980", "'1' is not an IPv4 address"),
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
        ("TCP://gateway:6980", "TCP:// is not known here"),
        ("://gateway:6980", ":// is not known here"),
    ],
)
def test_a_wrong_spelling_is_answered_with_the_right_one(text: str, hint: str) -> None:
    for parse in (parse_dial, parse_listen, *TCP_ONLY):
        with pytest.raises(UsageError) as caught:
            parse(text)
        assert hint in str(caught.value)


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("tcp4://gateway:6980", Tcp("gateway", 6980, 4)),
        ("tcp6://[::1]:6980", Tcp("::1", 6980, 6)),
        ("vsock://16:8888", Vsock(16, 8888)),
        ("vsock://hypervisor:1", Vsock(0, 1)),
        ("vsock://local:1", Vsock(1, 1)),
        ("vsock://host:1", Vsock(2, 1)),
        ("vsock://parent:8443", Vsock(3, 8443)),
        ("vsock://4294967294:4294967294", Vsock(2**32 - 2, 2**32 - 2)),
        ("vsock://3:0", Vsock(3, 0)),
        ("unix:/run/app.sock", Unix("/run/app.sock")),
        ("unix:///run/app.sock", Unix("/run/app.sock")),
        ("unix:////run/app.sock", Unix("/run/app.sock")),
        ("unix:run/app.sock", Unix("run/app.sock")),
        ("unix:./8080", Unix("./8080")),
        ("unix:/run/a,b c://d.sock", Unix("/run/a,b c://d.sock")),
        ("unix:@app", Unix("@app")),
        ("unix:@8080", Unix("@8080")),
        ("unix:/" + "p" * 106, Unix("/" + "p" * 106)),
        ("unix:@" + "p" * 107, Unix("@" + "p" * 107)),
        ("unix-vsock:///run/v.sock:8888", HybridVsock("/run/v.sock", 8888)),
        ("unix-vsock:/run/v.sock:8888", HybridVsock("/run/v.sock", 8888)),
        ("unix-vsock:v:1:2", HybridVsock("v:1", 2)),
    ],
)
def test_what_is_no_tcp_is_understood_by_its_scheme(text: str, endpoint: Endpoint) -> None:
    assert parse_dial(text) == endpoint
    assert parse_listen(text) == endpoint


@pytest.mark.parametrize(
    ("text", "endpoint", "hint"),
    [
        ("tcp4://:6980", Tcp(None, 6980, 4), "write HOST:6980"),
        ("tcp6://6980", Tcp(None, 6980, 6), "write HOST:6980"),
        ("vsock://:8888", Vsock(None, 8888), "any cid: write the one to dial, as in vsock://3:8888"),
        ("vsock://any:8888", Vsock(None, 8888), "as in vsock://3:8888"),
        ("vsock://4294967295:8888", Vsock(None, 8888), "as in vsock://3:8888"),
        ("vsock://3:4294967295", Vsock(3, VSOCK_PORT_ANY), "means any port and cannot be dialled, use 0 to 4294967294"),
        ("systemd:web", Systemd("web"), "can only be listened on: write what to dial, as in tcp://HOST:PORT"),
        ("systemd:relay.socket/1-a_b", Systemd("relay.socket/1-a_b"), "can only be listened on"),
    ],
)
def test_what_is_no_tcp_may_be_only_to_listen_on(text: str, endpoint: Endpoint, hint: str) -> None:
    assert parse_listen(text) == endpoint
    with pytest.raises(UsageError) as caught:
        parse_dial(text)
    assert repr(text) in str(caught.value)
    assert hint in str(caught.value)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("16:8888", "for that cid write vsock://16:8888"),
        ("tcp4://[::1]:80", "'::1' is not an IPv4 address, write tcp://[::1]:80"),
        ("tcp6://192.0.2.1:80", "'192.0.2.1' is not an IPv6 address, write tcp://192.0.2.1:80"),
        ("vsock://8888", "write vsock://CID:PORT, as in vsock://16:8888, or to listen vsock://:8888"),
        ("vsock://parant:1", "'parant' is no cid: write a number, as in vsock://16:8888, or any, hypervisor, local"),
        ("vsock://0x10:1", "'0x10' is no cid"),
        ("vsock://-1:1", "'-1' is no cid"),
        ("vsock://4294967296:1", "'4294967296' is no cid"),
        ("vsock://1:2:3", "'1:2' is no cid"),
        ("vsock://3:", "vsock port '' is not a number from 0 to 4294967294"),
        ("vsock://3:4294967296", "vsock port '4294967296' is not a number"),
        ("vsock://3:٦", "vsock port '٦' is not a number"),
        ("vsock://3: 1", "has a space in it"),
        ("vsock:8888", "two meanings: write tcp://vsock:8888 for the host"),
        ("unix:8080", "two meanings: write tcp://unix:8080 for the host, or unix:./8080"),
        ("systemd:80", "write tcp://systemd:80 for the host"),
        ("unix-vsock:80", "write tcp://unix-vsock:80 for the host"),
        ("unix:", "'' is no path of a socket, write it as in unix:/run/app.sock"),
        ("unix:@", "'@' is no path of a socket"),
        ("unix:/run/app.sock ", "is no path of a socket"),
        ("unix:/run/a\0pp", "is no path of a socket"),
        ("unix:/run/app\n", "is no path of a socket"),
        ("unix:/\udc80", "is no path of a socket"),
        ("unix://run/app.sock", "write unix:/PATH or unix:///PATH, and ./PATH"),
        ("unix:/" + "p" * 107, "is 108 bytes long, of 107: choose a shorter path"),
        ("unix:/" + "ü" * 54, "is 109 bytes long"),
        ("unix:@" + "p" * 108, "is 108 bytes long"),
        ("/run/app.sock", "for a unix socket write unix:/run/app.sock"),
        ("./app.sock", "for a unix socket write unix:./app.sock"),
        ("@app", "for a unix socket write unix:@app"),
        ("unix-vsock:/run/v.sock", "write the path and the guest's port, as in unix-vsock:/run/vm.vsock:8888"),
        ("unix-vsock:@v:1", "write the path and the guest's port"),
        ("unix-vsock::1", "'' is no path"),
        ("unix-vsock:/v:x", "vsock port 'x' is not a number"),
        ("unix-vsock:/v:4294967295", "means any port, use 0 to 4294967294"),
        ("systemd:", "no FileDescriptorName= of a socket unit, write systemd:NAME"),
        ("systemd:a:b", "no FileDescriptorName="),
        ("systemd://web", "no FileDescriptorName="),
        ("systemd:wéb", "no FileDescriptorName="),
        (
            "quic://gateway:1",
            "write tcp://HOST:PORT, vsock://CID:PORT, unix:PATH, unix-vsock:PATH:PORT or systemd:NAME",
        ),
    ],
)
def test_a_wrong_spelling_of_any_kind_is_answered_with_the_right_one(text: str, hint: str) -> None:
    for parse in (parse_dial, parse_listen):
        with pytest.raises(UsageError) as caught:
            parse(text)
        assert repr(text) in str(caught.value)
        assert hint in str(caught.value)


def test_the_path_where_a_host_listens_for_a_guest_is_longer_and_must_fit_as_well() -> None:
    text = "unix-vsock:/" + "p" * 102 + ":8888"
    endpoint = parse_dial(text)
    assert isinstance(endpoint, HybridVsock)
    assert endpoint.listening == Unix("/" + "p" * 102 + "_8888")
    with pytest.raises(UsageError, match="is 108 bytes long"):
        parse_listen(text)


def test_the_kernel_takes_an_abstract_name_after_a_zero() -> None:
    assert Unix("@app").address == "\0app"
    assert Unix("/run/@app").address == "/run/@app"


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("vsock://3:5005", "vsock:// is not known here, write tcp://HOST:PORT"),
        ("tcp4://gateway:6980", "tcp4:// is not known here, write tcp://HOST:PORT"),
        ("unix:/run/app.sock", "unix: is not known here, write tcp://HOST:PORT"),
        ("unix-vsock:/v:1", "unix-vsock: is not known here"),
        ("systemd:web", "systemd: is not known here"),
        ("TCP:gateway:6980", "an IPv6 address needs brackets"),
        ("/run/app.sock", "names no port: write HOST:PORT"),
    ],
)
def test_where_only_tcp_makes_sense_other_kinds_are_refused_by_name(text: str, hint: str) -> None:
    for parse in TCP_ONLY:
        with pytest.raises(UsageError) as caught:
            parse(text)
        assert hint in str(caught.value)


def test_where_only_tcp_makes_sense_a_host_may_have_the_name_of_anything() -> None:
    for name in ("tcp", "vsock", "unix", "systemd", "unix-vsock", "local", "abstract", "EXEC", "UDP-LISTEN"):
        for parse in TCP_ONLY:
            assert parse(f"{name}:80") == Tcp(name, 80)


def test_where_only_vsock_makes_sense_the_scheme_may_be_left_out() -> None:
    for parse in VSOCK_ONLY:
        assert parse("16:8888") == parse("vsock://16:8888") == Vsock(16, 8888)
        assert parse("parent:8888") == Vsock(3, 8888)
    for text in ("any:8888", ":8888", "8888", "4294967295:8888"):
        assert parse_listen(text, Vsock) == Vsock(None, 8888)
        with pytest.raises(UsageError, match=r"write the one to dial|write vsock://CID:PORT"):
            parse_dial(text, Vsock)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("", "an empty address: write CID:PORT, as in 16:8888"),
        ("16: 8888", "has a space in it: write CID:PORT"),
        ("127.0.0.1:8443", "'127.0.0.1' is no cid: write a number"),
        ("tcp://127.0.0.1:8443", "tcp:// is not known here, write vsock://CID:PORT"),
        ("unix:/run/app.sock", "unix: is not known here, write vsock://CID:PORT"),
        ("VSOCK-LISTEN:8888", "'VSOCK-LISTEN' is no cid"),
        ("unix:80", "'unix' is no cid"),
    ],
)
def test_where_only_vsock_makes_sense_other_kinds_are_refused(text: str, hint: str) -> None:
    for parse in VSOCK_ONLY:
        with pytest.raises(UsageError) as caught:
            parse(text)
        assert hint in str(caught.value)


@given(hosts, ports)
def test_a_host_and_a_port_are_understood_without_a_scheme(host: str, port: int) -> None:
    endpoint = parse_dial(f"[{host}]:{port}" if ":" in host else f"{host}:{port}", Tcp)
    assert endpoint.port == port
    assert parse_dial(str(endpoint)) == parse_dial(str(endpoint), Tcp) == endpoint


@given(dialled)
def test_an_endpoint_to_dial_survives_being_written_and_read(endpoint: Endpoint) -> None:
    assert parse_dial(str(endpoint)) == endpoint


@given(listened_on)
def test_an_endpoint_to_listen_on_survives_being_written_and_read(endpoint: Endpoint) -> None:
    assert parse_listen(str(endpoint)) == endpoint


SPELLINGS = [
    *("tcp://[fe80::1%eth0]:6980", "tcp6://gateway.example:1", "vsock://parent:4294967295", "unix:///run/a.sock"),
    *("unix-vsock:/run/v.sock:52", "systemd:web", "TCP4-LISTEN:443,fork,reuseaddr,bind=127.0.0.1", "16:8888", ":1"),
    *("VSOCK-CONNECT:3:8002", "ABSTRACT-LISTEN:name,fork", "UNIX-LISTEN:/p,unlink-early", "TCP6:[::1]:80,nodelay"),
]


@st.composite
def mutated(draw: st.DrawFn) -> str:
    """A valid spelling with some of its characters taken out, doubled, swapped for others, or cut off."""
    text = draw(st.sampled_from(SPELLINGS))
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(text)))
        end = draw(st.integers(start, len(text)))
        text = (
            text[:start] + draw(st.text("/:@,=[]%.-09azTCPé \0", max_size=3) | st.just(text[start:] * 2)) + text[end:]
        )
    return text


@given(mutated() | st.text(max_size=30) | st.text("0123456789abcdef:.[]%-/tcp@,=", max_size=30))
def test_any_text_is_an_endpoint_or_a_usage_error_and_nothing_else(text: str) -> None:
    for parse in (parse_dial, parse_listen, *TCP_ONLY, *VSOCK_ONLY):
        with suppress(UsageError):
            endpoint = parse(text)
            assert parse(str(endpoint)) == endpoint
