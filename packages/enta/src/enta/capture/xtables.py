"""The short-lived process that reads and writes legacy iptables rules with python-iptables: one request, one answer.

It is a process because python-iptables keeps its tables per process, crashes when threads use it, and takes a
program's standard output while it reads a rule. Run as ``python -I -m enta.capture.xtables`` by `iptables`, which
decides what the rules are; importing this module imports nothing of python-iptables.

A rule is a list of words: what iptables-save prints after ``-A CHAIN``, in its order. A table is named with its address
family, as in "ip mangle". The request and the answer are JSON on standard input and output: `Request`, `Answer`.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import errno
import importlib
import json
import os
import sys
from collections.abc import Iterator
from ipaddress import ip_network
from pathlib import Path
from typing import Any, TypedDict

from enlink.errors import EngError, SystemFailure, Unavailable

from enta.capture.legacy import table_shape, xtables_lock

# The versions that python-iptables knows the structures of, newest first.
_LIBRARIES = {
    "xtables": ("libxtables.so.12", "libxtables.so.11", "libxtables.so.10"),
    "ip4tc": ("libip4tc.so.2", "libip4tc.so.0"),
    "ip6tc": ("libip6tc.so.2", "libip6tc.so.0"),
}
# In the order of iptables-save.
_FIELDS = {"-s": "src", "-d": "dst", "-i": "in_interface", "-o": "out_interface", "-p": "protocol"}

# Choices of ours.
CHAIN_PREFIX = "eng_"
_COMMIT_ATTEMPTS = 10

Chains = dict[str, list[list[str]]]


class Change(TypedDict):
    """What to do to one table, in one step of the kernel: each packet meets the old rules or the new ones.

    Attributes:
        remove: chains to go, and with them the rules of built-in chains that jump to them.
        add: rules by chain, after that. Those of a built-in chain go to its top; another chain is made if need be.
    """

    remove: list[str]
    add: Chains


class State(TypedDict):
    """What is ours in one table.

    Attributes:
        shape: `legacy.table_shape` in hexadecimal, as it was just before the rules were read.
        chains: the chains that were asked for, and the rules of built-in chains that jump to any chain of ours.
    """

    shape: str
    chains: Chains


class Request(TypedDict):
    """Change the tables of *write*, then read those of *read*, each with the chains that it names."""

    read: dict[str, list[str]]
    write: dict[str, Change]


class Answer(TypedDict):
    """The tables that were read; or the name of an EngError's class, and its text."""

    tables: dict[str, State]
    error: str
    text: str


def main() -> None:
    """Serve the request on standard input."""
    request: Request = json.load(sys.stdin)
    answer = Answer(tables={}, error="", text="")
    try:
        answer["tables"] = _serve(request)
    except EngError as error:
        answer["error"], answer["text"] = type(error).__name__, str(error)
    json.dump(answer, sys.stdout)


def _serve(request: Request) -> dict[str, State]:
    iptc = _import_iptc()
    names = sorted({*request["read"], *request["write"]})
    for family, kind in (("ip", iptc.Table), ("ip6", iptc.Table6)):
        # The library looks for each target among the chains of every table it believes to exist, and looking brings a
        # table into being: the host would get some that nobody asked for.
        kind.existing_table_names = {table: f"{family} {table}" in names for table in kind.ALL}
    try:
        with xtables_lock():
            tables = {name: _open(iptc, name) for name in names}
            for name, change in request["write"].items():
                _write(iptc, tables[name], change)
            return {name: _state(iptc, name, tables[name], chains) for name, chains in request["read"].items()}
    except (iptc.IPTCError, iptc.XTablesError) as error:
        raise _translated(error) from error


def _open(iptc: Any, name: str) -> Any:
    table_shape(name)  # tells more plainly what is wrong, if anything is
    family, table = name.split()
    return (iptc.Table if family == "ip" else iptc.Table6)(table, autocommit=False)


def _write(iptc: Any, table: Any, change: Change, attempts: int = _COMMIT_ATTEMPTS) -> None:
    table.refresh()
    if not _edit(iptc, table, change):
        return
    try:
        table.commit()
    except iptc.IPTCError as error:
        # EAGAIN: somebody who takes no lock changed the table since we read it.
        if attempts == 1 or os.strerror(errno.EAGAIN) not in str(error):
            raise
        _write(iptc, table, change, attempts - 1)


def _edit(iptc: Any, table: Any, change: Change) -> bool:
    """Edit the library's copy of the table; tell whether anything changed."""
    doomed = [name for name in change["remove"] if table.is_chain(name)]
    for name in doomed:
        table.flush_entries(name)
    for chain, rule in list(_jumps(table)):
        if rule.target.name in doomed:
            chain.delete_rule(rule)
    for name in set(doomed) - change["add"].keys():
        table.delete_chain(name)
    for name in change["add"]:  # all of them before the first rule, which may jump to any
        if not table.is_chain(name):
            table.create_chain(name)
    for name, rules in change["add"].items():
        chain = iptc.Chain(table, name)
        if table.builtin_chain(name):
            for words in reversed(rules):
                chain.insert_rule(_rule(table, words))
        else:
            for words in rules:
                chain.append_rule(_rule(table, words))
    return bool(doomed or change["add"])


def _state(iptc: Any, name: str, table: Any, own_chains: list[str]) -> State:
    shape = table_shape(name).hex()
    table.refresh()
    chains: Chains = {
        chain: [_words(rule) for rule in iptc.Chain(table, chain).rules]
        for chain in own_chains
        if table.is_chain(chain)
    }
    for chain, rule in _jumps(table):
        chains.setdefault(chain.name, []).append(_words(rule))
    return State(shape=shape, chains=chains)


def _jumps(table: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the rules of built-in chains that jump to chains of ours, each with its chain."""
    for chain in table.chains:
        if not table.builtin_chain(chain):
            continue
        entry = table.first_rule(chain.name)
        while entry:
            # Only our own rules are taken apart: a stranger's may use what this library cannot read.
            if table.get_target(entry).startswith(CHAIN_PREFIX.encode()):
                yield chain, table.create_rule(entry, chain)
            entry = table.next_rule(entry)


def _rule(table: Any, words: list[str]) -> Any:
    rule = table.create_rule()
    extension: Any = None
    negation = ""
    rest = iter(words)
    for word in rest:
        if word == "!":
            negation = "!"
            continue
        value = next(rest)
        if word == "-m":
            extension = rule.create_match(value)
        elif word == "-j":
            extension = rule.create_target(value)
        elif word in _FIELDS:
            setattr(rule, _FIELDS[word], negation + value)
        else:
            extension.set_parameter(word.removeprefix("--"), negation + value)
        negation = ""
    return rule


def _words(rule: Any) -> list[str]:
    """Return what `_rule` would make this rule of."""
    words: list[str] = []
    for option, field in _FIELDS.items():
        value = getattr(rule, field)
        if value not in (None, "ip"):  # what the library calls any interface, any protocol
            words += _option(option, value)
    for option, extension in [*(("-m", match) for match in rule.matches), ("-j", rule.target)]:
        words += [option, extension.name]
        for name, values in extension.get_all_parameters().items():
            words += _option(f"--{name}", "".join(values))
    return words


def _option(name: str, value: str) -> list[str]:
    bare = value.removeprefix("!")
    if name in ("-s", "-d"):
        network = ip_network(bare)
        if network.prefixlen == 0:
            return []
        bare = str(network)
    return [*(["!"] if value.startswith("!") else []), name, bare]


def _import_iptc() -> Any:
    paths = {name: _load(sonames) for name, sonames in _LIBRARIES.items()}
    # Left alone, the import looks for its libraries with ldconfig, gcc and ld, some fifty processes in all.
    ctypes.util.find_library = paths.get  # type: ignore[assignment]  # what it returns for these is what it looks for
    # Where there is no distutils it asks sysconfig; where there is one, it may be all of setuptools.
    sys.modules["distutils"] = None  # type: ignore[assignment]  # how Python marks a module that must not be imported
    os.environ.setdefault("XTABLES_LIBDIR", str(Path(paths["xtables"]).parent / "xtables"))
    try:
        return importlib.import_module("iptc")
    except ModuleNotFoundError as error:
        raise Unavailable("--firewall iptables needs python-iptables: pip install 'eng-enta[iptables]'") from error


def _load(sonames: tuple[str, ...]) -> str:
    """Load the first of these libraries that is there, and return its path."""
    for soname in sonames:
        try:
            ctypes.CDLL(soname)
        except OSError:
            continue
        maps = Path("/proc/self/maps").read_text().splitlines()
        return next(line.split(maxsplit=5)[5] for line in maps if f"/{soname}" in line)
    raise Unavailable(f"--firewall iptables needs {sonames[0]}: install the package iptables")


def _translated(error: Exception) -> EngError:
    text = str(error).replace("b'", "'")  # the library prints bytes
    if "No chain/target/match by that name" in text or "can't find" in text:
        return Unavailable(f"iptables: {text}: this host lacks an extension, use --firewall nftables")
    return SystemFailure(f"iptables: {text}")


if __name__ == "__main__":
    main()
