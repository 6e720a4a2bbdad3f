"""The stream is one of trio's: its contracts, its bytes, its cancellations and its good ends."""

from __future__ import annotations

from functools import partial

from in_child import in_child
from links import link
from ratstls._library import Library
from trio.testing import check_two_way_stream, lockstep_stream_pair


@in_child()
async def test_the_stream_conforms_to_trio(library: Library) -> None:
    """As trio's own suite for streams has it, also where sends wait until the other end receives."""
    await check_two_way_stream(partial(link, library), partial(link, library, lockstep_stream_pair))
