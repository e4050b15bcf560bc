"""A Flower Grid that runs ClientApps in this process or in worker processes: no network, no Ray.

The ServerApp sees nodes, messages and replies as it does on a SuperLink. What it gets is the same, bit for bit, with
any number of workers: a node's messages run in the order in which they were pushed, each with seeds of its own
(`workers.message_seed`) and with one torch thread. Only the order in which replies arrive differs.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Literal, Self
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
from fl_merge.flower.copies import copy_context, copy_message, num_bytes, shallow_copy_message
from fl_merge.flower.workers import (
    AppSource,
    Outcome,
    WorkerDiedError,
    WorkerLoadError,
    WorkerProcess,
    app_source,
    error_reply,
    message_seed,
    run_message,
    server_state_kept,
)

FIRST_NODE_ID = 1000  # node id = FIRST_NODE_ID + partition id
PULL_SECONDS = 0.05  # a pull that finds no reply works, or waits, for about this long
START_SECONDS = 2.5  # what starting worker processes costs: interpreters that import torch and flwr

Workers = int | Literal["auto"]
Scalar = str | int | float | bool

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
        return self.error is None


@dataclass(frozen=True)
class _Task:
    """A pushed message that has no reply yet, and the seed it runs under."""

    message: Message
    seed: int

    @property
    def id(self) -> str:
        return self.message.metadata.message_id

    @property
    def node_id(self) -> int:
        return self.message.metadata.dst_node_id

    @property
    def expired(self) -> bool:
        return time.time() > self.message.metadata.created_at + self.message.metadata.ttl


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
        self._app_ref = client_app_ref
        self._seed = seed
        self._on_message = on_message
        self._contexts: dict[int, Context] = {}
        for i in range(nodes):
            config = {PARTITION_ID_KEY: i, NUM_PARTITIONS_KEY: nodes, **(node_configs[i] if node_configs else {})}
            self._contexts[FIRST_NODE_ID + i] = Context(
                run_id, FIRST_NODE_ID + i, node_config=config, state=RecordDict(), run_config=dict(run_config or {})
            )
        self.set_run(Run.create_empty(run_id))

        self._changed = threading.Condition()  # guards the queue, what comes of it, and the workers
        self._queue: dict[str, _Task] = {}  # message id -> pushed and not begun, in order
        self._busy: dict[int, str] = {}  # node id -> id of the message it runs
        self._replies: dict[str, Message] = {}  # message id -> its reply, not fetched yet, in order of arrival
        self._num_pushed = dict.fromkeys(self._contexts, 0)
        self._processes: set[WorkerProcess] = set()
        self._threads: list[threading.Thread] = []  # one a worker process
        self._num_feeding = 0  # threads that have a worker or are starting one
        self._load_problem = ""  # why no worker could be started
        self._closed = False

        self._here = threading.Lock()  # client code that runs in this process runs alone
        self._telling = threading.Lock()
        self._failed_before = False
        self._durations: list[float] = []  # of the messages that ran here

        self._num_workers = min(_num_cores() if workers == "auto" else workers, nodes)
        self._handed_over = workers != "auto" and workers > 0  # to the workers, for good
        self._undecided = workers == "auto" and self._num_workers > 1 and os.name == "posix"
        self._source = AppSource()
        if self._handed_over:
            if os.name != "posix":
                raise RecipeError(f"workers: {workers}, worker processes need Linux or macOS, 0 is wanted here")
            try:
                self._source = app_source(client_app, client_app_ref)
            except WorkerLoadError as problem:
                raise RecipeError(
                    f"workers: {workers}, but the ClientApp cannot be given to another process ({problem}); "
                    "0, or an app in a folder, is wanted"
                ) from problem

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
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Queue a snapshot of each message; their ids, in the same order."""
        ids = []
        for message in messages:
            about = message.metadata
            if not message.has_content() or about.ttl <= 0:
                raise ValueError(f"message to node {about.dst_node_id}: content and a ttl above 0 are wanted")
            about.__dict__["_message_id"] = str(uuid4())  # flwr has no public way to set it
            self._push(copy_message(message))
            ids.append(about.message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies that are ready, each given only once.

        If none is, this first works on the queue, or waits for the workers, for a moment: a loop round it gets the
        replies one by one.
        """
        wanted, until = set(message_ids), time.monotonic() + PULL_SECONDS
        replies = self._fetch(wanted)
        while wanted and not replies and time.monotonic() < until:
            self._advance(wanted, until)
            replies = self._fetch(wanted)
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Push the messages and wait for the replies, for `timeout` seconds at most; they come in order of arrival."""
        until = None if timeout is None else time.monotonic() + timeout
        wanted = set(self.push_messages(messages))
        replies = self._fetch(wanted)
        while wanted and (until is None or time.monotonic() < until):
            self._advance(wanted, until)
            replies += self._fetch(wanted)
        return replies

    # What its owner calls

    def context(self, node_id: int) -> Context:
        """A copy of the node's context."""
        with self._changed:
            return copy_context(self._contexts[node_id])

    def worker_pids(self) -> list[int]:
        """The process ids of the workers there are now."""
        return [process.pid for process in tuple(self._processes)]

    def interrupt(self) -> None:
        """End what runs in workers, without waiting; calls under way raise RuntimeError. Safe in a signal handler."""
        self._closed = True
        for process in tuple(self._processes):
            if not process.idle:
                process.terminate()

    def close(self) -> None:
        """End the workers and wait for their end; messages without a reply are lost. A second call does nothing."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            while thread.is_alive():
                self.interrupt()
                thread.join(0.1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()

    # The queue

    def _push(self, message: Message) -> None:
        about = message.metadata
        self._tell(Sent(about.dst_node_id, about.message_type, about.group_id, num_bytes(message)))
        with self._changed:
            self._raise_if_closed()
            if about.dst_node_id not in self._contexts:
                reason = f"there is no node {about.dst_node_id}"
                self._replies[about.message_id] = error_reply(message, ErrorCode.NODE_UNAVAILABLE, reason)
                return
            task = _Task(message, message_seed(self._seed, about.dst_node_id, self._num_pushed[about.dst_node_id]))
            self._num_pushed[task.node_id] += 1
            self._queue[task.id] = task
            self._changed.notify_all()

    def _fetch(self, wanted: set[str]) -> list[Message]:
        """Take the replies there are to `wanted`, and take out of `wanted` what needs no more waiting for."""
        with self._changed:
            self._raise_if_closed()
            ids = [message_id for message_id in self._replies if message_id in wanted]
            wanted.difference_update(ids)
            if not ids:  # some may have expired
                wanted.intersection_update(self._queue.keys() | set(self._busy.values()))
            return [self._replies.pop(message_id) for message_id in ids]

    def _begin_next(self) -> _Task | None:
        """Take the first message whose node is free. The caller holds `_changed`."""
        for task in list(self._queue.values()):
            if task.expired:
                del self._queue[task.id]
            elif task.node_id not in self._busy:
                del self._queue[task.id]
                self._busy[task.node_id] = task.id
                return task
        return None

    def _finish(self, task: _Task, outcome: Outcome) -> None:
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
        with self._changed:
            if outcome.context is not None:
                self._contexts[task.node_id].state = outcome.context.state
            if on_time:
                self._replies[task.id] = reply
            del self._busy[task.node_id]
            self._changed.notify_all()

    def _fail(self, task: _Task, code: int, reason: str, seconds: float = 0.0) -> None:
        self._finish(task, Outcome(error_reply(task.message, code, reason), None, seconds))

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
        if self._closed:
            raise RuntimeError("the grid is closed")

    # Who works on it: the calling thread

    def _advance(self, wanted: set[str], until: float | None) -> None:
        """Bring the replies to `wanted` nearer: run messages here, or wait a while for those who run them."""
        self._start_workers_if_worth_it()
        seconds = 1.0 if until is None else min(1.0, max(0.0, until - time.monotonic()))
        if not self._fed and self._here.acquire(timeout=seconds):
            ran = False
            try:
                with server_state_kept():
                    while (task := self._next_here(wanted, until)) is not None:
                        self._run_here(task)
                        self._start_workers_if_worth_it()
                        ran = True
            finally:
                self._here.release()
            if ran:
                return
        with self._changed:
            if wanted.isdisjoint(self._replies) and (self._queue or self._busy) and not self._closed:
                self._changed.wait(seconds)

    @property
    def _fed(self) -> bool:
        """Whether worker processes run the messages; this thread then does not."""
        return self._handed_over and self._num_feeding > 0

    def _next_here(self, wanted: set[str], until: float | None) -> _Task | None:
        late = until is not None and time.monotonic() >= until
        with self._changed:
            done = late or self._fed or self._closed or wanted <= self._replies.keys()
            return None if done else self._begin_next()

    def _run_here(self, task: _Task) -> None:
        if self._load_problem:  # and no worker is left
            self._fail(task, ErrorCode.LOAD_CLIENT_APP_EXCEPTION, self._load_problem)
            return
        try:
            context = copy_context(self._contexts[task.node_id])
            # The content is a snapshot already, and nobody needs it afterwards.
            outcome = run_message(self._app, shallow_copy_message(task.message), context, task.seed)
        except BaseException:  # Ctrl-C
            with self._changed:
                del self._busy[task.node_id]
            raise
        self._durations.append(outcome.seconds)
        # The client may still hold, and change, what it answered and what it keeps as its state.
        kept = None if outcome.context is None else copy_context(outcome.context)
        self._finish(task, replace(outcome, reply=copy_message(outcome.reply), context=kept))

    # Who works on it: worker processes, each fed by a thread

    def _start_workers_if_worth_it(self) -> None:
        if self._threads or not (self._handed_over or self._seems_worth_it()):
            return
        with self._changed:
            if self._threads or self._closed:
                return
            if not self._handed_over:
                self._undecided = False
                try:
                    self._source = app_source(self._app, self._app_ref)
                except WorkerLoadError as problem:
                    logger.info("stays in one process: the ClientApp cannot be given to another (%s)", problem)
                    return
            self._num_feeding = self._num_workers
            self._threads = [threading.Thread(target=self._feed_worker, daemon=True) for _ in range(self._num_workers)]
            for thread in self._threads:
                thread.start()

    def _seems_worth_it(self) -> bool:
        if not self._undecided or not self._durations or len(self._queue) < 2:
            return False
        # The first message may have loaded data or libraries for all: by itself it counts only if it took very long.
        if len(self._durations) == 1 and self._durations[0] < 2 * START_SECONDS:
            return False
        spent, last = sum(self._durations), self._durations[-1]
        # Left is what is queued; or, as nobody knows how many rounds will come, as much again as there has been.
        left = max(spent, len(self._queue) * min(last, spent / len(self._durations)))
        return left * (1 - 1 / self._num_workers) > 2 * START_SECONDS

    def _feed_worker(self) -> None:
        """Give one worker process message after message; when it dies, start another in its place."""
        worker = self._start_worker()
        while worker is not None and (task := self._wait_for_task()) is not None:
            start = time.perf_counter()
            try:
                outcome = worker.run(task.message, copy_context(self._contexts[task.node_id]), task.seed)
            except Exception as problem:  # it died, or what it sent cannot be read
                self._end_worker(worker)
                reason = str(problem) if isinstance(problem, WorkerDiedError) else f"worker: {problem!r}"
                if not self._closed:
                    self._fail(task, ErrorCode.CLIENT_APP_CRASHED, reason, time.perf_counter() - start)
                worker = None if self._closed else self._start_worker()
            else:
                self._finish(task, outcome)
        if worker is not None:
            self._end_worker(worker)
        with self._changed:
            self._num_feeding -= 1
            self._changed.notify_all()

    def _wait_for_task(self) -> _Task | None:
        with self._changed:
            while not self._closed:
                if (task := self._begin_next()) is not None:
                    return task
                self._changed.wait()
            return None

    def _start_worker(self) -> WorkerProcess | None:
        """A worker that has loaded the ClientApp, or None if there can be none."""
        worker = None
        try:
            worker = WorkerProcess(self._source)
            with self._changed:
                self._processes.add(worker)
            worker.wait_until_loaded()
            self._handed_over = True
            return worker
        except WorkerLoadError as problem:
            if worker is not None:
                self._end_worker(worker)
            if not self._closed:
                logger.warning("a worker process cannot load the ClientApp: %s", problem)
                if self._handed_over:
                    self._load_problem = str(problem)
            return None

    def _end_worker(self, worker: WorkerProcess) -> None:
        worker.close()
        with self._changed:
            self._processes.discard(worker)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
