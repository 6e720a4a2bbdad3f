"""Whatever happens to the bytes on their way: nothing but the peer's own goodbye is ever a clean end."""

from __future__ import annotations

import itertools
import os
import random
from dataclasses import dataclass, field
from functools import partial

import pytest
import trio
from enlink.testing.streams import ImpairedStream
from in_child import in_child
from links import ANYBODY, both, client_of, inject, intercept, link, read_to_end, records_in, server_of
from ratstls._library import Library
from ratstls.errors import HandshakeError, SessionBroken, Truncated
from ratstls.handshake import client_handshake, server_handshake
from ratstls.stream import RatsTlsStream
from trio.testing import memory_stream_pair

CUTS_TOGETHER = 16
MESSAGES = (b"first", b"the second, longer one", b"third")


async def recorded(
    library: Library, messages: tuple[bytes, ...], *, says_goodbye: bool = True, is_reversed: bool = False
) -> tuple[RatsTlsStream, list[bytes]]:
    """Return the receiving end of a link, and the records that it has not yet seen: one a message, and the goodbye."""
    sender, receiver = await link(library)
    if is_reversed:
        sender, receiver = receiver, sender
    taken = intercept(sender)
    for message in messages:
        await sender.send_all(message)
    if says_goodbye:
        await sender.aclose()
    else:
        await trio.aclose_forcefully(sender)
    return receiver, records_in(taken())[: len(messages) + says_goodbye]


@pytest.mark.proves("D10", "G18", "F72")
@in_child()
async def test_a_cut_at_any_byte_is_truncation(library: Library) -> None:
    """All whole messages before it are received, and not a byte more; only behind the goodbye is a cut harmless."""
    for cut in itertools.count():
        receiver, records = await recorded(library, MESSAGES, is_reversed=cut % 2 == 0)
        ciphertext = b"".join(records)
        inject(receiver, ciphertext[:cut])
        data, error = await read_to_end(receiver)
        whole = sum(cut >= len(b"".join(records[: number + 1])) for number in range(len(MESSAGES)))
        assert data == b"".join(MESSAGES[:whole])
        await receiver.aclose()
        if cut == len(ciphertext):
            assert error is None
            return
        assert type(error) is Truncated, cut


async def shake_hands_until_cut(library: Library, is_client_cut: bool, limit: int, survived: set[int]) -> None:
    """Shake hands over a connection that is cut after *limit* bytes of one side; a link must have *survived* that."""
    ours, theirs = memory_stream_pair()
    cut = ImpairedStream(theirs if is_client_cut else ours, limit_bytes=limit)
    client, server = await both(
        partial(client_handshake, ours if is_client_cut else cut, client_of(library), policy=ANYBODY),
        partial(server_handshake, cut if is_client_cut else theirs, server_of(library)),
    )
    hears_less, says_more = (server, client) if is_client_cut else (client, server)
    if isinstance(hears_less, RatsTlsStream):
        await trio.aclose_forcefully(client)
        await trio.aclose_forcefully(server)
        survived.add(limit)
        return
    assert isinstance(hears_less, HandshakeError), limit
    assert hears_less.reason == "hung_up"
    if isinstance(says_more, RatsTlsStream):
        assert isinstance((await read_to_end(says_more))[1], Truncated)
        await says_more.aclose()


@pytest.mark.proves("D10", "F72")
@in_child()
async def test_a_handshake_cut_at_any_byte_makes_no_link(library: Library) -> None:
    """Neither side gets a stream that it could take for good, until both have said yes."""
    for is_client_cut in (True, False):
        survived: set[int] = set()
        # Two handshakes differ in length by a few bytes: it is over when all of a run are through.
        for start in itertools.count(0, CUTS_TOGETHER):
            cuts = range(start, start + CUTS_TOGETHER)
            async with trio.open_nursery() as nursery:
                for limit in cuts:
                    nursery.start_soon(shake_hands_until_cut, library, is_client_cut, limit, survived)
            if survived.issuperset(cuts):
                break
        assert min(survived) > 300


@dataclass
class Damage:
    """One way to spoil a recorded session, chosen by chance; ``is_harmless`` if after all nothing is spoiled."""

    chance: random.Random
    records: list[bytes]
    others: list[bytes]
    name: str = field(init=False)

    def __post_init__(self) -> None:
        self.name = self.chance.choice([name for name in dir(self) if name.startswith("do_")])

    def apply(self) -> bytes:
        getattr(self, self.name)()
        return b"".join(self.records)

    @property
    def _place(self) -> int:
        return self.chance.randrange(len(self.records))

    def do_flip_a_bit(self) -> None:
        place = self._place
        record = bytearray(self.records[place])
        record[self.chance.randrange(len(record))] ^= 1 << self.chance.randrange(8)
        self.records[place] = bytes(record)

    def do_flip_a_bit_of_the_header(self) -> None:
        place = self._place
        record = bytearray(self.records[place])
        record[self.chance.randrange(5)] ^= 1 << self.chance.randrange(8)
        self.records[place] = bytes(record)

    def do_drop(self) -> None:
        del self.records[self._place]

    def do_repeat(self) -> None:
        place = self._place
        self.records.insert(place, self.records[place])

    def do_swap(self) -> None:
        place = self.chance.randrange(len(self.records) - 1)
        self.records[place : place + 2] = reversed(self.records[place : place + 2])

    def do_cut(self) -> None:
        place = self._place
        self.records[place:] = [self.records[place][: self.chance.randrange(len(self.records[place]))]]

    def do_inject_noise(self) -> None:
        self.records.insert(self._place, self.chance.randbytes(self.chance.randrange(1, 60)))

    def do_inject_a_record(self) -> None:
        noise = self.chance.randbytes(self.chance.randrange(1, 60))
        kind = self.chance.choice((20, 21, 22, 23, 24, 99))
        self.records.insert(self._place, bytes([kind, 3, 3]) + len(noise).to_bytes(2, "big") + noise)

    def do_inject_a_plaintext_goodbye(self) -> None:
        self.records.insert(self._place, b"\x15\x03\x03\x00\x02\x01\x00")

    def do_end_with_a_plaintext_goodbye(self) -> None:
        self.records[self._place :] = [b"\x15\x03\x03\x00\x02\x01\x00"]

    def do_inject_a_plaintext_alert(self) -> None:
        level, what = self.chance.choice((1, 2)), self.chance.randrange(256)
        self.records.insert(self._place, bytes([21, 3, 3, 0, 2, level, what]))

    def do_inject_a_change_of_cipher(self) -> None:
        self.records.insert(self._place, b"\x14\x03\x03\x00\x01\x01")

    def do_replay_another_session(self) -> None:
        self.records.insert(self._place, self.chance.choice(self.others))

    def do_end_with_another_sessions_goodbye(self) -> None:
        self.records[self._place :] = [self.others[-1]]


async def fuzz(library: Library, seed: int, count: int) -> None:
    chance = random.Random(seed)
    unused, others = await recorded(library, MESSAGES)
    await unused.aclose()
    seen = set()
    for _ in range(count):
        messages = tuple(chance.randbytes(chance.randrange(1, 200)) for _ in range(chance.randrange(1, 5)))
        says_goodbye = chance.random() < 0.7
        receiver, records = await recorded(
            library, messages, says_goodbye=says_goodbye, is_reversed=chance.random() < 0.5
        )
        if len(records) < 2:
            records.append(os.urandom(30))
        damage = Damage(chance, list(records), others)
        ciphertext, whole = damage.apply(), b"".join(records)
        others = records
        for start in range(0, len(ciphertext), 100):  # a piece at a time, as networks do
            inject(receiver, ciphertext[start : start + 100], is_last=False)
        inject(receiver, b"")
        data, error = await read_to_end(receiver)
        sent = b"".join(messages)
        assert sent.startswith(data), damage.name
        if error is None:
            assert says_goodbye, damage.name
            assert ciphertext.startswith(whole), damage.name
            assert data == sent, damage.name
        else:
            assert type(error) in (Truncated, SessionBroken), damage.name
        seen.add(damage.name)
        await receiver.aclose()
    assert len(seen) == 14


@pytest.mark.proves("F72")
@in_child()
async def test_no_damage_is_a_clean_end_first_thousand(library: Library) -> None:
    """1,000 sessions, each spoiled in one way: what is received is what was sent, up to the damage."""
    await fuzz(library, 1, 1000)


@pytest.mark.proves("F72")
@in_child()
async def test_no_damage_is_a_clean_end_second_thousand(library: Library) -> None:
    """1,000 others."""
    await fuzz(library, 2, 1000)


@pytest.mark.proves("F72")
@in_child()
async def test_damage_is_told_from_truncation_and_the_peer_is_told(library: Library) -> None:
    """The side that sees it says so, with what it sends next or its end; the other then hears of a fatal error."""
    client, server = await link(library)
    to_server, to_client = intercept(client), intercept(server)
    await client.send_all(b"true words")
    record = bytearray(to_server())
    record[-1] ^= 1
    inject(server, bytes(record), is_last=False)
    for _ in range(2):
        with pytest.raises(SessionBroken, match="damaged or forged bytes arrived"):
            await server.receive_some()
    with pytest.raises(SessionBroken, match="nothing can be sent any more"):
        await server.send_all(b"what?")
    # A send that failed has sent nothing, but nothing may follow it either.
    server._is_cut = False
    await server.aclose()
    (alert,) = records_in(to_client())
    inject(client, alert)
    for _ in range(2):
        with pytest.raises(SessionBroken, match="the peer reported a fatal error"):
            await client.receive_some()
    with pytest.raises(SessionBroken, match="the peer has ended the session"):
        await client.send_all(b"well")
    await client.aclose()
