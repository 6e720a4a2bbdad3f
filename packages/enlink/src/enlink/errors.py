"""The errors that end a program, each with its exit code, and nothing else.

A program's ``cli`` prints the text of one of these as its single line on standard error and exits with
``exit_code``. Libraries raise them (or subclasses) at the boundary where they know what the reader can do about it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar


class EngError(Exception):
    """Base of every error that reaches a person. The text says what failed, with which value, and what to do."""

    exit_code: ClassVar[int] = 71


class UsageError(EngError, ValueError):
    """The command line is wrong: unknown option, malformed or duplicate value. Raised before any I/O."""

    exit_code = 64


class Unavailable(EngError):
    """Something outside is not there: a port in use, a missing library, a peer that cannot be reached."""

    exit_code = 69


class SystemFailure(EngError):
    """The operating system failed us: a device taken away, a netlink or nftables error."""

    exit_code = 71


class CannotCreate(EngError):
    """Something exists already or cannot be made: a device name, an instance, an address, a table."""

    exit_code = 73


class ProtocolError(EngError):
    """The peer broke the protocol, and there is nothing to retry."""

    exit_code = 76


class NotPermitted(EngError):
    """A privilege or access right is missing."""

    exit_code = 77


class ConfigError(EngError):
    """Contradictory, unsafe or not yet supported options, or a bad policy."""

    exit_code = 78


def leaves(error: BaseException) -> Iterator[BaseException]:
    """Yield the errors inside a group, however deep; or *error* itself, if it is no group."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves(inner)
    else:
        yield error
