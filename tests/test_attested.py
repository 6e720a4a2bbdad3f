"""Links that must not come up do not, and say why: bad evidence, plain peers, and whoever stands between.

Real programs and a real wire; the stand-in's evidence says whatever a test wants. See test_path.py for good links.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress

import pytest
import standin
from attested_pair import APPLICATION_DATA, GATEWAY, PORT, Pair, attested_pair, counted, records, streams
from enlink.testing.gateways import HELLO, AgentSide
from enlink.testing.probe import Packet, canary
from enlink.testing.programs import Program, started
from enta.cleanup import clean_up

ALERT, HANDSHAKE = 21, 22  # RFC 8446, 5.1
ALERT_BYTES = 19  # two of the alert, one of its type, sixteen of the tag: RFC 8446, 5.2


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    directory = tmp_path_factory.mktemp("attested")
    with attested_pair(standin.build(directory / "rats-tls"), directory) as made:
        yield made


@pytest.fixture(scope="module")
def agent(pair: Pair) -> Iterator[Program]:
    """One that has yet to see a gateway which it accepts, for all the refusals."""
    with pair.agent() as made:
        made.wait_until(lambda: bool(made.events("uplink_down")), "down")
        yield made


def strays(packets: list[Packet]) -> list[Packet]:
    """What has left the app's host but the agent's own attempts at a link, and answers to fences."""
    carried = (packet for packet in packets if packet.protocol != "icmp")
    return [packet for packet in carried if (str(packet.destination), packet.port) != (GATEWAY, PORT)]


@pytest.mark.proves("D1", "D3", "D6", "D9", "F71", "G17")
@pytest.mark.parametrize(
    ("says", "reason"),
    [
        ({"STANDIN_MR_ENCLAVE": "66" * 32}, "mrenclave"),
        ({"STANDIN_MR_SIGNER": "66" * 32}, "mrsigner"),
        ({"STANDIN_PRODUCT_ID": "9"}, "product_id"),
        ({"STANDIN_SECURITY_VERSION": "1"}, "svn"),
        ({"STANDIN_ATTRIBUTES": "07" + "00" * 15}, "debug"),
        ({"STANDIN_EVIDENCE": "null-fields"}, "no_fields"),
        ({"STANDIN_EVIDENCE": "short-quote"}, "short_quote"),
        ({"STANDIN_EVIDENCE": "mismatch"}, "quote_mismatch"),
        ({"STANDIN_EVIDENCE": "tdx_ecdsa"}, "evidence_type"),
        ({"STANDIN_EVIDENCE": "none"}, "handshake"),
        ({"STANDIN_EVIDENCE": "garbage"}, "handshake"),
        ({"STANDIN_EVIDENCE": "other-key"}, "handshake"),
        ({"STANDIN_EVIDENCE": "revoked"}, "handshake"),
        ({"STANDIN_EVIDENCE": "expired"}, "handshake"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_evidence_that_will_not_do_makes_no_link_and_both_sides_say_so(
    pair: Pair, agent: Program, says: dict[str, str], reason: str
) -> None:
    """The agent tries again and again; the wire carries handshakes and nothing else."""
    before = counted(agent, "uplink_ended").get(reason, 0)
    pair.ear.packets(), pair.echo.packets()
    with pair.gateway(**says) as gateway:
        agent.wait_until(
            lambda: counted(agent, "uplink_ended").get(reason, 0) >= before + 2, f"refused twice for {reason}"
        )
        agent_status, gateway_status = agent.status(), gateway.status()
        assert agent_status["uplink"]["up"] is False
        assert agent_status["uplink"]["attested"]["peer"] is None
        assert (f"({reason})" if reason != "handshake" else "negotiate failed") in agent_status["uplink"]["last_error"]
        told = [event for name in ("uplink_down", "uplink_still_down") for event in agent.events(name)]
        assert reason in {event["reason"] for event in told}
        (refusal, *_) = gateway.events("refused")
        assert refusal["reason"] in {"refused", "hung_up", "handshake"}
        assert refusal["address"].startswith("10.81.1.1:")
        assert gateway_status["counters"]["enta_ended"][refusal["reason"]] >= 1
        assert gateway_status["legs"]["enta"]["connected"] is False
        assert "from_enta" not in gateway_status["counters"] or not gateway_status["counters"]["from_enta"]
    said, answered = pair.ear.packets(), pair.echo.packets()
    assert strays(said) == []
    assert len(streams(said)) >= 2
    for stream in streams(said):
        # No record of the agent's under its session keys but the alert.
        assert {length for kind, length in records(stream) if kind == APPLICATION_DATA} <= {ALERT_BYTES}
    for stream in streams(answered):
        assert records(stream)


@pytest.mark.proves("D16", "G8")
def test_captured_programs_stay_blocked_while_evidence_is_refused(pair: Pair, agent: Program) -> None:
    """The control: once the agent is dead and cleaned up after, the same program is heard on the same wire."""
    with pair.gateway(STANDIN_MR_ENCLAVE="66" * 32), canary(pair.app, 7, 53):
        before = counted(agent, "uplink_ended").get("mrenclave", 0)
        pair.ear.packets()
        agent.wait_until(lambda: counted(agent, "uplink_ended").get("mrenclave", 0) > before, "refused")
        assert strays(pair.ear.packets()) == []
        agent.kill()
        with pair.app.entered():
            clean_up()
        heard: list[Packet] = []
        while not {("tcp", 7), ("udp", 53)} <= {(packet.protocol, packet.port) for packet in heard}:
            heard += pair.ear.packets()


def test_the_right_evidence_makes_a_link_and_status_shows_it(pair: Pair) -> None:
    """The control of all the refusals: the same agent, the same policy, evidence that fits."""
    with pair.gateway() as gateway, pair.agent() as agent:
        agent.wait_until_ready()
        attested = agent.status()["uplink"]["attested"]
        assert f"mr_enclave={'5e' * 32}" in attested["peer"]
        assert "(accepted, sgx_ecdsa, 20" in attested["peer"]  # and when
        assert gateway.status()["legs"]["enta"]["attested"]["peer"] == "was not asked"
        records_of_link = [records(stream) for stream in streams(pair.ear.packets())]
        assert any(
            kind == APPLICATION_DATA and length > ALERT_BYTES for link in records_of_link for kind, length in link
        )


@pytest.mark.proves("D1", "F71")
def test_a_gateway_judges_the_gateway_that_it_dials(pair: Pair) -> None:
    """It says why there is no link; and makes one once another gateway, with the right evidence, is there."""
    listening = ("--entg-listen", "127.0.0.1:6979", "--enta-listen", "127.0.0.1:6981")
    attesting = ("--entg-rats-tls", "--attester", "sgx_ecdsa")

    def far(**says: str) -> AbstractContextManager[Program]:
        return started(pair.near, "entg", *listening, *attesting, under=pair.under(says))

    with pair.plain_gateway("--entg-rats-tls", "--policy", str(pair.policy)) as gateway:
        with far(STANDIN_MR_ENCLAVE="66" * 32) as other:
            gateway.wait_until(lambda: counted(gateway, "entg_ended").get("mrenclave", 0) >= 2, "refused")
            leg = gateway.status()["legs"]["entg"]
            assert leg["connected"] is False
            assert "(mrenclave)" in leg["problem"]
            assert "mrenclave" in {event["reason"] for event in gateway.events("unreachable")}
            assert other.events("refused")
        with far() as other:
            gateway.wait_until(lambda: bool(gateway.status()["legs"]["entg"]["connected"]), "connected")
            assert f"mr_enclave={'5e' * 32}" in gateway.status()["legs"]["entg"]["attested"]["peer"]


# Plain and attested do not mix.


@pytest.mark.proves("D8", "D9")
def test_an_attested_gateway_carries_nothing_for_a_plain_agent(pair: Pair) -> None:
    """It says not one byte to it, and names the reason."""
    pair.echo.packets()
    with pair.gateway() as gateway, pair.plain_agent() as agent:
        gateway.wait_until(lambda: counted(gateway, "enta_ended").get("not_tls", 0) >= 2, "refused")
        assert agent.status()["uplink"]["up"] is False
        assert gateway.events("refused")[0]["reason"] == "not_tls"
        assert not gateway.status()["counters"].get("from_enta")
    assert streams(pair.echo.packets()) == []


def _said_nothing_but_hellos(pair: Pair, agent: Program) -> bool:
    assert agent.status()["uplink"]["up"] is False
    assert not agent.events("ready")
    said = pair.ear.packets()
    assert strays(said) == []
    kinds = {kind for stream in streams(said) for kind, _ in records(stream)}
    return HANDSHAKE in kinds and kinds <= {ALERT, HANDSHAKE}


@pytest.mark.proves("D8", "D9")
def test_an_attested_agent_says_nothing_but_tls_to_a_plain_gateway(pair: Pair) -> None:
    """Which refuses what it cannot read, and hangs up."""
    pair.ear.packets()
    with pair.plain_gateway(), pair.agent() as agent:
        agent.wait_until(lambda: counted(agent, "uplink_ended").get("hung_up", 0) >= 2, "refused")
        assert _said_nothing_but_hellos(pair, agent)


@pytest.mark.proves("D8", "D9")
def test_an_attested_agent_says_nothing_but_tls_to_a_proxy_that_strips_it(pair: Pair) -> None:
    """Somebody in the middle greets in plain text, as an attested gateway's plain twin would."""
    pair.ear.packets()
    with AgentSide(pair.near) as proxy, pair.agent() as agent:

        def is_refused() -> bool:
            # To every connection that it makes: one of them may have ended for another reason.
            if proxy.agent is not None:
                with suppress(OSError):
                    proxy.pass_on(HELLO)
            return counted(agent, "uplink_ended").get("not_tls", 0) > 0

        agent.wait_until(is_refused, "refused")
        assert _said_nothing_but_hellos(pair, agent)
