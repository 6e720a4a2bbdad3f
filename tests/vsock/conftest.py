"""Patience: a guest without the processor's help is ten times as slow as the machine it runs on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from enlink.testing import programs


@pytest.fixture(scope="session", autouse=True)
def patience() -> Iterator[None]:
    """Wait longer for what is sure to come than on a machine of metal."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "FAR_BEYOND_S", 4 * programs.FAR_BEYOND_S)
        yield
