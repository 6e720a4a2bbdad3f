"""What an image demands binds, whatever the command line asks: links can be made to prove more, never less."""

from __future__ import annotations

import argparse
from itertools import product
from typing import Literal

import pytest
from enlink.attestation import Side
from enlink.errors import ConfigError
from entg.cli import _parser
from entg.measured import (
    LegTerms,
    Terms,
    attestation_of,
    is_attesting,
    is_judging,
    parse_terms,
    refuse_loosening,
)
from hypothesis import given
from hypothesis import strategies as st

BOTH = (False, True)


def test_an_image_demands_everything_unless_it_says_otherwise() -> None:
    everything = LegTerms(judge=True, attest=True)
    assert parse_terms("") == parse_terms("[enta]\n[entg]\n") == Terms(everything, everything)


@given(enta=st.tuples(st.booleans(), st.booleans()), entg=st.tuples(st.booleans(), st.booleans()))
def test_settings_say_what_each_leg_must_do(enta: tuple[bool, bool], entg: tuple[bool, bool]) -> None:
    text = "".join(
        f"[{name}]\njudge = {str(judge).lower()}\nattest = {str(attest).lower()}\n"
        for name, (judge, attest) in (("entg", entg), ("enta", enta))
    )
    assert parse_terms(text) == Terms(LegTerms(*enta), LegTerms(*entg))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[enta", "this is no TOML"),
        ("a = " + "[" * 10_000, "this is no TOML"),
        ("[relay]", "'relay' is no leg of a gateway: there are"),
        ("judge = false", "'judge' is no leg of a gateway"),
        ("enta = false", r"enta is no table: write \[enta\]"),
        ("[[enta]]\njudge = false", "enta is no table"),
        ("[enta]\njudges = false", "enta: 'judges' is not known: there are judge and attest"),
        ("[entg]\nattest = 0", "entg.attest: 0 is neither true nor false"),
        ('[entg]\njudge = "false"', "entg.judge: 'false' is neither true nor false"),
    ],
)
def test_a_mistake_in_the_settings_is_refused_with_its_place(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        parse_terms(text)
    assert len(str(caught.value)) < 300


@given(st.text())
def test_whatever_the_settings_are_they_are_understood_or_refused(text: str) -> None:
    try:
        terms = parse_terms(text)
    except ConfigError:
        return
    assert isinstance(terms, Terms)


def parsed(*words: str) -> argparse.Namespace:
    return _parser().parse_args(["--occlum", *words])


def refusal(*words: str) -> str:
    try:
        refuse_loosening(vars(parsed(*words)), vars(_parser().parse_args([])))
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.proves("D2", "D7", "G19")
@pytest.mark.parametrize(
    "words",
    [
        ["--attester", "nullattester"],
        ["--attester", "tdx_ecdsa"],
        ["--attester", ""],
        ["--verifier", "nullverifier"],
        ["--verifier", "sgx_ecdsa"],
        ["--verifier", ""],
        ["--tls", "nulltls"],
        ["--tls", ""],
        ["--crypto", "nullcrypto"],
        ["--insecure-no-attestation"],
        ["--insecure-accept-any-measurement"],
        ["--wire", "original"],
        ["--status-socket", "/host/socket"],
        ["--log-level", "debug"],
        ["--host"],
    ],
)
def test_what_would_loosen_the_links_or_is_not_for_an_enclave_is_refused_by_name(words: list[str]) -> None:
    assert words[0] in refusal(*words)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--entg-connect", "10.0.0.1:7979", "--enta-listen", "7980", "--grace", "1s"],
        ["--entg-listen", "7979", "--log-level", "warning", "--log-format", "json"],
        ["--enta-rats-tls", "--entg-rats-tls", "--mutual", "--policy", "/etc/stricter.toml"],
        ["--attester", "sgx_ecdsa", "--verifier", "sgx_ecdsa_qve", "--tls", "openssl", "--crypto", "openssl"],
        ["--wire", "auto"],
    ],
)
def test_addresses_ports_and_what_tightens_are_the_command_lines_own(words: list[str]) -> None:
    assert refusal(*words) == ""


@pytest.mark.proves("D7")
def test_an_option_that_nobody_has_thought_about_is_refused() -> None:
    defaults = vars(_parser().parse_args([]))
    refuse_loosening({**defaults, "brand_new": 5}, {**defaults, "brand_new": 5})
    with pytest.raises(ConfigError, match="--brand-new is not for the inside of an enclave"):
        refuse_loosening({**defaults, "brand_new": 6}, {**defaults, "brand_new": 5})


@pytest.mark.proves("D7", "D8", "G19")
@pytest.mark.parametrize("side", ["client", "server"])
def test_links_do_at_least_what_the_image_demands_whatever_is_asked_for(side: Literal["client", "server"]) -> None:
    """Every combination there is: what a leg must do, which side it is on, and what the command line says."""
    for judge, attest, is_asked, is_mutual in product(BOTH, BOTH, BOTH, BOTH):
        made = attestation_of(LegTerms(judge, attest), side, is_asked=is_asked, is_mutual=is_mutual, policy=None)
        assert is_judging(made, side) >= judge
        assert is_attesting(made, side) >= attest
        assert (made is None) == (not judge and not attest and not is_asked)
        if made is not None:
            assert (made.attester, made.verifier, made.tls, made.crypto) == (
                "sgx_ecdsa",
                "sgx_ecdsa_qve",
                "openssl",
                "openssl",
            )
            assert made.is_mutual >= is_mutual
            assert not made.is_waived
            assert not made.accepts_any_measurement


def test_no_more_is_asked_of_peers_than_the_image_and_the_command_line_want() -> None:
    """A side that only attests leaves its clients their freedom, since agents cannot attest from outside."""
    made = attestation_of(LegTerms(judge=False), "server", is_asked=False, is_mutual=False, policy=None)
    assert made is not None
    assert not made.is_mutual
    sides: tuple[Side, Side] = ("client", "server")
    assert [is_judging(made, side) for side in sides] == [True, False]
    assert [is_attesting(None, side) for side in sides] == [False, False]
