"""A reset is told once, and nothing else is told."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from functools import partial

import pytest
from enlink.testing.programs import in_trio, until
from relay.resets import watching_resets

RESET = b"\1\0\0\0\0\0\0\0"  # struct linger: close with a reset
Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pairs() -> Iterator[list[Pair]]:
    """Connections: for each its client, and what was accepted."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pairs = []
        for _ in range(3):
            client = socket.create_connection(listener.getsockname())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            pairs.append((client, listener.accept()[0]))
    yield pairs
    for pair in pairs:
        for sock in pair:
            sock.close()


def test_a_reset_is_told_once_and_what_came_before_is_not(pairs: list[Pair]) -> None:
    async def test() -> None:
        told: list[int] = []
        with watching_resets() as resets:
            for number, (client, accepted) in enumerate(pairs):
                resets.watch(accepted.fileno(), partial(told.append, number))
                client.sendall(b"hello")
                client.shutdown(socket.SHUT_WR)
                assert accepted.recv(5, socket.MSG_PEEK) == b"hello"
            resets.look()
            assert told == []
            pairs[1][0].close()
            await until(lambda: bool(told))
            resets.look()
            assert told == [1]

    in_trio(test)()


def test_whatever_is_forgotten_is_not_told_even_if_it_came_at_the_same_time(pairs: list[Pair]) -> None:
    async def test() -> None:
        told: list[bool] = []
        with watching_resets() as resets:

            def forget_all() -> None:
                told.append(True)
                for _, accepted in pairs:
                    resets.forget(accepted.fileno())

            for client, accepted in pairs:
                resets.watch(accepted.fileno(), forget_all)
                client.close()
            await until(lambda: bool(told))
            resets.look()
            assert told == [True]

    in_trio(test)()
