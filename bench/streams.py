"""One attested stream beside trio's own TLS stream and a plain one, over loopback, both ends in one process.

Run by itself with a library in RATSTLS_LIBRARY, or by ``./dev bench streams``, which builds the tests' stand-in: it
encrypts with OpenSSL, as the real one does.
"""

from __future__ import annotations

import json
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Final

import trio

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "native"))
import standin

SIZES: Final = (65_536, 16_384, 1_400)
SLICES: Final = 10

Streams = tuple[trio.abc.Stream, trio.abc.Stream]
Make = Callable[[Path], Awaitable[Streams]]
Figure = Callable[..., Awaitable[float]]


async def plain(_: Path) -> Streams:
    """Two ends of a TCP connection."""
    with trio.socket.socket() as listener:
        await listener.bind(("127.0.0.1", 0))
        listener.listen()
        near = await trio.open_tcp_stream(*listener.getsockname())
        far, _ = await listener.accept()
    return near, trio.SocketStream(far)


async def tls(directory: Path) -> Streams:
    """The same under trio.SSLStream."""
    pem = make_certificate(directory)
    near, far = await plain(directory)
    client, server = ssl.create_default_context(cafile=pem), ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    client.check_hostname = False
    server.load_cert_chain(pem)
    streams = trio.SSLStream(near, client), trio.SSLStream(far, server, server_side=True)
    async with trio.open_nursery() as nursery:
        for stream in streams:
            nursery.start_soon(stream.do_handshake)
    return streams


async def attested(directory: Path) -> Streams:
    """The same under a RatsTlsStream."""
    import links
    from ratstls._library import load

    near, far = await plain(directory)
    return await links.link_over(load(), (near, far))


MAKE: Final[dict[str, Make]] = {"attested": attested, "trio.SSLStream": tls, "plain": plain}


def make_certificate(directory: Path) -> Path:
    """Make a key and a certificate that vouches for itself, in one file."""
    pem = directory / "both.pem"
    if not pem.exists():
        key, certificate = directory / "key.pem", directory / "certificate.pem"
        words = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=bench"
        command = ["openssl", *words.split(), "-keyout", str(key), "-out", str(certificate)]
        subprocess.run(command, check=True, capture_output=True)
        pem.write_text(key.read_text() + certificate.read_text())
    return pem


async def throughput(streams: Streams, size: int, seconds: float) -> float:
    """Send pieces of *size* one way and return MB/s of processor time, of both ends together."""
    near, far = streams
    piece, sent, received = bytes(size), 0, 0

    async def receive() -> None:
        nonlocal received
        while received < sent or not is_over:
            received += len(await far.receive_some(65_536))

    is_over = False
    began_s, cpu_s = time.monotonic(), time.process_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        while time.monotonic() - began_s < seconds:
            sent += size
            await near.send_all(piece)
        sent += 1
        is_over = True
        await near.send_all(b"x")
    return received / (time.process_time() - cpu_s) / 1e6


async def round_trip(streams: Streams, seconds: float) -> float:
    """Send 64 bytes there and back again and again, and return microseconds of processor time for each."""
    near, far = streams
    count, began_s, cpu_s = 0, time.monotonic(), time.process_time()
    while time.monotonic() - began_s < seconds:
        for one, other in ((near, far), (far, near)):
            await one.send_all(bytes(64))
            left = 64
            while left:
                left -= len(await other.receive_some(left))
        count += 1
    return (time.process_time() - cpu_s) / count * 1e6


async def measure(rounds: int, seconds: float) -> dict[str, dict[str, list[float]]]:
    """Return the figures of each kind of stream, round by round; *seconds* are for each figure and kind.

    The kinds take turns many times a round, of whose figures the middle one counts: what else the machine does, on
    the same core as well, changes what a second of processor time is worth from one moment to the next.
    """
    figures: dict[str, Figure] = {f"mb_per_cpu_s_{size}": partial(throughput, size=size) for size in SIZES}
    figures["round_trip_cpu_us"] = round_trip
    results: dict[str, dict[str, list[float]]] = {name: {figure: [] for figure in figures} for name in MAKE}
    with tempfile.TemporaryDirectory(prefix="eng-bench-") as directory:
        for _ in range(rounds):
            made = {name: await make(Path(directory)) for name, make in MAKE.items()}
            for figure, take in figures.items():
                slices: dict[str, list[float]] = {name: [] for name in made}
                for _ in range(SLICES):
                    for name, streams in made.items():
                        slices[name].append(await take(streams, seconds=seconds / SLICES))
                for name, values in slices.items():
                    results[name][figure].append(statistics.median(values))
            for streams in made.values():
                for stream in streams:
                    await trio.aclose_forcefully(stream)
    return results


def run(*, rounds: int, seconds: float) -> None:
    """Measure in a process of its own with the stand-in, and print its table and JSON."""
    with tempfile.TemporaryDirectory(prefix="eng-bench-") as directory:
        installation = standin.Installation(standin.build(Path(directory) / "rats-tls"))
        done = installation.run("-c", _CHILD, str(Path(__file__).parents[1]), str(rounds), str(seconds))
    sys.stderr.write(done.stderr)
    print(done.stdout, end="")


_CHILD: Final = "import sys; sys.path.insert(0, sys.argv[1]); from bench.streams import main; main()"


def main() -> None:
    """Measure here. The library is the one that the environment names."""
    rounds, seconds = int(sys.argv[2]), float(sys.argv[3])
    results = trio.run(measure, rounds, seconds)
    print(f"{'':22}", *(f"{name:>16}" for name in results), f"{'attested/SSLStream':>20}", sep="")
    for figure in results["plain"]:
        cells = "".join(f"{statistics.median(figures[figure]):16.1f}" for figures in results.values())
        pairs = zip(results["attested"][figure], results["trio.SSLStream"][figure], strict=True)
        print(f"{figure:22}{cells}{statistics.median(ours / theirs for ours, theirs in pairs):20.2f}")
    print(json.dumps({"rounds": rounds, "seconds": seconds, "results": results}))
