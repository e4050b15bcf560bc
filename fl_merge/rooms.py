"""Room in memory for outputs that are written when they are whole."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

import torch

from fl_merge.types import TensorSpec


class Rooms:
    """Where outputs are filled that are written when they are whole: room in memory that is used again and again.

    Args:
        written: what is written.
        whole_bytes: no larger output is filled here, and none if this is 0.
    """

    def __init__(self, written: Mapping[str, TensorSpec], whole_bytes: int) -> None:
        self._written = written
        self._bytes = whole_bytes
        self._rooms: dict[str, torch.Tensor] = {}
        self._spare: list[torch.Tensor] = []
        self._lock = threading.Lock()

    def has(self, name: str) -> bool:
        """Whether an output is filled here."""
        return 0 < self._written[name].nbytes <= self._bytes

    def place(self, name: str) -> torch.Tensor | None:
        """The whole output, flattened; None if it is not filled here."""
        if not self.has(name):
            return None
        spec = self._written[name]
        with self._lock:
            if name not in self._rooms:
                self._rooms[name] = self._spare.pop() if self._spare else torch.empty(self._bytes, dtype=torch.uint8)
            return self._rooms[name][: spec.nbytes].view(spec.dtype)

    def hand_over(self, name: str, write: Callable[[torch.Tensor], None]) -> None:
        """Write an output that has been filled here, if it has."""
        if self.has(name):
            spec = self._written[name]
            with self._lock:
                room = self._rooms.pop(name)
            write(room[: spec.nbytes].view(spec.dtype))
            with self._lock:
                self._spare.append(room)
