"""When and which packets are marked, and that routers and kernels would still take them for good ones."""

from __future__ import annotations

import struct

import pytest
from enlink.ecn import StandingQueue, mark_congested
from enlink.frame import Packets, encode_packets
from hypothesis import given
from hypothesis import strategies as st

NOT_ECT, ECT_1, ECT_0, CE = range(4)


def folded_sum(header: bytes) -> int:
    """The ones' complement sum of RFC 1071; 0xFFFF for a header whose checksum is right."""
    total: int = sum(word for (word,) in struct.iter_unpack("!H", header))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def ipv4(service: int, middle: bytes, payload: bytes = b"") -> bytes:
    """A packet with a right checksum: *service* is the second byte, *middle* the eight that follow, then addresses."""
    header = bytes((0x45, service)) + middle[:8] + bytes(2) + middle[8:]
    checksum = 0xFFFF - folded_sum(header)
    return header[:10] + checksum.to_bytes(2, "big") + header[12:] + payload


def marked(*packets: bytes) -> tuple[list[bytes], int]:
    run = Packets(memoryview(bytearray(encode_packets(packets))), len(packets))
    count = mark_congested(run)
    return [bytes(packet) for packet in run], count


IPV4 = st.builds(ipv4, st.integers(0, 255), st.binary(min_size=16, max_size=16), st.binary(max_size=50))


@given(st.lists(IPV4, min_size=1, max_size=5))
def test_packets_whose_ends_know_ecn_are_marked_and_stay_right(packets: list[bytes]) -> None:
    after, count = marked(*packets)
    assert count == sum(packet[1] & 3 in (ECT_0, ECT_1) for packet in packets)
    for old, new in zip(packets, after, strict=True):
        assert folded_sum(new[:20]) == 0xFFFF
        assert new[1] & 3 == (CE if old[1] & 3 else NOT_ECT)
        # Nothing else has changed.
        assert (new[0], new[1] | 3, new[2:10], new[12:]) == (old[0], old[1] | 3, old[2:10], old[12:])
        assert new == old or old[1] & 3 in (ECT_0, ECT_1)


@pytest.mark.parametrize("added", [1, 2])
def test_a_checksum_that_would_become_negative_goes_round(added: int) -> None:
    """The rest adds up to 0xFFFF minus the checksum, so choose it."""
    for checksum in range(3):
        service = CE - added
        rest = 0xFFFF - checksum - (0x4500 | service)
        packet = ipv4(service, rest.to_bytes(2, "big") + bytes(14))
        assert int.from_bytes(packet[10:12], "big") == checksum
        (after,), count = marked(packet)
        assert count == 1
        assert folded_sum(after[:20]) == 0xFFFF


@pytest.mark.parametrize("packet", [b"\x60\xff" + bytes(38), b"\x45\x02" + bytes(17), b"\x45"])
def test_what_is_no_whole_ipv4_header_is_left_alone(packet: bytes) -> None:
    assert marked(packet) == ([packet], 0)


LIMIT_BYTES, INTERVAL_S = 1000, 0.5
LOOKS = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 2 * LIMIT_BYTES)), max_size=100)


def told(looks: list[tuple[float, int]]) -> list[bool]:
    """What a queue says at each look; a look is so much later than the one before, and finds so many bytes."""
    now_s = 0.0
    queue = StandingQueue(LIMIT_BYTES, INTERVAL_S, lambda: now_s)
    answers = []
    for later_s, queued_bytes in looks:
        now_s += later_s
        answers.append(queue.stands(queued_bytes))
    return answers


def test_a_queue_that_stays_is_told_once_an_interval() -> None:
    assert told([(0.25, LIMIT_BYTES + 1)] * 8) == [False, False, True, False, True, False, True, False]


def test_a_queue_that_is_gone_in_between_is_none() -> None:
    assert not any(told([(0.3, LIMIT_BYTES + 1), (0.1, LIMIT_BYTES + 1), (0.0, LIMIT_BYTES)] * 20))


def test_one_that_is_looked_at_seldom_is_told_all_the_same() -> None:
    """It waits for a slow link."""
    assert told([(10.0, LIMIT_BYTES + 1)] * 3) == [False, True, True]


@given(LOOKS)
def test_what_is_told_has_been_there_at_every_look_for_an_interval(looks: list[tuple[float, int]]) -> None:
    there_s = -1.0  # for how long; less than nothing: there is none
    for (later_s, queued_bytes), is_told in zip(looks, told(looks), strict=True):
        is_queue = queued_bytes > LIMIT_BYTES
        there_s = -1.0 if not is_queue else 0.0 if there_s < 0 else there_s + later_s
        assert not is_told or there_s >= INTERVAL_S - 1e-9
        there_s = 0.0 if is_told else there_s
