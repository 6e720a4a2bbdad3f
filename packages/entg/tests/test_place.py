"""Who gets a leg's packets: every rule by itself, and all of them against a slow model on random histories."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv6Interface

import pytest
from enlink.control import Hello, Role
from enlink.frame import FrameDecoder, Packets, encode_packets
from enlink.testing.frames import feed
from enlink.testing.peers import ip_packet
from entg.place import Identity, Place, identify_agent, identify_gateway
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

RAW_ALICE = Identity(frozenset({"192.168.0.1"}), is_eng=False)
RAW_BOB = Identity(frozenset({"192.168.0.2"}), is_eng=False)
ENG_ALICE = Identity(frozenset({"192.168.0.1"}), is_eng=True)
ENG_BOB = Identity(frozenset({"192.168.0.2"}), is_eng=True)


def decoded(*packets: bytes) -> Packets:
    (event,) = feed(FrameDecoder(), encode_packets(packets))
    assert isinstance(event, Packets)
    return event


def ipv6_packet(source: str) -> bytes:
    return bytes((0x60, 0, 0, 0, 0, 0, 59, 64)) + IPv6Interface(source).packed + bytes(16)


def test_an_eng_agent_goes_by_its_tun_addresses() -> None:
    hello = Hello(Role.CLIENT_AGENT, tun=(IPv4Interface("192.168.0.1/24"), IPv6Interface("fd00::1/64")))
    assert identify_agent(hello) == Identity(frozenset({"192.168.0.1", "fd00::1"}), is_eng=True)


def test_an_eng_agent_without_an_address_goes_by_its_instance() -> None:
    assert identify_agent(Hello(Role.CLIENT_AGENT, "blue")) == Identity(frozenset({"blue"}), is_eng=True)


@pytest.mark.parametrize("source", ["192.168.0.1", "10.255.0.7", "0.0.0.0"])
def test_a_raw_agent_goes_by_the_source_of_its_packets(source: str) -> None:
    packet = ip_packet(source, "192.168.0.254", b"hello")
    assert identify_agent(decoded(packet)) == Identity(frozenset({source}), is_eng=False)


def test_a_raw_agent_goes_by_its_ipv6_source_too() -> None:
    assert identify_agent(decoded(ipv6_packet("fd00::1"))) == Identity(frozenset({"fd00::1"}), is_eng=False)


def test_what_a_tun_device_sends_of_its_own_accord_tells_nothing() -> None:
    chatter = [ipv6_packet("::"), ipv6_packet("fe80::1234")]
    assert identify_agent(decoded(*chatter)) is None
    assert identify_agent(decoded(*chatter, ip_packet("192.168.0.1", "192.168.0.254", b""))) == RAW_ALICE


@given(st.one_of(st.just(Hello(Role.GATEWAY, "blue")), st.just(decoded(ip_packet("192.168.0.7", "10.0.0.1", b"")))))
def test_all_gateways_are_the_one_peer(first: Hello | Packets) -> None:
    assert identify_gateway(first) == Identity(frozenset({"gateway"}), is_eng=isinstance(first, Hello))


def test_nobody_holds_an_empty_place() -> None:
    place: Place[str] = Place()
    assert (place.holder, place.speaker, place.last_in_line) == (None, None, None)


def test_the_oldest_silent_connection_holds_the_place_until_it_ends() -> None:
    place: Place[str] = Place()
    place.stand_in_line("first")
    place.stand_in_line("second")
    assert (place.holder, place.last_in_line) == ("first", "second")
    place.leave("first")
    assert (place.holder, place.last_in_line) == ("second", None)


def test_standing_in_line_twice_takes_one_turn() -> None:
    place: Place[str] = Place()
    place.stand_in_line("first")
    place.stand_in_line("second")
    place.stand_in_line("first")
    place.leave("first")
    assert place.holder == "second"


def test_speaking_displaces_silent() -> None:
    place: Place[str] = Place()
    place.stand_in_line("scanner")
    assert place.take("agent", ENG_ALICE) == []
    assert (place.holder, place.speaker, place.last_in_line) == ("agent", "agent", "scanner")


def test_a_silent_connection_that_speaks_leaves_the_line() -> None:
    place: Place[str] = Place()
    place.stand_in_line("agent")
    place.take("agent", RAW_ALICE)
    place.leave("agent")
    assert place.holder is None


@pytest.mark.parametrize(
    ("incumbent", "newcomer", "is_admitted"),
    [
        (RAW_ALICE, RAW_ALICE, True),
        (ENG_ALICE, ENG_ALICE, True),
        (RAW_ALICE, ENG_ALICE, True),
        (ENG_ALICE, RAW_ALICE, False),
        (RAW_ALICE, RAW_BOB, False),
        (ENG_ALICE, ENG_BOB, False),
        (RAW_ALICE, ENG_BOB, False),
        (ENG_ALICE, RAW_BOB, False),
    ],
)
def test_only_the_same_one_come_back_replaces_a_speaker(
    incumbent: Identity, newcomer: Identity, is_admitted: bool
) -> None:
    place: Place[str] = Place()
    assert place.incumbent_against(newcomer) is None
    place.take("incumbent", incumbent)
    assert place.incumbent_against(newcomer) == (None if is_admitted else "incumbent")


def test_one_shared_address_makes_two_speakers_the_same() -> None:
    place: Place[str] = Place()
    place.take("old", Identity(frozenset({"192.168.0.1", "fd00::1"}), is_eng=True))
    assert place.incumbent_against(Identity(frozenset({"192.168.0.9", "fd00::1"}), is_eng=True)) is None


def test_whoever_takes_the_place_displaces_who_had_it() -> None:
    place: Place[str] = Place()
    place.take("old", ENG_ALICE)
    assert place.take("new", ENG_ALICE) == ["old"]
    assert place.holder == "new"
    place.leave("old")
    assert place.holder == "new"


def test_half_closed_it_keeps_the_place_until_somebody_speaks() -> None:
    place: Place[str] = Place()
    place.stand_in_line("scanner")
    place.take("agent", RAW_ALICE)
    place.half_close("agent")
    assert (place.holder, place.speaker) == ("agent", None)
    assert place.incumbent_against(RAW_BOB) is None
    assert place.take("other", RAW_BOB) == ["agent"]
    assert place.holder == "other"


def test_who_has_lost_the_place_does_not_get_it_back_by_half_closing() -> None:
    place: Place[str] = Place()
    place.take("old", ENG_ALICE)
    place.take("new", ENG_ALICE)
    place.half_close("old")
    place.leave("new")
    assert place.holder is None


@dataclass
class Known:
    """What the model knows of a connection."""

    number: int
    identity: Identity | None = None
    is_half_closed: bool = False
    stood: int = 0


class AgainstModel(RuleBasedStateMachine):
    """A list of everyone present, searched anew for each answer."""

    def __init__(self) -> None:
        super().__init__()
        self.place: Place[int] = Place()
        self.present: list[Known] = []
        self.numbers = 0
        self.turns = 0

    def some(self, index: int) -> Known:
        return self.present[index % len(self.present)]

    @rule(stands=st.booleans())
    def connect(self, stands: bool) -> None:
        self.numbers += 1
        known = Known(self.numbers)
        self.present.append(known)
        if stands:
            self.turns += 1
            known.stood = self.turns
            self.place.stand_in_line(known.number)

    @precondition(lambda self: self.present)
    @rule(index=st.integers(0, 99), identity=st.sampled_from([RAW_ALICE, RAW_BOB, ENG_ALICE, ENG_BOB]))
    def speak(self, index: int, identity: Identity) -> None:
        known = self.some(index)
        if known.identity:
            return
        speakers = [other for other in self.present if other.identity and not other.is_half_closed]
        refusing = [
            other.number
            for other in speakers
            if other.identity
            and (other.identity.names != identity.names or (other.identity.is_eng and not identity.is_eng))
        ]
        assert self.place.incumbent_against(identity) == (refusing[0] if refusing else None)
        if not refusing:
            displaced = [other for other in self.present if other.identity]
            assert self.place.take(known.number, identity) == [other.number for other in displaced]
            self.present = [other for other in self.present if other not in displaced]
            known.identity, known.stood = identity, 0

    @precondition(lambda self: self.present)
    @rule(index=st.integers(0, 99))
    def half_close(self, index: int) -> None:
        known = self.some(index)
        self.place.half_close(known.number)
        known.is_half_closed = known.identity is not None

    @precondition(lambda self: self.present)
    @rule(index=st.integers(0, 99))
    def leave(self, index: int) -> None:
        known = self.some(index)
        self.present.remove(known)
        self.place.leave(known.number)

    @invariant()
    def holder_is_the_speaker_or_else_the_first_in_line(self) -> None:
        spoken = [known.number for known in self.present if known.identity]
        line = [known.number for known in sorted(self.present, key=lambda known: known.stood) if known.stood]
        assert len(spoken) <= 1
        assert self.place.holder == next(iter(spoken + line), None)
        assert self.place.last_in_line == (line[-1] if len(spoken + line) > 1 and line else None)


TestAgainstModel = AgainstModel.TestCase
