"""What failed handshakes may cost is bounded, and no stranger can spend it for everybody else."""

from __future__ import annotations

import functools
import socket
from collections.abc import Awaitable, Callable

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from ratstls.budget import LOST_BYTES, FailureBudget, source_of
from ratstls.errors import HandshakeError
from trio.testing import MockClock, memory_stream_pair

BURST, RESERVE, SHARE = 256, 64, 32


def jumping(test: Callable[..., Awaitable[None]]) -> Callable[[], None]:
    """Run a test in trio, on a clock that jumps to what is due next."""

    @functools.wraps(test)
    def run() -> None:
        trio.run(test, clock=MockClock(autojump_threshold=0))

    return run


def fail(budget: FailureBudget, source: str | None) -> bool:
    """Fail a handshake, and return whether it was tried at all."""
    refused = budget.refused
    with pytest.raises((HandshakeError, EOFError)), budget.one_handshake(source):
        raise EOFError("bad evidence")
    return budget.refused == refused


def succeed(budget: FailureBudget, source: str | None) -> bool:
    try:
        with budget.one_handshake(source):
            return True
    except HandshakeError as error:
        assert error.reason == "too_many_failures"  # noqa: PT017  # half of the promise
        return False


@pytest.mark.proves("D20", "F58")
@jumping
async def test_one_stranger_spends_its_own_share_and_nobody_elses() -> None:
    """Whoever fails 10,000 times from one address costs 32 handshakes, and strangers elsewhere are served."""
    budget = FailureBudget()
    assert sum(fail(budget, "10.0.0.66") for _ in range(10_000)) == SHARE
    assert (budget.failed, budget.lost_bytes) == (SHARE, SHARE * LOST_BYTES)
    assert not succeed(budget, "10.0.0.66")
    assert succeed(budget, "10.0.0.1")


@pytest.mark.proves("D20", "F58", "G16")
@jumping
async def test_strangers_in_any_number_leave_a_reserve_for_those_who_have_been_here() -> None:
    """10,000 addresses spend three quarters; an agent that was accepted before comes and goes as it likes."""
    budget = FailureBudget()
    assert succeed(budget, "10.0.0.1")
    tried = sum(fail(budget, f"192.0.2.{number}") for number in range(10_000))
    assert tried == BURST - RESERVE
    assert not succeed(budget, "10.0.0.2"), "a stranger got through: the test proves nothing"
    assert all(succeed(budget, "10.0.0.1") for _ in range(1000))


@jumping
async def test_even_those_who_have_been_here_spend_no_more_than_there_is() -> None:
    budget = FailureBudget()
    known = [f"10.0.0.{number}" for number in range(20)]
    assert all(succeed(budget, source) for source in known)
    assert sum(fail(budget, source) for source in known for _ in range(100)) == BURST


@jumping
async def test_no_more_than_the_latest_64_that_were_accepted_are_remembered() -> None:
    budget = FailureBudget()
    for number in (*range(64), 0, 64):
        assert succeed(budget, f"10.0.0.{number}")
    while fail(budget, str(budget.failed)):
        pass
    assert [number for number in range(65) if not succeed(budget, f"10.0.0.{number}")] == [1]


@pytest.mark.proves("F58")
@jumping
async def test_a_failure_is_forgiven_a_minute() -> None:
    """For a source and for all: a day of attempts costs the burst, and one a minute."""
    budget = FailureBudget()
    tried = 0
    for _ in range(24 * 360):
        tried += sum(fail(budget, f"192.0.2.{number}") for number in range(8))
        await trio.sleep(10)
    assert BURST - RESERVE + 24 * 60 - 2 <= tried <= BURST - RESERVE + 24 * 60
    await trio.sleep(SHARE * 60)
    assert sum(fail(budget, "192.0.2.1") for _ in range(100)) == SHARE


@jumping
async def test_the_one_that_we_dial_has_the_whole_budget_and_the_refusal_says_what_went_wrong() -> None:
    budget = FailureBudget()
    assert all(succeed(budget, None) for _ in range(1000))
    assert sum(fail(budget, None) for _ in range(1000)) == BURST
    with pytest.raises(
        HandshakeError, match=r"256 handshakes .* cost 17 MB: .* every 60 s.*the last one: bad evidence"
    ):
        budget.one_handshake().__enter__()


@jumping
async def test_handshakes_under_way_count_until_they_have_gone_well() -> None:
    budget = FailureBudget(burst=2, reserve=0)
    with budget.one_handshake("a"), budget.one_handshake("b"):
        assert not succeed(budget, "c")
    assert succeed(budget, "c")


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans(), st.sampled_from([0, 1, 59, 300])), max_size=300))
def test_whatever_comes_failures_stay_within_the_burst_and_one_a_recovery(
    handshakes: list[tuple[int, bool, int]],
) -> None:
    async def main() -> None:
        budget = FailureBudget(burst=8, reserve=2, share=3)
        began = trio.current_time()
        for number, is_good, pause_s in handshakes:
            (succeed if is_good else fail)(budget, str(number))
            await trio.sleep(pause_s)
            assert budget.failed <= 8 + (trio.current_time() - began) / 60

    trio.run(main, clock=MockClock(autojump_threshold=0))


@pytest.mark.parametrize(
    ("peer", "source"),
    [
        (("192.0.2.1", 7), "192.0.2.1"),
        (("::ffff:192.0.2.1", 7, 0, 0), "192.0.2.1"),
        (("2001:db8:0:1:2:3:4:5", 7, 0, 0), "2001:db8:0:1::/64"),
        (("fe80::1%eth0", 7, 0, 2), "fe80::/64"),
        ((16, 7), "16"),  # vsock
        ("", ""),
    ],
)
def test_a_source_is_an_address_or_a_network(peer: object, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has an IPv6 address commonly has 2**64 of them."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
        monkeypatch.setattr(stream.socket, "getpeername", lambda: peer)
        assert source_of(stream) == source


def test_who_has_no_address_or_has_gone_is_nobody_in_particular() -> None:
    assert source_of(memory_stream_pair()[0]) == ""
    with socket.socket() as unconnected:
        assert source_of(trio.SocketStream(trio.socket.from_stdlib_socket(unconnected))) == ""
