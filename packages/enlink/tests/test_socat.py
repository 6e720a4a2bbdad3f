"""What people know from socat means the same here, or is refused by name."""

from __future__ import annotations

from contextlib import suppress

import pytest
from enlink.endpoint import Endpoint, Tcp, Unix, Vsock, parse_dial, parse_listen
from enlink.errors import UsageError
from enlink.socat import translate
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("TCP:gateway:443", Tcp("gateway", 443)),
        ("tcp-connect:192.0.2.1:443,nodelay,keepalive=1", Tcp("192.0.2.1", 443)),
        ("TCP:gateway:443,pf=ip4", Tcp("gateway", 443, 4)),
        ("TCP:gateway:443,Protocol-Family=IP6", Tcp("gateway", 443, 6)),
        ("TCP4:gateway:443", Tcp("gateway", 443, 4)),
        ("TCP6:[::1]:443", Tcp("::1", 443, 6)),
        ("VSOCK-CONNECT:3:8002", Vsock(3, 8002)),
        ("vsock:3:8002", Vsock(3, 8002)),
        ("UNIX-CONNECT:/run/app.sock", Unix("/run/app.sock")),
        ("Unix:/run/app.sock", Unix("/run/app.sock")),
        ("UNIX-CLIENT:app.sock", Unix("app.sock")),
        ("ABSTRACT-CONNECT:app", Unix("@app")),
    ],
)
def test_an_address_to_dial_is_understood(text: str, endpoint: Endpoint) -> None:
    assert parse_dial(text) == endpoint


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("TCP-LISTEN:443,fork,reuseaddr", Tcp(None, 443)),
        ("tcp-l:443,Fork=1", Tcp(None, 443)),
        ("TCP-LISTEN:443,bind=127.0.0.1,fork", Tcp("127.0.0.1", 443)),
        ("TCP-LISTEN:443,bind=[::1]", Tcp("::1", 443)),
        ("TCP-LISTEN:443,pf=ip6", Tcp(None, 443, 6)),
        ("TCP4-LISTEN:443", Tcp(None, 443, 4)),
        ("TCP6-LISTEN:443,fork", Tcp(None, 443)),
        ("TCP6-LISTEN:443,ipv6only=1", Tcp(None, 443, 6)),
        ("TCP6-LISTEN:443,bind=[::1]", Tcp("::1", 443, 6)),
        ("VSOCK-LISTEN:8001,fork,reuseaddr", Vsock(None, 8001)),
        ("UNIX-LISTEN:/p,fork,unlink-early", Unix("/p")),
        ("unix-l:p", Unix("p")),
        ("ABSTRACT-LISTEN:app,fork", Unix("@app")),
    ],
)
def test_an_address_to_listen_on_is_understood(text: str, endpoint: Endpoint) -> None:
    assert parse_listen(text) == endpoint


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("TCP-LISTEN:443,fork", "listens: to dial write TCP-CONNECT:HOST:PORT, or tcp://HOST:PORT"),
        ("VSOCK-LISTEN:8001", "listens: to dial write VSOCK-CONNECT:CID:PORT, or vsock://CID:PORT"),
        ("UNIX-L:/p", "listens: to dial write UNIX-CONNECT:PATH, or unix:PATH"),
        ("ABSTRACT-LISTEN:n", "listens: to dial write ABSTRACT-CONNECT:NAME, or unix:@NAME"),
        ("TCP:gateway:http", "port 'http' is not a number"),
        ("TCP4:[::1]:80", "'::1' is not an IPv4 address"),
        ("TCP:gateway:80,bind=192.0.2.1", "socat's option 'bind=192.0.2.1' is not known here: leave it out"),
        ("TCP:gateway:80,pf=unix", "socat's option 'pf=unix' is not known here"),
        ("TCP4:gateway:80,pf=ip6", "socat's option 'pf=ip6' is not known here"),
        ("TCP:gateway:80,ipv6only", "socat's option 'ipv6only' is not known here"),
        ("TCP:gateway:80,nodelay=0", "socat's option 'nodelay=0' is not known here"),
        ("VSOCK-CONNECT:any:80", "is any cid: write the one to dial"),
        ('UNIX-CONNECT:"/p"', "quotes are not understood: write unix:PATH"),
        ("UNIX-CONNECT:/p\\,q", "quotes are not understood"),
        ("tcp:443", "two meanings: write tcp://tcp:443 for the host, or in full tcp://…:443"),
        ("vsock-connect:443", "two meanings: write tcp://vsock-connect:443 for the host, or in full vsock://…:443"),
        ("local:443", "two meanings: write tcp://local:443 for the host, or in full unix:./443"),
        ("ABSTRACT:443", "two meanings: write tcp://ABSTRACT:443 for the host, or in full unix:@443"),
    ],
)
def test_what_cannot_be_dialled_is_answered_with_what_can(text: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_dial(text)
    assert repr(text) in str(caught.value)
    assert hint in str(caught.value)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("TCP:gateway:443", "dials: to listen write TCP-LISTEN:PORT, or tcp://gateway:443"),
        ("VSOCK:16:443", "dials: to listen write VSOCK-LISTEN:PORT, or vsock://16:443"),
        ("LOCAL:/p", "dials: to listen write UNIX-LISTEN:PATH, or unix:/p"),
        ("TCP-LISTEN:127.0.0.1:443", "takes a port: write TCP-LISTEN:PORT, or tcp://HOST:PORT"),
        ("VSOCK-LISTEN:3:443", "takes a port: write VSOCK-LISTEN:PORT"),
        ("TCP-LISTEN:,fork", "takes a port"),
        ("TCP-LISTEN:443,bind=::1", "an IPv6 address needs brackets"),
        ("TCP-LISTEN:443,bind", "socat's option 'bind' is not known here"),
        ("TCP-LISTEN:443,max-children=9", "socat's option 'max-children=9' is not known here: leave it out"),
        (
            "TCP-LISTEN:443,range=10.0.0.0/8",
            "'range=10.0.0.0/8' says who may connect, for which there are no rules here",
        ),
        ("TCP-LISTEN:443,Lowport,fork", "'Lowport' says who may connect"),
        ("TCP-LISTEN:443,,fork", "socat's option '' is not known here"),
        ("VSOCK-LISTEN:443,bind=3", "socat's option 'bind=3' is not known here"),
        ("UNIX-LISTEN:/p,mode=666", "socat's option 'mode=666' is not known here"),
        ("UNIX-LISTEN:/p,unlink-close=0", "socat's option 'unlink-close=0' is not known here"),
        ("UNIX-LISTEN:", "'' is no path of a socket"),
    ],
)
def test_what_cannot_be_listened_on_is_answered_with_what_can(text: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_listen(text)
    assert repr(text) in str(caught.value)
    assert hint in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["EXEC:/bin/sh", "STDIO", "OPENSSL-LISTEN:443,fork", "UDP4-RECVFROM:53", "UNIX-RECV:/p", "ABSTRACT-SENDTO:n"],
)
def test_what_only_socat_does_is_refused_by_name(text: str) -> None:
    keyword = text.partition(":")[0]
    for parse in (parse_dial, parse_listen):
        with pytest.raises(UsageError, match=f"socat's {keyword} is not known here: TCP, VSOCK, UNIX and ABSTRACT are"):
            parse(text)


@pytest.mark.parametrize(
    "text",
    ["gateway:80", "exec:80", "udp.example:80", "tcp://gateway:80", "TCP://gateway:80", "unix:/p,fork", "[::1]:80", ""],
)
def test_what_is_not_socats_is_left_to_others(text: str) -> None:
    assert translate(text, is_listening=False) is None
    assert translate(text, is_listening=True) is None


@given(st.sampled_from(["TCP", "tcp4", "Vsock-Connect", "TCP-LISTEN", "UNIX-L"]), st.text(max_size=30), st.booleans())
def test_any_text_is_a_spelling_of_ours_or_a_usage_error(keyword: str, text: str, is_listening: bool) -> None:
    parse = parse_listen if is_listening else parse_dial
    with suppress(UsageError):
        endpoint = parse(f"{keyword}:{text}")
        assert parse(str(endpoint)) == endpoint
