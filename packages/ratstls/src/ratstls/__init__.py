"""Attested links through librats_tls.so: these names are the public ones. Importing them loads no library."""

from ratstls._library import Library, load
from ratstls.accepted import Accepted, PolicyError
from ratstls.budget import FailureBudget
from ratstls.config import LogLevel, SessionConfig
from ratstls.errors import (
    AttestationRejected,
    BadOption,
    ConfigError,
    EvidenceError,
    HandshakeError,
    LoadError,
    RatsTlsError,
    SessionBroken,
    Truncated,
)
from ratstls.evidence import Evidence
from ratstls.handshake import HandshakeSettings, client_handshake, server_handshake
from ratstls.peer import Peer
from ratstls.policy import Policy
from ratstls.policy_file import parse_policy
from ratstls.stream import RatsTlsStream
from ratstls.verdict import Verdict

__version__ = "0.1.0"
__all__ = [
    "Accepted",
    "AttestationRejected",
    "BadOption",
    "ConfigError",
    "Evidence",
    "EvidenceError",
    "FailureBudget",
    "HandshakeError",
    "HandshakeSettings",
    "Library",
    "LoadError",
    "LogLevel",
    "Peer",
    "Policy",
    "PolicyError",
    "RatsTlsError",
    "RatsTlsStream",
    "SessionBroken",
    "SessionConfig",
    "Truncated",
    "Verdict",
    "client_handshake",
    "load",
    "parse_policy",
    "server_handshake",
]
