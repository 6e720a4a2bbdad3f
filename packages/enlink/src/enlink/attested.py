"""Makes attested streams of plain ones for a program's links. The one place that knows the package ratstls.

The package is imported when somebody asks for attestation: without that, everything works without it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

import trio

from enlink.attestation import Attestation, Side
from enlink.errors import ConfigError, EngError, Unavailable
from enlink.frame import Wire
from enlink.link import LinkEnded
from enlink.program import log_event

if TYPE_CHECKING:
    from ratstls.config import SessionConfig
    from ratstls.handshake import HandshakeSettings
    from ratstls.policy import Policy

# Choices of ours.
HANDSHAKE_DEADLINE_S: Final = 10.0  # absolute: one byte a second buys nobody a place
_WARN_INTERVAL_S: Final = 60.0

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Image:
    """What the measured image of an enclave has instead of what its host may choose.

    Attributes:
        library: the only librats_tls. It is not tried in a child process first: there are none in an enclave.
        policy: the file that says whom to accept. A policy of the command line can only tighten it.
        handshake_threads: how many handshakes may take a thread at once.
    """

    library: Path
    policy: Path
    handshake_threads: int


@dataclass(frozen=True, slots=True)
class AttestedStream:
    """A stream over which nothing has been said yet, and what its other end has proved, in a line for people."""

    stream: trio.abc.Stream
    evidence: str


class AttestedSide:
    """One side of the handshakes of a program; made by `prepare`. ``str()`` says who is accepted.

    Attributes:
        max_link_age_s: after so long the peer is to be judged again, on a new link.
    """

    def __init__(self, settings: HandshakeSettings, policy: Policy | None) -> None:
        self._settings = settings
        self._policy = policy
        self.max_link_age_s = math.inf if policy is None else policy.max_link_age_s

    def __str__(self) -> str:
        config = self._settings.config
        attests = f"attests with {config.attester}" if config.is_attesting else "does not attest"
        return f"{attests}; " + (f"accepts {self._policy}" if self._policy else "judges nobody")

    async def shake_hands(self, stream: trio.abc.Stream) -> AttestedStream:
        """Return an attested stream over *stream*, once both sides have accepted each other.

        Raises:
            LinkEnded: they have not, within `HANDSHAKE_DEADLINE_S`; its reason is the policy's or the handshake's.

        Whatever is raised, *stream* is closed.
        """
        from ratstls.errors import HandshakeError, RatsTlsError
        from ratstls.handshake import client_handshake, server_handshake

        try:
            if self._settings.config.is_server:
                attested = await server_handshake(
                    stream, self._settings, policy=self._policy, deadline_s=HANDSHAKE_DEADLINE_S
                )
            else:
                assert self._policy is not None  # noqa: S101  # for mypy: `prepare` gives every client one
                attested = await client_handshake(
                    stream, self._settings, policy=self._policy, deadline_s=HANDSHAKE_DEADLINE_S
                )
        except (RatsTlsError, trio.BrokenResourceError) as error:
            raise LinkEnded(error.reason if isinstance(error, HandshakeError) else "handshake", str(error)) from error
        except OSError as error:  # no descriptors for the session
            raise LinkEnded("resources", f"no handshake: {error}") from error
        return AttestedStream(attested, str(attested.peer) if attested.peer else "was not asked")

    async def warn_for_ever(self) -> NoReturn:
        """Say at once, and then every minute, what is insecure about these links, as long as they are made."""
        config = self._settings.config
        warnings = [*(self._policy.warnings if self._policy else ())]
        if config.weakness is not None:
            warnings.append(f"INSECURE, {config.weakness}")
        if not self._settings.is_acknowledged:
            warnings.append("--wire original: peers do not say whether they accept this side's evidence")
        while True:
            for text in warnings:
                log_event(_logger, "insecure", logging.WARNING, text=text)
            await trio.sleep(_WARN_INTERVAL_S if warnings else math.inf)


async def prepare(
    attestation: Attestation | None, side: Side, wire: Wire = "auto", image: Image | None = None
) -> AttestedSide | None:
    """Check all that can be checked before the first link; None where links are plain.

    May take seconds, in which this side's evidence is made once, for trial. In an enclave, *image* is what binds.

    Raises:
        ConfigError: the policy cannot be read or contradicts the plug-ins, or the library lacks one.
        Unavailable: there is no package eng-ratstls, no library that works, or no evidence to be had here.
    """
    if attestation is None:
        return None
    prepared = await trio.to_thread.run_sync(_prepare, attestation, side, wire, image)
    if image is not None:
        from ratstls._negotiation import bound_threads

        bound_threads(image.handshake_threads)
    return prepared


def allows_debug(policy: Path) -> bool:
    """Tell whether this policy accepts peers that their host can debug.

    Raises:
        ConfigError: it cannot be read.
        Unavailable: there is no package eng-ratstls.
    """
    with _errors_translated():
        return _read_policy(policy).allow_debug


def _prepare(attestation: Attestation, side: Side, wire: Wire, image: Image | None) -> AttestedSide:
    with _errors_translated():
        return _checked(attestation, side, wire, image)


@contextmanager
def _errors_translated() -> Iterator[None]:
    try:
        from ratstls import errors
    except ImportError as error:
        raise Unavailable(
            "attested links need the package eng-ratstls, which is not installed: pip install eng-ratstls"
        ) from error
    try:
        yield
    except errors.ConfigError as error:
        raise ConfigError(str(error)) from error
    except errors.RatsTlsError as error:
        raise Unavailable(str(error)) from error


def _checked(attestation: Attestation, side: Side, wire: Wire, image: Image | None) -> AttestedSide:
    from ratstls._library import load
    from ratstls._session import Session
    from ratstls.config import SessionConfig
    from ratstls.handshake import HandshakeSettings

    config = SessionConfig(
        attester=attestation.attester,
        verifier=attestation.verifier,
        tls=attestation.tls,
        crypto=attestation.crypto,
        is_server=side == "server",
        is_mutual=attestation.is_mutual,
        is_attestation_waived=attestation.is_waived,
    )
    policy = _policy(attestation, config, image) if config.is_verifying else None
    if policy is not None:
        policy.check_verifier(config.verifier)
    library = load() if image is None else load(image.library, is_preflighted=False)
    settings = HandshakeSettings(library=library, config=config, is_acknowledged=wire == "auto")
    # What is missing shows now, and not when the first peer comes.
    trial = Session(library, config, _judge_nobody)
    try:
        trial.init()
    finally:
        trial.cleanup()
    log_event(_logger, "attestation", library=library, side=side, terms=AttestedSide(settings, policy))
    return AttestedSide(settings, policy)


def _policy(attestation: Attestation, config: SessionConfig, image: Image | None) -> Policy:
    from ratstls.policy import Policy

    if image is not None:
        policy = _read_policy(image.policy)
        return policy if attestation.policy is None else policy.tightened(_read_policy(Path(attestation.policy)))
    if attestation.is_waived:
        return Policy(no_attestation=True)
    if attestation.accepts_any_measurement:
        return Policy.any_measurement(config.verifier)
    return _read_policy(Path(attestation.policy or ""))


def _read_policy(path: Path) -> Policy:
    from ratstls.accepted import PolicyError
    from ratstls.policy_file import parse_policy

    try:
        return parse_policy(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"cannot read the policy {path}: {error}") from error
    except PolicyError as error:
        raise ConfigError(f"policy {path}: {error}") from error


def _judge_nobody(_: object) -> NoReturn:
    raise EngError("a trial has no peer")
