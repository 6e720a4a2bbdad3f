"""What makes attested links impossible is said before anything is changed: one line, and the documented exit code."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import standin
from attested_pair import POLICY, Pair, attested_pair
from enlink.testing.programs import started
from enlink.testing.state import difference, network_state
from path import BIN

AGENT = "enta client --capture 7 --entg-connect 10.81.1.2:6980 --entg-rats-tls"
SERVER_AGENT = "enta server --replay 7 --entg-connect 10.81.1.2:6980 --entg-rats-tls"
GATEWAY = "entg --enta-rats-tls"
DIALLER = "entg --entg-connect 10.81.1.2:6979 --entg-rats-tls"
HARDENED = Path(__file__).parent / "native" / "hardened.py"
WITHOUT_RATSTLS = "import sys; sys.modules['ratstls'] = None; from {0}.cli import main; sys.exit(main())"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    directory = tmp_path_factory.mktemp("attested")
    (directory / "bad.toml").write_text(POLICY.replace("mr_enclave", "mrenclave"))
    (directory / "tdx.toml").write_text(POLICY.replace("sgx_ecdsa", "tdx_ecdsa"))
    (directory / "csv.toml").write_text(f'evidence = "csv"\n[[accept]]\nmeasurement = "{"11" * 32}"\n')
    (directory / "latin.toml").write_bytes(b"evidence = \xff")
    with attested_pair(standin.build(directory / "rats-tls"), directory) as made:
        crippled = directory / "crippled"
        shutil.copytree(made.library.parent, crippled)
        for plugin in (crippled / "verifiers").iterdir():
            plugin.unlink()
        (made.library.parent / "junk.so").write_text("no library")
        yield made


def refusal(pair: Pair, command: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """Run a program that must end by itself, and return its exit code and what it said."""
    argv = pair.app.argv([*pair.under(environment), *command])
    ended = subprocess.run(argv, capture_output=True, text=True, timeout=50, check=False)
    assert ended.stdout == ""
    return ended.returncode, ended.stderr


@pytest.mark.proves("D1", "D2", "F70", "F71")
@pytest.mark.parametrize(
    ("code", "command", "environment", "message"),
    [
        # the library
        (69, f"{AGENT} --policy POLICY", {"RATSTLS_LIBRARY": "/nonexistent/librats_tls.so"}, "there is no librats_tls"),
        (69, f"{GATEWAY} --attester sgx_ecdsa", {"RATSTLS_LIBRARY": "/nonexistent/librats_tls.so"}, "install rats-tls"),
        (69, f"{AGENT} --policy POLICY", {"RATSTLS_LIBRARY": "DIR/crippled/librats_tls_standin.so"}, "has no plug-in"),
        (69, f"{AGENT} --policy POLICY", {"RATSTLS_LIBRARY": "DIR/rats-tls/junk.so"}, "cannot load"),
        (69, f"{AGENT} --policy POLICY", {"RATSTLS_LIBRARY": "rats.so"}, "is no absolute path"),
        (69, f"{AGENT} --policy POLICY", {"STANDIN_BROKEN": "1"}, "ends the process with status 1"),
        (69, f"{AGENT} --policy POLICY", {"STANDIN_BROKEN": "crash"}, "crashes (SIGABRT)"),
        (78, f"{AGENT} --policy POLICY", {"STANDIN_BROKEN": "init"}, "remove the plug-in files that do not work"),
        # plug-ins
        (78, f"{GATEWAY} --attester sgx_epid", {}, "there is no attester 'sgx_epid'"),
        (78, f"{AGENT} --policy POLICY --verifier tdx_ecdsa", {}, "tdx_ecdsa"),
        (78, f"{AGENT} --policy POLICY --tls boring", {}, "tls 'boring' makes no stream"),
        (78, f"{AGENT} --policy POLICY --tls nulltls", {}, "sends plaintext"),
        (78, f"{AGENT} --policy POLICY --crypto nullcrypto", {}, "makes no keys"),
        (78, f"{AGENT} --policy POLICY --verifier nullverifier", {}, "accepts any peer"),
        (78, f"{GATEWAY} --attester nullattester", {}, "proves nothing to the peer"),
        (78, f"{GATEWAY} --attester=", {}, "is no plug-in's name"),
        (69, f"{GATEWAY} --attester sgx_ecdsa", {"STANDIN_ATTESTER": "fails"}, "could not produce evidence"),
        # policies
        (78, f"{AGENT} --policy DIR/none.toml", {}, "cannot read the policy"),
        (78, f"{AGENT} --policy DIR", {}, "cannot read the policy"),
        (78, f"{AGENT} --policy DIR/latin.toml", {}, "cannot read the policy"),
        (78, f"{AGENT} --policy DIR/bad.toml", {}, "mrenclave"),
        (78, f"{SERVER_AGENT} --policy DIR/tdx.toml", {}, "tdx_ecdsa"),
        (78, f"{AGENT} --policy DIR/csv.toml", {}, "csv"),
        (78, f"{DIALLER} --policy DIR/bad.toml", {}, "bad.toml"),
        (78, AGENT, {}, "attested links need --policy FILE"),
        (78, f"{AGENT} --policy POLICY --mutual", {}, "--attester"),
        (78, f"{GATEWAY} --attester sgx_ecdsa --policy POLICY", {}, "judges nobody: add --mutual"),
    ],
)
def test_whoever_cannot_attest_says_so_in_a_line_and_changes_nothing(
    pair: Pair, code: int, command: str, environment: dict[str, str], message: str
) -> None:
    directory = str(pair.policy.parent)
    words = command.replace("POLICY", str(pair.policy)).replace("DIR", directory).split()
    before = network_state(pair.app)
    ended, said = refusal(
        pair,
        [str(BIN / words[0]), *words[1:]],
        {name: value.replace("DIR", directory) for name, value in environment.items()},
    )
    assert (ended, said.count("\n")) == (code, 1), said
    assert message in said
    assert difference(before, network_state(pair.app)) == []


@pytest.mark.proves("F70")
@pytest.mark.parametrize(
    "command", [f"{AGENT} --policy POLICY", f"{SERVER_AGENT} --policy POLICY", f"{GATEWAY} --attester sgx_ecdsa"]
)
def test_without_the_package_attested_links_are_refused_in_a_line(pair: Pair, command: str) -> None:
    """It is an extra: whoever asks for no attestation never needs it."""
    program, *words = command.replace("POLICY", str(pair.policy)).split()
    ended, said = refusal(pair, [sys.executable, "-c", WITHOUT_RATSTLS.format(program), *words], {})
    assert ended == 69
    assert said.endswith("need the package eng-ratstls, which is not installed: pip install eng-ratstls\n")
    assert said.count("\n") == 1


def test_without_the_package_plain_links_are_made(pair: Pair) -> None:
    """The control of the one before: the same way to start, without attestation."""
    words = [*AGENT.removesuffix(" --entg-rats-tls").split()[1:], "--once"]
    ended, said = refusal(pair, [sys.executable, "-c", WITHOUT_RATSTLS.format("enta"), *words], {})
    assert ended == 69
    assert "cannot connect to 10.81.1.2 port 6980" in said


@pytest.mark.proves("D2")
@pytest.mark.parametrize("insecure", ["--insecure-no-attestation", "--insecure-accept-any-measurement"])
def test_what_is_insecure_is_said_at_start(pair: Pair, insecure: str) -> None:
    """On either side, and the link comes up; every minute again: see the unit test."""
    gateway_says = ["--insecure-no-attestation"] if "no-attestation" in insecure else ["--attester", "sgx_ecdsa"]
    with (
        pair.plain_gateway("--enta-rats-tls", *gateway_says) as gateway,
        pair.plain_agent("--entg-rats-tls", insecure) as agent,
    ):
        agent.wait_until_ready()
        assert agent.events("insecure")
        assert bool(gateway.events("insecure")) == ("no-attestation" in insecure)


@pytest.mark.proves("D19")
def test_attested_links_need_no_memory_that_is_both_writable_and_executable(pair: Pair) -> None:
    """The units in deploy/systemd deny it. Both sides judge each other, which takes a callback from C."""
    under = (*pair.under({}), sys.executable, str(HARDENED))
    judging = ("--attester", "sgx_ecdsa", "--mutual", "--policy", str(pair.policy))
    gateway_argv = ("--enta-rats-tls", "--entg-connect", "127.0.0.1:6979", *judging)
    with (
        started(pair.near, "entg", *gateway_argv, under=under),
        started(pair.app, *AGENT.split(), *judging, under=under) as agent,
    ):
        agent.wait_until_ready()
        assert "sgx_ecdsa" in agent.status()["uplink"]["attested"]["peer"]
