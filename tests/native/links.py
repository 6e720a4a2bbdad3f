"""Attested links for tests: both ends of one, over whatever lies between them. Import this in a child: see in_child."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import trio
from ratstls._ffi import CData, RatsTls
from ratstls._library import Library
from ratstls.accepted import Accepted
from ratstls.config import SessionConfig
from ratstls.handshake import HandshakeSettings, client_handshake, server_handshake
from ratstls.policy import Policy
from ratstls.stream import RatsTlsStream
from trio.testing import MemoryReceiveStream, MemorySendStream, memory_stream_pair

# What any library has plug-ins for; it encrypts, and proves nothing.
PLAIN = SessionConfig(attester="nullattester", verifier="nullverifier", is_server=False, is_attestation_waived=True)
ANYBODY = Policy(no_attestation=True)
# What the stand-in attests, unless told otherwise.
ATTESTED = SessionConfig(attester="sgx_ecdsa", verifier="sgx_ecdsa", is_server=False, is_mutual=True)
STANDIN = Policy(accept=(Accepted(mr_enclave=b"\x11" * 32),))

Transports = tuple[trio.abc.Stream, trio.abc.Stream]
Operation = Callable[[], Awaitable[Any]]


def client_of(library: Library, config: SessionConfig = PLAIN, **settings: Any) -> HandshakeSettings:
    """Return a client's settings."""
    return HandshakeSettings(library=library, config=replace(config, is_server=False), **settings)


def server_of(library: Library, config: SessionConfig = PLAIN, **settings: Any) -> HandshakeSettings:
    """Return a server's settings."""
    return HandshakeSettings(library=library, config=replace(config, is_server=True), **settings)


async def link(
    library: Library, make_transports: Callable[[], Transports] = memory_stream_pair, **settings: Any
) -> tuple[RatsTlsStream, RatsTlsStream]:
    """Shake hands without attestation, and return both ends, client first."""
    return await link_over(library, make_transports(), **settings)


async def link_over(library: Library, transports: Transports, **settings: Any) -> tuple[RatsTlsStream, RatsTlsStream]:
    """Do what `link` does, over these two ends of a connection."""
    client, server = client_of(library, **settings), server_of(library, **settings)
    return await both(
        partial(client_handshake, transports[0], client, policy=ANYBODY),
        partial(server_handshake, transports[1], server),
    )


async def both(client: Operation, server: Operation) -> tuple[Any, Any]:
    """Run both, and return what they return or raise."""
    results: list[Any] = [None, None]

    async def run(number: int, end: Operation) -> None:
        try:
            results[number] = await end()
        except Exception as error:  # noqa: BLE001 - the caller is to look at it
            results[number] = error

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, 0, client)
        nursery.start_soon(run, 1, server)
    return results[0], results[1]


class Handles:
    """Stands between the binding and a library, and counts the handles that live."""

    def __init__(self, library: Library) -> None:
        self.made = 0
        self.living = 0
        self._lib = library.lib
        self.library = replace(library, lib=cast(RatsTls, self))

    def rats_tls_init(self, conf: CData, handle: CData, /) -> int:
        """Count one more, if there is one."""
        code = self._lib.rats_tls_init(conf, handle)
        self.made += code == 0
        self.living += code == 0
        return code

    def rats_tls_cleanup(self, handle: CData, /) -> int:
        """Count one less."""
        self.living -= 1
        return self._lib.rats_tls_cleanup(handle)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lib, name)


def open_descriptors() -> set[str]:
    """Return what this process has open, each by its number and what it leads to."""
    found = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the one that lists them
            found.add(f"{descriptor.name} {descriptor.readlink()}")
    return found


class CancelledAtStep(trio.abc.Instrument):
    """Cancels ``scope`` when trio has run so many steps of any tasks since it was entered."""

    def __init__(self, step: int) -> None:
        self.scope = trio.CancelScope()
        self._left = step

    def __enter__(self) -> trio.CancelScope:
        trio.lowlevel.add_instrument(self)
        return self.scope.__enter__()

    def __exit__(self, *error: Any) -> bool | None:  # noqa: PYI036 - as the scope wants them
        trio.lowlevel.remove_instrument(self)
        return self.scope.__exit__(*error)

    def before_task_step(self, _: trio.lowlevel.Task) -> None:
        self._left -= 1
        if self._left == 0:
            self.scope.cancel()


def intercept(stream: RatsTlsStream) -> Callable[[], bytes]:
    """Let nothing more of what *stream* sends over a memory stream arrive; return what takes it off the wire."""
    sender = cast("trio.StapledStream[MemorySendStream, MemoryReceiveStream]", stream.transport).send_stream
    sender.send_all_hook = sender.close_hook = None
    return lambda: bytes(sender.get_data_nowait())


def inject(stream: RatsTlsStream, ciphertext: bytes, *, is_last: bool = True) -> None:
    """Let *ciphertext* arrive at *stream*, over a memory stream, and then the end of the connection."""
    receiver = cast("trio.StapledStream[MemorySendStream, MemoryReceiveStream]", stream.transport).receive_stream
    receiver.put_data(ciphertext)
    if is_last:
        receiver.put_eof()


def records_in(ciphertext: bytes) -> list[bytes]:
    """Cut what was on a wire into TLS records."""
    records = []
    while ciphertext:
        end = 5 + int.from_bytes(ciphertext[3:5], "big")
        records.append(ciphertext[:end])
        ciphertext = ciphertext[end:]
    return records


async def read_to_end(stream: trio.abc.ReceiveStream) -> tuple[bytes, BaseException | None]:
    """Return all that comes, and the error that ended it; None after a goodbye."""
    data = b""
    try:
        while more := await stream.receive_some():
            data += more
    except trio.BrokenResourceError as error:
        return data, error
    return data, None
