"""The list of plug-ins, made from file names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import standin
from ratstls import _plugins
from ratstls._plugins import list_plugins
from ratstls.config import SessionConfig
from ratstls.errors import ConfigError, LoadError

CONFIG = SessionConfig(attester="sgx_ecdsa", verifier="sgx_ecdsa", is_server=False)


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """An installation without its library."""
    for prefix, names in standin.PLUGINS.items():
        for name in names:
            plugin = tmp_path / f"{prefix}_{name}.so"
            plugin.parent.mkdir(exist_ok=True)
            plugin.touch()
    return tmp_path


def test_plug_ins_have_the_names_of_their_files(installed: Path) -> None:
    """Those that the library loads, not their versioned links or anything else."""
    for other in ("libverifier_old.so.0", "verifier_x.so", "libattester_x.so", "libverifier_.so", "README"):
        (installed / "verifiers" / other).touch()
    plugins = list_plugins(installed / "librats_tls.so.0")
    assert plugins.directory == installed
    assert plugins.verifier == ("csv", "nullverifier", "sgx_ecdsa", "sgx_ecdsa_qve")
    assert plugins.attester == ("nullattester", "sgx_ecdsa")
    assert plugins.tls == ("nulltls", "openssl")
    assert plugins.crypto == ("nullcrypto", "openssl")


def test_a_library_elsewhere_loads_what_is_installed(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The directories are compiled into it."""
    monkeypatch.setattr(_plugins, "DEFAULT_DIRECTORY", installed)
    assert list_plugins(Path("/nowhere/librats_tls.so.0")).directory == installed


@pytest.mark.parametrize("folder", ["crypto-wrappers", "attesters", "verifiers", "tls-wrappers"])
def test_an_empty_directory_is_an_error_of_ours(installed: Path, folder: str) -> None:
    """The library would end the process."""
    for plugin in (installed / folder).iterdir():
        plugin.unlink()
    with pytest.raises(LoadError, match=rf"{folder} has no plug-in \(lib.*_\*\.so\): install rats-tls again"):
        list_plugins(installed / "librats_tls.so.0")


@pytest.mark.parametrize("folder", ["crypto-wrappers", "verifiers", "tls-wrappers"])
def test_a_missing_directory_is_an_error_of_ours(installed: Path, folder: str) -> None:
    """The library would end the process."""
    (installed / folder).rename(installed / "gone")
    with pytest.raises(LoadError, match=rf"{folder} \(No such file or directory\): install rats-tls again"):
        list_plugins(installed / "librats_tls.so.0")


def test_what_is_there_is_enough(installed: Path) -> None:
    """All four names are found."""
    list_plugins(installed / "librats_tls.so.0").require(CONFIG)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (replace(CONFIG, attester="tdx"), "there is no attester 'tdx' in .*/attesters: choose of nullattester, sgx_ec"),
        (replace(CONFIG, verifier="tdx"), "there is no verifier 'tdx' in .*/verifiers: choose of csv, nullverifier, "),
        (replace(CONFIG, tls="mbed"), "there is no tls 'mbed' in .*/tls-wrappers: choose of nulltls, openssl, or inst"),
        (replace(CONFIG, crypto="mbed"), "there is no crypto 'mbed' in .*/crypto-wrappers: choose of nullcrypto, open"),
    ],
)
def test_what_is_missing_is_named(installed: Path, config: SessionConfig, text: str) -> None:
    """With what is there instead: the library would say -2, or -10."""
    with pytest.raises(ConfigError, match=text):
        list_plugins(installed / "librats_tls.so.0").require(config)
