"""What has been read of mapped files, and may go."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from fl_merge.types import BASE, Cohort, Read

AT_ONCE = 1 << 27
"""Bytes that go together: whenever some do, all cores have to hear of it."""


class Releases:
    """Lets mapped files go of tensors that have been read: here many threads do it, when all is read it would be one.

    Args:
        cohort: whose tensors.
    """

    def __init__(self, cohort: Cohort) -> None:
        sources = {at: update.tensors for at, update in enumerate(cohort.updates)} | {BASE: cohort.base}
        self._calls: dict[int, Callable[[list[str]], None]] = {
            at: call for at, source in sources.items() if (call := getattr(source, "release", None)) is not None
        }
        self._names: dict[int, list[str]] = {}
        self._bytes = 0
        self._lock = threading.Lock()

    def add(self, reads: Iterable[Read], nbytes: int) -> None:
        """An output has been made of these, each of some bytes."""
        with self._lock:
            for read in reads:
                if read.of == "tensors" and read.source in self._calls:
                    self._names.setdefault(read.source, []).append(read.name)
                    self._bytes += nbytes
            if self._bytes < AT_ONCE:
                return
            names = self._taken()
        self._release(names)

    def rest(self) -> None:
        """No more will be read."""
        with self._lock:
            names = self._taken()
        self._release(names)

    def _taken(self) -> dict[int, list[str]]:
        names, self._names, self._bytes = self._names, {}, 0
        return names

    def _release(self, names: dict[int, list[str]]) -> None:
        for at, members in names.items():
            self._calls[at](members)
