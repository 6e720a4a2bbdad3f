"""Run a test in a process of its own with a RATS-TLS library loaded, so that whatever it does, this one lives."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import trio

LIMIT_S = 45.0
_CHILD = "import sys; sys.path.insert(0, sys.argv[1]); import in_child; in_child.keep(*sys.argv[2:])"

Promise = Callable[[Any], Awaitable[None] | None]


def in_child(**environment: str) -> Callable[[Promise], Callable[..., None]]:
    """Make a test, whose one fixture is an installation, run in a child, which calls it with the loaded library.

    Asynchronous ones run under trio, within `LIMIT_S`. The name of the fixture says which libraries to take.
    """

    def decorate(promise: Promise) -> Callable[..., None]:
        @functools.wraps(promise)
        def run(**fixtures: Any) -> None:
            (installation,) = fixtures.values()
            file = inspect.getfile(promise)
            here = str(Path(__file__).parent)
            child = installation.run("-W", "error", "-c", _CHILD, here, file, promise.__name__, **environment)
            assert child.returncode == 0, child.stderr
            # An exception that nobody could catch, as in a finaliser, is only printed.
            assert not child.stderr, child.stderr

        return run

    return decorate


def keep(file: str, name: str) -> None:
    """Keep the promise *name* of the test module *file*: run in the child."""
    from ratstls._library import load

    sys.path.insert(0, str(Path(file).parent))
    promise = getattr(importlib.import_module(Path(file).stem), name).__wrapped__
    if not inspect.iscoroutinefunction(promise):
        promise(load())
        return
    trio.run(partial(_keep_in_time, promise), load())


async def _keep_in_time(promise: Callable[[Any], Awaitable[None]], library: Any) -> None:
    with trio.fail_after(LIMIT_S):
        await promise(library)
