"""docs/relay.md shows spellings, commands and tables; here is that the relay understands and does what they say."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from enlink.endpoint import parse_dial, parse_listen
from enlink.errors import UsageError
from relay.allowlist import parse_rule
from relay.cli import _parser
from relay.config import BRIDGE_SETTINGS, RELAY_SETTINGS, parse_file
from relay.options import to_config
from relay.proxy_protocol import VsockConnection, encode_header
from relay.service import Relay
from relay.workers import Workers

PAGE = (Path(__file__).parent.parent / "docs" / "relay.md").read_text()
SECTIONS = {part.partition("\n")[0]: part for part in re.split("^## ", PAGE, flags=re.MULTILINE)[1:]}


def rows(section: str, heading: str) -> Iterator[list[str]]:
    """The cells of the table with that first heading."""
    table = SECTIONS[section].partition(f"| {heading} |")[2].partition("\n\n")[0]
    for line in table.splitlines()[2:]:
        yield [cell.strip() for cell in line.strip("|").split("|")]


def spelt(cell: str) -> list[str]:
    return re.findall("`([^`]+)`", cell)


def blocks(*languages: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return [text for language, text in found if language in languages]


ENDPOINTS = [(text, *row[1:]) for row in rows("Endpoints", "spelling") for text in spelt(row[0])]
RULES = [rule for row in rows("What may be dialled", "rule") for rule in spelt(row[0])]


@pytest.mark.parametrize(("text", "dialled", "listened_on"), ENDPOINTS, ids=[each[0] for each in ENDPOINTS])
def test_each_spelling_of_an_endpoint_is_what_its_row_says(text: str, dialled: str, listened_on: str) -> None:
    """What has a dash in a column is refused there, but for cids with names that can be listened on like others."""
    for parse, cell in ((parse_dial, dialled), (parse_listen, listened_on)):
        if cell != "–":
            assert str(parse(text))
        elif not (parse is parse_listen and "parent" in text):
            with pytest.raises(UsageError):
                parse(text)


def test_spellings_of_one_row_mean_the_same() -> None:
    for row, parse in ((0, parse_dial), (2, parse_dial), (4, parse_listen), (8, parse_listen), (10, parse_dial)):
        texts = spelt([row[0] for row in rows("Endpoints", "spelling")][row])
        assert len(texts) > 1
        assert len({parse(text) for text in texts}) == 1


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_is_one(rule: str) -> None:
    assert str(parse_rule(rule))


@pytest.mark.parametrize("text", blocks("toml"))
def test_each_file_is_understood(text: str) -> None:
    assert parse_file(text, "relay.toml").bridges


def commands() -> list[list[str]]:
    lines = "".join(blocks("", "sh")).replace("\\\n", "")
    found = []
    for line in lines.splitlines():
        words = shlex.split(line, comments=True) if re.match(r"(relay|python3|/opt/eng/bin/relay) ", line) else []
        for name in ("relay", "/relay.pyz", "/opt/eng/bin/relay"):
            if name in words:
                found.append([word for word in words[words.index(name) + 1 :] if word != "&"])
                break
    return found


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_each_command_is_understood(words: list[str]) -> None:
    options = _parser().parse_args(words)
    if words[0].startswith("--") and options.config is None:
        assert to_config(options, None).bridges


def test_there_are_commands() -> None:
    assert len(commands()) == 5


def test_every_option_has_a_row_and_every_row_an_option() -> None:
    documented = {option for row in rows("Options, and what each costs", "option") for option in spelt(row[0])}
    classic = {"listen", "target", "tcp-address", "vsock-address", "tcp-to-vsock", "mock-vsock", "config"}
    assert documented == {f"--{name}" for name in {*classic, *BRIDGE_SETTINGS, *RELAY_SETTINGS}}


def test_every_part_of_the_status_has_a_row() -> None:
    async def main() -> set[str]:
        config = parse_file('[[bridge]]\nlisten = "7000"\ntarget = "127.0.0.1:80"', "relay.toml")
        return {*Relay(config, None, 0).snapshot(), *Workers(config, None, []).snapshot()}

    documented = {part for row in rows("Status", "key") for part in spelt(row[0])}
    assert trio.run(main) == {"bridges", *documented}


def test_the_header_has_the_bytes_of_the_example() -> None:
    (block,) = (text for text in blocks("") if text.startswith("0d 0a"))
    digits = "".join(re.findall(r"\b[0-9a-f]{2}\b(?= |$)", re.sub("   .*", "", block), re.MULTILINE))
    assert bytes.fromhex(digits) == encode_header(VsockConnection(16, 1234, 3, 8888))


def test_the_entry_for_docker_allows_a_vsock_socket_and_no_other() -> None:
    (entry,) = map(json.loads, blocks("json"))
    assert entry["names"] == ["socket"]
    assert entry["args"] == [{"index": 0, "value": 40, "op": "SCMP_CMP_EQ"}]
