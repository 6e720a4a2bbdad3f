"""``entg occlum-image``: what it writes is whole and strict, and where something is wrong it writes nothing."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from enlink.errors import CannotCreate, ConfigError
from entg import occlum
from entg.cli import main
from entg.measured import parse_terms
from entg.occlum_image import PACKAGES, Parts, occlum_json, write_image
from hypothesis import given
from hypothesis import strategies as st

PYTHON = Path(sys.executable).resolve()
LIBSSL = Path("/usr/lib/x86_64-linux-gnu/libssl.so.3")
POLICY = f'evidence = "sgx_ecdsa"\n[[accept]]\nmr_enclave = "{"5e" * 32}"\n'
NOBODY_JUDGES = "[enta]\njudge = false\n[entg]\njudge = false\n"
WANTED = (
    "librats_tls.so.0",
    "attesters/libattester_sgx_ecdsa.so",
    "verifiers/libverifier_sgx_ecdsa_qve.so",
    "tls-wrappers/libtls_wrapper_openssl.so",
    "crypto-wrappers/libcrypto_wrapper_openssl.so",
)
NULL = ("attesters/libattester_nullattester.so", "verifiers/libverifier_nullverifier.so")


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    """A prefix, a build and a policy of real ELF files, as they are where images are made."""
    prefix, build = tmp_path / "prefix", tmp_path / "build"
    site = prefix / "lib" / "python3.11" / "site-packages"
    for package in PACKAGES:
        (site / package).mkdir(parents=True)
        (site / package / "__init__.py").touch()
    (prefix / "bin").mkdir()
    shutil.copy(PYTHON, prefix / "bin" / "python3.11")
    (prefix / "bin" / "python3").symlink_to("python3.11")
    for name in (*WANTED, *NULL, "tls-wrappers/libtls_wrapper_nulltls.so"):
        (build / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(LIBSSL, build / name)
    (tmp_path / "policy.toml").write_text(POLICY)
    return Parts(python=prefix, rats_tls=build, policy=tmp_path / "policy.toml")


def changed(parts: Parts, **values: Any) -> Parts:
    return Parts(**{name: values.get(name, getattr(parts, name)) for name in Parts.__dataclass_fields__})


def copied(directory: Path) -> dict[str, tuple[Path, str]]:
    """Where each single file of a bom goes, where it comes from, and its hash."""
    targets = yaml.safe_load((directory / "entg.yaml").read_text())["targets"]
    return {
        f"{target['target'].rstrip('/')}/{file['rename']}": (Path(file["name"]), file["hash"])
        for target in targets
        for copy in target.get("copy", ())
        for file in copy.get("files", ())
    }


def refused(tmp_path: Path, parts: Parts, error: type[Exception] = ConfigError) -> str:
    """Why no image is made, and that nothing is left of it."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error) as caught:
        write_image(tmp_path / "image", parts)
    assert sorted(tmp_path.iterdir()) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_everything_that_is_listed_is_there_with_the_hash_that_it_has(tmp_path: Path, parts: Parts) -> None:
    write_image(tmp_path / "image", parts)
    files = copied(tmp_path / "image")
    plugins = {f"/usr/local/lib/rats-tls/{name}" for name in WANTED}
    ours = {"/bin/entg", "/etc/entg/policy.toml", "/etc/entg/gateway.toml"}
    assert set(files) == plugins | ours | {"/opt/occlum/glibc/lib/libgcc_s.so.1"}
    for source, digest in files.values():
        assert hashlib.sha256(source.read_bytes()).hexdigest().upper() == digest
    document = yaml.safe_load((tmp_path / "image" / "entg.yaml").read_text())
    (python,) = [target for target in document["targets"] if target["target"] == "/opt/python"]
    assert python["copy"] == [{"dirs": [f"{parts.python}/"]}]
    made = set(document["targets"][0]["mkdirs"])
    assert {str(Path(path).parent)[1:] for path in files} <= made
    assert {"dev", "proc", "tmp", "opt"} <= made
    assert {path.name for path in tmp_path.iterdir()} == {"image", "prefix", "build", "policy.toml"}


@pytest.mark.proves("D2", "D7")
def test_no_null_plug_in_gets_into_an_image(tmp_path: Path, parts: Parts) -> None:
    write_image(tmp_path / "image", parts)
    assert (parts.rats_tls / NULL[0]).exists()
    assert "null" not in (tmp_path / "image" / "entg.yaml").read_text().replace(str(tmp_path), "")


def test_places_are_where_the_gateway_looks_for_them(tmp_path: Path, parts: Parts) -> None:
    write_image(tmp_path / "image", parts)
    files = copied(tmp_path / "image")
    assert {str(occlum.LIBRARY), str(occlum.POLICY), str(occlum.SETTINGS)} <= set(files)
    assert (tmp_path / "image" / "policy.toml").read_text() == POLICY
    terms = parse_terms((tmp_path / "image" / "gateway.toml").read_text())
    assert terms == parse_terms("")


@pytest.mark.proves("D7")
def test_settings_go_in_as_they_are(tmp_path: Path, parts: Parts) -> None:
    settings = tmp_path / "mine.toml"
    settings.write_text(NOBODY_JUDGES)
    write_image(tmp_path / "image", changed(parts, settings=settings, policy=None))
    assert (tmp_path / "image" / "gateway.toml").read_text() == NOBODY_JUDGES
    assert "/etc/entg/policy.toml" not in copied(tmp_path / "image")


@pytest.mark.proves("D7", "G19")
def test_the_host_can_neither_debug_nor_see_nor_start_anything_else() -> None:
    document: Any = occlum_json(is_debuggable=False)
    assert document["metadata"]["debuggable"] is False
    assert document["metadata"]["disable_log"] is True
    assert document["env"]["untrusted"] == []
    assert document["entry_points"] == ["/bin/entg"]
    (root,) = document["mount"]
    assert [layer["type"] for layer in root["options"]["layers"]] == ["sefs", "sefs"]
    assert root["options"]["layers"][1]["options"] == {"temporary": True}
    assert document["resource_limits"]["max_num_of_threads"] >= occlum.THREADS
    debuggable: Any = occlum_json(is_debuggable=True)
    assert debuggable["metadata"] == {**document["metadata"], "debuggable": True, "disable_log": False}


@pytest.mark.proves("D7", "G19")
@given(
    st.dictionaries(
        st.sampled_from(
            ["LD_PRELOAD", "PYTHONPATH", "PYTHONHOME", "OCCLUM", "RATSTLS_LIBRARY", "OPENSSL_CONF", "HOME"]
        ),
        st.text(st.characters(codec="ascii", exclude_characters="\0"), max_size=9),
    )
)
def test_no_variable_of_the_hosts_gets_in(environment: dict[str, str]) -> None:
    """Occlum takes those that ``untrusted`` names, and prefers them; so none of them, and defaults stay."""
    config: Any = occlum_json(is_debuggable=False)["env"]
    let_in = {name: value for name, value in environment.items() if name in config["untrusted"]}
    merged = dict(entry.split("=", 1) for entry in config["default"]) | let_in
    assert merged == {"OCCLUM": "yes", "PYTHONHOME": "/opt/python"}


@pytest.mark.proves("D7")
def test_the_launcher_starts_an_isolated_python_with_an_empty_environment(tmp_path: Path, parts: Parts) -> None:
    """Here with this Python in the place of the image's, and with what a host would like to set."""
    write_image(tmp_path / "image", parts)
    launcher = tmp_path / "image" / "entg"
    assert os.access(launcher, os.X_OK)
    text = launcher.read_text()
    assert text.startswith("#!/opt/python/bin/python3\n")
    evil = tmp_path / "evil"
    evil.mkdir()
    (evil / "enlink.py").write_text("raise SystemExit('taken over')\n")
    told = "import os, sys; print(sys.flags.isolated, sys.flags.safe_path, dict(os.environ), sys.argv[1:])"
    here = tmp_path / "here"
    here.write_text(
        text.replace("/opt/python/bin/python3", sys.executable).replace("from entg.launch import main", told)
    )
    environment = {"PYTHONPATH": str(evil), "RATSTLS_LIBRARY": "/host/evil.so", "OPENSSL_CONF": "/host/evil.cnf"}
    argv = [sys.executable, str(here), "-c", "print('taken over')", "--host"]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=50, check=False)
    # Python sets a variable of its own where there is no locale.
    assert done.stdout.replace("{'LC_CTYPE': 'C.UTF-8'}", "{}") == (
        "1 True {} ['-c', \"print('taken over')\", '--host']\n"
    ), done.stderr
    real = tmp_path / "real"
    real.write_text(text.replace("/opt/python/bin/python3", sys.executable))
    argv = [sys.executable, str(real), "--log-format", "json"]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=50, check=False)
    assert (done.returncode, done.stdout) == (78, "")
    assert done.stderr.startswith("entg: --occlum is for the inside of an enclave, and this is none")


# What is refused.


def test_a_missing_policy_is_missed_unless_nobody_judges(tmp_path: Path, parts: Parts) -> None:
    assert "say with --policy FILE whom to accept" in refused(tmp_path, changed(parts, policy=None))
    gone = tmp_path / "gone.toml"
    assert f"cannot read the policy {gone}" in refused(tmp_path, changed(parts, policy=gone))
    assert f"cannot read the settings {gone}" in refused(tmp_path, changed(parts, settings=gone))
    (tmp_path / "policy.toml").write_text("nobody = true")
    assert "'nobody' is no key of a policy" in refused(tmp_path, parts)
    assert "gateway of" not in refused(tmp_path, changed(parts, settings=tmp_path / "policy.toml"))


@pytest.mark.proves("D1")
def test_an_image_to_debug_needs_a_policy_that_allows_it(tmp_path: Path, parts: Parts) -> None:
    debuggable = changed(parts, is_debuggable=True)
    assert "--debug: such an image starts only if its --policy says allow_debug" in refused(tmp_path, debuggable)
    (tmp_path / "policy.toml").write_text(f"allow_debug = true\n{POLICY}")
    write_image(tmp_path / "image", debuggable)
    document = json.loads((tmp_path / "image" / "Occlum.json").read_text())
    assert document == occlum_json(is_debuggable=True)


def test_a_directory_that_exists_is_left_alone(tmp_path: Path, parts: Parts) -> None:
    (tmp_path / "image").mkdir()
    (tmp_path / "image" / "precious").touch()
    assert "image exists: remove it, or name another directory" in refused(tmp_path, parts, CannotCreate)
    assert [path.name for path in (tmp_path / "image").iterdir()] == ["precious"]


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path, parts: Parts) -> None:
    with pytest.raises(CannotCreate, match=r"cannot write .*/no/image \(No such file or directory\)"):
        write_image(tmp_path / "no" / "image", parts)


def test_a_python_that_borrows_from_elsewhere_is_refused(tmp_path: Path, parts: Parts) -> None:
    site = parts.python / "lib" / "python3.11" / "site-packages"
    assert "No such file or directory; an image must have all of it" in refused(
        tmp_path, changed(parts, python=tmp_path / "gone")
    )
    (parts.python / "pyvenv.cfg").touch()
    assert "is a virtual environment, most of which is elsewhere" in refused(tmp_path, parts)
    (parts.python / "pyvenv.cfg").unlink()
    link = site / "link"
    for target in ("/usr/lib/python3", "nowhere"):
        link.symlink_to(target)
        assert f"{link} leads out of {parts.python}" in refused(tmp_path, parts)
        link.unlink()
    link.symlink_to("trio")
    shutil.rmtree(site / "cffi")
    assert f"{site} has no cffi: run" in refused(tmp_path, parts)
    (parts.python / "lib" / "python3.12" / "site-packages").mkdir(parents=True)
    assert "has 2 directories lib/python3.*/site-packages" in refused(tmp_path, parts)
    (parts.python / "bin" / "python3").unlink()
    assert "has no bin/python3" in refused(tmp_path, parts)


def test_a_build_that_is_none_for_an_enclave_is_refused(tmp_path: Path, parts: Parts) -> None:
    build = parts.rats_tls
    assert "an image must have all of it" in refused(tmp_path, changed(parts, rats_tls=tmp_path / "gone"))
    assert "is no directory: name the one that has a build" in refused(tmp_path, changed(parts, rats_tls=LIBSSL))
    shutil.copytree(build / "attesters", build / "other")
    assert "several libattester_sgx_ecdsa.so: name the directory of one build" in refused(tmp_path, parts)
    shutil.rmtree(build / "other")
    (build / WANTED[1]).unlink()
    assert "has no libattester_sgx_ecdsa.so: build rats-tls there, with -DRATS_TLS_BUILD" in refused(tmp_path, parts)
    (build / "verifiers" / "libverifier_sgx_ecdsa.so").touch()
    assert "it is a build for hosts: build rats-tls with -DRATS_TLS_BUILD_MODE=occlum" in refused(tmp_path, parts)


def test_a_link_to_a_library_counts_as_the_library(tmp_path: Path, parts: Parts) -> None:
    library = parts.rats_tls / WANTED[0]
    library.rename(library.with_name("librats_tls.so.0.6.4"))
    library.symlink_to("librats_tls.so.0.6.4")
    write_image(tmp_path / "image", parts)
    source, _ = copied(tmp_path / "image")[str(occlum.LIBRARY)]
    assert source.name == "librats_tls.so.0.6.4"


def test_a_shared_object_that_would_be_missing_is_missed(tmp_path: Path, parts: Parts) -> None:
    needy = parts.python / "lib" / "needy.so"
    gone = tmp_path / "libgone.so.1"
    compiler = ["gcc", "-shared", "-fPIC", "-nostdlib", "-x", "c", "/dev/null", "-x", "none"]
    subprocess.run([*compiler, "-o", gone, f"-Wl,-soname,{gone.name}"], check=True)
    subprocess.run([*compiler, "-o", needy, "-Wl,--no-as-needed", gone], check=True)
    gone.unlink()
    assert refused(tmp_path, parts).startswith(f"{needy} needs libgone.so.1, which is not to be found")
    needy.write_bytes(LIBSSL.read_bytes()[:1000])
    assert f"{needy} is cut short" in refused(tmp_path, parts)


def test_the_command_writes_an_image_or_tells_why_not(
    tmp_path: Path, parts: Parts, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    image = str(tmp_path / "image")
    argv = ["entg", "occlum-image", image, f"--python={parts.python}", f"--rats-tls={parts.rats_tls}"]
    monkeypatch.setattr(sys, "argv", argv)
    assert main() == 78
    assert capfd.readouterr().err.startswith("entg: links are to judge their peers: say with --policy")
    monkeypatch.setattr(sys, "argv", [*argv, f"--policy={parts.policy}"])
    assert main() == 0
    assert capfd.readouterr().out == f"{image} is ready for copy_bom and occlum build: see docs/occlum.md\n"
    assert json.loads((tmp_path / "image" / "Occlum.json").read_text()) == occlum_json(is_debuggable=False)
    assert main() == 73
    assert capfd.readouterr().err == f"entg: {image} exists: remove it, or name another directory\n"
