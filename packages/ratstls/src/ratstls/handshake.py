"""Make attested links: shake hands over any trio stream, and return when both sides have said yes.

The steps, each of which must go well within the deadline:

1. The server waits for a whole TLS ClientHello that offers a version that will do, and refuses anything else at once.
2. The library shakes hands. It verifies the peer's evidence, and the policy judges it. The ServerHello must choose a
   version that will do, or it does not pass.
3. The server sends `SERVER_YES` in a record of its own, the client answers with `CLIENT_YES`. In mutual mode the
   client's library is done before the server has judged it, so without this nobody would know.

Nothing else is sent before these three are over, and there is no way back to plaintext from any of them.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

import trio

from ratstls._engine import CIPHERTEXT_BYTES, Engine
from ratstls._hello import CLIENT_HELLO, TlsVersion, is_hello
from ratstls._library import Library
from ratstls._negotiation import Negotiation
from ratstls._session import Session
from ratstls.budget import FailureBudget, source_of
from ratstls.config import SessionConfig
from ratstls.errors import BadOption, HandshakeError, SessionBroken
from ratstls.evidence import Evidence
from ratstls.peer import Peer
from ratstls.policy import Policy
from ratstls.stream import RatsTlsStream
from ratstls.verdict import Verdict

SERVER_YES: Final = b"ENG-RATSTLS/1 S\n"
CLIENT_YES: Final = b"ENG-RATSTLS/1 C\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class HandshakeSettings:
    """What the handshakes of one listener, or one dialler, have in common.

    Attributes:
        library: as `_library.load` returns it.
        minimum_tls: the least version of TLS; the library itself takes any.
        is_acknowledged: the peer is one of ours and says yes; leave that out only for an original ENTA or ENTG.
        budget: bounds the memory that failed handshakes cost.

    Raises:
        BadOption: the session would be none of TLS.
    """

    library: Library
    config: SessionConfig
    minimum_tls: TlsVersion = "1.3"
    is_acknowledged: bool = True
    budget: FailureBudget = field(default_factory=FailureBudget)

    def __post_init__(self) -> None:
        if self.config.tls != "openssl":
            raise BadOption(f"tls {self.config.tls!r} makes no stream that tells how it ends: use 'openssl'")


async def client_handshake(
    transport: trio.abc.Stream, settings: HandshakeSettings, *, policy: Policy, deadline_s: float = 10.0
) -> RatsTlsStream:
    """Make a link with the server at the other end of *transport*, which is the link's from here on, and verify it.

    Raises:
        AttestationRejected: *policy* refuses the server; ``reason`` is the policy's.
        HandshakeError: anything else went wrong with the peer; ``reason`` is ``not_tls``, ``alert``, ``tls_version``,
            ``hung_up``, ``refused``, ``no_yes``, ``deadline``, ``too_many_failures``, or ``handshake``.
        ConfigError, EvidenceError: this side could not even begin.
        BadOption: options contradict each other, as these and the policy. Raised before any I/O.

    Whatever is raised, the transport is closed; cancellation too.
    """
    if settings.config.is_server:
        raise BadOption("the session is configured as a server: a client's has is_server=False")
    return await _shake_hands(transport, settings, policy, deadline_s)


async def server_handshake(
    transport: trio.abc.Stream, settings: HandshakeSettings, *, policy: Policy | None = None, deadline_s: float = 10.0
) -> RatsTlsStream:
    """Make a link with the client at the other end of *transport*; in mutual mode verify it by *policy*.

    Raises what `client_handshake` does.
    """
    if not settings.config.is_server:
        raise BadOption("the session is configured as a client: a server's has is_server=True")
    return await _shake_hands(transport, settings, policy, deadline_s)


async def _shake_hands(
    transport: trio.abc.Stream, settings: HandshakeSettings, policy: Policy | None, deadline_s: float
) -> RatsTlsStream:
    if settings.config.is_verifying:
        if policy is None:
            raise BadOption("this side verifies its peer, and has no policy to judge it by: give one")
        policy.check_verifier(settings.config.verifier)
    elif policy is not None:
        raise BadOption("this side does not verify its peer, so that its policy would be void: make it mutual")
    async with _closed_on_failure(transport):
        with trio.move_on_after(deadline_s):
            return await _make_stream(transport, settings, policy)
        raise HandshakeError(f"no session within {deadline_s:g} s: the peer is too slow, or silent", reason="deadline")


@asynccontextmanager
async def _closed_on_failure(transport: trio.abc.Stream) -> AsyncIterator[None]:
    try:
        yield
    except BaseException:
        await trio.aclose_forcefully(transport)
        raise


async def _make_stream(transport: trio.abc.Stream, settings: HandshakeSettings, policy: Policy | None) -> RatsTlsStream:
    config = settings.config
    began_at = trio.current_time()
    hello = await _receive_client_hello(transport, settings.minimum_tls) if config.is_server else b""
    judge = _Judge(policy)
    engine = Engine(Session(settings.library, config, judge))
    negotiation = Negotiation(transport, engine, is_server=config.is_server, minimum_tls=settings.minimum_tls)
    try:
        if hello:
            engine.feed(hello)
        with settings.budget.one_handshake(source_of(transport) if config.is_server else None):
            await negotiation.run()
        stream = RatsTlsStream(
            transport,
            engine,
            peer=judge.peer(config.verifier),
            began_at=began_at,
            max_age_s=math.inf if policy is None else policy.max_link_age_s,
        )
        if settings.is_acknowledged:
            await _exchange_yes(stream, is_server=config.is_server)
    except BaseException:
        if not negotiation.is_abandoned:
            engine.free()
        raise
    return stream


async def _receive_client_hello(transport: trio.abc.Stream, minimum_tls: TlsVersion) -> bytes:
    data = b""
    while not data or not is_hello(data, CLIENT_HELLO, minimum_tls):
        try:
            more = bytes(await transport.receive_some(CIPHERTEXT_BYTES))
        except trio.BrokenResourceError:
            more = b""
        if not more:
            raise HandshakeError("the peer ended the connection before it said a TLS hello", reason="hung_up")
        data += more
    return data


class _Judge:
    """Asks the policy, and remembers what it was asked and what it said."""

    def __init__(self, policy: Policy | None) -> None:
        self._policy = policy
        self._accepted: tuple[Evidence, Verdict, datetime] | None = None

    def __call__(self, evidence: Evidence) -> Verdict:
        if self._policy is None:
            # A server that verifies nobody is not asked.
            raise RuntimeError("librats_tls asks for a verdict on a peer that it was not to verify")
        verdict = self._policy.judge(evidence)
        self._accepted = (evidence, verdict, datetime.now(UTC)) if verdict.accepted else None
        return verdict

    def peer(self, verifier: str) -> Peer | None:
        if self._accepted is None:
            return None
        evidence, verdict, verified_at = self._accepted
        return Peer.from_evidence(evidence, verdict, verifier, verified_at)


async def _exchange_yes(stream: RatsTlsStream, *, is_server: bool) -> None:
    try:
        if is_server:
            await stream.send_all(SERVER_YES)
            await _expect(CLIENT_YES, stream)
        else:
            await _expect(SERVER_YES, stream)
            await stream.send_all(CLIENT_YES)
    except SessionBroken as error:
        raise HandshakeError(
            "the peer ended the session with an alert before it said yes: it refused our evidence, or wanted some",
            reason="refused",
        ) from error
    except trio.BrokenResourceError as error:
        raise HandshakeError(f"the peer was gone before it said yes: {error}", reason="hung_up") from error


async def _expect(word: bytes, stream: RatsTlsStream) -> None:
    said = b""
    while len(said) < len(word) and (more := await stream.receive_some(len(word) - len(said))):
        said += more
    if said != word:
        raise HandshakeError(
            f"the peer said {said!r} instead of yes: is it an original one, which needs --wire original?",
            reason="no_yes",
        )
