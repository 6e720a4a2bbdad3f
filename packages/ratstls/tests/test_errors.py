"""Which exception a code becomes, and that its text says what failed, with which value, and what to do."""

from __future__ import annotations

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from ratstls.errors import (
    AttestationRejected,
    BadOption,
    ConfigError,
    EvidenceError,
    HandshakeError,
    RatsTlsError,
    SessionBroken,
    Truncated,
    error_from,
)

FUNCTIONS = [f"rats_tls_{name}" for name in ("init", "negotiate", "receive", "transmit", "cleanup")]


@pytest.mark.parametrize(
    ("function", "raw", "kind", "advice"),
    [
        ("init", 0xFFFFFFFE, ConfigError, "the attester or the verifier does not work on this machine"),
        ("init", 0xFFFFFFF6, ConfigError, "the TLS wrapper or the crypto wrapper does not work on this machine"),
        ("init", 0xDFFFFFFD, EvidenceError, "/dev/sgx"),
        ("init", 0x20000002, EvidenceError, "PCCS"),
        ("init", 0xA000E019, EvidenceError, "AESM"),
        ("init", 0xBFFFFFFE, RatsTlsError, "check the OpenSSL"),
        ("init", 0x00000003, RatsTlsError, "free some memory"),
        ("init", 0xFFFFFFFF, RatsTlsError, "set the log level to ERROR"),
        ("negotiate", 0x907FFFFF, HandshakeError, "clocks differ"),
        ("negotiate", 0x90000000, HandshakeError, "may have gone"),
        ("negotiate", 0xFFFFFFFE, HandshakeError, "may have gone"),
        ("receive", 0xFFFFFFFE, RatsTlsError, "set the log level to ERROR"),
        ("cleanup", 0xFFFFFFFE, RatsTlsError, "set the log level to ERROR"),
    ],
)
def test_each_cause_has_its_exception_and_its_advice(
    function: str, raw: int, kind: type[RatsTlsError], advice: str
) -> None:
    """As far as the library lets one know."""
    error = error_from(f"rats_tls_{function}", raw)
    assert type(error) is kind
    assert advice in str(error)


@given(st.sampled_from(FUNCTIONS), st.integers(1, 0xFFFFFFFF))
def test_every_code_of_every_function_becomes_an_exception(function: str, raw: int) -> None:
    """One line, that names the function and the code."""
    error = error_from(function, raw)
    assert str(error).startswith(f"{function} failed ({raw:#010x}, ")
    assert "\n" not in str(error)
    assert error.function == function
    assert error.code is not None
    assert error.code.raw == raw


def test_success_is_no_exception() -> None:
    """Whoever asks for one has made a mistake."""
    with pytest.raises(ValueError, match="rats_tls_init returned 0, which is success"):
        error_from("rats_tls_init", 0)


def test_callers_can_catch_what_they_know() -> None:
    """Trio's kind of error from a stream, Python's from a bad value, the package's from everything."""
    assert issubclass(SessionBroken, trio.BrokenResourceError)
    assert issubclass(Truncated, trio.BrokenResourceError)
    assert issubclass(BadOption, ValueError)
    assert issubclass(AttestationRejected, HandshakeError)
    for kind in (SessionBroken, Truncated, BadOption, ConfigError, EvidenceError, HandshakeError):
        assert issubclass(kind, RatsTlsError)


def test_a_refusal_names_its_reason() -> None:
    """In its text and as a word for counters."""
    error = AttestationRejected("debug", "the enclave can be debugged")
    assert str(error) == "the peer's evidence was refused (debug): the enclave can be debugged"
    assert (error.reason, error.code, error.function) == ("debug", None, None)
