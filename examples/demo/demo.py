"""``./dev demo``: an unmodified program's bytes cross four hosts, and a gateway dies on the way. Takes half a minute.

``./dev demo --rats-tls`` does it over attested links, and says what they prove.

The hosts are network namespaces of this machine; nothing outside them is touched. Needs root, or a /dev/net/tun that
others may open: then the demo makes itself a user namespace.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import textwrap
import time
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path as FilePath
from typing import Final

from attested import attested_path, build_standin, encrypted_path
from path import BIN, PLACES, Path, Place, Program

PORT: Final = "7"
NOWHERE: Final = "1.1.1.1"
ECHOED_BYTES: Final = 5_000_000
TRANSFER_BYTES: Final = 200_000_000
TUN_NODE: Final = FilePath("/dev/net/tun")
_INSIDE: Final = "ENG_DEMO_INSIDE"
_REAL: Final = """\
attested by {}, with null plug-ins (--insecure-no-attestation): this machine is no enclave.
All three links are encrypted, and NOBODY has proved anything: whoever answers would be accepted.
"""
_STANDIN: Final = """\
attested by the tests' stand-in: there is no librats_tls here ($RATSTLS_LIBRARY, /usr/local/lib/rats-tls).
The links are TLS 1.3 for real, and programs judge evidence by a policy for real; but the evidence is
MADE UP, by a library that says whatever it is told. It proves nothing about this machine.
"""


def main() -> int:
    """Show the path and return 0 if all of it held."""
    parser = ArgumentParser(prog="demo", description="Show the whole path on four hosts made of network namespaces.")
    parser.add_argument("--rats-tls", action="store_true", help="over attested links")
    options = parser.parse_args()
    if os.geteuid() != 0:
        return _enter_user_namespace()
    began_s = time.monotonic()
    print(f"""\
Four hosts on this machine, made of network namespaces; nothing else on it is touched.

    app            near           far            server
    10.81.1.1 ──── 10.81.1.2
                   10.81.2.1 ──── 10.81.2.2
                                  10.81.3.1 ──── 10.81.3.2
    enta client    entg           entg           enta server :{PORT}
""")
    with _chosen_path(with_rats_tls=options.rats_tls) as path:
        path.start()
        _say("started", f"two agents and two gateways, ready after {time.monotonic() - began_s:.1f} s")
        if options.rats_tls:
            _show_peers(path)
        _show_rules(path)
        with path.running("server", "echosvr", "server", "--port", PORT):
            _show_echo(path)
            _show_hops(path)
            is_whole = _show_restart(path)
        is_clean = _show_clean_up(path)
    _say("done", f"after {time.monotonic() - began_s:.0f} s, all hosts removed")
    return 0 if is_whole and is_clean else 1


@contextmanager
def _chosen_path(*, with_rats_tls: bool) -> Iterator[Path]:
    """Make the path with plain links or attested ones, not started yet."""
    with tempfile.TemporaryDirectory(prefix="eng-demo-") as name:
        directory = FilePath(name)
        if not with_rats_tls:
            chosen = Path(capture=[PORT], replay=[PORT])
        elif (library := _installed_library()) is not None:
            _say("links", _REAL.format(library))
            chosen = encrypted_path(library, capture=[PORT], replay=[PORT])
        else:
            _say("links", _STANDIN)
            chosen = attested_path(build_standin(directory), directory, capture=[PORT], replay=[PORT])
        with chosen as path:
            yield path


def _installed_library() -> FilePath | None:
    from ratstls._library import DEFAULT_PATH, VARIABLE

    library = FilePath(os.environ.get(VARIABLE) or DEFAULT_PATH)
    return library if library.exists() else None


def _show_peers(path: Path) -> None:
    """Print what each of those that dial found out about whom it dialled, as `status` tells it."""
    status = {place: path.programs[place].status() for place in PLACES}
    peers = {
        "app      of near": status["app"]["uplink"]["attested"]["peer"],
        "near     of far": status["near"]["legs"]["entg"]["attested"]["peer"],
        "server   of far": status["server"]["uplink"]["attested"]["peer"],
    }
    lines = (textwrap.fill(f"{who:<18}{peer}", 100, subsequent_indent=" " * 18) for who, peer in peers.items())
    _say("peers", "\n".join(lines))


def _say(topic: str, text: str) -> None:
    """Print a paragraph under its topic."""
    first, *rest = text.splitlines()
    print(f"{topic:<9}{first}", *(f"{'':9}{line}" for line in rest), sep="\n", flush=True)


def _show_rules(path: Path) -> None:
    app, server = path.hosts["app"], path.hosts["server"]
    rules = [
        *_lines(app.run("nft", "list", "table", "inet", "eng_default"), "dnat"),
        *_lines(app.run("ip", "rule"), f"dport {PORT}"),
        *_lines(app.run("nft", "list", "table", "inet", "eng_default_guard"), f"dport {PORT}"),
        *_lines(server.run("nft", "list", "table", "inet", "eng_default"), "redirect"),
    ]
    _say("rules", "\n".join(f"{place:<8}{rule}" for place, rule in zip(_places_of(rules), rules, strict=True)))


def _lines(text: str, word: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if word in line]


def _places_of(rules: list[str]) -> list[str]:
    return ["server" if "redirect" in rule else "app" for rule in rules]


def _show_echo(path: Path) -> None:
    command = ("echosvr", "client", "--host", NOWHERE, "--port", PORT, "--bytes", str(ECHOED_BYTES))
    answer = path.hosts["app"].run(str(BIN / command[0]), *command[1:])
    _say("echo", f"app$ {' '.join(command)}      ({NOWHERE} exists on none of these hosts)\n{answer.strip()}")


def _show_hops(path: Path) -> None:
    """Print what each program counted, in the direction of the server and back."""
    groups: dict[Place, tuple[str, str]] = {
        "app": ("to_gateway", "from_gateway"),
        "near": ("to_entg", "to_enta"),
        "far": ("to_enta", "to_entg"),
        "server": ("from_gateway", "to_gateway"),
    }
    rows = ["                 to the server               back                 dropped"]
    for place, (there, back) in groups.items():
        counters = path.programs[place].status()["counters"]
        cells = [f"{counters[group]['packets']:>8} packets {counters[group]['bytes']:>10} B" for group in (there, back)]
        name = FilePath(path.programs[place].argv[0]).name
        rows.append(f"{place:<7}{name:<5}{cells[0]}  {cells[1]}  {sum(counters.get('dropped', {}).values()):>6}")
    _say("hops", "\n".join(rows))


def _show_restart(path: Path) -> bool:
    """Kill a gateway in the middle of a transfer, bring it back, and tell whether every byte arrived."""
    gateway = path.programs["near"]
    argv = ("echosvr", "client", "--host", NOWHERE, "--port", PORT, "--bytes", str(TRANSFER_BYTES))
    with path.running("app", *argv, ready=None) as transfer:
        before = _carried(gateway)
        while _carried(gateway) < before + TRANSFER_BYTES // 10 and transfer.process.poll() is None:
            time.sleep(0.02)
        gateway.kill()
        time.sleep(1)
        is_under_way = transfer.process.poll() is None
        gateway.start()
        gateway.wait_for("ready")
        code = transfer.process.wait(60)
        _say(
            "restart",
            f"app$ {' '.join(argv)}\n"
            f"{'under way' if is_under_way else 'already over (this machine is too fast)'}: kill -9 of entg on near,"
            " started again one second later\n"
            f"{transfer.log().strip()}\nthe same connection, exit {code}",
        )
    return code == 0 and is_under_way


def _carried(gateway: Program) -> int:
    counters = gateway.status()["counters"]
    return int(counters.get("to_entg", {}).get("bytes", 0))


def _show_clean_up(path: Path) -> bool:
    codes = [path.programs[place].stop() for place in PLACES]
    left = [
        line
        for place in ("app", "server")
        for command in (("nft", "list", "ruleset"), ("ip", "rule", "show", "protocol", "78"), ("ip", "link"))
        for line in path.hosts[place].run(*command).splitlines()
        if re.search(r"\beng(0:|_)|proto", line)
    ]
    _say("stopped", f"by SIGTERM: exit codes {codes}; left on the hosts: {'; '.join(left) or 'nothing'}")
    return codes == [0, 0, 0, 0] and not left


def _enter_user_namespace() -> int:
    """Start again as root of a user namespace, or say what is missing."""
    if os.environ.get(_INSIDE):
        return _refuse("the user namespace did not make us root")
    if not os.access(TUN_NODE, os.R_OK | os.W_OK):
        return _refuse(
            f"{TUN_NODE} is missing or not for this user: run as root, or let an administrator change its mode"
        )
    unshare = ["unshare", "--user", "--map-root-user", "--net", "--mount"]
    if subprocess.run([*unshare, "true"], check=False).returncode:
        return _refuse("this user may not make user namespaces (see above): run as root")
    os.environ[_INSIDE] = "1"
    # iproute2 keeps its namespaces under /run, which in here is ours.
    script = 'mount -t tmpfs tmpfs /run && exec "$@"'
    argv = [*unshare, "sh", "-c", script, "demo", sys.executable, __file__, *sys.argv[1:]]
    return subprocess.run(argv, check=False).returncode


def _refuse(why: str) -> int:
    print(f"demo: {why}", file=sys.stderr)
    return 77


if __name__ == "__main__":
    sys.exit(main())
