"""The command line of echosvr: options, one line of result or of error, and the exit code."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

import trio

from echosvr import __version__
from echosvr.client import Echo, exchange_tcp, exchange_udp
from echosvr.errors import Failure
from echosvr.server import serve_tcp, serve_udp

EXIT_USAGE = 64  # sysexits.h
EXIT_INTERRUPTED = 128 + signal.SIGINT  # what a shell makes of it


def main(argv: Sequence[str] | None = None) -> int:
    """Run the client or the server and return the exit code."""
    code, handler = 0, signal.getsignal(signal.SIGINT)
    try:
        if handler == signal.SIG_DFL:  # as it is while this program is imported
            signal.signal(signal.SIGINT, signal.default_int_handler)
        options = _parser().parse_args(argv)
        logging.basicConfig(format="echosvr: %(message)s")
        trio.run(_serve if options.command == "server" else _exchange, options)
    except* Failure as failures:
        for failure in failures.exceptions:
            print(f"echosvr: {failure}", file=sys.stderr)
            code = failure.exit_code if isinstance(failure, Failure) else code
    except* KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    finally:
        signal.signal(signal.SIGINT, handler)
    return code


async def _serve(options: argparse.Namespace) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(_cancel_on_signal, nursery.cancel_scope)
        if options.udp:
            await serve_udp(options.host, options.port, ready=_print_ready)
        else:
            await serve_tcp(options.host, options.port, options.reply_delay, ready=_print_ready)


async def _cancel_on_signal(scope: trio.CancelScope, task_status: trio.TaskStatus[None]) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        async for _ in signals:
            scope.cancel()


def _print_ready(addresses: str) -> None:
    print(f"ready: {addresses}", file=sys.stderr, flush=True)


async def _exchange(options: argparse.Namespace) -> None:
    exchange, protocol = (exchange_udp, "udp") if options.udp else (exchange_tcp, "tcp")
    echo = Echo()
    started_s = trio.current_time()
    for _ in range(options.connections):
        await exchange(options.host, options.port, options.bytes, echo)
    seconds = trio.current_time() - started_s
    over = "" if options.connections == 1 else f" over {options.connections} connections"
    rate = echo.received_bytes * 8 / seconds / 1e6
    print(
        f"{protocol} {options.host}:{options.port}: {echo.received_bytes} bytes echoed whole{over} in {seconds:.3f} s, "
        f"{rate:.1f} Mbit/s each way, sha256 {echo.received_hash.hexdigest()}"
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"{self.prog}: {message}: see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="echosvr", description="An ordinary echo server and client.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="client|server")

    server = commands.add_parser("server", help="send back what comes", allow_abbrev=False)
    server.add_argument("--host", metavar="H", help="listen on this address only (default: every one)")
    server.add_argument("--port", metavar="P", type=_port, default=7, help="port, 0 for any free one (default: 7)")
    kind = server.add_mutually_exclusive_group()
    kind.add_argument("--udp", action="store_true", help="echo datagrams instead of TCP connections")
    kind.add_argument(
        "--reply-delay",
        metavar="S",
        type=_seconds,
        help="answer only S seconds after the client has shut down its sending side; holds all it sent in memory",
    )

    client = commands.add_parser("client", help="send, and check what comes back", allow_abbrev=False)
    client.add_argument("--host", metavar="H", default="localhost", help="the server (default: localhost)")
    client.add_argument("--port", metavar="P", type=_port, default=7, help="its port (default: 7)")
    client.add_argument("--bytes", metavar="N", type=_positive, help="send N random bytes (default: a short greeting)")
    client.add_argument(
        "--connections", metavar="N", type=_positive, default=1, help="do it N times, one after another (default: 1)"
    )
    client.add_argument("--udp", action="store_true", help="send datagrams, each after the echo of the one before")
    return parser


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not int(text) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: use 0 to 65535")
    return int(text)


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r}: use a whole number from 1")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 86400:
        raise argparse.ArgumentTypeError(f"{text!r}: use seconds from 0 to 86400")
    return seconds
