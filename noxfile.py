"""The sessions of `./dev`, and nothing else. They run in the environment that `./dev` made, which has all they need."""

from __future__ import annotations

from pathlib import Path

import nox

nox.options.default_venv_backend = "none"
nox.options.sessions = ["lint", "types", "imports", "test"]

PROJECTS = [*sorted(Path("packages").iterdir()), Path("examples/echosvr")]
PARALLEL = ["--numprocesses=2", "--dist=loadfile"]


@nox.session
def demo(session: nox.Session) -> None:
    """Show the whole path on four hosts made of network namespaces, on this machine."""
    session.run("python", "examples/demo/demo.py", *session.posargs)


@nox.session
def test(session: nox.Session) -> None:
    """Run every test that CI runs. What follows `./dev test` goes to pytest."""
    session.run("pytest", *(session.posargs or PARALLEL))


@nox.session
def coverage(session: nox.Session) -> None:
    """Run the tests and tell which branches none of them takes, in programs that they start too."""
    session.run("pytest", *PARALLEL, "--cov", "--cov-report=term", *session.posargs)


@nox.session
def soak(session: nox.Session) -> None:
    """Run the tests that take minutes to hours."""
    session.run("pytest", "-m", "soak", "--timeout=7200", *session.posargs)


@nox.session
def vsock(session: nox.Session) -> None:
    """Run the tests that need a real AF_VSOCK in a virtual machine; `./dev vsock --nested` those of an enclave."""
    session.run("python", "-m", "tests.vsock.cli", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check the code's manners and its layout. `./dev lint --fix` puts right what it can."""
    fix = "--fix" in session.posargs
    session.run("ruff", "check", *(["--fix"] if fix else []))
    session.run("ruff", "format", *([] if fix else ["--check"]))


@nox.session
def types(session: nox.Session) -> None:
    """Check the types of everything, tests included."""
    session.run("mypy", *session.posargs)


@nox.session
def imports(session: nox.Session) -> None:
    """Check that the packages' layers hold."""
    session.run("lint-imports", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Check that links lead somewhere and that promises have the tests they claim; `./dev docs --write` lists those."""
    if "--write" in session.posargs:
        session.run("python", "tests/test_proves.py")
    session.run("pytest", "tests/test_docs.py", "tests/test_proves.py")


@nox.session
def bench(session: nox.Session) -> None:
    """Measure all beside its peers, or what is named; --quick for less, --record to keep it, --check to compare."""
    session.run("python", "-m", "bench", *session.posargs)


@nox.session
def build(session: nox.Session) -> None:
    """Build into dist/ a wheel and a source archive of each package, and relay.pyz. Same sources, same bytes."""
    dist = Path("dist").absolute()
    for project in PROJECTS:
        with session.chdir(project):
            session.run("python", "-m", "hatchling", "build", "--directory", str(dist), silent=True)
    session.run("python", "packages/relay/build_pyz.py", str(dist / "relay.pyz"))
    session.log("built %s", " ".join(sorted(path.name for path in dist.iterdir())))


@nox.session
def lock(session: nox.Session) -> None:
    """Write requirements/*.txt again: newest releases, each with its hashes, and no word about where they come from."""
    command = [
        *("uv", "pip", "compile", "--quiet", "--upgrade", "--universal", "--python-version=3.11", "--generate-hashes"),
        *("--no-header", "--no-emit-index-url", "--no-emit-find-links"),
        *("--no-emit-package=eng-link", "--no-emit-package=eng-ratstls"),
    ]
    projects = [str(project / "pyproject.toml") for project in PROJECTS]
    build, runtime, dev = (f"requirements/{name}.txt" for name in ("build", "runtime", "dev"))
    session.run(*command, "--group=build", f"--output-file={build}")
    session.run(*command, *projects, f"--output-file={runtime}")
    together = ["--extra=iptables", "--group=dev", f"--constraints={runtime}", f"--constraints={build}"]
    session.run(*command, *projects, *together, f"--output-file={dev}")
