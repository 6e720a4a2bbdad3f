"""Attested links for tests: both ends of one, over whatever lies between them. Import this in a child: see in_child."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import trio
from ratstls._library import Library
from ratstls.accepted import Accepted
from ratstls.config import SessionConfig
from ratstls.handshake import HandshakeSettings, client_handshake, server_handshake
from ratstls.policy import Policy
from ratstls.stream import RatsTlsStream
from trio.testing import memory_stream_pair

# What any library has plug-ins for; it encrypts, and proves nothing.
PLAIN = SessionConfig(attester="nullattester", verifier="nullverifier", is_server=False, is_attestation_waived=True)
ANYBODY = Policy(no_attestation=True)
# What the stand-in attests, unless told otherwise.
ATTESTED = SessionConfig(attester="sgx_ecdsa", verifier="sgx_ecdsa", is_server=False, is_mutual=True)
STANDIN = Policy(accept=(Accepted(mr_enclave=b"\x11" * 32),))

Transports = tuple[trio.abc.Stream, trio.abc.Stream]


def client_of(library: Library, config: SessionConfig = PLAIN, **settings: Any) -> HandshakeSettings:
    """Return a client's settings."""
    return HandshakeSettings(library=library, config=replace(config, is_server=False), **settings)


def server_of(library: Library, config: SessionConfig = PLAIN, **settings: Any) -> HandshakeSettings:
    """Return a server's settings."""
    return HandshakeSettings(library=library, config=replace(config, is_server=True), **settings)


async def link(
    library: Library, make_transports: Callable[[], Transports] = memory_stream_pair, **settings: Any
) -> tuple[RatsTlsStream, RatsTlsStream]:
    """Shake hands without attestation, and return both ends, client first."""
    client_transport, server_transport = make_transports()
    client, server = client_of(library, **settings), server_of(library, **settings)
    return await both(
        partial(client_handshake, client_transport, client, policy=ANYBODY),
        partial(server_handshake, server_transport, server),
    )


async def both(client: Callable[[], Any], server: Callable[[], Any]) -> tuple[Any, Any]:
    """Run both, and return what they return or raise."""
    results: list[Any] = [None, None]

    async def run(number: int, end: Callable[[], Any]) -> None:
        try:
            results[number] = await end()
        except Exception as error:  # noqa: BLE001 - the caller is to look at it
            results[number] = error

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, 0, client)
        nursery.start_soon(run, 1, server)
    return results[0], results[1]
