"""The messages of an in-process grid from push to reply, and the contexts of its nodes."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from uuid import uuid4

from flwr.app import Context, Message

from fl_merge.flower._flwr import ErrorCode
from fl_merge.flower.copies import num_bytes
from fl_merge.flower.workers import Outcome, error_reply, message_seed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sent:
    """A message has been pushed to a node."""

    node_id: int
    message_type: str
    group_id: str
    num_bytes: int


@dataclass(frozen=True)
class Replied:
    """A node has answered; `error` says why it could not, None that it did. `seconds` is the client's own time."""

    node_id: int
    message_type: str
    group_id: str
    num_bytes: int
    seconds: float
    error: str | None = None

    @property
    def ok(self) -> bool:
        """Whether it is an answer and no error."""
        return self.error is None


@dataclass(frozen=True)
class Task:
    """A pushed message that has no reply yet, and the seed it runs under."""

    message: Message
    seed: int

    @property
    def id(self) -> str:
        """The message's."""
        return self.message.metadata.message_id

    @property
    def node_id(self) -> int:
        """Whom it is for."""
        return self.message.metadata.dst_node_id

    @property
    def expired(self) -> bool:
        """Whether its time to live has passed."""
        return time.time() > self.message.metadata.created_at + self.message.metadata.ttl


class Tasks:
    """What has been pushed, what runs, and the replies that nobody has fetched; for any number of threads.

    A node's messages run one after another, in the order in which they were pushed.

    Args:
        contexts: of the nodes, by id.
        seed: of the run.
        on_message: told of what is pushed and what is answered, one event at a time.

    Attributes:
        changed: guards all that is here, and is notified of every change.
        contexts: the nodes' own; a reader makes a copy.
        closed: nothing is begun any more.
    """

    def __init__(
        self, contexts: dict[int, Context], seed: int, on_message: Callable[[Sent | Replied], None] | None
    ) -> None:
        self.changed = threading.Condition()
        self.contexts = contexts
        self.closed = False
        self._seed = seed
        self._on_message = on_message
        self._queue: dict[str, Task] = {}  # message id -> pushed and not begun, in order
        self._busy: dict[int, str] = {}  # node id -> id of the message it runs
        self._replies: dict[str, Message] = {}  # message id -> its reply, not fetched yet, in order of arrival
        self._num_pushed: Counter[tuple[int, str, str]] = Counter()  # node, type, group
        self._telling = threading.Lock()
        self._failed_before = False

    @property
    def num_queued(self) -> int:
        """Messages that have not been begun."""
        return len(self._queue)

    def push(self, message: Message) -> None:
        """Queue a message, which is the queue's from now on."""
        about = message.metadata
        self._tell(Sent(about.dst_node_id, about.message_type, about.group_id, num_bytes(message)))
        with self.changed:
            self._raise_if_closed()
            if about.dst_node_id not in self.contexts:
                reason = f"there is no node {about.dst_node_id}"
                self._replies[about.message_id] = error_reply(message, ErrorCode.NODE_UNAVAILABLE, reason)
                return
            kind = (about.dst_node_id, about.message_type, about.group_id)
            task = Task(message, message_seed(self._seed, *kind, self._num_pushed[kind]))
            self._num_pushed[kind] += 1
            self._queue[task.id] = task
            self.changed.notify_all()

    def fetch(self, wanted: set[str]) -> list[Message]:
        """Take the replies there are to `wanted`, and take out of `wanted` what needs no more waiting for."""
        with self.changed:
            self._raise_if_closed()
            ids = [message_id for message_id in self._replies if message_id in wanted]
            wanted.difference_update(ids)
            if not ids:  # some may have expired
                wanted.intersection_update(self._queue.keys() | set(self._busy.values()))
            return [self._replies.pop(message_id) for message_id in ids]

    def begin_next(self) -> Task | None:
        """Take the first message whose node is free. The caller holds `changed`."""
        for task in list(self._queue.values()):
            if task.expired:
                del self._queue[task.id]
            elif task.node_id not in self._busy:
                del self._queue[task.id]
                self._busy[task.node_id] = task.id
                return task
        return None

    def finish(self, task: Task, outcome: Outcome) -> None:
        """A message that was begun has come to this: keep the reply, if there is still time for it, and the state."""
        reply, about = outcome.reply, task.message.metadata
        reply.metadata.__dict__["_message_id"] = str(uuid4())
        error = (reply.error.reason or "unknown") if reply.has_error() else None
        if error is not None:
            # Every failure is said in a line, the first one with its traceback.
            trace = "" if self._failed_before else f"\n{outcome.trace}".rstrip()
            self._failed_before = True
            logger.warning("node %d, %s: %s%s", task.node_id, about.message_type, error, trace)
        on_time = not task.expired
        if on_time:
            size = num_bytes(reply)
            self._tell(Replied(task.node_id, about.message_type, about.group_id, size, outcome.seconds, error))
        with self.changed:
            if outcome.context is not None:
                self.contexts[task.node_id].state = outcome.context.state
            if on_time:
                self._replies[task.id] = reply
            del self._busy[task.node_id]
            self.changed.notify_all()

    def fail(self, task: Task, code: int, reason: str, seconds: float = 0.0) -> None:
        """As `finish`, with an error for a reply."""
        self.finish(task, Outcome(error_reply(task.message, code, reason), None, seconds))

    def drop(self, task: Task) -> None:
        """A message that was begun comes to nothing: it gets no reply."""
        with self.changed:
            del self._busy[task.node_id]

    def all_answered(self, wanted: set[str]) -> bool:
        """Whether there is a reply to each. The caller holds `changed`."""
        return wanted <= self._replies.keys()

    def wait(self, wanted: set[str], seconds: float) -> None:
        """Until something changes, unless one of `wanted` is answered already or there is nothing to wait for."""
        with self.changed:
            if wanted.isdisjoint(self._replies) and (self._queue or self._busy) and not self.closed:
                self.changed.wait(seconds)

    def wait_for_task(self) -> Task | None:
        """As `begin_next`, when there is one; None when the grid is closed."""
        with self.changed:
            while not self.closed:
                if (task := self.begin_next()) is not None:
                    return task
                self.changed.wait()
            return None

    def _tell(self, event: Sent | Replied) -> None:
        if self._on_message is None:
            return
        with self._telling:
            try:
                self._on_message(event)
            except Exception:
                logger.exception("on_message failed; it is not called any more")
                self._on_message = None

    def _raise_if_closed(self) -> None:
        if self.closed:
            raise RuntimeError("the grid is closed")
