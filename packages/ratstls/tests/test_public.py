"""What the package calls its own in public is there, and naming it loads no library."""

from __future__ import annotations

import subprocess
import sys

import ratstls


def test_every_public_name_is_there() -> None:
    assert sorted(ratstls.__all__) == ratstls.__all__
    assert [name for name in ratstls.__all__ if not hasattr(ratstls, name)] == []


def test_an_import_loads_no_library() -> None:
    """With a path that leads nowhere: whoever looked for the library would say so."""
    script = "import ratstls, sys; sys.exit('librats_tls' in open('/proc/self/maps').read())"
    done = subprocess.run(
        [sys.executable, "-c", script], env={"RATSTLS_LIBRARY": "/nowhere"}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
