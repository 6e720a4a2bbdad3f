"""The command line of ``entg``. What a gateway does is in gateway.py and legs.py."""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import trio
from enlink.attestation import Side, add_attestation_options, read_attestation
from enlink.attested import Image, prepare
from enlink.duration import parse_duration_s
from enlink.endpoint import Tcp, parse_dial, parse_listen
from enlink.errors import ConfigError, Unavailable, UsageError
from enlink.instance import InstanceLock, live_instances
from enlink.program import ProgramParser, run_program
from enlink.status import fetch_status, render_status, serve_status
from enlink.supervise import Stopping, stop_signals

from entg import __version__, occlum
from entg.config import DEFAULT_ENTA_PORT, DEFAULT_ENTG_PORT, GatewayConfig
from entg.gateway import Gateway
from entg.occlum_image import Parts, write_image

_DESCRIPTION = """\
ENTG carries the packets of ENTAs to a peer ENTG and back. One ENTA and one peer connect at a time; whoever goes and
comes back finds its place again. Plain `entg` is `entg --host --entg-listen 6979 --enta-listen 6980`.

`entg status` shows what a running gateway does.
"""
_EXAMPLES = """\
examples:
  entg                                          on the host of the server's agent: waits for both
  entg --entg-connect gateway.example:6979      on the host of the client's agent: dials the other gateway
  entg status --json                            every counter of the gateway that runs here
"""


def main() -> int:
    """Run ``entg`` and return its exit code."""
    return run_program(_parser(), _main)


def _parser() -> ProgramParser:
    parser = ProgramParser("entg", description=_DESCRIPTION, epilog=_EXAMPLES)
    parser.set_defaults(run=_gateway)
    where = parser.add_argument_group("where it runs")
    where.add_argument("--host", action="store_true", help="on an ordinary host (the default)")
    where.add_argument(
        "--occlum",
        action="store_true",
        help="in an Occlum enclave, whose image says what links must prove; see docs/occlum.md",
    )
    links = parser.add_argument_group("links")
    links.add_argument(
        "--entg-connect", metavar="HOST:PORT", type=partial(parse_dial, kind=Tcp), help="dial the peer ENTG there"
    )
    links.add_argument(
        "--entg-listen",
        metavar="[HOST:]PORT",
        type=partial(parse_listen, kind=Tcp),
        help=f"wait for the peer ENTG there (default: {DEFAULT_ENTG_PORT})",
    )
    links.add_argument(
        "--enta-listen",
        metavar="[HOST:]PORT",
        type=partial(parse_listen, kind=Tcp),
        default=Tcp(None, DEFAULT_ENTA_PORT),
        help=f"wait for ENTAs there (default: {DEFAULT_ENTA_PORT}); without HOST on every address",
    )
    links.add_argument(
        "--wire",
        choices=("auto", "original"),
        default="auto",
        help="auto greets ENG peers when it dials, and finds out about who dials it; original says nothing but packets,"
        " as the original ENTA and ENTG want it (default: auto)",
    )
    links.add_argument(
        "--grace",
        metavar="DURATION",
        type=parse_duration_s,
        default=10.0,
        help="how long an orderly stop may take to pass on what has arrived (default: 10s)",
    )
    parser.add_spin_option(links)
    add_attestation_options(
        parser, entg_rats_tls="attest the link to the peer ENTG", enta_rats_tls="attest the links to ENTAs"
    )
    parser.add_common_options(__version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    status = commands.add_parser(
        "status",
        help="show what a running gateway does",
        description="Show what a running gateway does.",
        argument_default=argparse.SUPPRESS,
    )
    status.add_argument("--json", action="store_true", default=False, help="as JSON")
    status.add_argument(
        "--enta-port",
        type=_port,
        metavar="PORT",
        default=None,
        help="which one, where several run: by its --enta-listen port",
    )
    status.add_common_options(__version__)
    status.set_defaults(run=_status)
    image = commands.add_parser(
        "occlum-image",
        help="write what Occlum needs to build an image of a gateway",
        description="Write what Occlum needs to build an image of a gateway, and check that nothing in it is missing.",
        argument_default=argparse.SUPPRESS,
    )
    image.add_argument("directory", metavar="DIR", type=Path, help="is made, and must not exist")
    image.add_argument(
        "--python", metavar="PREFIX", type=Path, required=True, help="where Python is installed, with eng-entg[ratstls]"
    )
    image.add_argument("--rats-tls", metavar="BUILDDIR", type=Path, required=True, help="an Occlum build of rats-tls")
    image.add_argument("--policy", metavar="FILE", type=Path, dest="image_policy", default=None, help="whom to accept")
    image.add_argument(
        "--settings",
        metavar="FILE",
        type=Path,
        default=None,
        help="what links need not do, of judging and attesting (default: both, always)",
    )
    image.add_argument("--debug", action="store_true", default=False, help="the host may debug it: to try things out")
    image.add_common_options(__version__)
    image.set_defaults(run=_occlum_image)
    return parser


def _port(text: str) -> int:
    port = parse_listen(text, Tcp)
    if port.host is not None:
        raise UsageError(f"{text!r} is more than a port: write it as in {port.port}")
    return port.port


async def _main(options: argparse.Namespace) -> None:
    if options.occlum and options.run is not _gateway:
        raise ConfigError("--occlum goes with no command: in an enclave there is only the gateway")
    await options.run(options)


async def _gateway(options: argparse.Namespace) -> None:
    entg_listen = options.entg_listen
    if entg_listen is None and options.entg_connect is None:
        entg_listen = Tcp(None, DEFAULT_ENTG_PORT)
    entg_side: Side = "server" if options.entg_connect is None else "client"
    if options.occlum:
        await _in_enclave(options, entg_listen, entg_side)
        return
    wanted: dict[str, Side] = {"enta_rats_tls": "server", "entg_rats_tls": entg_side}
    attestation = read_attestation(
        options, tuple(wanted), {side for name, side in wanted.items() if getattr(options, name)}
    )
    config = GatewayConfig(
        options.enta_listen,
        entg_listen,
        options.entg_connect,
        options.wire,
        options.grace,
        attestation if options.enta_rats_tls else None,
        attestation if options.entg_rats_tls else None,
        options.spin,
    )
    gateway = await _prepared(config, entg_side)
    async with stop_signals() as stopping:
        port = await _bind(gateway, stopping)
        if port is None:
            return
        lock = InstanceLock(
            "entg",
            "default",
            listen_port=port,
            listen_address=options.enta_listen.host,
            status_path=options.status_socket,
            facts={"enta_port": port},
        )
        with lock:
            async with trio.open_nursery() as nursery:
                await nursery.start(serve_status, lock.status_path, gateway.snapshot)
                await gateway.run(stopping)
                nursery.cancel_scope.cancel()


async def _in_enclave(options: argparse.Namespace, entg_listen: Tcp | None, entg_side: Side) -> None:
    if options.host:
        raise ConfigError("--host and --occlum contradict each other: choose")
    occlum.keep_few_threads()
    enclave = occlum.enter(vars(options), vars(_parser().parse_args([])))
    config = enclave.configure(options, entg_listen, entg_side)
    gateway = await _prepared(config, entg_side, enclave.image)
    # No lock and no status socket: a file of the enclave's is not to be seen from outside.
    async with stop_signals() as stopping:
        if await _bind(gateway, stopping) is not None:
            await gateway.run(stopping)


async def _prepared(config: GatewayConfig, entg_side: Side, image: Image | None = None) -> Gateway:
    enta_attested = await prepare(config.enta_attestation, "server", config.wire, image)
    return Gateway(config, enta_attested, await prepare(config.entg_attestation, entg_side, config.wire, image))


async def _bind(gateway: Gateway, stopping: Stopping) -> int | None:
    """Return the port for ENTAs; None if the program is to stop before a port that is taken becomes free."""
    port = None
    async with trio.open_nursery() as nursery:

        async def give_up() -> None:
            await stopping.wait()
            nursery.cancel_scope.cancel()

        nursery.start_soon(give_up)
        port = await gateway.bind()
        nursery.cancel_scope.cancel()
    return port


async def _occlum_image(options: argparse.Namespace) -> None:
    parts = Parts(
        python=options.python,
        rats_tls=options.rats_tls,
        policy=options.image_policy,
        settings=options.settings,
        is_debuggable=options.debug,
    )
    write_image(options.directory, parts)
    sys.stdout.write(f"{options.directory} is ready for copy_bom and occlum build: see docs/occlum.md\n")


async def _status(options: argparse.Namespace) -> None:
    path = options.status_socket or _socket_of_running(options.enta_port)
    document = await fetch_status(path)
    sys.stdout.write(json.dumps(document, indent=2) + "\n" if options.json else render_status(document))


def _socket_of_running(port: int | None) -> Path:
    namespace = Path("/proc/thread-self/ns/net").stat().st_ino
    running = [instance for instance in live_instances("entg") if instance.network_namespace == namespace]
    chosen = [instance for instance in running if port is None or instance.facts.get("enta_port") == port]
    if not chosen:
        where = "here" if port is None else f"here with --enta-listen {port}"
        raise Unavailable(f"no entg runs {where}: start one, or give its --status-socket")
    if len(chosen) > 1:
        ports = sorted({str(instance.facts.get("enta_port")) for instance in chosen})
        if len(ports) > 1:
            raise UsageError(f"several entg run here: choose one with --enta-port, of {', '.join(ports)}")
        sockets = ", ".join(sorted(str(instance.status_path) for instance in chosen))
        raise UsageError(f"several entg run here on port {ports[0]}: choose one with --status-socket, of {sockets}")
    return chosen[0].status_path
