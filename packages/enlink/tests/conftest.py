"""What several of these tests need: another user, a place of his, and proof that nothing stays open."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

NOBODY = 65534


@pytest.fixture
def no_descriptor_stays_open() -> Iterator[None]:
    before = set(Path("/proc/self/fd").iterdir())
    yield
    assert set(Path("/proc/self/fd").iterdir()) == before


@pytest.fixture
def user_nobody() -> Callable[[], AbstractContextManager[None]]:
    """Makes this process another user, for as long as a block runs."""

    @contextmanager
    def user_nobody() -> Iterator[None]:
        os.seteuid(NOBODY)
        try:
            yield
        finally:
            os.seteuid(0)

    return user_nobody


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that everybody may enter, unlike pytest's, and that belongs to nobody."""
    path = Path(tempfile.mkdtemp(prefix="eng-test-"))
    os.chown(path, NOBODY, NOBODY)
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)
