"""A round of a federation, whatever carries it: take updates in, refuse the bad ones, merge the rest."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from fl_merge.check import MAX_NUM_EXAMPLES, check_metrics, check_update
from fl_merge.errors import DecodeError, MergeError, TensorMismatchError, UpdateError, counted, one_line
from fl_merge.exchange import Form, exchange_of, expected, forms_as_state, plain, reported
from fl_merge.execute import MergeReport
from fl_merge.method import sends
from fl_merge.model import GlobalModel
from fl_merge.naming import STATISTICS
from fl_merge.optimizers import optimizer_of
from fl_merge.phases import changes_structure
from fl_merge.running import RunningSum
from fl_merge.running_products import RunningProducts
from fl_merge.spill import Spill
from fl_merge.store import MemorySource
from fl_merge.tuning import Tuner
from fl_merge.types import MergeMethod, Update

logger = logging.getLogger("flwr")

MIN_REPLIES = 2
"""Fewer are never merged unless the operator asks for it: one client's model is not a merge."""


@dataclass(frozen=True)
class Accepted:
    """An update that was merged."""

    client_id: str
    num_examples: float
    metrics: Mapping[str, float | int | list[float] | list[int]]
    num_bytes: int


@dataclass(frozen=True)
class Refusal:
    """An update that was not, and why; `tensor` where the reason is with one tensor."""

    client_id: str
    reason: str
    tensor: str | None = None

    def __str__(self) -> str:
        where = f", tensor '{self.tensor}'" if self.tensor else ""
        return f"client '{self.client_id}'{where}: {self.reason}"


@dataclass(frozen=True)
class RoundReport:
    """What happened in a round.

    Args:
        round_number: from 1.
        sampled: the clients that were asked.
        accepted, refused: what came of them. Late clients are among the refused.
        merge: None if the round made no model.
        failure: why it made none.
        seconds: from the first update's arrival to the merged model.
    """

    round_number: int
    sampled: tuple[str, ...]
    accepted: tuple[Accepted, ...]
    refused: tuple[Refusal, ...]
    merge: MergeReport | None
    failure: str | None
    seconds: float


class Round:
    """Collects one round's updates. `offer` and `refuse` as replies come in, then `merge`.

    Args:
        number: from 1.
        model: that the clients started from.
        method: how to merge.
        sampled: the clients that were asked; anyone else is refused.
        min_replies: fewer good updates make no model; None for all sampled less the tolerated failures, at least 2.
        max_failures: the fraction of the sampled clients that may fail when `min_replies` is None.
        seed: of the run.
        max_num_examples: the largest number of examples a client may claim.
        wire: the floating dtype in which the next model is sent; None for the base's.
        spill: where accepted updates are kept until they are merged; None for in memory. It is the caller's, who closes
            it after `merge`. If it cannot keep an update the round makes no model: which clients are in it would be a
            matter of who was first.
        running: the sum to which accepted updates are added when they come, in place of being kept; the merged model
            is then the sum's, to a last place what it is otherwise. If an update is added to it in part the round makes
            no model.
        tuner: chooses how far to go along the merged delta.
        asked: what clients were asked for, said to those whose tensors do not fit.
    """

    def __init__(
        self,
        number: int,
        model: GlobalModel,
        method: MergeMethod,
        sampled: tuple[str, ...],
        *,
        min_replies: int | None = None,
        max_failures: float = 0.5,
        seed: int = 0,
        max_num_examples: float = MAX_NUM_EXAMPLES,
        wire: torch.dtype | None = None,
        spill: Spill | None = None,
        running: RunningSum | RunningProducts | None = None,
        tuner: Tuner | None = None,
        asked: str = "",
    ) -> None:
        self.number = number
        self.sampled = sampled
        self.min_replies = quorum(len(sampled), min_replies, max_failures)
        self._model = model
        self._sends = sends(method)
        self._method = method
        self._seed = seed
        self.max_num_examples = max_num_examples
        self._wire = wire
        self._spill = spill
        self._running = running
        self._tuner = tuner
        self._asked = asked
        self._statistics = asked_statistics(method)
        self._not_kept: str | None = None
        self._updates: dict[str, Update] = {}
        self._accepted: list[Accepted] = []
        self._refused: dict[str, Refusal] = {}
        self._specs = model.specs()
        self._values = MemorySource(model.sent, model.tied)
        self._exchange = exchange_of(method)
        self._forms: dict[str, Form] = {}
        self._started = time.perf_counter()

    def offer(self, client_id: str, read: Callable[[], Update]) -> Refusal | None:
        """Take a client's update in if all of it is usable; else refuse it whole.

        Args:
            client_id: who sent it, as the transport says.
            read: makes the update out of what was received; may raise UpdateError.

        Returns:
            None, or why it was refused.
        """
        if client_id not in self.sampled:
            return self.refuse(client_id, "was not asked in this round")
        if client_id in self._updates or client_id in self._refused:
            return Refusal(client_id, "replied twice; the first reply counts")
        if self._not_kept is not None:
            return self.refuse(client_id, "came after the server could keep no more updates")
        try:
            update = self._read(read)
            if not self._statistics:  # nobody will read them
                update = replace(update, statistics=None)
            adapters = self._exchange is not None
            check_update(
                update,
                self._specs if self._exchange is None else expected(update, self._specs, self._exchange),
                max_num_examples=self.max_num_examples,
                values=None if adapters else self._values,
                tied=None if adapters else self._model.tied,
                statistics=self._statistics,
            )
            check_metrics(update.metrics, self._sends)
            form: Form | None = None
            if adapters:
                update, form = plain(update, self._values)
            sources = [source for source in (update.tensors, update.statistics) if source is not None]
            size = sum(spec.nbytes for source in sources for spec in source.specs().values())
            if self._running is not None:
                self._running.add(update)
                update = replace(update, tensors=MemorySource({}))
            elif self._spill is not None:
                update = self._spill.keep(update)
        except UpdateError as error:
            asked = f"; {self._asked}" if self._asked and isinstance(error, TensorMismatchError) else ""
            return self.refuse(client_id, error.problem + asked, error.tensor)
        except MergeError as error:  # no fault of this client's
            self._not_kept = str(error)
            return self.refuse(client_id, "the server could not keep it")
        self._updates[client_id] = update
        if form is not None:
            self._forms[client_id] = form
        metrics = update.metrics if form is None else reported(update.metrics)
        self._accepted.append(Accepted(client_id, update.num_examples, metrics, size))
        return None

    @staticmethod
    def _read(read: Callable[[], Update]) -> Update:
        try:
            return read()
        except UpdateError:
            raise
        except Exception as error:  # whatever a client can make of its bytes, it is that client's update that is lost
            logger.exception("an update cannot be read")
            raise DecodeError(f"cannot be read: {type(error).__name__}: {error}") from error

    def refuse(self, client_id: str, reason: str, tensor: str | None = None) -> Refusal:
        """Record that a client gave no usable update; what comes after a usable one is not recorded."""
        if client_id in self._updates:
            return Refusal(client_id, "replied twice; the first reply counts")
        refusal = Refusal(one_line(client_id), one_line(reason), None if tensor is None else one_line(tensor))
        self._refused.setdefault(client_id, refusal)
        return refusal

    def merge(self) -> tuple[GlobalModel | None, RoundReport]:
        """The next global model, or None if the round failed; the old model then stands."""
        for client_id in self.sampled:
            if client_id not in self._updates and client_id not in self._refused:
                self.refuse(client_id, "no reply before the deadline")
        model, merge, failure = None, None, self._not_kept
        if failure is not None:
            pass
        elif len(self._updates) < self.min_replies:
            failure = (
                f"{counted(len(self._updates), 'usable reply', 'usable replies')} of "
                f"{counted(len(self.sampled), 'client')}, wanted at least "
                f"{self.min_replies} (min_replies)"
            )
        else:
            try:
                model, merge = self._merged()
            except MergeError as error:
                failure = str(error)
            except Exception as error:  # a method with a fault costs its rounds, not the server
                logger.exception("%s failed", self._method)
                failure = f"{self._method} failed: {type(error).__name__}: {one_line(str(error))}"
        report = RoundReport(
            self.number,
            self.sampled,
            tuple(self._accepted),
            tuple(self._refused.values()),
            merge,
            failure,
            time.perf_counter() - self._started,
        )
        return model, report

    def _merged(self) -> tuple[GlobalModel, MergeReport]:
        if isinstance(self._running, RunningSum):
            sink = self._model.sink()
            merge = self._model.tuned(sink, self._running.merge(sink), self._tuner)
            return self._model.next(sink, wire=self._wire, optimized=optimizer_of(self._method)), merge
        products = self._running if isinstance(self._running, RunningProducts) else None
        updates = tuple(self._updates.values()) if products is None else (products.total(),)
        if changes_structure(self._method):
            return self._model.restructured(
                self._method, updates, seed=self._seed, round_number=self.number, wire=self._wire
            )
        model, merge = self._model.merged(
            self._method, updates, seed=self._seed, round_number=self.number, wire=self._wire, tuner=self._tuner
        )
        if products is not None:
            merge = products.reported(merge)
        if self._exchange is not None:
            known = {**self._model.optimizer_state, **forms_as_state(self._forms)}
            model = replace(model, optimizer_state={name: known[name] for name in sorted(known)})
        return model, merge


def asked_statistics(method: MergeMethod) -> tuple[str, ...]:
    """The kinds of statistics that clients have to send for a method: of "fisher", "gram" and "hidden"."""
    return tuple(kind for kind in sends(method) if kind in STATISTICS)


def quorum(sampled: int, min_replies: int | None, max_failures: float) -> int:
    """How many usable replies a round needs: as asked, else all less the tolerated failures, but at least 2."""
    if min_replies is not None:
        return min_replies
    return max(MIN_REPLIES, sampled - math.floor(sampled * max_failures))


def average_metrics(
    reports: Mapping[str, tuple[float, Mapping[str, float | int | list[float] | list[int]]]],
) -> dict[str, float | list[float]]:
    """Each metric's mean over the clients that reported it as finite numbers, weighted by their numbers of examples.

    Args:
        reports: (number of examples, metrics) by client id.

    Returns:
        The means; lists of equal length are averaged element by element, others are left out.
    """
    means: dict[str, float | list[float]] = {}
    for name in dict.fromkeys(name for _, metrics in reports.values() for name in metrics):
        rows = [(weight, metrics[name]) for weight, metrics in reports.values() if name in metrics]
        values = [(weight, value if isinstance(value, list) else [value]) for weight, value in rows]
        values = [(weight, row) for weight, row in values if all(abs(item) <= sys.float_info.max for item in row)]
        if not values or len({len(row) for _, row in values}) > 1 or len({isinstance(v, list) for _, v in rows}) > 1:
            continue
        weights = torch.tensor([weight for weight, _ in values], dtype=torch.float64)
        table = torch.tensor([[float(item) for item in row] for _, row in values], dtype=torch.float64)
        mean = ((weights[:, None] * table).sum(0) / weights.sum()).tolist()
        means[name] = mean if isinstance(rows[0][1], list) else mean[0]
    return means
