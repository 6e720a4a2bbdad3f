"""docs/reliability.md promises what tests prove: its last column and the tests' ``proves`` markers agree.

Run as a program (``./dev docs --write``), it writes that column.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "reliability.md"
ROW = re.compile(r"^(\| ([DFG]\d+) \|.*\|) ([^|]*) \|$", re.MULTILINE)
IDS = [f"D{number}" for number in range(1, 31)] + [f"F{number:02}" for number in range(1, 74)]
IDS += [f"G{number}" for number in range(1, 31)]


def proofs() -> dict[str, set[str]]:
    """The test files that carry a marker, by the id that it names."""
    files: defaultdict[str, set[str]] = defaultdict(set)
    for path in [path for part in ("packages", "examples", "tests") for path in (ROOT / part).rglob("test_*.py")]:
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "proves":
                for argument in node.args:
                    files[ast.literal_eval(argument)].add(str(path.relative_to(ROOT)))
    return files


def with_proofs(page: str) -> str:
    """The page as it should be: each row names the files that prove it, and no others."""
    files = proofs()
    return ROW.sub(
        lambda row: f"{row[1]} {', '.join(f'`{file}`' for file in sorted(files[row[2]])) or 'not yet'} |", page
    )


def test_every_promise_has_one_row() -> None:
    """The page leaves none out, invents none and repeats none."""
    assert [row[2] for row in ROW.finditer(PAGE.read_text())] == IDS


def test_tests_name_promises_that_exist() -> None:
    """A marker with another name would prove nothing that anybody was promised."""
    assert proofs().keys() <= set(IDS)


def test_rows_name_the_tests_that_prove_them() -> None:
    """No row claims a test that does not name it, and no test goes unmentioned. ``./dev docs --write`` mends it."""
    page = PAGE.read_text()
    assert page.splitlines() == with_proofs(page).splitlines()


if __name__ == "__main__":
    PAGE.write_text(with_proofs(PAGE.read_text()))
