"""Legacy tables as the kernel tells of them, and the lock, against iptables(8) itself."""

from __future__ import annotations

import fcntl
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from enlink.errors import NotPermitted, SystemFailure, Unavailable
from enlink.testing.hosts import Host, Network
from enta.capture import legacy
from enta.capture.legacy import has_ipv6, table_shape, used_tables, xtables_lock


@pytest.fixture
def host() -> Iterator[Host]:
    """A host, entered."""
    with Network() as network:
        made = network.host("host")
        with made.entered():
            yield made


@pytest.fixture
def lock_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A lock of our own, so that these tests hold up nobody."""
    path = tmp_path / "lock"
    monkeypatch.setenv("XTABLES_LOCKFILE", str(path))
    return path


def test_tables_are_used_from_the_first_rule_or_question_on(host: Host) -> None:
    assert used_tables() == []
    host.run("iptables-legacy", "-t", "nat", "-L", "-n")
    table_shape("ip6 mangle")
    assert used_tables() == ["ip nat", "ip6 mangle"]


def test_a_kernel_without_legacy_iptables_has_no_table_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "names").write_text("filter\n")
    monkeypatch.setattr(legacy, "_NAMES", {"ip": str(tmp_path / "nothing"), "ip6": str(tmp_path / "names")})
    assert used_tables() == ["ip6 filter"]


def test_ipv6_is_there_when_the_kernel_lists_its_addresses(host: Host) -> None:
    assert has_ipv6() is bool(host.run("ip", "-6", "address"))


@pytest.mark.parametrize(
    ("program", "table", "family", "address"),
    [
        ("iptables-legacy", "ip mangle", socket.AF_INET, "127.0.0.1"),
        ("ip6tables-legacy", "ip6 mangle", socket.AF_INET6, "::1"),
    ],
)
def test_the_shape_of_a_table_follows_its_rules_and_not_its_counters(
    host: Host, program: str, table: str, family: socket.AddressFamily, address: str
) -> None:
    empty = table_shape(table)
    host.run(program, "-t", "mangle", "-A", "OUTPUT", "-j", "ACCEPT")
    shape = table_shape(table)
    assert shape != empty
    with socket.socket(family, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"counted", (address, 9))
    assert "[0:0] -A OUTPUT" not in host.run(f"{program}-save", "-c", "-t", "mangle")
    assert table_shape(table) == shape
    host.run(program, "-t", "mangle", "-F")
    assert table_shape(table) == empty


def test_a_table_that_the_kernel_lacks_is_unavailable(host: Host) -> None:
    with pytest.raises(Unavailable, match="'ip nosuch': No such file or directory: this kernel lacks"):
        table_shape("ip nosuch")


def list_rules(host: Host) -> int:
    """Run iptables, which waits for the lock for a second, and return its exit status; 4 is "resource problem"."""
    argv = host.argv(["iptables-legacy", "-w", "1", "-L", "-n"])
    return subprocess.run(argv, capture_output=True, check=False, timeout=30).returncode


def test_the_lock_keeps_iptables_out(host: Host, lock_file: Path) -> None:
    with xtables_lock():
        assert list_rules(host) == 4
    assert list_rules(host) == 0


def test_the_lock_is_waited_for(lock_file: Path) -> None:
    with lock_file.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        release = threading.Timer(0.1, fcntl.flock, (held, fcntl.LOCK_UN))
        release.start()
        with xtables_lock(), lock_file.open() as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        release.join()


def test_the_lock_is_not_waited_for_for_ever(lock_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(legacy, "_LOCK_LIMIT_S", 0.1)
    with lock_file.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(SystemFailure, match=r"another program has held .*/lock for 0\.1 s"), xtables_lock():
            pass


def test_a_lock_file_that_cannot_be_opened_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XTABLES_LOCKFILE", str(tmp_path / "nowhere" / "lock"))
    with pytest.raises(SystemFailure, match=r"cannot open .*/nowhere/lock \(No such file"), xtables_lock():
        pass


def test_what_only_root_may_see_is_not_permitted(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> object:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_text", refuse)
    monkeypatch.setattr("os.open", refuse)
    monkeypatch.setattr("socket.socket", refuse)
    for look in (used_tables, lambda: table_shape("ip nat"), lambda: xtables_lock().__enter__()):
        with pytest.raises(NotPermitted, match=r"Permission denied.*run as root"):
            look()
