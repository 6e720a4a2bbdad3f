"""docs/attestation.md says how attested links are asked for, and why there is none; here is that it still does."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from path import BIN

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "attestation.md").read_text()
SHELL = "".join(re.findall(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
COMMANDS = re.findall(r"^(?:entg|enta) .*", SHELL, re.MULTILINE)
REASON = re.compile(r"(?:reason=|LinkEnded\()\"([a-z_]+)\"")
POLICY = f'evidence = "csv"\n[[accept]]\nmeasurement = "{"11" * 32}"\n'


def test_the_page_has_an_example_for_each_of_the_four_programs() -> None:
    assert [command.split()[0] for command in COMMANDS] == ["entg", "enta", "entg", "enta"]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_programs_example_lacks_nothing_but_the_library(tmp_path: Path, command: str) -> None:
    """All options are understood, and fit each other and the policy: what is missing here comes last."""
    (tmp_path / "gateways.toml").write_text(POLICY)
    program, *words = command.replace("/etc/eng", str(tmp_path)).split()
    environment = {"RATSTLS_LIBRARY": "/nonexistent/librats_tls.so"}
    ended = subprocess.run(
        [str(BIN / program), *words], env=environment, capture_output=True, text=True, timeout=50, check=False
    )
    assert (ended.returncode, ended.stdout) == (69, "")
    assert ended.stderr.startswith(f"{program}: there is no librats_tls at /nonexistent")


def test_every_reason_for_which_there_is_no_attested_link_is_explained() -> None:
    sources = [*(ROOT / "packages/ratstls/src/ratstls").glob("*.py"), *ROOT.glob("packages/*/src/*/attested.py")]
    sources += [ROOT / "packages/entg/src/entg/handshakes.py"]
    reasons = {reason for source in sources for reason in REASON.findall(source.read_text())}
    assert {"not_tls", "refused", "resources", "too_many", "too_many_failures"} <= reasons
    assert {reason for reason in reasons if f"\n| `{reason}` |" not in PAGE} == set()
