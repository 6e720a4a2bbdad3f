"""Notice that a file has changed since it was read, by what its directory entry says. Reads no content."""

from __future__ import annotations

from pathlib import Path


class WatchedFile:
    """A file that is read again when it has changed, appeared or gone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: tuple[int, ...] | None = ()

    def has_changed(self) -> bool:
        """Tell whether the file is another one than at the last call; the first time, that it is."""
        try:
            entry = self.path.stat()
            now = (entry.st_dev, entry.st_ino, entry.st_size, entry.st_mtime_ns)
        except OSError:
            now = None
        before, self._seen = self._seen, now
        return now != before
