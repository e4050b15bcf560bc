"""Worker processes of an in-process grid, each fed by a thread with message after message."""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import Literal

from flwr.clientapp import ClientApp

from fl_merge.errors import RecipeError
from fl_merge.flower._flwr import ErrorCode
from fl_merge.flower.copies import copy_context
from fl_merge.flower.tasks import Tasks
from fl_merge.flower.workers import AppSource, WorkerDiedError, WorkerLoadError, WorkerProcess, app_source

START_SECONDS = 2.5  # what starting worker processes costs: interpreters that import torch and flwr

Workers = int | Literal["auto"]

logger = logging.getLogger(__name__)


class Feeding:
    """The workers, when there are any.

    Args:
        tasks: which they work on.
        client_app, client_app_ref: what they run, and how they may import it.
        workers: how many, at most one a node; "auto": one a core once that seems worth it.

    Attributes:
        durations: of the messages that ran in this process, in seconds; the grid adds them.
        load_problem: why no worker could be started; "" where that is no problem.

    Raises:
        RecipeError: the ClientApp cannot be given to as many processes as are asked for.
    """

    def __init__(self, tasks: Tasks, client_app: ClientApp, client_app_ref: str | None, workers: Workers) -> None:
        self._tasks = tasks
        self._app = client_app
        self._app_ref = client_app_ref
        self.durations: list[float] = []
        self.load_problem = ""
        self._processes: set[WorkerProcess] = set()
        self._threads: list[threading.Thread] = []  # one a worker process
        self._num_feeding = 0  # threads that have a worker or are starting one
        self._num_workers = min(_num_cores() if workers == "auto" else workers, len(tasks.contexts))
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

    @property
    def active(self) -> bool:
        """Whether worker processes run the messages; the calling thread then does not."""
        return self._handed_over and self._num_feeding > 0

    def pids(self) -> list[int]:
        """The process ids of the workers there are now."""
        return [process.pid for process in tuple(self._processes)]

    def interrupt(self) -> None:
        """End what runs in workers, without waiting. Safe in a signal handler."""
        self._tasks.closed = True
        for process in tuple(self._processes):
            if not process.idle:
                process.terminate()

    def close(self) -> None:
        """Wait for the workers' end, once the tasks are closed."""
        for thread in self._threads:
            while thread.is_alive():
                self.interrupt()
                thread.join(0.1)

    def start_if_worth_it(self) -> None:
        """Start the workers, if that has not been done and they seem to be worth what that costs."""
        if self._threads or not (self._handed_over or self._seems_worth_it()):
            return
        with self._tasks.changed:
            if self._threads or self._tasks.closed:
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
        if not self._undecided or not self.durations or self._tasks.num_queued < 2:
            return False
        # The first message may have loaded data or libraries for all: by itself it counts only if it took very long.
        if len(self.durations) == 1 and self.durations[0] < 2 * START_SECONDS:
            return False
        spent, last = sum(self.durations), self.durations[-1]
        # Left is what is queued; or, as nobody knows how many rounds will come, as much again as there has been.
        left = max(spent, self._tasks.num_queued * min(last, spent / len(self.durations)))
        return left * (1 - 1 / self._num_workers) > 2 * START_SECONDS

    def _feed_worker(self) -> None:
        """Give one worker process message after message; when it dies, start another in its place."""
        worker = self._start_worker()
        while worker is not None and (task := self._tasks.wait_for_task()) is not None:
            start = time.perf_counter()
            try:
                outcome = worker.run(task.message, copy_context(self._tasks.contexts[task.node_id]), task.seed)
            except Exception as problem:  # it died, or what it sent cannot be read
                self._end_worker(worker)
                reason = str(problem) if isinstance(problem, WorkerDiedError) else f"worker: {problem!r}"
                if not self._tasks.closed:
                    self._tasks.fail(task, ErrorCode.CLIENT_APP_CRASHED, reason, time.perf_counter() - start)
                worker = None if self._tasks.closed else self._start_worker()
            else:
                self._tasks.finish(task, outcome)
        if worker is not None:
            self._end_worker(worker)
        with self._tasks.changed:
            self._num_feeding -= 1
            self._tasks.changed.notify_all()

    def _start_worker(self) -> WorkerProcess | None:
        """A worker that has loaded the ClientApp, or None if there can be none."""
        worker = None
        try:
            worker = WorkerProcess(self._source)
            with self._tasks.changed:
                self._processes.add(worker)
            worker.wait_until_loaded()
            self._handed_over = True
            return worker
        except WorkerLoadError as problem:
            if worker is not None:
                self._end_worker(worker)
            if not self._tasks.closed:
                logger.warning("a worker process cannot load the ClientApp: %s", problem)
                if self._handed_over:
                    self.load_problem = str(problem)
            return None

    def _end_worker(self, worker: WorkerProcess) -> None:
        worker.close()
        with self._tasks.changed:
            self._processes.discard(worker)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
