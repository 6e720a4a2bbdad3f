"""One session of the library as bytes in and bytes out, over a private pair of sockets. Waits for nothing, ever.

The library talks to one end of the pair, and whoever has the engine carries ciphertext between the other end and the
network. So nothing here can block once the handshake is over, and what the library writes tells how a session ended,
which its return codes do not.

Invariants:

1. Ciphertext leaves in the order in which the library wrote it, and all of it: one lost record breaks the session.
2. Our end stays open for as long as the library may write, so that there is never a SIGPIPE.
3. After `free` the library is not called.
"""

from __future__ import annotations

import fcntl
import socket
import struct
import termios
from typing import Final

from ratstls._session import STARVED, Buffer, Session
from ratstls.errors import SessionBroken, Truncated

# RFC 8446, 5.2: of a record on the wire. The pieces that send_all cuts arrive as four of them.
CIPHERTEXT_BYTES: Final = 4 * ((1 << 14) + 256)
# Ours.
_PIECES: Final = 256  # that are read at a time, be they as small as they may


class Engine:
    """A session on its private pair of sockets.

    Until the handshake is over another thread may be inside the library, while this side moves ciphertext by `feed`,
    `collect` and `take`; `read` and `write` are for afterwards.

    Attributes:
        session: the library's side; shake hands over `library_fd`.
        ours: the end to wait on, while another thread shakes hands.
        has_hung_up: the library sees the end of the connection.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.has_hung_up = False
        self.ours, self._theirs = socket.socketpair()
        self.ours.setblocking(False)
        self._arrived = bytearray()
        self._collected: list[bytes] = []
        self._is_starved = False
        self._is_at_end = False
        self._is_freed = False
        self._ending: Truncated | SessionBroken | None = None
        self._has_ended_well = False

    @property
    def library_fd(self) -> int:
        return self._theirs.fileno()

    def open(self) -> None:
        """Leave the handshake behind: from now on no call of the library waits."""
        self._theirs.setblocking(False)

    # Between the network and the library.

    def feed(self, ciphertext: Buffer) -> None:
        """Take in what came from the network; b"" is its end."""
        self._is_at_end = not ciphertext
        self._is_starved = False
        self.push()
        if ciphertext:
            taken = 0 if self._arrived else self._hand_over(ciphertext)
            self._arrived += memoryview(ciphertext)[taken:]

    @property
    def inlet(self) -> int:
        """The descriptor into which ciphertext may be moved, instead of being fed, while this `is_starved`."""
        return self.ours.fileno()

    def note_moved(self) -> None:
        """Something is moved into the inlet."""
        self._is_at_end = self._is_starved = False

    @property
    def has_unfed(self) -> bool:
        """There was no room for all that came: `push` again once ``ours`` is writable."""
        return bool(self._arrived)

    def push(self) -> None:
        """Hand to the library as much as there is room for."""
        if self._arrived:
            del self._arrived[: self._hand_over(self._arrived)]

    def _hand_over(self, ciphertext: Buffer) -> int:
        try:
            return self.ours.send(ciphertext)
        except BlockingIOError:
            return 0

    @property
    def has_unread(self) -> bool:
        """The library has not yet read all that it was handed."""
        (count,) = struct.unpack("i", fcntl.ioctl(self._theirs, termios.FIONREAD, bytes(4)))
        return bool(count)

    def hang_up(self) -> None:
        """Let the library see the end of the connection, which ends its waiting in a handshake.

        Not while `has_unread`, if the handshake may yet go well: there would be no telling this end from a goodbye.
        """
        self.has_hung_up = True
        self.ours.shutdown(socket.SHUT_WR)

    def collect(self) -> int:
        """Gather what the library has written, and return how many bytes that were."""
        count = 0
        while True:
            try:
                data = self.ours.recv(CIPHERTEXT_BYTES)
            except BlockingIOError:
                return count
            self._collected.append(data)
            count += len(data)
            if len(data) < CIPHERTEXT_BYTES:
                return count

    def take(self) -> bytes:
        """Return what was collected, for the network: send it before anything that is collected later."""
        data = b"".join(self._collected)
        self._collected.clear()
        return data

    # Between the program and the library.

    @property
    def is_starved(self) -> bool:
        """`read` has nothing to give until more is fed."""
        return self._is_starved and not self._is_over

    @property
    def _is_over(self) -> bool:
        return self._ending is not None or self._has_ended_well

    def read(self, room: memoryview) -> int | None:
        """Put what the peer sent into *room* and return how many bytes; 0 after its goodbye, None: feed more first.

        Raises:
            SessionBroken: damaged bytes arrived, or the peer reported a fatal error; all before that was returned.
            Truncated: the network ended first.
        """
        while not (self._is_starved or self._is_over):
            self.push()
            count = self._receive(room)
            self._is_starved = self.session.errno in STARVED and not self._arrived
            if count:
                return count
        if self._is_at_end and not self._is_over:
            self.end(Truncated("the connection ended without the peer's goodbye: bytes may be missing"))
        if self._ending is not None:
            raise type(self._ending)(str(self._ending)) from self._ending.__cause__
        return 0 if self._has_ended_well else None

    def write(self, data: Buffer) -> None:
        """Encrypt all of *data*; what is to be sent for it is collected.

        Raises:
            SessionBroken: the session has ended, well or badly. Do not write again.
        """
        if self._is_freed:
            raise SessionBroken("the peer has ended the session: nothing can be sent to it any more")
        while not self.session.transmit(data):
            if not self.collect():
                raise SessionBroken("the session has ended with an error: nothing can be sent any more")
        self.collect()

    def end(self, ending: Truncated | SessionBroken) -> None:
        """Remember how the session ended; the first ending counts."""
        if self._ending is None and not self._has_ended_well:
            self._ending = ending

    def free(self) -> int:
        """Say goodbye, free the session and the sockets, and return how many bytes the goodbye has. Quiet when done."""
        if self._is_freed:
            return 0
        self._is_freed = True
        self.collect()
        self.session.cleanup()
        count = self.collect()
        self.ours.close()
        self._theirs.close()
        return count

    def _receive(self, room: memoryview) -> int:
        """Return how many bytes there are; 0 if there are none, which is for good if the session has an ending then."""
        for _ in range(2):  # an errno that an earlier call left behind is gone the second time
            if count := self.session.receive(room, _PIECES):
                return count
            if self.session.errno in STARVED:
                return 0
            if self.has_hung_up:
                self.end(Truncated("the connection ended with the handshake, without the peer's goodbye"))
                return 0
            if self.collect():  # the library has told the peer what is wrong with its bytes
                self.end(SessionBroken("damaged or forged bytes arrived: nothing after them was delivered"))
                return 0
        # The peer ended the session. It is answered with a goodbye only if it said one.
        if self.free():
            self._has_ended_well = True
        else:
            self.end(SessionBroken("the peer reported a fatal error: bytes of ours may not have reached it whole"))
        return 0
