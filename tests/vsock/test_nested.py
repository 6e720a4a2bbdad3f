"""A parent instance and its enclave: a guest inside a guest that has vhost_vsock. See cli.py."""

from __future__ import annotations

import errno
import hashlib
import sys
from typing import Final

import pytest
import trio

from tests.vsock.cli import CHECKOUT
from tests.vsock.debian import tools
from tests.vsock.enclave import PARENTS_PORT, PORT
from tests.vsock.files import python_and
from tests.vsock.guest import Guest
from tests.vsock.relays import free_tcp_port, relaying
from tests.vsock.streams import listen, received

# Neither a parent of Nitro's, which enclaves know as 3, nor its enclaves have fixed numbers; in KVM the host is 2.
PARENT_CID: Final = 2
ENCLAVE_CID: Final = 16
DEADLINE_S: Final = 900
MEGABYTES: Final = bytes(range(256)) * 4096 * 4


@pytest.mark.nested
@pytest.mark.timeout(DEADLINE_S)
def test_a_relay_on_each_side_joins_parent_and_enclave() -> None:
    """The enclave dials its parent, and the parent's clients reach the enclave's server, across two kernels."""
    enclave = Guest(
        tools=tools(),
        shares=python_and(CHECKOUT),
        modules=["vmw_vsock_virtio_transport"],
        devices=[f"vhost-vsock-pci,guest-cid={ENCLAVE_CID}"],
        memory_mib=512,
        boot_deadline_s=DEADLINE_S / 2,
        deadline_s=DEADLINE_S,
    )
    command = [sys.executable, "-m", "tests.vsock.enclave", str(PARENT_CID)]
    ended = []

    port = free_tcp_port()
    through = ["--tcp-address", f"127.0.0.1:{port}", "--vsock-address", f"{ENCLAVE_CID}:{PORT}", "--tcp-to-vsock"]

    async def be_the_parent() -> None:
        with trio.fail_after(DEADLINE_S):
            async with await listen(PARENTS_PORT) as listener, trio.open_nursery() as nursery:

                async def boot() -> None:
                    ended.append(await trio.to_thread.run_sync(enclave.run, command, CHECKOUT, {"PATH": "/usr/bin"}))

                nursery.start_soon(boot)
                async with await listener.accept() as stream:
                    assert stream.socket.getpeername()[0] == ENCLAVE_CID
                    assert await received(stream) == f"absent: {errno.ETIMEDOUT}".encode()
                    await stream.send_all(b"late reply")
                async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                    await stream.send_all(MEGABYTES)
                    await stream.send_eof()
                    assert await received(stream) == hashlib.sha256(MEGABYTES).hexdigest().encode()

    with relaying(*through):
        trio.run(be_the_parent)
    assert ended == [0]
