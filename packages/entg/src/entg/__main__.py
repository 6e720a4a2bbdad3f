"""Where ``entg`` starts: an interrupt during the imports ends it without a word, as it ends any program."""

from __future__ import annotations

import signal
import sys


def main() -> int:
    """Run ``entg`` and return its exit code."""
    # Python would raise KeyboardInterrupt inside some import. Who starts it with interrupts ignored means that.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from entg.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
