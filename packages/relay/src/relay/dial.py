"""Reaches a bridge's target, within its deadline and as far as the allow-list lets it. Moves nothing."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from ipaddress import ip_address
from typing import Final

import trio
from enlink.attempt import Attempt, Found
from enlink.connection import Unreachable
from enlink.endpoint import Endpoint, Tcp, Vsock
from enlink.errors import ConfigError, EngError
from enlink.timers import Timer, current_timers

from relay.addresses import Address
from relay.allowlist import AllowList, Rule, Verdict, rule_for
from relay.config import BridgeConfig
from relay.resolver import NameNotResolved, Resolver

# Of these there may be enough a moment later, when another connection has ended.
_SCARCITY: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_SCARCITY_PAUSE_S: Final = 0.1  # a choice of ours


class NotAllowed(EngError):
    """A target, or every address that it has now, may not be dialled; ``reason`` is the allow-list's word for why."""

    exit_code = 78

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(verdict.text)
        self.reason = verdict.reason


class Target:
    """What a bridge leads to.

    Args:
        resolver: None, if the target is no name.

    Raises:
        ConfigError: the rules can never allow it.
    """

    def __init__(self, config: BridgeConfig, resolver: Resolver | None) -> None:
        self._config = config
        self._resolver = resolver if isinstance(config.target, Tcp) and is_name(config.target.host or "") else None
        self._judged: Sequence[Address] = ()
        self._allowed: Sequence[Endpoint] = ()
        self._verdict: Verdict | None = None
        self._waiting: list[Dial] = []
        self._is_wanted = trio.Event()
        self._token = trio.lowlevel.current_trio_token()
        target = config.target
        rules: Sequence[Rule] = config.allow
        if not rules and isinstance(target, Tcp):
            rules = [rule_for(target.host or "", target.port)]
        self._allow_list = AllowList(rules)
        verdict = None
        if isinstance(target, Tcp):
            verdict = self._allow_list.judge_host(target.host or "", target.port)
        elif isinstance(target, Vsock) and rules:
            verdict = self._allow_list.judge_vsock(target.cid or 0, target.port)
        if verdict is not None and not verdict.is_allowed:
            raise ConfigError(f"no --allow lets {config.listen} reach its target: {verdict.text}")

    def endpoints(self) -> Sequence[Endpoint] | None:
        """Return where to dial now, in this order, which is not nowhere; None as long as a name is looked up.

        Raises:
            NotAllowed: none of the addresses that the target's name has now may be dialled.
        """
        target = self._config.target
        if self._resolver is None or not isinstance(target, Tcp):
            return (target,)  # judged once and for all
        addresses = self._resolver.known(target.host or "", target.family)
        return None if addresses is None else self._judge(target, addresses)

    def dial(self, done: Callable[[Found], object]) -> Dial:
        """Return a way to the target, which is not begun yet; *done* is called at its end, as an `Attempt`'s is."""
        return Dial(self, self._config, done)

    def wait(self, dial: Dial) -> None:
        """Let a dial go on when the target's name has been looked up."""
        self._waiting.append(dial)
        self._token.run_sync_soon(self._is_wanted.set)

    def forget(self, dial: Dial) -> None:
        """Do not tell a dial, which may be waiting."""
        with suppress(ValueError):
            self._waiting.remove(dial)

    async def look_up(self) -> None:
        """Look the target's name up whenever a dial waits for that, until cancelled."""
        target = self._config.target
        while self._resolver is not None and isinstance(target, Tcp):
            await self._is_wanted.wait()
            self._is_wanted = trio.Event()
            if not self._waiting:  # the answer before was for them as well
                continue
            found: Sequence[Endpoint] | EngError
            try:
                found = self._judge(target, await self._resolver.resolve(target.host or "", target.family))
            except NameNotResolved as error:
                found = Unreachable(str(error))
            except NotAllowed as error:
                found = error
            waiting, self._waiting = self._waiting, []
            for dial in waiting:
                dial.go_on(found)

    def _judge(self, target: Tcp, addresses: Sequence[Address]) -> Sequence[Endpoint]:
        if addresses != self._judged:
            verdicts = self._allow_list.judge_answer(target.host or "", target.port, addresses)
            pairs = zip(addresses, verdicts, strict=True)
            self._allowed = [Tcp(str(address), target.port) for address, verdict in pairs if verdict.is_allowed]
            self._judged, self._verdict = addresses, verdicts[0]
        if not self._allowed and self._verdict is not None:
            raise NotAllowed(self._verdict)
        return self._allowed


class Dial:
    """One connection's way to a target, within its deadline, from callback to callback. `start` begins it."""

    __slots__ = ("_attempt", "_config", "_deadline", "_done", "_pause", "_target")

    def __init__(self, target: Target, config: BridgeConfig, done: Callable[[Found], object]) -> None:
        self._target = target
        self._config = config
        self._done = done
        self._deadline = trio.current_time() + config.connect_timeout_s
        self._attempt: Attempt | None = None
        self._pause: Timer | None = None

    def start(self) -> None:
        """Begin, or begin again."""
        try:
            endpoints = self._target.endpoints()
        except NotAllowed as error:
            self._done(error)
            return
        if endpoints is None:
            self._pause = current_timers().after(self._left_s(), self._give_up)
            self._target.wait(self)
        else:
            self._try(endpoints)

    def abort(self) -> None:
        """Give up, leave nothing open and call nobody. It may be over already."""
        self._target.forget(self)
        if self._pause is not None:
            self._pause.cancel()
        if self._attempt is not None:
            self._attempt.abort()

    def go_on(self, found: Sequence[Endpoint] | EngError) -> None:
        """Dial what a name leads to."""
        if self._pause is not None:
            self._pause.cancel()
        if isinstance(found, EngError):
            self._done(found)
        else:
            self._try(found)

    def _try(self, endpoints: Sequence[Endpoint]) -> None:
        first, *others = endpoints
        # An address that is silent leaves the others their share.
        share_s = self._left_s() / len(endpoints)
        self._attempt = Attempt(
            first, share_s, partial(self._tried, others), vsock_buffer_bytes=self._config.vsock_buffer_bytes
        )
        self._attempt.start()

    def _tried(self, others: Sequence[Endpoint], found: Found) -> None:
        if isinstance(found, Unreachable) and others:
            self._try(others)
        elif isinstance(found, Unreachable) and found.errno in _SCARCITY and self._left_s() > _SCARCITY_PAUSE_S:
            self._pause = current_timers().after(_SCARCITY_PAUSE_S, self.start)
        else:
            self._done(found)

    def _give_up(self) -> None:
        self._target.forget(self)
        target, timeout_s = self._config.target, self._config.connect_timeout_s
        host = target.host if isinstance(target, Tcp) else None
        self._done(Unreachable(f"cannot resolve {host}: no answer within {timeout_s:g} s"))

    def _left_s(self) -> float:
        return max(0.0, self._deadline - trio.current_time())


def is_name(host: str) -> bool:
    """Tell a name from an address."""
    try:
        ip_address(host)
    except ValueError:
        return True
    return False
