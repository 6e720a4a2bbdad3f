"""How many bytes of an answer arrive when one side finishes first, and the other answers some time later.

A client and a server talk through the relay and through socat, TCP on both sides. One of them says a word and shuts its
sending side; the other reads to that end, waits, and answers with 300,000 bytes.
"""

from __future__ import annotations

import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Final

from enlink.testing.hosts import Host, Network

from bench.relays import AS_IT_COMES, SOCAT, Peer, free_port, running, wait_until_listening

ANSWER: Final = b"\0" * 300_000
DELAYS_S: Final = (0.0, 0.1, 2.0, 20.0)
TIMEOUT_S: Final = 60.0
_PATIENT: Final = Peer("socat -t 30", "socat", ("socat", "-t", "30", *SOCAT.argv[1:]))


def run(delays_s: Sequence[float] = DELAYS_S) -> None:
    """Hold every conversation, and print a table."""
    peers = [peer for peer in (AS_IT_COMES, SOCAT, _PATIENT) if shutil.which(peer.program)]
    print("bytes of 300000 that arrive, when the answer comes after so many seconds")
    print(f"{'':34}" + "".join(f"{delay_s:>9g}" for delay_s in delays_s))
    with Network() as network, tempfile.TemporaryDirectory(prefix="eng-bench-") as directory:
        host = network.host("bench")
        conversations = list(product(peers, (True, False), delays_s))
        with ThreadPoolExecutor(len(conversations)) as pool:
            counts = pool.map(lambda each: _hold(host, Path(directory), *each), conversations)
        arrived = dict(zip(conversations, counts, strict=True))
        for peer, is_client_first in product(peers, (True, False)):
            title = f"{peer.name}, {'client' if is_client_first else 'server'} finishes first"
            row = "".join(f"{arrived[peer, is_client_first, delay_s]:>9}" for delay_s in delays_s)
            print(f"{title:34}{row}")


def _hold(host: Host, directory: Path, peer: Peer, is_client_first: bool, delay_s: float) -> int:
    """Hold one conversation through a process of its own; returns how much of the answer arrived."""
    with ExitStack() as stack:
        with host.entered():
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        port = free_port(host)
        argv = peer.command(port, listener.getsockname()[1], directory)
        process = stack.enter_context(running(host, directory, *argv))
        wait_until_listening(host, port, process, directory)
        with host.entered():
            client = stack.enter_context(socket.create_connection(("127.0.0.1", port), TIMEOUT_S))
        listener.settimeout(TIMEOUT_S)
        server = stack.enter_context(listener.accept()[0])
        server.settimeout(TIMEOUT_S)
        first, second = (client, server) if is_client_first else (server, client)
        answering = threading.Thread(target=_answer, args=(second, delay_s))
        answering.start()
        first.sendall(b"question")
        first.shutdown(socket.SHUT_WR)
        received = 0
        try:
            while data := first.recv(65536):
                received += len(data)
        except ConnectionError:
            pass
        answering.join()
        return received


def _answer(connection: socket.socket, delay_s: float) -> None:
    try:
        while connection.recv(65536):
            pass
        time.sleep(delay_s)
        connection.sendall(ANSWER)
        connection.shutdown(socket.SHUT_WR)
    except OSError:
        return  # the one between has gone
