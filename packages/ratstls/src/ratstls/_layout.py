"""Where the fields are in the structures of each known build of the library, and how to fill and read them.

The structures changed under one version number, one SONAME and one API version; what tells the builds apart is the size
of one exported object. Offsets are in bytes, on LP64.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import cast

from ratstls._ffi import CData, ffi
from ratstls.config import SessionConfig
from ratstls.errors import BadOption, LoadError
from ratstls.evidence import Evidence, EvidenceKind

# rats_tls_conf_t as far as all builds agree on it
_API_VERSION, _FLAGS, _LOG_LEVEL, _TLS, _ATTESTER, _VERIFIER, _CRYPTO, _CERT_ALGORITHM = 0, 8, 16, 20, 52, 84, 116, 148
_FLAG_MUTUAL, _FLAG_SERVER = 1 << 0, 1 << 1
_ECC_256_SHA256 = 1  # the library's own "default" has two numbers, depending on the build
_CLAIM = struct.Struct("=QQQ")  # char *name, uint8_t *value, size_t value_size
# Enough for every build: fields that are never set must read as zero.
_CONF_BYTES = 512

_KINDS: dict[int, EvidenceKind] = {1: "sgx_ecdsa", 2: "tdx_ecdsa", 3: "csv"}
# sgx_quote_3.h: the quote's fixed part ends with the length of its signature; the library's buffer has 8192 bytes.
_SGX_QUOTE_FIXED, _SGX_QUOTE_BUFFER = 436, 8192
_MEASUREMENT_BYTES, _ATTRIBUTES_BYTES = 32, 16
# Limits of ours on what a peer makes us copy.
_MAX_CLAIMS, _MAX_CLAIM_BYTES, _MAX_FIELD_BYTES, _MAX_QUOTE_BYTES = 256, 65_536, 4096, 65_536


@dataclass(frozen=True, slots=True)
class Layout:
    """One build's offsets. ``claims_at`` is None where there are no custom claims, in the configuration or evidence."""

    name: str
    claims_at: int | None
    quote_size_at: int
    fields_at: int


# By the size of global_core_context, which is the configuration and six words.
LAYOUTS = {
    232: Layout("2022a", claims_at=None, quote_size_at=48, fields_at=64),
    248: Layout("2022b", claims_at=160, quote_size_at=64, fields_at=80),
    240: Layout("2023", claims_at=152, quote_size_at=64, fields_at=80),
}


def choose_layout(context_size: int | None, *, has_claims_symbol: bool) -> Layout:
    """Return the layout of a build, by the size of its ``global_core_context``.

    Raises:
        LoadError: the size belongs to no known build, or the other sign of the build says otherwise.
    """
    known = f"known builds have {', '.join(map(str, LAYOUTS))}: use one of them, since guessing would corrupt memory"
    layout = None if context_size is None else LAYOUTS.get(context_size)
    if layout is None:
        found = "no" if context_size is None else f"a {context_size} byte"
        raise LoadError(f"this build of librats_tls has {found} global_core_context, and {known}")
    if has_claims_symbol != (layout.claims_at is not None):
        has = "has" if has_claims_symbol else "lacks"
        raise LoadError(f"this build of librats_tls looks like {layout.name} but {has} free_claims_list; {known}")
    return layout


def make_conf(config: SessionConfig, layout: Layout) -> tuple[CData, list[CData]]:
    """Return a ``rats_tls_conf_t`` and what must live as long as it does.

    Raises:
        BadOption: custom claims, for a build that knows none.
    """
    if config.custom_claims and layout.claims_at is None:
        raise BadOption(f"this build of librats_tls ({layout.name}) has no custom claims: leave them out")
    conf = ffi.new("char[]", _CONF_BYTES)
    kept: list[CData] = []
    memory = ffi.buffer(conf)
    flags = _FLAG_MUTUAL * config.is_mutual | _FLAG_SERVER * config.is_server
    struct.pack_into("=I", memory, _API_VERSION, 1)
    struct.pack_into("=Q", memory, _FLAGS, flags)
    struct.pack_into("=i", memory, _LOG_LEVEL, config.log_level)
    for offset, name in (
        (_TLS, config.tls),
        (_ATTESTER, config.attester),
        (_VERIFIER, config.verifier),
        (_CRYPTO, config.crypto),
    ):
        struct.pack_into("=32s", memory, offset, name.encode("ascii"))
    struct.pack_into("=i", memory, _CERT_ALGORITHM, _ECC_256_SHA256)
    if config.custom_claims and layout.claims_at is not None:
        packed = b""
        for name, value in config.custom_claims:
            texts = ffi.new("char[]", name.encode()), ffi.new("char[]", value)
            kept += texts
            packed += _CLAIM.pack(*(int(ffi.cast("uintptr_t", text)) for text in texts), len(value))
        claims = ffi.new("char[]", packed)
        kept.append(claims)
        count = len(config.custom_claims)
        struct.pack_into("=QQ", memory, layout.claims_at, int(ffi.cast("uintptr_t", claims)), count)
    return conf, kept


def read_evidence(pointer: CData, layout: Layout) -> Evidence:
    """Copy a ``rtls_evidence_t``, whose pointers are good only until the library's callback returns.

    Raises:
        ValueError: it holds more than any honest peer would send.
    """
    address = int(ffi.cast("uintptr_t", pointer))
    kind = _KINDS.get(_word("=I", address), "unknown")
    fields, claims = address + layout.fields_at, _claims(address, layout)
    quote_size, quote = _word("=i", address + layout.quote_size_at), _word("=Q", address + layout.quote_size_at + 8)
    if kind == "sgx_ecdsa":
        if quote and quote_size == _SGX_QUOTE_FIXED:
            signature = _word("=I", quote + _SGX_QUOTE_FIXED - 4)
            quote_size = min(_SGX_QUOTE_FIXED + signature, _SGX_QUOTE_BUFFER)
        return Evidence(
            kind,
            mr_enclave=_copy(_word("=Q", fields), _MEASUREMENT_BYTES),
            mr_signer=_copy(_word("=Q", fields + 8), _MEASUREMENT_BYTES),
            product_id=_word("=I", fields + 16),
            security_version=_word("=I", fields + 20),
            attributes=_copy(_word("=Q", fields + 24), _ATTRIBUTES_BYTES),
            custom_claims=claims,
            quote=_copy(quote, quote_size, _MAX_QUOTE_BYTES) or b"",
        )
    if kind == "csv":
        vm_id, vm_version, measurement, policy = (
            _copy(_word("=Q", at), _word("=I", at + 8), _MAX_FIELD_BYTES) for at in range(fields, fields + 64, 16)
        )
        return Evidence(
            kind,
            custom_claims=claims,
            quote=_copy(quote, quote_size, _MAX_QUOTE_BYTES) or b"",
            csv_vm_id=vm_id,
            csv_vm_version=vm_version,
            csv_measurement=measurement,
            csv_policy=policy,
        )
    return Evidence(kind, custom_claims=claims)


def _claims(evidence: int, layout: Layout) -> tuple[tuple[str, bytes], ...]:
    if layout.claims_at is None:
        return ()
    first, count = _word("=Q", evidence + 8), _word("=Q", evidence + 16)
    if count > _MAX_CLAIMS:
        raise ValueError(f"the peer's evidence has {count} custom claims, more than {_MAX_CLAIMS}")
    claims = []
    for at in range(first, first + count * _CLAIM.size if first else first, _CLAIM.size):
        name, value, size = _CLAIM.unpack(_copy(at, _CLAIM.size) or b"")
        # A name may be any bytes but NUL: what is no UTF-8 becomes visible, and cannot break a log line.
        text = cast(bytes, ffi.string(ffi.cast("char *", name), _MAX_FIELD_BYTES)) if name else b""
        claims.append((text.decode("utf-8", "backslashreplace"), _copy(value, size, _MAX_CLAIM_BYTES) or b""))
    return tuple(claims)


def _word(form: str, address: int) -> int:
    return int(struct.unpack(form, ffi.buffer(ffi.cast("char *", address), struct.calcsize(form)))[0])


def _copy(address: int, size: int, limit: int | None = None) -> bytes | None:
    if address == 0:
        return None
    if size < 0 or (limit is not None and size > limit):
        raise ValueError(f"a field of the peer's evidence has {size} bytes, not 0 to {limit}")
    return bytes(ffi.buffer(ffi.cast("char *", address), size))
