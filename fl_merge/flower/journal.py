"""A watcher that writes a run's folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fl_merge.adapters.federated import described
from fl_merge.errors import RecipeError
from fl_merge.flower.watch import Evaluation, Watcher
from fl_merge.model import GlobalModel
from fl_merge.phases import Phase
from fl_merge.recipe import Recipe
from fl_merge.rounds import Refusal, RoundReport
from fl_merge.runs.checkpoint import Checkpoint
from fl_merge.runs.folder import RunFolder
from fl_merge.types import MergeMethod


class Journal(Watcher):
    """Writes every event to the folder's journal, and the model after every round that made one.

    Of a run that merges adapters there is a folder `adapter` too, which `PeftModel.from_pretrained` loads.

    Args:
        path: the folder, made when a run starts: an app that does not merge gets none.
        config: the run config, written beside the journal.
        simulated: number of nodes and seed, where the run is simulated; written there too.
        resumed: go on with the journal of the run that is there.

    Raises:
        RecipeError: if a run has already been written there.
    """

    def __init__(
        self,
        path: str | Path,
        config: Mapping[str, Any],
        *,
        simulated: Mapping[str, int] | None = None,
        resumed: bool = False,
    ) -> None:
        self.path = Path(path)
        self._config = dict(config)
        self._simulated = simulated
        self._resumed = resumed
        self._opened: RunFolder | None = None
        self._adapter: Mapping[str, Any] | None = None
        self._method = ""
        if not resumed and os.path.exists(self.path / "journal.jsonl"):
            raise RecipeError(f"run folder '{path}' already holds a run; give another one")

    @property
    def written(self) -> bool:
        """Whether a run has started in it."""
        return self._opened is not None

    @property
    def _folder(self) -> RunFolder:
        if self._opened is None:
            try:
                self._opened = RunFolder(self.path, resumed=self._resumed)
                self._opened.write_config(self._config, self._simulated)
            except OSError as error:
                raise RecipeError(f"run folder '{self.path}': {error.strerror or error}") from None
        return self._opened

    def adapter_described(self, about: Mapping[str, Any]) -> None:
        self._adapter = described(about)

    def run_started(self, num_rounds: int, method: MergeMethod) -> None:
        self._write_recipe(method)
        self._folder.record("run_started", rounds=num_rounds, method=str(method))

    def run_resumed(self, num_rounds: int, method: MergeMethod, after_round: int) -> None:
        self._write_recipe(method)
        self._folder.record("resumed", rounds=num_rounds, method=str(method), after_round=after_round)

    def _write_recipe(self, method: MergeMethod) -> None:
        self._method = str(method)
        recipe = Recipe.of(method)
        if recipe is not None:
            self._folder.write_recipe(recipe.to_yaml())

    def phase_started(self, round_number: int, number: int, phase: Phase) -> None:
        self._folder.record(
            "phase_started",
            round=round_number,
            phase=number,
            method=str(phase.method),
            rounds=phase.rounds,
            train=phase.train,
            config=phase.config,
        )

    def adapter_folded(self, round_number: int, modules: int, model: GlobalModel) -> None:
        self._folder.record("adapter_folded", round=round_number, modules=modules)
        self._adapter = None  # the folder keeps the adapter that was folded in

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
            tensors = model.tensors()
            self._folder.write_model(tensors, round=report.round_number)
            if model.architecture:
                self._folder.write_architecture(model.architecture)
            if self._adapter is not None:
                clients = {entry.client_id: entry.num_examples for entry in report.accepted}
                about = {"method": self._method, "round": report.round_number, "clients": clients}
                self._folder.write_adapter(tensors, self._adapter, about | dict(report.merge.found))

    def checkpointed(self, checkpoint: Checkpoint) -> None:
        checkpoint.write(self._folder.path)

    def clients_evaluated(self, evaluation: Evaluation) -> None:
        self._folder.record("clients_evaluated", evaluation=evaluation)

    def server_evaluated(self, round_number: int, metrics: Mapping[str, Any]) -> None:
        self._folder.record("server_evaluated", round=round_number, metrics=metrics)
