"""Codes, read as the library writes them: each value in its three forms, and every 32-bit number at all."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from ratstls.returncode import ATTESTER, CORE, CRYPTO_WRAPPER, TLS_WRAPPER, VERIFIER, ReturnCode, decode

CLASSES = {CORE: 12, TLS_WRAPPER: 9, ATTESTER: 5, VERIFIER: 5, CRYPTO_WRAPPER: 11}
ENUMERATORS = [(number, value) for number, last in CLASSES.items() for value in range(1, last + 1)]


def decoded(raw: int) -> ReturnCode:
    code = decode(raw)
    assert code is not None
    return code


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (0xFFFFFFFE, "0xfffffffe, core: invalid argument or unusable plug-in"),
        (0xFFFFFFF6, "0xfffffff6, core: unknown or unusable wrapper"),
        (0xEFFFFFFD, "0xeffffffd, TLS wrapper: invalid argument"),
        (0xDFFFFFFD, "0xdffffffd, attester: invalid argument"),
        (0x907FFFFF, "0x907fffff, TLS wrapper: OpenSSL's call returned -1"),
        (0x90000000, "0x90000000, TLS wrapper: OpenSSL's call returned 0"),
        (0xA000E019, "0xa000e019, attester: the platform's code 0xe019"),
        (0xA07FE019, "0xa07fe019, attester: the platform's code 0x7fe019"),
        (0xB0000001, "0xb0000001, verifier: the platform's code 0x1"),
        (0x00000003, "0x00000003, core: out of memory"),
        (0x20000002, "0x20000002, attester: out of memory"),
        (0x10000003, "0x10000003, TLS wrapper: invalid argument"),
        (0x50000001, "0x50000001, unknown class: code 1"),
        (0x0000FFFF, "0x0000ffff, core: code 65535"),
        (0x20000000, "0x20000000, attester: code 0"),
    ],
)
def test_codes_that_occur_are_told_in_words(raw: int, text: str) -> None:
    """Every code of the library's that anyone has seen, and some that nobody has."""
    assert str(decoded(raw)) == text


def test_zero_is_no_error() -> None:
    """Success has nothing to say."""
    assert decode(0) is None


@pytest.mark.parametrize(("number", "value"), ENUMERATORS)
def test_an_enumerator_is_found_in_either_sign(number: int, value: int) -> None:
    """Negated as it should be, or leaked as it is: it means the same."""
    enumerator = number << 28 | value
    negated, leaked = decoded(-enumerator), decoded(enumerator)
    assert (negated.encoding, leaked.encoding) == ("negated", "leaked")
    for code in (negated, leaked):
        assert (code.class_number, code.value) == (number, value)
        assert not code.meaning.startswith("code ")


@given(st.integers(1, 7), st.integers(-(1 << 22), (1 << 22) - 1))
@example(1, (1 << 22) - 1)
@example(1, -(1 << 22))
def test_a_packed_result_comes_back_with_its_sign(number: int, value: int) -> None:
    """The library masks its sub-class away: 23 bits are left."""
    code = decoded(1 << 31 | number << 28 | value & 0x7FFFFF)
    assert (code.encoding, code.class_number, code.value) == ("packed", number, value)


@given(st.integers(1, 0xFFFFFFFF))
def test_no_code_is_refused(raw: int) -> None:
    """Whatever a later build returns, people get its number, and a signed reading is the same."""
    code = decoded(raw)
    assert code == decode(raw - (1 << 32))
    assert str(code).startswith(f"{raw:#010x}, {code.error_class}: ")
    assert code.meaning
