"""The structures of each known build, written and read byte by byte. No library is loaded."""

from __future__ import annotations

import struct
from dataclasses import astuple, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ratstls._ffi import CData, ffi
from ratstls._layout import LAYOUTS, Layout, choose_layout, make_conf, read_evidence
from ratstls.config import LogLevel, SessionConfig
from ratstls.errors import BadOption, LoadError
from ratstls.evidence import Evidence

CONFIG = SessionConfig(attester="sgx_ecdsa", verifier="sgx_ecdsa_qve", is_server=False, is_mutual=True)
ALL = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=lambda layout: layout.name)
WITH_CLAIMS = pytest.mark.parametrize("layout", [LAYOUTS[240], LAYOUTS[248]], ids=lambda layout: layout.name)


def test_builds_are_told_apart_by_one_size() -> None:
    """And confirmed by one symbol."""
    sizes = {232: "2022a", 248: "2022b", 240: "2023"}
    assert {size: choose_layout(size, has_claims_symbol=size != 232).name for size in sizes} == sizes


def test_offsets_are_those_of_the_headers() -> None:
    """Compiled from each build's own; the stand-in's builds confirm them by working."""
    assert {size: astuple(layout) for size, layout in LAYOUTS.items()} == {
        232: ("2022a", None, 48, 64),
        248: ("2022b", 160, 64, 80),
        240: ("2023", 152, 64, 80),
    }


@pytest.mark.parametrize(("size", "found"), [(256, "a 256 byte"), (0, "a 0 byte"), (None, "no")])
@pytest.mark.parametrize("has_claims_symbol", [True, False])
def test_an_unknown_build_is_refused(size: int | None, found: str, *, has_claims_symbol: bool) -> None:
    """With the value, and those that would do."""
    with pytest.raises(
        LoadError, match=f"has {found} global_core_context, and known builds have 232, 248, 240: use one"
    ):
        choose_layout(size, has_claims_symbol=has_claims_symbol)


@pytest.mark.parametrize(("size", "says"), [(232, "2022a but has"), (240, "2023 but lacks"), (248, "2022b but lacks")])
def test_a_build_that_contradicts_itself_is_refused(size: int, says: str) -> None:
    """Two signs that disagree are no sign."""
    with pytest.raises(LoadError, match=f"looks like {says} free_claims_list"):
        choose_layout(size, has_claims_symbol=size == 232)


@ALL
def test_the_configuration_is_where_every_build_looks(layout: Layout) -> None:
    """What all builds share is set, the algorithm too, and everything else is zero up to 512 bytes."""
    conf, _ = make_conf(replace(CONFIG, log_level=LogLevel.ERROR), layout)
    memory = bytes(ffi.buffer(conf))
    assert len(memory) == 512
    assert struct.unpack_from("=I4xQi", memory) == (1, 1, 3)
    names = [memory[at : at + 32].rstrip(b"\0") for at in (20, 52, 84, 116)]
    assert names == [b"openssl", b"sgx_ecdsa", b"sgx_ecdsa_qve", b"openssl"]
    assert struct.unpack_from("=i", memory, 148) == (1,)
    assert memory[152:] == bytes(360)


@pytest.mark.parametrize(("is_server", "is_mutual", "flags"), [(False, False, 0), (True, False, 2), (True, True, 3)])
def test_flags_say_the_role(is_server: bool, is_mutual: bool, flags: int) -> None:
    """MUTUAL is 1 and SERVER is 2."""
    config = replace(CONFIG, verifier="sgx_ecdsa", is_server=is_server, is_mutual=is_mutual)
    conf, _ = make_conf(config, LAYOUTS[240])
    assert struct.unpack_from("=Q", ffi.buffer(conf), 8) == (flags,)


@WITH_CLAIMS
@given(claims=st.lists(st.tuples(st.text("abcß", min_size=1, max_size=9), st.binary(max_size=40)), max_size=9))
def test_claims_read_back_as_they_were_written(layout: Layout, claims: list[tuple[str, bytes]]) -> None:
    """The configuration's claims, given to a reader of evidence."""
    conf, kept = make_conf(replace(CONFIG, custom_claims=tuple(claims)), layout)
    assert layout.claims_at is not None
    pointer, count = struct.unpack_from("=QQ", ffi.buffer(conf), layout.claims_at)
    evidence = Memory(layout).put("=QQ", 8, pointer, count)
    assert read_evidence(evidence.pointer, layout).custom_claims == tuple(claims)
    assert bool(kept) == bool(claims)


def test_a_build_without_claims_refuses_them() -> None:
    """Rather than leave them out without a word."""
    with pytest.raises(BadOption, match=r"\(2022a\) has no custom claims"):
        make_conf(replace(CONFIG, custom_claims=(("a", b"b"),)), LAYOUTS[232])


class Memory:
    """A ``rtls_evidence_t`` of a build, with room for what it points to."""

    def __init__(self, layout: Layout, kind: int = 0) -> None:
        self.layout = layout
        self.pointer: CData = ffi.new("char[]", 256)
        self.kept: list[CData] = []
        self.put("=I", 0, kind)

    def put(self, form: str, at: int, *values: int) -> Memory:
        struct.pack_into(form, ffi.buffer(self.pointer), at, *values)
        return self

    def address(self, content: bytes) -> int:
        self.kept.append(ffi.new("char[]", content))
        return int(ffi.cast("uintptr_t", self.kept[-1]))

    def quote(self, content: bytes, size: int | None = None) -> Memory:
        size = len(content) if size is None else size
        return self.put("=i4xQ", self.layout.quote_size_at, size, self.address(content))

    def claims(self, *claims: tuple[bytes | None, bytes | None, int]) -> Memory:
        packed = b""
        for name, value, size in claims:
            addresses = (0 if text is None else self.address(text) for text in (name, value))
            packed += struct.pack("=QQQ", *addresses, size)
        return self.put("=QQ", 8, self.address(packed), len(claims))

    def read(self) -> Evidence:
        return read_evidence(self.pointer, self.layout)


def sgx(layout: Layout, quote: bytes = bytes(436), quote_size: int | None = None) -> Memory:
    memory = Memory(layout, kind=1).quote(quote, quote_size)
    pointers = (memory.address(text) for text in (b"E" * 32, b"S" * 32))
    return memory.put("=QQIIQ", layout.fields_at, *pointers, 7, 9, memory.address(b"A" * 16))


@ALL
def test_fields_of_an_sgx_enclave_are_read(layout: Layout) -> None:
    """Each from its place."""
    assert sgx(layout).read() == Evidence(
        "sgx_ecdsa",
        mr_enclave=b"E" * 32,
        mr_signer=b"S" * 32,
        product_id=7,
        security_version=9,
        attributes=b"A" * 16,
        quote=bytes(436),
    )


@ALL
@pytest.mark.parametrize(("announced", "length"), [(0, 436), (100, 536), (7756, 8192), (0xFFFFFFFF, 8192)])
def test_a_quote_has_its_signature(layout: Layout, announced: int, length: int) -> None:
    """The library says 436 and means more; what the peer announces is bounded by the library's buffer."""
    quote = b"q" * 432 + struct.pack("<I", announced) + b"s" * 7756
    assert sgx(layout, quote, 436).read().quote == quote[:length]


@ALL
def test_a_quote_of_another_length_is_taken_by_its_length(layout: Layout) -> None:
    """Too short to have a signature."""
    assert sgx(layout, b"short").read().quote == b"short"


@ALL
@pytest.mark.parametrize("kind", [1, 3])
def test_what_is_missing_is_none(layout: Layout, kind: int) -> None:
    """NULL is not looked behind."""
    evidence = Memory(layout, kind).put("=i", layout.quote_size_at, 436).read()
    assert evidence.quote == b""
    assert evidence.mr_enclave is evidence.mr_signer is evidence.attributes is None
    assert evidence.csv_vm_id is evidence.csv_vm_version is evidence.csv_measurement is evidence.csv_policy is None


@ALL
def test_fields_of_csv_are_read(layout: Layout) -> None:
    """Each with its own length."""
    memory = Memory(layout, kind=3).quote(b"report")
    for number, text in enumerate((b"id", b"version", b"measurement", b"")):
        memory.put("=QI", layout.fields_at + 16 * number, memory.address(text), len(text))
    assert memory.read() == Evidence(
        "csv",
        quote=b"report",
        csv_vm_id=b"id",
        csv_vm_version=b"version",
        csv_measurement=b"measurement",
        csv_policy=b"",
    )


@ALL
@pytest.mark.parametrize(
    ("number", "kind"), [(0, "unknown"), (2, "tdx_ecdsa"), (4, "unknown"), (0xFFFFFFFF, "unknown")]
)
def test_nothing_is_read_of_other_kinds(layout: Layout, number: int, kind: Any) -> None:
    """Their fields are never set, whatever the memory holds."""
    memory = Memory(layout, number)
    memory.put("=Q", layout.fields_at, 1)  # no address
    assert memory.read() == Evidence(kind)


@WITH_CLAIMS
def test_claims_are_bytes_that_a_peer_chose(layout: Layout) -> None:
    """Names that are no UTF-8 become visible, missing ones empty, and a missing value too."""
    memory = Memory(layout).claims((b"\xff\n", b"v", 1), (None, b"v", 1), (b"n", None, 5), (b"0", b"a\0b", 3))
    assert memory.read().custom_claims == (("\\xff\n", b"v"), ("", b"v"), ("n", b""), ("0", b"a\0b"))


@WITH_CLAIMS
def test_claims_without_an_array_are_none(layout: Layout) -> None:
    """NULL is not looked behind, whatever the number says."""
    assert Memory(layout).put("=QQ", 8, 0, 3).read().custom_claims == ()


@WITH_CLAIMS
def test_a_name_is_copied_up_to_a_limit(layout: Layout) -> None:
    """Its end may be far."""
    assert len(Memory(layout).claims((b"n" * 9999, b"", 0)).read().custom_claims[0][0]) == 4096


@WITH_CLAIMS
def test_too_many_or_too_long_claims_are_refused(layout: Layout) -> None:
    """Before they are copied."""
    assert len(Memory(layout).claims(*[(b"n", b"", 0)] * 256).read().custom_claims) == 256
    with pytest.raises(ValueError, match="257 custom claims, more than 256"):
        Memory(layout).claims(*[(b"n", b"", 0)] * 257).read()
    with pytest.raises(ValueError, match="has 65537 bytes, not 0 to 65536"):
        Memory(layout).claims((b"n", b"", 65_537)).read()


@ALL
def test_lengths_at_the_limits_are_taken(layout: Layout) -> None:
    """Nothing, and as much as is copied at most."""
    for size in (0, 65_536):
        assert len(sgx(layout, bytes(size)).read().quote) == size
    memory = Memory(layout, kind=3)
    memory.put("=QI", layout.fields_at, memory.address(bytes(4096)), 4096)
    assert memory.read().csv_vm_id == bytes(4096)


@WITH_CLAIMS
def test_a_claim_may_be_as_long_as_the_limit(layout: Layout) -> None:
    """To the byte."""
    assert Memory(layout).claims((b"n", bytes(65_536), 65_536)).read().custom_claims == (("n", bytes(65_536)),)


@ALL
def test_impossible_lengths_are_refused(layout: Layout) -> None:
    """Before they are copied."""
    for size in (-1, 65_537):
        with pytest.raises(ValueError, match=f"has {size} bytes"):
            sgx(layout, b"", size).read()
    memory = Memory(layout, kind=3)
    with pytest.raises(ValueError, match="has 4097 bytes"):
        memory.put("=QI", layout.fields_at, memory.address(b""), 4097).read()
