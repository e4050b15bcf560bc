"""A watcher that writes a run's folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fl_merge.flower.watch import Evaluation, Watcher
from fl_merge.rounds import GlobalModel, Refusal, RoundReport
from fl_merge.runs.folder import RunFolder
from fl_merge.types import MergeMethod


class Journal(Watcher):
    """Writes every event to the folder's journal, and the model after every round that made one."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def run_started(self, num_rounds: int, method: MergeMethod) -> None:
        self._folder.record("run_started", rounds=num_rounds, method=str(method))

    def round_started(self, round_number: int, sampled: tuple[str, ...]) -> None:
        self._folder.record("round_started", round=round_number, sampled=sampled)

    def replied(self, round_number: int, client_id: str, refusal: Refusal | None, seconds: float) -> None:
        self._folder.record(
            "replied",
            round=round_number,
            client=client_id,
            refused=refusal.reason if refusal else None,
            seconds=seconds,
        )

    def round_ended(self, report: RoundReport, model: GlobalModel) -> None:
        self._folder.record("round_ended", report=report)
        if report.merge is not None:
            self._folder.write_model(model.tensors(), round=report.round_number)

    def clients_evaluated(self, evaluation: Evaluation) -> None:
        self._folder.record("clients_evaluated", evaluation=evaluation)

    def server_evaluated(self, round_number: int, metrics: Mapping[str, Any]) -> None:
        self._folder.record("server_evaluated", round=round_number, metrics=metrics)
