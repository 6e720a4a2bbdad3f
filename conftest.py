"""What holds for every test: none is skipped in CI, and this machine's own network is afterwards as it was before."""

from __future__ import annotations

import difflib
import os
import signal
import subprocess
from collections.abc import Generator, Iterator
from typing import TypeVar

import pytest

pytest_plugins = ["pytester"]
Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)
_network_before = pytest.StashKey[list[str]]()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Make a failure, in CI, of a test that is skipped or expected to fail: it proves nothing."""
    return _without_excuse((yield))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Make a failure, in CI, of a module that is skipped as a whole."""
    return _without_excuse((yield))


def _without_excuse(report: Report) -> Report:
    if report.outcome == "skipped" and os.environ.get("CI") == "true":
        reason = getattr(report, "wasxfail", None) or report.longreprtext
        vars(report).pop("wasxfail", None)
        report.outcome = "failed"
        report.longrepr = f"skipped or expected to fail, which CI does not accept: {reason}"
    return report


def pytest_configure() -> None:
    """Let SIGINT interrupt, also where a shell has started us in the background with it ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    """Give each test the signals as they were: a program that has ended in this process ignores some from then on."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Note this machine's addresses, rules, routes and packet filter, where they can be read and changed."""
    if os.geteuid() == 0 and not hasattr(session.config, "workerinput"):
        session.config.stash[_network_before] = _network()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the run if a test has changed this machine's own network instead of a namespace that it made."""
    before = session.config.stash.get(_network_before, None)
    if before is not None and before != (after := _network()):
        print("\n", *difflib.unified_diff(before, after, "this machine's network before", "and after"), sep="\n")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _network() -> list[str]:
    commands = ("ip -brief address", "ip rule", "ip route show table all", "nft --stateless list ruleset")
    return [
        line
        for command in commands
        for line in subprocess.run(command.split(), capture_output=True, text=True, check=True).stdout.splitlines()
    ]
