"""What may be dialled: spellings of rules, verdicts beside a slow oracle, and names that lead elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import pytest
from enlink.errors import UsageError
from hypothesis import example, given, settings
from hypothesis import strategies as st
from relay.addresses import Address, Network
from relay.allowlist import (
    AllowList,
    NameRule,
    NetworkRule,
    Ports,
    Reason,
    Rule,
    VsockRule,
    canonical_name,
    parse_rule,
    rule_for,
)

HTTPS = Ports(443, 443)
EVERY = Ports(1, 65535)

RULES: list[tuple[str, Rule, str]] = [
    ("example.com:443", NameRule("example.com", HTTPS), "example.com:443"),
    ("Example.COM.:443", NameRule("example.com", HTTPS), "example.com:443"),
    ("tcp://db:5432", NameRule("db", Ports(5432, 5432)), "db:5432"),
    ("my_db-1.x:8000-8010", NameRule("my_db-1.x", Ports(8000, 8010)), "my_db-1.x:8000-8010"),
    ("*.example.com:*", NameRule("example.com", EVERY, is_wildcard=True), "*.example.com:1-65535"),
    ("bücher.example:443", NameRule("xn--bcher-kva.example", HTTPS), "xn--bcher-kva.example:443"),
    ("*.Straße.de:443", NameRule("xn--strae-oqa.de", HTTPS, is_wildcard=True), "*.xn--strae-oqa.de:443"),
    ("parent:443", NameRule("parent", HTTPS), "parent:443"),
    ("192.0.2.0/24:443", NetworkRule(ip_network("192.0.2.0/24"), HTTPS), "192.0.2.0/24:443"),
    ("192.0.2.1:443", NetworkRule(ip_network("192.0.2.1/32"), HTTPS), "192.0.2.1:443"),
    ("[2001:DB8::/32]:443", NetworkRule(ip_network("2001:db8::/32"), HTTPS), "[2001:db8::/32]:443"),
    ("tcp://[::1]:443", NetworkRule(ip_network("::1/128"), HTTPS), "[::1]:443"),
    ("[::ffff:10.0.0.0/104]:443", NetworkRule(ip_network("10.0.0.0/8"), HTTPS), "10.0.0.0/8:443"),
    ("16:8888", VsockRule(16, Ports(8888, 8888)), "vsock://16:8888"),
    ("vsock://16:0-1", VsockRule(16, Ports(0, 1)), "vsock://16:0-1"),
    ("vsock://parent:9000", VsockRule(3, Ports(9000, 9000)), "vsock://3:9000"),
    ("vsock://*:*", VsockRule(None, Ports(0, 4294967294)), "vsock://*:0-4294967294"),
]


@pytest.mark.parametrize(("text", "rule", "spelling"), RULES, ids=[text for text, _, _ in RULES])
def test_each_spelling_is_one_rule_and_each_rule_has_one_spelling(text: str, rule: Rule, spelling: str) -> None:
    """What is printed is parsed into the same rule again."""
    assert parse_rule(text) == rule
    assert str(rule) == spelling
    assert parse_rule(spelling) == rule


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("", "write it as in example.com:443"),
        ("example.com", "write it as in example.com:443"),
        ("[::1]", r"write it as in \[::1\]:443"),
        ("http://example.com:80", "http:// is not known here, write HOST:PORT or vsock://CID:PORT"),
        ("2001:db8::1:443", r"as in \[2001:db8::/32\]:443"),
        ("[2001:db8::]/32:443", r"as in \[2001:db8::/32\]:443"),
        ("[192.0.2.1]:443", r"as in \[2001:db8::/32\]:443"),
        ("192.0.2.1/24:443", "write 192.0.2.0/24 or the address alone"),
        ("[2001:db8::1/32]:443", "write 2001:db8::/32 or the address alone"),
        ("192.0.2.0/255.255.255.0:443", "'255.255.255.0' after the slash is no number of bits"),
        ("192.0.2.0/33:443", "as in 192.0.2.0/24"),
        ("[fe80::%eth0/64]:443", "leave out the %"),
        ("300.0.2.1:443", "'300.0.2.1' does not appear to be"),
        ("example/24:443", "'example/24' does not appear to be"),
        ("127.1:443", "'127.1' is neither a host name nor an address"),
        ("0x7f.0x1:443", "is neither a host name nor an address"),
        ("tcp://16:443", "'16' is neither a host name nor an address"),
        ("exa mple:443", "'exa mple' is neither a host name nor an address"),
        (":443", "'' is neither a host name nor an address, as in example.com"),
        ("-a:443", "is neither a host name nor an address"),
        ("\N{SNOWMAN}\N{COMBINING ACUTE ACCENT}.example:443", "is no host name: Codepoint"),
        ("*:443", r"\* stands for whole names below a domain only, as in \*.example.com"),
        ("db*.example.com:443", r"\* stands for whole names"),
        ("*.*.example.com:443", "is neither a host name nor an address"),
        ("*.192.0.2.1:443", "'192.0.2.1' is neither a host name nor an address"),
        ("example.com:0", "'0' is neither a port from 1 to 65535"),
        ("example.com:65536", "'65536' is neither a port from 1 to 65535"),
        ("example.com:8010-8000", "write 8000-8010"),
        ("example.com:80-", "nor a range as in 8000-8010"),
        ("example.com:٤٤", "is neither a port"),
        ("16:4294967295", "is neither a port from 0 to 4294967294"),
        ("vsock://any:1", r"'any' is neither a CID to dial nor \* for any, as in vsock://16:8888"),
        ("4294967295:1", "'4294967295' is neither a CID to dial"),
        ("vsock://:1", "'' is neither a CID to dial"),
        ("vsock://enclave:1", "'enclave' is neither a CID to dial"),
    ],
)
def test_another_spelling_is_refused_with_the_right_one(text: str, hint: str) -> None:
    """The error quotes what was written."""
    with pytest.raises(UsageError, match=hint) as raised:
        parse_rule(text)
    assert repr(text) in str(raised.value)


def mutated(text: str) -> st.SearchStrategy[str]:
    """A spelling with one character put in, replaced or taken out."""
    return st.builds(
        lambda at, new, skip: text[:at] + new + text[at + skip :],
        st.integers(0, len(text)),
        st.text("*.:/[]-%0a ", max_size=1),
        st.integers(0, 1),
    )


@given(st.text() | st.text("*.:/[]-%0123456789abcx") | st.sampled_from([text for text, _, _ in RULES]).flatmap(mutated))
@settings(deadline=None)  # a busy machine is no failure
def test_any_text_is_a_rule_or_a_usage_error(text: str) -> None:
    """And a rule survives its own spelling."""
    try:
        rule = parse_rule(text)
    except UsageError:
        return
    assert parse_rule(str(rule)) == rule


@pytest.mark.parametrize(
    ("host", "spelling"),
    [
        ("Example.com", "example.com:1"),
        ("192.0.2.1", "192.0.2.1:1"),
        ("::1", "[::1]:1"),
        ("fe80::1%eth0", "[fe80::1]:1"),
    ],
)
def test_a_fixed_target_has_a_rule(host: str, spelling: str) -> None:
    """For when no rules are given."""
    assert str(rule_for(host, 1)) == spelling


@pytest.mark.parametrize("host", ["*.example.com", "*", "", "a b", "1.2", "::g"])
def test_a_fixed_target_is_no_pattern(host: str) -> None:
    with pytest.raises(UsageError):
        rule_for(host, 1)


def reasons(rules: AllowList, host: str, *addresses: str, port: int = 443) -> list[Reason]:
    return [verdict.reason for verdict in rules.judge_answer(host, port, [ip_address(text) for text in addresses])]


def judge(rules: Sequence[str], host: str, *addresses: str, port: int = 443) -> list[Reason]:
    return reasons(AllowList(map(parse_rule, rules)), host, *addresses, port=port)


def test_nothing_is_allowed_without_a_rule() -> None:
    nothing = AllowList([])
    assert nothing.judge_host("example.com", 443).reason == "not_listed"
    assert nothing.judge_host("192.0.2.1", 443).reason == "not_listed"
    assert nothing.judge_vsock(16, 8888).reason == "not_listed"
    assert judge([], "example.com", "192.0.2.1") == ["not_listed"]


def test_a_refusal_names_the_rule_that_is_missing() -> None:
    nothing = AllowList([])
    assert nothing.judge_host("Example.com.", 80).text == (
        "example.com port 80 is not allowed: no rule covers it, as example.com:80 would"
    )
    assert nothing.judge_host("::1", 80).text.endswith("no rule covers it, as [::1]:80 would")
    assert nothing.judge_vsock(3, 4).text == "CID 3 port 4 is not allowed: no rule covers it, as vsock://3:4 would"


def test_a_name_passes_by_its_own_rule_or_where_its_addresses_may_be_allowed() -> None:
    rules = AllowList(map(parse_rule, ["db.example:5432", "*.svc.example:443", "10.0.0.0/8:80"]))
    assert rules.judge_host("DB.example.", 5432).reason == "by_name"
    assert rules.judge_host("a.b.svc.example", 443).reason == "by_name"
    assert rules.judge_host("other.example", 80).reason == "by_address"
    assert [rules.judge_host(host, 443).is_allowed for host in ("db.example", "svc.example", "evilsvc.example")] == [
        False,
        False,
        False,
    ]
    assert rules.judge_host("10.1.2.3", 80).reason == "by_address"
    assert rules.judge_host("::ffff:10.1.2.3", 80).reason == "by_address"
    with pytest.raises(UsageError, match="neither a host name nor an address"):
        rules.judge_host("a b", 80)


def test_vsock_rules_allow_ports_of_one_cid_or_of_all() -> None:
    rules = AllowList(map(parse_rule, ["16:8000-8001", "vsock://*:9000"]))
    assert rules.judge_vsock(16, 8001).reason == "by_cid"
    assert rules.judge_vsock(77, 9000).is_allowed
    assert not rules.judge_vsock(17, 8000).is_allowed
    assert not rules.judge_vsock(16, 8002).is_allowed


SPECIAL: list[tuple[str, Reason]] = [
    ("169.254.169.254", "metadata"),
    ("fd00:ec2::254", "metadata"),
    ("100.100.100.200", "metadata"),
    ("127.0.0.1", "loopback"),
    ("127.8.9.10", "loopback"),
    ("::1", "loopback"),
    ("169.254.1.1", "link_local"),
    ("fe80::1", "link_local"),
    ("fe80::1%eth0", "link_local"),
    ("0.0.0.0", "unspecified"),
    ("::", "unspecified"),
    ("224.0.0.251", "multicast"),
    ("ff02::fb", "multicast"),
    ("255.255.255.255", "reserved"),
    ("64:ff9b:1::a9fe:a9fe", "translated"),
    ("2001::1", "translated"),
    ("::ffff:169.254.169.254", "metadata"),
    ("::169.254.169.254", "metadata"),
    ("64:ff9b::169.254.169.254", "metadata"),
    ("2002:a9fe:a9fe::1", "metadata"),
    ("::ffff:127.0.0.1", "loopback"),
    ("64:ff9b::127.0.0.1", "loopback"),
    ("2002:7f00:1::", "loopback"),
    ("::ffff:0:0", "unspecified"),
]


@pytest.mark.proves("D23")
@pytest.mark.parametrize(("address", "reason"), SPECIAL, ids=[address for address, _ in SPECIAL])
def test_a_name_leads_to_no_special_address_unless_that_is_allowed_by_address(address: str, reason: Reason) -> None:
    """Neither the name's own rule nor the one for every address means it; one for the address does."""
    everything = ["example.com:443", "0.0.0.0/0:443", "[::/0]:443"]
    assert judge(everything, "example.com", address) == [reason]
    assert AllowList(map(parse_rule, everything)).judge_host(address, 443).reason == reason
    assert judge([*everything, str(rule_for(address, 443))], "example.com", address) == ["by_address"]


@pytest.mark.proves("D23", "F29")
@pytest.mark.parametrize("address", [address for address, _ in SPECIAL] + ["10.0.0.1", "fd00::1", "64:ff9b::10.0.0.1"])
def test_a_name_that_moves_from_a_public_to_a_special_address_is_refused_as_rebinding(address: str) -> None:
    """At once, later, and beside a public address that still passes."""
    rules = AllowList([parse_rule("example.com:443")])
    assert reasons(rules, "example.com", address, "192.0.2.1") == ["rebind", "by_name"]
    assert reasons(rules, "Example.com.", address) == ["rebind"]
    assert reasons(rules, "example.com", "192.0.2.1") == ["by_name"]
    (verdict,) = rules.judge_answer("example.com", 443, [ip_address(address)])
    assert verdict.text.startswith("example.com port 443 at ")
    hint = verdict.text.rpartition(" allow ")[2]
    assert judge(["example.com:443", hint], "example.com", "192.0.2.1", address) == ["by_name", "by_address"]


@pytest.mark.proves("D23", "F29")
def test_a_name_may_lead_to_private_addresses_until_it_has_led_to_a_public_one() -> None:
    """Whatever it began with: who answers for it could have begun with anything."""
    rules = AllowList([parse_rule("db.internal:443")])
    assert reasons(rules, "db.internal", "10.0.0.1", "10.0.0.2") == ["by_name", "by_name"]
    assert reasons(rules, "db.internal", "127.0.0.1") == ["loopback"]
    assert reasons(rules, "db.internal", "10.0.0.1") == ["by_name"]
    assert reasons(rules, "db.internal", "93.184.215.14") == ["by_name"]
    for address in ("10.0.0.1", "127.0.0.1", "169.254.169.254"):
        assert reasons(rules, "db.internal", address) == ["rebind"]
    assert reasons(rules, "db.internal", "93.184.215.14", "10.0.0.1") == ["by_name", "rebind"]
    assert reasons(rules, "other.internal", "10.0.0.1") == ["not_listed"]


def test_a_special_address_says_nothing_about_a_name() -> None:
    rules = AllowList([parse_rule("db.internal:443")])
    assert reasons(rules, "db.internal") == []
    assert reasons(rules, "db.internal", "127.0.0.1") == ["loopback"]
    assert reasons(rules, "db.internal", "10.0.0.1") == ["by_name"]


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST.", "db.localhost"])
def test_localhost_may_lead_to_loopback_and_nowhere_else_that_is_special(host: str) -> None:
    rules = [str(rule_for(host, 443))]
    assert judge(rules, host, "127.0.0.1", "::1", "169.254.169.254") == ["by_name", "by_name", "metadata"]
    assert judge(["0.0.0.0/0:443"], host, "127.0.0.1") == ["loopback"]
    assert judge(["notlocalhost:443"], "notlocalhost", "127.0.0.1") == ["loopback"]


def test_a_range_that_means_link_local_does_not_mean_the_metadata_service_within() -> None:
    rules = ["169.254.0.0/16:80"]
    assert judge(rules, "example.com", "169.254.1.1", "169.254.169.254", port=80) == ["by_address", "metadata"]


def test_private_addresses_are_ordinary_where_they_are_written_as_such() -> None:
    assert AllowList([parse_rule("0.0.0.0/0:443")]).judge_host("10.0.0.1", 443).reason == "by_address"
    assert judge(["0.0.0.0/0:443"], "example.com", "192.0.2.1", "10.0.0.1") == ["by_address", "rebind"]
    assert judge(["10.0.0.0/8:443", "example.com:443"], "example.com", "192.0.2.1", "10.0.0.1") == [
        "by_name",
        "by_address",
    ]


# --- the oracle: slow, on text and octets -----------------------------------------------------------------------------


def slow_purpose_of_v4(octets: tuple[int, ...]) -> str:
    a, b, c, d = octets
    text = f"{a}.{b}.{c}.{d}"
    if text in (
        *("169.254.169.254", "169.254.170.2", "169.254.170.23"),
        *("100.100.100.200", "168.63.129.16", "192.0.0.192"),
    ):
        return "metadata"
    if a in (0, 127):
        return "loopback" if a else "unspecified"
    if (a, b) == (169, 254):
        return "link_local"
    if a >= 224:
        return "multicast" if a < 240 else "reserved"
    if a == 10 or (a == 172 and b in range(16, 32)) or (a, b) == (192, 168) or (a == 100 and b in range(64, 128)):
        return "private"
    return "private" if (a, b, c) == (192, 0, 0) else ""


def slow_purpose(address: Address) -> str:
    if isinstance(address, IPv4Address):
        return slow_purpose_of_v4(tuple(address.packed))
    packed = address.packed
    groups = [packed[at : at + 2].hex() for at in range(0, 16, 2)]
    if packed == bytes(15) + b"\1":
        return "loopback"
    if packed == bytes(16):
        return "unspecified"
    if groups[:5] == ["0000"] * 5 and groups[5] in ("0000", "ffff"):
        return slow_purpose_of_v4(tuple(packed[12:]))
    if groups[:6] == ["0064", "ff9b", "0000", "0000", "0000", "0000"]:
        return slow_purpose_of_v4(tuple(packed[12:]))
    if groups[0] == "2002":
        return slow_purpose_of_v4(tuple(packed[2:6]))
    if address.compressed in ("fd00:ec2::254", "fd00:ec2::23", "fd20:ce::254"):
        return "metadata"
    if groups[:3] == ["0064", "ff9b", "0001"] or groups[:2] == ["2001", "0000"]:
        return "translated"
    start = f"{packed[0]:08b}{packed[1]:08b}"
    for prefix, purpose in (
        ("1111111010", "link_local"),
        ("11111111", "multicast"),
        ("1111110", "private"),
        ("1111111011", "private"),
    ):
        if start.startswith(prefix):
            return purpose
    return ""


def bits(address: Address) -> str:
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    address = mapped or address
    return f"{address.version}:" + "".join(f"{byte:08b}" for byte in address.packed)


def slowly_covers(network: Network, address: Address) -> bool:
    return bits(address).startswith(bits(network.network_address)[: 2 + network.prefixlen])


WIDE = """
0.0.0.0-0.255.255.255 10.0.0.0-10.255.255.255 100.64.0.0-100.127.255.255 127.0.0.0-127.255.255.255
169.254.0.0-169.254.255.255 172.16.0.0-172.31.255.255 192.0.0.0-192.0.0.255 192.168.0.0-192.168.255.255
224.0.0.0-239.255.255.255 240.0.0.0-255.255.255.255
fc00::-fdff:ffff:ffff:ffff:ffff:ffff:ffff:ffff fe80::-febf:ffff:ffff:ffff:ffff:ffff:ffff:ffff
fec0::-feff:ffff:ffff:ffff:ffff:ffff:ffff:ffff ff00::-ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff
64:ff9b:1::-64:ff9b:1:ffff:ffff:ffff:ffff:ffff 2001::-2001:0:ffff:ffff:ffff:ffff:ffff:ffff
"""


def slowly_means(network: Network, address: Address) -> bool:
    """Whether the network lies within the narrowest special range that has the address."""
    if network.num_addresses == 1:
        return True
    if slow_purpose(address) == "metadata" or address in (ip_address("::"), ip_address("::1")):
        return (
            slow_purpose(address) == "metadata"
            and network.version == 6
            and network.prefixlen >= 48
            and (
                address in ip_network("2002::/16")  # 6to4 has 2 ** 80 spellings of each IPv4 address
            )
        )
    ends = [network.network_address, network.broadcast_address]
    for first, last in (text.split("-") for text in WIDE.split()):
        if ":" in first:
            ranges = [(ip_address(first), ip_address(last))]
        else:
            lows, highs = v4_forms(IPv4Address(first)), v4_forms(IPv4Address(last))
            highs[-1] = IPv6Address(int(highs[-1]) | (1 << 80) - 1)
            ranges = list(zip(lows, highs, strict=True))
        for low, high in ranges:
            if bits(low) <= bits(address) <= bits(high):
                return all(bits(low) <= bits(end) <= bits(high) for end in ends)
    return False


def slowly_allowed(rules: Sequence[Rule], name: str, port: int, answers: Sequence[Sequence[Address]]) -> list[bool]:
    """Whether each address of the last answer may be dialled."""
    labels = name.lower().rstrip(".").split(".")
    listed = False
    networks = []
    for rule in rules:
        if rule.ports.first <= port <= rule.ports.last:
            if isinstance(rule, NetworkRule):
                networks.append(rule.network)
            elif isinstance(rule, NameRule):
                wanted = rule.name.split(".")
                tail = labels[-len(wanted) :]
                listed |= tail == wanted and (len(labels) > len(wanted)) is rule.is_wildcard
    was_public = any(slow_purpose(address) == "" for answer in answers for address in answer)
    verdicts = []
    for address in answers[-1]:
        purpose = slow_purpose(address)
        covering = [network for network in networks if slowly_covers(network, address)]
        is_ordinary = purpose == "" or (purpose == "private" and not was_public)
        is_local = labels[-1] == "localhost" and purpose == "loopback"
        is_meant = any(slowly_means(network, address) for network in covering)
        verdicts.append(is_meant or (bool(covering) and is_ordinary) or (listed and (is_ordinary or is_local)))
    return verdicts


def v4_forms(address: IPv4Address) -> list[Address]:
    low = int(address)
    return [
        address,
        *(IPv6Address(prefix | low) for prefix in (0, 0xFFFF << 32, 0x64FF9B << 96)),
        IPv6Address((0x2002 << 112) | low << 80),
    ]


INTERESTING = [ip_address(address) for address, _ in SPECIAL] + [
    ip_address(text)
    for text in (
        *(
            "192.0.2.1",
            "2001:db8::1",
            "10.0.0.1",
            "172.15.0.1",
            "172.31.255.255",
            "172.32.0.0",
            "100.63.0.1",
            "9.9.9.9",
        ),
        *("100.64.0.1", "192.168.1.1", "192.0.0.1", "168.63.129.17", "fc00::1", "fec0::1", "fd20:ce::254", "126.0.0.1"),
        *("128.0.0.0", "223.255.255.255", "239.0.0.1", "240.0.0.1", "fe7f::1", "febf::1", "2001:1::1", "64:ff9b:2::1"),
    )
]
addresses = (
    st.sampled_from(INTERESTING)
    | st.ip_addresses(v=4).flatmap(lambda address: st.sampled_from(v4_forms(IPv4Address(address))))
    | st.ip_addresses()
)
names = st.sampled_from(["a.example", "b.a.example", "xa.example", "example", "localhost", "A.Example.", "c.localhost"])
ports = st.tuples(st.integers(1, 4), st.integers(1, 4)).map(lambda pair: Ports(min(pair), max(pair)))


@st.composite
def network_rules(draw: st.DrawFn) -> NetworkRule:
    address = draw(addresses.filter(lambda address: address.version == 4 or not address.ipv4_mapped))
    prefix = draw(st.integers(0, 32) | st.sampled_from([8, 12, 16, 24, 32]))
    length = prefix if address.version == 4 else draw(st.sampled_from([prefix, 128 - prefix]))
    network = ip_network(f"{str(address).partition('%')[0]}/{length}", strict=False)
    return NetworkRule(network, draw(ports))


name_rules = st.builds(
    NameRule, st.sampled_from(["a.example", "example", "localhost", "b.a.example"]), ports, st.booleans()
)
answers = st.lists(st.lists(addresses, max_size=3), min_size=1, max_size=3)


@pytest.mark.proves("D23", "F29")
@given(st.lists(name_rules | network_rules(), max_size=4), names, st.integers(1, 4), answers)
@example([NameRule("example", EVERY)], "example", 1, [[ip_address("192.0.2.1")], [ip_address("2002:7f00:1::")]])
@settings(deadline=None)  # the oracle is slow
def test_verdicts_are_those_of_a_slow_oracle(
    rules: list[Rule], name: str, port: int, answers: list[list[Address]]
) -> None:
    """For any rules and any sequence of answers to one name."""
    allow = AllowList(rules)
    last = [allow.judge_answer(name, port, answer) for answer in answers][-1]
    assert [verdict.is_allowed for verdict in last] == slowly_allowed(rules, name, port, answers)
    for verdict in last:
        assert verdict.is_allowed == (verdict.reason in ("by_name", "by_address"))


@given(st.lists(network_rules(), max_size=4), st.integers(1, 4), addresses)
@settings(deadline=None)  # the oracle is slow
def test_an_address_as_a_target_is_judged_without_a_name(rules: list[Rule], port: int, address: Address) -> None:
    """No rule for names helps it, and private is as good as public."""
    covering = [
        rule.network
        for rule in rules
        if isinstance(rule, NetworkRule) and port in rule.ports and slowly_covers(rule.network, address)
    ]
    purpose = slow_purpose(address)
    expected = bool(covering) and (
        purpose in ("", "private") or any(slowly_means(network, address) for network in covering)
    )
    named = [*rules, NameRule("localhost", EVERY), NameRule("1", EVERY)]
    assert AllowList(named).judge_host(str(address), port).is_allowed == expected


@given(st.text())
@settings(deadline=None)  # a busy machine is no failure
def test_a_canonical_name_is_its_own_canonical_name(text: str) -> None:
    try:
        name = canonical_name(text)
    except UsageError:
        return
    assert canonical_name(name) == name == name.lower()
    assert name.isascii()
