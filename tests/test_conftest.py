"""The rules of the test run itself: what CI refuses, and what it lets pass."""

from __future__ import annotations

from pathlib import Path

import pytest

CONFTEST = Path(__file__).parent.parent / "conftest.py"

EXCUSES = """
    import pytest

    def test_passes():
        pass

    def test_skips():
        pytest.skip("no kernel")

    @pytest.mark.xfail(reason="some day")
    def test_is_expected_to_fail():
        assert False
"""


def test_a_skipped_or_excused_test_fails_in_ci(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """CI has everything that a test can need, so a test that does not run there proves nothing."""
    monkeypatch.setenv("CI", "true")
    pytester.makeconftest(CONFTEST.read_text())
    pytester.makepyfile(EXCUSES)
    result = pytester.runpytest_subprocess()
    result.assert_outcomes(passed=1, failed=2)
    result.stdout.fnmatch_lines(["*CI does not accept*no kernel*", "*CI does not accept*some day*"])


def test_a_module_that_skips_itself_fails_in_ci(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for a whole file."""
    monkeypatch.setenv("CI", "true")
    pytester.makeconftest(CONFTEST.read_text())
    pytester.makepyfile("import pytest; pytest.importorskip('no_such_module')")
    result = pytester.runpytest_subprocess()
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*CI does not accept*no_such_module*"])


def test_a_developer_may_skip(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside CI a machine may lack something."""
    monkeypatch.delenv("CI", raising=False)
    pytester.makeconftest(CONFTEST.read_text())
    pytester.makepyfile(EXCUSES)
    pytester.runpytest_subprocess().assert_outcomes(passed=1, skipped=1, xfailed=1)


def test_a_run_that_changes_the_network_it_runs_in_fails(pytester: pytest.Pytester) -> None:
    """Tests change namespaces of their own. The run checked here has one of its own too."""
    pytester.makeconftest(CONFTEST.read_text())
    pytester.makepyfile(
        """
        import subprocess

        def test_leaves_a_rule_behind():
            subprocess.run(["ip", "rule", "add", "to", "192.0.2.1", "table", "77", "priority", "7777"], check=True)
        """
    )
    result = pytester.run("unshare", "--net", "python", "-m", "pytest")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*+7777:*192.0.2.1*"])
