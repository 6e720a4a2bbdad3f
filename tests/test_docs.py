"""The pages lead where they say they do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [
    path
    for pattern in ("*.md", "docs/**/*.md", "packages/*/*.md", "examples/**/*.md", "bench/*.md")
    for path in sorted(ROOT.glob(pattern))
]
CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.+)$", re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """What can stand after the # of a link to a page, made from its headings as forges do."""
    headings = HEADING.findall(re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    """The links of a page into this repository that lead nowhere. Nothing here asks the network about others."""
    broken = []
    for target in LINK.findall(CODE.sub("", page.read_text())):
        name, _, anchor = target.partition("#")
        linked = page.parent / name if name else page
        is_elsewhere = re.match(r"[a-z]+:", target)
        if not is_elsewhere and (not linked.exists() or (anchor and anchor not in anchors(linked))):
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_a_file_and_a_heading_that_exist(page: Path) -> None:
    """Of every page in the repository."""
    assert broken_links(page) == []


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path) -> None:
    """To a page that is missing as well as to a heading that is; what stands in code is no link."""
    page = tmp_path / "page.md"
    page.write_text("# One & two\n\n[a](other.md) [b](#three) [c](#one--two) `[d](code.md)` [e](https://example.com)\n")
    assert broken_links(page) == ["other.md", "#three"]
