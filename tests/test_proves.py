"""docs/reliability.md promises what tests prove: its rows and the tests' ``proves`` markers agree."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent
IDS = {f"D{number}" for number in range(1, 31)} | {f"F{number:02}" for number in range(1, 74)}
IDS |= {f"G{number}" for number in range(1, 31)}


def documented() -> dict[str, set[str]]:
    """The test files that the page names, by id."""
    rows = re.findall(
        r"^\| ([DFG]\d+) \|.*\| ([^|]*) \|$", (ROOT / "docs" / "reliability.md").read_text(), re.MULTILINE
    )
    assert len(rows) == len(dict(rows)), "an id has two rows"
    return {name: set(re.findall(r"`([^`]+)`", cell)) for name, cell in rows}


def marked() -> dict[str, set[str]]:
    """The test files that carry a marker, by id."""
    files: defaultdict[str, set[str]] = defaultdict(set)
    for path in [path for part in ("packages", "examples", "tests") for path in (ROOT / part).rglob("test_*.py")]:
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "proves":
                for argument in node.args:
                    files[ast.literal_eval(argument)].add(str(path.relative_to(ROOT)))
    return files


def test_every_promise_has_a_row() -> None:
    """The page leaves none out and invents none."""
    assert set(documented()) == IDS


def test_rows_name_the_tests_that_prove_them() -> None:
    """No row claims a test that does not name it, no test names an id that is not there, and none goes unmentioned."""
    pages, tests = documented(), marked()
    wrong = [
        f"{name}: {', '.join(f'`{file}`' for file in sorted(tests.get(name, ()))) or 'not yet'}"
        for name in sorted(pages.keys() | tests.keys())
        if pages.get(name, set()) != tests.get(name, set())
    ]
    assert not wrong, "the last column of docs/reliability.md should say\n" + "\n".join(wrong)
