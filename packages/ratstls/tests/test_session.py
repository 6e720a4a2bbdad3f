"""The life of a handle, beside a library made of Python that counts handles and knows nothing of TLS."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from ratstls._ffi import Callback, CData, ffi
from ratstls._layout import LAYOUTS
from ratstls._library import Library
from ratstls._plugins import Plugins
from ratstls._session import Session, _callback
from ratstls.config import SessionConfig
from ratstls.errors import AttestationRejected, ConfigError, HandshakeError, LoadError
from ratstls.evidence import Evidence
from ratstls.verdict import Verdict

CLIENT = SessionConfig(attester="nullattester", verifier="sgx_ecdsa", is_server=False)
SERVER = SessionConfig(attester="sgx_ecdsa", verifier="nullverifier", is_server=True)
YES, NO = Verdict(True, "accepted", "expected"), Verdict(False, "debug", "the enclave can be debugged")
INVALID, NO_HANDSHAKE = 0xFFFFFFFE, 0x907FFFFF
FAILED_HANDSHAKE = "rats_tls_negotiate failed"


class FakeLibrary:
    """Handles that receive what was transmitted, and evidence (of no kind) for as many certificates as there are."""

    global_log_level = 5

    def __init__(self) -> None:
        self.handles: dict[int, bytearray] = {}
        self.certificates = 1
        self.believes_callback = True
        self.starved: list[int] = []
        self.codes: dict[str, int] = {}
        self.during_negotiate: Callable[[], None] = lambda: None
        self._callback: Callback | None = None
        self._address: CData | None = None

    def rats_tls_init(self, _: CData, handle: CData, /) -> int:
        if "init" in self.codes:
            return self.codes["init"]
        number = 0x1000 + len(self.handles)
        self.handles[number] = bytearray()
        handle[0] = ffi.cast("rats_tls_handle", number)
        return 0

    def rats_tls_set_verification_callback(self, handle_address: CData, callback: Callback, /) -> int:
        self._of(handle_address[0])  # a handle itself has no such place
        self._callback = callback
        return 0

    def rats_tls_negotiate(self, handle: CData, _: int, /) -> int:
        self._of(handle)
        self.during_negotiate()
        evidence = ffi.new("char[]", 160)
        assert self._callback is not None
        accepted = [self._callback(evidence) for _ in range(self.certificates)]
        return self.codes.get("negotiate", 0 if all(accepted) or not self.believes_callback else NO_HANDSHAKE)

    def rats_tls_receive(self, handle: CData, buffer: CData, size: CData, /) -> int:
        waiting = self._of(handle)
        if not waiting:
            ffi.errno = errno.EAGAIN
            return INVALID
        taken = bytes(waiting[: size[0]])
        del waiting[: size[0]]
        ffi.memmove(buffer, taken, len(taken))
        size[0] = len(taken)
        return 0

    def rats_tls_transmit(self, handle: CData, buffer: CData, size: CData, /) -> int:
        if self._address is not None:
            assert buffer == self._address
        if self.starved:
            self._address, ffi.errno = buffer, self.starved.pop()
            return INVALID
        self._address = None
        self._of(handle).extend(bytes(ffi.buffer(buffer, size[0])))
        return 0

    def rats_tls_cleanup(self, handle: CData, /) -> int:
        del self.handles[int(ffi.cast("uintptr_t", handle))]
        return self.codes.get("cleanup", 0)

    def _of(self, handle: CData) -> bytearray:
        return self.handles[int(ffi.cast("uintptr_t", handle))]


@pytest.fixture
def fake() -> FakeLibrary:
    return FakeLibrary()


def session_of(fake: FakeLibrary, config: SessionConfig = CLIENT, verdict: Verdict = YES) -> Session:
    plugins = Plugins(
        Path("/opt"), ("openssl",), ("nullattester", "sgx_ecdsa"), ("nullverifier", "sgx_ecdsa"), ("openssl",)
    )
    return Session(
        Library(Path("/opt/lib.so"), LAYOUTS[240], plugins, fake, is_preflighted=False), config, lambda _: verdict
    )


def opened(fake: FakeLibrary) -> Session:
    session = session_of(fake)
    session.init()
    session.negotiate(0)
    return session


def receive(session: Session, limit: int = 1, room_bytes: int = 32_768) -> bytes:
    room = memoryview(bytearray(room_bytes))
    return bytes(room[: session.receive(room, limit)])


def test_bytes_go_through_an_open_session(fake: FakeLibrary) -> None:
    """In pieces of at most a record."""
    session = opened(fake)
    assert session.is_open
    assert session.evidence == Evidence("unknown")
    assert session.transmit(b"x" * 20_000)
    assert [len(receive(session)) for _ in range(2)] == [16_384, 3_616]
    assert (receive(session), session.errno) == (b"", errno.EAGAIN)


def test_several_pieces_are_received_at_once(fake: FakeLibrary) -> None:
    """As many as are wanted, as there is room for, or as there are, of which errno tells."""
    session = opened(fake)
    assert session.transmit(b"x" * 80_000)
    assert (len(receive(session, 2, 100_000)), session.errno) == (32_768, 0)
    assert (len(receive(session, 9, 20_000)), session.errno) == (20_000, 0)
    assert (len(receive(session, 9, 100_000)), session.errno) == (27_232, errno.EAGAIN)


def test_a_missing_plug_in_never_reaches_the_library(fake: FakeLibrary) -> None:
    """Its answer would be a number."""
    session = session_of(fake, replace(CLIENT, verifier="tdx_ecdsa"))
    with pytest.raises(ConfigError, match="there is no verifier 'tdx_ecdsa'"):
        session.init()
    assert fake.handles == {}


def test_a_failed_init_leaves_nothing_to_clean_up(fake: FakeLibrary) -> None:
    """The library has freed the handle that it did not return."""
    fake.codes["init"] = INVALID
    session = session_of(fake)
    with pytest.raises(ConfigError):
        session.init()
    session.cleanup()


@pytest.mark.parametrize("verdict", [YES, NO])
def test_a_failed_handshake_is_an_error_whatever_the_judge_said(fake: FakeLibrary, verdict: Verdict) -> None:
    """A no explains it."""
    fake.codes["negotiate"] = NO_HANDSHAKE
    session = session_of(fake, verdict=verdict)
    session.init()
    expected, text = (HandshakeError, FAILED_HANDSHAKE) if verdict.accepted else (AttestationRejected, "debugged")
    with pytest.raises(expected, match=text) as caught:
        session.negotiate(0)
    assert type(caught.value) is expected
    assert caught.value.code is not None
    session.cleanup()
    assert fake.handles == {}


@pytest.mark.proves("D3")
def test_a_no_stands_even_if_the_library_goes_on(fake: FakeLibrary) -> None:
    """There is no session without the judge's yes."""
    fake.believes_callback = False
    session = session_of(fake, verdict=NO)
    session.init()
    with pytest.raises(AttestationRejected, match=r"\(debug\): the enclave can be debugged") as caught:
        session.negotiate(0)
    assert (caught.value.reason, caught.value.code) == ("debug", None)
    assert (session.is_open, session.evidence) == (False, None)


@pytest.mark.proves("D3")
def test_a_peer_that_nobody_judged_is_refused(fake: FakeLibrary) -> None:
    """One path of the library takes an error for a yes."""
    fake.certificates = 0
    session = session_of(fake)
    session.init()
    with pytest.raises(AttestationRejected, match="accepted the peer without asking") as caught:
        session.negotiate(0)
    assert caught.value.reason == "not_judged"
    assert not session.is_open


def test_a_server_judges_nobody(fake: FakeLibrary) -> None:
    """Unless it is mutual."""
    fake.certificates = 0
    session = session_of(fake, SERVER)
    session.init()
    session.negotiate(0)
    assert session.is_open


@pytest.mark.proves("D3")
def test_the_first_no_stands(fake: FakeLibrary) -> None:
    """A chain of certificates asks again."""
    fake.certificates, fake.believes_callback = 3, False
    verdicts = [YES, NO, YES]  # asked from the end
    session = session_of(fake)
    session._judge = lambda _: verdicts.pop()
    session.init()
    with pytest.raises(AttestationRejected):
        session.negotiate(0)
    assert verdicts == [YES]
    assert session.evidence is None


@pytest.mark.proves("D3")
@pytest.mark.parametrize("error", [LookupError("no policy"), KeyboardInterrupt(), SystemExit(3)])
@pytest.mark.parametrize("believes_callback", [True, False])
def test_what_the_judge_raises_comes_out(fake: FakeLibrary, error: BaseException, *, believes_callback: bool) -> None:
    """And counts as a no."""

    def judge(_: Evidence) -> Verdict:
        raise error

    fake.believes_callback = believes_callback
    session = session_of(fake)
    session._judge = judge
    session.init()
    with pytest.raises(type(error)) as caught:
        session.negotiate(0)
    assert caught.value is error
    assert not session.is_open


@pytest.mark.proves("D3")
def test_evidence_outside_a_handshake_is_refused(fake: FakeLibrary) -> None:
    """There is nobody to ask."""
    opened(fake)
    assert fake._callback is not None
    assert fake._callback(ffi.new("char[]", 160)) == 0


def test_where_there_can_be_no_callback_there_is_no_session(fake: FakeLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one the library would accept everybody."""

    def refuse(_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("ctypes.CFUNCTYPE", lambda *_: refuse)
    _callback.cache_clear()
    with pytest.raises(LoadError, match="lets no process make callbacks"):
        session_of(fake).init()
    assert fake.handles == {}


def test_sending_is_repeated_with_the_same_bytes(fake: FakeLibrary) -> None:
    """The library keeps their address; the same object has it still, and others must wait."""
    session, data = opened(fake), b"half-sent"
    fake.starved = [errno.EINTR, errno.EAGAIN]
    assert (session.transmit(data), session.errno) == (False, errno.EAGAIN)
    with pytest.raises(ValueError, match="other bytes are still half-sent"):
        session.transmit(b"other")
    assert (session.transmit(data), session.errno) == (False, errno.EINTR)
    assert session.transmit(data)
    assert session.transmit(b" and whole")
    assert receive(session) == b"half-sent and whole"


def test_no_bytes_are_sent_without_the_library(fake: FakeLibrary) -> None:
    """It would call them an error."""
    session = opened(fake)
    assert session.transmit(b"")
    assert receive(session) == b""


def test_too_many_bytes_at_once_are_refused(fake: FakeLibrary) -> None:
    """The library would cut their number down."""
    session = opened(fake)
    assert session.transmit(bytes(1 << 24))
    with pytest.raises(ValueError, match="16777217 bytes at once are too many"):
        session.transmit(bytes((1 << 24) + 1))


def test_calls_out_of_order_never_reach_the_library(fake: FakeLibrary) -> None:
    """Each says what the session's state is."""
    session = session_of(fake)
    with pytest.raises(RuntimeError, match="has no handle yet"):
        session.negotiate(0)
    session.init()
    for call in (session.init, lambda: receive(session), lambda: session.transmit(b"x")):
        with pytest.raises(RuntimeError, match="has negotiated nothing yet"):
            call()
    session.negotiate(0)
    with pytest.raises(RuntimeError, match="is open"):
        session.negotiate(0)
    session.cleanup()
    for call in (session.init, lambda: receive(session), lambda: session.transmit(b"x")):
        with pytest.raises(RuntimeError, match="is cleaned up"):
            call()


def test_a_failed_session_can_only_be_cleaned_up(fake: FakeLibrary) -> None:
    """A second attempt would start a second handshake on the same handle."""
    fake.codes["negotiate"] = NO_HANDSHAKE
    session = session_of(fake)
    session.init()
    with pytest.raises(HandshakeError):
        session.negotiate(0)
    with pytest.raises(RuntimeError, match="has failed to negotiate"):
        session.negotiate(0)
    session.cleanup()
    assert fake.handles == {}


def test_a_handle_is_cleaned_up_once(fake: FakeLibrary) -> None:
    """The fake library would not find it a second time, and the real one would free its memory again."""
    session = opened(fake)
    for _ in range(3):
        session.cleanup()
    assert fake.handles == {}
    assert not session.is_open


def test_a_session_that_never_began_has_nothing_to_clean_up(fake: FakeLibrary) -> None:
    """And cannot begin after."""
    session = session_of(fake)
    session.cleanup()
    with pytest.raises(RuntimeError, match="is cleaned up"):
        session.init()


def test_a_cleanup_that_fails_is_logged(fake: FakeLibrary, caplog: pytest.LogCaptureFixture) -> None:
    """Nobody could do anything else about it; it is not tried again."""
    session = opened(fake)
    fake.codes["cleanup"] = INVALID
    session.cleanup()
    session.cleanup()
    assert [record.message.split(" (")[0] for record in caplog.records] == [
        "some memory is lost: rats_tls_cleanup failed"
    ]


def test_a_second_thread_is_kept_out(fake: FakeLibrary) -> None:
    """While one negotiates, nobody else may enter, not even to clean up."""
    session, refusals = session_of(fake), []

    def intrude() -> None:
        for call in (session.cleanup, lambda: receive(session), lambda: session.negotiate(0), session.init):
            with pytest.raises(RuntimeError, match="two threads use one RATS-TLS session at once"):
                call()
            refusals.append(call)

    def during() -> None:
        thread = threading.Thread(target=intrude)
        thread.start()
        thread.join()

    session.init()
    fake.during_negotiate = during
    session.negotiate(0)
    assert len(refusals) == 4
    assert session.is_open
