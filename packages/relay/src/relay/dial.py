"""Reaches a bridge's target, within its deadline and as far as the allow-list lets it. Moves nothing."""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence
from ipaddress import ip_address
from typing import Final

import trio
from enlink.connection import Unreachable, connect_tcp, open_connection
from enlink.endpoint import Tcp, Vsock
from enlink.errors import ConfigError, EngError

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
        self._resolver = resolver
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

    async def connect(self) -> socket.socket:
        """Return a connected, non-blocking socket.

        Raises:
            Unreachable: nobody answered in time, with the reason.
            NotAllowed: none of the addresses that the target's name has now may be dialled.
            NotPermitted, Unavailable: this process, or this kernel, has no vsock.
        """
        deadline = trio.current_time() + self._config.connect_timeout_s
        while True:
            try:
                return await self._connect(round(deadline - trio.current_time(), 2))
            except Unreachable as error:
                is_scarcity = isinstance(error.__cause__, OSError) and error.__cause__.errno in _SCARCITY
                if not is_scarcity or trio.current_time() + _SCARCITY_PAUSE_S >= deadline:
                    raise
            await trio.sleep(_SCARCITY_PAUSE_S)

    async def _connect(self, timeout_s: float) -> socket.socket:
        config = self._config
        if isinstance(config.target, Tcp):
            return await self._connect_tcp(config.target, timeout_s)
        connection = await open_connection(config.target, timeout_s, vsock_buffer_bytes=config.vsock_buffer_bytes)
        return _without_trio(connection.socket)

    async def _connect_tcp(self, target: Tcp, timeout_s: float) -> socket.socket:
        deadline = trio.current_time() + timeout_s
        failure = Unreachable(f"cannot resolve {target.host}: no answer within {timeout_s:g} s")
        addresses: list[Address] = []
        with trio.move_on_at(deadline):
            try:
                addresses = await self._addresses(target)
            except NameNotResolved as error:
                raise Unreachable(str(error)) from error
        for number, address in enumerate(addresses):
            # An address that is silent leaves the others their share.
            share_s = max(0.0, deadline - trio.current_time()) / (len(addresses) - number)
            try:
                return _without_trio((await connect_tcp(str(address), target.port, share_s)).socket)
            except Unreachable as error:
                failure = error
        raise failure

    async def _addresses(self, target: Tcp) -> list[Address]:
        """Return the target's addresses of now that may be dialled, which are not none."""
        host = target.host or ""
        if self._resolver is None or not is_name(host):
            return [ip_address(host)]  # judged once and for all
        addresses = await self._resolver.resolve(host, target.family)
        verdicts = self._allow_list.judge_answer(host, target.port, addresses)
        allowed = [address for address, verdict in zip(addresses, verdicts, strict=True) if verdict.is_allowed]
        if not allowed:
            raise NotAllowed(verdicts[0])
        return allowed


def is_name(host: str) -> bool:
    """Tell a name from an address."""
    try:
        ip_address(host)
    except ValueError:
        return True
    return False


def _without_trio(sock: trio.socket.SocketType) -> socket.socket:
    return socket.socket(sock.family, sock.type, sock.proto, sock.detach())
