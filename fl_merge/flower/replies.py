"""A Grid that hands over replies as they arrive instead of collecting a round of them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fl_merge.flower._flwr import Run
from fl_merge.flower.inprocess import InProcessGrid

_FIRST_WAIT, _LONGEST_WAIT = 0.05, 1.0
"""Seconds between looks for replies: short at first, longer while nothing comes."""


class RepliesAsTheyCome(Grid):
    """Any Grid, with a `send_and_receive` that yields each reply when it is there and keeps none.

    Replies are fetched one message at a time: on a SuperLink that is what keeps a round of N models out of memory.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def set_run(self, run: Run) -> None:
        """As the Grid's."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """As the Grid's."""
        return self._grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """As the Grid's."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """As the Grid's."""
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """As the Grid's."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """As the Grid's."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Send now, and yield the replies until all are there or `timeout` seconds have passed since."""
        sent = list(messages)
        pushed = self._grid.push_messages(sent) if sent else []
        waiting = [message_id for message_id in pushed if message_id]
        deadline = None if timeout is None else time.monotonic() + timeout
        return self._replies(waiting, deadline)

    def _replies(self, waiting: list[str], deadline: float | None) -> Iterator[Message]:
        wait = _FIRST_WAIT
        while waiting and (deadline is None or time.monotonic() < deadline):
            heard = False
            # In this process replies are in memory anyway, and one call looks at all of them.
            lots = [waiting] if isinstance(self._grid, InProcessGrid) else [[message_id] for message_id in waiting]
            for lot in lots:
                for message in self._grid.pull_messages(list(lot)):
                    heard = True
                    waiting = [
                        message_id for message_id in waiting if message_id != message.metadata.reply_to_message_id
                    ]
                    yield message
                if deadline is not None and time.monotonic() >= deadline:
                    return
            if not heard and waiting and not isinstance(self._grid, InProcessGrid):
                time.sleep(wait if deadline is None else max(0.0, min(wait, deadline - time.monotonic())))
            wait = _FIRST_WAIT if heard else min(2 * wait, _LONGEST_WAIT)
