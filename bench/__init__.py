"""Measure ENG beside what it is compared with, in one run, on hosts made of network namespaces."""

import sys
from pathlib import Path

# The benchmarks walk the demo's hosts, and encrypt with the tests' stand-in.
_ROOT = Path(__file__).parents[1]
sys.path += [str(_ROOT / "examples" / "demo"), str(_ROOT / "tests" / "native")]
