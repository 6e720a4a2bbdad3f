"""In an image there is one process, and the command line is that of ``entg --occlum``."""

from __future__ import annotations

import subprocess
import sys

import pytest
from entg.launch import _refuse

ATTEMPTS = {
    "subprocess": "import subprocess; subprocess.run(['true'])",
    "shell": "import os; os.system('true')",
    "fork": "import os; os.fork() or os._exit(0)",
    "posix_spawn": "import os; os.posix_spawn('/bin/true', ['true'], {})",
    "exec": "import os; os.execv('/bin/true', ['true'])",
    "multiprocessing": "import multiprocessing as m; m.Process(target=print).start()",
}


def child(*code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-I", "-c", "; ".join(code)], capture_output=True, text=True, timeout=50, check=False
    )


@pytest.mark.proves("D19")
@pytest.mark.parametrize("attempt", ATTEMPTS.values(), ids=ATTEMPTS.keys())
def test_no_way_to_start_a_process_is_left(attempt: str) -> None:
    assert child(attempt).returncode == 0  # the control
    refused = child("from entg.launch import forbid_processes", "forbid_processes()", attempt)
    assert refused.returncode == 1
    assert "an enclave has one process" in refused.stderr


def test_only_what_starts_a_process_is_refused() -> None:
    """An audit hook stays for good, so that here it is only asked."""
    for event in ("os.fork", "subprocess.Popen", "os.exec"):
        with pytest.raises(PermissionError, match=f"^{event}: an enclave has one process"):
            _refuse(event, ())
    for event in ("open", "import", "socket.connect", "os.putenv"):
        _refuse(event, ())


def test_it_is_entg_with_occlum_that_is_launched() -> None:
    """Whatever the host's words are: they come after ours, and no word takes that one back."""
    launched = child("import sys", "from entg.launch import main", "sys.argv[1:] = ['--log-format', 'json']", "main()")
    assert launched.stderr.startswith("entg: --occlum is for the inside of an enclave, and this is none")
    host = child("import sys", "from entg.launch import main", "sys.argv[1:] = ['--host']", "sys.exit(main())")
    assert (host.returncode, host.stderr) == (78, "entg: --host and --occlum contradict each other: choose\n")
