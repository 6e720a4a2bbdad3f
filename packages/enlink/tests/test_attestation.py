"""The options of attested links: nobody is trusted by default, nothing contradicts, and no option does nothing."""

from __future__ import annotations

import pytest
from enlink.attestation import Attestation, Side, add_attestation_options, read_attestation
from enlink.errors import ConfigError
from enlink.program import ProgramParser
from hypothesis import given
from hypothesis import strategies as st

WANTED = ("link_rats_tls",)
WORDS = (
    "--link-rats-tls",
    "--mutual",
    "--policy=p.toml",
    "--attester=sgx_ecdsa",
    "--verifier=csv",
    "--tls=t",
    "--crypto=c",
    "--insecure-accept-any-measurement",
    "--insecure-no-attestation",
)


def read(words: str, *sides: Side) -> Attestation | None:
    parser = ProgramParser("prog")
    add_attestation_options(parser, link_rats_tls="attest the link")
    return read_attestation(parser.parse_args(words.split()), WANTED, set(sides))


def test_nothing_is_attested_unless_asked_for() -> None:
    assert read("", "client", "server") is None


@pytest.mark.parametrize("words", [word for word in WORDS if word != "--link-rats-tls"])
@pytest.mark.parametrize("side", ["client", "server"])
def test_options_for_links_that_nobody_asked_for_are_refused(words: str, side: Side) -> None:
    with pytest.raises(ConfigError, match=f"{words.partition('=')[0]} is for attested links.*add --link-rats-tls"):
        read(words, side)


def test_an_empty_value_is_a_value() -> None:
    with pytest.raises(ConfigError, match="--attester is for attested links"):
        read("--attester=", "client")
    attestation = read("--link-rats-tls --attester= --verifier= --tls= --crypto=", "server")
    assert attestation is not None
    assert {attestation.attester, attestation.verifier, attestation.tls, attestation.crypto} == {""}  # ratstls refuses


@pytest.mark.proves("D1")
@pytest.mark.parametrize(
    ("words", "sides", "message"),
    [
        ("", "client", "need --policy FILE"),
        ("--attester=csv", "client server", "need --policy FILE"),
        ("--mutual --attester=csv", "server", "need --policy FILE"),
        ("", "server", "name what makes its evidence with --attester"),
        ("--mutual --policy=p", "client", "name what makes its evidence with --attester"),
        ("--insecure-accept-any-measurement --mutual", "client", "--attester"),
        ("--attester=csv --policy=p", "server", "--policy p: this side only attests and judges nobody"),
        ("--attester=csv --insecure-accept-any-measurement", "server", "judges nobody: add --mutual"),
        ("--policy=p --insecure-no-attestation", "client", "contradict each other"),
        ("--policy=p --insecure-accept-any-measurement", "client", "contradict each other"),
        ("--insecure-no-attestation --insecure-accept-any-measurement", "client", "one says it all"),
    ],
)
def test_trust_is_never_taken_for_granted(words: str, sides: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(f"--link-rats-tls {words}", *sides.split())  # type: ignore[arg-type]


def test_a_client_judges_and_does_not_attest() -> None:
    assert read("--link-rats-tls --policy p.toml", "client") == Attestation(
        attester="nullattester", verifier="sgx_ecdsa", policy="p.toml"
    )


def test_a_server_attests_and_does_not_judge() -> None:
    assert read("--link-rats-tls --attester tdx_ecdsa", "server") == Attestation(
        attester="tdx_ecdsa", verifier="sgx_ecdsa"
    )


def test_mutually_both_do_both() -> None:
    words = "--link-rats-tls --mutual --attester csv --verifier csv --policy p --tls other --crypto another"
    expected = Attestation(attester="csv", verifier="csv", tls="other", crypto="another", is_mutual=True, policy="p")
    assert read(words, "client") == read(words, "server") == expected


def test_without_attestation_null_plugins_are_what_is_left() -> None:
    waived = Attestation(attester="nullattester", verifier="nullverifier", is_waived=True)
    assert read("--link-rats-tls --insecure-no-attestation", "client", "server") == waived


@pytest.mark.proves("D2")
@given(st.lists(st.sampled_from(WORDS), unique=True), st.sampled_from(["client", "server", "client server"]))
def test_whoever_judges_has_a_policy_or_said_that_they_want_none(words: list[str], sides: str) -> None:
    try:
        attestation = read(" ".join(words), *sides.split())  # type: ignore[arg-type]
    except ConfigError:
        return
    if attestation is None:
        assert words == []
        return
    is_judging = attestation.is_mutual or "client" in sides
    has_word = attestation.policy is not None or attestation.accepts_any_measurement or attestation.is_waived
    assert has_word or not is_judging
    assert attestation.is_waived == ("--insecure-no-attestation" in words)
    if not attestation.is_waived:
        assert attestation.verifier != "nullverifier"
        assert attestation.attester != "nullattester" or not (attestation.is_mutual or "server" in sides)
