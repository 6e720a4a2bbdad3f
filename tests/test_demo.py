"""The demo over attested links holds, and says in plain words what they prove."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import standin
from attested import GATEWAY_BUILD
from standin import Installation

DEMO = Path(__file__).parent.parent / "examples" / "demo" / "demo.py"


def shown(**environment: str) -> str:
    """Run the demo, which must come out well, and return what it printed."""
    argv = [sys.executable, str(DEMO), "--rats-tls"]
    merged = {**os.environ, "RATSTLS_LIBRARY": "/nonexistent/librats_tls.so", **environment}
    demo = subprocess.run(argv, env=merged, capture_output=True, text=True, timeout=200, check=False)
    assert demo.returncode == 0, demo.stdout + demo.stderr
    assert demo.stderr == ""
    assert "the same connection, exit 0" in demo.stdout
    assert "left on the hosts: nothing" in demo.stdout
    return demo.stdout


@pytest.mark.timeout(240)
def test_the_demo_takes_the_stand_in_where_there_is_no_library_and_says_that_it_proves_nothing() -> None:
    """The peers' claims are shown: three links, each with a gateway whose build the policy names."""
    text = shown()
    assert "attested by the tests' stand-in" in text
    assert "MADE UP" in text
    assert text.count(f"mr_enclave={GATEWAY_BUILD}") == 3
    assert "NOBODY" not in text


@pytest.mark.timeout(240)
def test_the_demo_takes_a_library_that_is_there_and_says_that_nobody_has_proved_anything(tmp_path: Path) -> None:
    """As a build for hosts without hardware is: it encrypts. The stand-in plays it."""
    installation = Installation(standin.build(tmp_path / "rats-tls"))
    text = shown(**installation.environment)
    assert f"attested by {installation.path}, with null plug-ins" in text
    assert "NOBODY has proved anything" in text
    assert text.count("no_attestation") == 3
    assert "MADE UP" not in text
