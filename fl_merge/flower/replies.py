"""A Grid that hands over replies as they arrive instead of collecting a round of them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping

from flwr.app import Message, Metadata, RecordDict
from flwr.serverapp import Grid

from fl_merge.flower._flwr import TRANSPORT_ERRORS, Run, error_reply_to

_FIRST_WAIT, _LONGEST_WAIT = 0.05, 1.0
"""Seconds between looks for replies: short at first, longer while nothing comes."""


class RepliesAsTheyCome(Grid):
    """Any Grid, with a `send_and_receive` that yields each reply when it is there and keeps none.

    Replies are fetched one message at a time: on a SuperLink that is what keeps a round of N models out of memory. A
    Grid that has them in memory anyway says so with an attribute `replies_are_in_memory` that is true.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self.nodes_are_fixed = bool(getattr(grid, "nodes_are_fixed", False))
        self._in_memory = bool(getattr(grid, "replies_are_in_memory", False))

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
        """As the Grid's; takes any iterable."""
        return self._grid.push_messages(list(messages))

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """As the Grid's."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Send now, and yield the replies until all are there, or until `timeout` seconds have passed since.

        What is there when the time is up is still yielded, however long the earlier replies took to be dealt with. A
        message that could not be sent, and a reply that cannot be decoded, are answered by an error.
        """
        sent = list(messages)
        pushed = {message_id for message_id in (self._grid.push_messages(sent) if sent else []) if message_id}
        deadline = None if timeout is None else time.monotonic() + timeout
        asked = {message.metadata.message_id: message.metadata for message in sent}
        return self._replies(asked, pushed, deadline)

    def _replies(self, asked: Mapping[str, Metadata], pushed: set[str], deadline: float | None) -> Iterator[Message]:
        for message_id, about in asked.items():
            if message_id not in pushed:
                yield error_reply_to(about, "the request could not be sent")
        waiting = [message_id for message_id in asked if message_id in pushed]
        wait = _FIRST_WAIT
        while waiting:
            last = deadline is not None and time.monotonic() >= deadline
            heard: set[str] = set()
            for message in self._sweep(waiting, asked):
                heard.add(message.metadata.reply_to_message_id)
                yield message
            waiting = [message_id for message_id in waiting if message_id not in heard]
            if last or not waiting:
                return
            wait = _FIRST_WAIT if heard else min(2 * wait, _LONGEST_WAIT)
            if self._in_memory:
                wait = 0.0 if heard else _FIRST_WAIT
            time.sleep(wait if deadline is None else max(0.0, min(wait, deadline - time.monotonic())))

    def _sweep(self, waiting: list[str], asked: Mapping[str, Metadata]) -> Iterator[Message]:
        """The replies that are there."""
        if self._in_memory:
            yield from self._grid.pull_messages(list(waiting))
            return
        for message_id in waiting:
            try:
                replies = list(self._grid.pull_messages([message_id]))
            except TRANSPORT_ERRORS:
                raise
            except Exception as error:  # bytes that a client has chosen
                yield error_reply_to(asked[message_id], f"undecodable reply: {type(error).__name__}: {error}")
                continue
            for reply in replies:
                # Whose reply it is, is known from what was asked for; what stands in it, its sender may have written.
                reply.metadata.__dict__["_reply_to_message_id"] = message_id
                yield reply
