"""Links begin when both sides have said yes, and not a byte earlier; whatever else happens ends within its time."""

from __future__ import annotations

import gc
import os
import ssl
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import trio
from enlink.testing.streams import ImpairedStream, reset, tcp_stream_pair
from in_child import in_child
from links import (
    ANYBODY,
    ATTESTED,
    PLAIN,
    STANDIN,
    Handles,
    Operation,
    Transports,
    both,
    client_of,
    link,
    link_over,
    open_descriptors,
    read_to_end,
    server_of,
)
from ratstls._library import Library
from ratstls.accepted import Accepted, PolicyError
from ratstls.budget import FailureBudget
from ratstls.errors import AttestationRejected, BadOption, EvidenceError, HandshakeError, Truncated
from ratstls.evidence import Evidence
from ratstls.handshake import CLIENT_YES, SERVER_YES, _Judge, client_handshake, server_handshake
from ratstls.policy import Policy
from ratstls.stream import RatsTlsStream
from ratstls.verdict import Verdict
from trio.testing import memory_stream_pair, wait_all_tasks_blocked

TLS_1_2 = str(Path(__file__).parents[3] / "tests" / "native" / "tls_1_2.cnf")


async def attested(
    library: Library,
    policy: Policy = STANDIN,
    server_policy: Policy | None = None,
    transports: Transports | None = None,
    **settings: object,
) -> tuple[object, object]:
    """Shake hands with evidence, of both sides if there is a policy for both; return streams or errors."""
    ours, theirs = transports or memory_stream_pair()
    config = replace(ATTESTED, is_mutual=server_policy is not None)
    return await both(
        partial(client_handshake, ours, client_of(library, config), policy=policy),
        partial(server_handshake, theirs, server_of(library, config), policy=server_policy),
    )


async def close(*ends: object) -> None:
    for end in ends:
        if isinstance(end, RatsTlsStream):
            await trio.aclose_forcefully(end)


async def reason_of(shaking: Operation) -> str:
    with pytest.raises(HandshakeError) as caught:
        await shaking()
    return caught.value.reason


# Yes.


@in_child()
async def test_both_sides_know_whom_they_have_accepted(standin_only: Library) -> None:
    """By its evidence, the policy's reason and the time."""
    client, server = await attested(standin_only, STANDIN, Policy.any_measurement("sgx_ecdsa"))
    assert isinstance(client, RatsTlsStream)
    assert isinstance(server, RatsTlsStream)
    assert client.peer is not None
    assert server.peer is not None
    assert dict(client.peer.measurements)["mr_enclave"] == "11" * 32
    assert (client.peer.kind, client.peer.verifier, client.peer.reason) == ("sgx_ecdsa", "sgx_ecdsa", "accepted")
    assert server.peer.reason == "any_measurement"
    assert client.expires_at - trio.current_time() == pytest.approx(3600 - client.age_s)
    await close(client, server)


@in_child()
async def test_claims_are_known(standin_only: Library) -> None:
    """The policy may require them."""
    ours, theirs = memory_stream_pair()
    claims = (("role", b"gateway"),)
    config = replace(ATTESTED, is_mutual=False, custom_claims=claims)
    client, server = await both(
        partial(
            client_handshake,
            ours,
            client_of(standin_only, config),
            policy=replace(STANDIN, claims=claims),
        ),
        partial(server_handshake, theirs, server_of(standin_only, config)),
    )
    assert client.peer.claims == claims
    await close(client, server)


@in_child()
async def test_a_yes_is_all_that_is_said_before_the_program(library: Library) -> None:
    """Without acknowledgements the two words are what the program reads; with them they never are."""
    client, server = await link(library, is_acknowledged=False)
    await server.send_all(SERVER_YES)
    await client.send_all(CLIENT_YES)
    assert (await client.receive_some(), await server.receive_some()) == (SERVER_YES, CLIENT_YES)
    await close(client, server)
    transports = memory_stream_pair()
    ends = await both(
        partial(client_handshake, transports[0], client_of(library), policy=ANYBODY),
        partial(speak, library, transports[1], SERVER_YES),
    )
    assert ends[1] == CLIENT_YES
    await close(*ends)


async def speak(library: Library, transport: trio.abc.Stream, word: bytes) -> bytes:
    """Be an original server with something to say; return what the client says after that."""
    stream = await server_handshake(transport, server_of(library, is_acknowledged=False))
    async with stream:
        await stream.send_all(word)
        return await stream.receive_some() if word else b""


@in_child()
async def test_a_peer_that_does_not_say_yes_is_refused(library: Library) -> None:
    """As an original one, or one that says goodbye at once."""
    for word in (b"raw packets are what I send", b"", CLIENT_YES):
        transports = memory_stream_pair()
        client, heard = await both(
            partial(client_handshake, transports[0], client_of(library), policy=ANYBODY),
            partial(speak, library, transports[1], word),
        )
        assert isinstance(client, HandshakeError)
        assert client.reason == "no_yes"
        assert isinstance(heard, Truncated) if word else heard == b""


@in_child()
async def test_a_session_may_be_over_before_the_handshake_is(library: Library) -> None:
    """Everything may already be there, the goodbye and the end of the connection included, and none of it is lost."""
    for _ in range(50):
        transports = await tcp_stream_pair()

        async def blurt(transport: trio.abc.Stream = transports[0]) -> None:
            settings = client_of(library, is_acknowledged=False)
            async with await client_handshake(transport, settings, policy=ANYBODY) as stream:
                await stream.send_all(b"that was all")

        async def hear(transport: trio.abc.Stream = transports[1]) -> tuple[bytes, BaseException | None]:
            async with await server_handshake(transport, server_of(library, is_acknowledged=False)) as stream:
                return await read_to_end(stream)

        assert (await both(blurt, hear))[1] == (b"that was all", None)


# No.


@pytest.mark.proves("D3")
def test_a_side_without_policy_accepts_nobody() -> None:
    """Should a library ask it after all."""
    with pytest.raises(RuntimeError, match="a peer that it was not to verify"):
        _Judge(None)(Evidence("unknown"))


class Raising(Policy):
    """A policy with a mistake in it."""

    def judge(self, evidence: Evidence) -> Verdict:
        raise LookupError(f"a mistake about {evidence}")


REFUSED = {
    "good": ("mrenclave", Policy(accept=(Accepted(mr_enclave=b"\x12" * 32),))),
    "good ": ("mrsigner", Policy(accept=(Accepted(mr_signer=b"\x12" * 32, product_id=1, minimum_svn=2),))),
    "good  ": ("product_id", Policy(accept=(Accepted(mr_signer=b"\x22" * 32, product_id=2, minimum_svn=2),))),
    "good   ": ("svn", Policy(accept=(Accepted(mr_signer=b"\x22" * 32, product_id=1, minimum_svn=3),))),
    "good    ": ("claim_missing", replace(STANDIN, claims=(("role", b"gateway"),))),
    "good     ": ("platform", replace(STANDIN, platforms=frozenset([b"\x33" * 16]))),
    "null-fields": ("no_fields", STANDIN),
    "short-quote": ("short_quote", STANDIN),
    "mismatch": ("quote_mismatch", STANDIN),
    "unknown": ("no_evidence", STANDIN),
    "tdx_ecdsa": ("evidence_type", STANDIN),
    "csv": ("evidence_type", STANDIN),
    # What the library refuses by itself, it does not explain.
    **dict.fromkeys(
        (
            *("none", "garbage", "truncated", "huge", "other-key", "no-report-data", "revoked", "out-of-date"),
            *("expired", "not-yet-valid", "deep-chain"),
        ),
        ("handshake", STANDIN),
    ),
}  # fmt: skip


@pytest.mark.proves("D1", "D3", "D6", "G17", "F71")
@in_child()
async def test_bad_evidence_makes_no_link(standin_only: Library) -> None:
    """Each kind with its reason on the side that judges; the other is hung up on. A debuggable enclave too."""
    handles = Handles(standin_only)
    cases = {name: ({"STANDIN_EVIDENCE": name.strip()}, *case) for name, case in REFUSED.items()}
    cases["debug"] = ({"STANDIN_ATTRIBUTES": "07" + "00" * 15}, "debug", STANDIN)
    for name, (environment, reason, policy) in cases.items():
        os.environ.update(environment)
        client, server = await attested(handles.library, policy)
        for variable in environment:
            del os.environ[variable]
        assert isinstance(client, HandshakeError), name
        assert client.reason == reason, name
        assert isinstance(client, AttestationRejected) == (reason != "handshake"), name
        assert isinstance(server, HandshakeError), name
        # A server that is still sending when it is refused cannot tell by whose fault that is.
        assert server.reason in ("refused", "hung_up") or name == "huge", name
        assert handles.living == 0
    assert len(cases) >= 24


@pytest.mark.proves("D3")
@in_child()
async def test_a_policy_that_raises_makes_no_link(library: Library) -> None:
    """What it raised comes out of the handshake."""
    transports = memory_stream_pair()
    client, server = await both(
        partial(client_handshake, transports[0], client_of(library), policy=Raising(no_attestation=True)),
        partial(server_handshake, transports[1], server_of(library)),
    )
    assert isinstance(client, LookupError)
    assert isinstance(server, HandshakeError)


def counted(stream: trio.abc.Stream) -> list[int]:
    """Return where to find how many bytes each `send_all` of *stream* sent, from now on."""
    sizes = []
    send_all = stream.send_all

    async def send_and_count(data: bytes) -> None:
        sizes.append(len(data))
        await send_all(data)

    stream.send_all = send_and_count  # type: ignore[method-assign, assignment]
    return sizes


@pytest.mark.proves("D8", "D9", "G17")
@in_child()
async def test_nothing_of_the_program_is_sent_before_both_said_yes(standin_only: Library) -> None:
    """Not even where the client's library is done: the server refuses it later, and it learns that. Then it all is."""
    strict = Policy(accept=(Accepted(mr_enclave=b"\x12" * 32),))
    config = replace(ATTESTED, is_mutual=True)
    settings = client_of(standin_only, config), server_of(standin_only, config)
    for server_policy, policy in ((strict, STANDIN), (STANDIN, strict), (STANDIN, STANDIN)):
        is_accepted = policy is server_policy
        transports = memory_stream_pair()
        sent = [counted(transport) for transport in transports]

        async def talk(shaking: Operation) -> None:
            async with await shaking() as stream, trio.open_nursery() as nursery:
                nursery.start_soon(stream.send_all, bytes(1_000_000))
                count = 0
                while count < 1_000_000:
                    count += len(await stream.receive_some())

        client, server = await both(
            partial(talk, partial(client_handshake, transports[0], settings[0], policy=policy)),
            partial(talk, partial(server_handshake, transports[1], settings[1], policy=server_policy)),
        )
        for sizes in sent:
            assert sum(sizes) > 1_000_000 if is_accepted else 0 < sum(sizes) < 6000
        if server_policy is strict:
            assert isinstance(server, AttestationRejected)
            assert isinstance(client, HandshakeError)
            assert client.reason == "refused"
        elif policy is strict:
            assert isinstance(client, AttestationRejected)
            assert isinstance(server, HandshakeError)


@in_child()
async def test_a_client_without_evidence_is_told_late(standin_only: Library) -> None:
    """The server wants a certificate, and the client has none."""
    ours, theirs = memory_stream_pair()
    client, server = await both(
        partial(client_handshake, ours, client_of(standin_only, replace(ATTESTED, is_mutual=False)), policy=STANDIN),
        partial(server_handshake, theirs, server_of(standin_only, ATTESTED), policy=STANDIN),
    )
    assert isinstance(client, HandshakeError)
    assert client.reason == "refused"
    assert isinstance(server, HandshakeError)
    assert server.reason == "handshake"


@in_child()
async def test_options_that_contradict_each_other_cost_no_io(library: Library) -> None:
    """They raise at once, before the transport is touched, which stays the caller's."""
    ours, theirs = memory_stream_pair()
    client, server = client_of(library), server_of(library)
    mutual = server_of(library, replace(PLAIN, is_mutual=True))
    for shaking, text in (
        (partial(client_handshake, ours, server, policy=ANYBODY), "is configured as a server"),
        (partial(server_handshake, ours, client), "is configured as a client"),
        (partial(server_handshake, ours, server, policy=ANYBODY), "does not verify its peer"),
        (partial(server_handshake, ours, mutual), "has no policy"),
    ):
        with pytest.raises(BadOption, match=text):
            await shaking()
    with pytest.raises(PolicyError, match="nullverifier confirms nothing"):
        await client_handshake(ours, client, policy=STANDIN)
    with pytest.raises(BadOption, match="makes no stream"):
        client_of(library, replace(PLAIN, tls="nulltls"))
    await ours.send_all(b"still open")
    assert await theirs.receive_some() == b"still open"


@in_child(STANDIN_ATTESTER="fails")
async def test_a_side_that_cannot_attest_says_so(standin_only: Library) -> None:
    """And leaves nothing behind."""
    handles = Handles(standin_only)
    client, server = await attested(handles.library)
    assert isinstance(server, EvidenceError)
    assert isinstance(client, HandshakeError)
    assert handles.living == 0


# Strangers.


@pytest.mark.proves("D8")
@in_child()
async def test_a_plaintext_peer_never_reaches_the_library(library: Library) -> None:
    """A server knows it by its first byte; a client by the answer."""
    handles = Handles(library)
    for words in (b"GET / HTTP/1.1\r\n\r\n", b"\x00\x00\x00\x2c" + bytes(44), b"SSH-2.0-x\r\n", b"\x16\x03", b"\x80"):
        ours, theirs = memory_stream_pair()
        await ours.send_all(words)
        await ours.send_eof()
        reason = await reason_of(partial(server_handshake, theirs, server_of(handles.library)))
        assert reason == ("hung_up" if words == b"\x16\x03" else "not_tls")
        assert await ours.receive_some() == b""
    assert handles.made == 0
    for words, reason in ((b"HTTP/1.1 400 Bad Request\r\n", "not_tls"), (b"\x15\x03\x03\x00\x02\x02\x28", "alert")):
        ours, theirs = memory_stream_pair()
        await theirs.send_all(words)
        assert await reason_of(partial(client_handshake, ours, client_of(handles.library), policy=ANYBODY)) == reason
    assert handles.living == 0


@in_child()
async def test_a_peer_that_resets_the_connection_has_hung_up(library: Library) -> None:
    """On either side, before or after the first word."""
    for end in (0, 1):
        for says in (b"", b"\x16\x03\x01"):
            transports = await tcp_stream_pair()
            ours, theirs = transports[end], transports[1 - end]
            shaking = (
                partial(client_handshake, ours, client_of(library), policy=ANYBODY)
                if end == 0
                else partial(server_handshake, ours, server_of(library))
            )
            async with trio.open_nursery() as nursery:

                async def check(shaking: Operation = shaking) -> None:
                    assert await reason_of(shaking) == "hung_up"

                nursery.start_soon(check)
                await wait_all_tasks_blocked()
                if says:
                    await theirs.send_all(says)
                reset(theirs)


def hello_of(maximum: ssl.TLSVersion) -> bytes:
    """What Python's own TLS client says first."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1_2, maximum
    outgoing = ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), outgoing).do_handshake()
    return outgoing.read()


@pytest.mark.proves("D5", "F72")
@in_child()
async def test_a_client_of_tls_1_2_never_reaches_the_library(library: Library) -> None:
    """Its hello says what it can do."""
    handles = Handles(library)
    ours, theirs = memory_stream_pair()
    await ours.send_all(hello_of(ssl.TLSVersion.TLSv1_2))
    with pytest.raises(HandshakeError, match=r"the client offers TLS 1\.2, and TLS 1\.3 is the least"):
        await server_handshake(theirs, server_of(handles.library))
    assert handles.made == 0


@pytest.mark.proves("D5", "F72")
@in_child(OPENSSL_CONF=TLS_1_2)
async def test_a_server_never_chooses_less_than_tls_1_3(library: Library) -> None:
    """Where its system knows no better, its ServerHello is held back, and it says why; a client refuses one, too."""
    ours, theirs = memory_stream_pair()
    await ours.send_all(hello_of(ssl.TLSVersion.TLSv1_3))
    with pytest.raises(HandshakeError, match=r"the server chose TLS 1\.2, and TLS 1\.3 is the least"):
        await server_handshake(theirs, server_of(library))
    assert await ours.receive_some() == b""
    transports = memory_stream_pair()
    client, server = await both(
        partial(client_handshake, transports[0], client_of(library), policy=ANYBODY),
        partial(server_handshake, transports[1], server_of(library, minimum_tls="1.2")),
    )
    assert isinstance(client, HandshakeError)
    assert client.reason == "tls_version"
    assert isinstance(server, HandshakeError)


# Time.


@pytest.mark.proves("D20", "G16")
@in_child()
async def test_a_handshake_has_a_deadline(library: Library) -> None:
    """An absolute one: for silent peers and for those that send a byte now and then, on both sides, at every stage."""
    handles = Handles(library)
    hello = hello_of(ssl.TLSVersion.TLSv1_3)
    for is_client, words, delay_s in (
        (True, b"", 0),
        (True, b"\x16\x03\x03\x10\x00\x02\x00\x0f" + bytes(2000), 0.02),
        (False, b"", 0),
        (False, hello, 0.02),
        (False, hello, 0),
    ):
        ours, theirs = memory_stream_pair()
        await theirs.send_all(words)
        slow = ImpairedStream(ours, slice_bytes=1 if delay_s else 1 << 20, delay_s=delay_s)
        if is_client:
            shaking = partial(client_handshake, slow, client_of(handles.library), policy=ANYBODY, deadline_s=0.3)
        else:
            shaking = partial(server_handshake, slow, server_of(handles.library), deadline_s=0.3)
        started = trio.current_time()
        assert await reason_of(shaking) == "deadline"
        assert 0.3 <= trio.current_time() - started < 8 * 0.3
        assert handles.living == 0


@in_child(STANDIN_VERIFIER_DELAY_MS="3000")
async def test_a_verifier_that_hangs_holds_nobody_up(standin_only: Library) -> None:
    """Its thread is left to it, and cleans up when it is back; until then it is one thread, not a task."""
    await _leave_to_its_thread(standin_only)


@in_child(STANDIN_ATTESTER_DELAY_MS="3000")
async def test_an_attester_that_hangs_holds_nobody_up(standin_only: Library) -> None:
    """In the same way."""
    await _leave_to_its_thread(standin_only)


async def _leave_to_its_thread(library: Library) -> None:
    handles = Handles(library)
    await close(*await link(handles.library))
    before = open_descriptors()
    config = replace(ATTESTED, is_mutual=True)
    transports = memory_stream_pair()
    started = trio.current_time()
    client, server = await both(
        partial(client_handshake, transports[0], client_of(handles.library, config), policy=STANDIN, deadline_s=0.3),
        partial(server_handshake, transports[1], server_of(handles.library, config), policy=STANDIN, deadline_s=0.3),
    )
    assert isinstance(client, HandshakeError)
    assert isinstance(server, HandshakeError)
    assert client.reason == "deadline"
    assert trio.current_time() - started < 2.9
    with trio.fail_after(8 * 3):
        while handles.living or handles.made < 3 or open_descriptors() != before:  # noqa: ASYNC110 - a thread's doing
            await trio.sleep(0.05)


# Nothing is left behind.


@pytest.mark.proves("G2")
@in_child()
async def test_two_hundred_handshakes_leave_nothing_behind(library: Library) -> None:
    """Good ones and bad ones: no descriptor, no handle, no thread at work."""
    handles = Handles(library)
    plenty = FailureBudget(burst=1000, share=1000)
    settings = client_of(handles.library, budget=plenty), server_of(handles.library, budget=plenty)
    hello = hello_of(ssl.TLSVersion.TLSv1_3)[:-1]
    await close(*await link(handles.library))
    before = open_descriptors()
    for number in range(200):
        ours, theirs = memory_stream_pair()
        shakings = (
            partial(client_handshake, ours, settings[0], policy=ANYBODY),
            partial(server_handshake, theirs, settings[1]),
        )
        match number % 4:
            case 0:
                await close(*await link_over(handles.library, (ours, theirs)))
            case 1:
                await both(shakings[0], theirs.aclose)
            case 2:
                await ours.send_all(hello)
                await both(ours.aclose, shakings[1])
            case 3:
                cut = ImpairedStream(theirs, limit_bytes=300 + number)
                await close(*await both(shakings[0], partial(server_handshake, cut, settings[1])))
    gc.collect()
    assert handles.made > 200
    assert handles.living == 0
    assert open_descriptors() == before
    assert threading.active_count() < 6


@pytest.mark.proves("G16")
@in_child()
async def test_failures_cost_no_more_than_the_budget(library: Library) -> None:
    """10,000 failed handshakes, of strangers and of clients that hang up: a few megabytes at most."""
    handles = Handles(library)
    budget = FailureBudget(burst=40, recovery_s=1e9, reserve=0, share=40)
    settings = server_of(handles.library, budget=budget)
    hello = hello_of(ssl.TLSVersion.TLSv1_3)
    reasons = dict.fromkeys(("not_tls", "hung_up", "too_many_failures"), 0)

    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    before = 0
    for number in range(10_000):
        ours, theirs = memory_stream_pair()
        await ours.send_all(hello if number % 2 else b"no TLS at all")
        await ours.send_eof()
        reasons[await reason_of(partial(server_handshake, theirs, settings))] += 1
        if number == 10:
            before = resident_bytes()
    assert reasons == {"not_tls": 5000, "hung_up": 40, "too_many_failures": 4960}
    assert (budget.failed, budget.refused, handles.made, handles.living) == (40, 4960, 40, 0)
    assert resident_bytes() - before < 8 * 5_000_000
