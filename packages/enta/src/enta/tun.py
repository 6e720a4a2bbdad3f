"""Make a TUN device and move whole IP packets through it. Its address, MTU and state are `capture.routing`'s job."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import trio
from enlink.errors import CannotCreate, EngError, NotPermitted, SystemFailure, UsageError
from enlink.frame import PacketBatch, Packets
from enlink.pump import current_pump, while_readable

# From linux/if_tun.h and linux/if.h.
_TUNSETIFF: Final = 0x400454CA
_TUNGETFEATURES: Final = 0x800454CF
_TUNSETQUEUE: Final = 0x400454D9
_IFF_TUN: Final = 0x0001
_IFF_MULTI_QUEUE: Final = 0x0100
_IFF_ATTACH_QUEUE: Final = 0x0200
_IFF_DETACH_QUEUE: Final = 0x0400
_IFF_NO_PI: Final = 0x1000
_IFF_TUN_EXCL: Final = 0x8000  # refuse a device that exists, even one that we could attach to
_IFREQ: Final = struct.Struct("16sH22x")  # name, flags
_MAX_NAME_BYTES: Final = 15
MAX_QUEUES: Final = 256  # of one device, drivers/net/tun.c

_NODE: Final = "/dev/net/tun"
_DEVICE_COUNTERS: Final = Path("/proc/thread-self/net/dev")  # /sys shows the namespace in which it was mounted
_TX_DROPPED_COLUMN: Final = 11

# Choices of ours.
_BATCH_PACKETS: Final = 64  # more would only wait for one another
_BURST: Final = 8  # reads that find packets waiting before other tasks get their turn


class TunGone(SystemFailure):
    """The device was deleted while we held it. Nothing will ever come out of this one again."""


class WriteDrop(StrEnum):
    """Why the kernel did not take a packet: the stable names of the counters."""

    DOWN = "tun_down"
    """Somebody set the device down."""
    FULL = "tun_full"
    """No memory for it just now."""
    REJECTED = "tun_rejected"
    """Not an IP packet by its first nibble, or otherwise not to the kernel's taste."""


class Tun:
    """One TUN device, gone with everything attached to it when it is closed. Made by `open_tun`.

    One task reads and any task writes; a second reader at the same time raises trio.BusyResourceError.

    Attributes:
        name: the device's name when it was made.
    """

    def __init__(self, descriptor: int, name: str) -> None:
        self.name = name
        self._descriptor = descriptor
        self._is_attached = True
        self._reads_without_checkpoint = 0
        self._batch = PacketBatch()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def fileno(self) -> int:
        """Return the file descriptor, which is non-blocking; -1 once closed."""
        return self._descriptor

    def close(self) -> None:
        """Delete the device, its addresses and its routes. A task that waits for packets gets ClosedResourceError.

        May be called twice, and outside trio.
        """
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor == -1:
            return
        if trio.lowlevel.in_trio_run():
            current_pump().forget(descriptor)
        os.close(descriptor)

    def open_queue(self) -> Tun:
        """Open one more queue of a device that was made for several.

        The kernel sends each flow through the queue through which it last came, and others by their addresses and
        ports: one flow's packets never overtake each other. Source: Linux Documentation/networking/tuntap.rst.

        Raises:
            CannotCreate, SystemFailure: the kernel refuses another one.
        """
        return Tun(*_attach(self.name, _IFF_TUN | _IFF_NO_PI | _IFF_MULTI_QUEUE))

    def attach(self) -> None:
        """Have the kernel use this queue again, after `detach`.

        Raises:
            TunGone: the device was deleted.
        """
        self._set_queue(_IFF_ATTACH_QUEUE)
        self._is_attached = True

    def detach(self) -> None:
        """Have the kernel leave this queue to the others. What waits in it is lost.

        Raises:
            TunGone: the device was deleted.
        """
        self._set_queue(_IFF_DETACH_QUEUE)
        self._is_attached = False

    def _set_queue(self, flag: int) -> None:
        try:
            fcntl.ioctl(self._descriptor, _TUNSETQUEUE, _IFREQ.pack(b"", flag))
        except OSError as error:
            raise TunGone(f"{self.name} was deleted by another program ({_errno_name(error)}): start again") from error

    @property
    def is_attached(self) -> bool:
        """The kernel uses this queue."""
        return self._is_attached

    async def read_packets(
        self,
        limit: int = _BATCH_PACKETS,
        *,
        admit: Callable[[memoryview], bool] = lambda _: True,
        take: Callable[[Packets], bool] = lambda _: False,
    ) -> Packets:
        """Wait for traffic, then return 1 to *limit* whole IP packets, oldest first. They are good until the next call.

        Packets that *admit* returns False for are left out. With *take*, batches that it returns True for are done
        with, and the first other one is returned. Neither may block: they are called while no task runs, which makes
        this the fast way. See enlink.pump.

        A device that is down is one without traffic.

        Raises:
            TunGone: the device was deleted.
            SystemFailure: the kernel fails the read in another way.
            trio.ClosedResourceError: the device was closed, here or by another task.

        Cancellation loses no packet. A checkpoint only when there was nothing to read, and on every eighth call: a
        wake-up for each batch costs more than the batch. Source: Linux Documentation/networking/tuntap.rst.
        """
        packets = self._batch.take()

        def step() -> bool:
            nonlocal packets
            self._fill_batch(limit, admit)
            packets = self._batch.take()
            return not packets.count or take(packets)

        self._reads_without_checkpoint += 1
        if self._reads_without_checkpoint == _BURST:
            self._reads_without_checkpoint = 0
            # Before reading: nothing may be cancelled between taking packets and returning them.
            await trio.lowlevel.checkpoint()
        if step():
            self._reads_without_checkpoint = 0
            await while_readable(self._descriptor, step)
        return packets

    def write_packet(self, packet: bytes | memoryview) -> WriteDrop | None:
        """Hand *packet* to this host's kernel, without waiting. Returns why it was dropped, or None: it was taken.

        The kernel takes a byte as readily as 70,000 of them: judge the packet first, see `filter`.

        Raises:
            TunGone: the device was deleted.
            trio.ClosedResourceError: the device was closed.
        """
        try:
            os.write(self._descriptor, packet)
        except OSError as error:
            if error.errno in (errno.EBADFD, errno.EBADF):
                raise self._failure(error) from error
            if error.errno == errno.EIO:
                return WriteDrop.DOWN
            if error.errno in (errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM):
                return WriteDrop.FULL
            # Whatever a peer may have put into a packet, it ends no agent.
            return WriteDrop.REJECTED
        return None

    def tx_dropped(self) -> int:
        """Return how many packets the kernel has dropped because we did not read them in time.

        It keeps as many as the device's txqueuelen says, and drops the newest without telling the sender. Call this in
        a thread of the network namespace in which the device is.

        Raises:
            TunGone: there is no device of this name here.
        """
        for line in _DEVICE_COUNTERS.read_text(encoding="ascii").splitlines():
            name, _, counters = line.partition(":")
            if name.strip() == self.name:
                return int(counters.split()[_TX_DROPPED_COLUMN])
        raise TunGone(f"{self.name} is not in this network namespace any more: start again")

    def _fill_batch(self, limit: int, admit: Callable[[memoryview], bool]) -> None:
        batch, descriptor = self._batch, self._descriptor
        try:
            for _ in range(limit):
                if not batch.has_room:
                    return
                space = batch.space()
                length = os.readv(descriptor, [space])
                if admit(space[:length]):
                    batch.append(length)
        except BlockingIOError:
            pass
        except OSError as error:
            # What was read before the failure is still good; the failure will be there at the next call.
            if not len(batch):
                raise self._failure(error) from error

    def _failure(self, error: OSError) -> Exception:
        if error.errno == errno.EBADFD:
            return TunGone(f"{self.name} was deleted by another program: start again")
        if error.errno == errno.EBADF:
            return trio.ClosedResourceError(f"{self.name} was closed")
        return SystemFailure(f"cannot read from {self.name} ({_errno_name(error)}): start again")


def open_tun(name: str, *, has_queues: bool = False) -> Tun:
    """Make a TUN device called *name* in the calling thread's network namespace. It starts down, with no address.

    Args:
        has_queues: it may have more than one queue: see `Tun.open_queue`.

    Raises:
        UsageError: *name* is no length for a device name.
        NotPermitted: /dev/net/tun may not be opened, or there is no CAP_NET_ADMIN; the text says which.
        CannotCreate: a device of that name exists, the kernel refuses the name, or it has no TUN driver.
        SystemFailure: anything else.
    """
    if not 0 < len(name.encode()) <= _MAX_NAME_BYTES:
        raise UsageError(f"TUN name {name!r}: use 1 to {_MAX_NAME_BYTES} bytes")
    return Tun(*_attach(name, _IFF_TUN | _IFF_NO_PI | _IFF_TUN_EXCL | (_IFF_MULTI_QUEUE if has_queues else 0)))


def _attach(name: str, flags: int) -> tuple[int, str]:
    """Return a descriptor of the device called *name*, and what the kernel calls it."""
    descriptor = _open_node()
    try:
        answer = fcntl.ioctl(descriptor, _TUNSETIFF, _IFREQ.pack(name.encode(), flags))
    except OSError as error:
        os.close(descriptor)
        raise _create_failure(error, name) from error
    return descriptor, _IFREQ.unpack(answer)[0].rstrip(b"\0").decode()


def check_driver() -> None:
    """Find out whether a device can be made, as far as that can be told without making one.

    Raises:
        NotPermitted, CannotCreate, SystemFailure: as `open_tun` would.
    """
    descriptor = _open_node()
    try:
        fcntl.ioctl(descriptor, _TUNGETFEATURES, bytes(4))
    except OSError as error:
        raise SystemFailure(f"cannot use {_NODE} ({_errno_name(error)}): is it really the TUN driver's?") from error
    finally:
        os.close(descriptor)


def check_name(name: str) -> None:
    """Find out whether a device called *name* is in the calling thread's network namespace.

    Raises:
        CannotCreate: as `open_tun` would.
    """
    if name in (taken for _, taken in socket.if_nameindex()):
        raise _create_failure(OSError(errno.EBUSY, os.strerror(errno.EBUSY)), name)


def _open_node() -> int:
    try:
        return os.open(_NODE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise _open_failure(error) from error


def _open_failure(error: OSError) -> EngError:
    failed = f"cannot open {_NODE} ({_errno_name(error)})"
    if error.errno == errno.ENOENT:
        return CannotCreate(f"{failed}: load the driver (modprobe tun), or give this container the device")
    if error.errno in (errno.ENODEV, errno.ENXIO):
        return CannotCreate(f"{failed}: this kernel has no TUN driver: load it (modprobe tun)")
    if isinstance(error, PermissionError):
        cure = f"run as root, or let this user open it (chmod 0666 {_NODE})"
        return NotPermitted(f"{failed}: the device's mode keeps out user {os.geteuid()}: {cure}")
    return SystemFailure(f"{failed}: {error.strerror}")


def _create_failure(error: OSError, name: str) -> EngError:
    failed = f"cannot create TUN {name} ({_errno_name(error)})"
    if error.errno == errno.EPERM:
        return NotPermitted(f"{failed}: run as root or grant CAP_NET_ADMIN to this process")
    if error.errno == errno.EBUSY:
        return CannotCreate(f"{failed}: the name is taken: choose another with --tun-name, or remove that device")
    if error.errno == errno.EINVAL:
        return CannotCreate(f"{failed}: the kernel refuses the name: choose another with --tun-name")
    return SystemFailure(f"{failed}: {error.strerror}: is {_NODE} really the TUN driver's?")


def _errno_name(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, str(error.errno))
