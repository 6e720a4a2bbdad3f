"""A policy against evidence that is good but for one thing, and against a slow oracle that shares no code with it."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ratstls.accepted import Accepted, PolicyError
from ratstls.evidence import Evidence
from ratstls.policy import EVIDENCE_OF_VERIFIER, EvidenceType, Policy
from ratstls.verdict import Reason, Verdict

BUILD, OTHER_BUILD = b"\xe1" * 32, b"\xe2" * 32
SIGNER, OTHER_SIGNER = b"\x51" * 32, b"\x52" * 32
GUEST, OTHER_GUEST = b"\xc5" * 32, b"\xc6" * 32
HERE, ELSEWHERE = b"\x91" * 16, b"\x92" * 16
INITIALISED, DEBUG, MODE64 = 1, 2, 4
NO_DEBUG, NO_KEY_SHARING = 1, 2
MISSPELT: Any = "sgx_ecdas"  # what a caller without mypy may write


def sgx_quote(
    *,
    version: int = 3,
    platform: bytes = HERE,
    flags: int = INITIALISED | MODE64,
    mr_enclave: bytes = BUILD,
    mr_signer: bytes = SIGNER,
    product_id: int = 7,
    svn: int = 5,
) -> bytes:
    """A quote as DCAP lays it out; what no test is about is not zero, so that nothing passes for its neighbour."""
    header = struct.pack("<HHIHH16s16s4s", version, 2, 0xA0A0A0A0, 9, 13, b"vendor..vendor..", platform, b"\xa1" * 4)
    body = struct.pack(
        "<16s4s12s16sQQ32s32s32s32s64sHHH42s16s64s",
        *(b"\xb1" * 16, b"\xb2" * 4, b"\xb3" * 12, b"\xb4" * 16),
        *(flags, 0xE7, mr_enclave, b"\xb5" * 32, mr_signer, b"\xb6" * 32, b"\xb7" * 64),
        *(product_id, svn, 0xB8B8, b"\xb9" * 42, b"\xba" * 16, b"\xbb" * 64),
    )
    return header + body + struct.pack("<I", 4) + b"sign"


def sgx(claims: tuple[tuple[str, bytes], ...] = (("role", b"gateway"),), **values: Any) -> Evidence:
    """Evidence as the library delivers it for a quote with these values."""
    quote = sgx_quote(**values)
    product_id, svn = struct.unpack_from("<HH", quote, 48 + 256)
    return Evidence(
        kind="sgx_ecdsa",
        mr_enclave=quote[112:144],
        mr_signer=quote[176:208],
        product_id=product_id,
        security_version=svn,
        attributes=quote[96:112],
        custom_claims=claims,
        quote=quote,
    )


def csv(*, measurement: bytes = GUEST, policy: int = NO_DEBUG | NO_KEY_SHARING) -> Evidence:
    """Evidence as the library delivers it for a Hygon guest."""
    head = b"\xd1" * 32 + b"\xd2" * 16 + b"\xd3" * 16 + b"\xd4" * 64 + b"\xd5" * 16
    report = head + measurement + struct.pack("<IIII", policy, 0xD6, 0xD7, 0xD8)
    return Evidence(
        kind="csv",
        csv_vm_id=b"\xd2" * 16,
        csv_vm_version=b"\xd3" * 16,
        csv_measurement=measurement,
        csv_policy=struct.pack("<I", policy),
        quote=report.ljust(4096, b"\xd9"),
    )


BY_BUILD = Accepted(mr_enclave=BUILD)
BY_SIGNER = Accepted(mr_signer=SIGNER, product_id=7, minimum_svn=5)
STRICT = Policy(accept=(BY_BUILD,), claims=(("role", b"gateway"),), platforms=frozenset({HERE}))
SIGNED = Policy(accept=(BY_SIGNER,))
OF_GUEST = Policy(evidence="csv", accept=(Accepted(measurement=GUEST),))


def with_byte_flipped(evidence: Evidence, offset: int) -> Evidence:
    quote = bytearray(evidence.quote)
    quote[offset] ^= 0x40
    return replace(evidence, quote=bytes(quote))


GOOD = [(STRICT, sgx()), (SIGNED, sgx(mr_enclave=OTHER_BUILD)), (SIGNED, sgx(svn=6)), (OF_GUEST, csv())]

BAD: list[tuple[str, Policy, Evidence, Reason, str]] = [
    ("shows none", STRICT, Evidence(kind="unknown"), "no_evidence", "showed no sgx_ecdsa evidence"),
    ("says that of type 0 to a guest's verifier", OF_GUEST, Evidence(kind="unknown"), "no_evidence", "no csv evidence"),
    ("tags a genuine SGX quote as unknown", STRICT, replace(sgx(), kind="unknown"), "no_evidence", "attester"),
    ("tags a genuine SGX quote as CSV", STRICT, replace(sgx(), kind="csv"), "evidence_type", "is csv"),
    ("shows a guest instead of an enclave", STRICT, csv(), "evidence_type", "sgx_ecdsa is required"),
    ("shows an enclave instead of a guest", OF_GUEST, sgx(), "evidence_type", "csv is required"),
    ("shows TDX", STRICT, Evidence(kind="tdx_ecdsa"), "evidence_type", "is tdx_ecdsa"),
    ("has no MRENCLAVE", STRICT, replace(sgx(), mr_enclave=None), "no_fields", "without MRENCLAVE"),
    ("has no MRSIGNER", STRICT, replace(sgx(), mr_signer=None), "no_fields", "without MRSIGNER"),
    ("has no product id", STRICT, replace(sgx(), product_id=None), "no_fields", "without the product id"),
    ("has no version", STRICT, replace(sgx(), security_version=None), "no_fields", "without the security version"),
    ("has no attributes", STRICT, replace(sgx(), attributes=None), "no_fields", "without the attributes"),
    ("has no measurement", OF_GUEST, replace(csv(), csv_measurement=None), "no_fields", "without the measurement"),
    ("has no guest policy", OF_GUEST, replace(csv(), csv_policy=None), "no_fields", "without the guest's policy"),
    ("has an empty MRENCLAVE", STRICT, replace(sgx(), mr_enclave=b""), "field_length", "MRENCLAVE has 0 bytes, not 32"),
    ("has a short MRENCLAVE", STRICT, replace(sgx(), mr_enclave=BUILD[:31]), "field_length", "has 31 bytes, not 32"),
    ("has a long MRSIGNER", SIGNED, replace(sgx(), mr_signer=SIGNER + b"\0"), "field_length", "has 33 bytes, not 32"),
    ("has short attributes", STRICT, replace(sgx(), attributes=b"\5" * 8), "field_length", "has 8 bytes, not 16"),
    ("has a long guest policy", OF_GUEST, replace(csv(), csv_policy=b"\1" * 8), "field_length", "has 8 bytes, not 4"),
    ("has no quote", STRICT, replace(sgx(), quote=b""), "short_quote", "has 0 bytes, and sgx_ecdsa at least 436"),
    ("has a quote cut by a byte", STRICT, replace(sgx(), quote=sgx().quote[:435]), "short_quote", "has 435 bytes"),
    ("has a report cut by a byte", OF_GUEST, replace(csv(), quote=csv().quote[:4095]), "short_quote", "at least 4096"),
    ("has a quote of TDX's version", STRICT, sgx(version=4), "quote_version", "version 4"),
    ("has a quote of version 2", STRICT, sgx(version=2), "quote_version", "version 2"),
    (
        "differs in MRENCLAVE",
        STRICT,
        replace(sgx(mr_enclave=OTHER_BUILD), mr_enclave=BUILD),
        "quote_mismatch",
        "MRENCL",
    ),
    ("differs in MRSIGNER", SIGNED, replace(sgx(mr_signer=OTHER_SIGNER), mr_signer=SIGNER), "quote_mismatch", "MRSIG"),
    ("differs in product", SIGNED, replace(sgx(product_id=8), product_id=7), "quote_mismatch", "the product id"),
    ("differs in version", SIGNED, replace(sgx(svn=4), security_version=5), "quote_mismatch", "the security version"),
    (
        "hides its debug flag",
        STRICT,
        replace(sgx(flags=7), attributes=sgx().attributes),
        "quote_mismatch",
        "attributes",
    ),
    (
        "differs in the guest's policy",
        OF_GUEST,
        replace(csv(policy=2), csv_policy=b"\3\0\0\0"),
        "quote_mismatch",
        "policy",
    ),
    ("differs in measurement", OF_GUEST, replace(csv(), csv_measurement=OTHER_GUEST), "quote_mismatch", "measurement"),
    ("can be debugged", STRICT, sgx(flags=INITIALISED | DEBUG | MODE64), "debug", "host can debug it"),
    ("is a guest that can be debugged", OF_GUEST, csv(policy=NO_KEY_SHARING), "debug", "host can debug it"),
    ("runs elsewhere", STRICT, sgx(platform=ELSEWHERE), "platform", ELSEWHERE.hex()),
    ("runs something else", STRICT, sgx(mr_enclave=OTHER_BUILD), "mrenclave", OTHER_BUILD.hex()),
    ("runs another guest", OF_GUEST, csv(measurement=OTHER_GUEST), "measurement", OTHER_GUEST.hex()),
    ("is signed by somebody else", SIGNED, sgx(mr_signer=OTHER_SIGNER), "mrsigner", OTHER_SIGNER.hex()),
    ("is another product", SIGNED, sgx(product_id=8), "product_id", "product id 8"),
    ("is too old", SIGNED, sgx(svn=4), "svn", "security version 4 is below 5"),
    ("makes no claims", STRICT, sgx(claims=()), "claim_missing", "does not make the claim 'role'"),
    ("makes another claim", STRICT, sgx(claims=(("Role", b"gateway"),)), "claim_missing", "'role'"),
    ("claims something else", STRICT, sgx(claims=(("role", b"agent"),)), "claim_value", "'role' has another value"),
    ("claims a part of it", STRICT, sgx(claims=(("role", b"gate"),)), "claim_value", "'role'"),
    ("claims more than it", STRICT, sgx(claims=(("role", b"gateway\0"),)), "claim_value", "'role'"),
    ("claims both", STRICT, sgx(claims=(("role", b"agent"), ("role", b"gateway"))), "claim_repeated", "2 times"),
]


@pytest.mark.parametrize(("policy", "evidence"), GOOD)
def test_what_the_policy_describes_is_accepted(policy: Policy, evidence: Evidence) -> None:
    """Otherwise rejecting everything would pass all that follows."""
    verdict = policy.judge(evidence)
    assert (verdict.accepted, verdict.reason) == (True, "accepted")
    assert policy.evidence in verdict.text


@pytest.mark.proves("D1", "D3", "D4", "F71", "G17")
@pytest.mark.parametrize(
    ("policy", "evidence", "reason", "part_of_text"), [case[1:] for case in BAD], ids=[case[0] for case in BAD]
)
def test_a_peer_is_rejected_that(policy: Policy, evidence: Evidence, reason: Reason, part_of_text: str) -> None:
    """Each differs in one thing from evidence that is accepted, and the reason names that. The text is one line."""
    verdict = policy.judge(evidence)
    assert (verdict.accepted, verdict.reason) == (False, reason)
    assert part_of_text in verdict.text
    assert verdict.text.isprintable()


def test_the_bad_cases_show_every_reason_to_reject() -> None:
    """And no other: a reason that nobody has seen could be a misspelt one."""
    insecure_or_good = {"accepted", "any_measurement", "no_attestation"}
    assert {case[3] for case in BAD} == set(get_args(Reason)) - insecure_or_good


@pytest.mark.proves("D3")
@pytest.mark.parametrize("offset", [*range(2), *range(96, 144), *range(176, 208), *range(304, 308)])
def test_a_quote_that_differs_from_the_fields_in_any_judged_byte_is_rejected(offset: int) -> None:
    """Wherever the library and the quote disagree, neither is believed."""
    verdict = Policy(accept=(BY_BUILD, BY_SIGNER)).judge(with_byte_flipped(sgx(), offset))
    assert (verdict.accepted, verdict.reason) == (False, "quote_version" if offset < 2 else "quote_mismatch")


@pytest.mark.parametrize("offset", [*range(144, 180)])
def test_a_report_that_differs_from_the_fields_in_any_judged_byte_is_rejected(offset: int) -> None:
    assert OF_GUEST.judge(with_byte_flipped(csv(), offset)).reason == "quote_mismatch"


def test_debug_peers_are_accepted_where_the_policy_allows_them() -> None:
    assert replace(STRICT, allow_debug=True).judge(sgx(flags=INITIALISED | DEBUG)).accepted
    assert replace(OF_GUEST, allow_debug=True).judge(csv(policy=0)).accepted


def test_one_entry_that_fits_is_enough() -> None:
    either = Policy(accept=(BY_BUILD, BY_SIGNER))
    assert either.judge(sgx(mr_signer=OTHER_SIGNER)).accepted
    assert either.judge(sgx(mr_enclave=OTHER_BUILD)).accepted
    assert either.judge(sgx(mr_enclave=OTHER_BUILD, mr_signer=OTHER_SIGNER)).reason == "mrenclave"


def test_all_conditions_of_one_entry_must_fit() -> None:
    both = Policy(accept=(Accepted(mr_enclave=BUILD, mr_signer=SIGNER),))
    assert both.judge(sgx()).accepted
    assert both.judge(sgx(mr_enclave=OTHER_BUILD)).reason == "mrenclave"
    assert both.judge(sgx(mr_signer=OTHER_SIGNER)).reason == "mrsigner"


def test_of_several_entries_the_nearest_gives_the_reason() -> None:
    """A peer of the right signer and product is told of its version, whatever else is accepted."""
    newest = Accepted(mr_signer=OTHER_SIGNER, product_id=7, minimum_svn=1)
    assert Policy(accept=(BY_BUILD, newest, BY_SIGNER)).judge(sgx(mr_enclave=OTHER_BUILD, svn=4)).reason == "svn"
    assert Policy(accept=(BY_SIGNER, BY_BUILD)).judge(sgx(mr_enclave=OTHER_BUILD, svn=4)).reason == "svn"
    full = Accepted(mr_enclave=BUILD, mr_signer=OTHER_SIGNER)
    assert Policy(accept=(BY_BUILD, full)).judge(sgx()).accepted
    assert Policy(accept=(Accepted(mr_enclave=OTHER_BUILD), full)).judge(sgx()).reason == "mrsigner"


def test_the_two_insecure_policies_say_so_in_verdict_and_warnings() -> None:
    """One accepts every genuine peer, but no debug one and no other type; the other whatever comes."""
    any_measurement = Policy.any_measurement("sgx_ecdsa_qve")
    assert any_measurement == Policy(evidence="sgx_ecdsa", accept_any_measurement=True)
    assert any_measurement.judge(sgx(mr_enclave=OTHER_BUILD)) == Verdict(
        True, "any_measurement", "genuine sgx_ecdsa, whatever it runs: INSECURE"
    )
    for bad in (sgx(flags=DEBUG), csv(), Evidence(kind="unknown"), replace(sgx(), mr_enclave=None)):
        assert not any_measurement.judge(bad).accepted
    assert any_measurement.warnings == (
        "INSECURE, any measurement: every genuine sgx_ecdsa peer is let in, whatever it runs",
    )

    nothing = Policy(no_attestation=True)
    for anybody in (sgx(flags=DEBUG), Evidence(kind="unknown")):
        assert (nothing.judge(anybody).accepted, nothing.judge(anybody).reason) == (True, "no_attestation")
        assert "INSECURE" in nothing.judge(anybody).text
    assert nothing.warnings == (
        "INSECURE, no attestation: links are encrypted, but nobody knows who is at their other end",
    )


def test_other_policies_warn_only_of_debug_peers() -> None:
    assert STRICT.warnings == ()
    assert replace(STRICT, allow_debug=True).warnings == (
        "INSECURE, allow_debug: peers are let in whose host can read their memory, keys included",
    )


@pytest.mark.parametrize("kind", ["tdx_ecdsa", "sev", "sev_snp", "sgx_la"])
def test_evidence_without_fields_can_be_taken_whole_or_not_at_all(kind: EvidenceType) -> None:
    """The library delivers it as type 0. What else it delivers is still not what was asked for."""
    policy = Policy.any_measurement(kind)
    assert policy.judge(Evidence(kind="unknown")).reason == "any_measurement"
    assert policy.judge(sgx()).reason == "evidence_type"
    assert policy.judge(Evidence(kind="tdx_ecdsa")).accepted == (kind == "tdx_ecdsa")
    assert policy.warnings[0].endswith("whatever it runs, one that its host can debug included")
    claiming = replace(policy, claims=(("role", b"gateway"),))
    assert claiming.judge(Evidence(kind="unknown", custom_claims=(("role", b"gateway"),))).accepted
    assert claiming.judge(Evidence(kind="unknown")).reason == "claim_missing"


UNSOUND: list[tuple[str, Callable[[], object], str]] = [
    ("accepts nobody", Policy, "accepts nobody: add an [[accept]]"),
    ("has only claims", lambda: Policy(claims=(("role", b""),)), "accepts nobody"),
    ("has only platforms", lambda: Policy(platforms=frozenset({HERE})), "accepts nobody"),
    ("accepts no platform", lambda: replace(STRICT, platforms=frozenset()), "platforms: an empty list accepts nobody"),
    ("misspells a platform", lambda: replace(STRICT, platforms=frozenset({HERE[:8]})), "has 8 bytes, not 16"),
    ("has a placeholder", lambda: replace(STRICT, platforms=frozenset({bytes(16)})), "platforms: all zeros"),
    ("wants a guest's platform", lambda: replace(OF_GUEST, platforms=frozenset({HERE})), "platforms: csv does not say"),
    (
        "wants unknown evidence",
        lambda: Policy(evidence=MISSPELT),
        "'sgx_ecdas' is not known, the nearest is 'sgx_ecdsa'",
    ),
    ("measures TDX", lambda: Policy(evidence="tdx_ecdsa", accept=(BY_BUILD,)), "confirms tdx_ecdsa but delivers none"),
    ("measures SEV", lambda: Policy(evidence="sev", accept=(BY_BUILD,)), "use csv or sgx_ecdsa, or --insecure-accept"),
    ("measures SEV-SNP", lambda: Policy(evidence="sev_snp", accept=(BY_BUILD,)), "confirms sev_snp but delivers none"),
    (
        "gives a guest a build",
        lambda: Policy(evidence="csv", accept=(BY_BUILD,)),
        "MRENCLAVE e1e1e1e1… is no condition",
    ),
    (
        "gives an enclave a guest's",
        lambda: Policy(accept=OF_GUEST.accept),
        "measurement c5c5c5c5… is no condition for sgx",
    ),
    ("lists and takes any", lambda: replace(STRICT, accept_any_measurement=True), "drop one or the other"),
    ("takes anybody with conditions", lambda: replace(STRICT, no_attestation=True), "goes with no other requirement"),
    ("takes anybody twice", lambda: Policy(no_attestation=True, accept_any_measurement=True), "no other requirement"),
    ("requires a claim twice", lambda: replace(STRICT, claims=STRICT.claims * 2), "claims: 'role' is required twice"),
    ("requires a claim without name", lambda: replace(STRICT, claims=(("", b""),)), "'' is no name of a claim"),
    ("breaks a log line", lambda: replace(STRICT, claims=(("a\nb", b""),)), r"'a\nb' is no name of a claim"),
    ("never attests again", lambda: replace(STRICT, max_link_age_s=86401), "86401 s is not from 1 second to 24 hours"),
    ("attests all the time", lambda: replace(STRICT, max_link_age_s=0.9), "0.9 s is not from 1 second to 24 hours"),
    ("has no age", lambda: Policy(no_attestation=True, max_link_age_s=float("nan")), "max_link_age: nan s"),
    ("has a short MRENCLAVE", lambda: Accepted(mr_enclave=BUILD[:31]), "mr_enclave: 'e1e1"),
    ("has a long MRSIGNER", lambda: replace(BY_SIGNER, mr_signer=b"\1" * 33), "has 33 bytes, not 32"),
    ("has an empty MRENCLAVE", lambda: Accepted(mr_enclave=b""), "mr_enclave: '' has 0 bytes, not 32"),
    ("has a placeholder for a build", lambda: Accepted(mr_enclave=bytes(32)), "mr_enclave: all zeros is a placeholder"),
    ("has a placeholder for a guest", lambda: Accepted(measurement=bytes(32)), "measurement: all zeros"),
    ("has a product beyond 16 bits", lambda: replace(BY_SIGNER, product_id=65536), "product_id: 65536 is not a number"),
    ("has a negative version", lambda: replace(BY_SIGNER, minimum_svn=-1), "minimum_svn: -1 is not a number from 0 to"),
    ("has an empty entry", Accepted, "an entry accepts too much: give mr_enclave; or mr_signer, product_id"),
    ("has a signer of anything", lambda: Accepted(mr_signer=SIGNER), "accepts too much"),
    ("has a signer of any version", lambda: replace(BY_SIGNER, minimum_svn=None), "accepts too much"),
    ("has a signer of any product", lambda: replace(BY_SIGNER, product_id=None), "accepts too much"),
    ("has a product of anybody", lambda: replace(BY_SIGNER, mr_signer=None), "accepts too much"),
    ("mixes guest and enclave", lambda: Accepted(measurement=GUEST, mr_enclave=BUILD), "one entry for each"),
    ("gives a guest a version", lambda: Accepted(measurement=GUEST, minimum_svn=0), "one entry for each"),
    ("confirms nothing", lambda: Policy.any_measurement("nullverifier"), "nullverifier confirms nothing: name another"),
    ("names no verifier", lambda: Policy.any_measurement(""), "verifier: '' is not known, the nearest is"),
]


@pytest.mark.proves("D1", "G17")
@pytest.mark.parametrize(("make", "part_of_text"), [case[1:] for case in UNSOUND], ids=[case[0] for case in UNSOUND])
def test_a_policy_is_refused_that(make: Callable[[], object], part_of_text: str) -> None:
    """With one line that says why: one that lets nobody or everybody in is a mistake that must not wait for a peer."""
    with pytest.raises(PolicyError) as raised:
        make()
    assert part_of_text in str(raised.value)
    assert str(raised.value).isprintable()


def test_the_edges_of_the_numbers_are_inside() -> None:
    for number in (0, 65535):
        edge = Policy(accept=(Accepted(mr_signer=SIGNER, product_id=number, minimum_svn=number),))
        assert edge.judge(sgx(product_id=number, svn=number)).accepted
    for age_s in (1, 86400):
        assert replace(STRICT, max_link_age_s=age_s).max_link_age_s == age_s
    assert replace(SIGNED, accept=(replace(BY_SIGNER, minimum_svn=1),)).judge(sgx(svn=0)).reason == "svn"
    assert Accepted(mr_enclave=bytes(31) + b"\1").mr_enclave == bytes(31) + b"\1"


@pytest.mark.parametrize("value", [STRICT, BY_BUILD, STRICT.judge(sgx())], ids=["policy", "accepted", "verdict"])
def test_what_was_checked_cannot_be_changed_afterwards(value: Any) -> None:
    """Neither a policy nor a verdict: whoever wants another makes another, which is checked again."""
    for field in fields(value):
        with pytest.raises(FrozenInstanceError):
            setattr(value, field.name, True)


@pytest.mark.proves("D2")
def test_a_policy_goes_only_with_a_verifier_that_confirms_what_it_judges() -> None:
    """Empty, unknown and null ones included: they are refused before the library hears of them."""
    for verifier, kind in EVIDENCE_OF_VERIFIER.items():
        for policy in (STRICT, OF_GUEST, Policy.any_measurement("tdx_ecdsa")):
            if kind == policy.evidence:
                policy.check_verifier(verifier)
            else:
                with pytest.raises(PolicyError, match=f"{verifier} confirms {kind or 'nothing'}, the policy wants"):
                    policy.check_verifier(verifier)
        Policy(no_attestation=True).check_verifier(verifier)
    with pytest.raises(PolicyError, match=r"use sgx_ecdsa or sgx_ecdsa_qve$"):
        STRICT.check_verifier("nullverifier")
    for policy in (STRICT, Policy(no_attestation=True)):
        for wrong in ("", "sgx_ecdsa_qv", "SGX_ECDSA"):
            with pytest.raises(PolicyError, match=f"verifier: '{wrong}' is not known, the nearest is '"):
                policy.check_verifier(wrong)


def test_a_policy_says_in_one_line_what_it_asks() -> None:
    described = str(replace(STRICT, accept=(BY_BUILD, BY_SIGNER)))
    assert described == (
        "sgx_ecdsa: MRENCLAVE e1e1e1e1… | MRSIGNER 51515151… product id 7 svn ≥ 5; claims role; 1 platforms;"
        " debug refused; re-attested every 3600 s"
    )
    assert str(Policy(no_attestation=True)) == "no attestation; re-attested every 3600 s"
    assert str(Policy(accept_any_measurement=True, allow_debug=True, max_link_age_s=60)) == (
        "sgx_ecdsa: any measurement; debug allowed; re-attested every 60 s"
    )
    assert str(OF_GUEST).startswith("csv: measurement c5c5c5c5…; debug refused")


# Few values, so that policies and evidence often meet, and often miss each other by one thing.
builds = st.sampled_from([BUILD, OTHER_BUILD])
signers = st.sampled_from([SIGNER, OTHER_SIGNER])
guests = st.sampled_from([GUEST, OTHER_GUEST])
numbers = st.integers(6, 8)
claim_lists = st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from([b"", b"x", b"xy"])), max_size=2).map(tuple)
enclave_entries = st.one_of(
    st.builds(Accepted, mr_enclave=builds, mr_signer=st.none() | signers, minimum_svn=st.none() | numbers),
    st.builds(Accepted, mr_signer=signers, product_id=numbers, minimum_svn=numbers),
)
common = {
    "claims": st.dictionaries(st.sampled_from("ab"), st.sampled_from([b"", b"x"]), max_size=2).map(
        lambda d: (*d.items(),)
    ),
    "allow_debug": st.booleans(),
    "max_link_age_s": st.sampled_from([60.0, 3600.0]),
}
platform_lists = st.none() | st.sets(st.sampled_from([HERE, ELSEWHERE]), min_size=1).map(frozenset)
policies: st.SearchStrategy[Policy] = st.one_of(
    st.builds(
        Policy, accept=st.lists(enclave_entries, min_size=1, max_size=3).map(tuple), platforms=platform_lists, **common
    ),
    st.builds(
        Policy,
        evidence=st.just("csv"),
        accept=st.lists(st.builds(Accepted, measurement=guests), min_size=1, max_size=2).map(tuple),
        **common,
    ),
    st.builds(Policy, accept_any_measurement=st.just(True), platforms=platform_lists, **common),
    st.builds(
        Policy, evidence=st.sampled_from(["csv", "tdx_ecdsa", "sev"]), accept_any_measurement=st.just(True), **common
    ),
    st.builds(Policy, no_attestation=st.just(True), max_link_age_s=st.sampled_from([60.0, 3600.0])),
)
sound_evidence: st.SearchStrategy[Evidence] = st.one_of(
    st.builds(
        sgx,
        claim_lists,
        platform=st.sampled_from([HERE, ELSEWHERE]),
        flags=st.sampled_from([1, 3]),
        mr_enclave=builds,
        mr_signer=signers,
        product_id=numbers,
        svn=numbers,
    ),
    st.builds(
        lambda evidence, claims: replace(evidence, custom_claims=claims),
        st.builds(csv, measurement=guests, policy=st.integers(0, 3)),
        claim_lists,
    ),
    st.builds(Evidence, kind=st.sampled_from(["unknown", "tdx_ecdsa"]), custom_claims=claim_lists),
)


@st.composite
def any_evidence(draw: st.DrawFn) -> Evidence:
    """Evidence of which up to two fields are missing or replaced by what else may be found in memory."""
    evidence = draw(sound_evidence)
    for name in draw(st.lists(st.sampled_from([field.name for field in fields(Evidence)]), max_size=2)):
        if name == "kind":
            damage: Any = draw(st.sampled_from(["sgx_ecdsa", "csv", "tdx_ecdsa", "unknown"]))
        elif name == "quote":
            damage = draw(st.sampled_from([b"", evidence.quote[:-1], evidence.quote[:400], evidence.quote + b"x"]))
        elif name == "custom_claims":
            damage = draw(claim_lists)
        elif name in ("product_id", "security_version"):
            damage = draw(st.none() | st.integers(-1, 1 << 32))
        else:
            damage = draw(st.none() | st.binary(max_size=33) | builds)
        evidence = replace(evidence, **{name: damage})
    return evidence


def would_accept(policy: Policy, evidence: Evidence) -> bool:
    """Tell slowly, from the raw quote alone, what a policy must say: only after that do the fields have to agree."""
    if policy.no_attestation:
        return True
    claimed = [name for name, _ in evidence.custom_claims]
    claims = all(claimed.count(name) == 1 and (name, value) in evidence.custom_claims for name, value in policy.claims)
    if policy.evidence not in ("sgx_ecdsa", "csv"):
        return claims and evidence.kind in ("unknown", policy.evidence)
    quote = evidence.quote
    if evidence.kind != policy.evidence or len(quote) < (436 if policy.evidence == "sgx_ecdsa" else 4096):
        return False
    if policy.evidence == "csv":
        measurement, mode = quote[144:][:32], quote[176:][:4]
        measured = any(entry.measurement == measurement for entry in policy.accept)
        agrees = (evidence.csv_measurement, evidence.csv_policy) == (measurement, mode)
        debug = mode[0] % 2 == 0
        placed = True
    else:
        build, signer = quote[112:][:32], quote[176:][:32]
        number, svn = quote[304] + 256 * quote[305], quote[306] + 256 * quote[307]
        measured = any(
            entry.mr_enclave in (None, build)
            and entry.mr_signer in (None, signer)
            and entry.product_id in (None, number)
            and svn >= (entry.minimum_svn or 0)
            for entry in policy.accept
        )
        told = (evidence.mr_enclave, evidence.mr_signer, evidence.product_id, evidence.security_version)
        agrees = (
            told == (build, signer, number, svn) and evidence.attributes == quote[96:][:16] and quote[:2] == b"\3\0"
        )
        debug = quote[96] & 2 == 2
        placed = policy.platforms is None or quote[28:][:16] in policy.platforms
    measured = measured or policy.accept_any_measurement
    return claims and agrees and measured and placed and (policy.allow_debug or not debug)


@pytest.mark.proves("D3")
@given(policies, any_evidence())
def test_whatever_the_evidence_the_policy_says_what_the_oracle_says(policy: Policy, evidence: Evidence) -> None:
    """And never raises: that would be for the caller to make a rejection of."""
    verdict = policy.judge(evidence)
    assert verdict.accepted == would_accept(policy, evidence)
    assert verdict.text.isprintable()


@given(policies, policies, st.lists(any_evidence(), max_size=5))
def test_a_tightened_policy_accepts_whom_both_accept(image: Policy, line: Policy, peers: list[Evidence]) -> None:
    """Nobody whom the image's policy rejects, whatever the command line says; refused only if nobody would be left."""
    try:
        tightened = image.tightened(line)
    except PolicyError:
        assert not any(image.judge(peer).accepted and line.judge(peer).accepted for peer in peers)
        return
    for peer in peers:
        assert tightened.judge(peer).accepted == (image.judge(peer).accepted and line.judge(peer).accepted)
    assert tightened.max_link_age_s == min(image.max_link_age_s, line.max_link_age_s)


@given(policies, policies)
def test_tightening_by_itself_or_by_nothing_changes_nothing(policy: Policy, other: Policy) -> None:
    """As far as anybody can tell from outside, and in no case is it the looser for being given first or second."""
    assert policy.tightened(Policy(no_attestation=True, max_link_age_s=3600)) == policy
    assert Policy(no_attestation=True, max_link_age_s=3600).tightened(policy) == policy
    assert set(policy.tightened(policy).accept) >= set(policy.accept)
    assert policy.tightened(policy).warnings == policy.warnings


@pytest.mark.parametrize(
    ("one", "other", "part_of_text"),
    [
        (STRICT, OF_GUEST, "evidence: nobody has both"),
        (STRICT, replace(STRICT, accept=(Accepted(mr_enclave=OTHER_BUILD),)), "no measurement in common"),
        (SIGNED, replace(SIGNED, accept=(replace(BY_SIGNER, product_id=8),)), "no measurement in common"),
        (STRICT, replace(STRICT, platforms=frozenset({ELSEWHERE})), "no platform in common"),
        (STRICT, replace(STRICT, claims=(("role", b"agent"),)), "claims: 'role' is required twice"),
    ],
)
def test_policies_with_nothing_in_common_are_refused(one: Policy, other: Policy, part_of_text: str) -> None:
    """At start, rather than rejecting every peer."""
    for first, second in ((one, other), (other, one)):
        with pytest.raises(PolicyError, match=part_of_text):
            first.tightened(second)


def test_tightening_merges_entries_condition_by_condition() -> None:
    image = Policy(accept=(BY_SIGNER,), allow_debug=True, claims=(("role", b"gateway"),), platforms=frozenset({HERE}))
    line = Policy(accept=(BY_BUILD, replace(BY_SIGNER, minimum_svn=9)), allow_debug=True, claims=(("zone", b"a"),))
    assert image.tightened(line) == Policy(
        accept=(
            Accepted(mr_enclave=BUILD, mr_signer=SIGNER, product_id=7, minimum_svn=5),
            Accepted(mr_signer=SIGNER, product_id=7, minimum_svn=9),
        ),
        allow_debug=True,
        claims=(("role", b"gateway"), ("zone", b"a")),
        platforms=frozenset({HERE}),
    )
    assert image.tightened(Policy(accept_any_measurement=True)) == replace(image, allow_debug=False)
    (guest,) = OF_GUEST.accept
    assert guest.combined(guest) == guest
    assert guest.combined(BY_BUILD) is BY_BUILD.combined(guest) is None
