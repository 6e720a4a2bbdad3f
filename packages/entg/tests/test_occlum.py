"""``entg --occlum``: it is in an enclave or it does not start, and no host can make its links prove less."""

from __future__ import annotations

import io
import logging
import os
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fake_sgx
import pytest
import standin
import trio
from enlink import attested
from enlink.attestation import Attestation, Side
from enlink.errors import ConfigError, EngError, Unavailable
from enlink.testing.hosts import Host
from enlink.testing.programs import FAR_BEYOND_S, comes_true, started
from entg import occlum
from entg.cli import _parser
from entg.config import GatewayConfig
from entg.measured import LegTerms, is_attesting
from entg.occlum import Enclave, Inside, enter, keep_few_threads
from fake_sgx import FakeSgx
from hypothesis import example, given
from hypothesis import strategies as st
from ratstls.config import SessionConfig
from ratstls.evidence import Evidence
from ratstls.policy import Policy
from ratstls.policy_file import parse_policy

OURS, THEIRS, SIGNER = b"\x5e" * 32, b"\x66" * 32, b"\x51" * 32
POLICY = f'evidence = "sgx_ecdsa"\nmax_link_age = "10m"\n[[accept]]\nmr_enclave = "{OURS.hex()}"\n'
DEBUG_POLICY = "allow_debug = true\n" + POLICY
STRICTER = POLICY + f'mr_signer = "{SIGNER.hex()}"\n'
SHORTER = POLICY.replace("10m", "1m")
LAXER = DEBUG_POLICY.replace("10m", "24h") + f'[[accept]]\nmr_enclave = "{THEIRS.hex()}"\n'
FOREIGN = f'evidence = "sgx_ecdsa"\n[[accept]]\nmr_enclave = "{THEIRS.hex()}"\n'
PLAIN = "[enta]\njudge = false\nattest = false\n[entg]\njudge = false\nattest = false\n"
ONE_WAY = "[enta]\njudge = false\n"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """The files of an image with a policy."""
    (tmp_path / "sgx").touch()
    (tmp_path / "policy.toml").write_text(POLICY)
    return tmp_path


def inside(image: Path, sgx: FakeSgx | None = None, **others: Any) -> Inside:
    places = {"device": image / "sgx", "policy": image / "policy.toml", "settings": image / "gateway.toml"}
    start = {"environment": {}, "is_isolated": True}
    return Inside(**{**places, **start, "ioctl": (sgx or FakeSgx()).ioctl, **others})


def entered(place: Inside, *words: str) -> tuple[Enclave, GatewayConfig]:
    """Go into an enclave with this command line, as ``entg.cli`` does."""
    options = _parser().parse_args(["--occlum", *words])
    enclave = enter(vars(options), vars(_parser().parse_args([])), place)
    side: Side = "server" if options.entg_connect is None else "client"
    listen = options.entg_listen or (
        None if options.entg_connect else _parser().parse_args(["--entg-listen=1"]).entg_listen
    )
    return enclave, enclave.configure(options, listen, side)


# Whether it starts.


def test_an_enclave_tells_who_it_is(image: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    entered(inside(image))
    (record,) = [record for record in caplog.records if record.msg == "enclave"]
    assert vars(record)["fields"] == {
        "mr_enclave": bytes(range(1, 33)).hex(),
        "mr_signer": bytes(range(33, 65)).hex(),
        "product_id": 7,
        "security_version": 3,
        "debug": False,
    }
    assert record.levelno == logging.INFO


@pytest.mark.proves("D1", "D7")
def test_an_enclave_that_its_host_can_debug_starts_only_where_the_image_allows_it(
    image: Path, caplog: pytest.LogCaptureFixture
) -> None:
    debugged = FakeSgx(flags=0x7)
    with pytest.raises(ConfigError, match="the host can debug this enclave: make an image that is not debuggable"):
        entered(inside(image, debugged))
    (image / "host.toml").write_text(DEBUG_POLICY)
    with pytest.raises(ConfigError, match="the host can debug this enclave"):
        entered(inside(image, debugged), "--policy", str(image / "host.toml"))
    (image / "policy.toml").unlink()
    with pytest.raises(ConfigError, match="the host can debug this enclave"):
        entered(inside(image, debugged))
    (image / "policy.toml").write_text(DEBUG_POLICY)
    entered(inside(image, debugged))
    assert [record.levelno for record in caplog.records if record.msg == "enclave"] == [logging.WARNING]


@pytest.mark.proves("D7", "G19")
@pytest.mark.parametrize("name", ["LD_PRELOAD", "PYTHONPATH", "RATSTLS_LIBRARY", "OPENSSL_CONF", "NOTIFY_SOCKET", "X"])
def test_a_variable_from_the_host_is_refused_by_name(image: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"nothing from the host: not with {name} in its environment"):
        entered(inside(image, environment={name: "/host/evil"}))


@pytest.mark.proves("D7")
def test_a_python_that_heeds_what_lies_about_is_refused(image: Path) -> None:
    with pytest.raises(ConfigError, match="not without -I"):
        entered(inside(image, is_isolated=False))


def test_the_surroundings_of_a_process_are_the_real_ones() -> None:
    place = Inside()
    assert place.environment is os.environ
    assert place.is_isolated == bool(sys.flags.isolated)
    assert str(place.device) == "/dev/sgx"
    assert str(place.library) == "/usr/local/lib/rats-tls/librats_tls.so.0"
    assert [str(path) for path in (place.policy, place.settings)] == ["/etc/entg/policy.toml", "/etc/entg/gateway.toml"]


@pytest.mark.parametrize(
    ("settings", "words", "says"),
    [
        ("[enta]\nx = 1", "", r"settings .*gateway.toml: enta: 'x' is not known"),
        (b"\xff", "", "cannot read the settings .*gateway.toml"),
        (ONE_WAY, "--entg-rats-tls --policy p --verifier nullverifier", "in an enclave it is sgx_ecdsa_qve"),
        (PLAIN, "--mutual", "--mutual is for attested links, and none is"),
        (PLAIN, "--policy p", "--policy p: this gateway judges nobody"),
        (PLAIN, "--entg-listen 6980", "both want port 6980"),
    ],
)
def test_what_contradicts_the_image_or_does_nothing_is_refused(
    image: Path, settings: str | bytes, words: str, says: str
) -> None:
    (image / "gateway.toml").write_bytes(settings.encode() if isinstance(settings, str) else settings)
    with pytest.raises(ConfigError, match=says):
        entered(inside(image), *words.split())


@pytest.mark.proves("D1")
def test_an_image_without_a_policy_judges_nobody_and_says_so_where_it_must(image: Path) -> None:
    (image / "policy.toml").unlink()
    with pytest.raises(ConfigError, match=r"the image has no .*policy.toml, which says whom to accept"):
        entered(inside(image))
    (image / "gateway.toml").write_text(ONE_WAY + "[entg]\njudge = false\n")
    _, config = entered(inside(image))
    assert config.enta_attestation is not None
    assert not config.enta_attestation.is_mutual
    with pytest.raises(ConfigError, match=r"the image has no .*policy.toml"):
        entered(inside(image), "--entg-connect", "10.0.0.1:1")
    with pytest.raises(ConfigError, match=r"the image has no .*policy.toml"):
        entered(inside(image), "--mutual", "--policy", str(image / "gateway.toml"))


def test_a_host_that_makes_no_quotes_matters_only_to_who_attests(image: Path) -> None:
    with pytest.raises(Unavailable, match="no DCAP driver"):
        entered(inside(image, FakeSgx(has_driver=False)))
    (image / "gateway.toml").write_text(PLAIN)
    _, config = entered(inside(image, FakeSgx(has_driver=False)))
    assert (config.enta_attestation, config.entg_attestation) == (None, None)
    _, config = entered(inside(image, FakeSgx(has_driver=False)), "--entg-rats-tls", "--entg-connect", "10.0.0.1:1")
    assert config.entg_attestation is not None


# No host can loosen anything (D7, G19).


def evidence(mr_enclave: bytes = OURS, mr_signer: bytes = SIGNER, flags: int = 5, svn: int = 3) -> Evidence:
    """Evidence as the library delivers it: the fields, and the quote that they are from."""
    body = bytearray(384)
    struct.pack_into("<2Q", body, 48, flags, 7)
    body[64:96], body[128:160] = mr_enclave, mr_signer
    struct.pack_into("<2H", body, 256, 7, svn)
    quote = struct.pack("<H46x", 3) + bytes(body) + bytes(4)
    return Evidence("sgx_ecdsa", mr_enclave, mr_signer, 7, svn, bytes(body[48:64]), quote=quote)


PEERS = [
    evidence(),
    evidence(flags=7),
    evidence(mr_enclave=THEIRS),
    evidence(mr_enclave=THEIRS, flags=7),
    evidence(mr_signer=THEIRS),
    Evidence("unknown"),
]


def policy_of(made: Attestation | None, side: Side, enclave: Enclave) -> Policy | None:
    """The policy that links are judged by, where they are."""
    if made is None:
        return None
    config = SessionConfig(
        attester=made.attester,
        verifier=made.verifier,
        tls=made.tls,
        crypto=made.crypto,
        is_server=side == "server",
        is_mutual=made.is_mutual,
        is_attestation_waived=made.is_waived,
    )
    assert config.weakness is None
    if not config.is_verifying:
        return None
    with attested._errors_translated():
        policy = attested._policy(made, config, enclave.image)
        policy.check_verifier(config.verifier)
    return policy


@dataclass(frozen=True)
class Chosen:
    """What a host chooses: words of a command line, an environment, and files, of which ``{}`` is the directory."""

    words: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)


HOST_FILES = ("host.toml", "etc/entg/policy.toml", "librats_tls.so.0")
VALUES = st.sampled_from(
    ["", "sgx_ecdsa", "sgx_ecdsa_qve", "nullverifier", "nullattester", "nulltls", "nullcrypto", "openssl", "tdx_ecdsa"]
    + ["10.0.0.1:6979", "7979", "127.0.0.1:0", "10s", "original", "auto", "debug", "info", "json", "/dev/null", "{}"]
    + [f"{{}}/{name}" for name in HOST_FILES]
)
OPTIONS = sorted(word for action in _parser()._actions for word in action.option_strings)
# Mostly words that go well together, so that many get past the first check.
LIKELY = st.sampled_from(
    [words.split() for words in ("--mutual", "--entg-rats-tls", "--enta-rats-tls", "--entg-connect 10.0.0.1:6979")]
    + [words.split() for words in ("--policy {}/host.toml", "--entg-listen 7979", "--log-format json")]
)
ANY_WORDS = st.one_of(
    st.sampled_from(OPTIONS).map(lambda option: [option]),
    st.tuples(st.sampled_from(OPTIONS), VALUES).map(list),
    st.tuples(st.sampled_from(OPTIONS), VALUES).map(lambda pair: ["=".join(pair)]),
)
NAMES = ("LD_PRELOAD", "PYTHONPATH", "PYTHONHOME", "RATSTLS_LIBRARY", "OPENSSL_CONF", "HOME", "PATH", "OCCLUM")
CHOSEN = st.builds(
    Chosen,
    st.one_of(st.lists(LIKELY, max_size=4), st.lists(st.one_of(LIKELY, ANY_WORDS), max_size=5)).map(
        lambda groups: [word for group in groups for word in group]
    ),
    st.one_of(st.just({}), st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=3)),
    st.dictionaries(
        st.sampled_from(HOST_FILES),
        st.sampled_from([POLICY, DEBUG_POLICY, STRICTER, SHORTER, LAXER, FOREIGN, PLAIN, "", "\0"]),
    ),
)
IMAGES = st.tuples(
    st.sampled_from([POLICY, DEBUG_POLICY, STRICTER]),
    st.sampled_from([None, "", PLAIN, ONE_WAY, "[entg]\njudge = false\n", "[entg]\nattest = false\n"]),
    st.booleans(),
)
outcomes: dict[str, int] = {"started": 0, "refused": 0}


@pytest.mark.proves("D7", "G19")
@example(Chosen(["--policy", "{}/host.toml"], files={"host.toml": LAXER}), (POLICY, None, False))
@example(Chosen(["--policy", "{}/host.toml"], files={"host.toml": STRICTER}), (POLICY, ONE_WAY, False))
@example(Chosen(["--entg-rats-tls", "--insecure-no-attestation"]), (POLICY, PLAIN, False))
@given(CHOSEN, IMAGES)
def test_nothing_that_a_host_can_choose_makes_links_prove_less(
    chosen: Chosen, of_image: tuple[str, str | None, bool]
) -> None:
    """Arguments, environment and files in any combination: what starts is at least as strict as the image."""
    policy, settings, is_debugged = of_image
    with tempfile.TemporaryDirectory() as directory, redirect_stdout(io.StringIO()):
        image, host = Path(directory) / "image", Path(directory) / "host"
        for path in (image, host / "etc" / "entg"):
            path.mkdir(parents=True)
        (image / "sgx").touch()
        (image / "policy.toml").write_text(policy)
        if settings is not None:
            (image / "gateway.toml").write_text(settings)
        for name, text in chosen.files.items():
            (host / name).write_text(text)
        environment = {name: value.format(host) for name, value in chosen.environment.items()}
        place = inside(image, FakeSgx(flags=7 if is_debugged else 5), environment=environment)
        try:
            enclave, config = entered(place, *(word.format(host) for word in chosen.words))
            sides: dict[str, Side] = {"enta": "server", "entg": "client" if config.entg_connect else "server"}
            made = {"enta": config.enta_attestation, "entg": config.entg_attestation}
            policies = {leg: policy_of(made[leg], side, enclave) for leg, side in sides.items()}
        except (EngError, SystemExit):
            outcomes["refused"] += 1
            return
        outcomes["started"] += 1
        bound = Attestation(attester="sgx_ecdsa", verifier="sgx_ecdsa_qve", is_mutual=True)
        of_image_alone = policy_of(bound, "server", enclave)
    assert of_image_alone is not None
    assert not environment
    assert not is_debugged or of_image_alone.allow_debug
    assert enclave.image == attested.Image(occlum.LIBRARY, place.policy, occlum.HANDSHAKE_THREADS)
    for leg, side in sides.items():
        demanded: LegTerms = getattr(enclave.terms, leg)
        judged_by = policies[leg]
        assert demanded.judge <= (judged_by is not None)
        assert demanded.attest <= is_attesting(made[leg], side)
        if judged_by is not None:
            assert judged_by.max_link_age_s <= of_image_alone.max_link_age_s
            for peer in PEERS:
                assert judged_by.judge(peer).accepted <= of_image_alone.judge(peer).accepted
    assert config.wire == "auto"


def test_the_property_above_has_seen_both_refusals_and_starts() -> None:
    test_nothing_that_a_host_can_choose_makes_links_prove_less()
    assert min(outcomes.values()) >= 20, outcomes


def test_the_examples_have_what_the_property_is_about() -> None:
    """The control: some policy of the host's would let in whom the image's does not, if it counted."""
    accepts = {
        name: [parse_policy(text).judge(peer).accepted for peer in PEERS]
        for name, text in (("image", POLICY), ("host", LAXER), ("stricter", STRICTER))
    }
    assert accepts["image"] == [True, False, False, False, True, False]
    assert accepts["host"] == [True, True, True, True, True, False]
    assert accepts["stricter"] == [True, False, False, False, False, False]


# As a process, with the fake device and the stand-in for librats_tls.


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return standin.build(tmp_path_factory.mktemp("native") / "rats-tls")


EVIDENCE = {"STANDIN_MR_ENCLAVE": OURS.hex(), "STANDIN_ATTRIBUTES": "05" + "00" * 15, **standin.ALLOWED}


@contextmanager
def running(
    host: Host, library: Path, image: Path, *words: str, **environment: str
) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """Run entg as in an enclave until the block ends; gives the process and its log."""
    log = image / "log"
    argv = [sys.executable, "-I", str(fake_sgx.__file__), str(library), str(image), *words]
    with log.open("wb") as output:
        process = host.popen(*argv, stdout=output, stderr=output, environment={**EVIDENCE, **environment})
    try:
        yield process, log
    finally:
        process.kill()
        process.wait()


def has(log: Path, text: str) -> bool:
    return comes_true(lambda: text in log.read_text(), FAR_BEYOND_S)


def client_hello() -> bytes:
    """The first bytes of a TLS client, which never says more."""
    said = ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    client = context.wrap_bio(ssl.MemoryBIO(), said)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return said.read()


@pytest.mark.proves("D7")
def test_a_gateway_in_an_enclave_judges_and_attests_and_leaves_no_file_and_no_process(
    host: Host, library: Path, image: Path
) -> None:
    """What it does is a gateway's; a variable that names another library changes nothing; it stops in order."""
    runtime = image / "run"
    other = {"RATSTLS_LIBRARY": "/nowhere", "RUNTIME_DIRECTORY": str(runtime)}
    with running(host, library, image, **other) as (process, log):
        assert has(log, " ready "), log.read_text()
        assert f"library={library} " not in log.read_text()
        assert str(library) in log.read_text()
        policy = ("--policy", str(image / "policy.toml"))
        wanted = ("--entg-connect", "127.0.0.1:6979", "--entg-rats-tls", "--mutual", "--attester", "sgx_ecdsa", *policy)
        under = ("env", f"RATSTLS_LIBRARY={library}", *(f"{name}={value}" for name, value in EVIDENCE.items()))
        with started(host, "entg", "--enta-listen", "7980", *wanted, under=under) as peer:
            peer.wait_until(lambda: bool(peer.events("connected")), "connected")
            assert has(log, " connected "), log.read_text()
        with started(host, "entg", "--enta-listen", "7980", "--entg-connect", "127.0.0.1:6979") as plain:
            plain.wait_until(lambda: bool(plain.events("unreachable")), "refused")
        children = [path.read_text() for path in Path(f"/proc/{process.pid}/task").glob("*/children")]
        assert set(children) == {""}
        process.send_signal(signal.SIGTERM)
        assert process.wait(FAR_BEYOND_S) == 0, log.read_text()
    assert not runtime.exists()


@pytest.mark.proves("D20")
def test_handshakes_of_strangers_never_take_more_threads_than_the_image_has(
    host: Host, library: Path, image: Path
) -> None:
    with running(host, library, image) as (process, log), ExitStack() as strangers:
        assert has(log, " ready "), log.read_text()
        hello = client_hello()
        with host.entered():
            # From several addresses: one alone is allowed less.
            for number in range(60):
                stranger = socket.create_connection(
                    ("127.0.0.1", 6980), timeout=FAR_BEYOND_S, source_address=(f"127.0.0.{number % 4 + 2}", 0)
                )
                strangers.enter_context(stranger).sendall(hello)
        seen: list[int] = []

        def count() -> int:
            seen.append(len(list(Path(f"/proc/{process.pid}/task").iterdir())))
            return seen[-1]

        # All that may be busy are: so there was something to bound.
        assert comes_true(lambda: count() >= occlum.HANDSHAKE_THREADS, FAR_BEYOND_S), (
            max(seen),
            log.read_text()[-1500:],
        )
        assert not comes_true(lambda: count() > occlum.THREADS, 1.0)
        assert max(seen) <= occlum.THREADS


@pytest.mark.parametrize(
    ("words", "files", "code", "says"),
    [
        ([], {"policy.toml": "x"}, 78, "policy {}/policy.toml: "),
        (["--status-socket", "s"], {}, 78, "--status-socket is not for the inside of an enclave"),
        (["--policy", "/nowhere"], {}, 78, "cannot read the policy /nowhere"),
        (["--verifier", "nullverifier"], {}, 78, "--verifier 'nullverifier': in an enclave it is sgx_ecdsa_qve"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(
    host: Host, library: Path, image: Path, words: list[str], files: dict[str, str], code: int, says: str
) -> None:
    for name, text in files.items():
        (image / name).write_text(text)
    with running(host, library, image, *words) as (process, log):
        assert process.wait(FAR_BEYOND_S) == code
        last = log.read_text().splitlines()[-1]
    assert last.startswith("entg: ")
    assert says.format(image) in last


def test_an_image_without_its_library_exits_69(host: Host, image: Path) -> None:
    with running(host, image / "librats_tls.so.0", image) as (process, log):
        assert process.wait(FAR_BEYOND_S) == 69
        assert f"there is no librats_tls at {image}/librats_tls.so.0" in log.read_text().splitlines()[-1]


def test_threads_are_few_and_small_from_then_on() -> None:
    async def main() -> tuple[float, int]:
        keep_few_threads()
        return trio.to_thread.current_default_thread_limiter().total_tokens, threading.stack_size()

    before = threading.stack_size()
    try:
        assert trio.run(main) == (occlum.OTHER_THREADS, 1 << 20)
    finally:
        threading.stack_size(before)
