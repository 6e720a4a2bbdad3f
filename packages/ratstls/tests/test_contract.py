"""What the binding counts on in librats_tls: shown on the stand-in always, and on the real library where there is one.

    RATSTLS_LIBRARY=/usr/local/lib/rats-tls/librats_tls.so.0 ./dev test packages/ratstls/tests/test_contract.py -v

Each promise runs in a process of its own, since a library that breaks it may end the process. The names in brackets say
which library ran.
"""

from __future__ import annotations

import errno
import functools
import itertools
import os
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from ratstls._ffi import ffi
from ratstls._layout import make_conf
from ratstls._library import Library, load
from ratstls._session import RECEIVE_BYTES, STARVED, Judge, Session
from ratstls.config import LogLevel, SessionConfig
from ratstls.errors import AttestationRejected, ConfigError, EvidenceError, HandshakeError, RatsTlsError
from ratstls.evidence import Evidence
from ratstls.verdict import Verdict

NATIVE = Path(__file__).parents[3] / "tests" / "native"
TLS_1_2 = {"OPENSSL_CONF": str(NATIVE / "tls_1_2.cnf")}
INVALID, UNUSABLE_WRAPPER = 0xFFFFFFFE, 0xFFFFFFF6
NO_HANDSHAKE = (0x907FFFFF, 0x90000000)
PLAIN_CLIENT = SessionConfig(
    attester="nullattester", verifier="nullverifier", is_server=False, is_attestation_waived=True
)
PLAIN_SERVER = replace(PLAIN_CLIENT, is_server=True)
CLIENT = SessionConfig(attester="nullattester", verifier="sgx_ecdsa", is_server=False)
SERVER = SessionConfig(attester="sgx_ecdsa", verifier="nullverifier", is_server=True)
MUTUAL_CLIENT = SessionConfig(attester="sgx_ecdsa", verifier="sgx_ecdsa", is_server=False, is_mutual=True)
MUTUAL_SERVER = replace(MUTUAL_CLIENT, is_server=True)


Promise = Callable[[Any], None]


def contract(
    environment: dict[str, str] | None = None, dies_of: signal.Signals | None = None, saying: str = ""
) -> Callable[[Promise], Callable[..., None]]:
    """Run a test in a child, which calls it with the loaded library; what counts is how the child ends."""

    def decorate(promise: Promise) -> Callable[..., None]:
        @functools.wraps(promise)
        def run(**installations: Any) -> None:
            (installation,) = installations.values()
            child = installation.run(__file__, promise.__name__, **(environment or {}))
            assert child.returncode == (-dies_of if dies_of else 0), child.stderr
            assert saying in child.stderr

        return run

    return decorate


@dataclass
class Recorder:
    """A judge that remembers."""

    accepted: bool = True
    seen: list[Evidence] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)

    def __call__(self, evidence: Evidence) -> Verdict:
        self.seen.append(evidence)
        self.threads.append(threading.get_ident())
        return Verdict(self.accepted, "accepted" if self.accepted else "debug", "as the test wants it")


@dataclass
class Ends:
    """Both ends of one session, or what became of it, with their sockets."""

    client: Session
    server: Session
    client_socket: socket.socket
    server_socket: socket.socket
    client_error: BaseException | None = None
    server_error: BaseException | None = None

    def set_blocking(self, is_blocking: bool) -> None:
        self.client_socket.setblocking(is_blocking)
        self.server_socket.setblocking(is_blocking)


def shake(
    library: Library,
    client: SessionConfig = PLAIN_CLIENT,
    server: SessionConfig = PLAIN_SERVER,
    *,
    judge: Judge | None = None,
    server_judge: Judge | None = None,
    sockets: tuple[socket.socket, socket.socket] | None = None,
) -> Ends:
    """Negotiate; the client here, the server in a thread."""
    client_socket, server_socket = sockets or socket.socketpair()
    ends = Ends(
        Session(library, client, judge or Recorder()),
        Session(library, server, server_judge or Recorder()),
        client_socket,
        server_socket,
    )
    ends.client.init()
    ends.server.init()

    def serve() -> None:
        try:
            ends.server.negotiate(server_socket.fileno())
        except (RatsTlsError, LookupError) as error:
            ends.server_error = error
            server_socket.shutdown(socket.SHUT_RDWR)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        ends.client.negotiate(client_socket.fileno())
    except (RatsTlsError, LookupError) as error:
        ends.client_error = error
        client_socket.shutdown(socket.SHUT_RDWR)
    thread.join()
    return ends


def opened(library: Library, client: SessionConfig = PLAIN_CLIENT, server: SessionConfig = PLAIN_SERVER) -> Ends:
    """A session whose handshake went well, the tickets that follow it consumed; no call on it blocks."""
    ends = shake(library, client, server)
    assert (ends.client_error, ends.server_error) == (None, None)
    ends.set_blocking(False)
    assert (receive(ends.client), ends.client.errno) == (b"", errno.EAGAIN)
    return ends


def raw_init(library: Library, config: SessionConfig = PLAIN_CLIENT, **words: tuple[int, str, Any]) -> tuple[int, Any]:
    """Call rats_tls_init with fields, as (offset, format, value), that the binding would never set."""
    conf, _ = make_conf(config, library.layout)
    for offset, form, value in words.values():
        struct.pack_into(form, ffi.buffer(conf), offset, value)
    handle = ffi.new("rats_tls_handle *")
    return library.lib.rats_tls_init(conf, handle), handle


def receive(session: Session) -> bytes:
    """Receive one piece."""
    room = memoryview(bytearray(RECEIVE_BYTES))
    return bytes(room[: session.receive(room)])


def raw_receive(library: Library, session: Session, size: int) -> tuple[int, bytes, int]:
    """Receive with a buffer of *size*: the code, what came, and what the size says afterwards."""
    buffer, length = ffi.new("char[]", max(size, 1)), ffi.new("size_t *", size)
    code = library.lib.rats_tls_receive(session._handle[0], buffer, length)
    return code, bytes(ffi.buffer(buffer, length[0])), length[0]


# What init says.


@contract()
def test_init_refuses_a_later_api(library: Library) -> None:
    """A binding for a later library would be told."""
    assert raw_init(library, api_version=(0, "=I", 2))[0] == INVALID
    assert raw_init(library, api_version=(0, "=I", 1))[0] == 0


@contract()
def test_init_tells_wrappers_from_attesters_and_verifiers(library: Library) -> None:
    """That much, and no more: which of the two it was, the binding must find out by itself."""
    for config, code in (
        (replace(PLAIN_CLIENT, attester="nobody"), INVALID),
        (replace(PLAIN_CLIENT, verifier="nobody"), INVALID),
        (replace(PLAIN_CLIENT, tls="nobody"), UNUSABLE_WRAPPER),
        (replace(PLAIN_CLIENT, crypto="nobody"), UNUSABLE_WRAPPER),
    ):
        assert raw_init(library, config)[0] == code, config


@contract()
def test_init_sets_the_level_of_the_process(library: Library) -> None:
    """The level is one for all sessions: the last one made decides."""
    assert library.lib.global_log_level == LogLevel.NONE
    assert raw_init(library, replace(PLAIN_CLIENT, log_level=LogLevel.FATAL))[0] == 0
    assert library.lib.global_log_level == LogLevel.FATAL
    assert raw_init(library)[0] == 0
    assert library.lib.global_log_level == LogLevel.NONE


@contract(environment={"RATS_TLS_GLOBAL_LOG_LEVEL": "fatal"})
def test_an_unknown_level_means_that_of_the_environment(library: Library) -> None:
    """Six and more are not levels."""
    assert raw_init(library, level=(16, "=i", 6))[0] == 0
    assert library.lib.global_log_level == LogLevel.FATAL


@contract()
def test_init_may_be_called_from_many_threads(library: Library) -> None:
    """Handles are apart from each other."""

    def work() -> None:
        for _ in range(20):
            session = Session(library, PLAIN_SERVER, Recorder())
            session.init()
            session.cleanup()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@contract()
def test_functions_refuse_a_null_handle(library: Library) -> None:
    """All but the setter of the callback, which would look through it."""
    lib, buffer, size = library.lib, ffi.new("char[]", 8), ffi.new("size_t *", 8)
    assert lib.rats_tls_negotiate(ffi.NULL, 0) == INVALID
    assert lib.rats_tls_receive(ffi.NULL, buffer, size) == INVALID
    assert lib.rats_tls_transmit(ffi.NULL, buffer, size) == INVALID
    assert lib.rats_tls_cleanup(ffi.NULL) == INVALID


@contract()
def test_negotiate_refuses_a_negative_descriptor(library: Library) -> None:
    """Before it sends anything anywhere."""
    code, handle = raw_init(library)
    assert code == 0
    assert library.lib.rats_tls_negotiate(handle[0], -1) == INVALID


# What negotiate says.


@contract()
def test_a_handshake_leaves_the_descriptor_to_its_owner(library: Library) -> None:
    """It is open before, during and after the session."""
    ends = opened(library)
    ends.client.cleanup()
    os.fstat(ends.client_socket.fileno())


def failure(library: Library, sent: bytes, config: SessionConfig = PLAIN_CLIENT) -> HandshakeError:
    ours, theirs = socket.socketpair()
    theirs.sendall(sent)
    theirs.shutdown(socket.SHUT_WR)
    session = Session(library, config, Recorder())
    session.init()
    with pytest.raises(HandshakeError) as caught:
        session.negotiate(ours.fileno())
    session.cleanup()
    return caught.value


@contract()
def test_a_failed_handshake_has_one_code_whatever_the_cause(library: Library) -> None:
    """The peer has gone, or speaks something else."""
    for sent, config in itertools.product((b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"), (PLAIN_CLIENT, PLAIN_SERVER)):
        error = failure(library, sent, config)
        assert error.code is not None
        assert error.code.raw in NO_HANDSHAKE
        assert error.function == "rats_tls_negotiate"


@contract()
def test_a_handshake_that_would_have_to_wait_fails(library: Library) -> None:
    """On a descriptor that does not block there is no handshake; asked again, the library begins another."""
    code, handle = raw_init(library)
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    hellos = []
    for _ in range(2):
        assert library.lib.rats_tls_negotiate(handle[0], ours.fileno()) == NO_HANDSHAKE[0]
        hellos.append(theirs.recv(4096))
    assert code == 0
    assert all(hello[:3] == b"\x16\x03\x01" and hello[5] == 1 for hello in hellos)
    assert hellos[0] != hellos[1]


@contract()
def test_a_time_limit_fails_a_handshake(library: Library) -> None:
    """The library takes its end for the end of the connection."""
    code, handle = raw_init(library)
    ours, _theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", 0, 50_000))
    assert (code, library.lib.rats_tls_negotiate(handle[0], ours.fileno())) == (0, NO_HANDSHAKE[0])


@contract()
def test_a_signal_does_not_fail_a_handshake(library: Library) -> None:
    """The binding keeps signals from the thread that negotiates, which would take them for the end."""
    signal.signal(signal.SIGALRM, lambda _, __: None)
    signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
    ours, theirs = socket.socketpair()
    session = Session(library, PLAIN_CLIENT, Recorder())
    session.init()
    started = time.monotonic()
    threading.Timer(0.3, theirs.shutdown, (socket.SHUT_WR,)).start()
    with pytest.raises(HandshakeError):
        session.negotiate(ours.fileno())
    assert time.monotonic() - started > 0.25
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert signal.SIGALRM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


@contract()
def test_nothing_moves_after_a_failed_handshake(library: Library) -> None:
    """And cleaning up is all that is left."""
    ends = shake(library, judge=Recorder(accepted=False))
    assert isinstance(ends.client_error, AttestationRejected)
    assert raw_receive(library, ends.client, 16)[0] == INVALID
    size = ffi.new("size_t *", 5)
    assert library.lib.rats_tls_transmit(ends.client._handle[0], ffi.new("char[]", b"hello"), size) == INVALID
    ends.client.cleanup()


@contract()
def test_a_handshake_ends_when_its_connection_is_shut_down(library: Library) -> None:
    """That is how a deadline frees the thread that negotiates."""
    ours, _theirs = socket.socketpair()
    session = Session(library, PLAIN_CLIENT, Recorder())
    session.init()
    errors: list[BaseException] = []

    def negotiate() -> None:
        try:
            session.negotiate(ours.fileno())
        except HandshakeError as error:
            errors.append(error)

    thread = threading.Thread(target=negotiate)
    thread.start()
    ours.shutdown(socket.SHUT_RDWR)
    thread.join(8)
    assert not thread.is_alive()
    assert len(errors) == 1


@contract()
def test_a_failed_handshake_on_a_server_costs_memory_for_good(library: Library) -> None:
    """Tens of kilobytes each, which listeners must allow for."""

    def resident_kib() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") // 1024

    for _ in range(20):
        failure(library, b"no TLS at all" * 10, PLAIN_SERVER)
    before = resident_kib()
    for _ in range(100):
        failure(library, b"no TLS at all" * 10, PLAIN_SERVER)
    assert 5 < (resident_kib() - before) / 100 < 200


# What receive and transmit say.


@contract()
def test_a_receive_returns_at_most_one_record(library: Library) -> None:
    """However much was sent at once."""
    ends = opened(library)
    ends.server_socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    sent = os.urandom(100_000)
    assert ends.server.transmit(sent)
    pieces = [receive(ends.client) for _ in range(7)]
    assert [len(piece) for piece in pieces] == [16_384] * 6 + [1_696]
    assert b"".join(pieces) == sent


@contract()
def test_a_record_may_be_received_in_parts(library: Library) -> None:
    """What a small buffer leaves comes with the next call."""
    ends = opened(library)
    assert ends.client.transmit(b"one record")
    assert raw_receive(library, ends.server, 4) == (0, b"one ", 4)
    assert raw_receive(library, ends.server, 100) == (0, b"record", 6)


@contract()
def test_both_directions_carry_bytes(library: Library) -> None:
    """Turn by turn, on descriptors that block."""
    ends = shake(library)
    for number in range(10):
        assert ends.client.transmit(b"question %d" % number)
        assert receive(ends.server) == b"question %d" % number
        assert ends.server.transmit(b"answer %d" % number)
        assert receive(ends.client) == b"answer %d" % number


@contract()
def test_an_empty_socket_starves_a_receive(library: Library) -> None:
    """And the session stays usable; the size is as it was."""
    ends = opened(library)
    assert raw_receive(library, ends.server, 77)[::2] == (INVALID, 77)
    assert (receive(ends.server), ends.server.errno) == (b"", errno.EAGAIN)
    assert ends.client.transmit(b"now")
    assert receive(ends.server) == b"now"


@contract()
def test_part_of_a_record_starves_a_receive(library: Library) -> None:
    """Nothing of it is delivered until all of it is there."""
    ends = opened(library)
    record = intercept(ends, b"whole or not at all")
    for part in (record[:3], record[3:20], record[20:-1]):
        ends.client_socket.sendall(part)
        assert (receive(ends.server), ends.server.errno) == (b"", errno.EAGAIN)
    ends.client_socket.sendall(record[-1:])
    assert receive(ends.server) == b"whole or not at all"


@contract()
def test_a_time_limit_starves_a_receive(library: Library) -> None:
    """And the session stays usable."""
    ends = shake(library)
    ends.server_socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", 0, 20_000))
    assert receive(ends.server) == b""
    assert ends.server.errno in STARVED
    assert ends.client.transmit(b"now")
    assert receive(ends.server) == b"now"


@contract()
def test_a_signal_starves_a_receive(library: Library) -> None:
    """And the session stays usable."""
    ends = shake(library)
    runs = []

    def ring(number: int, _: FrameType | None) -> None:
        runs.append(number)

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)  # again and again: the first may come before the wait
    assert (receive(ends.server), ends.server.errno) == (b"", errno.EINTR)
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert set(runs) == {signal.SIGALRM}
    assert ends.client.transmit(b"now")
    assert receive(ends.server) == b"now"


@contract()
def test_nothing_is_an_error_to_the_library(library: Library) -> None:
    """It refuses to send or receive no bytes, and takes no harm."""
    ends = opened(library)
    size = ffi.new("size_t *", 0)
    assert library.lib.rats_tls_transmit(ends.client._handle[0], ffi.new("char[]", 1), size) == INVALID
    assert raw_receive(library, ends.server, 0)[0] == INVALID
    assert ends.client.transmit(b"still here")
    assert receive(ends.server) == b"still here"


@contract()
def test_a_transmit_is_whole_or_to_be_repeated(library: Library) -> None:
    """Through a small buffer it takes many calls with the same bytes, and they arrive intact."""
    ends = opened(library)
    ends.client_socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    sent, received, calls = os.urandom(200_000), b"", 1
    while not ends.client.transmit(sent):
        assert ends.client.errno == errno.EAGAIN
        received += b"".join(iter(lambda: receive(ends.server), b""))
        calls += 1
    received += b"".join(iter(lambda: receive(ends.server), b""))
    assert received == sent
    assert calls > 2


def intercept(ends: Ends, data: bytes) -> bytes:
    """Take the record that carries *data* to the server off the wire."""
    assert ends.client.transmit(data)
    return ends.server_socket.recv(65_536)


def is_dead(session: Session) -> bool:
    return receive(session) == b"" and session.errno not in STARVED and not session.transmit(b"anything")


@contract()
def test_the_peers_goodbye_ends_receiving_but_not_sending(library: Library) -> None:
    """For ever, and with no errno."""
    ends = opened(library)
    assert ends.client.transmit(b"last words")
    ends.client.cleanup()
    assert receive(ends.server) == b"last words"
    for _ in range(3):
        assert (receive(ends.server), ends.server.errno) == (b"", 0)
    assert ends.server.transmit(b"unheard")


@contract()
def test_the_end_of_the_transport_looks_like_a_goodbye(library: Library) -> None:
    """Code and errno are the same, but sending is over as well."""
    ends = opened(library)
    ends.client_socket.shutdown(socket.SHUT_WR)
    assert (receive(ends.server), ends.server.errno) == (b"", 0)
    assert is_dead(ends.server)


@contract()
def test_a_reset_shows_in_errno(library: Library) -> None:
    """It is the one end that does."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        dialled = socket.create_connection(listener.getsockname())
        accepted, _ = listener.accept()
    ends = shake(library, sockets=(dialled, accepted))
    dialled.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    dialled.close()
    assert (receive(ends.server), ends.server.errno) == (b"", errno.ECONNRESET)
    assert receive(ends.server) == b""


@contract()
def test_a_tampered_record_is_answered_with_an_alert(library: Library) -> None:
    """The code is that of any end; what appears on the wire tells the difference. Both directions are dead."""
    ends = opened(library)
    record = bytearray(intercept(ends, b"true words"))
    record[-1] ^= 1
    ends.client_socket.sendall(record)
    assert (receive(ends.server), ends.server.errno) == (b"", 0)
    assert ends.client_socket.recv(4096)
    assert is_dead(ends.server)


@contract()
def test_a_replayed_record_is_answered_with_an_alert(library: Library) -> None:
    """What was good once is damage the second time."""
    ends = opened(library)
    record = intercept(ends, b"pay me 1")
    ends.client_socket.sendall(record * 2)
    assert receive(ends.server) == b"pay me 1"
    assert (receive(ends.server), ends.server.errno) == (b"", 0)
    assert ends.client_socket.recv(4096)
    assert is_dead(ends.server)


@contract()
def test_an_alert_ends_both_directions_of_the_peer(library: Library) -> None:
    """The other side of the damage hears of it, and cannot tell it from a goodbye by the code."""
    ends = opened(library)
    ends.client_socket.sendall(b"\x17\x03\x03\x00\x20" + bytes(32))
    assert receive(ends.server) == b""
    assert (receive(ends.client), ends.client.errno) == (b"", 0)
    assert is_dead(ends.client)


# What cleanup says to the peer.


@contract()
def test_a_goodbye_is_one_record(library: Library) -> None:
    """24 bytes, which also says that the session is one of TLS 1.3."""
    ends = opened(library)
    ends.client.cleanup()
    assert len(ends.server_socket.recv(4096)) == 24


@contract(environment=TLS_1_2)
def test_the_systems_policy_chooses_the_version(library: Library) -> None:
    """The library has no floor: in TLS 1.2 the goodbye has 31 bytes."""
    ends = opened(library)
    ends.client.cleanup()
    assert len(ends.server_socket.recv(4096)) == 31


@contract()
def test_a_goodbye_is_answered(library: Library) -> None:
    """By the peer's own cleanup, even after it heard ours."""
    ends = opened(library)
    ends.client.cleanup()
    assert receive(ends.server) == b""
    ends.server.cleanup()
    assert len(ends.client_socket.recv(4096)) == 24


@contract()
def test_there_is_no_goodbye_after_damage(library: Library) -> None:
    """That is how its absence tells a fatal alert from a goodbye: on both sides."""
    ends = opened(library)
    ends.client_socket.sendall(b"\x17\x03\x03\x00\x20" + bytes(32))
    assert (receive(ends.server), receive(ends.client)) == (b"", b"")
    ends.server.cleanup()
    ends.client.cleanup()
    for end in (ends.client_socket, ends.server_socket):
        with pytest.raises(BlockingIOError):
            end.recv(4096)


@contract()
def test_a_server_sends_two_tickets_with_the_handshake(library: Library) -> None:
    """Readable does not mean that there is data."""
    ends = shake(library)
    ends.set_blocking(False)
    waiting, records = ends.client_socket.recv(4096), 0
    while waiting:
        assert waiting[0] == 0x17
        waiting, records = waiting[5 + int.from_bytes(waiting[3:5], "big") :], records + 1
    assert records == 2


@contract(saying="[ERROR] SSL_read() failed")
def test_an_orderly_end_is_an_error_in_the_librarys_log(library: Library) -> None:
    """Which is why its log is off unless someone asks."""
    ends = opened(
        library, replace(PLAIN_CLIENT, log_level=LogLevel.ERROR), replace(PLAIN_SERVER, log_level=LogLevel.ERROR)
    )
    ends.client.cleanup()
    assert receive(ends.server) == b""


@contract()
def test_no_log_is_written_unless_asked_for(library: Library) -> None:
    """Not a byte, on a good end and on a bad one."""
    kept, (reader, writer) = os.dup(2), os.pipe()
    os.dup2(writer, 2)
    ends = opened(library)
    ends.client.cleanup()
    assert receive(ends.server) == b""
    failure(library, b"no TLS at all" * 10)
    os.dup2(kept, 2)
    os.close(writer)
    assert os.read(reader, 4096) == b""


# Who judges whom, and when.


@contract()
def test_the_client_judges_on_the_thread_that_negotiates(library: Library) -> None:
    """And the server judges nobody, unless it is mutual. No evidence has no kind."""
    client_judge, server_judge = Recorder(), Recorder()
    ends = shake(library, judge=client_judge, server_judge=server_judge)
    assert client_judge.seen == [Evidence("unknown")]
    assert client_judge.threads == [threading.get_ident()]
    assert server_judge.seen == []
    assert ends.client.evidence == Evidence("unknown")
    assert ends.server.evidence is None


@contract()
def test_a_no_fails_the_handshake_on_both_sides(library: Library) -> None:
    """The judge's side knows why, and the other does not."""
    ends = shake(library, judge=Recorder(accepted=False))
    assert isinstance(ends.client_error, AttestationRejected)
    assert ends.client_error.reason == "debug"
    assert ends.client_error.code is not None
    assert ends.client_error.code.raw in NO_HANDSHAKE
    assert ends.client.evidence is None
    assert type(ends.server_error) is HandshakeError


@contract()
def test_a_judge_that_raises_says_no(library: Library) -> None:
    """What it raised comes out of negotiate; the process lives."""

    def judge(_: Evidence) -> Verdict:
        raise LookupError("no such policy")

    ends = shake(library, judge=judge)
    assert isinstance(ends.client_error, LookupError)
    assert type(ends.server_error) is HandshakeError
    assert not ends.client.is_open


@contract()
def test_a_client_is_judged_after_its_handshake(library: Library) -> None:
    """In mutual mode it learns the server's no by its first receive: negotiate went well."""
    configs = (replace(config, is_mutual=True) for config in (PLAIN_CLIENT, PLAIN_SERVER))
    ends = shake(library, *configs, server_judge=Recorder(accepted=False))
    assert ends.client_error is None
    assert isinstance(ends.server_error, AttestationRejected)
    assert receive(ends.client) == b""
    assert ends.client.errno not in STARVED


@contract()
def test_a_client_without_certificate_learns_late_that_it_needed_one(library: Library) -> None:
    """The server is mutual, and the client is not."""
    ends = shake(library, PLAIN_CLIENT, replace(PLAIN_SERVER, is_mutual=True))
    assert ends.client_error is None
    assert type(ends.server_error) is HandshakeError
    assert receive(ends.client) == b""


@contract()
def test_an_empty_verifier_name_lets_anybody_in(library: Library) -> None:
    """Which is why the binding cannot pass one: here the peer has no evidence at all."""
    code, handle = raw_init(library, verifier=(84, "=32s", b""))
    assert code == 0
    ours, theirs = socket.socketpair()
    server = Session(library, PLAIN_SERVER, Recorder())
    server.init()
    thread = threading.Thread(target=server.negotiate, args=(theirs.fileno(),))
    thread.start()
    assert library.lib.rats_tls_negotiate(handle[0], ours.fileno()) == 0
    thread.join()


# Evidence.


@contract()
def test_the_judge_gets_what_the_peers_attester_said(attesting_library: Library) -> None:
    """Every field is as long as it should be, and the quote has its signature."""
    judge = Recorder()
    ends = shake(attesting_library, CLIENT, SERVER, judge=judge)
    (evidence,) = judge.seen
    assert ends.client.evidence == evidence
    assert evidence.kind == "sgx_ecdsa"
    assert evidence.mr_enclave is not None
    assert evidence.mr_signer is not None
    assert evidence.attributes is not None
    assert (len(evidence.mr_enclave), len(evidence.mr_signer), len(evidence.attributes)) == (32, 32, 16)
    assert len(evidence.quote) == 436 + int.from_bytes(evidence.quote[432:436], "little")
    assert evidence.quote[112:144] == evidence.mr_enclave
    assert evidence.quote[176:208] == evidence.mr_signer
    assert evidence.quote[96:112] == evidence.attributes
    assert evidence.quote[304:308] == struct.pack("<HH", evidence.product_id, evidence.security_version)


@contract()
def test_custom_claims_reach_the_judge(attesting_library: Library) -> None:
    """Byte by byte, whatever they are; the library has copied them by the time init returns."""
    claims = (("role", b"gateway"), ("empty", b""), ("größe", bytes(range(256))))
    judge = Recorder()
    shake(attesting_library, CLIENT, replace(SERVER, custom_claims=claims), judge=judge)
    assert sorted(judge.seen[0].custom_claims) == sorted(claims)


@contract()
def test_both_sides_judge_in_mutual_mode(attesting_library: Library) -> None:
    """Each gets the other's claims."""
    judge, server_judge = Recorder(), Recorder()
    shake(
        attesting_library,
        replace(MUTUAL_CLIENT, custom_claims=(("i am", b"client"),)),
        replace(MUTUAL_SERVER, custom_claims=(("i am", b"server"),)),
        judge=judge,
        server_judge=server_judge,
    )
    assert judge.seen[0].custom_claims == (("i am", b"server"),)
    assert server_judge.seen[0].custom_claims == (("i am", b"client"),)


@contract()
def test_a_named_verifier_refuses_a_peer_without_evidence(attesting_library: Library) -> None:
    """Before the judge is asked."""
    judge = Recorder()
    ends = shake(attesting_library, CLIENT, PLAIN_SERVER, judge=judge)
    assert type(ends.client_error) is HandshakeError
    assert judge.seen == []


# What only the stand-in can be told to do.


def refused_by_the_library(library: Library, spoil: str) -> bool:
    os.environ["STANDIN_EVIDENCE"] = spoil
    judge = Recorder()
    ends = shake(library, CLIENT, SERVER, judge=judge)
    return type(ends.client_error) is HandshakeError and judge.seen == []


@contract()
def test_evidence_that_the_verifier_refuses_reaches_no_judge(standin_only: Library) -> None:
    """Damaged, foreign, revoked or outdated evidence, and certificates that OpenSSL refuses."""
    spoils = [
        *("none", "garbage", "truncated", "huge", "other-key", "no-report-data", "revoked", "out-of-date", "expired"),
        *("not-yet-valid", "deep-chain"),
    ]
    assert [spoil for spoil in spoils if not refused_by_the_library(standin_only, spoil)] == []


def judged(library: Library, spoil: str, **environment: str) -> Evidence:
    os.environ["STANDIN_EVIDENCE"] = spoil
    os.environ.update(environment)
    judge = Recorder()
    shake(library, CLIENT, SERVER, judge=judge)
    return judge.seen[0]


@contract()
def test_evidence_is_copied_as_it_is_delivered(standin_only: Library) -> None:
    """Without fields, short, of other kinds: it is the judge who says no."""
    assert judged(standin_only, "unknown") == Evidence("unknown")
    assert judged(standin_only, "tdx_ecdsa") == Evidence("tdx_ecdsa")
    empty = judged(standin_only, "null-fields")
    assert (empty.mr_enclave, empty.mr_signer, empty.attributes, empty.quote) == (None, None, None, b"")
    assert len(judged(standin_only, "short-quote").quote) == 100
    mismatched = judged(standin_only, "mismatch")
    assert mismatched.mr_enclave != mismatched.quote[112:144]
    csv = judged(standin_only, "csv")
    assert (csv.kind, csv.csv_measurement, csv.csv_vm_id, csv.csv_policy) == (
        "csv",
        b"\x11" * 32,
        b"TEST NO ENCLAVE!",
        bytes(4),
    )
    assert len(csv.quote) == 2548


@contract()
def test_the_stand_in_says_what_it_is_told_to(standin_only: Library) -> None:
    """So that policies can be tested."""
    evidence = judged(
        standin_only,
        "good",
        STANDIN_MR_ENCLAVE="ab" * 32,
        STANDIN_MR_SIGNER="cd" * 32,
        STANDIN_PRODUCT_ID="7",
        STANDIN_SECURITY_VERSION="9",
        STANDIN_ATTRIBUTES="07" + "00" * 15,
    )
    assert evidence.mr_enclave == b"\xab" * 32
    assert evidence.mr_signer == b"\xcd" * 32
    assert (evidence.product_id, evidence.security_version) == (7, 9)
    assert evidence.attributes == b"\x07" + bytes(15)
    assert b"TEST NO ENCLAVE" in evidence.quote


@contract()
def test_failing_to_attest_is_told_apart(standin_only: Library) -> None:
    """In two encodings; the third is how the library reports too little memory."""
    for told, kind, text in (
        ("fails", EvidenceError, "0xdffffffd, attester: invalid argument"),
        ("platform-fails", EvidenceError, "the platform's code 0xe019"),
        ("no-memory", RatsTlsError, "0x00000003, core: out of memory"),
    ):
        os.environ["STANDIN_ATTESTER"] = told
        session = Session(standin_only, SERVER, Recorder())
        with pytest.raises(kind, match=text):
            session.init()
        session.cleanup()


@contract()
def test_a_wrapper_that_is_there_but_unusable_is_told_apart(standin_only: Library) -> None:
    """The stand-in has a file of that name, and no more."""
    session = Session(standin_only, replace(PLAIN_CLIENT, tls="nulltls"), Recorder())
    with pytest.raises(ConfigError, match="the TLS wrapper or the crypto wrapper does not work"):
        session.init()


@contract(dies_of=signal.SIGABRT, saying="two threads are inside one handle")
def test_two_threads_in_one_handle_end_the_process(standin_only: Library) -> None:
    """The library would lose bytes or crash, now and then; the stand-in does it at once."""
    ends = shake(standin_only)
    threading.Thread(target=raw_receive, args=(standin_only, ends.server, 16), daemon=True).start()
    deadline = time.monotonic() + 8
    size = ffi.new("size_t *", 1)
    while time.monotonic() < deadline:
        standin_only.lib.rats_tls_transmit(ends.server._handle[0], ffi.new("char[]", 1), size)


@contract(dies_of=signal.SIGABRT, saying="a handle is used after its cleanup")
def test_a_second_cleanup_ends_the_process(standin_only: Library) -> None:
    """The library would free memory twice."""
    code, handle = raw_init(standin_only)
    assert code == 0
    standin_only.lib.rats_tls_cleanup(handle[0])
    standin_only.lib.rats_tls_cleanup(handle[0])


if __name__ == "__main__":
    globals()[sys.argv[1]].__wrapped__(load())
