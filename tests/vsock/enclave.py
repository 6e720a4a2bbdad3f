"""Be the program in an enclave: hash what the parent sends, and before that tell the parent that it can.

Runs in the guest inside the guest, where a start of Python takes many seconds: so it imports little.
"""

from __future__ import annotations

import hashlib
import socket
import sys

PORT = 5000
PARENTS_PORT = 6000
ABSENT_CID = 99


def received(sock: socket.socket) -> bytes:
    """All that comes until the peer's end."""
    pieces = []
    while piece := sock.recv(65536):
        pieces.append(piece)
    return b"".join(pieces)


def main(parent_cid: int) -> None:
    """Serve one connection of the parent's."""
    with socket.socket(socket.AF_VSOCK) as listener:
        listener.bind((socket.VMADDR_CID_ANY, PORT))
        listener.listen()
        with socket.socket(socket.AF_VSOCK) as parent:
            parent.connect((parent_cid, PARENTS_PORT))
            parent.sendall(f"absent: {failure_to_reach(ABSENT_CID)}".encode())
            parent.shutdown(socket.SHUT_WR)
            if received(parent) != b"late reply":
                sys.exit("the parent's reply is not what it should be")
        accepted, (cid, _) = listener.accept()
        with accepted:
            accepted.sendall(f"{cid} {hashlib.sha256(received(accepted)).hexdigest()}".encode())


def failure_to_reach(cid: int) -> int:
    """The number of the error that a connection to nobody ends with."""
    with socket.socket(socket.AF_VSOCK) as sock:
        return sock.connect_ex((cid, PORT))


if __name__ == "__main__":
    main(int(sys.argv[1]))
