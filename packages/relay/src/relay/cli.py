"""The command line of ``relay``. What a relay does is in service.py and bridge.py."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from contextlib import AsyncExitStack
from pathlib import Path

import trio
from enlink.endpoint import parse_dial, parse_listen
from enlink.errors import Unavailable, UsageError
from enlink.instance import InstanceLock, live_instances
from enlink.program import SPIN_HELP, ProgramParser, announce_ready, run_program
from enlink.status import fetch_status, render_status, serve_status
from enlink.supervise import stop_signals

from relay import __version__
from relay.bridge import where_bound
from relay.config import BRIDGE_SETTINGS, RELAY_SETTINGS, BridgeConfig, RelayConfig
from relay.loopback import set_up_loopback
from relay.options import given_options, read_file, to_config
from relay.resolver import open_resolver
from relay.service import listening_on, open_relay
from relay.vsock_proxy import add_arguments, from_options, settle
from relay.workers import Workers, own_share, work

_DESCRIPTION = """\
Relay passes connections on from one kind of socket to another: TCP, vsock, unix, and Firecracker's vsock over unix.
Whatever one side says reaches the other, to the last byte, also after one of them has finished.

`relay status` shows what a running relay does. `relay vsock-proxy` takes the arguments of AWS's vsock-proxy.
"""
_VSOCK_PROXY = """\
Do what AWS's vsock-proxy does with the same arguments and the same allow-list. A name must be listed itself, or its
addresses: to share one with a listed name is not enough, since it may lead elsewhere later.
"""
_EXAMPLES = """\
examples:
  on the parent instance: TCP clients reach vsock port 8888 of the enclave with cid 16
    relay --tcp-address 0.0.0.0:8443 --vsock-address 16:8888 --tcp-to-vsock
  in the enclave: what comes to vsock port 8888 goes to a server on its loopback device
    relay --setup-loopback --tcp-address 127.0.0.1:8443 --vsock-address any:8888
  the same on a laptop, where a TCP address takes vsock's place
    relay --mock-vsock --tcp-address 127.0.0.1:9443 --vsock-address 127.0.0.1:8443
    relay --mock-vsock --tcp-address 127.0.0.1:7443 --vsock-address 127.0.0.1:8443 --tcp-to-vsock
  any pair, and several
    relay --listen vsock://:8001 --target tcp://127.0.0.1:80 --listen 5353 --target unix:/run/resolver.sock
    relay --listen 127.0.0.1:2222 --target unix-vsock:/run/vm.vsock:22
    relay --listen systemd:web --target VSOCK-CONNECT:16:8080
  from an enclave to two services, and nowhere else
    relay --config relay.toml
"""
_logger = logging.getLogger(__name__)


def main() -> int:
    """Run ``relay`` and return its exit code."""
    return run_program(_parser(), _main)


def _parser() -> ProgramParser:
    parser = ProgramParser("relay", description=_DESCRIPTION, epilog=_EXAMPLES)
    parser.set_defaults(run=_relay)
    classic = parser.add_argument_group("between TCP and vsock")
    classic.add_argument("--tcp-address", metavar="HOST:PORT", help="the TCP side: dialled, unless --tcp-to-vsock")
    classic.add_argument(
        "--vsock-address", metavar="CID:PORT", help="the vsock side: listened on, unless --tcp-to-vsock; cid any is any"
    )
    classic.add_argument("--tcp-to-vsock", action="store_true", help="listen on TCP and dial vsock")
    classic.add_argument(
        "--mock-vsock", action="store_true", help="--vsock-address is a TCP address, to try things out"
    )
    general = parser.add_argument_group("between any two")
    general.add_argument(
        "--listen", metavar="ENDPOINT", type=parse_listen, action="append", default=[], help="accept connections there"
    )
    general.add_argument(
        "--target",
        metavar="ENDPOINT",
        type=parse_dial,
        action="append",
        default=[],
        help="and pass them on to there; both may be repeated, in pairs. Endpoints: tcp://HOST:PORT, vsock://CID:PORT,"
        " unix:PATH, unix-vsock:PATH:PORT, systemd:NAME (to listen), and socat's spellings of these",
    )
    general.add_argument(
        "--config", metavar="FILE", type=Path, help="read bridges and the options below from a TOML file instead"
    )
    _add_settings(parser)
    parser.add_common_options(__version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    status = commands.add_parser(
        "status",
        help="show what a running relay does",
        description="Show what a running relay does.",
        argument_default=argparse.SUPPRESS,
    )
    status.add_argument("--json", action="store_true", default=False, help="as JSON")
    status.add_argument("--pid", type=int, default=None, help="which one, where several run: by its process id")
    status.add_common_options(__version__)
    status.set_defaults(run=_status)
    proxy = commands.add_parser(
        "vsock-proxy",
        help="take the arguments and the allow-list of AWS's vsock-proxy",
        description=_VSOCK_PROXY,
        argument_default=argparse.SUPPRESS,
    )
    add_arguments(proxy)
    proxy.add_common_options(__version__)
    proxy.set_defaults(run=_vsock_proxy)
    return parser


def _add_settings(parser: ProgramParser) -> None:
    group = parser.add_argument_group("limits and extras")

    def add(name: str, help: str, metavar: str | None = None) -> None:
        setting = (BRIDGE_SETTINGS | RELAY_SETTINGS)[name]
        if setting.parse is None:
            group.add_argument(f"--{name}", action="store_true", default=None, help=help)
        else:
            action = "append" if setting.is_list else "store"
            group.add_argument(f"--{name}", metavar=metavar, type=setting.parse, action=action, help=help)

    add("max-concurrent-connections", "of each bridge; more wait in the backlog (default: 1024)", "N")
    add("connect-timeout", "for reaching the target (default: 10s)", "DURATION")
    add("idle-timeout", "end a connection on which nothing moves for so long (default: never)", "DURATION")
    add("max-lifetime", "end a connection that is so old (default: never)", "DURATION")
    add(
        "half-close-timeout",
        "once one side has finished, end a connection on which nothing moves for so long: for peers that never finish"
        " (default: never)",
        "DURATION",
    )
    add("grace", "how long connections may go on after SIGTERM or SIGINT (default: 10s)", "DURATION")
    add(
        "allow",
        "what may be dialled, repeatable: HOST:PORT, *.DOMAIN:PORT, CIDR:PORT, CID:PORT; PORT may be a range or *"
        " (default: the targets)",
        "RULE",
    )
    add("setup-loopback", "bring the loopback device up first, which is down in an enclave (needs CAP_NET_ADMIN)")
    add("proxy-protocol", "tell targets who connects, in a PROXY protocol v2 header before the first byte")
    add("workers", "processes that share the work (default: 1)", "N")
    add("vsock-buffer", "how much a vsock socket may hold, as in 1m (default: the kernel's 256k)", "SIZE")
    add("spin", SPIN_HELP, "DURATION")
    add("no-splice", "copy all bytes through this process, for kernels whose splice(2) misbehaves")


async def _main(options: argparse.Namespace) -> None:
    if options.command is not None and (given := given_options(options)):
        raise UsageError(
            f"{given[0]} is of no use before {options.command}, whose own options stand behind it:"
            f" see relay {options.command} --help"
        )
    await options.run(options)


async def _relay(options: argparse.Namespace) -> None:
    if (own := own_share()) is not None:
        share, assignment = own
        async with open_relay(share.of(to_config(options, share.file))) as relay:
            await work(relay, share, assignment)
        return
    file = read_file(options)
    await _serve(to_config(options, file), options.status_socket, file)


async def _vsock_proxy(options: argparse.Namespace) -> None:
    proxy = from_options(options)
    if proxy.names:
        async with open_resolver() as resolver:
            proxy = await settle(proxy, resolver.resolve)
    bridge = BridgeConfig(
        listen=proxy.listen, target=proxy.target, allow=proxy.allow, max_connections=proxy.max_connections
    )
    await _serve(RelayConfig(bridges=(bridge,)), options.status_socket)


async def _serve(config: RelayConfig, status_path: Path | None, file: str | None = None) -> None:
    if config.setup_loopback:
        set_up_loopback()
    async with AsyncExitStack() as stack:
        stopping = await stack.enter_async_context(stop_signals())
        is_alone = config.workers == 1
        relay = await stack.enter_async_context(open_relay(config)) if is_alone else None
        listeners = await stack.enter_async_context(listening_on(config, stopping))
        if not listeners:
            return
        pairs = zip(config.bridges, listeners, strict=True)
        where = " ".join(str(where_bound(bridge.listen, sockets)) for bridge, sockets in pairs)
        workers = Workers(config, file, listeners)
        lock = stack.enter_context(InstanceLock("relay", str(os.getpid()), status_path=status_path))
        async with trio.open_nursery() as nursery:
            snapshot = workers.snapshot if relay is None else relay.snapshot
            await nursery.start(serve_status, lock.status_path, snapshot)
            if relay is None:
                nursery.start_soon(_announce_workers, workers, where)
                await workers.run(stopping)
            else:
                announce_ready(_logger, listen=where)
                await relay.run(listeners, stopping)
            nursery.cancel_scope.cancel()


async def _announce_workers(workers: Workers, where: str) -> None:
    await workers.wait_until_ready()
    announce_ready(_logger, listen=where)


async def _status(options: argparse.Namespace) -> None:
    path = options.status_socket or _socket_of_running(options.pid)
    document = await fetch_status(path)
    sys.stdout.write(json.dumps(document, indent=2) + "\n" if options.json else render_status(document))


def _socket_of_running(pid: int | None) -> Path:
    namespace = Path("/proc/thread-self/ns/net").stat().st_ino
    running = [instance for instance in live_instances("relay") if instance.network_namespace == namespace]
    chosen = [instance for instance in running if pid is None or instance.pid == pid]
    if not chosen:
        where = "here" if pid is None else f"here as process {pid}"
        raise Unavailable(f"no relay runs {where}: start one, or give its --status-socket")
    if len(chosen) > 1:
        pids = ", ".join(str(instance.pid) for instance in chosen)
        raise UsageError(f"several relays run here: choose one with --pid, of {pids}")
    return chosen[0].status_path
