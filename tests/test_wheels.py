"""Each package as its users get it: built, and installed without the rest of this repository."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PROJECTS = [*sorted((ROOT / "packages").iterdir()), ROOT / "examples" / "echosvr"]


def settings(project: Path) -> dict[str, Any]:
    return dict(tomllib.loads((project / "pyproject.toml").read_text())["project"])


VERSION = settings(ROOT)["version"]


def run(*argv: str | Path, cwd: Path = ROOT) -> str:
    done = subprocess.run(list(argv), cwd=cwd, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(project: Path, directory: Path, *targets: str) -> None:
    run(sys.executable, "-m", "hatchling", "build", "--directory", directory, *targets, cwd=project)


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def wheelhouse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our packages, built here, and what they need from elsewhere, as locked."""
    directory = tmp_path_factory.mktemp("wheelhouse")
    for project in PROJECTS:
        build(project, directory)
    run(
        *(sys.executable, "-m", "pip", "download", "--quiet", "--dest", directory),
        *("--require-hashes", "--requirement", ROOT / "requirements" / "runtime.txt"),
    )
    return directory


@pytest.mark.parametrize("project", PROJECTS, ids=lambda project: project.name)
def test_there_is_one_version_and_one_licence(project: Path) -> None:
    """The metadata and the code of every package agree, and siblings are pinned to exactly that version."""
    project_settings = settings(project)
    assert project_settings["version"] == VERSION
    (module,) = project.glob("src/*/__init__.py")
    assert f'__version__ = "{VERSION}"' in module.read_text().splitlines()
    assert (project / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    extras = project_settings.get("optional-dependencies", {}).values()
    names = [name for names in (project_settings["dependencies"], *extras) for name in names]
    assert [name for name in names if name.startswith("eng-") and not name.endswith(f"=={VERSION}")] == []


@pytest.mark.proves("D27")
@pytest.mark.timeout(300)
@pytest.mark.parametrize("program", ["enta", "entg", "echosvr"])
def test_a_program_starts_alone_in_an_empty_environment(program: str, wheelhouse: Path, tmp_path: Path) -> None:
    """With what its wheel declares and nothing else."""
    venv.create(tmp_path, with_pip=False)
    run(
        *(sys.executable, "-m", "pip", "--python", tmp_path / "bin" / "python", "install", "--quiet"),
        *("--no-index", "--find-links", wheelhouse, f"eng-{program}=={VERSION}"),
    )
    assert run(tmp_path / "bin" / program, "--version", cwd=tmp_path).strip() == f"{program} {VERSION}"
    assert run(tmp_path / "bin" / program, "--help", cwd=tmp_path).startswith(f"usage: {program}")


@pytest.mark.proves("D27", "G29")
@pytest.mark.timeout(300)
def test_a_second_build_gives_the_same_bytes(wheelhouse: Path, tmp_path: Path) -> None:
    """And a wheel built from the source archive is the wheel built from the repository."""
    for project in PROJECTS:
        build(project, tmp_path / "again")
    again = digests(tmp_path / "again")
    assert len(again) == 2 * len(PROJECTS)
    assert again.items() <= digests(wheelhouse).items()

    for archive in (tmp_path / "again").glob("*.tar.gz"):
        run("tar", "--extract", "--file", archive, "--directory", tmp_path)
        build(tmp_path / archive.name.removesuffix(".tar.gz"), tmp_path / "wheels", "--target", "wheel")
    wheels = digests(tmp_path / "wheels")
    assert len(wheels) == len(PROJECTS)
    assert wheels.items() <= again.items()


@pytest.mark.parametrize("project", PROJECTS, ids=lambda project: project.name)
def test_a_wheel_has_the_package_with_types_and_licence_and_nothing_else(project: Path, wheelhouse: Path) -> None:
    """No tests, no caches, nothing from beside the package."""
    wheel = f"{settings(project)['name'].replace('-', '_')}-{VERSION}"
    (package,) = (path.name for path in project.glob("src/*"))
    with zipfile.ZipFile(wheelhouse / f"{wheel}-py3-none-any.whl") as archive:
        names = set(archive.namelist())
    assert {f"{package}/py.typed", f"{wheel}.dist-info/licenses/LICENSE"} <= names
    assert {Path(name).suffix for name in names if name.startswith(f"{package}/")} == {".py", ".typed"}
    assert {name.partition("/")[0] for name in names} == {package, f"{wheel}.dist-info"}


@pytest.mark.proves("D27")
def test_locked_requirements_have_hashes_and_name_no_source() -> None:
    """Every requirement is one release with its hashes, from whichever index the installer is set up for."""
    for lock in sorted((ROOT / "requirements").iterdir()):
        text = lock.read_text()
        requirements = [line for line in text.replace("\\\n", " ").splitlines() if line and line[0] not in " #"]
        assert requirements
        assert [line for line in requirements if "==" not in line or "--hash=sha256:" not in line] == [], lock
        assert "://" not in text, lock
