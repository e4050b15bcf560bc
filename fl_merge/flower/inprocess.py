"""A Flower Grid that runs ClientApps in this process or in worker processes: no network, no Ray.

The ServerApp sees nodes, messages and replies as it does on a SuperLink. What it gets is the same, bit for bit, with
any number of workers: a node's messages run in the order in which they were pushed, each with seeds of its own
(`workers.message_seed`) and with one torch thread. Only the order in which replies arrive differs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Self
from uuid import uuid4

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fl_merge.errors import RecipeError
from fl_merge.flower._flwr import (
    NUM_PARTITIONS_KEY,
    PARTITION_ID_KEY,
    SUPERLINK_NODE_ID,
    ErrorCode,
    Run,
    TaskIdentity,
)
from fl_merge.flower.copies import copy_context, copy_message, shallow_copy_message
from fl_merge.flower.feeding import Feeding, Workers
from fl_merge.flower.tasks import Replied, Sent, Task, Tasks
from fl_merge.flower.workers import run_message, server_state_kept

__all__ = ["FIRST_NODE_ID", "PULL_SECONDS", "InProcessGrid", "Replied", "Scalar", "Sent", "Workers"]

FIRST_NODE_ID = 1000  # node id = FIRST_NODE_ID + partition id
PULL_SECONDS = 0.05  # a pull that finds no reply works, or waits, for about this long

Scalar = str | int | float | bool


class InProcessGrid(Grid):
    """A Grid whose nodes are contexts in this process.

    Use it as a context manager: leaving it, also by Ctrl-C, ends the workers. A message whose time to live has passed
    gets no reply. A client that raises, or whose worker dies, gives an error reply; its state stays as it was before.

    Args:
        client_app: what the nodes run.
        nodes: how many there are; their ids are 1000, 1001, ...
        workers: 0 runs messages one after another in the calling thread, when it asks for replies; N > 0 runs them in
            N processes; "auto" starts in the calling thread and goes over to processes, one a core, once the work that
            seems to be left is well above what starting them costs.
        seed: of the run.
        client_app_ref: `module:name` of `client_app`, importable from sys.path; lets workers import it. Without it
            they get the app pickled, which needs the package cloudpickle.
        run_config: what every client's context carries as `run_config`.
        node_configs: one mapping a node, added to its `partition-id` and `num-partitions`.
        on_message: called with `Sent` and `Replied` events, one at a time, from any thread.
        run_id: of the run; it stands in messages and contexts.

    Raises:
        RecipeError: an argument is out of range, or the ClientApp cannot be given to worker processes.
    """

    replies_are_in_memory = True
    """Fetching replies one by one saves nothing here."""

    nodes_are_fixed = True
    """Waiting for more nodes is of no use here."""

    def __init__(
        self,
        client_app: ClientApp,
        nodes: int,
        *,
        workers: Workers = "auto",
        seed: int = 0,
        client_app_ref: str | None = None,
        run_config: Mapping[str, Scalar] | None = None,
        node_configs: Sequence[Mapping[str, Scalar]] | None = None,
        on_message: Callable[[Sent | Replied], None] | None = None,
        run_id: int = 1,
    ) -> None:
        if isinstance(nodes, bool) or not isinstance(nodes, int) or nodes < 1:
            raise RecipeError(f"nodes: {nodes!r}, a number from 1 on is wanted")
        if workers != "auto" and (isinstance(workers, bool) or not isinstance(workers, int) or workers < 0):
            raise RecipeError(f"workers: {workers!r}, a number from 0 on or 'auto' is wanted")
        if node_configs is not None and len(node_configs) != nodes:
            raise RecipeError(f"node_configs: {len(node_configs)} given, one for each of the {nodes} nodes is wanted")
        self._app = client_app
        contexts: dict[int, Context] = {}
        for i in range(nodes):
            config = {PARTITION_ID_KEY: i, NUM_PARTITIONS_KEY: nodes, **(node_configs[i] if node_configs else {})}
            contexts[FIRST_NODE_ID + i] = Context(
                run_id, FIRST_NODE_ID + i, node_config=config, state=RecordDict(), run_config=dict(run_config or {})
            )
        self.set_run(Run.create_empty(run_id))

        self._here = threading.Lock()  # client code that runs in this process runs alone
        self._tasks = Tasks(contexts, seed, on_message)
        self._feeding = Feeding(self._tasks, client_app, client_app_ref, workers)

    # What a ServerApp calls

    @property
    def run(self) -> Run:
        """A copy of the run's description."""
        return replace(self._run)

    def set_run(self, run: Run) -> None:
        """Set the run that messages made from now on belong to."""
        self._run = run
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run.run_id, SUPERLINK_NODE_ID

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A new message; the constructor of Message does the same."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """The ids of the nodes, ascending."""
        return list(self._tasks.contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Queue a snapshot of each message; their ids, in the same order."""
        ids = []
        for message in messages:
            about = message.metadata
            if not message.has_content() or about.ttl <= 0:
                raise ValueError(f"message to node {about.dst_node_id}: content and a ttl above 0 are wanted")
            about.__dict__["_message_id"] = str(uuid4())  # flwr has no public way to set it
            self._tasks.push(copy_message(message))
            ids.append(about.message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies that are ready, each given only once.

        If none is, this first works on the queue, or waits for the workers, for a moment: a loop round it gets the
        replies one by one.
        """
        wanted, until = set(message_ids), time.monotonic() + PULL_SECONDS
        replies = self._tasks.fetch(wanted)
        while wanted and not replies and time.monotonic() < until:
            self._advance(wanted, until)
            replies = self._tasks.fetch(wanted)
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Push the messages and wait for the replies, for `timeout` seconds at most; they come in order of arrival."""
        until = None if timeout is None else time.monotonic() + timeout
        wanted = set(self.push_messages(messages))
        replies = self._tasks.fetch(wanted)
        while wanted and (until is None or time.monotonic() < until):
            self._advance(wanted, until)
            replies += self._tasks.fetch(wanted)
        return replies

    # What its owner calls

    def context(self, node_id: int) -> Context:
        """A copy of the node's context."""
        with self._tasks.changed:
            return copy_context(self._tasks.contexts[node_id])

    def worker_pids(self) -> list[int]:
        """The process ids of the workers there are now."""
        return self._feeding.pids()

    def interrupt(self) -> None:
        """End what runs in workers, without waiting; calls under way raise RuntimeError. Safe in a signal handler."""
        self._feeding.interrupt()

    def close(self) -> None:
        """End the workers and wait for their end; messages without a reply are lost. A second call does nothing."""
        with self._tasks.changed:
            self._tasks.closed = True
            self._tasks.changed.notify_all()
        self._feeding.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()

    # Who works on it: the calling thread

    def _advance(self, wanted: set[str], until: float | None) -> None:
        """Bring the replies to `wanted` nearer: run messages here, or wait a while for those who run them."""
        self._feeding.start_if_worth_it()
        seconds = 1.0 if until is None else min(1.0, max(0.0, until - time.monotonic()))
        if not self._feeding.active and self._here.acquire(timeout=seconds):
            ran = False
            try:
                with server_state_kept():
                    while (task := self._next_here(wanted, until)) is not None:
                        self._run_here(task)
                        self._feeding.start_if_worth_it()
                        ran = True
            finally:
                self._here.release()
            if ran:
                return
        self._tasks.wait(wanted, seconds)

    def _next_here(self, wanted: set[str], until: float | None) -> Task | None:
        late = until is not None and time.monotonic() >= until
        with self._tasks.changed:
            done = late or self._feeding.active or self._tasks.closed or self._tasks.all_answered(wanted)
            return None if done else self._tasks.begin_next()

    def _run_here(self, task: Task) -> None:
        if self._feeding.load_problem:  # and no worker is left
            self._tasks.fail(task, ErrorCode.LOAD_CLIENT_APP_EXCEPTION, self._feeding.load_problem)
            return
        try:
            context = copy_context(self._tasks.contexts[task.node_id])
            # The content is a snapshot already, and nobody needs it afterwards.
            outcome = run_message(self._app, shallow_copy_message(task.message), context, task.seed)
        except BaseException:  # Ctrl-C
            self._tasks.drop(task)
            raise
        self._feeding.durations.append(outcome.seconds)
        # The client may still hold, and change, what it answered and what it keeps as its state.
        kept = None if outcome.context is None else copy_context(outcome.context)
        self._tasks.finish(task, replace(outcome, reply=copy_message(outcome.reply), context=kept))
