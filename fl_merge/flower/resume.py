"""Going on with a run that has stopped, whatever stopped it."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from fl_merge.errors import RecipeError
from fl_merge.model import GlobalModel
from fl_merge.pairs import RESIDUAL
from fl_merge.phases import Phase, as_schedule
from fl_merge.recipe import Recipe
from fl_merge.runs.checkpoint import Checkpoint
from fl_merge.types import MergeMethod, TensorSpec


@dataclass(frozen=True)
class Resumption:
    """From where a run goes on.

    Args:
        folder: of the run.
        force: go on although the method, the seed or the initial model is another than the run's.
    """

    folder: Path
    force: bool = False

    def read(
        self, method: MergeMethod, seed: int, wanted_specs: Callable[[bool], Mapping[str, TensorSpec]], num_rounds: int
    ) -> Checkpoint:
        """The checkpoint, if a run with these settings can go on from it.

        Args:
            method, seed: of the run that goes on.
            wanted_specs: what its clients would be sent, whether they exchange adapters or not.
            num_rounds: the number of its last round.

        Raises:
            RecipeError: if there is no checkpoint, no round is left to do, or the settings are not those of the run.
        """
        checkpoint = Checkpoint.read(self.folder)
        where = f"resume '{self.folder}'"
        if num_rounds <= checkpoint.round_number:
            raise RecipeError(
                f"{where}: round {checkpoint.round_number} is done and the run is to have {num_rounds}: wanted more "
                "rounds (they are counted from the run's beginning)"
            )
        if self.force:
            return checkpoint
        advice = "; give the run's own, or force it (force=True, --force, resume-force = true)"
        if str(method) != checkpoint.method:
            raise RecipeError(f"{where}: the run merges with {checkpoint.method}, found {method}{advice}")
        if seed != checkpoint.seed:
            raise RecipeError(f"{where}: the run has seed {checkpoint.seed}, found {seed}{advice}")
        done = phases_done(method, checkpoint.round_number)
        if any(each.changes_structure for each in done):
            return checkpoint  # its tensors are not those that the run began with
        adapter = done[-1].merges_adapters
        wanted, found = checkpoint.model.specs(), wanted_specs(adapter)
        if adapter:  # whose ranks may have changed
            wanted = {name: found.get(name, spec) for name, spec in wanted.items() if not name.startswith(RESIDUAL)}
        for name in [*wanted, *found]:
            if wanted.get(name) != found.get(name):
                raise RecipeError(
                    f"{where}: tensor '{name}' is {wanted.get(name, 'not')} in the run's model, "
                    f"{found.get(name, 'not')} in the initial one{advice}"
                )
        return checkpoint


def phases_done(method: MergeMethod, round_number: int) -> tuple[Phase, ...]:
    """The phases of which a round has been done after so many rounds."""
    schedule = as_schedule(method)
    return schedule.phases[: schedule.number_at(round_number)]


def checkpoint_of(method: MergeMethod, seed: int, round_number: int, model: GlobalModel) -> Checkpoint:
    """What a run with these settings goes on from after that round."""
    recipe = Recipe.of(method)
    return Checkpoint(round_number, seed, str(method), None if recipe is None else recipe.to_yaml(), model)


def goes_on_in(folder: str | Path, resumption: Resumption | None) -> bool:
    """Whether a resumed run goes on with the journal in this folder: its own, or where it left a second one."""
    if resumption is None:
        return False
    same = Path(folder).resolve() == resumption.folder.resolve()
    return same or (resumption is resumption_here() and (Path(folder) / "journal.jsonl").exists())


_resumption: contextvars.ContextVar[Resumption | None] = contextvars.ContextVar("fl_merge_resumption", default=None)


def resumption_here() -> Resumption | None:
    """That of the surrounding `resuming` block."""
    return _resumption.get()


@contextlib.contextmanager
def resuming(resumption: Resumption | None) -> Iterator[None]:
    """The FedMerge that starts inside goes on with that run."""
    token = _resumption.set(resumption)
    try:
        yield
    finally:
        _resumption.reset(token)
