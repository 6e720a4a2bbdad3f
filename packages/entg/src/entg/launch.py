"""Where ``entg`` starts in an image, in which there is one process. What it does then is cli.py's."""

from __future__ import annotations

import sys
from typing import Final

# Python's table of audit events: every way by which Python code starts a process, or becomes another.
_STARTS: Final = frozenset(
    {"os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system", "pty.spawn", "subprocess.Popen"}
)


def main() -> int:
    """Run ``entg --occlum`` with the command line, and return its exit code."""
    forbid_processes()
    sys.argv[1:1] = ["--occlum"]
    # Not before: an import of trio asks ldconfig for a library, and does well without an answer.
    from entg.__main__ import main as run

    return run()


def forbid_processes() -> None:
    """Make every attempt to start a process fail with PermissionError from here on. There is no way back."""
    sys.addaudithook(_refuse)


def _refuse(event: str, _: object) -> None:
    if event in _STARTS:
        raise PermissionError(f"{event}: an enclave has one process")
