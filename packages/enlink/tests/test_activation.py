"""Sockets from systemd: taken by processes that really inherit them, by name, and refused where they do not listen."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from enlink.activation import claim, take_inherited_sockets
from enlink.errors import ConfigError

UNIT = "give its .socket unit ListenStream= only"
# Puts what it is given in the place where systemd puts sockets, then says what becomes of them.
ACTIVATED = textwrap.dedent(
    """
    import json, os, sys
    from enlink.activation import claim, take_inherited_sockets
    from enlink.errors import ConfigError
    from enlink.program import ProgramParser

    claimed, descriptors = json.loads(sys.argv[1]), json.loads(sys.argv[2])
    moved = [os.dup(descriptor) for descriptor in descriptors]
    high = [os.dup2(descriptor, 100 + number) for number, descriptor in enumerate(moved)]
    for number, descriptor in enumerate(high):
        os.dup2(descriptor, 3 + number)
    if os.environ.get("LISTEN_PID") == "own":
        os.environ["LISTEN_PID"] = str(os.getpid())
    try:
        inherited = take_inherited_sockets()
        assert not [name for name in os.environ if name.startswith("LISTEN_")]
        assert not any(os.get_inheritable(sock.fileno()) for there in inherited.values() for sock in there)
        found = {name: [sock.fileno() for sock in claim(inherited, name)] for name in claimed}
        print(json.dumps({"claimed": found, "left": sorted(inherited)}))
    except ConfigError as error:
        print(json.dumps(str(error)))
    """
)


@pytest.fixture
def sockets() -> Iterator[dict[str, int]]:
    """One of each kind that a unit may pass, by what it is."""
    with ExitStack() as stack:
        tcp, unix, datagrams = (
            stack.enter_context(socket.socket(family, kind))
            for family, kind in (
                (socket.AF_INET, socket.SOCK_STREAM),
                (socket.AF_UNIX, socket.SOCK_STREAM),
                (socket.AF_INET, socket.SOCK_DGRAM),
            )
        )
        tcp.listen()
        unix.bind("")
        unix.listen()
        connected, other = socket.socketpair()
        stack.enter_context(connected)
        stack.enter_context(other)
        pipe = os.pipe()
        for descriptor in pipe:
            stack.callback(os.close, descriptor)
        yield {
            "tcp": tcp.fileno(),
            "unix": unix.fileno(),
            "datagrams": datagrams.fileno(),
            "connected": connected.fileno(),
            "pipe": pipe[0],
        }


def activated(
    descriptors: list[int], claimed: list[str], names: str | None, pid: str = "own", count: str | None = None
) -> object:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LISTEN_")}
    environment |= {"LISTEN_PID": pid, "LISTEN_FDS": str(len(descriptors)) if count is None else count}
    if names is not None:
        environment["LISTEN_FDNAMES"] = names
    argv = [sys.executable, "-c", ACTIVATED, json.dumps(claimed), json.dumps(descriptors)]
    done = subprocess.run(
        argv, env=environment, pass_fds=descriptors, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_sockets_are_claimed_by_name_wherever_they_stand(sockets: dict[str, int]) -> None:
    passed = [sockets["tcp"], sockets["unix"], sockets["tcp"]]
    assert activated(passed, ["admin", "web"], "web:admin:web") == {
        "claimed": {"admin": [4], "web": [3, 5]},
        "left": [],
    }
    assert activated(passed, ["admin"], "web:admin:web") == {"claimed": {"admin": [4]}, "left": ["web"]}


def test_sockets_without_names_are_called_as_systemd_calls_them(sockets: dict[str, int]) -> None:
    assert activated([sockets["tcp"]], ["unknown"], None) == {"claimed": {"unknown": [3]}, "left": []}


@pytest.mark.parametrize("pid", ["", "1", "x"])
def test_what_was_meant_for_another_process_is_left_alone(sockets: dict[str, int], pid: str) -> None:
    assert activated([sockets["tcp"]], [], "web", pid) == {"claimed": {}, "left": []}
    text = activated([sockets["tcp"]], ["web"], "web", pid)
    assert text == (
        "systemd passes no socket called web: set FileDescriptorName=web there; start this by its .socket unit"
    )


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("datagrams", "the socket called web takes no connections: give its unit ListenStream="),
        ("connected", "the socket called web does not listen: give its unit Accept=no"),
        (
            "pipe",
            "systemd passes descriptor 3, called web, which is no socket (Socket operation on non-socket): " + UNIT,
        ),
    ],
)
def test_what_does_not_listen_for_connections_is_refused(sockets: dict[str, int], kind: str, text: str) -> None:
    assert activated([sockets[kind]], ["web"], "web") == text


def test_variables_that_make_no_sense_are_refused(sockets: dict[str, int]) -> None:
    assert activated([sockets["tcp"]], [], "a:b") == (
        "LISTEN_FDNAMES='a:b' does not name the 1 sockets that systemd passes: unset it"
    )
    for count in ("", "-1", "x"):
        assert activated([sockets["tcp"]], [], None, count=count) == (
            f"LISTEN_FDS={count!r} is not the number of sockets that systemd passes: unset LISTEN_PID"
        )


def test_what_there_is_is_named_to_who_asks_for_something_else() -> None:
    with socket.socket() as one, socket.socket() as other:
        inherited = {"web": [one], "admin": [other]}
        with pytest.raises(ConfigError, match=r"no socket called wep: set .*; those are called admin, web$") as raised:
            claim(inherited, "wep")
        assert raised.value.exit_code == 78
        assert sorted(inherited) == ["admin", "web"]


def test_a_program_that_systemd_did_not_start_inherits_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PID", "FDS", "FDNAMES"):
        monkeypatch.delenv(f"LISTEN_{name}", raising=False)
    assert take_inherited_sockets() == {}


def test_only_what_was_passed_to_this_process_is_taken(
    monkeypatch: pytest.MonkeyPatch, sockets: dict[str, int]
) -> None:
    """In this process too, so that nothing hangs on how another one was started."""
    with socket.socket(fileno=os.dup(sockets["tcp"])) as twin:
        monkeypatch.setattr("enlink.activation.FIRST_DESCRIPTOR", twin.fileno())
        monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
        monkeypatch.setenv("LISTEN_FDS", "1")
        monkeypatch.setenv("LISTEN_FDNAMES", "web")
        inherited = take_inherited_sockets()
        (sock,) = claim(inherited, "web")
        assert sock.detach() == twin.fileno()
        assert inherited == {}
        assert "LISTEN_FDS" not in os.environ
