"""The names of peers: what the name service says, and what a socket's address is called."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from enlink.connection import Unreachable, name_of, resolve
from enlink.endpoint import Endpoint, Tcp, Unix, Vsock
from trio.testing import trio_test

NAME = "server.example"


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the name service says to whoever asks for the one name; an exception is raised."""
    answer: list[Any] = []
    real = socket.getaddrinfo

    def getaddrinfo(host: Any, port: Any, family: int = 0, **rest: Any) -> Any:
        if host != NAME:
            return real(host, port, family, **rest)
        for exception in (item for item in answer if isinstance(item, Exception)):
            raise exception
        families = {len(item): socket.AF_INET if len(item) == 2 else socket.AF_INET6 for item in answer}
        return [(families[len(item)], 1, 6, "", item) for item in answer if family in (0, families[len(item)])]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return answer


@pytest.mark.proves("F28")
@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ([socket.gaierror(socket.EAI_NONAME, "Name or service not known")], "[Errno -2] Name or service not known"),
        ([UnicodeError("label too long")], "label too long"),
        ([], "it has no address"),
    ],
)
@trio_test
async def test_a_name_without_an_address_is_told(names: list[Any], answer: list[Any], reason: str) -> None:
    names += answer
    with pytest.raises(Unreachable) as raised:
        await resolve(Tcp(NAME, 80))
    assert str(raised.value) == f"cannot resolve {NAME}: {reason}"


@trio_test
async def test_addresses_come_once_of_the_wanted_family_and_with_their_scope(names: list[Any]) -> None:
    names += [
        ("192.0.2.1", 0),
        ("192.0.2.1", 0),
        ("2001:db8::1", 0, 0, 0),
        ("fe80::1", 0, 0, 7),
        ("fe80::2%x", 0, 0, 7),
    ]
    six = ["2001:db8::1", "fe80::1%7", "fe80::2%x"]
    assert await resolve(Tcp(NAME, 80)) == ["192.0.2.1", *six]
    assert await resolve(Tcp(NAME, 80, 4)) == ["192.0.2.1"]
    assert await resolve(Tcp(NAME, 80, 6)) == six
    assert await resolve(Tcp("fe80::1%eth0", 80)) == ["fe80::1%eth0"]


@pytest.mark.parametrize(
    ("family", "address", "endpoint"),
    [
        (socket.AF_INET, ("192.0.2.1", 80), Tcp("192.0.2.1", 80)),
        (socket.AF_INET6, ("2001:db8::1", 80, 0, 0), Tcp("2001:db8::1", 80)),
        (socket.AF_INET6, ("fe80::1", 80, 0, 2), Tcp("fe80::1%2", 80)),
        (socket.AF_VSOCK, (3, 1024), Vsock(3, 1024)),
        (socket.AF_UNIX, "/run/app", Unix("/run/app")),
        (socket.AF_UNIX, b"\0app", Unix("@app")),
        (socket.AF_UNIX, "", Unix("")),
        (socket.AF_UNIX, None, Unix("")),
    ],
)
def test_a_sockets_address_becomes_an_endpoint(family: int, address: Any, endpoint: Endpoint) -> None:
    assert name_of(family, address) == endpoint
