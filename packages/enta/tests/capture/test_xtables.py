"""The process that drives python-iptables: requests against the real kernel, and what goes wrong in it."""

from __future__ import annotations

import ctypes.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from enlink.errors import EngError, SystemFailure, Unavailable
from enlink.testing.hosts import Host, Network
from enta.capture import xtables
from enta.capture.xtables import Answer, Change, Request
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Network() as network:
        yield network.host("host")


def served(host: Host, request: Request) -> Answer:
    argv = host.argv([sys.executable, "-I", "-m", "enta.capture.xtables"])
    done = subprocess.run(argv, input=json.dumps(request), capture_output=True, text=True, check=True, timeout=30)
    answer: Answer = json.loads(done.stdout)
    return answer


def written(host: Host, table: str, rules: list[list[str]]) -> Answer:
    """Replace the rules of a chain of ours, and read them back."""
    change = Change(remove=["eng_test"], add={"eng_test": rules})
    return served(host, Request(read={table: ["eng_test"]}, write={table: change}))


def negated(option: st.SearchStrategy[list[str]]) -> st.SearchStrategy[list[str]]:
    return st.one_of(st.just([]), option, option.map(lambda words: ["!", *words]))


networks = st.builds(
    lambda number, length: (
        f"{'.'.join(str(byte) for byte in (number >> (32 - length) << (32 - length)).to_bytes(4))}/{length}"
    ),
    st.integers(0, 2**32 - 1),
    st.integers(1, 32),
)
devices = st.from_regex(r"[A-Za-z0-9_.][A-Za-z0-9_.-]{0,14}", fullmatch=True)
protocols = st.sampled_from(["tcp", "udp"])
ports = st.integers(1, 65535)
matches = st.one_of(
    st.integers(0, 2**32 - 1).map(lambda mark: ["-m", "mark", "--mark", f"{mark:#x}"]),
    st.sampled_from(["ORIGINAL", "REPLY"]).map(lambda way: ["-m", "conntrack", "--ctdir", way]),
    st.sampled_from([["-m", "addrtype", "--dst-type", "LOCAL"], ["-m", "addrtype", "!", "--src-type", "LOCAL"]]),
    st.from_regex(r"eng [A-Za-z0-9_=:. -]{1,200}[a-z]", fullmatch=True).map(
        lambda text: ["-m", "comment", "--comment", text]
    ),
)
rules = st.builds(
    lambda *parts: [word for part in parts for word in part],
    negated(networks.map(lambda network: ["-s", network])),
    negated(networks.map(lambda network: ["-d", network])),
    negated(devices.map(lambda device: ["-i", device])),
    negated(devices.map(lambda device: ["-o", device])),
    st.builds(lambda protocol, port: ["-p", protocol, "-m", protocol, "--dport", str(port)], protocols, ports),
    matches,
    st.sampled_from(["DROP", "ACCEPT", "RETURN"]).map(lambda verdict: ["-j", verdict]),
)


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.lists(rules, min_size=1, max_size=30))
def test_rules_come_back_as_they_were_written(host: Host, rules: list[list[str]]) -> None:
    """And iptables-save, which shares no code with this, says the same."""
    answer = written(host, "ip mangle", rules)
    assert answer["error"] == ""
    assert answer["tables"]["ip mangle"]["chains"]["eng_test"] == rules
    saved = [
        line for line in host.run("iptables-legacy-save", "-t", "mangle").splitlines() if line.startswith("-A eng_test")
    ]
    for line, rule in zip(saved, rules, strict=True):
        assert line.replace('"', "").replace("\\", "") == " ".join(["-A", "eng_test", *rule])


def test_what_is_added_to_a_built_in_chain_goes_to_its_top_in_its_order(host: Host) -> None:
    host.run("iptables-legacy", "-t", "nat", "-A", "OUTPUT", "-j", "ACCEPT")
    jumps = [["-p", "tcp", "-j", "eng_test"], ["-p", "udp", "-j", "eng_test"]]
    change = Change(remove=["eng_test"], add={"OUTPUT": jumps, "eng_test": []})
    for _ in range(2):
        answer = served(host, Request(read={"ip nat": ["eng_test", "eng_none"]}, write={"ip nat": change}))
        assert answer["tables"]["ip nat"]["chains"] == {"OUTPUT": jumps, "eng_test": []}
    saved = host.run("iptables-legacy-save", "-t", "nat").splitlines()
    assert [line for line in saved if line.startswith("-A")] == [
        "-A OUTPUT -p tcp -j eng_test",
        "-A OUTPUT -p udp -j eng_test",
        "-A OUTPUT -j ACCEPT",
    ]


def test_a_request_that_fails_changes_nothing(host: Host) -> None:
    assert written(host, "ip mangle", [["-j", "DROP"]])["error"] == ""
    before = host.run("iptables-legacy-save", "-t", "mangle").splitlines()[1:-1]
    answer = written(host, "ip mangle", [["-j", "ACCEPT"], ["-m", "nosuch", "-j", "DROP"]])
    assert answer["error"] == "Unavailable"
    assert "nosuch" in answer["text"]
    assert host.run("iptables-legacy-save", "-t", "mangle").splitlines()[1:-1] == before


def test_a_target_that_the_table_does_not_take_is_an_error_of_the_system(host: Host) -> None:
    answer = written(host, "ip mangle", [["-j", "REJECT", "--reject-with", "icmp-port-unreachable"]])
    assert (answer["error"], answer["text"]) == ("SystemFailure", "iptables: can't commit: 'Invalid argument'")


def test_a_table_that_the_kernel_lacks_is_unavailable(host: Host) -> None:
    answer = served(host, Request(read={"ip nosuch": []}, write={}))
    assert answer["error"] == "Unavailable"
    assert "this kernel lacks the legacy table" in answer["text"]


class LibraryError(Exception):
    """What the library raises."""


class Library:
    """The library with one table, which others change while we edit it, *races* times."""

    IPTCError = LibraryError

    def __init__(self, races: int) -> None:
        self.races = races
        self.kernel: list[str] = []
        self._copy: list[str] = []

    def refresh(self) -> None:
        self._copy = list(self.kernel)

    def is_chain(self, name: str) -> bool:
        return name in self._copy

    def create_chain(self, name: str) -> None:
        self._copy.append(name)

    def builtin_chain(self, _: object) -> bool:
        return False

    chains: tuple[()] = ()

    def Chain(self, _: object, name: str) -> None:  # noqa: N802  # the library's name
        assert name in self._copy

    def commit(self) -> None:
        if self.races:
            self.races -= 1
            self.kernel.append(f"theirs{self.races}")
            raise LibraryError("can't commit: b'Resource temporarily unavailable'")
        self.kernel = self._copy


def test_a_table_that_others_change_meanwhile_is_read_and_edited_again() -> None:
    library = Library(races=3)
    xtables._write(library, library, Change(remove=[], add={"eng_test": []}))
    assert library.kernel == ["theirs2", "theirs1", "theirs0", "eng_test"]


def test_a_table_that_others_never_leave_alone_is_given_up() -> None:
    library = Library(races=10)
    with pytest.raises(LibraryError, match="temporarily"):
        xtables._write(library, library, Change(remove=[], add={"eng_test": []}))
    assert "eng_test" not in library.kernel


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("can't commit: b'No chain/target/match by that name'", Unavailable),
        ("can't find match conntrack", Unavailable),
        ("can't commit: b'Too many links'", SystemFailure),
    ],
)
def test_the_librarys_errors_say_whose_fault_it_is(text: str, kind: type[EngError]) -> None:
    error = xtables._translated(LibraryError(text))
    assert type(error) is kind
    assert text.replace("b'", "'") in str(error)


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Undo what the import of the library does to a process that goes on."""
    monkeypatch.setattr(ctypes.util, "find_library", ctypes.util.find_library)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setitem(sys.modules, "distutils", None)
    return monkeypatch


def test_a_missing_library_is_named_with_its_package(restored: pytest.MonkeyPatch) -> None:
    restored.setitem(xtables._LIBRARIES, "ip4tc", ("libnosuch.so.2", "libnosuch.so.0"))
    with pytest.raises(Unavailable, match=r"needs libnosuch\.so\.2: install the package iptables"):
        xtables._import_iptc()


def test_a_missing_python_iptables_is_named_with_its_extra(restored: pytest.MonkeyPatch) -> None:
    restored.setitem(sys.modules, "iptc", None)
    with pytest.raises(Unavailable, match=r"pip install 'eng-enta\[iptables\]'"):
        xtables._import_iptc()
