"""Attested sides of links: what is checked before the first one, what comes of a handshake, and what is warned of.

Each test that loads the stand-in runs in a process of its own.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import enlink.attested
import pytest
import standin
import trio
from enlink.attestation import Attestation
from enlink.attested import AttestedSide, AttestedStream, Image, allows_debug, prepare
from enlink.errors import ConfigError, EngError, Unavailable
from enlink.link import LinkEnded
from in_child import in_child
from links import both
from ratstls._library import Library
from standin import Installation
from trio.testing import MockClock, memory_stream_pair

POLICY = f'evidence = "sgx_ecdsa"\nmax_link_age = "90s"\n[[accept]]\nmr_enclave = "{"11" * 32}"\n'
OTHERS = f'evidence = "sgx_ecdsa"\n[[accept]]\nmr_enclave = "{"22" * 32}"\n'
JUDGING = Attestation(attester="nullattester", verifier="sgx_ecdsa", policy="p")
ATTESTING = Attestation(attester="sgx_ecdsa", verifier="sgx_ecdsa")
MUTUAL = replace(JUDGING, attester="sgx_ecdsa", is_mutual=True)
WAIVED = Attestation(attester="nullattester", verifier="nullverifier", is_waived=True)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Installation:
    return Installation(standin.build(tmp_path_factory.mktemp("native") / "rats-tls"))


@contextmanager
def policy_file(text: str = POLICY) -> Iterator[str]:
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(text)
        file.flush()
        yield file.name


async def prepared(attestation: Attestation, text: str = POLICY, **options: Any) -> AttestedSide:
    with policy_file(text) as policy:
        side = await prepare(replace(attestation, policy=attestation.policy and policy), **options)
    assert side is not None
    return side


async def shake_hands(client: AttestedSide, server: AttestedSide) -> tuple[Any, Any]:
    ours, theirs = memory_stream_pair()
    return await both(partial(client.shake_hands, ours), partial(server.shake_hands, theirs))


# Handshakes.


@in_child()
async def test_the_client_judges_and_the_server_attests(library: Library) -> None:
    client = await prepared(JUDGING, side="client")
    server = await prepared(ATTESTING, side="server")
    assert str(client).startswith("does not attest; accepts sgx_ecdsa: MRENCLAVE 11111111")
    assert str(server) == "attests with sgx_ecdsa; judges nobody"
    assert (client.max_link_age_s, server.max_link_age_s) == (90, math.inf)
    ours, theirs = await shake_hands(client, server)
    assert (type(ours), type(theirs)) == (AttestedStream, AttestedStream)
    assert f"mr_enclave={'11' * 32}" in ours.evidence
    assert theirs.evidence == "was not asked"
    await ours.stream.send_all(b"a packet")
    assert await theirs.stream.receive_some() == b"a packet"
    await both(ours.stream.aclose, theirs.stream.aclose)


@in_child()
async def test_in_mutual_mode_both_judge(library: Library) -> None:
    client, server = await prepared(MUTUAL, side="client"), await prepared(MUTUAL, side="server")
    assert str(server).startswith("attests with sgx_ecdsa; accepts sgx_ecdsa: MRENCLAVE 11111111")
    ours, theirs = await shake_hands(client, server)
    assert "accepted" in ours.evidence
    assert "accepted" in theirs.evidence
    await both(ours.stream.aclose, theirs.stream.aclose)


@in_child()
async def test_who_is_not_accepted_gets_no_link_and_its_connection_is_closed(library: Library) -> None:
    ours, theirs = memory_stream_pair()
    client = await prepared(JUDGING, OTHERS, side="client")
    server = await prepared(ATTESTING, side="server")
    refusal, refused = await both(partial(client.shake_hands, ours), partial(server.shake_hands, theirs))
    assert isinstance(refusal, LinkEnded)
    assert refusal.reason == "mrenclave"
    assert "11" * 32 in str(refusal)
    assert isinstance(refused, LinkEnded)
    assert refused.reason in {"refused", "hung_up", "handshake"}
    for stream in (ours, theirs):
        with pytest.raises(trio.ClosedResourceError):
            await stream.send_all(b"x")


@in_child()
async def test_a_silent_peer_is_given_up_at_the_deadline(library: Library) -> None:
    """Ten seconds, here a twentieth of one: nothing that it says by the byte makes it longer."""
    assert enlink.attested.HANDSHAKE_DEADLINE_S == 10
    vars(enlink.attested)["HANDSHAKE_DEADLINE_S"] = 0.05
    server = await prepared(ATTESTING, side="server")
    with pytest.raises(LinkEnded, match="too slow, or silent") as ended:
        await server.shake_hands(memory_stream_pair()[1])
    assert ended.value.reason == "deadline"


@in_child()
async def test_evidence_that_cannot_be_made_any_more_ends_one_handshake(library: Library) -> None:
    client, server = await prepared(JUDGING, side="client"), await prepared(ATTESTING, side="server")
    os.environ["STANDIN_ATTESTER"] = "fails"
    _, failure = await shake_hands(client, server)
    assert isinstance(failure, LinkEnded)
    assert failure.reason == "handshake"
    assert "could not produce evidence" in str(failure)
    del os.environ["STANDIN_ATTESTER"]
    ours, theirs = await shake_hands(client, server)
    await both(ours.stream.aclose, theirs.stream.aclose)


@in_child()
async def test_a_lack_of_descriptors_ends_one_handshake(library: Library) -> None:
    import ratstls.handshake

    def refuse(_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    server = await prepared(ATTESTING, side="server")
    client = await prepared(JUDGING, side="client")
    names = vars(ratstls.handshake)
    engine, names["Engine"] = names["Engine"], refuse
    with pytest.raises(LinkEnded, match="Too many open files") as ended:
        await client.shake_hands(memory_stream_pair()[0])
    assert ended.value.reason == "resources"
    names["Engine"] = engine
    ours, theirs = await shake_hands(client, server)
    await both(ours.stream.aclose, theirs.stream.aclose)


@in_child()
async def test_a_lack_of_threads_ends_one_handshake(library: Library) -> None:
    """Of handshakes there may be many at once, and of a service's tasks few."""

    async def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("can't start new thread")

    server = await prepared(ATTESTING, side="server")
    client = await prepared(JUDGING, side="client")
    names = vars(trio.to_thread)
    run_sync, names["run_sync"] = names["run_sync"], refuse
    with pytest.raises(LinkEnded, match="can't start new thread") as ended:
        await client.shake_hands(memory_stream_pair()[0])
    assert ended.value.reason == "resources"
    names["run_sync"] = run_sync
    ours, theirs = await shake_hands(client, server)
    await both(ours.stream.aclose, theirs.stream.aclose)


# Warnings.


@pytest.mark.proves("D2")
@in_child()
def test_what_is_insecure_is_said_at_once_and_every_minute(library: Library) -> None:
    assert warnings_of(WAIVED, "client")[0] == [0, 60, 120]
    any_measurement = replace(JUDGING, policy=None, accepts_any_measurement=True)
    assert warnings_of(any_measurement, "client")[0] == [0, 60, 120]
    times, texts = warnings_of(WAIVED, "server")
    assert times == [0, 60, 120]
    assert texts == {"INSECURE, attester 'nullattester' proves nothing to the peer"}
    times, texts = warnings_of(JUDGING, "client", wire="original")
    assert times == [0, 60, 120]
    assert texts == {"--wire original: peers do not say whether they accept this side's evidence"}
    assert warnings_of(JUDGING, "client") == ([], set())


def warnings_of(attestation: Attestation, side: str, **options: Any) -> tuple[list[float], set[str]]:
    """Return when a side has warned in the first 150 seconds, and of what."""
    attested = trio.run(partial(prepared, attestation, side=side, **options))
    times: list[float] = []
    texts = set()

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            assert (record.levelno, record.getMessage()) == (logging.WARNING, "insecure")
            times.append(trio.current_time())
            texts.add(record.__dict__["fields"]["text"])

    async def main() -> None:
        began = trio.current_time()
        with trio.move_on_after(150):
            await attested.warn_for_ever()
        times[:] = sorted({round(time - began) for time in times})

    logger, ear = logging.getLogger("enlink.attested"), Ear()
    logger.propagate = False
    logger.addHandler(ear)
    trio.run(main, clock=MockClock(autojump_threshold=0))
    logger.removeHandler(ear)
    return times, texts


# What is checked first.


def test_plain_links_need_nothing() -> None:
    assert trio.run(partial(prepare, None, "client")) is None


@pytest.mark.proves("F70")
def test_without_the_package_attested_links_are_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ratstls", None)
    with pytest.raises(Unavailable, match=r"need the package eng-ratstls, .* pip install"):
        trio.run(partial(prepare, WAIVED, "client"))


@pytest.mark.proves("F70")
def test_without_the_library_attested_links_are_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RATSTLS_LIBRARY", "/nonexistent/librats_tls.so")
    with pytest.raises(Unavailable, match="there is no librats_tls at /nonexistent"):
        trio.run(partial(prepare, WAIVED, "client"))


@pytest.mark.proves("D1", "D2")
@pytest.mark.parametrize(
    ("attestation", "text", "message"),
    [
        (JUDGING, "evidence = 7", "policy /.*evidence"),
        (JUDGING, 'evidence = "csv"\n[[accept]]\nmeasurement = "' + "11" * 32 + '"', "csv"),
        (replace(JUDGING, verifier=""), POLICY, "is no plug-in's name"),
        (replace(JUDGING, verifier="nullverifier"), POLICY, "accepts any peer"),
    ],
)
def test_policies_and_plugins_that_do_not_fit_are_refused(attestation: Attestation, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        trio.run(partial(prepared, attestation, text, side="client"))


@pytest.mark.parametrize("content", [None, b"\xff"])
def test_a_policy_that_cannot_be_read_is_refused(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "policy.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match="cannot read the policy /"):
        trio.run(partial(prepare, replace(JUDGING, policy=str(file)), "client"))
    with pytest.raises(ConfigError, match="cannot read the policy /"):
        allows_debug(file)


@in_child(STANDIN_ATTESTER="fails")
async def test_a_side_that_cannot_attest_learns_it_before_the_first_peer_comes(library: Library) -> None:
    with pytest.raises(Unavailable, match="could not produce evidence"):
        await prepared(ATTESTING, side="server")
    assert str(await prepared(JUDGING, side="client")).startswith("does not attest")


def test_a_trial_judges_nobody() -> None:
    with pytest.raises(EngError, match="no peer"):
        enlink.attested._judge_nobody(None)


# In an enclave.


@pytest.mark.proves("D7", "G19")
@in_child()
async def test_an_images_policy_binds_and_a_command_line_can_only_tighten_it(library: Library) -> None:
    """Neither another policy nor what would waive it loosens what the image says."""
    with policy_file() as own, policy_file(POLICY.replace("90s", "30s")) as tighter, policy_file(OTHERS) as others:
        image = Image(library.path, Path(own), handshake_threads=2)
        loosened = replace(JUDGING, policy=None, accepts_any_measurement=True)
        for attestation, age_s in ((loosened, 90), (replace(JUDGING, policy=tighter), 30)):
            side = await prepare(attestation, "client", image=image)
            assert side is not None
            assert "MRENCLAVE 11111111" in str(side)
            assert side.max_link_age_s == age_s
        with pytest.raises(ConfigError):
            await prepare(replace(JUDGING, policy=others), "client", image=image)


def test_a_policy_tells_whether_it_allows_debug() -> None:
    with policy_file() as strict, policy_file("allow_debug = true\n" + POLICY) as lax:
        assert (allows_debug(Path(strict)), allows_debug(Path(lax))) == (False, True)
