"""What a strategy does differently from phase to phase of its run."""

from __future__ import annotations

import logging
from collections.abc import Callable

from flwr.app import ConfigRecord
from flwr.serverapp import Grid

from fl_merge.errors import MergeError, counted
from fl_merge.flower._malloc import give_back_large_blocks
from fl_merge.flower.asking import asked_for, told
from fl_merge.flower.carried import CarriedModel
from fl_merge.flower.keeping import Keeping
from fl_merge.flower.replies import RepliesAsTheyCome
from fl_merge.flower.sampling import RunFailedError
from fl_merge.flower.watch import Watcher
from fl_merge.model import GlobalModel
from fl_merge.phases import Phase, Schedule, trained_names
from fl_merge.types import MergeMethod

logger = logging.getLogger("flwr")


class Phasing:
    """A schedule's phases by the numbers of their rounds.

    Args:
        schedule: of the run.
        keeping: from a phase's method to where its updates are kept.
    """

    def __init__(self, schedule: Schedule, keeping: Callable[[MergeMethod], Keeping]) -> None:
        self.schedule = schedule
        self._keeping = [keeping(each.method) for each in schedule.phases]

    def phase(self, server_round: int) -> Phase:
        """The phase of a round."""
        return self.schedule.at(server_round)

    def enter(
        self, server_round: int, carried: CarriedModel, tell: Callable[[Callable[[Watcher], None]], None]
    ) -> None:
        """What a phase does to the global model before its first round: an adapter is folded into its base.

        That goes by what the model is and not by the round's number, so that a run which is resumed does it too.

        Args:
            server_round: that begins.
            carried: the global model.
            tell: does something with every watcher.

        Raises:
            MergeError: if the folded model does not fit the dtype in which it is sent.
        """
        phase = self.phase(server_round)
        begins = len(self.schedule.phases) > 1 and self.schedule.begins_with(server_round)
        if begins:
            carried.begin_phase()
        modules = carried.fold() if carried.holds_adapter and not phase.merges_adapters else 0
        # Watchers hear of a phase once the model is as the phase wants it.
        if begins:
            tell(lambda watcher: watcher.phase_started(server_round, self.schedule.number_at(server_round), phase))
        if modules:
            logger.info("round %d: an adapter of %s is folded into the base", server_round, counted(modules, "module"))
            tell(lambda watcher: watcher.adapter_folded(server_round, modules, carried.model))

    def told(self, config: ConfigRecord, server_round: int, model: GlobalModel, *, train: bool) -> ConfigRecord:
        """The config of a round's messages; see `asking.told`."""
        phase, exchange = self.phase(server_round), self._exchange(server_round)
        return told(config, server_round, phase, model.architecture, train=train, exchange=exchange)

    def asked(self, server_round: int, model: GlobalModel) -> str:
        """What clients were asked for, in words; see `asking.asked_for`."""
        return asked_for(self.phase(server_round), model.architecture, self._exchange(server_round))

    def _exchange(self, server_round: int) -> str:
        """What clients exchange in a round: "adapter" or "weights"; "" of a run that has only one."""
        if not self.schedule.folds:
            return ""
        return "adapter" if self.phase(server_round).merges_adapters else "weights"

    def keeping(self, server_round: int) -> Keeping:
        """Where the updates of a round are kept."""
        return self._keeping[self.schedule.number_at(server_round) - 1]

    def make_room(self, server_round: int, clients: int, trained: GlobalModel, grid: Grid) -> None:
        """Find out whether a round's updates can be kept.

        Raises:
            RunFailedError: if they cannot.
        """
        try:
            with self.keeping(server_round).spill(clients, trained) as spill:
                if spill is not None:
                    give_back_large_blocks()
                    spill.open()
                if isinstance(grid, RepliesAsTheyCome):
                    grid.sparing = spill is not None
        except MergeError as error:
            raise RunFailedError(str(error)) from error

    def trained(self, server_round: int, model: GlobalModel) -> GlobalModel:
        """The part of the model that clients train in a round: all of it, but in some phases."""
        phase = self.phase(server_round)
        return model if phase.trains_all else model.part(trained_names(phase.train, model.sent))

    def whole(self, server_round: int, model: GlobalModel, merged: GlobalModel) -> GlobalModel:
        """The model with what a round has made of the part that clients trained."""
        return merged if self.phase(server_round).trains_all else model.with_part(merged)

    def require_structure(self, server_round: int, why: str) -> None:
        """End a run whose round was to change the model's structure and failed: later phases are for another model.

        Raises:
            RunFailedError: if it was.
        """
        phase = self.phase(server_round)
        if phase.changes_structure:
            raise RunFailedError(
                f"phase {self.schedule.number_at(server_round)} ({phase.method}) made no model in round "
                f"{server_round}: {why}; later phases are for the model that it makes. Resume the run to try again"
            )
