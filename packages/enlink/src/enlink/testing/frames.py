"""Feed a decoder from bytes that are there already, as a socket would feed it from the kernel."""

from __future__ import annotations

from dataclasses import replace

from enlink.frame import Buffer, Event, FrameDecoder, Packets


def feed(decoder: FrameDecoder, data: Buffer) -> list[Event]:
    """Let *decoder* take in all of *data*; what it returns stays good."""
    view, events = memoryview(data), []
    while view:
        space = decoder.space()
        count = min(len(space), len(view))
        space[:count] = view[:count]
        view = view[count:]
        events += [_kept(event) for event in decoder.decode(count)]
    return events


def _kept(event: Event) -> Event:
    return replace(event, encoded=memoryview(bytes(event.encoded))) if isinstance(event, Packets) else event
