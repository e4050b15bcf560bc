"""Being told what a federation does, as it does it.

A watcher is given to `FedMerge(watchers=[...])`, or stands in for every strategy that runs inside `watching(watcher)`:
that is how a command line shows the progress of an app that it did not write.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fl_merge.model import GlobalModel
from fl_merge.phases import Phase
from fl_merge.rounds import Refusal, RoundReport
from fl_merge.runs.checkpoint import Checkpoint
from fl_merge.types import MergeMethod


@dataclass(frozen=True)
class Evaluation:
    """What clients found when they evaluated the global model.

    Args:
        round_number: from 1.
        by_client: (number of examples, metrics) by client id.
        refused: clients without a usable reply.
        metrics: the average.
    """

    round_number: int
    by_client: Mapping[str, tuple[float, Mapping[str, Any]]]
    refused: tuple[Refusal, ...]
    metrics: Mapping[str, Any]


class Watcher:
    """Does nothing; override what you want to hear of. Called from the strategy's thread."""

    def adapter_described(self, about: Mapping[str, Any]) -> None:
        """Of a run that merges adapters, before it starts: what their configurations say beside ranks and scalings."""

    def run_started(self, num_rounds: int, method: MergeMethod) -> None:
        """The first round is about to begin."""

    def run_resumed(self, num_rounds: int, method: MergeMethod, after_round: int) -> None:
        """A run goes on that had made so many rounds; `num_rounds` counts from its beginning."""
        self.run_started(num_rounds, method)

    def phase_started(self, round_number: int, number: int, phase: Phase) -> None:
        """The first round of a phase is about to begin; only of runs that have several (`fl_merge.phases`)."""

    def adapter_folded(self, round_number: int, modules: int, model: GlobalModel) -> None:
        """From this round on `model` is the global one: the base with the adapter of the phase before in it."""

    def round_started(self, round_number: int, sampled: tuple[str, ...]) -> None:
        """These clients are being asked to train."""

    def replied(self, round_number: int, client_id: str, refusal: Refusal | None, seconds: float) -> None:
        """A client's update was taken in, or refused; checking it took `seconds`."""

    def round_ended(self, report: RoundReport, model: GlobalModel) -> None:
        """The round is merged or has failed; `model` is the global model from now on."""

    def checkpointed(self, checkpoint: Checkpoint) -> None:
        """The round made a model, and this is all that a run would go on from."""

    def clients_evaluated(self, evaluation: Evaluation) -> None:
        """Clients evaluated the global model."""

    def server_evaluated(self, round_number: int, metrics: Mapping[str, Any]) -> None:
        """The server evaluated it; round 0 is the initial model."""


_watchers: contextvars.ContextVar[tuple[Watcher, ...]] = contextvars.ContextVar("fl_merge_watchers", default=())


def watchers_here() -> tuple[Watcher, ...]:
    """The watchers of the surrounding `watching` blocks."""
    return _watchers.get()


@contextlib.contextmanager
def watching(*watchers: Watcher) -> Iterator[None]:
    """Every FedMerge that is used inside tells these watchers."""
    token = _watchers.set((*_watchers.get(), *watchers))
    try:
        yield
    finally:
        _watchers.reset(token)
