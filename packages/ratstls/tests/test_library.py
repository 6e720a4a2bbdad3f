"""Loading: what a bad installation does to a child, and what the process that lives gets to hear of it."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import standin
from ratstls import _library
from ratstls._ffi import FUNCTIONS
from ratstls._library import VARIABLE, load
from ratstls.errors import LoadError
from standin import Installation

# A program that wants the library, and says in one line how it went.
LOAD = """
from ratstls._library import load
from ratstls.errors import LoadError
try:
    print("loaded", load())
except LoadError as error:
    print(error)
"""
# Client and server in one process, with evidence and claims as far as the build has them.
TALK = """
import socket, threading
from ratstls._library import load
from ratstls._session import Session
from ratstls.config import SessionConfig
from ratstls.verdict import Verdict
library = load()
claims = (("who", b"server"),) if library.layout.claims_at else ()
server = Session(library, SessionConfig(
    attester="sgx_ecdsa", verifier="nullverifier", is_server=True, custom_claims=claims), None)
client = Session(library, SessionConfig(
    attester="nullattester", verifier="sgx_ecdsa", is_server=False), lambda _: Verdict(True, "accepted", ""))
ours, theirs = socket.socketpair()
server.init()
client.init()
thread = threading.Thread(target=server.negotiate, args=(theirs.fileno(),))
thread.start()
client.negotiate(ours.fileno())
thread.join()
evidence = client.evidence
room = memoryview(bytearray(9))
assert client.transmit(b"hello") and room[: server.receive(room)] == b"hello"
print(library.layout.name, evidence.mr_enclave.hex()[:2], evidence.product_id, evidence.attributes[0])
print(len(evidence.quote), evidence.custom_claims)
client.cleanup()
server.cleanup()
"""


@pytest.fixture
def installation(tmp_path: Path, standin_path: Path) -> Installation:
    """An installation that a test may spoil."""
    shutil.copytree(standin_path.parent, tmp_path / "rats-tls")
    return Installation(tmp_path / "rats-tls" / standin_path.name)


def said(installation: Installation, script: str = LOAD, **environment: str) -> str:
    """What the child prints; it must end well."""
    child = installation.run("-c", script, **environment)
    assert (child.returncode, child.stderr) == (0, "")
    return child.stdout.strip()


def compiled(installation: Installation, code: str) -> Installation:
    """Put another library in the place of the stand-in."""
    source = installation.path.with_suffix(".c")
    source.write_text(code)
    standin.compile_library(source, installation.path)
    return installation


def test_a_good_installation_loads(installation: Installation) -> None:
    """By the path of the file itself, whatever link leads there."""
    link = installation.path.with_name("link.so")
    link.symlink_to(installation.path)
    assert said(Installation(link)) == f"loaded {installation.path} (2023)"


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (232, "2022a 11 1 5\n500 ()"),
        (248, "2022b 11 1 5\n500 (('who', b'server'),)"),
        (240, "2023 11 1 5\n500 (('who', b'server'),)"),
    ],
)
def test_every_known_build_works(tmp_path: Path, size: int, expected: str) -> None:
    """Its structures are found by its size alone."""
    assert said(Installation(standin.build(tmp_path / "rats-tls", size)), TALK) == expected


@pytest.mark.proves("F70")
def test_an_unknown_build_is_refused(tmp_path: Path) -> None:
    """Naming the size."""
    installation = Installation(standin.build(tmp_path / "rats-tls", 256))
    assert said(installation).startswith(
        "this build of librats_tls has a 256 byte global_core_context, and known builds"
    )


@pytest.mark.proves("F70")
@pytest.mark.parametrize(
    ("broken", "text"),
    [("1", "ends the process with status 1, saying '[FATAL] broken, as told'"), ("crash", "crashes (SIGABRT), saying")],
)
def test_a_library_that_ends_its_process_ends_a_childs(installation: Installation, broken: str, text: str) -> None:
    """The one that asked gets an exception, with the last words."""
    line = said(installation, STANDIN_BROKEN=broken)
    assert line.startswith(f"loading {installation.path} {text}")
    assert line.endswith(": install rats-tls again, with its plug-ins")


@pytest.mark.proves("F70")
def test_a_library_that_crashes_over_a_plug_in_crashes_a_child(installation: Installation) -> None:
    """The real one does where a plug-in registers and then fails; the process gets an exception each time it asks."""
    script = """
from ratstls._library import load
from ratstls._session import Session
from ratstls.config import SessionConfig
from ratstls.errors import ConfigError
for _ in range(2):
    session = Session(load(), SessionConfig(attester="sgx_ecdsa", verifier="nullverifier", is_server=True), None)
    try:
        session.init()
    except ConfigError as error:
        print(error)
"""
    line = (
        "making a session with attester 'sgx_ecdsa', verifier 'nullverifier', tls 'openssl' and crypto 'openssl'"
        " crashes (SIGABRT), saying '[ERROR] a plug-in failed, and its place is empty': remove the plug-in files that"
        " do not work on this machine"
    )
    assert said(installation, script, STANDIN_BROKEN="init").splitlines() == [line, line]


def test_a_rehearsal_is_held_once(installation: Installation) -> None:
    """For each choice of plug-ins, whatever the role."""
    script = """
import subprocess
from ratstls._library import load
from ratstls.config import SessionConfig
library, run, count = load(), subprocess.run, 0
def counted(*arguments, **options):
    global count
    count += 1
    return run(*arguments, **options)
subprocess.run = counted
for attester, is_server in (("sgx_ecdsa", True), ("sgx_ecdsa", False), ("nullattester", False), ("sgx_ecdsa", True)):
    library.rehearse(SessionConfig(attester=attester, verifier="sgx_ecdsa", is_server=is_server))
print(count)
"""
    assert said(installation, script) == "2"


def test_the_stand_in_refuses_to_be_more_than_that(installation: Installation) -> None:
    """Where nobody says that this is a test it ends the process, as a child shows."""
    line = said(installation, RATSTLS_STANDIN="")
    assert "this is the stand-in of a test, which attests nothing" in line


@pytest.mark.proves("F70")
@pytest.mark.parametrize("folder", ["crypto-wrappers", "attesters", "verifiers", "tls-wrappers"])
def test_an_empty_directory_of_plug_ins_is_told(
    installation: Installation, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the library itself would only exit, which the child shows when it alone is asked."""
    for plugin in (installation.path.parent / folder).iterdir():
        plugin.unlink()
    assert f"{installation.path.parent / folder} has no plug-in" in said(installation)
    monkeypatch.setenv("RATSTLS_STANDIN", "1")
    assert f"ends the process with status 1, saying '[FATAL] no plug-in in {installation.path.parent}" in str(
        _library._try_in_child(installation.path)
    )


@pytest.mark.proves("F70")
def test_a_missing_directory_of_plug_ins_is_told(installation: Installation) -> None:
    """With its path."""
    shutil.rmtree(installation.path.parent / "verifiers")
    assert f"cannot list the plug-ins in {installation.path.parent / 'verifiers'} (No such file" in said(installation)


@pytest.mark.proves("F70")
@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("int nothing;\n", "is not librats_tls, it has no rats_tls_init, rats_tls_set_verification_callback, "),
        ("void nowhere(void);\nvoid rats_tls_init(void) { nowhere(); }\n", "undefined symbol: nowhere"),
    ],
)
def test_another_library_is_told(installation: Installation, code: str, text: str) -> None:
    """By what it lacks, or needs."""
    assert text in said(compiled(installation, code))


@pytest.mark.proves("F70")
def test_a_build_without_its_sign_is_told(installation: Installation) -> None:
    """Its functions alone do not say which build it is."""
    functions = "".join(f"void rats_tls_{name}(void) {{}}\n" for name in FUNCTIONS)
    assert said(compiled(installation, functions)).startswith(
        "this build of librats_tls has no global_core_context, and"
    )


@pytest.mark.proves("F70")
def test_a_file_that_is_no_library_is_told(installation: Installation) -> None:
    """In the words of the loader, with and without a child that tries first."""
    installation.path.write_text("no library")
    assert "invalid ELF header" in said(installation) or "file too short" in said(installation)
    for is_preflighted in (True, False):
        with pytest.raises(LoadError, match=f"cannot load {installation.path}: .*: install what is missing"):
            load(installation.path, is_preflighted=is_preflighted)


@pytest.mark.proves("F70")
@pytest.mark.parametrize(
    ("path", "text"),
    [
        (
            "/nowhere/librats_tls.so.0",
            "there is no librats_tls at /nowhere/.* .No such file.*: install rats-tls, or set",
        ),
        ("librats_tls.so.0", "'librats_tls.so.0' is no absolute path"),
        ("/usr", "/usr is no file: set RATSTLS_LIBRARY to the path"),
    ],
)
def test_a_wrong_path_is_told(monkeypatch: pytest.MonkeyPatch, path: str, text: str) -> None:
    """Given as an argument, or in the environment."""
    with pytest.raises(LoadError, match=text):
        load(path)
    monkeypatch.setenv(VARIABLE, path)
    with pytest.raises(LoadError, match=text):
        load()


@pytest.mark.proves("F70")
def test_a_missing_library_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody said otherwise, it is looked for where rats-tls installs it."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(_library, "DEFAULT_PATH", Path("/usr/local/lib/rats-tls/librats_tls.so.0.missing"))
    with pytest.raises(
        LoadError, match=r"^there is no librats_tls at /usr/local/lib/rats-tls/.*: install rats-tls, or s"
    ):
        load()


def test_an_argument_comes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """In an enclave the host chooses the environment."""
    monkeypatch.setenv(VARIABLE, "/usr")
    with pytest.raises(LoadError, match="/nowhere/x"):
        load("/nowhere/x")


def test_a_library_that_never_loads_is_given_up(installation: Installation, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a time that no good one takes."""
    pause = "#include <unistd.h>\n__attribute__((constructor)) static void load(void) { pause(); }\n"
    monkeypatch.setattr(_library, "_PREFLIGHT_LIMIT_S", 0.2)
    with pytest.raises(LoadError, match=r"takes over 0\.2 s"):
        load(compiled(installation, pause).path)


def test_without_python_there_is_no_child(installation: Installation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is told as what it is."""
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(LoadError, match=r"cannot run '/nowhere/python' to try .* \(No such file"):
        load(installation.path)


def test_one_library_is_loaded_once(installation: Installation, standin_path: Path) -> None:
    """From whichever threads; a second copy would end the process, so it is refused."""
    script = f"""
import threading
from ratstls._library import load
from ratstls.errors import LoadError
loaded = []
threads = [threading.Thread(target=lambda: loaded.append(load())) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert len(loaded) == 4 and len({{id(library) for library in loaded}}) == 1
assert load(loaded[0].path) is loaded[0]
try:
    load({str(standin_path)!r})
except LoadError as error:
    print(error)
"""
    assert said(installation, script) == (
        f"cannot load {standin_path}: {installation.path} is loaded already, and a process can have but one:"
        " name one path everywhere"
    )


def test_an_unknown_build_stays_the_only_one(tmp_path: Path, standin_path: Path) -> None:
    """It is refused, but there, with its plug-ins: a good one beside it would end the process."""
    unknown = Installation(standin.build(tmp_path / "rats-tls", 256))
    script = f"""
from ratstls._library import load
from ratstls.errors import LoadError
for path in (None, {str(standin_path)!r}, None):
    try:
        load(path)
    except LoadError as error:
        print(error)
"""
    first, second, third = said(unknown, script).splitlines()
    assert first == third
    assert "256 byte" in first
    assert second.startswith(f"cannot load {standin_path}: {unknown.path} is loaded already")


def test_nothing_is_loaded_by_an_import(installation: Installation) -> None:
    """Not before someone asks: what needs no RATS-TLS works without it."""
    script = """
import ratstls, ratstls._session
maps = open("/proc/self/maps").read()
assert "rats_tls" not in maps, maps
"""
    assert said(installation, script, STANDIN_BROKEN="1") == ""


@pytest.mark.proves("D26")
def test_the_librarys_log_is_off_whatever_the_environment_says(installation: Installation) -> None:
    """At DEBUG it prints to standard output, and hashes among it."""
    script = """
from ratstls._library import load
assert load().lib.global_log_level == 5
"""
    assert said(installation, script, RATS_TLS_GLOBAL_LOG_LEVEL="debug") == ""


def test_where_no_child_can_be_the_library_is_loaded_at_once(installation: Installation) -> None:
    """As in an enclave, where nothing may be spawned."""
    script = """
import subprocess
from ratstls._library import load
subprocess.run = None
print("loaded", load(is_preflighted=False))
"""
    assert said(installation, script) == f"loaded {installation.path} (2023)"
