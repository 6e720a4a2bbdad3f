"""The TUN device, on real ones in a namespace of the test's own."""

from __future__ import annotations

import errno
import os
import resource
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from ipaddress import IPv4Address

import pytest
import trio
import trio.testing
from enlink.errors import CannotCreate, SystemFailure, UsageError
from enlink.frame import Buffer, Packets
from enlink.testing.hosts import Host, Network
from enta.tun import Tun, TunGone, WriteDrop, check_driver, check_name, open_tun

NAME = "eng0"
OURS, PEER = "192.168.0.1", "192.168.0.254"
PORT = 6978
QUEUE_PACKETS = 500  # the txqueuelen that Linux gives a TUN
FAR_BEYOND_S = 20  # everything here takes milliseconds

# Runs in a mount namespace of its own, as its arguments say: mode and number of a device node to make, then user id.
ATTEMPT = """
import os, stat, sys
from enlink.errors import EngError
from enta.tun import open_tun

mode, major, minor, user = (int(argument, 0) for argument in sys.argv[1:])
os.umask(0)
if major:
    os.mknod("/dev/net/tun", stat.S_IFCHR | mode, os.makedev(major, minor))
os.seteuid(user)  # takes the effective capabilities along
try:
    open_tun("eng0")
except EngError as error:
    print(error)
    sys.exit(error.exit_code)
finally:
    os.seteuid(0)
"""


@pytest.fixture
def host() -> Iterator[Host]:
    with Network() as network:
        host = network.host("tun")
        # Else the kernel's own router solicitations turn up between the test's packets.
        host.run("sysctl", "-qw", "net.ipv6.conf.default.disable_ipv6=1")
        yield host


@contextmanager
def opened_tun(host: Host, *, has_queues: bool = False) -> Iterator[Tun]:
    """A device that carries packets, as capture.routing will make it."""
    with host.entered():
        tun = open_tun(NAME, has_queues=has_queues)
    with tun:
        host.run("ip", "address", "add", f"{OURS}/24", "dev", NAME)
        host.run("ip", "link", "set", NAME, "mtu", "65535", "up")
        yield tun


@contextmanager
def program(host: Host) -> Iterator[socket.socket]:
    """A UDP program on the host, with a send buffer that outlasts the device's queue."""
    with host.entered():
        program = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with program:
        program.settimeout(FAR_BEYOND_S)
        program.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        program.bind((OURS, PORT))
        yield program


def from_peer(data: bytes) -> bytes:
    """The datagram that the peer would send to the program."""
    udp = struct.pack("!HHHH", PORT, PORT, 8 + len(data), 0) + data
    header = struct.pack("!BBHHHBB", 0x45, 0, 20 + len(udp), 0, 0, 64, 17)
    addresses = IPv4Address(PEER).packed + IPv4Address(OURS).packed
    total = sum(struct.unpack("!9H", header + addresses))
    checksum = ~(total + (total >> 16)) & 0xFFFF
    return header + struct.pack("!H", checksum) + addresses + udp


def payload(packet: bytes) -> bytes:
    return packet[28:]


def run(main: Callable[[], Awaitable[None]]) -> None:
    """Run one trio test, with an end to it."""

    async def bounded() -> None:
        with trio.fail_after(FAR_BEYOND_S):
            await main()

    trio.run(bounded)


async def read(tun: Tun, limit: int = 64) -> list[bytes]:
    """The next packets, copied: the device's own are good only until the next call."""
    return [bytes(packet) for packet in await tun.read_packets(limit)]


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))  # noqa: PTH208  # one line, and no Path to compare


# Packets.


def test_packets_come_out_whole_and_in_order(host: Host) -> None:
    sent = [bytes([number]) * size for number, size in enumerate([0, 1, 1400, 9000, 65507])]

    async def main() -> None:
        for data in sent:
            program_socket.sendto(data, (PEER, PORT))
        packets = await read(tun)
        assert [payload(packet) for packet in packets] == sent
        for packet in packets:
            assert packet[0] == 0x45
            assert len(packet) == int.from_bytes(packet[2:4], "big")
            assert packet[12:20] == IPv4Address(OURS).packed + IPv4Address(PEER).packed

    with opened_tun(host) as tun, program(host) as program_socket:
        run(main)


def test_a_reader_waits_until_there_is_a_packet(host: Host) -> None:
    async def reader() -> None:
        received.extend(await read(tun))

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader)
            await trio.testing.wait_all_tasks_blocked()
            assert received == []
            program_socket.sendto(b"at last", (PEER, PORT))

    received: list[bytes] = []
    with opened_tun(host) as tun, program(host) as program_socket:
        run(main)
    assert [payload(packet) for packet in received] == [b"at last"]


def test_a_read_stops_at_its_limit_and_the_next_one_goes_on(host: Host) -> None:
    async def main() -> None:
        for number in range(70):
            program_socket.sendto(bytes([number]), (PEER, PORT))
        batches = [await read(tun, 3), await read(tun), await read(tun)]
        assert [len(batch) for batch in batches] == [3, 64, 3]
        assert [payload(packet)[0] for batch in batches for packet in batch] == list(range(70))

    with opened_tun(host) as tun, program(host) as program_socket:
        run(main)


def test_what_is_not_admitted_is_left_out(host: Host) -> None:
    async def main() -> None:
        for number in range(20):
            program_socket.sendto(bytes([number]), (PEER, PORT))
        packets = await tun.read_packets(admit=lambda packet: packet[-1] % 3 == 0)
        assert [payload(bytes(packet))[0] for packet in packets] == list(range(0, 20, 3))

    with opened_tun(host) as tun, program(host) as program_socket:
        run(main)


def test_a_reader_waits_on_when_nothing_was_admitted_or_all_of_it_taken(host: Host) -> None:
    taken: list[bytes] = []

    def take(packets: Packets) -> bool:
        taken.extend(payload(bytes(packet)) for packet in packets)
        return taken[-1] != b"last"

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader)
            for data in (b"no", b"one", b"no", b"two", b"last"):
                program_socket.sendto(data, (PEER, PORT))
                await trio.testing.wait_all_tasks_blocked()

    async def reader() -> None:
        packets = await tun.read_packets(admit=lambda packet: payload(bytes(packet)) != b"no", take=take)
        assert [payload(bytes(packet)) for packet in packets][-1] == b"last"

    with opened_tun(host) as tun, program(host) as program_socket:
        run(main)
    assert taken == [b"one", b"two", b"last"]


def test_packets_of_any_size_fill_several_batches_and_none_is_cut(host: Host) -> None:
    """A batch ends where the longest packet might not fit."""
    sent = [bytes([number]) * 60_000 for number in range(20)]

    async def main() -> None:
        for data in sent:
            program_socket.sendto(data, (PEER, PORT))
        received: list[bytes] = []
        batches = 0
        while len(received) < len(sent):
            received += await read(tun)
            batches += 1
        assert [payload(packet) for packet in received] == sent
        assert 1 < batches < len(sent)

    with opened_tun(host) as tun, program(host) as program_socket:
        run(main)


def test_a_written_packet_reaches_the_program(host: Host) -> None:
    with opened_tun(host) as tun, program(host) as program_socket:
        for data in (b"", b"hello", bytes(65507)):
            assert tun.write_packet(memoryview(from_peer(data))) is None
            assert program_socket.recvfrom(65535) == (data, (PEER, PORT))


def test_the_kernel_takes_what_only_the_filter_can_refuse(host: Host) -> None:
    """Why every packet is judged first: no error tells a lying packet from a good one."""
    with opened_tun(host) as tun:
        assert tun.write_packet(b"\x45") is None
        assert tun.write_packet(b"\x45" + bytes(70_000)) is None


@pytest.mark.parametrize("packet", [b"", b"\x00" * 20, b"\x50" * 20, b"\xf0" * 20])
def test_what_has_no_ip_version_is_rejected_and_counted(host: Host, packet: bytes) -> None:
    with opened_tun(host) as tun:
        assert tun.write_packet(packet) is WriteDrop.REJECTED


@pytest.mark.proves("F63")
@pytest.mark.parametrize(
    ("code", "drop"),
    [
        (errno.EAGAIN, WriteDrop.FULL),
        (errno.ENOBUFS, WriteDrop.FULL),
        (errno.ENOMEM, WriteDrop.FULL),
        (errno.EIO, WriteDrop.DOWN),
        (errno.EFAULT, WriteDrop.REJECTED),
    ],
)
def test_a_failed_write_is_a_dropped_packet_and_no_more(
    host: Host, monkeypatch: pytest.MonkeyPatch, code: int, drop: WriteDrop
) -> None:
    def write(descriptor: int, packet: bytes) -> int:
        raise OSError(code, os.strerror(code))

    with opened_tun(host) as tun, program(host) as program_socket:
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", write)
            assert tun.write_packet(from_peer(b"lost")) is drop
        assert tun.write_packet(from_peer(b"next")) is None
        assert program_socket.recv(100) == b"next"


@pytest.mark.proves("F63")
def test_packets_that_overflow_the_queue_are_counted(host: Host) -> None:
    """The sender sees no error, so this counter is the only sign that the agent was too slow."""

    async def main() -> None:
        received: list[bytes] = []
        while len(received) < QUEUE_PACKETS:
            received += await read(tun)
        assert [int(payload(packet)) for packet in received] == list(range(QUEUE_PACKETS))

    with opened_tun(host) as tun, program(host) as program_socket:
        with host.entered():
            assert tun.tx_dropped() == 0
        for number in range(QUEUE_PACKETS + 123):
            program_socket.sendto(b"%d" % number, (PEER, PORT))
        with host.entered():
            assert tun.tx_dropped() == 123
        run(main)


# Other tasks, cancellation, closing.


def test_cancelling_a_read_loses_no_packet(host: Host) -> None:
    """Cancelled before, or while it waits, or when packets are there already: each packet is returned exactly once."""
    received: list[bytes] = []

    async def read_cancelled() -> None:
        with trio.CancelScope() as scope:
            scope.cancel()
            received.extend(await read(tun, 2))

    async def main() -> None:
        for number in range(100):
            if number % 2:
                await read_cancelled()
            program_socket.sendto(bytes([number]), (PEER, PORT))
            await read_cancelled()
        while len(received) < 100:
            received.extend(await read(tun))
        assert [payload(packet)[0] for packet in received] == list(range(100))

    with opened_tun(host) as tun, program(host) as program_socket:
        run(main)


def test_a_busy_device_leaves_other_tasks_their_turn(host: Host) -> None:
    turns = 0

    async def other_task() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async def main() -> None:
        for _ in range(QUEUE_PACKETS):
            program_socket.sendto(b"", (PEER, PORT))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(other_task)
            for _ in range(QUEUE_PACKETS):
                await read(tun, 1)
            nursery.cancel_scope.cancel()
        assert abs(turns - QUEUE_PACKETS // 8) <= 3  # at both ends a turn or two are not the reader's to give

    with opened_tun(host) as tun, program(host) as program_socket:
        run(main)


def test_closing_wakes_the_reader(host: Host) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader)
            await trio.testing.wait_all_tasks_blocked()
            tun.close()

    async def reader() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await read(tun)

    with opened_tun(host) as tun:
        run(main)


def test_a_closed_device_is_gone_and_takes_no_more(host: Host) -> None:
    async def main() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await read(tun)

    before = descriptors()
    with opened_tun(host) as tun:
        assert tun.fileno() > 2
        assert NAME in host.run("ip", "-brief", "link")
    tun.close()
    assert NAME not in host.run("ip", "-brief", "link")
    assert tun.fileno() == -1
    with pytest.raises(trio.ClosedResourceError):
        tun.write_packet(from_peer(b""))
    run(main)
    assert descriptors() == before


# The device is taken away.


@pytest.mark.proves("F62")
def test_a_device_that_is_down_drops_writes_and_keeps_the_reader_waiting(host: Host) -> None:
    received: list[bytes] = []

    async def reader() -> None:
        received.extend(await read(tun))

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader)
            await trio.testing.wait_all_tasks_blocked()
            host.run("ip", "link", "set", NAME, "down")
            assert tun.write_packet(from_peer(b"lost")) is WriteDrop.DOWN
            await trio.testing.wait_all_tasks_blocked()
            assert received == []
            host.run("ip", "link", "set", NAME, "up")
            assert tun.write_packet(from_peer(b"back")) is None
            assert program_socket.recv(100) == b"back"
            program_socket.sendto(b"again", (PEER, PORT))

    with opened_tun(host) as tun, program(host) as program_socket:
        run(main)
    assert [payload(packet) for packet in received] == [b"again"]


@pytest.mark.proves("F62")
def test_a_deleted_device_is_reported_once_what_it_held_is_read(host: Host) -> None:
    async def main() -> None:
        with pytest.raises(TunGone, match="eng0 was deleted") as raised:
            await read(tun)
        assert raised.value.exit_code == 71

    with opened_tun(host) as tun:
        host.run("ip", "link", "delete", NAME)
        run(main)
        with pytest.raises(TunGone, match="eng0 was deleted"):
            tun.write_packet(from_peer(b""))
        with host.entered(), pytest.raises(TunGone, match="eng0 is not in this network namespace"):
            tun.tx_dropped()


@pytest.mark.proves("F62")
def test_deleting_the_device_wakes_the_reader(host: Host) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader)
            await trio.testing.wait_all_tasks_blocked()
            host.run("ip", "link", "delete", NAME)

    async def reader() -> None:
        with pytest.raises(TunGone):
            await read(tun)

    with opened_tun(host) as tun:
        run(main)


def test_packets_read_before_a_failure_are_returned_first(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        for data in (b"one", b"two"):
            program_socket.sendto(data, (PEER, PORT))
        assert [payload(packet) for packet in await read(tun)] == [b"one", b"two"]
        with pytest.raises(TunGone):
            await read(tun)

    def readv(descriptor: int, buffers: Sequence[Buffer]) -> int:
        try:
            return kernel_readv(descriptor, buffers)
        except BlockingIOError:
            raise OSError(errno.EBADFD, "deleted between two reads") from None

    kernel_readv = os.readv
    with opened_tun(host) as tun, program(host) as program_socket:
        monkeypatch.setattr(os, "readv", readv)
        run(main)


@pytest.mark.proves("F73")
def test_any_other_failure_of_a_read_is_the_systems() -> None:
    async def main() -> None:
        with pytest.raises(SystemFailure, match=r"cannot read from eng0 \(EISDIR\)"):
            await read(tun)

    with Tun(os.open("/", os.O_RDONLY), NAME) as tun:
        run(main)


# Several queues.


@contextmanager
def two_queues(host: Host) -> Iterator[list[Tun]]:
    with opened_tun(host, has_queues=True) as first:
        with host.entered():
            second = first.open_queue()
        with second:
            yield [first, second]


async def came_out(queues: list[Tun], data: bytes) -> Tun:
    """The queue in which the datagram with this content is; nothing else may be in any."""
    found: list[tuple[Tun, bytes]] = []

    async def read_one(queue: Tun) -> None:
        found.extend((queue, payload(packet)) for packet in await read(queue))
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for queue in queues:
            nursery.start_soon(read_one, queue)
    ((queue, found_data),) = found
    assert found_data == data
    return queue


def test_a_flow_comes_out_of_the_queue_through_which_it_came_in(host: Host) -> None:
    async def main() -> None:
        for queue in (*queues, *reversed(queues)):
            assert queue.write_packet(from_peer(b"in")) is None
            assert program_socket.recv(100) == b"in"
            program_socket.sendto(b"out", (PEER, PORT))
            assert await came_out(queues, b"out") is queue

    with two_queues(host) as queues, program(host) as program_socket:
        run(main)


def test_flows_are_spread_over_the_queues_and_each_stays_in_one(host: Host) -> None:
    async def main() -> None:
        used = set()
        for port in range(PORT, PORT + 64):
            program_socket.sendto(b"first", (PEER, port))
            queue = await came_out(queues, b"first")
            program_socket.sendto(b"second", (PEER, port))
            assert await came_out(queues, b"second") is queue
            used.add(queue)
        assert used == set(queues)

    with two_queues(host) as queues, program(host) as program_socket:
        run(main)


@pytest.mark.parametrize("left_out", [0, 1])
def test_a_queue_that_is_left_out_gets_nothing_until_it_is_back(host: Host, left_out: int) -> None:
    async def main() -> None:
        resting, working = queues[left_out], queues[1 - left_out]
        assert resting.write_packet(from_peer(b"in")) is None  # the flow is this queue's
        resting.detach()
        assert (resting.is_attached, working.is_attached) == (False, True)
        for port in range(PORT, PORT + 64):
            program_socket.sendto(b"out", (PEER, port))
            assert await came_out(queues, b"out") is working
        assert program_socket.recv(100) == b"in"
        # It may still deliver what is under way, and be gone and come back as often as it likes.
        assert resting.write_packet(from_peer(b"late")) is None
        assert program_socket.recv(100) == b"late"
        for _ in range(3):
            resting.attach()
            resting.detach()
        resting.attach()
        assert resting.is_attached
        assert resting.write_packet(from_peer(b"in")) is None
        program_socket.sendto(b"out", (PEER, PORT))
        assert await came_out(queues, b"out") is resting

    with two_queues(host) as queues, program(host) as program_socket:
        run(main)


def test_the_device_stays_as_long_as_one_of_its_queues(host: Host) -> None:
    with two_queues(host) as (first, second):
        first.close()
        assert NAME in host.run("ip", "-brief", "link")
        second.close()
        assert NAME not in host.run("ip", "-brief", "link")


def test_queues_of_a_device_that_was_deleted_are_gone(host: Host) -> None:
    with two_queues(host) as queues:
        host.run("ip", "link", "delete", NAME)
        for attempt in (queues[0].detach, queues[1].attach):
            with pytest.raises(TunGone, match="eng0 was deleted by another program"):
                attempt()


def test_a_device_that_was_not_made_for_several_queues_has_one(host: Host) -> None:
    before = descriptors()
    with opened_tun(host) as tun, host.entered(), pytest.raises(CannotCreate, match="EINVAL"):
        tun.open_queue()
    assert descriptors() == before


# Making one.


def test_a_device_lives_in_the_namespace_of_the_thread_that_made_it(host: Host) -> None:
    with opened_tun(host) as tun:
        assert tun.name == NAME
        assert NAME in host.run("ip", "-brief", "link")
        assert NAME not in [name for _, name in socket.if_nameindex()]


@pytest.mark.proves("F61")
@pytest.mark.parametrize("name", ["", "sixteen-bytes-xx", "ünëxpectedläng"])
def test_a_name_that_the_kernel_would_cut_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="use 1 to 15 bytes"):
        open_tun(name)


@pytest.mark.proves("F61")
@pytest.mark.parametrize("name", ["x", "fifteen-bytes-x"])
def test_the_shortest_and_the_longest_name_are_kept(host: Host, name: str) -> None:
    with host.entered(), open_tun(name) as tun:
        assert tun.name == name


@pytest.mark.proves("F61")
@pytest.mark.parametrize(
    "made_by",
    [
        ["ip", "tuntap", "add", "dev", NAME, "mode", "tun"],  # persistent: without IFF_TUN_EXCL we would attach to it
        ["ip", "link", "add", NAME, "type", "veth", "peer", "name", "other"],
    ],
    ids=["persistent-tun", "veth"],
)
def test_a_name_in_use_is_refused_and_left_alone(host: Host, made_by: list[str]) -> None:
    host.run(*made_by)
    links, before = host.run("ip", "-details", "link"), descriptors()
    for attempt in (open_tun, check_name):
        with host.entered(), pytest.raises(CannotCreate, match=r"TUN eng0 \(EBUSY\): the name is taken: .*--tun-name"):
            attempt(NAME)
    assert host.run("ip", "-details", "link") == links
    assert descriptors() == before


@pytest.mark.proves("F61")
def test_a_device_that_another_agent_holds_is_refused(host: Host) -> None:
    with opened_tun(host), host.entered(), pytest.raises(CannotCreate, match="the name is taken"):
        open_tun(NAME)


def test_a_name_that_the_kernel_does_not_like_is_reported(host: Host) -> None:
    with host.entered(), pytest.raises(CannotCreate, match="the kernel refuses the name"):
        open_tun("eng 0")


def test_checking_says_nothing_where_a_device_can_be_made_and_makes_none(host: Host) -> None:
    before = descriptors()
    with host.entered():
        check_driver()
        check_name(NAME)
    assert NAME not in host.run("ip", "-brief", "link")
    assert descriptors() == before


def test_checking_tells_what_would_keep_a_device_from_being_made(monkeypatch: pytest.MonkeyPatch) -> None:
    before = descriptors()
    for node, error, said in (
        ("/dev/net/absent", CannotCreate, "ENOENT.: load the driver"),
        ("/dev/null", SystemFailure, "ENOTTY.: is it really the TUN driver's"),
    ):
        monkeypatch.setattr("enta.tun._NODE", node)
        with pytest.raises(error, match=said):
            check_driver()
    assert descriptors() == before


@pytest.mark.proves("F73")
def test_running_out_of_descriptors_is_the_systems_failure() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises(SystemFailure, match="EMFILE"):
            open_tun(NAME)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.proves("F59", "F60")
@pytest.mark.parametrize(
    ("mode", "device", "user", "status", "said"),
    [
        (0, (0, 0), 0, 73, "cannot open /dev/net/tun (ENOENT): load the driver"),
        (0o666, (10, 254), 0, 73, "cannot open /dev/net/tun (ENODEV): this kernel has no TUN driver"),
        (0o600, (10, 200), 65534, 77, "cannot open /dev/net/tun (EACCES): the device's mode keeps out user 65534"),
        (0o666, (10, 200), 65534, 77, "cannot create TUN eng0 (EPERM): run as root or grant CAP_NET_ADMIN"),
        (0o666, (1, 3), 0, 71, "cannot create TUN eng0 (ENOTTY): Inappropriate ioctl for device"),
        (0o666, (10, 200), 0, 0, ""),  # the control: with everything in place the same child succeeds
    ],
    ids=["no-node", "no-driver", "node-forbidden", "no-capability", "null-device", "allowed"],
)
def test_a_missing_right_or_device_is_named_with_its_cure(
    host: Host, mode: int, device: tuple[int, int], user: int, status: int, said: str
) -> None:
    in_own_mounts = ["unshare", "--mount", "sh", "-ec", 'mount -t tmpfs none /dev/net; exec "$@"', "sh"]
    attempt = [sys.executable, "-c", ATTEMPT, *(str(number) for number in (mode, *device, user))]
    done = subprocess.run(
        host.argv([*in_own_mounts, *attempt]), capture_output=True, text=True, timeout=FAR_BEYOND_S, check=False
    )
    assert (done.returncode, done.stderr) == (status, "")
    assert done.stdout.startswith(said)
    assert len(done.stdout.splitlines()) == (1 if said else 0)
    assert stat.S_ISCHR(os.stat("/dev/net/tun").st_mode)  # noqa: PTH116  # the machine's own is as it was
