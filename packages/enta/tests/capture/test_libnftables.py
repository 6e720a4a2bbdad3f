"""libnftables inside this process: what it prints, what it refuses, and what it must not be asked."""

from __future__ import annotations

import errno
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from types import TracebackType
from typing import Self

import pytest
from enlink.errors import NotPermitted, Unavailable
from enlink.testing.hosts import Host, Network
from enta.capture import libnftables
from enta.capture.libnftables import Nft, NftFailure


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Network() as network:
        yield network.host("bare")


@contextmanager
def opened(host: Host) -> Iterator[Nft]:
    with host.entered():
        nft = Nft()
    with closing(nft):
        yield nft


def test_it_works_on_the_namespace_where_it_was_opened(host: Host) -> None:
    with opened(host) as nft:
        assert (nft.tables("inet"), nft.listing("inet", "t")) == ([], None)
        assert nft.run("table inet t { chain c { accept; }; }; table ip other { chain c { }; }") == ""
        assert nft.tables("inet") == ["t"]
        assert nft.listing("inet", "t") == "table inet t {\n\tchain c {\n\t\taccept\n\t}\n}\n"
        assert host.run("nft", "list", "tables") == "table inet t\ntable ip other\n"
        nft.run("flush ruleset")


def test_a_text_takes_effect_as_a_whole_or_not_at_all(host: Host) -> None:
    with opened(host) as nft:
        with pytest.raises(NftFailure, match=r"nftables refused 'add table inet t': .*No such file or directory") as no:
            nft.run("add table inet t\nadd rule inet t nowhere accept\n")
        assert no.value.is_missing
        assert not no.value.is_refused
        assert nft.tables("inet") == []


def test_a_dry_run_is_judged_and_changes_nothing(host: Host) -> None:
    with opened(host) as nft:
        nft.run("add table inet t", is_dry_run=True)
        assert nft.tables("inet") == []
        with pytest.raises(NftFailure):
            nft.run("add rule inet t nowhere accept", is_dry_run=True)


def test_a_failure_that_is_not_an_absence_is_raised_when_a_table_is_listed(host: Host) -> None:
    with opened(host) as nft, pytest.raises(NftFailure, match="syntax error"):
        nft.listing("inet", "t t")


def test_a_table_with_an_owner_goes_with_it_and_nobody_else_may_touch_it(host: Host) -> None:
    with opened(host) as other:
        with opened(host) as nft:
            nft.run("table inet t { flags owner; }")
            with pytest.raises(NftFailure) as refusal:
                other.run("delete table inet t")
            assert refusal.value.is_refused
            other.run("flush ruleset")
            assert other.tables("inet") == ["t"]
        assert other.tables("inet") == []


OWNER = """
import signal
from enta.capture.libnftables import Nft
nft = Nft()
nft.run("table inet t { flags owner; }")
print("ready", flush=True)
signal.pause()
"""
RESTLESS_STRANGER = """
from enta.capture.libnftables import Nft
nft = Nft()
print("ready", flush=True)
while True:
    nft.run("add table ip s; delete table ip s")
"""


@contextmanager
def running(host: Host, script: str) -> Iterator[None]:
    """Run a Python program until the block ends, then kill it as SIGKILL does."""
    with host.popen(sys.executable, "-c", script, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"ready\n"
            yield
        finally:
            process.kill()


@pytest.mark.proves("F13")
def test_an_owned_table_goes_when_its_process_is_killed(host: Host) -> None:
    with running(host, OWNER):
        assert host.run("nft", "list", "tables") == "table inet t\n"
    assert host.run("nft", "list", "tables") == ""


def test_an_owner_survives_strangers_who_change_the_ruleset_while_it_looks(host: Host) -> None:
    """The library repeats an interrupted look. It must not open its socket anew, which would end the ownership."""
    with opened(host) as nft, running(host, RESTLESS_STRANGER):
        nft.run("table inet t { flags owner; }")
        for _ in range(1000):
            assert nft.tables("inet") == ["t"]


def test_closing_twice_is_quiet_and_then_nothing_runs(host: Host) -> None:
    with opened(host) as nft:
        nft.close()
        with pytest.raises(ValueError, match="closed"):
            nft.run("list ruleset")


@pytest.mark.proves("F65")
def test_a_missing_library_is_named_with_its_package(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libnftables, "_LIBRARY_NAME", "libnothing.so.1")
    with pytest.raises(Unavailable, match=r"cannot load libnothing\.so\.1: run apt install libnftables1"):
        Nft()


def test_nothing_is_loaded_before_it_is_needed() -> None:
    script = (
        "import enta.capture.nftables, pathlib; print('libnftables' in pathlib.Path('/proc/self/maps').read_text())"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout == b"False\n"


@pytest.mark.proves("F59")
def test_without_the_capability_the_library_is_not_even_asked(
    host: Host, unprivileged: Callable[[], AbstractContextManager[None]], capfd: pytest.CaptureFixture[str]
) -> None:
    """It would write to standard error by itself."""
    with host.entered(), unprivileged(), pytest.raises(NotPermitted, match="CAP_NET_ADMIN"):
        Nft()
    assert capfd.readouterr() == ("", "")


class Refusing:
    """A netfilter socket of a kernel that has netfilter, but not nf_tables."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def send(self, request: bytes) -> None: ...

    def recv(self, _: int) -> bytes:
        return struct.pack("=IHHIIi", 36, 2, 0, 0, 0, -errno.EOPNOTSUPP) + bytes(16)


@pytest.mark.proves("F65")
def test_a_kernel_without_nftables_is_told_from_one_without_netfilter(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: int) -> socket.socket:
        raise OSError(errno.EPROTONOSUPPORT, "Protocol not supported")

    for answer, reason in (
        (lambda *_: Refusing(), "the kernel has no nftables .*Operation not supported"),
        (refuse, "no netfilter socket .*Protocol not supported"),
    ):
        monkeypatch.setattr("enta.capture.libnftables.socket.socket", answer)
        with pytest.raises(Unavailable, match=reason):
            Nft()
