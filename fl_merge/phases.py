"""A federation whose rounds do not all do the same: other methods, parts of the model, a model of another structure.

    FedMerge(
        schedule(
            [
                phase(weighted_average(), rounds=3),
                phase(moe_upcycle(router="hidden")),
                phase(weighted_average(), rounds=4, train="router"),
                phase(weighted_average(), rounds=3),
            ]
        )
    )

A phase whose method changes the structure is one round like any other: clients train the model as it was, and what
they send is merged to one of another structure, from which the next phase starts.

The first phase may merge LoRA adapters (`phase(lora_svd(), rounds=3)`). When it ends the adapter is folded into the
model that it belongs to (`FedMerge(base=...)`), with which the later phases go on.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fl_merge.errors import MergeError, RecipeError, counted
from fl_merge.exchange import exchange_of
from fl_merge.hyperparameters import whole_number
from fl_merge.method import METHODS, Method, as_method
from fl_merge.structures import reconfigure
from fl_merge.structures.rows import mlp_inputs, sparse_row_of
from fl_merge.types import CohortSpec, MergeMethod, Output, TensorSpec

ALL = ("all",)
ROUTER = "router"

_CLIENTS = (2, 3, 4, 8, 16)
"""With how many clients a structure is planned before a run: the first number that the method takes."""


@dataclass(frozen=True)
class Phase:
    """Rounds that do the same; made by `phase`.

    Args:
        method: that merges in these rounds.
        rounds: how many; None for all that are left.
        train: what clients train and send: ("all",), or "router" and globs on names of tensors.
        config: what else clients are told in these rounds, such as {"local-steps": 100}.
    """

    method: MergeMethod
    rounds: int | None = None
    train: tuple[str, ...] = ALL
    config: Mapping[str, bool | int | float | str] = field(default_factory=dict)

    @property
    def changes_structure(self) -> bool:
        """Whether the model has other tensors afterwards."""
        return changes_structure(self.method)

    @property
    def merges_adapters(self) -> bool:
        """Whether clients exchange LoRA adapters instead of the model."""
        return exchange_of(self.method) is not None

    @property
    def trains_all(self) -> bool:
        """Whether clients train all of the model."""
        return self.train == ALL

    def __str__(self) -> str:
        count = "" if self.rounds is None else f", rounds={self.rounds}"
        train = "" if self.trains_all else f", train={list(self.train)!r}"
        config = f", config={dict(self.config)!r}" if self.config else ""
        return f"phase({self.method}{count}{train}{config})"


def phase(
    method: MergeMethod | str,
    rounds: int | None = None,
    *,
    train: str | Sequence[str] = "all",
    config: Mapping[str, bool | int | float | str] | None = None,
) -> Phase:
    """Rounds that do the same.

    Args:
        method: how they merge. One that changes the structure (`moe_upcycle`, `depth_upscale`, ...) has one round. One
            for LoRA adapters has its place at the beginning.
        rounds: how many; None for all that are left of the run.
        train: what clients train and send: "all", "router" (of a mixture of experts), a glob on names of tensors, or
            several of these. All else keeps its value.
        config: what else clients are told in these rounds; it comes before what `start` and the run config say.

    Raises:
        RecipeError: for values that make no sense.
    """
    merge = as_method(method)
    if isinstance(merge, Schedule):
        raise RecipeError("found a schedule, wanted the merge method of one phase")
    globs = (train,) if isinstance(train, str) else tuple(train)
    if not globs or not all(isinstance(glob, str) and glob and "," not in glob for glob in globs):
        raise RecipeError(f"train: found {train!r}, wanted 'all', 'router', or globs on names of tensors")
    if "all" in globs and globs != ALL:
        raise RecipeError(f"train: found {list(globs)!r}, wanted 'all' alone, or parts of the model")
    exchange = exchange_of(merge)
    if exchange is not None and globs != ALL:
        raise RecipeError(f"train: found {train!r} with {merge}, in whose rounds clients train their adapters")
    if exchange is not None and exchange.share == "A":
        raise RecipeError(f"found {merge}, with which each client keeps a B of its own: there is no adapter to fold")
    settings = dict(config or {})
    for key, value in settings.items():
        if not isinstance(key, str) or not isinstance(value, bool | int | float | str):
            raise RecipeError(f"config: found {key!r}: {value!r}, wanted names with a number, a text, true or false")
        if key == "server-round" or key.startswith("fl-merge."):
            raise RecipeError(f"config: '{key}' is the server's own")
    inner = getattr(merge, "method", None)
    if inner is not None and changes_structure(inner):
        raise RecipeError(f"found {merge}; wanted {inner} by itself: a change of structure has no delta")
    if changes_structure(merge):
        if rounds not in (None, 1):
            raise RecipeError(f"rounds: found {rounds} with {merge}, wanted 1: a structure is changed in one round")
        if globs != ALL:
            raise RecipeError(f"train: found {train!r} with {merge}, which needs all of the clients' models")
        rounds = 1
    elif rounds is not None:
        whole_number("rounds", rounds, 1)
    return Phase(merge, rounds, globs, settings)


def changes_structure(method: object) -> bool:
    """Whether what a method makes has other tensors than its inputs."""
    return isinstance(method, Method) and method.name in METHODS and METHODS[method.name].merges == "structures"


@dataclass(frozen=True)
class Schedule:
    """Phases one after the other; made by `schedule`. It stands where a method stands in `FedMerge`."""

    phases: tuple[Phase, ...]

    outermost = True
    """It acts on a whole run: no wrapper goes round it."""

    def plan(self, spec: CohortSpec) -> Iterator[Output]:
        """A schedule is for the rounds of a run.

        Raises:
            RecipeError: always.
        """
        raise RecipeError("a schedule of phases is for a federation (FedMerge); one merge has one method")

    def number_at(self, round_number: int) -> int:
        """The number of the phase to which a round belongs, from 1; the last one's for rounds after it."""
        last = 0
        for number, each in enumerate(self.phases, start=1):
            last += each.rounds or 0
            if each.rounds is None or round_number <= last:
                return number
        return len(self.phases)

    def at(self, round_number: int) -> Phase:
        """The phase to which a round belongs."""
        return self.phases[self.number_at(round_number) - 1]

    def begins_with(self, round_number: int) -> bool:
        """Whether a round is the first of its phase."""
        return round_number == 1 or self.number_at(round_number) != self.number_at(round_number - 1)

    @property
    def folds(self) -> bool:
        """Whether it begins with adapters, which are folded into their model for the phases after them."""
        return self.phases[0].merges_adapters and len(self.phases) > 1

    @property
    def total(self) -> int | None:
        """The number of rounds; None if the last phase has all that are left."""
        return None if self.phases[-1].rounds is None else self._fewest()

    def _fewest(self) -> int:
        return sum(each.rounds or 1 for each in self.phases)

    def require_rounds(self, num_rounds: int) -> None:
        """Refuse a run of another length.

        Raises:
            RecipeError: saying how many rounds the phases have.
        """
        if self.total is not None and num_rounds != self.total:
            raise RecipeError(
                f"phases: they have {counted(self.total, 'round')}, and the run is to have {num_rounds} "
                "(num-server-rounds)"
            )
        if len(self.phases) > 1 and num_rounds < self._fewest():
            raise RecipeError(
                f"phases: they have at least {counted(self._fewest(), 'round')}, and the run is to have {num_rounds} "
                "(num-server-rounds)"
            )

    def require_whole_models(self, who: str) -> None:
        """Refuse phases that train a part of the model or an adapter, or change the model's structure.

        Raises:
            RecipeError: if there is one.
        """
        for number, each in enumerate(self.phases, start=1):
            if not each.trains_all or each.changes_structure or (self.folds and each.merges_adapters):
                raise RecipeError(f"{who}: it is for whole models of one structure, found phase {number}: {each}")

    def check(self, tensors: Mapping[str, TensorSpec], architecture: Mapping[str, Any] | None = None) -> None:
        """Plan every phase on what the phases before it make, as far as that can be known before clients have replied.

        Args:
            tensors: of the model that the run starts from, tied names left out; where it begins with adapters, of the
                model that they belong to. The rounds of the adapters are not planned here.
            architecture: its config, where it is known.

        Raises:
            RecipeError: naming the phase that does not fit.
        """
        specs: Mapping[str, TensorSpec] = tensors
        config = dict(architecture or {})
        for number, each in enumerate(self.phases, start=1):
            if each.merges_adapters:
                continue
            try:
                names = trained_names(each.train, specs)
                clients, made = _planned(each.method, {name: specs[name] for name in names})
                if made is None:
                    return
                if each.changes_structure:
                    specs = made
                    config = reconfigure(config, each.method, clients) if config else config
                elif made != {name: specs[name] for name in names}:
                    raise RecipeError(f"{each.method} changes the model's tensors, which a run cannot carry on with")
            except RecipeError as error:
                raise RecipeError(f"phase {number}: {error}") from None

    def __str__(self) -> str:
        return f"schedule([{', '.join(map(str, self.phases))}])"


def schedule(phases: Sequence[Phase]) -> Schedule:
    """A run in phases.

    Args:
        phases: made by `phase`. Each begins where the one before ends; a server optimizer begins anew in each.

    Raises:
        RecipeError: naming the phase that has no number of rounds and is not the last, that is no phase, or that merges
            adapters after the first or without another after it.
    """
    if not phases:
        raise RecipeError("phases: found none, wanted one or more")
    for number, each in enumerate(phases, start=1):
        if not isinstance(each, Phase):
            raise RecipeError(f"phase {number}: found {each}, wanted phase(method, rounds=...)")
        if each.rounds is None and number < len(phases):
            raise RecipeError(f"phase {number}: found no number of rounds, which only the last phase may leave out")
        if each.merges_adapters and number > 1:
            raise RecipeError(
                f"phase {number}: found {each.method}, which merges adapters; wanted it as the first phase: after that "
                "clients have the model and no adapter"
            )
    if phases[0].merges_adapters and len(phases) == 1:
        raise RecipeError(
            f"phases: found {phases[0].method} alone, which merges adapters; wanted phases for the model that they are "
            "folded into, or the method without phases"
        )
    return Schedule(tuple(phases))


def parse_rounds(where: str, value: object) -> tuple[int | None, int | None]:
    """The first round, where it is said, and the number of rounds: of `3`, or of `4-6`; None for neither.

    Raises:
        RecipeError: for anything else.
    """
    if value is None:
        return None, None
    match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", str(value)) if not isinstance(value, bool) else None
    if match is None or (match[2] and not 1 <= int(match[1]) <= int(match[2])):
        raise RecipeError(f"{where}: rounds: found {value!r}, wanted how many, or from which to which (4-6)")
    return (int(match[1]), int(match[2]) - int(match[1]) + 1) if match[2] else (None, int(match[1]))


def as_schedule(method: MergeMethod) -> Schedule:
    """The schedule itself, or one that has the same method in all rounds."""
    return method if isinstance(method, Schedule) else Schedule((Phase(method),))


def trained_names(train: Sequence[str], names: Iterable[str]) -> list[str]:
    """The names of the tensors that are trained, in the order of the model.

    Args:
        train: as in `Phase`.
        names: of the model's tensors.

    Raises:
        RecipeError: for a part that the model does not have.
    """
    every = list(names)
    if tuple(train) == ALL:
        return every
    taken: set[str] = set()
    for glob in train:
        if glob == ROUTER:
            row = sparse_row_of(every)
            end = f"{row.router}.weight" if row is not None else ""
            found = [name for name in every if row is not None and (name == end or name.endswith(f".{end}"))]
        else:
            found = fnmatch.filter(every, glob)
        if not found:
            what = "which has no router" if glob == ROUTER else f"which has no tensor of that name ({_shown(every)})"
            raise RecipeError(f"train: found '{glob}' for a model {what}")
        taken.update(found)
    return [name for name in every if name in taken]


def _planned(method: MergeMethod, tensors: Mapping[str, TensorSpec]) -> tuple[int, dict[str, TensorSpec] | None]:
    """With how many made-up clients a method can be planned, and what it would make; None if only a round can tell."""
    statistics = mlp_inputs(tensors)
    for clients in _CLIENTS:
        ids = tuple(str(client) for client in range(clients))
        spec = CohortSpec(tensors, ids, (1.0 / clients,) * clients, statistics=statistics)
        try:
            return clients, {output.name: output.spec for output in method.plan(spec)}
        except MergeError:
            continue
    return 0, None


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
