"""``./dev vsock [pytest's arguments]``: run the tests marked ``vsock`` in a guest, where AF_VSOCK has two ends.

``./dev vsock --nested`` runs those marked ``nested`` instead: there the guest is the parent instance of an enclave,
which is a guest of its own. That takes minutes.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from pathlib import Path
from typing import Final

from enlink.errors import EngError

from tests.vsock.debian import cached, tools
from tests.vsock.files import outermost, python_and
from tests.vsock.guest import Guest

CHECKOUT: Final = Path(__file__).resolve().parents[2]
# Nothing can be written there, and what is slow is not wrong.
PYTEST: Final = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--timeout=240"]
SCRATCH: Final = "/dev/shm"  # in memory; all the rest is read-only
# What conftest.py asks on behalf of each run: the packet filter.
MODULES: Final = ["vsock_loopback", "nf_tables"]


def main(arguments: list[str]) -> int:
    """Run pytest in the guest and give its exit status."""
    is_nested = "--nested" in arguments
    arguments = [argument for argument in arguments if argument != "--nested"]
    marker = "nested" if is_nested else "vsock"
    if not any(Path(argument.partition("::")[0]).exists() for argument in arguments):
        arguments += marked(marker)
    colour = "yes" if sys.stdout.isatty() else "no"
    pytest = [*PYTEST, f"--color={colour}", "-m", marker, *arguments]
    shares = python_and(CHECKOUT)
    environment = {
        "PATH": f"{sys.prefix}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": SCRATCH,
        "TMPDIR": SCRATCH,
        "HYPOTHESIS_STORAGE_DIRECTORY": f"{SCRATCH}/hypothesis",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "CI": os.environ.get("CI", ""),
    }
    made_of = tools()
    if is_nested:
        # It boots a guest itself, with the same tools.
        guest = Guest(
            tools=made_of,
            shares=outermost([*shares, cached()]),
            modules=[*MODULES, "vhost_vsock"],
            memory_mib=2048,
            deadline_s=1200,
        )
        environment["XDG_CACHE_HOME"] = str(cached().parent)
    else:
        guest = Guest(tools=made_of, shares=shares, modules=MODULES)
    return guest.run(pytest, CHECKOUT, environment)


def marked(marker: str) -> list[str]:
    """The test files that use *marker*. To look for them inside the guest, as pytest does, takes it a minute."""
    use = re.compile(rf"\bmark\.{marker}\b")
    paths = [path for part in ("packages", "examples", "tests") for path in (CHECKOUT / part).rglob("test_*.py")]
    return [str(path.relative_to(CHECKOUT)) for path in sorted(paths) if use.search(path.read_text())]


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="vsock: %(message)s")
    try:
        sys.exit(main(sys.argv[1:]))
    except EngError as error:
        print(f"vsock: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
