"""Room in memory for outputs that are written when they are whole."""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable, Mapping

import torch

from fl_merge.types import TensorSpec


class Rooms:
    """Where outputs are filled that are written when they are whole: room in memory that is used again and again.

    Args:
        written: what is written.
        whole_bytes: no larger output is filled here, and none if this is 0.
        waiting: so many outputs may wait to be written while the threads that have filled them go on.
    """

    def __init__(self, written: Mapping[str, TensorSpec], whole_bytes: int, waiting: int) -> None:
        self._written = written
        self._bytes = whole_bytes
        self._rooms: dict[str, torch.Tensor] = {}
        self._spare: list[torch.Tensor] = []
        self._may_wait = waiting
        self._waiting: deque[tuple[torch.Tensor, Callable[[], None]]] = deque()
        self._writing = False
        self._written_one = threading.Condition()

    def has(self, name: str) -> bool:
        """Whether an output is filled here."""
        return 0 < self._written[name].nbytes <= self._bytes

    def place(self, name: str) -> torch.Tensor | None:
        """The whole output, flattened; None if it is not filled here."""
        if not self.has(name):
            return None
        spec = self._written[name]
        with self._written_one:
            if name not in self._rooms:
                self._rooms[name] = self._spare.pop() if self._spare else torch.empty(self._bytes, dtype=torch.uint8)
            return self._rooms[name][: spec.nbytes].view(spec.dtype)

    def hand_over(self, name: str, write: Callable[[torch.Tensor], None]) -> None:
        """Write an output that has been filled here.

        One thread writes at a time, since a file lets no two in; what others hand over meanwhile it writes too. They
        wait only where that is much.
        """
        spec = self._written[name]
        with self._written_one:
            room = self._rooms.pop(name)
            self._waiting.append((room, functools.partial(write, room[: spec.nbytes].view(spec.dtype))))
            while self._writing and len(self._waiting) > self._may_wait:
                self._written_one.wait()
            if self._writing:
                return
            self._writing = True
        try:
            while True:
                with self._written_one:
                    if not self._waiting:
                        self._writing = False
                        return
                    room, write_one = self._waiting.popleft()
                    self._written_one.notify_all()
                write_one()
                with self._written_one:
                    self._spare.append(room)
        except BaseException:
            with self._written_one:
                self._writing = False
                self._written_one.notify_all()
            raise
