"""Handshakes beside each other: threads are bounded, and slow peers take nothing from good ones."""

from __future__ import annotations

import os
import ssl
from functools import partial

import pytest
import trio
from in_child import in_child
from links import ANYBODY, ATTESTED, PLAIN, STANDIN, Handles, both, client_of, link, read_to_end, server_of
from ratstls import _negotiation
from ratstls._engine import Engine
from ratstls._library import Library
from ratstls._negotiation import Negotiation
from ratstls._session import Session
from ratstls.budget import FailureBudget
from ratstls.errors import HandshakeError
from ratstls.handshake import client_handshake, server_handshake
from trio.testing import lockstep_stream_pair, memory_stream_pair


def client_hello() -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    outgoing = ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="x").do_handshake()
    return outgoing.read()


@in_child()
async def test_a_handshake_that_waits_for_a_thread_ends_in_time_too(library: Library) -> None:
    """Without having reached the library; and the thread that becomes free is not lost."""
    handles = Handles(library)
    threads = trio.CapacityLimiter(2)
    _negotiation._threads.set(threads)
    ours, theirs = memory_stream_pair()
    await ours.send_all(client_hello())
    async with threads:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(threads.acquire_on_behalf_of, "another handshake")
        with pytest.raises(HandshakeError, match=r"no session within 0\.2 s"):
            await server_handshake(theirs, server_of(handles.library), deadline_s=0.2)
    assert handles.made == 0
    threads.release_on_behalf_of("another handshake")
    assert threads.borrowed_tokens == 0
    for end in await link(library):
        await end.aclose()
    assert threads.borrowed_tokens == 0


@pytest.mark.proves("D20", "G16")
@in_child()
async def test_two_hundred_slow_handshakes_hold_up_no_good_one(library: Library) -> None:
    """Peers that say hello and then nothing, each of whom has a thread."""
    handles = Handles(library)
    settings = server_of(handles.library, budget=FailureBudget(burst=300, share=300, reserve=0))
    hello = client_hello()

    async def stall(transport: trio.abc.Stream) -> None:
        with pytest.raises(HandshakeError):
            await server_handshake(transport, settings, deadline_s=40)

    async with trio.open_nursery() as nursery:
        peers = [memory_stream_pair() for _ in range(200)]
        for ours, theirs in peers:
            await ours.send_all(hello)
            nursery.start_soon(stall, theirs)
        while handles.living < 200:  # noqa: ASYNC110 - it is threads that count
            await trio.sleep(0.01)
        started = trio.current_time()
        client, server = await link(library)
        assert trio.current_time() - started < 8 * 0.1
        await client.aclose()
        await server.aclose()
        for ours, _ in peers:
            await ours.aclose()
    assert handles.living == 0


@in_child(STANDIN_EVIDENCE="huge")
async def test_more_evidence_than_fits_at_once_is_carried_to_its_end(standin_only: Library) -> None:
    """A megabyte goes through the pair of sockets in many parts before it is refused."""
    transports = memory_stream_pair()
    client, server = await both(
        partial(client_handshake, transports[0], client_of(standin_only, ATTESTED), policy=STANDIN),
        partial(server_handshake, transports[1], server_of(standin_only, ATTESTED), policy=STANDIN),
    )
    assert isinstance(client, HandshakeError)
    assert isinstance(server, HandshakeError)
    assert client.reason == "handshake"


@in_child(STANDIN_VERIFIER_DELAY_MS="300")
async def test_what_comes_while_the_library_is_busy_waits(standin_only: Library) -> None:
    """A client that does not wait for a yes may send much while the server's verifier is still at it."""
    ours, theirs = memory_stream_pair()
    sent = os.urandom(1_000_000)

    async def send() -> None:
        settings = client_of(standin_only, ATTESTED, is_acknowledged=False)
        async with await client_handshake(ours, settings, policy=STANDIN) as stream:
            await stream.send_all(sent)

    async def receive() -> tuple[bytes, BaseException | None]:
        settings = server_of(standin_only, ATTESTED, is_acknowledged=False)
        async with await server_handshake(theirs, settings, policy=STANDIN) as stream:
            return await read_to_end(stream)

    assert (await both(send, receive))[1] == (sent, None)


@in_child()
def test_a_thread_that_comes_too_late_touches_nothing(library: Library) -> None:
    """Its owner has given up, and freed the session, before it began."""
    handles = Handles(library)
    session = Session(handles.library, PLAIN, ANYBODY.judge)
    engine = Engine(session)
    negotiation = Negotiation(memory_stream_pair()[0], engine, is_server=False, minimum_tls="1.3")
    negotiation._place = _negotiation._Place.ABANDONED
    assert negotiation._shake_hands() is None
    assert handles.made == 0
    engine.free()


@in_child()
async def test_a_peer_that_takes_no_alert_is_not_waited_for(library: Library) -> None:
    """Whoever made no sense is told so for a second, and does not listen."""
    ours, theirs = lockstep_stream_pair()

    async def talk_nonsense() -> None:
        await theirs.receive_some()
        # A ServerHello with a cipher that nobody offered.
        await theirs.send_all(b"\x16\x03\x03\x00\x2a\x02\x00\x00\x26\x03\x03" + bytes(32) + b"\x00\x7f\x7f\x00")

    started = trio.current_time()
    client = partial(client_handshake, ours, client_of(library, minimum_tls="1.2"), policy=ANYBODY)
    error, _ = await both(client, talk_nonsense)
    assert isinstance(error, HandshakeError)
    assert error.reason == "handshake"
    assert trio.current_time() - started < 8
