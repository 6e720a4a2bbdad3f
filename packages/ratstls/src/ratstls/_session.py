"""One handle of the library: from its making, over the handshake and the bytes, to its end. Waits for nobody but C.

Invariants, each broken at the price of memory corruption:

1. No two threads are inside one handle at once. Handing it from one to another is fine.
2. A handle is cleaned up exactly once, and not used after.
3. Pointers that C keeps, to the callback and to a half-sent buffer, stay valid as long as it keeps them.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import logging
import signal
import threading
from collections.abc import Callable
from enum import Enum

from ratstls._ffi import CData, ffi
from ratstls._layout import make_conf, read_evidence
from ratstls._library import Library
from ratstls.config import SessionConfig
from ratstls.errors import AttestationRejected, LoadError, error_from
from ratstls.evidence import Evidence
from ratstls.verdict import Verdict

Buffer = bytes | bytearray | memoryview
_logger = logging.getLogger(__name__)
RECEIVE_BYTES = 16_384  # a TLS record, and the library never delivers more than one
TRANSMIT_LIMIT_BYTES = 1 << 24  # ours; the library casts the size to a C int
STARVED = frozenset({errno.EAGAIN, errno.EWOULDBLOCK, errno.EINTR})

# gen_cert.c registers an object identifier by looking first and adding then, process-wide.
_one_init_at_a_time = threading.Lock()
_thread = threading.local()
Judge = Callable[[Evidence], Verdict]


class _State(Enum):
    NEW = "has no handle yet"
    READY = "has negotiated nothing yet"
    OPEN = "is open"
    FAILED = "has failed to negotiate"
    FREED = "is cleaned up"


class Session:
    """A handle and its life: :meth:`init`, :meth:`negotiate`, :meth:`receive` and :meth:`transmit`, :meth:`cleanup`.

    *judge* gets the peer's evidence during ``negotiate``, on its thread, and is asked on the verifying side only. What
    it raises counts as a no, and comes out of ``negotiate``. Without its yes there is no session.

    Calls out of order, or from two threads at once, raise RuntimeError before C is reached.
    """

    def __init__(self, library: Library, config: SessionConfig, judge: Judge) -> None:
        self.evidence: Evidence | None = None
        self.errno = 0
        self._library = library
        self._lib = library.lib
        self._config = config
        self._judge = judge
        self._verdict: Verdict | None = None
        self._judge_error: BaseException | None = None
        self._state = _State.NEW
        self._inside = threading.Lock()
        self._handle = ffi.new("rats_tls_handle *")
        self._size = ffi.new("size_t *")
        self._half_sent: tuple[Buffer, CData] | None = None

    @property
    def is_open(self) -> bool:
        """The handshake is done, and the handle is not yet cleaned up."""
        return self._state is _State.OPEN

    def init(self) -> None:
        """Make the handle: keys, and evidence if this side attests, which may take seconds: call it in a worker thread.

        Raises:
            LoadError: this process can have no callbacks.
            ConfigError: a plug-in is missing or does not work here, or this build cannot do what is asked.
            EvidenceError: this machine could not produce evidence.
        """
        self._enter(_State.NEW)
        try:
            callback, _ = _callback()
            self._library.plugins.require(self._config)
            self._library.rehearse(self._config)
            conf, kept = make_conf(self._config, self._library.layout)
            with _one_init_at_a_time:
                code = self._lib.rats_tls_init(conf, self._handle)
            del kept  # the library has cloned what the configuration points to
            if code != 0:
                raise error_from("rats_tls_init", code)
            self._state = _State.READY
            self._lib.rats_tls_set_verification_callback(self._handle, callback)
        finally:
            self._inside.release()

    def negotiate(self, fd: int) -> None:
        """Shake hands over *fd*, which must block, have no time limit, and stay open: it remains the caller's.

        Blocks until the peers have come to terms or one gives up; shut the connection down to end it. There is no
        second attempt: after a failure only :meth:`cleanup` is left. Afterwards ``evidence`` is the peer's, if judged.

        Raises:
            AttestationRejected: the judge said no, or was never asked although this side verifies.
            HandshakeError: anything else went wrong; the library does not say what.
        """
        self._enter(_State.READY)
        try:
            self._state = _State.FAILED
            # A signal's handler would interrupt the system call, which the library takes for the end of the handshake.
            blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            _thread.session = self
            try:
                code = self._lib.rats_tls_negotiate(self._handle[0], fd)
            finally:
                _thread.session = None
                signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            self._conclude(code)
            self._state = _State.OPEN
        finally:
            self._inside.release()

    def receive(self, room: memoryview, limit: int = 1) -> int:
        """Put up to *limit* pieces, of up to 16,384 bytes each, into *room*, and return how many bytes they have.

        Fewer pieces leave the reason in ``errno``, none at all included. One in ``STARVED`` means: later. Any other
        means that the session ended, well or badly; the library does not tell which. Blocks if the descriptor does.
        """
        self._enter(_State.OPEN)
        try:
            receive, handle, size = self._lib.rats_tls_receive, self._handle[0], self._size
            at, left = ffi.from_buffer(room), len(room)
            self.errno = ffi.errno = 0
            while limit and left:
                limit -= 1
                size[0] = min(RECEIVE_BYTES, left)
                if receive(handle, at, size):
                    self.errno = ffi.errno
                    break
                received = size[0]
                at += received
                left -= received
            return len(room) - left
        finally:
            self._inside.release()

    def transmit(self, data: Buffer) -> bool:
        """Send all of *data* and return True, or return False with the reason in ``errno``.

        After an ``errno`` in ``STARVED`` some of it is on its way: call again with the same object until it is sent.
        Any other means that nothing can be sent any more.

        Raises:
            ValueError: *data* is longer than 16 MiB, or something else is still half-sent.
        """
        if not data:
            return True  # the library would call this an error
        if len(data) > TRANSMIT_LIMIT_BYTES:
            raise ValueError(f"{len(data)} bytes at once are too many: send at most {TRANSMIT_LIMIT_BYTES}")
        self._enter(_State.OPEN)
        try:
            if self._half_sent is None:
                self._half_sent = data, ffi.from_buffer(data)
            elif self._half_sent[0] is not data:
                raise ValueError("other bytes are still half-sent: repeat those first")
            self._size[0] = len(data)
            ffi.errno = 0
            if self._lib.rats_tls_transmit(self._handle[0], self._half_sent[1], self._size) == 0:
                self._half_sent = None
                return True
            self.errno = ffi.errno
            return False
        finally:
            self._inside.release()

    def cleanup(self) -> None:
        """Say goodbye to the peer, if there is anyone to say it to, and free the handle. Quiet when that is done.

        After a failed handshake the library keeps some memory for good, about 68 kB on a server.
        """
        self._enter(*_State)
        try:
            if self._state not in (_State.NEW, _State.FREED):
                self._state = _State.FREED
                code = self._lib.rats_tls_cleanup(self._handle[0])
                self._handle[0] = ffi.NULL
                if code != 0:
                    _logger.warning("some memory is lost: %s", error_from("rats_tls_cleanup", code))
            self._state = _State.FREED
            self._half_sent = None
        finally:
            self._inside.release()

    def _conclude(self, code: int) -> None:
        if self._judge_error is not None:
            raise self._judge_error
        error = error_from("rats_tls_negotiate", code) if code != 0 else None
        if self._verdict is not None and not self._verdict.accepted:
            raise AttestationRejected(
                self._verdict.reason,
                self._verdict.text,
                code=None if error is None else error.code,
                function="rats_tls_negotiate",
            )
        if error is not None:
            raise error
        if self._config.is_verifying and self._verdict is None:
            # In one path of un_negotiate.c an error code stands where 0 means refusal.
            raise AttestationRejected("not_judged", "the library accepted the peer without asking; report this build")

    def _judge_evidence(self, pointer: CData) -> bool:
        evidence = read_evidence(pointer, self._library.layout)
        # A chain of certificates asks more than once: the first no stands.
        if self._verdict is None or self._verdict.accepted:
            self._verdict = self._judge(evidence)
            self.evidence = evidence if self._verdict.accepted else None
        return self._verdict.accepted

    def _enter(self, *states: _State) -> None:
        """Keep others out until ``_inside`` is released. As a context manager this would cost more than the C call."""
        if not self._inside.acquire(blocking=False):
            raise RuntimeError("two threads use one RATS-TLS session at once, which the library does not survive")
        if self._state not in states:
            self._inside.release()
            raise RuntimeError(f"this RATS-TLS session {self._state.value}")


def _on_evidence(address: int | None) -> int:
    """Say yes or no to C, in which no exception may end: what it would take for the answer then is anybody's guess."""
    session: Session | None = getattr(_thread, "session", None)
    if session is None:
        return 0
    try:
        return int(session._judge_evidence(ffi.cast("void *", address or 0)))  # noqa: SLF001 - C has no room for a self
    except BaseException as error:  # noqa: BLE001 - raised out of negotiate
        session._judge_error = error  # noqa: SLF001 - as above
        return 0


@functools.cache
def _callback() -> tuple[CData, object]:
    """Return the one callback there is, as C sees it and what keeps it alive.

    It is ctypes' and not cffi's, which writes code into memory that must be executable at the same time: hardened
    systems refuse that, and libffi, behind ctypes, has other ways then.
    """
    try:
        kept = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(_on_evidence)
    except MemoryError as error:
        raise LoadError(
            "this system lets no process make callbacks: allow it memfd_create, or memory that is both writable and"
            " executable (MemoryDenyWriteExecute=no)"
        ) from error
    return ffi.cast("rats_tls_callback_t", ctypes.cast(kept, ctypes.c_void_p).value or 0), kept
