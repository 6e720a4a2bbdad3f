"""Be the programs in an enclave: a relay, and the server that it leads the parent to.

Runs in the guest inside the guest, where a start of Python takes many seconds: so it imports little.
"""

from __future__ import annotations

import hashlib
import socket
import subprocess
import sys
from pathlib import Path

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
    """Tell the parent that the relay is ready, and serve one connection that comes through it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        behind = f"127.0.0.1:{server.getsockname()[1]}"
        command = [
            str(Path(sys.executable).with_name("relay")),
            "--tcp-address",
            behind,
            "--vsock-address",
            f"any:{PORT}",
        ]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as relay:
            assert relay.stderr is not None
            for line in relay.stderr:
                sys.stderr.write(line)
                if " ready " in line:
                    tell_parent(parent_cid)
                    answer_one(server)
                    relay.terminate()
    sys.exit(relay.returncode)


def tell_parent(cid: int) -> None:
    """Dial the parent, which says that this side is ready; its reply comes after the end of what was said."""
    with socket.socket(socket.AF_VSOCK) as parent:
        parent.connect((cid, PARENTS_PORT))
        parent.sendall(f"absent: {failure_to_reach(ABSENT_CID)}".encode())
        parent.shutdown(socket.SHUT_WR)
        if received(parent) != b"late reply":
            sys.exit("the parent's reply is not what it should be")


def failure_to_reach(cid: int) -> int:
    """The number of the error that a connection to nobody ends with."""
    with socket.socket(socket.AF_VSOCK) as sock:
        return sock.connect_ex((cid, PORT))


def answer_one(server: socket.socket) -> None:
    """Hash what one client sends, after it has ended its side."""
    accepted, _ = server.accept()
    with accepted:
        accepted.sendall(hashlib.sha256(received(accepted)).hexdigest().encode())


if __name__ == "__main__":
    main(int(sys.argv[1]))
