"""The plan of a merge of files: for each tensor the method, the models and the weights, before any value is read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fl_merge.errors import MergeError, RecipeError, TensorMismatchError, counted
from fl_merge.hyperparameters import nearest
from fl_merge.method import METHODS, find, methods_in
from fl_merge.offline.catalogue import ROWS
from fl_merge.offline.config import Clause, OfflineRecipe, Ref
from fl_merge.offline.layout import Layout, Target, lay_out
from fl_merge.offline.models import Model, open_model
from fl_merge.offline.resolve import Resolver, base_place, check_filters, check_parameters
from fl_merge.offline.rows import Choice, Row
from fl_merge.recipe import Recipe
from fl_merge.types import BASE, Cohort, CohortSpec, MergeMethod, Output, Read, Tensor, TensorSpec, Update


@dataclass(frozen=True)
class Part:
    """Tensors that are merged alike: by one method, of the same models, with the same weights.

    Args:
        choice: how; its places are those of the tensors' sources.
        models: the sources' models.
        targets: the tensors.
    """

    choice: Choice
    models: tuple[Ref, ...]
    targets: tuple[Target, ...]


@dataclass(frozen=True)
class OfflinePlan:
    """A merge of files that is ready to run: a merge method, and the cohort for it.

    Args:
        recipe: what was asked for.
        models: what is read.
        layout: the merged model's tensors.
        parts: how each is made.
        notices: what the recipe's author should know.
    """

    recipe: OfflineRecipe
    models: Mapping[Ref, Model]
    layout: Layout
    parts: tuple[Part, ...]
    notices: tuple[str, ...]

    @property
    def donor(self) -> Model:
        """Whose config and tokenizer the merged model gets."""
        return self.models[self.recipe.donor]

    def written(self, spec: TensorSpec) -> TensorSpec:
        """How a tensor is written: floating ones in the recipe's dtype."""
        return TensorSpec(spec.shape, self.recipe.dtype) if self.recipe.dtype and spec.is_floating else spec

    def specs(self) -> dict[str, TensorSpec]:
        """The merged model's tensors."""
        return {target.name: self.written(target.spec) for target in self.layout.targets}

    def ids(self) -> dict[Ref, str]:
        """What the models are called among the clients."""
        return client_ids(self.recipe, list(self.models))

    def cohort(self, seed: int = 0) -> Cohort:
        """The models as a cohort; its base holds, under each name of the merged model, where deltas are taken from."""
        at = {}
        for part in self.parts:
            for target in part.targets:
                at[target.name] = (self.models[part.models[part.choice.base]], target.stored[part.choice.base])
        base = _Composed({target.name: at[target.name] for target in self.layout.targets})
        updates = tuple(Update(name, 1.0, self.models[ref].source) for ref, name in self.ids().items())
        return Cohort(base, updates, seed)

    def plan(self, spec: CohortSpec) -> Iterator[Output]:
        """One output a tensor of the merged model."""
        number = {client_id: place for place, client_id in enumerate(spec.client_ids)}
        ids = self.ids()
        for part in self.parts:
            clients = [ids[part.models[place]] for place in part.choice.clients]
            cohort = replace(
                spec,
                tensors={target.name: target.spec for target in part.targets},
                client_ids=tuple(clients),
                weights_N=part.choice.weights_N,
                metrics_N=(),
            )
            by_name = {target.name: target for target in part.targets}
            for output in part.choice.method.plan(cohort):
                target = by_name[output.name]
                reads = []
                for read in output.reads:
                    if read.source == BASE:
                        reads.append(read)
                    else:
                        stored = target.stored[part.choice.clients[read.source]]
                        reads.append(Read(number[clients[read.source]], stored, read.of))
                weights_N = output.weights_N or part.choice.weights_N
                yield replace(
                    output,
                    spec=self.written(output.spec),
                    reads=tuple(reads),
                    weights_N=weights_N if reads[1:] else None,
                )


class _Composed:
    """The tensors from which deltas are taken, under the merged model's names."""

    def __init__(self, at: Mapping[str, tuple[Model, str]]) -> None:
        self._at = at
        self._specs = {name: model.source.specs()[stored] for name, (model, stored) in at.items()}

    def specs(self) -> Mapping[str, TensorSpec]:
        return self._specs

    def read(self, name: str) -> Tensor:
        model, stored = self._at[name]
        return model.source.read(stored)

    def aliases(self) -> Mapping[str, str]:
        return {}


def client_ids(recipe: OfflineRecipe, models: Sequence[Ref]) -> dict[Ref, str]:
    """What models are called among the clients: their number; in our own form the name of their folder or file."""
    if recipe.ours is None:
        return {ref: str(number) for number, ref in enumerate(models)}
    names = {ref: Path(ref.path).name.removesuffix(".safetensors") for ref in models}
    unique = len(set(names.values())) == len(names)
    return names if unique else {ref: str(ref) for ref in models}


def plan_of(recipe: OfflineRecipe, beside: Path | None = None) -> OfflinePlan:
    """Open the models of a recipe and plan the merge. Nothing is read but headers.

    Args:
        recipe: what to do.
        beside: the recipe's folder, in which relative paths are looked for too.

    Raises:
        RecipeError: if the recipe does not fit the models.
        UpdateError: if the models do not fit each other.
    """
    check(recipe)
    models = {ref: open_model(ref, beside) for ref in recipe.models}
    layout = lay_out(recipe, models)
    notices = [*_form_notices(recipe), *layout.notices]
    if recipe.tokenizer_base:
        _require_one_vocabulary(recipe, models)
    if recipe.ours is not None:
        parts = tuple(_our_part(recipe, layout))
    else:
        row = ROWS[recipe.merge_method]
        resolver = Resolver(recipe, layout, row, client_ids(recipe, list(models)))
        check_filters(recipe, layout)
        parts = tuple(_parts(recipe, layout, row, resolver))
        notices += [*check_parameters(recipe, row), *_default_notices(recipe, row, resolver)]
    plan = OfflinePlan(recipe, models, layout, parts, tuple(notices))
    try:
        for _ in plan.plan(plan.cohort().spec()):
            pass
    except MergeError as error:  # the method and these models: what the recipe asks for cannot be
        raise RecipeError(str(error)) from None
    return plan


def check(recipe: OfflineRecipe) -> None:
    """Refuse what can be refused without the models.

    Raises:
        RecipeError: for an unknown method or parameter, or models that the method does not take.
    """
    if recipe.ours is not None:
        name = recipe.merge_method
        if name not in METHODS and ":" not in name:
            raise RecipeError(f"unknown merge method '{name}'{nearest(name, {*ROWS, *METHODS})}")
        _check_ours(recipe, recipe.ours)
        return
    if recipe.merge_method not in ROWS:
        raise RecipeError(f"unknown merge method '{recipe.merge_method}'{nearest(recipe.merge_method, ROWS)}")
    row = ROWS[recipe.merge_method]
    check_parameters(recipe, row)
    for number, part in enumerate(recipe.slices, start=1):
        at = f"slice {number}: " if recipe.stacked else ""
        base = part.base_model or recipe.base_model
        listed = [source.model for source in part.sources]
        if base is None and row.base == "required":
            what = "which is what t = 0 gives" if recipe.merge_method == "slerp" else "from which deltas are taken"
            raise RecipeError(f"{at}{recipe.merge_method} needs a base_model, {what}")
        if base is not None and base not in listed and (recipe.stacked and row.base != "ignored"):
            raise RecipeError(
                f"{at}base_model '{base}' is not among the sources, and which of its layers to take is open"
            )
        count = len(listed) + (base is not None and base not in listed and not recipe.stacked)
        others = count - (base is not None and row.base != "ignored")
        for (low, high), found, what in (
            (row.models, count, ", the base included"),
            (row.others, others, " beside the base"),
        ):
            if not low <= found <= (high or found):
                models = counted(found, "model") + (what if base is not None else "")
                wanted = str(low) if low == high else f"at least {low}" if high is None else f"{low} to {high}"
                raise RecipeError(f"{at}{recipe.merge_method}: found {models}, wanted {wanted}")


def _check_ours(recipe: OfflineRecipe, ours: Recipe) -> None:
    for name in dict.fromkeys((ours.merge_method, *(rule.merge_method for rule in ours.rules))):
        entry = find(name)
        if entry.merges != "models":
            wanted = "wanted one for models" + (", or slices" if entry.merges == "structures" else "")
            raise RecipeError(f"{name} is a method for {entry.merges}, {wanted}")
        if entry.sends:
            raise RecipeError(f"{name} needs what clients send beside their models: {', '.join(entry.sends)}")
        if entry.base and recipe.base_model is None:
            raise RecipeError(f"{name} needs a base_model, from which deltas are taken")
        if entry.base and recipe.base_model in {source.model for source in recipe.slices[0].sources}:
            raise RecipeError(
                f"model '{recipe.base_model}' is the base_model, whose delta is 0; leave it out of models"
            )
    require_models(ours.build(), len(recipe.slices[0].sources), "model")


def require_models(method: MergeMethod, count: int, what: str) -> None:
    """Refuse more or fewer models than a method, or one of those that it is made of, takes.

    Args:
        method: of a recipe.
        count: how many models, or adapters, are merged.
        what: "model" or "adapter", for the error.

    Raises:
        RecipeError: saying how many it takes and why.
    """
    for part in methods_in(method):
        if count not in part.clients:
            raise RecipeError(f"{part}: found {counted(count, what)}, wanted {part.clients}")


def _parts(recipe: OfflineRecipe, layout: Layout, row: Row, resolver: Resolver) -> Iterator[Part]:
    groups: dict[object, tuple[Choice, tuple[Ref, ...], list[Target]]] = {}
    made: dict[object, Choice] = {}
    for target in layout.targets:
        settings = resolver.settings(target)
        values = (tuple(settings.shared.items()), tuple(tuple(each.items()) for each in settings.each))
        key = (*values, settings.ids, settings.base)
        if key not in made:
            made[key] = row.make(settings)
        models = tuple(source.model for source in layout.slices[target.slice].sources)
        groups.setdefault(key, (made[key], models, []))[2].append(target)
    for choice, models, targets in groups.values():
        yield Part(choice, models, tuple(targets))


def _our_part(recipe: OfflineRecipe, layout: Layout) -> Iterator[Part]:
    """Our own form: one method, with its rules, for all tensors; the models' shares sum to 1."""
    assert recipe.ours is not None
    [part] = layout.slices
    models = tuple(source.model for source in part.sources)
    base = models.index(recipe.base_model) if recipe.base_model in models else 0
    clients = tuple(range(len(recipe.slices[0].sources)))
    weights = []
    for source in recipe.slices[0].sources:
        for name in source.parameters:
            if name != "weight":
                raise RecipeError(f"model '{source.model}': found parameter '{name}', wanted none but weight")
        clauses = source.parameters.get("weight", (Clause(1.0),))
        value = clauses[0].value
        plain = len(clauses) == 1 and clauses[0].filter is None
        if not plain:
            raise RecipeError(f"model '{source.model}': weight: found a filter, wanted a number > 0 for all tensors")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise RecipeError(f"model '{source.model}': weight: found {value!r}, wanted a number > 0")
        weights.append(float(value))
    total = math.fsum(weights)
    method: MergeMethod = recipe.ours.build()
    yield Part(Choice(method, clients, tuple(w / total for w in weights), base), models, layout.targets)


def _form_notices(recipe: OfflineRecipe) -> Iterator[str]:
    if recipe.base_model is None:
        yield f"no base_model: config and tokenizer are those of the first model, '{recipe.donor}'"
    if recipe.ours is not None:
        return
    listed = {source.model for part in recipe.slices for source in part.sources}
    if (
        recipe.base_model is not None
        and recipe.base_model not in listed
        and ROWS[recipe.merge_method].base == "ignored"
    ):
        yield f"base_model '{recipe.base_model}' is one of the models that are merged, as in mergekit"
    if recipe.cast is not None:
        name = str(recipe.cast).removeprefix("torch.")
        yield (
            f"dtype {name}: mergekit computes in it; here models are read in their own dtype, merged in float32 "
            "(float64 for a float64 result) and rounded once"
        )


def _default_notices(recipe: OfflineRecipe, row: Row, resolver: Resolver) -> Iterator[str]:
    for name in resolver.left_out:
        parameter = row.parameters[name]
        theirs, here = parameter.left_out(compat=True), parameter.left_out(compat=False)
        if theirs != here and recipe.compat:
            yield f"'{name}' is left out: {theirs} as in mergekit; ours is {here} (compat: false)"
    if recipe.compat:
        yield from row.notes
    for part in resolver.layout.slices:
        place = base_place(recipe, part, row)
        given = part.sources[place].parameters if place is not None else {}
        for name in given:
            if row.parameters[name].each == "others":
                yield f"'{name}' of the base '{recipe.base_model}' is not used"


def _require_one_vocabulary(recipe: OfflineRecipe, models: Mapping[Ref, Model]) -> None:
    """tokenizer_source: base asks for rows in the order of the base's tokens: refused where they have another one."""
    wanted = models[recipe.donor].vocabulary()
    for ref, model in models.items():
        found = model.vocabulary()
        if found is not None and wanted is not None and found != wanted:
            raise TensorMismatchError(
                f"tokenizer_source: base: the tokens of model '{ref}' are not those of '{recipe.donor}'; to rearrange "
                "embeddings is not supported"
            )
