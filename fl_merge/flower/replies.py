"""A Grid that hands over replies as they arrive instead of collecting a round of them."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterable, Iterator, Mapping

from flwr.app import Message, Metadata, RecordDict
from flwr.serverapp import Grid

from fl_merge.flower._flwr import TRANSPORT_ERRORS, Run, error_reply_to

_FIRST_WAIT, _LONGEST_WAIT = 0.05, 1.0
"""Seconds between looks for a reply: short at first, longer while it does not come."""

_AT_ONCE = 2
"""Replies that are fetched at a time, the one that is being dealt with among them, unless memory is to be saved."""

_PATIENCE, _LAST_PATIENCE = 10.0, 5.0
"""Seconds after which a reply that is still on its way (its sender is uploading it, say) no longer keeps others from
being fetched beside it; and, once the time is up, after which no more is waited for."""


class RepliesAsTheyCome(Grid):
    """Any Grid, with a `send_and_receive` that yields each reply when it is there and keeps none.

    Replies are fetched one message at a time, the next while one is dealt with: on a SuperLink that is what keeps a
    round of N models out of memory. Beyond these two there are in memory only replies that take so long to fetch that
    others are let past, so that a client that never ends its upload holds up nobody. A Grid that has them in memory
    anyway says so with an attribute `replies_are_in_memory` that is true.

    Attributes:
        sparing: fetch the next reply only when one has been dealt with: one is in memory, not two.
    """

    def __init__(self, grid: Grid) -> None:
        self.sparing = False
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

        What is there when the time is up is still yielded, however long the earlier replies took to be dealt with;
        what is still on its way some seconds later is given up. A message that could not be sent, and a reply that
        cannot be decoded, are answered by an error.
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
        if self._in_memory:
            yield from self._taken(waiting, deadline)
        else:
            yield from self._fetched(waiting, asked, deadline)

    def _taken(self, waiting: list[str], deadline: float | None) -> Iterator[Message]:
        """All replies that are there, again and again."""
        while waiting:
            last = deadline is not None and time.monotonic() >= deadline
            heard: set[str] = set()
            for message in self._grid.pull_messages(list(waiting)):
                heard.add(message.metadata.reply_to_message_id)
                yield message
            waiting = [message_id for message_id in waiting if message_id not in heard]
            if last or not waiting:
                return
            wait = 0.0 if heard else _FIRST_WAIT
            time.sleep(wait if deadline is None else max(0.0, min(wait, deadline - time.monotonic())))

    def _fetched(self, waiting: list[str], asked: Mapping[str, Metadata], deadline: float | None) -> Iterator[Message]:
        """One reply after another, each looked for in a thread of its own: its sender may hold it up."""
        looks = _Looks(self._grid)
        at_once = 1 if self.sparing else _AT_ONCE
        due = dict.fromkeys(waiting, 0.0)  # when to look again for what has not come
        waits = dict.fromkeys(waiting, _FIRST_WAIT)
        last: set[str] | None = None  # once the time is up: what has still to be looked for a last time
        quiet_since = 0.0
        while due:
            now = time.monotonic()
            if last is None and deadline is not None and now >= deadline:
                last, quiet_since = set(due), now
            for message_id in sorted(due, key=due.__getitem__):  # or those in front would keep the rest waiting
                idle = message_id not in looks.begun
                wanted = due[message_id] <= now if last is None else message_id in last
                if idle and wanted and looks.in_the_way(_PATIENCE if last is None else _LAST_PATIENCE) < at_once:
                    looks.begin(message_id)
                    if last is not None:
                        last.discard(message_id)
                        quiet_since = time.monotonic()
            if last is not None and last <= looks.begun.keys():
                late = time.monotonic() - quiet_since > looks.patience(_LAST_PATIENCE)
                if late or not looks.begun:
                    return
            ended = looks.next()
            if ended is None:
                continue
            message_id, replies = ended
            if isinstance(replies, Exception) and not isinstance(replies, TRANSPORT_ERRORS):
                # bytes that a client has chosen
                reason = f"undecodable reply: {type(replies).__name__}: {replies}"
                replies = [error_reply_to(asked[message_id], reason)]
            if isinstance(replies, BaseException):
                raise replies
            if replies:
                del due[message_id]
            else:
                due[message_id] = time.monotonic() + waits[message_id]
                waits[message_id] = min(2 * waits[message_id], _LONGEST_WAIT)
            del ended
            while replies:
                reply = replies.pop(0)
                # Whose reply it is, is known from what was asked for; what stands in it, its sender may have written.
                reply.metadata.__dict__["_reply_to_message_id"] = message_id
                yield reply
                del reply  # or it would stay until the next one is there
            quiet_since = time.monotonic()


class _Looks:
    """Looks for single replies, each in a daemon thread. One that is never ended is left to itself.

    Attributes:
        begun: the messages whose replies are being looked for, and since when.
    """

    def __init__(self, grid: Grid) -> None:
        self.begun: dict[str, float] = {}
        self._grid = grid
        self._ended: queue.SimpleQueue[tuple[str, list[Message] | BaseException, float]] = queue.SimpleQueue()
        self._longest = 0.0

    def begin(self, message_id: str) -> None:
        """Start to look for the reply to this message."""
        self.begun[message_id] = time.monotonic()
        threading.Thread(target=self._look, args=(message_id,), daemon=True).start()

    def _look(self, message_id: str) -> None:
        started = time.monotonic()
        found: list[Message] | BaseException
        try:
            found = list(self._grid.pull_messages([message_id]))
        except BaseException as error:  # raised again where replies are waited for
            found = error
        self._ended.put((message_id, found, time.monotonic() - started))

    def next(self) -> tuple[str, list[Message] | BaseException] | None:
        """A look that has ended: the message, and the reply, none, or what was raised. None if none ends soon."""
        try:
            message_id, found, seconds = self._ended.get(timeout=_FIRST_WAIT)
        except queue.Empty:
            return None
        del self.begun[message_id]
        if isinstance(found, list) and found:
            self._longest = max(self._longest, seconds)
        return message_id, found

    def patience(self, seconds: float) -> float:
        """How long a look may take: so many seconds, or twice what the slowest reply took that has come."""
        return max(seconds, 2 * self._longest)

    def in_the_way(self, seconds: float) -> int:
        """How many looks are under way that have not yet taken longer than that."""
        since = time.monotonic() - self.patience(seconds)
        return sum(begun >= since for begun in self.begun.values())
