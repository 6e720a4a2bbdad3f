"""The ways to fail, each with its exit code (sysexits.h) and a sentence that says what to do."""

from __future__ import annotations

from typing import ClassVar


class Failure(Exception):
    """Base of the errors that end the program."""

    exit_code: ClassVar[int]


class Unavailable(Failure):
    """A port that cannot be had, or a peer that cannot be reached or has gone."""

    exit_code = 69


class WrongEcho(Failure):
    """What came back is not what was sent."""

    exit_code = 76
