"""docs/operations.md shows what an agent does to a host; here is that it still does."""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path

from enta.capture.ip_rules import ip_commands
from enta.capture.nftables import capture_ruleset, guard_ruleset
from enta.capture.plan import Plan, parse_captures, parse_replays

PAGE = (Path(__file__).parent.parent / "docs" / "operations.md").read_text()
CLIENT = Plan("client", IPv4Interface("192.168.0.1/24"), IPv4Address("192.168.0.254"), parse_captures(["7"]))
SERVER = Plan("server", IPv4Interface("192.168.0.254/24"), IPv4Address("192.168.0.1"), replays=parse_replays(["7"]))


def test_the_page_shows_the_commands_of_its_example_and_no_others() -> None:
    (block,) = re.findall(r"^```\n(sysctl.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert block.splitlines() == ip_commands(CLIENT)


def test_the_page_shows_the_guard_of_its_example() -> None:
    (block,) = re.findall(r"^```\n(table .*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert guard_ruleset(CLIENT).endswith(block)


def test_the_page_names_every_chain_of_the_capture_table() -> None:
    chains = {name for plan in (CLIENT, SERVER) for name in re.findall(r"chain (\w+)", capture_ruleset(plan))}
    assert chains == {"refuse", "outgoing", "leaving", "entering", "arriving", "passing", "capture", "replay"}
    assert all(f"`chain {name}`" in PAGE for name in chains)
