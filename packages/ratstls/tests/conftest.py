"""The libraries that tests run against: the stand-in, built once, and a real librats_tls wherever there is one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import standin
from ratstls._library import DEFAULT_PATH, VARIABLE
from ratstls._plugins import list_plugins
from standin import Installation


def _real() -> list[Path]:
    candidates = [Path(os.environ.get(VARIABLE) or DEFAULT_PATH)]
    return [path.resolve() for path in candidates if path.is_file()]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Take the contract to the stand-in always, and to a real library, where there is one, as far as it has plug-ins.

    What the stand-in does beyond the library, and what needs its evidence, asks for ``standin_only``.
    """
    libraries = ["stand-in", *(f"real:{path}" for path in _real())]
    attesting = ["stand-in", *(f"real:{path}" for path in _real() if "sgx_ecdsa" in list_plugins(path).attester)]
    for fixture, names in (("library", libraries), ("attesting_library", attesting), ("standin_only", ["stand-in"])):
        if fixture in metafunc.fixturenames:
            metafunc.parametrize(fixture, names, indirect=True)


@pytest.fixture(scope="session")
def standin_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return standin.build(tmp_path_factory.mktemp("native") / "rats-tls")


@pytest.fixture
def library(request: pytest.FixtureRequest, standin_path: Path) -> Installation:
    name: str = request.param
    return Installation(standin_path if name == "stand-in" else Path(name.removeprefix("real:")))


attesting_library = library
standin_only = library
