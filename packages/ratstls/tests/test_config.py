"""Options of a session: what is refused before the library is asked, and what a role needs."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ratstls.config import LogLevel, SessionConfig
from ratstls.errors import BadOption

CLIENT = SessionConfig(attester="nullattester", verifier="sgx_ecdsa", is_server=False)
SERVER = SessionConfig(attester="sgx_ecdsa", verifier="nullverifier", is_server=True)


def with_name(kind: str, name: str) -> SessionConfig:
    names = {"attester": "sgx_ecdsa", "verifier": "sgx_ecdsa", "tls": "openssl", "crypto": "openssl"} | {kind: name}
    return SessionConfig(**names, is_server=False)  # type: ignore[arg-type] # names are names of its string fields


@pytest.mark.proves("D2")
@pytest.mark.parametrize("kind", ["attester", "verifier", "tls", "crypto"])
@pytest.mark.parametrize("name", ["", " ", "a" * 32, "größe", "openssl\0", "open ssl", "../openssl", "openssl\n"])
def test_what_is_no_name_is_refused(kind: str, name: str) -> None:
    """Above all the empty name, with which the library chooses for itself, and chooses badly."""
    with pytest.raises(BadOption, match=f"^{kind} ") as caught:
        with_name(kind, name)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("kind", ["attester", "verifier", "tls", "crypto"])
def test_names_up_to_31_characters_are_taken(kind: str) -> None:
    """The library's limit is 32, with the NUL."""
    assert getattr(with_name(kind, "a" * 31), kind) == "a" * 31


@pytest.mark.proves("D2")
@given(st.text(max_size=40))
def test_no_accepted_name_can_be_cut_or_read_as_empty(name: str) -> None:
    """Whatever is accepted arrives in C as it was."""
    try:
        config = with_name("verifier", name)
    except BadOption:
        return
    assert 1 <= len(config.verifier.encode("ascii")) <= 31
    assert "\0" not in config.verifier


@pytest.mark.proves("D2")
@pytest.mark.parametrize(
    ("config", "changes", "weakness"),
    [
        (CLIENT, {"verifier": "nullverifier"}, "verifier 'nullverifier' accepts any peer"),
        (SERVER, {"attester": "nullattester"}, "attester 'nullattester' proves nothing to the peer"),
        (SERVER, {"is_mutual": True}, "verifier 'nullverifier' accepts any peer"),
        (CLIENT, {"is_mutual": True}, "attester 'nullattester' proves nothing to the peer"),
        (CLIENT, {"tls": "nulltls"}, "tls 'nulltls' sends plaintext"),
        (SERVER, {"tls": "NULLTLS"}, "tls 'NULLTLS' sends plaintext"),
        (SERVER, {"crypto": "nullcrypto"}, "crypto 'nullcrypto' makes no keys"),
    ],
)
def test_void_attestation_needs_a_waiver(config: SessionConfig, changes: dict[str, object], weakness: str) -> None:
    """It is refused with its reason, and with the waiver the reason is still there to be shown."""
    with pytest.raises(BadOption, match=f"{weakness}: choose a real plug-in"):
        replace(config, **changes)  # type: ignore[arg-type] # the fields' values
    waived = replace(config, is_attestation_waived=True, **changes)  # type: ignore[arg-type] # as above
    assert waived.weakness == weakness


def test_a_null_plug_in_that_has_no_say_is_no_weakness() -> None:
    """A client that proves nothing needs no attester, a server that judges nobody no verifier."""
    assert (CLIENT.weakness, SERVER.weakness) == (None, None)


def test_roles_say_who_attests_and_who_verifies() -> None:
    """The server attests and the client verifies; in mutual mode both do both."""
    assert (CLIENT.is_attesting, CLIENT.is_verifying) == (False, True)
    assert (SERVER.is_attesting, SERVER.is_verifying) == (True, False)
    for config in (CLIENT, SERVER):
        mutual = replace(config, attester="sgx_ecdsa", verifier="sgx_ecdsa", is_mutual=True)
        assert (mutual.is_attesting, mutual.is_verifying) == (True, True)


@pytest.mark.parametrize(
    ("claims", "text"),
    [
        ((("", b"value"),), "'' is no name for a claim"),
        ((("a\0b", b""),), "'a\\\\x00b' is no name for a claim"),
        ((("name", bytes(4093)),), "the custom claims have 4097 bytes: keep to 4096"),
    ],
)
def test_claims_that_cannot_travel_are_refused(claims: tuple[tuple[str, bytes], ...], text: str) -> None:
    """Names end at a NUL in C, and a certificate has little room."""
    with pytest.raises(BadOption, match=text):
        replace(SERVER, custom_claims=claims)


def test_claims_up_to_the_limit_are_taken() -> None:
    """To the byte."""
    assert replace(SERVER, custom_claims=(("name", bytes(4092)),)).custom_claims


def test_the_library_is_silent_by_default() -> None:
    """Unless someone asks, in the library's own numbers."""
    assert CLIENT.log_level is LogLevel.NONE
    assert [level.name for level in sorted(LogLevel)] == ["DEBUG", "INFO", "WARN", "ERROR", "FATAL", "NONE"]
    assert [int(level) for level in sorted(LogLevel)] == [0, 1, 2, 3, 4, 5]
