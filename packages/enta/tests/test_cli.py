"""What the command line decides by itself. What the programs then do is shown on whole hosts, in tests/."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from enlink.testing.hosts import Network

FAR_BEYOND_S = 40.0
# The program on a host that lacks the library.
WITHOUT = """
import sys
import enta.capture.libnftables
enta.capture.libnftables._LIBRARY_NAME = "libnftables-is-not-here.so.1"
from enta.cli import main
sys.argv = ["enta", "client", "--capture", "7", *{options!r}]
sys.exit(main())
"""


def run_without_nftables(*options: str) -> subprocess.CompletedProcess[str]:
    """Start a client where libnftables is missing; it ends at the first failure to reach a gateway."""
    script = WITHOUT.format(options=("--once", *options))
    with Network() as network:
        argv = network.host("app").argv([sys.executable, "-c", script])
        return subprocess.run(argv, capture_output=True, text=True, timeout=FAR_BEYOND_S, check=False)


@pytest.mark.proves("F65")
def test_without_libnftables_auto_takes_iptables_and_says_so() -> None:
    """A weaker guard, and a warning, beat none; the gateway is not there, so --once ends it."""
    ended = run_without_nftables()
    warning, *_, last = ended.stderr.splitlines()
    assert " second_choice firewall=iptables" in warning
    assert "cannot load" in warning
    assert last.startswith("enta: cannot connect to 127.0.0.1 port 6980")
    assert ended.returncode == 69


@pytest.mark.proves("F65")
def test_without_libnftables_nftables_is_refused_in_one_line_with_the_cure() -> None:
    """Who asks for the strong guarantee does not get the weak one."""
    ended = run_without_nftables("--firewall", "nftables")
    (line,) = ended.stderr.splitlines()
    assert line.startswith("enta: cannot load ")
    assert line.endswith("run apt install libnftables1")
    assert ended.returncode == 69


def test_status_of_nobody_is_one_line_at_once() -> None:
    """There is nothing to wait for."""
    began_s = time.monotonic()
    with Network() as network:
        argv = network.host("app").argv([sys.executable, "-c", "from enta.cli import main; raise SystemExit(main())"])
        ended = subprocess.run([*argv, "status"], capture_output=True, text=True, timeout=FAR_BEYOND_S, check=False)
    assert ended.stderr == "enta: no enta runs here: start one, or give its --status-socket\n"
    assert ended.returncode == 69
    assert time.monotonic() - began_s < FAR_BEYOND_S / 2


def test_more_gateways_than_a_device_has_queues_are_a_mistake_of_the_command_line() -> None:
    """Said before anything is changed, and not of the device."""
    gateways = [word for port in range(1, 258) for word in ("--entg-connect", f"gateway.example:{port}")]
    script = "from enta.cli import main; raise SystemExit(main())"
    argv = [sys.executable, "-c", script, "client", "--capture", "7", "--dry-run"]
    refused = subprocess.run([*argv, *gateways], capture_output=True, text=True, timeout=FAR_BEYOND_S, check=False)
    accepted = subprocess.run(
        [*argv, *gateways[:-2]], capture_output=True, text=True, timeout=FAR_BEYOND_S, check=False
    )
    assert refused.stderr == "enta: --entg-connect is there 257 times: a device has 256 queues at most\n"
    assert (refused.returncode, accepted.returncode) == (64, 0)
