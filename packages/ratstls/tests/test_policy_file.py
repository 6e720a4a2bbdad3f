"""Policies as text: what a file may say, what it may not, and that the documented ones are policies."""

from __future__ import annotations

import re
from pathlib import Path
from textwrap import dedent
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ratstls.accepted import Accepted, PolicyError
from ratstls.policy import Policy
from ratstls.policy_file import parse_policy
from ratstls.verdict import Reason

PAGE = Path(__file__).parents[3] / "docs" / "attestation.md"
BUILD, SIGNER = "e1" * 32, "51" * 32
MINIMAL = f'evidence = "sgx_ecdsa"\naccept = [{{ mr_enclave = "{BUILD}" }}]\n'
FULL = f"""
evidence = "sgx_ecdsa"
platforms = ["{"91" * 16}", "{"92" * 16}"]
allow_debug = true
max_link_age = "10m"

[[accept]]
mr_enclave = "{BUILD.upper()}"

[[accept]]
mr_signer = "{SIGNER}"
product_id = 7
minimum_svn = 5

[claims]
role = {{ text = "gätewäy" }}
"build id" = {{ hex = "00fF" }}
"""


def test_a_file_says_all_that_a_policy_can_ask() -> None:
    assert parse_policy(FULL) == Policy(
        evidence="sgx_ecdsa",
        accept=(
            Accepted(mr_enclave=b"\xe1" * 32),
            Accepted(mr_signer=b"\x51" * 32, product_id=7, minimum_svn=5),
        ),
        claims=(("role", "gätewäy".encode()), ("build id", b"\0\xff")),
        platforms=frozenset({b"\x91" * 16, b"\x92" * 16}),
        allow_debug=True,
        max_link_age_s=600.0,
    )


def test_what_a_file_does_not_say_is_the_strict_choice() -> None:
    """No debug, an hour, every platform and no claims: as a policy made in Python."""
    assert parse_policy(MINIMAL) == Policy(accept=(Accepted(mr_enclave=b"\xe1" * 32),))


def test_a_guest_is_accepted_by_its_measurement() -> None:
    text = f'evidence = "csv"\naccept = [{{ measurement = "{BUILD}" }}]'
    assert parse_policy(text) == Policy(evidence="csv", accept=(Accepted(measurement=b"\xe1" * 32),))


@pytest.mark.parametrize(("text", "seconds"), [("1s", 1), ("90s", 90), ("10m", 600), ("1h", 3600), ("24h", 86400)])
def test_the_age_of_a_link_has_a_unit(text: str, seconds: float) -> None:
    assert parse_policy(f'{MINIMAL}max_link_age = "{text}"').max_link_age_s == seconds


BAD = [
    ("is no TOML", "evidence = sgx_ecdsa", "this is no TOML: "),
    ("nests without end", "x = " + "[" * 100_000, "this is no TOML: "),
    ("has a number without end", "x = " + "1" * 5000, "this is no TOML: "),
    ("is empty", "", "evidence is missing: say which type"),
    ("names no evidence", MINIMAL.split("\n")[1], 'as in evidence = "sgx_ecdsa"'),
    (
        "misspells evidence",
        MINIMAL.replace("ecdsa", "esdca"),
        "evidence: 'sgx_esdca' is not known, the nearest is 'sgx_",
    ),
    (
        "names a verifier",
        MINIMAL.replace("ecdsa", "ecdsa_qve"),
        "'sgx_ecdsa_qve' is not known, the nearest is 'sgx_ecdsa'",
    ),
    ("counts evidence", "evidence = 1", "evidence: 1 is not a string"),
    ("accepts nobody", 'evidence = "sgx_ecdsa"', "the policy accepts nobody"),
    ("accepts an empty list", 'evidence = "sgx_ecdsa"\naccept = []', "the policy accepts nobody"),
    ("has one table", f'evidence = "csv"\n[accept]\nmr_enclave = "{BUILD}"', "is not a list"),
    ("lists strings", f'evidence = "csv"\naccept = ["{BUILD}"]', "accept[1]: 'e1e1"),
    (
        "measures TDX",
        MINIMAL.replace("sgx", "tdx"),
        "librats_tls confirms tdx_ecdsa but delivers none of its measurements",
    ),
    ("measures SEV-SNP", MINIMAL.replace("sgx_ecdsa", "sev_snp"), "confirms sev_snp but delivers none"),
    (
        "misspells a key",
        f"{MINIMAL}alow_debug = false",
        "'alow_debug' is no key of a policy: the nearest is 'allow_debug'",
    ),
    ("has a foreign key", f"{MINIMAL}zzz = 1", "'zzz' is no key of a policy: the nearest is '"),
    (
        "misspells a condition",
        MINIMAL.replace("mr_e", "mre"),
        "accept[1]: 'mrenclave' is no key of a policy: the nearest is",
    ),
    ("hides in a file", f"{MINIMAL}no_attestation = true", "must say --insecure-no-attestation"),
    ("hides there too", f"{MINIMAL}accept_any_measurement = false", "must say --insecure-accept-any-measurement"),
    ("has no hex", MINIMAL.replace("e1e1", "e1g1", 1), "accept[1]: mr_enclave: 'e1g1"),
    (
        "has spaces in its hex",
        MINIMAL.replace("e1e1", "e1 e1", 1),
        "is not hex: write two of 0-9 and a-f for each byte",
    ),
    ("has half a byte", MINIMAL.replace("e1e1", "e1e", 1), "is not hex"),
    ("has other digits", MINIMAL.replace("e1e1", "e١e1", 1), "is not hex"),
    ("has an empty hash", MINIMAL.replace(BUILD, ""), "accept[1]: mr_enclave: '' is not hex"),
    ("has a long hash", MINIMAL.replace(BUILD, BUILD + "00"), "accept[1]: mr_enclave: 'e1e1"),
    ("has a number for a hash", MINIMAL.replace(f'"{BUILD}"', "1"), "accept[1]: mr_enclave: 1 is not a string"),
    ("has a signer of anything", FULL.replace("minimum_svn = 5", ""), "accept[2]: an entry accepts too much"),
    ("has a true product", FULL.replace("= 7", "= true"), "accept[2]: product_id: True is not a whole number"),
    ("has half a version", FULL.replace("= 5", "= 5.5"), "accept[2]: minimum_svn: 5.5 is not a whole number"),
    (
        "has a big product",
        FULL.replace("= 7", "= 65536"),
        "accept[2]: product_id: 65536 is not a number from 0 to 65535",
    ),
    ("allows debug by a number", FULL.replace("true", "1"), "allow_debug: 1 is not true or false"),
    ("allows debug by a word", FULL.replace("true", '"false"'), "allow_debug: 'false' is not true or false"),
    (
        "has one platform",
        FULL.replace("platforms = [", "platforms = ").replace(f', "{"92" * 16}"]', ""),
        "is not a list",
    ),
    ("has no platform", f"{MINIMAL}platforms = []", "platforms: an empty list accepts nobody"),
    ("has a short platform", f'{MINIMAL}platforms = ["91"]', "platforms: '91' has 1 bytes, not 16"),
    ("has a bare claim", f'{MINIMAL}claims.role = "gateway"', "claims.'role': 'gateway' is not a table"),
    ("has claims in a list", f"{MINIMAL}claims = []", "claims: [] is not a table"),
    (
        "says a claim twice",
        f'{MINIMAL}claims.role = {{ text = "a", hex = "61" }}',
        "claims.'role': give its value once",
    ),
    ("says nothing of a claim", f"{MINIMAL}claims.role = {{}}", "claims.'role': give its value once"),
    (
        "claims otherwise",
        f'{MINIMAL}claims.role = {{ txt = "a" }}',
        "claims.'role': 'txt' is no key of a policy: the nearest",
    ),
    ("claims a number", f"{MINIMAL}claims.role = {{ text = 1 }}", "claims.'role': 1 is not a string"),
    ("claims no hex", f'{MINIMAL}claims.role = {{ hex = "x" }}', "claims.'role': 'x' is not hex"),
    ("breaks a log line", f'{MINIMAL}claims."a\\nb" = {{ text = "" }}', r"claims: 'a\nb' is no name of a claim"),
    ("has a bare age", f"{MINIMAL}max_link_age = 3600", "max_link_age: 3600 is not a string"),
    (
        "has an age in days",
        f'{MINIMAL}max_link_age = "1d"',
        "'1d' is no duration: write a number and s, m or h, as in 1h",
    ),
    ("has an age of nothing", f'{MINIMAL}max_link_age = "0s"', "0 s is not from 1 second to 24 hours"),
    ("has an age of a day and more", f'{MINIMAL}max_link_age = "25h"', "90000 s is not from 1 second to 24 hours"),
]


@pytest.mark.proves("D1", "G17")
@pytest.mark.parametrize(("text", "part_of_text"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_a_file_is_refused_that(text: str, part_of_text: str) -> None:
    """With one short line that names the place and the value, however long that is."""
    with pytest.raises(PolicyError) as raised:
        parse_policy(text)
    assert part_of_text in str(raised.value)
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 250


toml_like = st.lists(
    st.sampled_from(
        [*FULL.splitlines(), *MINIMAL.splitlines(), "no_attestation = true", "[x]", "=", '"', "accept = 1"]
    ),
).map("\n".join)


@given(st.text() | toml_like)
def test_any_text_is_a_policy_that_attests_or_a_policy_error(text: str) -> None:
    """No text switches attestation off, and none fails in another way."""
    try:
        policy = parse_policy(text)
    except PolicyError:
        return
    assert policy.accept
    assert not policy.no_attestation
    assert not policy.accept_any_measurement


def test_the_documented_policies_are_policies() -> None:
    """Every block of TOML of the page is one that can be used, with one's own measurements for its own."""
    blocks = re.findall(r"^ *```toml\n(.*?)^ *```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        policy = parse_policy(dedent(block))
        assert policy.warnings == ()


def test_the_page_explains_every_reason_to_reject() -> None:
    """Whoever finds a reason in a log finds it there."""
    explained = set(re.findall(r"^\| `([a-z_]+)` \|", PAGE.read_text(), re.MULTILINE))
    assert set(get_args(Reason)) <= explained
