"""Vsock with two ends, over the loopback of a guest: dialling, listening, and what is said when nobody is there."""

from __future__ import annotations

import socket

import pytest
import trio
from enlink.attempt import open_connection
from enlink.connection import Unreachable
from enlink.endpoint import VSOCK_PORT_ANY, Vsock
from enlink.errors import Unavailable
from enlink.listener import accept, listening
from enlink.vsock import local_cid
from trio.testing import trio_test

pytestmark = pytest.mark.vsock

LOCAL = 1  # VMADDR_CID_LOCAL
PATIENCE_S = 50


@trio_test
async def test_a_connection_is_made_named_and_half_closed() -> None:
    with trio.fail_after(PATIENCE_S):
        async with listening(Vsock(None, VSOCK_PORT_ANY)) as (listener,):
            port = listener.socket.getsockname()[1]
            dialled = await open_connection(Vsock(LOCAL, port), 10)
            accepted = await accept(listener)
            with dialled.socket, accepted.socket:
                assert dialled.peer == Vsock(LOCAL, port)
                assert isinstance(accepted.peer, Vsock)
                assert (accepted.peer.cid, accepted.peer.port) == (LOCAL, dialled.socket.getsockname()[1])
                await dialled.socket.send(b"hello")
                dialled.socket.shutdown(socket.SHUT_WR)
                with pytest.raises(OSError, match="not connected"):
                    dialled.socket.getpeername()  # which is why it was asked for before
                assert await accepted.socket.recv(100) == b"hello"
                assert await accepted.socket.recv(100) == b""
                await accepted.socket.send(b"late reply")
                assert await dialled.socket.recv(100) == b"late reply"


@pytest.mark.proves("F26")
@trio_test
async def test_a_port_that_nobody_listens_on_is_told() -> None:
    with trio.fail_after(PATIENCE_S), pytest.raises(Unreachable, match="vsock://1:59997: nobody listens there"):
        await open_connection(Vsock(LOCAL, 59997), 10)


@pytest.mark.proves("F26")
@trio_test
async def test_a_cid_that_no_transport_leads_to_is_told() -> None:
    with trio.fail_after(PATIENCE_S), pytest.raises(Unreachable, match="vsock://77:1: no vsock transport leads to"):
        await open_connection(Vsock(77, 1), 10)


@pytest.mark.proves("F67")
@trio_test
async def test_a_port_that_is_taken_is_told_and_one_that_is_free_again_is_taken() -> None:
    with trio.fail_after(PATIENCE_S):
        async with listening(Vsock(None, VSOCK_PORT_ANY)) as (listener,):
            port = listener.socket.getsockname()[1]
            with pytest.raises(Unavailable, match="another process has the port"):
                async with listening(Vsock(LOCAL, port)):
                    pass
        async with listening(Vsock(LOCAL, port)):
            pass


@trio_test
async def test_a_cid_that_is_not_ours_is_not_listened_on() -> None:
    own = local_cid()
    assert own == LOCAL
    with trio.fail_after(PATIENCE_S), pytest.raises(Unavailable, match="cid 77 is not this machine's, which is 1"):
        async with listening(Vsock(77, 8888)):
            pass


@trio_test
async def test_a_burst_of_connections_waits_in_the_backlog() -> None:
    with trio.fail_after(PATIENCE_S):
        async with listening(Vsock(LOCAL, VSOCK_PORT_ANY)) as (listener,):
            port = listener.socket.getsockname()[1]
            burst = [await open_connection(Vsock(LOCAL, port), 10) for _ in range(128)]
            for dialled in burst:
                (await accept(listener)).socket.close()
                dialled.socket.close()


@trio_test
async def test_what_may_be_under_way_is_the_choice_of_both_ends() -> None:
    """A sender with no reader stops there; what is accepted has its listener's choice."""
    with trio.fail_after(PATIENCE_S):
        async with listening(Vsock(LOCAL, VSOCK_PORT_ANY), vsock_buffer_bytes=1024 * 1024) as (listener,):
            port = listener.socket.getsockname()[1]
            dialled = await open_connection(Vsock(LOCAL, port), 10, vsock_buffer_bytes=1024 * 1024)
            accepted = await accept(listener)
            sent = 0
            with dialled.socket, accepted.socket:
                with trio.move_on_after(5):
                    while True:
                        sent += await dialled.socket.send(bytes(16 * 1024))
                assert sent == 1024 * 1024
