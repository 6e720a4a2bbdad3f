"""Reading endings from outside, beside sessions made of Python that say what a library might."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from typing import cast

import pytest
from ratstls._engine import CIPHERTEXT_BYTES, Engine
from ratstls._session import Session
from ratstls.errors import SessionBroken, Truncated

AGAIN, NOTHING = errno.EAGAIN, 0


class Scripted:
    """A session whose receives follow a script: bytes that arrived, an errno, or bytes it writes, with errno 0."""

    def __init__(self, *script: bytes | int | tuple[bytes], goodbye: bytes = b"bye") -> None:
        self.errno = 0
        self.fd = -1
        self.refuses = 0
        self.sent: list[bytes] = []
        self._script = iter(script)
        self._goodbye = goodbye

    def receive(self, room: memoryview, _: int) -> int:
        said = next(self._script)
        self.errno = NOTHING
        if isinstance(said, bytes):
            room[: len(said)] = said
            return len(said)
        if isinstance(said, tuple):
            os.write(self.fd, said[0])
        self.errno = said if isinstance(said, int) else NOTHING
        return 0

    def transmit(self, data: bytes) -> bool:
        os.write(self.fd, data)
        self.sent.append(data)
        self.refuses -= 1
        return self.refuses < 0

    def cleanup(self) -> None:
        os.write(self.fd, self._goodbye)


@pytest.fixture
def engines() -> Iterator[list[Engine]]:
    made: list[Engine] = []
    yield made
    for engine in made:
        engine.free()


def engine_of(engines: list[Engine], session: Scripted) -> Engine:
    engine = Engine(cast(Session, session))
    engines.append(engine)
    session.fd = engine.library_fd
    engine.open()
    return engine


def read(engine: Engine) -> bytes | None:
    room = memoryview(bytearray(65_536))
    count = engine.read(room)
    return None if count is None else bytes(room[:count])


def test_an_errno_that_is_left_over_ends_nothing(engines: list[Engine]) -> None:
    """What is no error the second time was none."""
    engine = engine_of(engines, Scripted(NOTHING, AGAIN, NOTHING, b"data", AGAIN))
    assert (read(engine), engine.is_starved) == (None, True)
    engine.feed(b"more")
    assert read(engine) == b"data"


def test_a_library_that_starves_is_not_asked_again_before_there_is_more(engines: list[Engine]) -> None:
    """It would say the same."""
    engine = engine_of(engines, Scripted(AGAIN, b"data"))
    assert [read(engine) for _ in range(3)] == [None] * 3
    engine.feed(b"more")
    assert (read(engine), engine.is_starved) == (b"data", False)


def test_what_is_moved_into_the_inlet_reaches_the_library(engines: list[Engine]) -> None:
    """It is asked again then."""
    session = Scripted(AGAIN, b"data")
    engine = engine_of(engines, session)
    assert (read(engine), engine.is_starved) == (None, True)
    engine.note_moved()
    os.write(engine.inlet, b"moved")
    assert os.read(session.fd, 100) == b"moved"
    assert (read(engine), engine.is_starved) == (b"data", False)


def test_a_session_that_ends_twice_and_says_goodbye_has_ended_well(engines: list[Engine]) -> None:
    """The goodbye is to be sent."""
    engine = engine_of(engines, Scripted(b"data", NOTHING, NOTHING))
    assert [read(engine) for _ in range(3)] == [b"data", b"", b""]
    assert engine.take() == b"bye"


def test_a_session_that_ends_without_a_goodbye_was_told_of_an_error(engines: list[Engine]) -> None:
    """As the library does after a fatal alert."""
    engine = engine_of(engines, Scripted(NOTHING, NOTHING, goodbye=b""))
    for _ in range(2):
        with pytest.raises(SessionBroken, match="reported a fatal error"):
            read(engine)


def test_a_session_that_writes_as_it_ends_was_damaged(engines: list[Engine]) -> None:
    """Also where that shows the second time; what it wrote is to be sent, before the goodbye."""
    for script in ((b"data", (b"alert",)), (b"data", NOTHING, (b"alert",))):
        engine = engine_of(engines, Scripted(*script, goodbye=b""))
        assert read(engine) == b"data"
        with pytest.raises(SessionBroken, match="damaged or forged"):
            read(engine)
        assert engine.take() == b"alert"


def test_the_end_of_the_network_is_truncation_once_all_is_read(engines: list[Engine]) -> None:
    """The first ending counts."""
    engine = engine_of(engines, Scripted(b"data", AGAIN))
    engine.feed(b"")
    assert read(engine) == b"data"
    for _ in range(2):
        with pytest.raises(Truncated):
            read(engine)
        engine.end(SessionBroken("too late"))


@pytest.mark.proves("D10")
def test_an_end_that_the_library_saw_is_never_a_goodbye(engines: list[Engine]) -> None:
    """Of this one a library might make a goodbye, and some versions of OpenSSL do."""
    engine = engine_of(engines, Scripted(b"data", NOTHING))
    engine.hang_up()
    assert read(engine) == b"data"
    with pytest.raises(Truncated, match="ended with the handshake"):
        read(engine)


def test_more_than_there_is_room_for_waits(engines: list[Engine]) -> None:
    """It is handed on bit by bit, in order."""
    session = Scripted()
    engine = engine_of(engines, session)
    sent, read = os.urandom(1_000_000), b""
    engine.feed(sent)
    engine.push()
    waited = 0
    while engine.has_unread:
        waited += engine.has_unfed
        read += os.read(session.fd, CIPHERTEXT_BYTES)
        engine.push()
    assert read == sent
    assert waited > 2


def test_a_library_that_starves_is_asked_again_while_there_is_more_for_it(engines: list[Engine]) -> None:
    """What there was no room for, it has not seen."""
    engine = engine_of(engines, Scripted(AGAIN, AGAIN, b"data"))
    engine.feed(bytes(1_000_000))
    assert read(engine) == b"data"


def test_a_send_is_repeated_until_all_is_taken(engines: list[Engine]) -> None:
    """What was written in between makes room, and is kept in order."""
    session = Scripted()
    engine = engine_of(engines, session)
    session.refuses = 2
    engine.write(b"data")
    assert session.sent == [b"data"] * 3
    assert engine.take() == b"data" * 3
    assert engine.take() == b""


def test_a_send_for_which_nothing_is_written_has_failed(engines: list[Engine]) -> None:
    """There is nothing whose sending would make room for more."""
    session = Scripted()
    engine = engine_of(engines, session)
    session.refuses = 1
    with pytest.raises(SessionBroken, match="ended with an error"):
        engine.write(b"")


def test_much_that_was_written_is_collected_whole(engines: list[Engine]) -> None:
    """However many reads it takes."""
    session = Scripted()
    engine = engine_of(engines, session)
    written = os.urandom(2 * CIPHERTEXT_BYTES)
    os.write(session.fd, written[:CIPHERTEXT_BYTES])
    os.write(session.fd, written[CIPHERTEXT_BYTES:])
    assert engine.collect() == len(written)
    assert engine.take() == written


def test_an_engine_is_freed_once(engines: list[Engine]) -> None:
    """It says how long the goodbye is, and then nothing; nothing can be sent any more."""
    engine = engine_of(engines, Scripted())
    assert (engine.free(), engine.free()) == (3, 0)
    with pytest.raises(SessionBroken, match="the peer has ended the session"):
        engine.write(b"data")
