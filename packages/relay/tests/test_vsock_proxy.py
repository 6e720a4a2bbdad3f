"""Command lines and allow-lists of AWS's vsock-proxy: what they mean, and what is said of those that mean nothing."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path

import pytest
import trio
from enlink.endpoint import Tcp, Vsock
from enlink.errors import ConfigError, UsageError
from enlink.program import ProgramParser
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from relay.addresses import Address
from relay.allowlist import AllowList
from relay.resolver import NameNotResolved
from relay.vsock_proxy import DEFAULT_FILE, VsockProxy, add_arguments, from_options, read_allowlist, settle

KMS = "kms.us-east-1.amazonaws.com"
AS_SHIPPED = f"""\
# services
allowlist:
- {{address: {KMS}, port: 443}}
- {{address: kms-fips.us-east-1.amazonaws.com, port: 443}}
- {{address: 127.0.0.1, port: 9000}}
- {{address: '::1', port: 9000}}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "vsock-proxy.yaml"
    path.write_text(AS_SHIPPED)
    return path


def parse(*words: str) -> VsockProxy:
    parser = ProgramParser("relay vsock-proxy")
    add_arguments(parser)
    return from_options(parser.parse_args(words))


def test_the_command_line_of_the_service_means_what_it_always_has(file: Path) -> None:
    """As in the unit file of nitro-cli."""
    proxy = parse("8000", KMS, "443", "--config", str(file))
    assert proxy.listen == Vsock(None, 8000)
    assert proxy.target == Tcp(KMS, 443)
    assert proxy.max_connections == 4
    assert [str(rule) for rule in proxy.allow] == [
        f"{KMS}:443",
        "kms-fips.us-east-1.amazonaws.com:443",
        "127.0.0.1:9000",
        "[::1]:9000",
    ]


def test_the_default_file_is_that_of_nitro_cli() -> None:
    parser = ProgramParser("relay vsock-proxy")
    add_arguments(parser)
    assert parser.parse_args(["8000", KMS, "443"]).allowlist_file == DEFAULT_FILE
    assert Path("/etc/nitro_enclaves/vsock-proxy.yaml") == DEFAULT_FILE


@pytest.mark.parametrize(
    ("words", "target", "workers"),
    [
        (["-4", "8000", KMS, "443"], Tcp(KMS, 443, 4), 4),
        (["8000", KMS, "443", "--ipv6", "-w", "50"], Tcp(KMS, 443, 6), 50),
        (["8000", KMS.upper() + ".", "443", "--num_workers=1"], Tcp(KMS.upper() + ".", 443), 1),
        (["8000", "127.0.0.1", "9000", "--ipv4"], Tcp("127.0.0.1", 9000, 4), 4),
        (["8000", "::1", "9000", "-w8"], Tcp("::1", 9000), 8),
        (["8000", "other.example", "9000"], Tcp("other.example", 9000), 4),
    ],
)
def test_options_stand_anywhere(words: list[str], target: Tcp, workers: int, file: Path) -> None:
    """The last name may yet have an address that is listed."""
    proxy = parse(*words, "--config", str(file))
    assert (proxy.target, proxy.max_connections) == (target, workers)


def test_names_in_other_scripts_are_compared_as_the_dns_has_them(file: Path) -> None:
    file.write_text("allowlist: [{address: bücher.example, port: 443}]", encoding="utf-8")
    assert parse("8000", "BÜCHER.example", "443", "--config", str(file)).target == Tcp("xn--bcher-kva.example", 443)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["8000", KMS], "the following arguments are required: remote_port"),
        (["8000", KMS, "443", "-4", "-6"], "not allowed with argument"),
        (["x", KMS, "443"], "local_port: 'x' is not a number from 0 to 4294967294"),
        (["4294967295", KMS, "443"], "local_port: '4294967295' is not a number"),
        (["8000", KMS, "0"], "remote_port: '0' is not a number from 1 to 65535"),
        (["8000", KMS, "65979"], "remote_port: '65979' is not a number"),
        (["8000", KMS, "443", "-w", "0"], "--num_workers: '0' is not a number from 1 to"),
        (["8000", "9000", "443"], "remote_addr: '9000': '9000' is neither a host name nor an address"),
        (["8000", "*.amazonaws.com", "443"], "remote_addr: "),
        (["8000", "127.0.0.1", "9000", "-6"], "remote_addr '127.0.0.1' is no IPv6 address: leave out -6"),
        (["8000", "::1", "9000", "--ipv4"], "remote_addr '::1' is no IPv4 address: leave out -4"),
    ],
)
def test_a_wrong_command_line_is_a_usage_error(words: list[str], problem: str, file: Path) -> None:
    with pytest.raises(UsageError) as raised:
        parse(*words, "--config", str(file))
    assert problem in str(raised.value)


@pytest.mark.parametrize(
    ("host", "port"), [(KMS, "80"), ("kms.us-east-2.amazonaws.com", "443"), (f"x.{KMS}", "443"), ("127.0.0.2", "9000")]
)
def test_a_target_that_the_list_does_not_have_is_refused_at_the_start(host: str, port: str, file: Path) -> None:
    """Matches are exact: a name, not what is below it."""
    with pytest.raises(ConfigError) as raised:
        parse("8000", host, port, "--config", str(file))
    assert raised.value.exit_code == 78
    assert str(raised.value) == (
        f"{file} does not allow {host} port {port}: add - {{address: '{host}', port: {port}}} to its allowlist"
    )


ADDRESSES = {
    KMS: ("192.0.2.1", "93.184.215.14", "2001:db8::1"),
    "kms-fips.us-east-1.amazonaws.com": ("169.254.169.254", "52.94.4.1"),
}


async def resolve(name: str, family: int | None) -> tuple[Address, ...]:
    """What the DNS says; nothing of other names, as when it fails."""
    if name not in ADDRESSES:
        raise NameNotResolved(f"cannot resolve {name}: no answer")
    return tuple(found for found in map(ip_address, ADDRESSES[name]) if family in (None, found.version))


@pytest.mark.parametrize("host", ["93.184.215.14", "52.94.4.1", "::ffff:52.94.4.1"])
def test_an_address_that_a_listed_name_has_is_allowed_as_vsock_proxy_allows_it(host: str, file: Path) -> None:
    file.write_text(AS_SHIPPED.replace("allowlist:", "allowlist:\n- {address: nowhere.example, port: 443}"))
    proxy = trio.run(settle, parse("8000", host, "443", "--config", str(file)), resolve)
    assert AllowList(proxy.allow).judge_host(host, 443).is_allowed
    assert not AllowList(proxy.allow).judge_host("93.184.215.15", 443).is_allowed
    assert not AllowList(proxy.allow).judge_host(host, 80).is_allowed
    assert trio.run(settle, proxy, resolve) == proxy


@pytest.mark.parametrize(
    ("host", "family"),
    [("93.184.215.15", ()), ("169.254.169.254", ()), ("2606:2800::1", ("-6",))],
)
def test_an_address_that_no_listed_name_has_or_may_have_is_refused(
    host: str, family: tuple[str, ...], file: Path
) -> None:
    with pytest.raises(ConfigError, match=f"does not allow {host} port 443"):
        trio.run(settle, parse("8000", host, "443", *family, "--config", str(file)), resolve)


def test_an_empty_list_allows_nothing(file: Path) -> None:
    file.write_text("allowlist: []")
    assert read_allowlist(file) == ()
    with pytest.raises(ConfigError, match="does not allow"):
        parse("8000", KMS, "443", "--config", str(file))


@pytest.mark.parametrize(
    "text",
    [
        "allowlist:\n  - address: db.example\n    port: 443\n",
        "other: 1\nallowlist: [{port: 443, address: 'db.example', region: x}]\n",
        "---\nallowlist: [{address: db.example, port: 0443}]\n---\nallowlist: []\n",
        "defaults: &a {address: db.example, port: 443}\nallowlist: [*a]\n",
        '{"allowlist": [{"address": "db.example", "port": 443}]}',
    ],
)
def test_every_way_to_write_the_list_in_yaml_is_understood(text: str, file: Path) -> None:
    """Other keys are left alone, and so are other documents."""
    file.write_text(text)
    assert [str(rule) for rule in read_allowlist(file)] == ["db.example:443"]


def test_ipv6_addresses_that_yaml_takes_for_numbers_are_addresses(file: Path) -> None:
    file.write_text("allowlist: [{address: 1:2:3:4:5:6:7:8, port: 443}]")
    assert AllowList(read_allowlist(file)).judge_host("1:2:3:4:5:6:7:8", 443).is_allowed


FORM = "as in - {address: kms.us-east-1.amazonaws.com, port: 443}"


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("", 1, "expected allowlist: with entries such as - {address: "),
        ("- a\n", 1, "expected allowlist: with entries"),
        ("\nallow: []\n", 2, "expected allowlist: with entries"),
        ("allowlist: []\nallowlist: []\n", 1, "expected allowlist: with entries"),
        ("[a]: b\n", 1, "expected allowlist: with entries"),
        ("\nallowlist:\n", 2, "expected a list of entries such as - {address: "),
        ("allowlist: {address: a, port: 1}", 1, "expected a list of entries"),
        (
            "allowlist:\n- {address: a, port: 1}\n- db.example:443\n",
            3,
            f"expected an entry with one address and one port, {FORM}",
        ),
        ("allowlist:\n- {address: a}\n", 2, "expected an entry with one address and one port"),
        ("allowlist:\n- {port: 1}\n", 2, "expected an entry with one address and one port"),
        ("allowlist:\n- {port: 1, address: a, port: 2}\n", 2, "expected an entry with one address and one port"),
        ("allowlist:\n- address: a\n  port: '443'\n", 3, f"expected a port from 1 to 65535, without quotes, {FORM}"),
        ("allowlist:\n- {address: a, port: 65979}\n", 2, "expected a port"),
        ("allowlist:\n- {address: a, port: -1}\n", 2, "expected a port"),
        ("allowlist:\n- {address: a, port: 1:30}\n", 2, "expected a port"),
        ("allowlist:\n- {address: a, port: }\n", 2, "expected a port"),
        ("allowlist:\n- {address: a, port: [1]}\n", 2, "expected a port"),
        ("allowlist:\n- {address: 443, port: 443}\n", 2, f"expected a host name or an IP address, {FORM}"),
        ("allowlist:\n- {address: true, port: 443}\n", 2, "expected a host name or an IP address"),
        ("allowlist:\n- {address: [a], port: 443}\n", 2, "expected a host name or an IP address"),
        ("allowlist:\n- {address: '*.amazonaws.com', port: 443}\n", 2, "expected a host name or an IP address"),
        ("allowlist:\n- {address: https://a/, port: 443}\n", 2, "expected a host name or an IP address"),
        ("allowlist:\n- {address: a, port: 1\n", 3, "expected YAML, but expected ',' or '}', but got"),
        ("allowlist:\n\t- a\n", 2, "expected YAML, but found character '\\t' that cannot start any token"),
        ("a: *b\n", 1, "expected YAML, but found undefined alias 'b'"),
    ],
)
def test_a_wrong_file_is_told_by_its_line_and_what_should_be_there(
    text: str, line: int, problem: str, file: Path
) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError) as raised:
        read_allowlist(file)
    assert str(raised.value).startswith(f"{file} line {line}: {problem}")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["a: \x01", '"\\U00110000"', '"\\UFFFFFFFF"', "[" * 5000])
def test_a_file_that_stops_the_parser_is_told_without_a_line(text: str, file: Path) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError) as raised:
        read_allowlist(file)
    assert str(raised.value).startswith(f"{file}: expected YAML, but ")
    assert "\n" not in str(raised.value)


def test_a_file_that_cannot_be_read_is_told_with_the_reason(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "none", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(ConfigError) as raised:
            read_allowlist(path)
        assert str(raised.value) == f"cannot read the allow-list {path} ({reason}): name another one with --config"
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="it is no UTF-8 text"):
        read_allowlist(tmp_path / "binary")


PIECES = [*"[]{}:,-&*!|>'\"%@`?#\n\t ", "allowlist", "address", "port", "443"]


@given(st.text() | st.lists(st.sampled_from(PIECES)).map("".join))
@example("allowlist: [{address: {}, port: {}}]")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)  # it writes files
def test_any_text_is_a_list_or_a_config_error_of_one_line(file: Path, text: str) -> None:
    file.write_bytes(text.encode("utf-8", "replace"))
    sentence = f"{file}: "
    try:
        assert all(len(str(rule).split()) == 1 for rule in read_allowlist(file))
    except ConfigError as error:
        sentence = str(error)
    assert len(sentence.splitlines()) == 1
    assert str(file) in sentence
