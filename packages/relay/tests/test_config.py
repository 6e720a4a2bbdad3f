"""What a configuration file may say, and how it is told what is wrong with it."""

from __future__ import annotations

from contextlib import suppress

import pytest
from enlink.endpoint import Tcp, Unix, Vsock
from enlink.errors import ConfigError, UsageError
from hypothesis import given
from hypothesis import strategies as st
from relay.allowlist import parse_rule
from relay.config import (
    BRIDGE_SETTINGS,
    RELAY_SETTINGS,
    BridgeConfig,
    RelayConfig,
    parse_count,
    parse_file,
    parse_positive_duration_s,
    parse_size_bytes,
)

WHOLE = """
grace = "3s"
workers = 2
setup-loopback = true
no-splice = true
spin = "1ms"
idle-timeout = "5m"
allow = ["tcp://127.0.0.1:80-90", "16:*"]

[[bridge]]
listen = "vsock://:8888"
target = "127.0.0.1:80"

[[bridge]]
listen = "tcp://127.0.0.1:8080"
target = "unix:/run/app.sock"
max-concurrent-connections = 7
connect-timeout = 2.5
idle-timeout = "1h"
max-lifetime = "2h"
half-close-timeout = 60
proxy-protocol = true
vsock-buffer = "1MiB"
"""


def test_a_file_says_all_that_the_command_line_can() -> None:
    """A bridge's own settings win over those for every bridge, and rules are not about unix sockets."""
    assert parse_file(WHOLE, "relay.toml") == RelayConfig(
        grace_s=3.0,
        workers=2,
        setup_loopback=True,
        no_splice=True,
        spin_s=0.001,
        bridges=(
            BridgeConfig(
                listen=Vsock(None, 8888),
                target=Tcp("127.0.0.1", 80),
                idle_timeout_s=300.0,
                allow=(parse_rule("127.0.0.1:80-90"), parse_rule("16:*")),
            ),
            BridgeConfig(
                listen=Tcp("127.0.0.1", 8080),
                target=Unix("/run/app.sock"),
                max_connections=7,
                connect_timeout_s=2.5,
                idle_timeout_s=3600.0,
                max_lifetime_s=7200.0,
                half_close_timeout_s=60.0,
                proxy_protocol=True,
                vsock_buffer_bytes=1 << 20,
            ),
        ),
    )


def test_the_example_in_the_documentation_is_one() -> None:
    from relay import config

    example = (config.__doc__ or "").partition("::\n")[2]
    assert [bridge.idle_timeout_s for bridge in parse_file(example, "the docstring").bridges] == [300.0, 3600.0]


BRIDGE = '[[bridge]]\nlisten = "8080"\ntarget = "127.0.0.1:80"\n'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("listen = ", "f is not TOML: Invalid value"),
        ("", "f has no bridge: write [[bridge]], and below it listen = and target ="),
        ("bridge = 5", "f has no bridge"),
        ("bridge = [5]", "f has no bridge"),
        ("[bridge]\nlisten = '1'", "f has no bridge"),
        ("[[bridge]]\nlisten = '8080'", "f, bridge 1: target is missing"),
        ("[[bridge]]\ntarget = '127.0.0.1:80'", "f, bridge 1: listen is missing"),
        (f"{BRIDGE}[[bridge]]\nlisten = 'x'\ntarget = 'y'", "f, bridge 2: listen: 'x' names no port"),
        (f"{BRIDGE}colour = 'red'", "f, bridge 1: 'colour' is not known: it takes listen, target, allow, connect-"),
        (
            f"colour = 'red'\n{BRIDGE}",
            "f: 'colour' is not known: it takes listen, target, allow, connect-timeout, grace",
        ),
        (f"{BRIDGE}workers = 2", "f, bridge 1: 'workers' is not known"),
        (f"idle-timeout = '5'\nidle_timeout = '5'\n{BRIDGE}", "f: 'idle_timeout' is not known"),
        (f"idle-timeout = 'soon'\n{BRIDGE}", "f: idle-timeout: 'soon' is no duration"),
        (f"idle-timeout = '0s'\n{BRIDGE}", "f: idle-timeout: '0s' is no time at all"),
        (
            f"idle-timeout = true\n{BRIDGE}",
            "f: idle-timeout = true is neither text nor a number: write it as the option, in quotes",
        ),
        (f"workers = [2]\n{BRIDGE}", "f: workers = [2] is neither text nor a number"),
        (f"workers = 2026-01-01\n{BRIDGE}", 'f: workers = "2026-01-01" is neither text nor a number'),
        (f"workers = 0\n{BRIDGE}", "f: workers: '0' is not a number from 1 to 1000000"),
        (f"workers = '2 '\n{BRIDGE}", "f: workers: '2 ' is not a number"),
        (f"setup-loopback = 'yes'\n{BRIDGE}", 'f: setup-loopback = "yes" is neither true nor false'),
        (f"allow = '16:*'\n{BRIDGE}", 'f: allow = "16:*" is no list: write it in [ ]'),
        (f"allow = []\n{BRIDGE}", "f: allow = [] does not say what to allow: list that, or leave it out"),
        (f"allow = ['16:*']\n{BRIDGE}allow = []", "f, bridge 1: allow = [] does not say what to allow"),
        (
            "[[bridge]]\nlisten = '80'\ntarget = 'unix:/a'\nallow = ['16:*']",
            "f, bridge 1: no rule can be about unix:/a, only about TCP and vsock: leave allow out there",
        ),
        (
            "[[bridge]]\nlisten = '80'\ntarget = 'unix-vsock:/a:5'\nallow = ['16:*']",
            "f, bridge 1: no rule can be about unix-vsock:/a:5, only about",
        ),
        (f"allow = [5]\n{BRIDGE}", "f: allow: '5' names no port"),
        (f"vsock-buffer = '1 MB'\n{BRIDGE}", "f: vsock-buffer: '1 MB' is no size: write bytes, or as in 256k or 1m"),
        (f"vsock-buffer = 1000\n{BRIDGE}", "f: vsock-buffer: '1000' is not a size from 4k to 1024m"),
        (f"max-concurrent-connections = 1\nworkers = 2\n{BRIDGE}", "1 connections cannot be shared by 2 workers"),
        (BRIDGE * 2, "tcp://:8080 is listened on twice: give each bridge an address of its own"),
        ("[[bridge]]\nlisten = '127.0.0.1:80'\ntarget = '127.0.0.1:80'", "tcp://127.0.0.1:80 leads to itself"),
    ],
)
def test_a_wrong_file_is_told_what_is_wrong_and_where(text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_file(text, "f")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.text(), st.sampled_from([WHOLE, BRIDGE, ""]), st.integers(0, 400), st.integers(0, 40))
def test_no_file_makes_it_crash(noise: str, text: str, place: int, length: int) -> None:
    """Neither any text, nor a good file of which a piece is something else."""
    with suppress(ConfigError):
        parse_file(text[:place] + noise + text[place + length :], "f")


def bridges_between(*pairs: tuple[int, int]) -> tuple[BridgeConfig, ...]:
    return tuple(BridgeConfig(listen=Tcp("h", listen), target=Tcp("h", target)) for listen, target in pairs)


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([(1, 1)], "tcp://h:1 leads to itself: give another --target"),
        ([(1, 2), (2, 1)], "tcp://h:1 leads to itself by way of tcp://h:2: give another --target"),
        ([(5, 1), (1, 2), (2, 3), (3, 1)], "tcp://h:1 leads to itself by way of tcp://h:2: give another --target"),
    ],
)
def test_bridges_that_lead_round_in_a_circle_are_refused(pairs: list[tuple[int, int]], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RelayConfig(bridges=bridges_between(*pairs))
    assert str(caught.value) == expected


def test_bridges_may_lead_to_one_another() -> None:
    assert len(RelayConfig(bridges=bridges_between((1, 2), (2, 3), (4, 2), (5, 3))).bridges) == 4


def test_a_relay_without_a_bridge_is_none() -> None:
    with pytest.raises(ConfigError, match="there is nothing to do"):
        RelayConfig(bridges=())


def test_no_option_is_one_of_the_program_and_of_a_bridge() -> None:
    assert not BRIDGE_SETTINGS.keys() & RELAY_SETTINGS.keys()


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096", 4096), ("4k", 4096), ("256K", 1 << 18), ("1m", 1 << 20), ("1MiB", 1 << 20), ("8Ki", 8192)],
)
def test_sizes_are_understood_in_powers_of_two(text: str, size: int) -> None:
    assert parse_size_bytes(text) == size


@pytest.mark.parametrize("text", ["", "k", "-1", "1.5m", "1g", "4095", "1025m", "1 m", "0x1000"])
def test_other_sizes_are_not(text: str) -> None:
    with pytest.raises(UsageError):
        parse_size_bytes(text)


@given(st.integers(1, 1_000_000))
def test_a_count_is_itself(number: int) -> None:
    assert parse_count(str(number)) == number


@pytest.mark.parametrize("text", ["0", "-1", "1000001", "1e3", "", "+1", "\u0663"])
def test_other_counts_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a number from 1 to 1000000"):
        parse_count(text)


def test_a_timeout_is_longer_than_nothing() -> None:
    assert parse_positive_duration_s("1ms") == 0.001
    with pytest.raises(UsageError, match="'0' is no time at all"):
        parse_positive_duration_s("0")
